"""The mean of losses and the look for NaN take any iterable."""

import numpy

from nnx import np
from nnx.batches import MeanLoss, all_finite


def test_the_mean_of_losses_goes_on_from_an_iterator_of_its_state():
    losses = MeanLoss()
    for loss, rows in ((1.0, 30), (2.0, 30), (4.0, 10)):
        losses.add(loss, rows)
    again = MeanLoss(iter(losses.state()))
    assert again.take() == losses.take() == 130 / 70


def test_all_finite_reads_an_iterator_once():
    large = np.asarray([1e200, 1.0])  # whose square overflows, so that every element is looked at
    with numpy.errstate(over="ignore"):
        for params, finite in (([large], True), ([np.ones(2), np.asarray([numpy.nan])], False)):
            assert all_finite(params) is all_finite(iter(params)) is finite
