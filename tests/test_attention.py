"""Attention layers: the book's formulas, PyTorch's, extreme scores, dtypes, the weights for a plot, errors."""

import copy
import pickle

import numpy
import pytest

from nnx import GPU, np, to_cpu
from nnx.layers import Attention, AttentionWeight, TimeAttention, WeightSum

KINDS = [AttentionWeight, WeightSum, Attention, TimeAttention]


def normal(*shape, dtype="float64", seed=0):
    return np.asarray(numpy.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype))


def inputs(kind, N=4, Te=5, Td=3, H=6, dtype="float64"):
    """Return the inputs of a layer, and a gradient of its output."""
    shape = {WeightSum: (N, Te), TimeAttention: (N, Td, H)}.get(kind, (N, H))
    out = {AttentionWeight: (N, Te), TimeAttention: (N, Td, H)}.get(kind, (N, H))
    return normal(N, Te, H, dtype=dtype), normal(*shape, dtype=dtype, seed=1), normal(*out, dtype=dtype, seed=2)


def reference(hs, h):
    """Return the weights and the weighted sum, row by row and step by step, by the book's formulas."""
    scores = numpy.array([[state @ query for state in row] for row, query in zip(hs, h, strict=True)])
    e = numpy.exp(scores - scores.max(axis=1, keepdims=True))
    a = e / e.sum(axis=1, keepdims=True)
    return a, numpy.array([sum(w * state for w, state in zip(*row, strict=True)) for row in zip(a, hs, strict=True)])


def test_the_weights_and_the_sum_are_the_books():
    hs, h = normal(4, 5, 6), normal(4, 6)
    a, c = reference(to_cpu(hs), to_cpu(h))
    attention = Attention()
    close(AttentionWeight().forward(hs, h), a, 1e-12)
    close(WeightSum().forward(hs, a), c, 1e-12)
    close(attention.forward(hs, h), c, 1e-12)
    close(attention.attention_weight, a, 1e-12)


def test_attention_is_the_weighted_sum_after_the_weights():
    hs, h, dout = inputs(Attention)
    weight, weighted, whole = AttentionWeight(), WeightSum(), Attention()
    close(weighted.forward(hs, weight.forward(hs, h)), whole.forward(hs, h), 1e-12)
    dhs, da = weighted.backward(dout)
    from_weights, dh = weight.backward(da)
    for ours, expected in zip(whole.backward(dout), (dhs + from_weights, dh), strict=True):
        close(ours, expected, 1e-12)


def test_a_decoder_attends_at_each_of_its_steps():
    hs, hs_dec, dout = inputs(TimeAttention)
    layer, total = TimeAttention(), np.zeros_like(hs)
    out = layer.forward(hs, hs_dec)
    dhs, dhs_dec = layer.backward(dout)
    for t in range(hs_dec.shape[1]):
        step = Attention()
        close(step.forward(hs, hs_dec[:, t]), out[:, t], 1e-12)
        close(layer.attention_weights[t], step.attention_weight, 1e-12)
        each, dh = step.backward(dout[:, t])
        close(dh, dhs_dec[:, t], 1e-12)
        total += each
    close(dhs, total, 1e-12)


@pytest.mark.skipif(GPU, reason="compares two libraries on the CPU")
def test_results_and_gradients_of_50_shapes_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    attention = torch.nn.functional.scaled_dot_product_attention
    rng = numpy.random.default_rng(0)
    sizes = [(1, 1, 1, 1), (1, 7, 1, 3), (3, 1, 4, 2), *rng.integers(1, 20, (47, 4)).tolist()]
    for N, Te, Td, H in sizes:
        for kind in KINDS:
            hs, other, dout = (a / 2 for a in inputs(kind, N, Te, Td, H, "float32"))
            layer = kind()
            a, b = (torch.from_numpy(v.copy()).requires_grad_() for v in (hs, other))
            if kind is AttentionWeight:
                expected = torch.softmax(torch.einsum("nth,nh->nt", a, b), 1)
            elif kind is WeightSum:
                expected = torch.einsum("nth,nt->nh", a, b)
            else:
                expected = attention(b.reshape(N, -1, H), a, a, scale=1.0).reshape(other.shape)
            expected.backward(torch.from_numpy(dout.copy()))
            close(layer.forward(hs, other), expected.detach(), 1e-5)
            for ours, theirs in zip(layer.backward(dout), (a.grad, b.grad), strict=True):
                close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_kept_and_large_scores_do_not_overflow(kind, dtype):
    """One state is far more alike than the others: its weight is 1, although the scores are beyond float16's range."""
    hs, other, dout = inputs(kind, H=64, dtype=dtype)
    if kind is not WeightSum:
        hs[:, 2], other[...] = 100, 100  # scores of 640,000
    layer = kind()
    out = layer.forward(hs, other)
    grads = layer.backward(dout)
    assert {out.dtype, *(g.dtype for g in grads)} == {numpy.dtype(dtype)}
    assert all(numpy.isfinite(to_cpu(a)).all() for a in (out, *grads))
    if kind is AttentionWeight:
        assert to_cpu(out).tolist() == [[0, 0, 1, 0, 0]] * 4
    elif kind is not WeightSum:
        assert (out == 100).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_that_of_the_states(kind):
    hs, other, _ = inputs(kind)
    assert kind().forward(hs.astype("float32"), other).dtype == numpy.float32
    assert kind().forward(to_cpu(hs).tolist(), to_cpu(other).tolist()).dtype == numpy.float64


@pytest.mark.parametrize("kind", KINDS)
def test_backward_gives_the_same_again_and_changes_nothing(kind):
    hs, other, dout = given = inputs(kind)
    before = [a.copy() for a in given]
    layer = kind()
    out = layer.forward(hs, other)
    kept, first = out.copy(), [g.copy() for g in layer.backward(dout)]
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, b in zip(again.backward(dout), first, strict=True):
            a_before = a.copy()
            a[...] = 0  # the caller's own
            assert (a_before == b).all()
    kind().forward(hs * 2, other)
    assert (out == kept).all()
    assert all((a == b).all() for a, b in zip(given, before, strict=True))
    assert layer.params == layer.grads == []
    assert repr(layer) == f"{kind.__name__}()"


@pytest.mark.parametrize("steps", [1, 3])
def test_the_weights_are_read_as_in_the_books_plot(steps):
    """The book's script stacks the weights of all steps by NumPy's `array`, of one sentence, also on the GPU."""
    layer, (hs, hs_dec, _) = TimeAttention(), inputs(TimeAttention, N=1, Td=steps)
    layer.forward(hs, hs_dec)
    for stacked in (numpy.array(layer.attention_weights), to_cpu(np.array(layer.attention_weights))):
        assert stacked.shape == (steps, 1, 5)
        attention_map = stacked.reshape(steps, 5)
        numpy.testing.assert_allclose(attention_map.sum(axis=1), 1)
    assert [w.shape for w in layer.attention_weights] == [(1, 5)] * steps
    a, _ = reference(to_cpu(hs), to_cpu(hs_dec[:, 0]))
    close(layer.attention_weights[0], a, 1e-12)


@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        (
            AttentionWeight,
            [(4, 5, 6), (4, 5)],
            r"^AttentionWeight: hs must .*h \(N, H\), .*got \(4, 5, 6\) and \(4, 5\)",
        ),
        (AttentionWeight, [(4, 5, 6), (3, 6)], r"^AttentionWeight: .*\(3, 6\)"),
        (AttentionWeight, [(4, 0, 6), (4, 6)], "not empty"),
        (WeightSum, [(4, 5, 6), (4, 6)], r"^WeightSum: .*a \(N, T\), .*\(4, 6\)"),
        (WeightSum, [(4, 5, 6), (1, 5)], r"^WeightSum: .*\(1, 5\)"),
        (Attention, [(4, 6), (4, 6)], r"^Attention: .*\(4, 6\) and"),
        (Attention, [(4, 5, 6), (4, 5, 6)], r"^Attention: .*and \(4, 5, 6\)"),
        (Attention, [(4, 5, 6), ()], r"^Attention: .*and \(\)"),
        (TimeAttention, [(4, 5, 6), (4, 3, 5)], r"^TimeAttention: hs_enc must .*hs_dec \(N, Td, H\), .*\(4, 3, 5\)"),
        (TimeAttention, [(4, 5, 6), (1, 3, 6)], r"^TimeAttention: .*\(1, 3, 6\)"),
        (TimeAttention, [(4, 5, 6), (4, 0, 6)], "not empty"),
        (TimeAttention, [(4, 5, 6), (4, 6)], r"^TimeAttention: .*and \(4, 6\)"),
    ],
)
def test_errors_name_layer_and_inputs(kind, shapes, message):
    with pytest.raises(ValueError, match=message):
        kind().forward(*(numpy.ones(shape) for shape in shapes))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_checks_its_argument(kind):
    layer, (hs, other, dout) = kind(), inputs(kind)
    layer.forward(hs, other)
    with pytest.raises(ValueError, match=f"^{kind.__name__}.backward: dout must have the shape of the output"):
        layer.backward(dout[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_forward_leaves_a_pending_backward_alone(kind):
    layer, (hs, other, dout) = kind(), inputs(kind)
    layer.forward(hs, other)
    before = layer.backward(dout)
    with pytest.raises(ValueError, match="must have shape"):
        layer.forward(hs.astype("float32")[:1], other)
    for a, b in zip(layer.backward(dout), before, strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()


def close(ours, expected, tolerance):
    expected = expected if hasattr(expected, "numpy") else to_cpu(expected)
    numpy.testing.assert_allclose(to_cpu(ours), numpy.asarray(expected), rtol=tolerance, atol=tolerance)
