"""Every CUDA kernel compared with its portable reference, and compiled for common devices."""

from __future__ import annotations

import inspect
import threading
import warnings

import numpy
import pytest

import nnx
from nnx import GPU, np, to_cpu

if not GPU:
    pytest.skip("the CUDA kernels need CuPy: run with NNX_GPU=1", allow_module_level=True)

from kernel_cases import CASES, DTYPES, LABELS, LAYOUTS, TOLERANCE, arguments, assert_same, outcome

from nnx.kernels import cuda, portable

pytestmark = pytest.mark.gpu
NAMES = [name for name in CASES if getattr(cuda, name, None) not in (None, getattr(portable, name))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_matches_portable(name, dtype, layout):
    for shape in CASES[name][0]:
        case = name, shape, dtype, layout
        for weighted in (False, True) if "weight" in inspect.signature(getattr(cuda, name)).parameters else (False,):
            if weighted and 0 in shape:  # rejected by losses
                continue
            ours, expected = (outcome(module, *case, weighted=weighted) for module in (cuda, portable))
            assert_same(ours, expected, 4 * TOLERANCE[dtype])  # sums of many elements accumulate rounding errors


@pytest.mark.parametrize("name", CASES)
def test_results_are_reproducible_bit_for_bit(name):
    for shape in CASES[name][0]:
        first, second = (outcome(nnx.kernels, name, shape, "float32", "C") for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert to_cpu(a).tobytes() == to_cpu(b).tobytes()


def test_names_and_signatures_match_portable():
    assert {*portable.__all__} - {*NAMES} == {"accumulation_dtype", "can_update", "in_range"}
    for name in portable.__all__:
        bound = getattr(cuda if name in NAMES else portable, name)
        assert getattr(nnx.kernels, name) is bound
        assert inspect.signature(bound) == inspect.signature(getattr(portable, name))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("softmax_loss", (66000, 3)),
        ("softmax_loss", (1100, 257)),
        ("relu", (1100, 1000)),
        ("sigmoid_loss", (1100, 1000)),
        ("bias_grad", (70000, 3)),
        ("batch_norm", (70000, 3)),
        ("batch_norm", (3, 300_000)),
    ],
)
def test_more_elements_than_the_grid(name, shape):
    assert_same(outcome(cuda, name, shape, "float32", "C"), outcome(portable, name, shape, "float32", "C"), 1e-4)


@pytest.mark.parametrize("label_dtype", [*LABELS, "uint8"])
def test_labels_of_any_integer_dtype(label_dtype):
    for name in ("softmax_loss", "softmax_loss_grad"):
        case = name, (2, 3, 200), "float32", "C"
        assert_same(
            outcome(cuda, *case, label_dtype=label_dtype), outcome(portable, *case, label_dtype=label_dtype), 1e-5
        )


@pytest.mark.parametrize("label_dtype", LABELS)
@pytest.mark.parametrize("bad", [-1, 4, 5, 127, -128])
def test_a_bad_label_makes_its_row_and_the_loss_nan(bad, label_dtype):
    x = np.asarray(numpy.random.default_rng(0).normal(size=(6, 4)).astype("float32"))
    t = np.asarray(numpy.array([0, 3, bad, 1, 2, 0], label_dtype))
    loss, y = cuda.softmax_loss(x, t, None)
    assert numpy.isnan(to_cpu(loss))
    assert numpy.isnan(to_cpu(y)).all(axis=1).tolist() == [False, False, True, False, False, False]
    good = cuda.softmax(x)
    assert bool((y[:2] == good[:2]).all())
    assert bool((y[3:] == good[3:]).all())


@pytest.mark.parametrize("zeros", [0, 20, 250])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_large_scores_give_the_limits(dtype, zeros):
    inf, nan = numpy.inf, numpy.nan
    rows = [[inf, 0, 1], [inf, inf, 0], [-inf, 0, 0], [-inf, -inf, -inf], [nan, 0, 1], [1e4, 0, 0], [0, nan, inf]]
    rows = [row + [0] * zeros for row in rows]
    x = np.asarray(numpy.array(rows, dtype))
    assert_same([cuda.softmax(x)], [portable.softmax(x)], TOLERANCE[dtype])
    for row, scores in enumerate(rows):
        for label in range(3):
            one, t = x[row : row + 1], np.asarray([label])
            assert_same(cuda.softmax_loss(one, t, None), portable.softmax_loss(one, t, None), TOLERANCE[dtype])
        assert bool(np.isnan(cuda.softmax(x[row])).any()) == any(numpy.isnan(scores))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "sigmoid", "relu_grad", "tanh_grad", "gelu_grad"])
def test_extreme_values_match_portable(name, dtype):
    x = np.asarray(numpy.array([-numpy.inf, -6e4, -1.0, -0.0, 0.0, 1e-7, 6e4, numpy.inf, numpy.nan], dtype))
    given = [x, np.asarray(numpy.array([1, -1, numpy.inf, 2, 3, 4, 5, 6, 7], dtype))][: 1 + name.endswith("grad")]
    given.reverse()  # dout, x
    assert_same([getattr(cuda, name)(*given)], [getattr(portable, name)(*given)], TOLERANCE[dtype])


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_variance_of_values_far_from_0_does_not_cancel(name, offset):
    rng = numpy.random.default_rng(0)
    x = (rng.normal(size=(2000, 40)) + offset).astype("float32")
    row, others = np.ones(40, "float32"), {"batch_norm": [np.zeros(40, "float32"), np.ones(40, "float32"), 0.9]}
    *_, mean, rstd = getattr(cuda, name)(np.asarray(x), row, 0 * row, *others.get(name, []), 1e-5)
    axis = 0 if name == "batch_norm" else 1
    exact = x.astype("float64")
    numpy.testing.assert_allclose(to_cpu(mean), exact.mean(axis), rtol=1e-6, atol=1e-6)
    numpy.testing.assert_allclose(to_cpu(rstd), 1 / numpy.sqrt(exact.var(axis) + 1e-5), rtol=1e-3 if offset else 1e-5)


@pytest.mark.parametrize(("dtype", "mean"), [("float32", 1.9e19), ("float64", 1e160)])
def test_variance_of_columns_far_from_0_is_finite(dtype, mean):
    x, row = np.full((2000, 3), mean, dtype), np.ones(3, dtype)
    y, _, rstd = cuda.batch_norm(x, row, 0 * row, 0 * row, row.copy(), 0.9, 1e-5)
    assert bool(np.isfinite(y).all() & np.isfinite(rstd).all())


@pytest.mark.parametrize("t", [-1, 3])
def test_a_step_outside_the_sequence_is_refused(t):
    with pytest.raises(IndexError):
        cuda.rnn_step(np.ones((4, 3, 2)), np.ones((4, 2)), np.ones((4, 3, 2)), t)


def test_bias_of_another_dtype_is_converted():
    x, b = np.zeros((4, 3), "float32"), np.asarray([1.0, 2.0, 3.0])
    assert to_cpu(cuda.affine(x, np.zeros((3, 3), "float32"), b)).tolist() == [[1, 2, 3]] * 4


def test_sigmoid_is_accurate_in_both_tails():
    x = np.asarray(numpy.array([-1e4, -80, 0, 80, 1e4, -numpy.inf, numpy.inf, numpy.nan], "float32"))
    assert_same([cuda.sigmoid(x)], [portable.sigmoid(x)], 1e-6)
    assert to_cpu(cuda.sigmoid(x))[[0, 2, 4]].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dout", [1, 0.5, "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["softmax_loss_grad", "sigmoid_loss_grad", "squared_error_grad"])
def test_loss_backward_accepts_scalars_and_0d_arrays(name, dout, dtype):
    number = dout if not isinstance(dout, str) else np.full((), 0.5, dout)
    x, t, *_ = arguments(CASES[name][1], (5, 7), dtype, "C")
    expected = getattr(portable, name)(x, t, float(number), None)
    assert_same([getattr(cuda, name)(x, t, number, None)], [expected], TOLERANCE[dtype])


def test_a_scaled_float16_loss_gradient_does_not_overflow():
    y, t = np.full((1024, 4), 0.25, "float16"), np.zeros(1024, "int64")
    assert float(cuda.softmax_loss_grad(y, t, 131072.0, None).max()) == 32


@pytest.mark.parametrize("name", ["sgd", "clip_grads"])
def test_lists_of_mixed_dtypes_and_layouts(name):
    def lists():
        columns = [arguments(["list", "list"], (5, 7), dtype, "C") for dtype in DTYPES]
        params = [a for column in columns for a in column[0]] + [np.ones((4, 3)).T, np.ones((6, 4))[:, ::2]]
        grads = [a for column in columns for a in column[1]] + [np.ones((3, 4)), np.ones((6, 4))[:, 1::2]]
        return [params, grads] if name == "sgd" else [grads]

    ours, expected = lists(), lists()
    settings = [0.5, 0.9] if name == "sgd" else [0.5]
    getattr(cuda, name)(*ours, *settings)
    getattr(portable, name)(*expected, *settings)
    assert_same([a for arrays in ours for a in arrays], [a for arrays in expected for a in arrays], 6e-3)


@pytest.mark.parametrize("dtypes", [["float32"], ["float64"], DTYPES, DTYPES[::-1]])
def test_clip_grads_changes_nothing_for_a_small_or_nonfinite_norm(dtypes):
    grads = [np.full((3, 5), 0.5, dtype) for dtype in dtypes]
    cuda.clip_grads(grads, 100.0)
    assert all(bool((g == 0.5).all()) for g in grads)
    for i in range(len(grads)):
        for value in (numpy.nan, numpy.inf, -numpy.inf):
            grads[i][0, 0] = value
            cuda.clip_grads(grads, 1e-3)
            assert all(bool((g.ravel()[1:] == 0.5).all()) for g in grads)
            numpy.testing.assert_array_equal(to_cpu(grads[i][0, 0]), value)
        grads[i][0, 0] = 0.5
    cuda.clip_grads(grads, 1.0)  # previous sums are not kept
    numpy.testing.assert_allclose(sum(float((g.astype("float64") ** 2).sum()) for g in grads), 1, rtol=2e-3)


@pytest.mark.parametrize(
    ("values", "max_norm"),
    [
        ({"float32": [1e30, -1e30]}, 3.0),
        ({"float64": [3e200, -4e200]}, 1.0),
        ({"float64": [1.5e308, 1.5e308]}, 6.0),
        ({"float64": [3e200, 4e200], "float32": [3e38, 1], "float16": [6e4, 0]}, 1.0),
        ({"float16": [6e4, 0], "float32": [3e38, 1], "float64": [3e200, 4e200]}, 1e-3),
        ({"float64": [3e-200, 4e-200]}, 1e-210),
    ],
)
def test_the_squares_of_gradients_do_not_overflow(values, max_norm):
    ours, expected = ([np.asarray(a, dtype) for dtype, a in values.items()] for _ in range(2))
    cuda.clip_grads(ours, max_norm)
    portable.clip_grads(expected, max_norm)
    for a, b in zip(ours, expected, strict=True):
        numpy.testing.assert_allclose(to_cpu(a), to_cpu(b), rtol=1e-3 if a.dtype == "float16" else 1e-6)


def test_multi_tensor_table_is_not_reused_for_other_arrays():
    memory, grad = np.zeros(64, "float32"), np.ones(64, "float32")
    for shape in [(4, 4), (16,), (8, 4), (2,)]:  # at the same address, sequentially
        p, g = (a[: int(numpy.prod(shape))].reshape(shape) for a in (memory, grad))
        memory[...] = 0
        cuda.sgd([p], [g], 1.0, 1.0)
        assert to_cpu(memory).tolist() == [-1.0] * p.size + [0.0] * (64 - p.size)
    half = memory.view("float16")
    half[...] = 0
    cuda.sgd([half[:2]], [np.ones(2, "float16")], 1.0, 1.0)
    assert to_cpu(half[:3]).tolist() == [-1, -1, 0]
    for _ in range(3):  # freed and reallocated
        p = np.zeros((5, 5), "float32")
        cuda.sgd([p], [np.ones((5, 5), "float32")], 1.0, 1.0)
        assert bool((p == -1).all())
        del p


def test_duplicate_arrays_are_updated_sequentially():
    p = np.zeros(9000, "float32")
    grads = [np.full(9000, 1, "float32"), np.full(9000, 2, "float32")]
    assert cuda._multi_tensor_tables([p, p[10:]], [grads[0], grads[1][10:]]) == (
        [],
        [0, 1],
    )  # a single launch would be a race condition
    cuda.sgd([p, p], grads, 1.0, 1.0)
    assert bool((p == -3).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cuda.bias_grad(np.ones((4, 6)), np.ones((2, 3))), "out must have shape"),
        (lambda: cuda.softmax_loss(np.ones((4, 6)), np.zeros(5, int), None), "t must have shape"),
        (lambda: cuda.softmax_loss_grad(np.ones((4, 6)), np.zeros((2, 2), int), 1, None), "t must have shape"),
        (lambda: cuda.softmax_grad(np.ones((4, 6)), np.ones((6, 4))), "dout must have shape"),
        (lambda: cuda.softmax(np.ones((4, 0))), "one class or more"),
        (lambda: cuda.affine(np.ones((4, 6)), np.ones((6, 3)), np.ones(4)), "b must have shape"),
        (lambda: cuda.layer_norm(np.ones((4, 6)), np.ones(5), np.ones(6), 1e-5), "gamma must have shape"),
        (lambda: cuda.batch_norm(*(np.ones(s) for s in ((4, 6), 6, 6, 5, 6)), 0.9, 1e-5), "running_mean must have"),
        (lambda: cuda.layer_norm_grad(*(np.ones(s) for s in ((4, 6), (4, 6), 6, 4, 4, 6, 5))), "dbeta must have shape"),
        (
            lambda: cuda.batch_norm_grad(*(np.ones(s) for s in ((4, 6), (4, 6), 6, 6, 6, 5, 6))),
            "dgamma must have shape",
        ),
        (lambda: cuda.squared_error(np.ones(3), np.ones(3), np.ones(4)), "weight must have a number for each group"),
        (
            lambda: cuda.rnn_step(*(np.ones(s) for s in ((4, 2, 3), (4, 2), (4, 2, 3))), 0),
            "rnn_step: array NH must have",
        ),
    ],
)
def test_wrong_shapes_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reduced_precision_products_are_delegated_to_cupy(monkeypatch):
    """CUPY_TF32=1 selects TF32 on tensor cores, which is implemented by CuPy."""
    core = pytest.importorskip("cupy._core._routines_linalg")
    x, W = np.ones((4, 5), "float32"), np.ones((5, 6), "float32")
    cuda._gemm_plan.cache_clear()
    monkeypatch.setattr(cuda, "get_compute_type", lambda dtype: core.COMPUTE_TYPE_TF32)
    monkeypatch.setattr(cuda, "_gemm", None)
    try:
        assert bool((cuda.affine(x, W, None) == 5).all())
    finally:
        cuda._gemm_plan.cache_clear()


@pytest.mark.parametrize(
    "call",
    [
        lambda a, row: cuda.sigmoid(a),
        lambda a, row: cuda.embedding(a, np.zeros(2, int)),
        lambda a, row: cuda.embedding_grad(np.zeros(3, int), a, a),
        lambda a, row: cuda.layer_norm(a, row, row, 1e-5),
        lambda a, row: cuda.sgd([a], [a], 0.1, 1.0),
        lambda a, row: cuda.clip_grads([a], 0.1),
    ],
)
def test_arrays_on_another_device_are_rejected(call, monkeypatch):
    a, row = np.ones((3, 3), "float32"), np.ones(3, "float32")
    monkeypatch.setattr(cuda, "getDevice", lambda: 1)
    with pytest.raises(ValueError, match="the arrays are on GPU 0, but the current GPU is 1"):
        call(a, row)


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float16", "bool"])
def test_gather_of_any_dtype_with_host_indices(dtype):
    x = np.asarray(numpy.random.default_rng(0).integers(0, 2, (50, 3, 5)).astype(dtype))
    for data in (x, x[:, 0, 0], x[1:, :1, :1], x[:, ::2]):
        idx = numpy.random.default_rng(1).permutation(len(data))[:20]
        for indices in (idx, np.asarray(idx), np.asarray(idx.astype("int32"))):
            assert_same([cuda.gather(data, indices)], [data[np.asarray(idx)]], 0)


def test_weight_gradient_of_another_shape_is_rejected():
    layer = nnx.MatMul(np.ones((3, 5)))
    layer.grads[0] = np.zeros((5, 3))  # the same size, which is all that CuPy checks
    layer.forward(np.ones((2, 3)))
    with pytest.raises(ValueError, match="dW"):
        layer.backward(np.ones((2, 5)))


def test_each_stream_and_thread_has_its_own_workspace():
    x, t = np.asarray(numpy.eye(5, dtype="float32")), np.arange(5)
    expected, scratches, losses = float(cuda.softmax_loss(x, t, None)[0]), set(), []
    together = threading.Barrier(2)

    def run():
        together.wait(60)
        for stream in (np.cuda.Stream.null, np.cuda.Stream(non_blocking=True)):
            np.cuda.Device().synchronize()
            with stream:
                losses.append(float(cuda.softmax_loss(x, t, None)[0]))
                scratches.add(cuda._workspace(*cuda._stream_key()).data.ptr)
        together.wait(60)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == [expected] * 4
    assert len(scratches) == 4


def test_training_step_does_not_synchronize():
    import cupyx

    model, optimizer = nnx.TwoLayerNet(6, 5, 4, rng=0), nnx.SGD(0.1)
    x, t = np.ones((8, 6), "float32"), np.arange(8) % 4
    before = to_cpu(model.params[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cupyx.allow_synchronize")
        with cupyx.allow_synchronize(False):
            for dout in (1, np.full((), 0.5)):
                model.forward(x, t)
                model.backward(dout)
                nnx.clip_grads(model.grads, 0.1)
                optimizer.update(model.params, model.grads)
    assert not numpy.array_equal(before, to_cpu(model.params[0]))


def test_stream_capture_requires_prior_use():
    """Otherwise the zeroing of the counters would be captured instead of executed."""
    with np.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="take one step on this stream before it is captured"):
                cuda._workspace(*cuda._stream_key())
        finally:
            stream.end_capture()
        assert not cuda._workspace(*cuda._stream_key()).any()


@pytest.mark.parametrize("arch", [75, 90, 120, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 86, 89, 100))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_compiles_for(dtype, arch):
    nvrtc = np.cuda.nvrtc
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC, {nvrtc.getVersion()}, knows no sm_{arch}")
    for name, source in sources(dtype):
        program = nvrtc.createProgram(source, f"{name}.cu", (), ())
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{arch}", *compiler_options()))
        except nvrtc.NVRTCError:
            pytest.fail(f"{name}: {nvrtc.getProgramLog(program)}")
        assert nvrtc.getCUBIN(program)


def sources(dtype):
    """The sources that cuda.py compiles for `dtype`: row kernels for each threads_per_row, and all others."""
    for threads_per_row in (0, 4, 32, 256, 1024):
        yield f"team_of_{threads_per_row}", cuda._module(numpy.dtype(dtype).char, threads_per_row).code


def compiler_options():
    core = pytest.importorskip("cupy._core.core")
    if not hasattr(core, "assemble_cupy_compiler_options"):
        pytest.skip("CuPy no longer has the function that names its include folders")
    return core.assemble_cupy_compiler_options(("--device-as-default-execution-space",))
