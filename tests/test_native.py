"""Native kernels compared with portable ones: dtypes, layouts, sizes, extreme values; errors in ulp; memory."""

import math
import os
import subprocess
import sys

import numpy
import pytest
from kernel_cases import CASES, DTYPES, LAYOUTS, STEPS, TOLERANCE, arguments, assert_same, outcome

from nnx import GPU

if GPU:
    pytest.skip("the native kernels are for NumPy: run without NNX_GPU", allow_module_level=True)

from nnx.kernels import portable

native = pytest.importorskip("nnx.kernels.native", reason="the native kernels are not built")
NAMES = sorted(set(CASES) & set(native.__all__))
REAL = ["float32", "float64"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_matches_portable(name, dtype, layout, weighted):
    if weighted and "_loss" not in name and "squared" not in name:
        return
    for shape in CASES[name][0]:
        case = name, shape, dtype, layout
        if name.endswith("_loss") and 0 in shape:
            continue  # no mean; the loss layer refuses an empty batch
        factor = 50 if name in ("bias_grad", "affine_grad") else 8  # sums of thousands of rows, in another order
        options = {"weighted": weighted}
        assert_same(outcome(native, *case, **options), outcome(portable, *case, **options), factor * TOLERANCE[dtype])


def test_names_match_portable():
    assert set(native.__all__) <= set(portable.__all__)
    assert set(portable.__all__) - set(native.__all__) == {"accumulation_dtype", "gather"}


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_plain_arrays_do_not_fall_back_to_portable(monkeypatch, name, dtype):
    """Falling back to portable would be correct but slow."""
    monkeypatch.setattr(portable, name, lambda *_: pytest.fail(f"{name} was passed on to portable"))
    outcome(native, name, CASES[name][0][0], dtype, "C")


@pytest.mark.parametrize("label_dtype", ["int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("name", ["softmax_loss", "softmax_loss_grad", "sigmoid_loss", "sigmoid_loss_grad"])
def test_labels_of_any_integer_dtype(monkeypatch, name, label_dtype):
    case, options = (name, (6, 3), "float32", "C"), {"label_dtype": label_dtype}
    expected = outcome(portable, *case, **options)
    monkeypatch.setattr(portable, name, lambda *_: pytest.fail("passed on"))
    assert_same(outcome(native, *case, **options), expected, 1e-6)


# ---- every size around a vector, alignment, extreme values -------------------------------------------

ELEMENTWISE = {
    "sigmoid": lambda x: 1 / (1 + numpy.exp(-x)),
    "tanh": numpy.tanh,
    "relu": lambda x: numpy.where(x <= 0, 0, x),
    "gelu": lambda x: x / (1 + numpy.exp(-2 * _u(x))),
}
GRADIENTS = {  # of dout and y, or x
    "sigmoid_grad": lambda d, y: d * y * (1 - y),
    "relu_grad": lambda d, y: numpy.where(y > 0, d, 0),
    "tanh_grad": lambda d, y: d * (1 - y * y),
    "gelu_grad": lambda d, x: d * _gelu_slope(x),
}


def _u(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_slope(x):
    s = 1 / (1 + numpy.exp(-2 * _u(x)))
    return s + x * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", ["sigmoid", "relu", "tanh", "gelu", "softmax", "dropout"])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2**20 + 3])
def test_any_number_of_elements_and_alignment(name, n, dtype):
    more = (0.3, 5, 7) if name == "dropout" else ()
    values = numpy.random.default_rng(0).normal(size=n + 1).astype(dtype)
    shifted = numpy.frombuffer(b"0" * 4 + values[:n].tobytes(), "uint8")[4:].view(dtype)  # off by half a double
    for x in (values[:n], values[1:], shifted):
        if name == "softmax" and n == 0:
            continue  # no maximum
        assert_same([getattr(native, name)(x, *more)], [getattr(portable, name)(x, *more)], 8 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ELEMENTWISE)
@numpy.errstate(all="ignore")
def test_float32_error_is_at_most_3_ulp(name):
    """Or 4 ulp of max(1, |x|) for GELU, which crosses zero; results below the smallest normal number may be 0."""
    x = numpy.concatenate([numpy.linspace(-90, 90, 200_001), 10 ** numpy.linspace(-38, 38, 20_001)]).astype("float32")
    x = numpy.concatenate([x, -x])
    expected = ELEMENTWISE[name](numpy.maximum(x.astype("float64"), -1e3))
    error, tiny = abs(getattr(native, name)(x) - expected), numpy.finfo("float32").tiny
    scale = numpy.maximum(1, abs(x)) if name == "gelu" else numpy.maximum(abs(expected), tiny).astype("float32")
    error[error <= tiny] = 0
    assert (error / numpy.spacing(scale)).max() <= (4 if name == "gelu" else 3)


@pytest.mark.parametrize("name", GRADIENTS)
@numpy.errstate(all="ignore")
def test_float32_gradient_error_is_at_most_4_ulp(name):
    rng = numpy.random.default_rng(0)
    d, y = rng.normal(size=100_000).astype("float32"), rng.uniform(size=100_000).astype("float32")
    if name in ("gelu_grad", "relu_grad"):
        y = 20 * y - 10
    expected = GRADIENTS[name](d.astype("float64"), y.astype("float64"))
    error = abs(getattr(native, name)(d, y) - expected)
    assert (error / numpy.spacing(abs(d) * numpy.maximum(1, abs(y)))).max() <= 4


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", [*ELEMENTWISE, *GRADIENTS, "softmax", "softmax_grad"])
def test_extreme_values_give_the_limits(name, dtype):
    info, inf = numpy.finfo(dtype), numpy.inf
    values = [0.0, -0.0, 1, -1, inf, -inf, numpy.nan, info.max, -info.max, info.tiny, -info.tiny]
    values += [info.smallest_subnormal, -info.smallest_subnormal, 88.8, -88.8, -103.9, 709.7, -745.1, 60000, -60000]
    x = numpy.repeat(numpy.array(values, dtype), 9)  # whole vectors of them, too
    with numpy.errstate(all="ignore"):
        if name.endswith("grad"):
            for d in values:
                given = numpy.full_like(x, d), x
                compare_limits(getattr(native, name)(*given), getattr(portable, name)(*given), dtype)
        elif name == "softmax":
            for other in values:
                rows = numpy.stack([x, numpy.full_like(x, other), numpy.zeros_like(x)], axis=1)
                for given in (rows, numpy.ascontiguousarray(numpy.repeat(rows, 30, axis=1))):
                    compare_limits(native.softmax(given), portable.softmax(given), dtype)
        else:
            compare_limits(getattr(native, name)(x), getattr(portable, name)(x), dtype)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name][0] is STEPS])
@numpy.errstate(all="ignore")
def test_steps_of_extreme_values_match_portable(name, dtype):
    values = numpy.array([0, 1, -3, numpy.inf, -1, -numpy.inf, 0.5, numpy.nan, 1e30, -1e30, 90, -90, 2], dtype)
    ours, expected = (arguments(CASES[name][1], (9, 2, 35), dtype, "C") for _ in range(2))
    for given, module in ((ours, native), (expected, portable)):
        for i, array in enumerate(given[:-1]):
            array[...] = numpy.roll(numpy.resize(values, array.shape), i)
        getattr(module, name)(*given)
    for a, b in zip(ours[:-1], expected[:-1], strict=True):
        numpy.testing.assert_allclose(a, b, rtol=64 * numpy.finfo(dtype).eps, atol=numpy.finfo(dtype).eps)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name][0] is STEPS])
def test_steps_refuse_other_shapes_and_times(name, monkeypatch):
    """The loops would access memory out of bounds; portable raises or handles them."""
    calls = []
    monkeypatch.setattr(portable, name, lambda *_: calls.append(name))
    given = arguments(CASES[name][1], (5, 3, 7), "float32", "C")
    for i, array in enumerate(given[:-1]):
        for other in (array[:-1], array[..., :-1].copy(), array[None], array.astype("float64"), None):
            getattr(native, name)(*given[:i], other, *given[i + 1 :])
    for t in (-1, 3, 1.0, 1 << 70):
        getattr(native, name)(*given[:-1], t)
    assert len(calls) == 5 * (len(given) - 1) + 4


def compare_limits(result, expected, dtype):
    tiny = numpy.finfo(dtype).tiny
    numpy.testing.assert_allclose(result, expected, rtol=32 * numpy.finfo(dtype).eps, atol=tiny)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(
    "scores", [[numpy.inf, 0, 1], [numpy.inf] * 3, [-numpy.inf] * 3, [numpy.nan, 0, 1], [1e4, 0, -1e4]]
)
def test_losses_of_extreme_scores(scores, dtype):
    for classes in (3, 90):
        x = numpy.array([scores + [0] * (classes - 3)], dtype)
        for label in (0, 1, 2, -1, classes):
            with numpy.errstate(all="ignore"):
                given = x, numpy.array([label]), None
                assert_same(native.softmax_loss(*given), portable.softmax_loss(*given), 8 * TOLERANCE[dtype])
    x = numpy.array([*scores, 1, -1], dtype)
    for t in ([0] * 5, [1] * 5, [0, 1, 2, 0, 1]):
        with numpy.errstate(all="ignore"):
            given = x, numpy.array(t), None
            assert_same(native.sigmoid_loss(*given), portable.sigmoid_loss(*given), 8 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", REAL)
def test_rows_of_weight_0_are_ignored(dtype):
    x, t = numpy.array([[numpy.nan, 1], [1, 2]], dtype), numpy.array([7, 0])
    weight = numpy.array([0, 1], dtype)
    loss, y = native.softmax_loss(x, t, weight)
    assert float(loss) == pytest.approx(math.log(1 + math.e))
    dx = native.softmax_loss_grad(y, t, 1, weight)
    assert dx[0].tolist() == [0, 0]
    assert_same([dx], [portable.softmax_loss_grad(y, t, 1, weight)], TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_no_floating_point_flag_is_raised(name):
    given = arguments(CASES[name][1], CASES[name][0][0], "float32", "C")
    for scale in (1e-30, 1e-10, 1):
        scaled = [a * numpy.float32(scale) if getattr(a, "dtype", None) == "float32" else a for a in given]
        with numpy.errstate(all="raise"):
            getattr(native, name)(*scaled)
            assert numpy.add(numpy.float32(1), numpy.float32(1)) == 2  # no flag remains set for NumPy to report


@pytest.mark.parametrize("name", NAMES)
def test_results_are_reproducible_bit_for_bit(name):
    for shape in CASES[name][0]:
        if name.endswith("_loss") and 0 in shape:
            continue
        first, second = (outcome(native, name, shape, "float32", "C") for _ in range(2))
        assert [a.tobytes() for a in first] == [a.tobytes() for a in second]


def test_column_variances_far_from_0_do_not_cancel():
    x = (1e4 + numpy.random.default_rng(0).normal(size=(1001, 5))).astype("float32")
    x[0] = -1e4  # a first row different from the others
    ones, zeros = numpy.ones(5, "float32"), numpy.zeros(5, "float32")
    _, mean, rstd = native.batch_norm(x, ones, zeros, zeros.copy(), ones.copy(), 0.9, 1e-5)
    exact = x.astype("float64")
    numpy.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6)
    numpy.testing.assert_allclose(rstd, 1 / numpy.sqrt(exact.var(axis=0) + 1e-5), rtol=1e-4)


# ---- arguments not supported by the loops -------------------------------------------------------------


def test_invalid_arguments_give_the_errors_of_portable():
    ones = numpy.ones((4, 6), "float32")
    for call in (
        lambda: native.affine_grad(ones, ones, numpy.ones((2, 3), "float32"), None),
        lambda: native.affine(ones, ones, None),
        lambda: native.sgd([ones], [ones], "1", 1.0),
        lambda: native.softmax("text"),
        lambda: native.softmax_loss(ones, numpy.zeros((2, 2), int), None),
        lambda: native.embedding_grad(numpy.array([9]), ones[:1], ones.copy()),
    ):
        with pytest.raises((TypeError, ValueError, IndexError, AttributeError)):
            call()
    with pytest.raises(TypeError):
        native.sigmoid()
    assert native.affine(ones, ones.T, [0.0] * 4).tolist() == [[6] * 4] * 4  # NumPy accepts lists
    assert (ones == 1).all()


def test_duplicate_arrays_are_updated_sequentially():
    p = numpy.zeros(9000, "float32")
    native.sgd([p, p], [numpy.full(9000, 1, "float32"), numpy.full(9000, 2, "float32")], 1.0, 1.0)
    assert (p == -3).all()


@pytest.mark.parametrize("dtype", REAL)
def test_can_update_rejects_arrays_the_loops_must_not_write(dtype):
    p = numpy.ones(3, dtype)
    assert native.can_update([p], [p.copy()])
    read_only = p.copy()
    read_only.flags.writeable = False
    for params, grads in (([read_only], [p]), ([p], [p[:2]]), ([p], []), ([p], [p.astype("float16")]), ([[1.0]], [p])):
        assert not native.can_update(params, grads)


@pytest.mark.parametrize("dtype", REAL)
def test_overlapping_arrays(dtype):
    a, b = numpy.arange(99, dtype=dtype), numpy.arange(99, dtype=dtype)
    native.sgd([a[1:]], [a[:-1]], 0.5, 1.0)
    portable.sgd([b[1:]], [b[:-1]], 0.5, 1.0)
    numpy.testing.assert_array_equal(a, b)


def test_64_bit_labels_are_not_truncated():
    for label in (1 << 32, (1 << 32) + 1):
        loss, y = native.sigmoid_loss(numpy.zeros(1, "float32"), numpy.array([label]), None)
        assert numpy.isnan(loss)
        assert numpy.isnan(y).all()


def test_small_variances_do_not_overflow():
    x = numpy.array([[1e-20, -1e-20, 3e-20]], "float32")
    ones, zeros = numpy.ones(3, "float32"), numpy.zeros(3, "float32")
    _, mean, rstd = native.layer_norm(x, ones, zeros, 0.0)
    dx = native.layer_norm_grad(numpy.array([[1, 2, 4]], "float32"), x, ones, mean, rstd, zeros, ones.copy())
    assert numpy.isfinite(dx).all()


# ---- memory ------------------------------------------------------------------------------------------


def test_large_results_reuse_freed_memory():
    def address():
        return native.relu(numpy.ones((512, 512), "float32")).ctypes.data

    assert len({address() for _ in range(10)}) <= 2
    kept = [native.relu(numpy.full((512, 512), i, "float32")) for i in range(5)]
    assert [float(a[-1, -1]) for a in kept] == [0, 1, 2, 3, 4]
    assert kept[0].flags.owndata
    kept[0].resize((600, 600), refcheck=False)  # NumPy reallocates
    assert kept[0].shape == (600, 600)
    assert float(kept[0][0, 0]) == 0


def test_cached_memory_is_bounded_and_released():
    program = """
import numpy, resource
from nnx.kernels import native
x = numpy.zeros(75 << 20, "float32")
def make(count): return native.relu(x[:count])
def held(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
make(75 << 20)                                   # 300 MB, too large to be kept
arrays = [make(2 << 20) for _ in range(40)]      # 320 MB, of which 256 MB may be kept
del arrays
peak = held()
for _ in range(1100 * 40): make(1 << 14)
print(peak, held())
"""
    if not sys.platform.startswith("linux") or "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("reads /proc, where AddressSanitizer's own memory counts too")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak, after = map(float, result.stdout.split())
    assert peak < 256 + 64  # NumPy itself is 30 MB
    assert after < 80
