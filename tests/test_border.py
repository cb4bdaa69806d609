"""Weird values at the border: each call is right, or a clear error that changes nothing; `fuzz.py` has the calls."""

import collections

import fuzz
import numpy
import pytest

import nnx
from nnx import np
from nnx.layers import activation

PART = 7 if nnx.GPU else 1  # of the calls; each takes ten times as long on CuPy without a GPU


def assert_right(calls):
    counts, found = fuzz.summary(calls)
    lines = [f"{kind}: {what}" for kind, whats in found.items() for what in whats]
    assert not lines, "\n".join(lines[:20])
    assert counts["right"] > 1000


def test_every_argument_with_every_weird_value():
    assert_right([*fuzz.single_calls()][::PART])


def test_several_weird_values_at_once():
    assert_right(fuzz.random_calls(1500, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_calls(part):
    assert_right(fuzz.random_calls(10_000 // PART, seed=100 + part))


def endings(name):
    arguments = fuzz.CALLS[name]().arguments
    return collections.Counter(fuzz.run(name, {a: value})[0] for a in arguments for value in fuzz.WEIRD)


def test_the_fuzzer_notices_what_is_accepted_unclear_wrong_or_changed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nnx.optimizer, "check_number", lambda name, value, low, high: value)
        assert endings("SGD")["silent wrong"] > 5
    with monkeypatch.context() as patch:
        patch.setattr(nnx.optimizer, "check_number", lambda name, value, low, high: 1 / 0)
        assert endings("SGD")["unclear"] > 5
    with monkeypatch.context() as patch:
        patch.setattr(activation, "tanh", lambda x: np.tanh(x) * 1.001)
        assert endings("Tanh.forward")["silent wrong"] > 5

    class Hasty(nnx.BatchNorm):
        def forward(self, x, train_flg=True):
            self.running_mean += 1
            return super().forward(x, train_flg)

    layer = Hasty(np.ones(3), np.zeros(3))
    call = fuzz.Call(layer.forward, {"x": fuzz.X}, {"x": fuzz.real}, None, (layer,))
    assert fuzz.judge(call, {"x": numpy.ones((4, 2))}, overflows=False)[0] == "changed state"
