"""SGD and clipping on lists of arrays."""

import math

import numpy
import pytest

from nnx import SGD, clip_grads, np, to_cpu


def arrays(rng, *shapes, dtype="float32"):
    return [np.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sgd_takes_the_step_in_place(rng, dtype):
    shapes = [(3, 4), (4,), (300, 300), (0, 2), (1,)]  # below and above the size of a block
    params, grads = arrays(rng, *shapes, dtype=dtype), arrays(rng, *shapes, dtype=dtype)
    before = [to_cpu(p).copy() for p in params]
    same = list(params)
    SGD(lr=0.1).update(params, grads)
    for p, q, b, g in zip(params, same, before, grads, strict=True):
        assert p is q
        assert p.dtype == dtype
        step = numpy.asarray(0.1, dtype) * to_cpu(g)
        numpy.testing.assert_allclose(to_cpu(p), b - step, rtol=1e-5, atol=4 * numpy.finfo(dtype).eps)


def test_sgd_takes_parameters_of_any_layout(rng):
    (base, wide), grads = arrays(rng, (300, 400), (300, 800)), arrays(rng, (400, 300), (300, 400))
    params = [base.T, wide[:, ::2]]
    before = [to_cpu(p).copy() for p in params]
    SGD(0.5).update(params, grads)
    for p, b, g in zip(params, before, grads, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), b - numpy.float32(0.5) * to_cpu(g), rtol=1e-6)
    numpy.testing.assert_array_equal(to_cpu(base), to_cpu(params[0]).T)


def test_lr_may_change_between_steps():
    p, g = [np.zeros(1)], [np.ones(1)]
    optimizer = SGD(0.1)
    optimizer.update(p, g)
    optimizer.lr = 1.0
    optimizer.update(p, g)
    assert float(p[0][0]) == pytest.approx(-1.1)


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ([(2, 3)], "every parameter needs a gradient, got 2 params and 1 grads"),
        ([(2, 3), (1,)], r"grads\[1\] must have the shape of params\[1\] \(3,\), got \(1,\)"),
        ([(2, 3), (1, 3)], r"grads\[1\] must have the shape of params\[1\] \(3,\), got \(1, 3\)"),
    ],
)
def test_sgd_refuses_lists_that_do_not_match(grads, words):
    params = [np.ones((2, 3)), np.ones(3)]
    with pytest.raises(ValueError, match=f"SGD: {words}"):
        SGD().update(params, [np.ones(shape) for shape in grads])
    assert all(float(p.min()) == float(p.max()) == 1 for p in params)


def test_clip_grads_scales_to_the_common_norm():
    grads = [np.asarray([3.0, 0.0], "float32"), np.asarray([[4.0]], "float32")]
    clip_grads(grads, 10)
    assert [float(g.sum()) for g in grads] == [3, 4]
    clip_grads(grads, 2.5)
    assert [float(g.sum()) for g in grads] == pytest.approx([1.5, 2], rel=1e-5)
    assert grads[0].dtype == np.float32


def test_clip_grads_at_the_ends_of_the_range():
    grads = [np.full(4, 2e38, "float32")]
    clip_grads(grads, 1.0)
    assert float(grads[0][0]) == pytest.approx(0.5)
    clip_grads([], 1.0)
    bad = [np.asarray([math.nan, 1.0])]
    clip_grads(bad, 1.0)
    assert numpy.isnan(to_cpu(bad[0])).all()


@pytest.mark.parametrize("max_norm", [0, -1, math.nan])
def test_clip_grads_refuses_a_norm(max_norm):
    with pytest.raises(ValueError, match="clip_grads: max_norm must be positive"):
        clip_grads([np.ones(2)], max_norm)
