"""The kernels in CUDA C++, fused: one or two launches where `portable` needs several.

N rows (all leading axes together), D features, H outputs, C classes. Each function computes the same as
the function of that name in `portable`. None synchronizes with the device or uses floating-point atomics:
every sum has a fixed order, so that runs are bitwise reproducible.

The kernels are in cuda.cu. They need C-contiguous arrays, so other arrays are copied here, and are compiled
at their first call, for each dtype. Matrix products use cuBLAS. For small arrays the launch overhead in Python
dominates, so the grid and the sizes as C scalars are cached for each shape.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cupy
import numpy
from cupy._core._routines_linalg import COMPUTE_TYPE_DEFAULT, get_compute_type
from cupy._core._scalar import CScalar
from cupy.cuda import get_cublas_handle
from cupy.cuda.runtime import getDevice

from nnx.device import address
from nnx.kernels import portable
from nnx.kernels.portable import Arrays, accumulation_dtype
from nnx.np import Array, Scalar

_BLOCK = 256  # threads per block
_BLOCKS = 1024  # most blocks in a reduction: enough to fill a device
_CHUNK = 4096  # elements of a parameter per block

# ---- launches ---------------------------------------------------------------------------------------

_SOURCE = Path(__file__).with_name("cuda.cu").read_text(encoding="utf-8")
_TYPES = {"e": ("float16", "float"), "f": ("float", "float"), "d": ("double", "double")}

_contiguous = cupy.ascontiguousarray
_number = functools.lru_cache(maxsize=4096, typed=True)(CScalar)  # an int or float as a kernel argument


def _launch(geometry: Callable[..., Any], name: str, x: Any, arrays: tuple[Any, ...], *numbers: Any) -> None:
    """Launch the kernel `name` of cuda.cu over the elements, columns or rows of `x`.

    Its arguments are `arrays`, with None for a null pointer, then the sizes that `geometry` computes from the
    shape of `x`, then `numbers`.
    """
    device = _check_device(name, arrays[0])
    launch, threads, block, sizes = geometry(name, x.dtype.char, x.shape, device)
    launch(threads, arrays + sizes + tuple(map(_number, numbers)) if numbers else arrays + sizes, 0, block)


@functools.lru_cache(maxsize=1024)
def _elements(name: str, dtype: str, shape: tuple[int, ...], device: int) -> tuple[Any, ...]:
    """Return the launch function, number of threads, threads per block and sizes, for one thread per element.

    For a large array each thread handles several elements.
    """
    size = math.prod(shape)
    return _plan(name, dtype, 0, device, min(4 * _BLOCKS, -(-size // _BLOCK)), size)


@functools.lru_cache(maxsize=1024)
def _columns(
    name: str, dtype: str, shape: tuple[int, ...], device: int, depth: int = 1, most: int = 8 * _BLOCKS
) -> tuple[Any, ...]:
    """Return the same for blocks of up to 32 columns and a slice of the rows, about `depth` rows per thread.

    Warps then read neighboring elements, even in narrow matrices.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    tile = min(32, 1 << max(0, columns - 1).bit_length())
    tiles = max(1, -(-columns // tile))
    slices = max(1, min(most // tiles, -(-rows * tile // (depth * _BLOCK))))
    return _plan(name, dtype, 0, device, tiles * slices, rows, columns, tile, tiles)


_sums_of_columns = functools.partial(_columns, depth=16, most=_BLOCKS)


@functools.lru_cache(maxsize=1024)
def _rows(name: str, dtype: str, shape: tuple[int, ...], device: int) -> tuple[Any, ...]:
    """Return the same for rows, with 4 threads for a short row and up to 1024 for a long one."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    threads_per_row = next((n for n in (4, 32, _BLOCK) if columns <= 8 * n), 1024)
    blocks = min(_BLOCKS, -(-rows * threads_per_row // max(threads_per_row, _BLOCK)))
    return _plan(name, dtype, threads_per_row, device, blocks, rows, columns)


def _plan(name: str, dtype: str, threads_per_row: int, device: int, blocks: int, *sizes: int) -> tuple[Any, ...]:
    block = max(threads_per_row, _BLOCK)
    return _kernel(name, dtype, threads_per_row, device), max(1, blocks) * block, block, tuple(map(_number, sizes))


@functools.cache
def _kernel(name: str, dtype: str, threads_per_row: int, device: int) -> Any:
    """Return the launch function of the kernel `name` for a dtype character, on the current `device`."""
    return _module(dtype, threads_per_row).get_function(f"nnx_{name}").kernel.linear_launch


@functools.cache
def _module(dtype: str, threads_per_row: int) -> Any:
    includes = "".join(f"#include <cupy/{name}>\n" for name in ("carray.cuh", "float16.cuh", "math_constants.h"))
    t, a = _TYPES[dtype]
    return cupy.RawModule(
        code=f"{includes}typedef {t} T;\ntypedef {a} A;\n#define ROW_THREADS {threads_per_row}\n{_SOURCE}"
    )


def _check_device(name: str, array: Any) -> int:
    """Return the current GPU; raise if `array` is on another, whose memory may be inaccessible."""
    device: int = getDevice()
    if array.data.device_id != device:
        raise ValueError(f"{name}: the arrays are on GPU {array.data.device_id}, but the current GPU is {device}")
    return device


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise unless `array` has `shape`; a kernel would access memory out of bounds."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _row(name: str, row: Array, x: Array) -> Array:
    """Return `row`, with one value per column of `x`, contiguous and in the dtype of `x`."""
    _check_shape(name, row, x.shape[-1:])
    return _contiguous(row, x.dtype)


def _is_plain(out: Array, dtype: Any) -> bool:
    """Return whether a kernel may write into `out`: a C-contiguous array of `dtype`."""
    return out.dtype == dtype and _contiguous(out) is out


# ---- elements ---------------------------------------------------------------------------------------


_NAMES = ("__name__", "__qualname__", "__doc__")  # not __module__, which tells this set of kernels from portable


def _elementwise(formula: Callable[..., Array]) -> Callable[..., Array]:
    """Return a function that computes `formula`, of arrays of one shape and dtype, in one launch."""
    name = formula.__name__

    @functools.wraps(formula, _NAMES)
    def launch(x: Array, *others: Array) -> Array:
        for other in others:
            _check_shape(name, other, x.shape)
        y = Array(x.shape, x.dtype)
        _launch(_elements, name, x, (_contiguous(x), *[_contiguous(other, x.dtype) for other in others], y))
        return y

    return launch


sigmoid = _elementwise(portable.sigmoid)
sigmoid_grad = _elementwise(portable.sigmoid_grad)
relu = _elementwise(portable.relu)
relu_grad = _elementwise(portable.relu_grad)
tanh = _elementwise(portable.tanh)
tanh_grad = _elementwise(portable.tanh_grad)
gelu = _elementwise(portable.gelu)
gelu_grad = _elementwise(portable.gelu_grad)


def dropout(x: Array, ratio: float, seed: int, call: int) -> Array:
    y = Array(x.shape, x.dtype)
    _launch(_elements, "dropout", x, (_contiguous(x), y), *portable.dropout_keys(ratio, seed, call))
    return y


def sigmoid_loss(x: Array, t: Array, weight: Array | None) -> tuple[Scalar, Array]:
    _check_shape("sigmoid_loss: t", t, x.shape)
    t, (weight, groups) = _integers(t), _weights(weight, x, t.size)
    loss, y = Array((), x.dtype), Array(x.shape, x.dtype)
    arrays = _contiguous(x), t, weight, y, loss, _workspace(*_stream_key())
    _launch(_elements, "sigmoid_loss", x, arrays, t.itemsize, groups)
    return loss, y


def sigmoid_loss_grad(y: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    _check_shape("sigmoid_loss_grad: t", t, y.shape)
    t, (weight, groups), (dout, factor) = _integers(t), _weights(weight, y, t.size), _loss_grad(dout)
    dx = Array(y.shape, y.dtype)
    _launch(_elements, "sigmoid_loss_grad", y, (_contiguous(y), t, weight, dout, dx), t.itemsize, groups, factor)
    return dx


def squared_error(x: Array, t: Array, weight: Array | None) -> Scalar:
    _check_shape("squared_error: t", t, x.shape)
    weight, groups = _weights(weight, x, t.size)
    loss = Array((), x.dtype)
    arrays = _contiguous(x), _contiguous(t, x.dtype), weight, loss, _workspace(*_stream_key())
    _launch(_elements, "squared_error", x, arrays, groups)
    return loss


def squared_error_grad(x: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    _check_shape("squared_error_grad: t", t, x.shape)
    (weight, groups), (dout, factor) = _weights(weight, x, t.size), _loss_grad(dout)
    dx = Array(x.shape, x.dtype)
    arrays = _contiguous(x), _contiguous(t, x.dtype), weight, dout, dx
    _launch(_elements, "squared_error_grad", x, arrays, groups, factor)
    return dx


def _integers(t: Array) -> Array:
    """Return labels or indices as C-contiguous signed integers; kernels accept any width."""
    return _contiguous(t if t.dtype.kind == "i" else t.astype(numpy.int64))


def _weights(weight: Array | None, x: Array, terms: int) -> tuple[Array | None, int]:
    """Return the weights of a loss of `x` in the accumulation dtype, and the number of groups of terms."""
    if weight is None:
        return None, 1
    if terms % len(weight):
        raise ValueError(f"weight must have a number for each group, and {len(weight)} does not divide {terms} terms")
    return _contiguous(weight, accumulation_dtype(x.dtype)), len(weight)


def _loss_grad(dout: Any) -> tuple[Array | None, float]:
    """Return the gradient of a loss as an array, without synchronizing, or as a number."""
    return (dout.astype(numpy.float64, copy=False), 1.0) if isinstance(dout, Array) else (None, float(dout))


# ---- products ---------------------------------------------------------------------------------------


def affine(x: Array, W: Array, b: Array | None) -> Array:
    y = _product(x, W)
    if b is not None:
        _launch(_columns, "add_bias", y, (_row("affine: b", b, y), y))
    return y


def affine_grad(x: Array, dout: Array, dW: Array, db: Array | None) -> None:
    _product(x, dout, True, False, dW)
    if db is not None:
        bias_grad(dout, db)


def input_grad(dout: Array, W: Array) -> Array:
    return _product(dout, W, False, True)


def _product(a: Any, b: Any, trans_a: bool = False, trans_b: bool = False, out: Any = None) -> Array:
    """Return a @ b in `out`, with `a` or `b` transposed on request.

    Takes half the host time of CuPy's `dot`, because the cuBLAS arguments are cached for the shapes and layouts of
    the arrays.
    """
    plan = _gemm_plan(_layout(a), _layout(b), out if out is None else _layout(out), trans_a, trans_b, getDevice())
    if plan is None:
        return portable.product(a.T if trans_a else a, b.T if trans_b else b, out)
    rows, columns, inner, trans_a, trans_b, lda, ldb, ldc, data_type, compute_type, algorithm, one, zero = plan
    if out is None:
        out = Array((rows, columns), a.dtype)
    # cuBLAS expects Fortran order, in which all three matrices are transposed: out.T = b.T @ a.T.
    _gemm(
        get_cublas_handle(), trans_b, trans_a, columns, rows, inner,
        one, b.data.ptr, data_type, ldb, a.data.ptr, data_type, lda,
        zero, out.data.ptr, data_type, ldc, compute_type, algorithm,
    )  # fmt: skip
    return out


_layout = operator.attrgetter("shape", "strides", "dtype.char")  # hashing a dtype object is slow
_COEFFICIENTS = [[numpy.array(number, dtype) for number in (1, 0)] for dtype in ("float32", "float64")]
_gemm = cupy.cuda.cublas.gemmEx


@functools.lru_cache(maxsize=4096)
def _gemm_plan(a: Any, b: Any, out: Any, trans_a: bool, trans_b: bool, device: int) -> tuple[Any, ...] | None:
    """Return the cuBLAS arguments for a product of arrays with these layouts, as CuPy chooses them.

    Return None to let CuPy multiply them instead: for arrays that cuBLAS cannot read without a copy, empty arrays, and
    computation in lower precision, such as with CUPY_TF32=1.
    """
    cublas, runtime = cupy.cuda.cublas, cupy.cuda.runtime
    (rows, inner), (inner_b, columns), dtype = a[0][:: -1 if trans_a else 1], b[0][:: -1 if trans_b else 1], a[2]
    if inner != inner_b or dtype != b[2]:
        raise ValueError(f"matrix product of incompatible arrays: {a[2]} {a[0]} and {b[2]} {b[0]}")
    if out is not None and out[0] != (rows, columns):
        raise ValueError(f"affine_grad: dW must have shape {(rows, columns)}, got {out[0]}")
    order_a, order_b, order_out = (_order(*layout) if layout else (False, columns) for layout in (a, b, out))
    if not (rows and columns and inner and order_a and order_b and order_out and not order_out[0]):
        return None
    if dtype not in _TYPES or get_compute_type(numpy.dtype(dtype)) != COMPUTE_TYPE_DEFAULT or (out and out[2] != dtype):
        return None
    data_type = {"e": runtime.CUDA_R_16F, "f": runtime.CUDA_R_32F, "d": runtime.CUDA_R_64F}[dtype]
    compute_type = cublas.CUBLAS_COMPUTE_64F if dtype == "d" else cublas.CUBLAS_COMPUTE_32F
    has_tensor_cores = int(cupy.cuda.Device(device).compute_capability) >= (70 if dtype == "e" else 80)
    algorithm = cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP if has_tensor_cores else cublas.CUBLAS_GEMM_DEFAULT
    one, zero = (number.ctypes.data for number in _COEFFICIENTS[dtype == "d"])
    operands = trans_a != order_a[0], trans_b != order_b[0], order_a[1], order_b[1], order_out[1]
    return rows, columns, inner, *operands, data_type, compute_type, algorithm, one, zero


def _order(shape: tuple[int, int], strides: tuple[int, int], dtype: str) -> tuple[bool, int] | None:
    """Return whether a matrix is in Fortran order, and its leading dimension; None if in neither order."""
    (rows, columns), (down, right), size = shape, strides, numpy.dtype(dtype).itemsize
    if right == size and down >= columns * size:
        return False, down // size
    if down == size and right >= rows * size:
        return True, right // size
    return None


# ---- columns ----------------------------------------------------------------------------------------


def bias_grad(dout: Array, out: Array) -> None:
    _check_shape("bias_grad: out", out, dout.shape[1:])
    if dout.ndim != 2 or not _is_plain(out, dout.dtype):
        return portable.bias_grad(dout, out)
    return _launch(_sums_of_columns, "bias_grad", dout, (_contiguous(dout), out, _workspace(*_stream_key())))


def batch_norm(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[Array, Array, Array]:
    dtype = accumulation_dtype(x.dtype)
    _check_shape("batch_norm: running_mean", running_mean, x.shape[1:])
    _check_shape("batch_norm: running_var", running_var, x.shape[1:])
    if not (_is_plain(running_mean, x.dtype) and _is_plain(running_var, dtype)):
        return portable.batch_norm(x, gamma, beta, running_mean, running_var, momentum, eps)
    x, mean, rstd, y = _contiguous(x), Array(x.shape[1:], dtype), Array(x.shape[1:], dtype), Array(x.shape, x.dtype)
    arrays = x, mean, rstd, running_mean, running_var, _workspace(*_stream_key())
    _launch(_sums_of_columns, "batch_norm_statistics", x, arrays, float(momentum), float(eps))
    arrays = x, _row("batch_norm: gamma", gamma, x), _row("batch_norm: beta", beta, x), mean, rstd, y
    _launch(_columns, "batch_norm", x, arrays)
    return y, mean, rstd


def batch_norm_grad(
    dout: Array, x: Array, gamma: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array
) -> Array:
    if not (_is_plain(dgamma, x.dtype) and _is_plain(dbeta, x.dtype)):
        return portable.batch_norm_grad(dout, x, gamma, mean, rstd, dgamma, dbeta)
    dout, x, dx = _contiguous(dout), _contiguous(x), Array(x.shape, x.dtype)
    # The sums are kept in the accumulation dtype, that of mean.
    sums = (dgamma, dbeta) if mean.dtype == x.dtype else (Array(mean.shape, mean.dtype), Array(mean.shape, mean.dtype))
    _norm_sums(dout, x, mean, rstd, dgamma, dbeta, sums, False)
    _launch(_columns, "batch_norm_grad", x, (dout, x, _row("batch_norm_grad: gamma", gamma, x), mean, rstd, *sums, dx))
    return dx


def _norm_sums(
    dout: Array, x: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array, sums: Sequence[Any], of_rows: bool
) -> None:
    _check_shape("norm_grad: dgamma", dgamma, x.shape[1:])
    _check_shape("norm_grad: dbeta", dbeta, x.shape[1:])
    arrays = dout, x, mean, rstd, dgamma, dbeta, *sums, _workspace(*_stream_key())
    _launch(_sums_of_columns, "norm_sums", x, arrays, int(of_rows))


def softmax_loss_grad(y: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    _check_shape("softmax_loss_grad: t", t, y.shape[:-1])
    t, (weight, groups), (dout, factor) = _integers(t), _weights(weight, y, t.size), _loss_grad(dout)
    dx = Array(y.shape, y.dtype)
    _launch(_columns, "softmax_loss_grad", y, (_contiguous(y), t, weight, dout, dx), t.itemsize, groups, factor)
    return dx


def embedding(W: Array, idx: Array) -> Array:
    shape, idx = idx.shape, _integers(idx)  # which gives a single number an axis
    y = Array((*shape, W.shape[1]), W.dtype)
    _launch(_columns, "embedding", y, (_contiguous(W), idx, y), len(W), idx.itemsize)
    return y


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    # The block of the first row with an index adds all later rows with that index, in order. To find them it reads
    # all N indices.
    _check_shape("embedding_grad: dout", dout, (idx.size, out.shape[1]))
    _check_device("embedding_grad", out)
    if not out.flags.c_contiguous:
        return portable.embedding_grad(idx, dout, out)
    out.fill(0)
    if dout.size:
        arrays = _contiguous(idx, numpy.int64), _contiguous(dout, out.dtype), out
        launch = _kernel("embedding_grad", out.dtype.char, 0, getDevice())
        launch(min(idx.size, _BLOCKS << 10) * _BLOCK, (*arrays, *map(_number, (len(idx), *out.shape))), 0, _BLOCK)
    return None


def gather(x: Array, idx: Array) -> Array:
    if not (isinstance(x, Array) and x.flags.c_contiguous and x.size):
        return portable.gather(x, idx)  # also for data on the host
    idx = _contiguous(cupy.asarray(idx), numpy.int64)
    y = Array((len(idx), *x.shape[1:]), x.dtype)
    width = x.nbytes // len(x)
    word = 4 if width % 4 == address(x) % 4 == 0 else 1
    launch, threads, block, sizes = _columns("gather", "f", (len(idx), width // word), getDevice())
    launch(threads, (x, idx, y, *sizes, _number(len(x)), _number(word)), 0, block)
    return y


# ---- recurrent layers --------------------------------------------------------------------------------


def _step(kernel: Callable[..., None], axes: str) -> Callable[..., None]:
    """Return a function that computes `kernel`, a time step, in one launch.

    `axes` names the axes of its arrays: N rows, T time steps, S = T + 1, H hidden units, or a digit for that many
    times H.
    """
    like = axes.split().index("NTH")

    @functools.wraps(kernel, _NAMES)
    def launch(*arguments: Any) -> None:
        *arrays, t = arguments
        plan = _step_plan(kernel.__name__, axes, tuple(map(_layout, arrays)), _check_device(kernel.__name__, arrays[0]))
        if not 0 <= t < arrays[like].shape[1]:
            raise IndexError(f"{kernel.__name__}: t must be a time step of {arrays[like].shape[1]}, got {t}")
        if plan is None:
            return kernel(*arguments)
        run, threads, _, sizes = plan
        return run(threads, (*arrays, *sizes, _number(t)), 0, _BLOCK)

    return launch


@functools.lru_cache(maxsize=1024)
def _step_plan(name: str, axes: str, layouts: tuple[Any, ...], device: int) -> tuple[Any, ...] | None:
    """Return the same as `_elements` for arrays with these layouts, or None unless a kernel can write into all.

    Raises
    ------
    ValueError
        If a shape is not that of `axes`; the kernel would access memory out of bounds.
    """
    N, T, H = layouts[axes.split().index("NTH")][0]
    sizes = {"N": N, "T": T, "S": T + 1, "H": H} | {str(k): k * H for k in range(2, 5)}
    dtype = layouts[0][2]
    plain = dtype in _TYPES
    for of_array, (shape, strides, char) in zip(axes.split(), layouts, strict=True):
        expected = tuple(sizes[axis] for axis in of_array)
        if shape != expected:
            raise ValueError(f"{name}: array {of_array} must have shape {expected}, got {shape}")
        itemsize = numpy.dtype(char).itemsize
        plain &= char == dtype and strides == tuple(itemsize * math.prod(shape[k:]) for k in range(1, len(shape) + 1))
    blocks = min(4 * _BLOCKS, -(-N * H // _BLOCK))
    return _plan(name, dtype, 0, device, blocks, N * H, T, H) if plain else None


rnn_step = _step(portable.rnn_step, "NTH NH NTH")
rnn_step_grad = _step(portable.rnn_step_grad, "NTH NTH NH NTH")
lstm_step = _step(portable.lstm_step, "NT4 N4 NSH NTH NTH")
lstm_step_grad = _step(portable.lstm_step_grad, "NT4 NSH NTH NH NH NT4")
gru_gates = _step(portable.gru_gates, "NT3 N2 NTH NTH")
gru_gates_grad = _step(portable.gru_gates_grad, "NT3 NTH NH NH NT3")
gru_step = _step(portable.gru_step, "NT3 NH NTH NTH")
gru_step_grad = _step(portable.gru_step_grad, "NT3 NTH NTH NH NH NT3")


# ---- rows -------------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    return _softmax(x, None, None, None)


def softmax_loss(x: Array, t: Array, weight: Array | None) -> tuple[Scalar, Array]:
    _check_shape("softmax_loss: t", t, x.shape[:-1])
    loss = Array((), x.dtype)
    return loss, _softmax(x, _integers(t), weight, loss)


def _softmax(x: Array, t: Any, weight: Array | None, loss: Any) -> Array:
    if x.shape[-1] == 0:
        raise ValueError(f"softmax: x must have one class or more, got shape {x.shape}")
    y = Array(x.shape, x.dtype)
    workspace, label_bytes, groups = None, 0, 1
    if t is not None:
        workspace, label_bytes = _workspace(*_stream_key()), t.itemsize
        weight, groups = _weights(weight, x, t.size)
    _launch(_rows, "softmax", x, (_contiguous(x), t, weight, y, loss, workspace), label_bytes, groups)
    return y


def softmax_grad(dout: Array, y: Array) -> Array:
    _check_shape("softmax_grad: dout", dout, y.shape)
    dx = Array(y.shape, y.dtype)
    _launch(_rows, "softmax_grad", y, (_contiguous(dout, y.dtype), _contiguous(y), dx))
    return dx


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    dtype = accumulation_dtype(x.dtype)
    y, mean, rstd = Array(x.shape, x.dtype), Array(x.shape[:1], dtype), Array(x.shape[:1], dtype)
    arrays = _contiguous(x), _row("layer_norm: gamma", gamma, x), _row("layer_norm: beta", beta, x), y, mean, rstd
    _launch(_rows, "layer_norm", x, arrays, float(eps))
    return y, mean, rstd


def layer_norm_grad(
    dout: Array, x: Array, gamma: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array
) -> Array:
    if not (_is_plain(dgamma, x.dtype) and _is_plain(dbeta, x.dtype)):
        return portable.layer_norm_grad(dout, x, gamma, mean, rstd, dgamma, dbeta)
    dout, x, dx = _contiguous(dout), _contiguous(x), Array(x.shape, x.dtype)
    _norm_sums(dout, x, mean, rstd, dgamma, dbeta, (None, None), True)
    _launch(_rows, "layer_norm_grad", x, (dout, x, _row("layer_norm_grad: gamma", gamma, x), mean, rstd, dx))
    return dx


# ---- all parameters of a model ----------------------------------------------------------------------


def _launch_table(name: str, dtype: str, blocks: int, arguments: tuple[Any, ...]) -> None:
    _kernel(name, dtype, 0, getDevice())(blocks * _BLOCK, arguments, 0, _BLOCK)


def _multi_tensor(formula: Callable[..., None], lists: int) -> Callable[..., None]:
    """Return an optimizer's `formula`, whose first `lists` arguments are lists, with one launch per dtype."""

    @functools.wraps(formula, _NAMES)
    def update(*arguments: Any) -> None:
        arrays, settings = arguments[:lists], [float(value) for value in arguments[lists:]]
        tables, rest = _multi_tensor_tables(*arrays)
        for dtype, table in tables:
            _launch_table(formula.__name__, dtype, len(table), (table, *map(_number, settings)))
        if rest:
            formula(*([a[i] for i in rest] for a in arrays), *settings)

    return update


sgd = _multi_tensor(portable.sgd, 2)
momentum = _multi_tensor(portable.momentum, 3)
nesterov = _multi_tensor(portable.nesterov, 3)
adagrad = _multi_tensor(portable.adagrad, 3)
rmsprop = _multi_tensor(portable.rmsprop, 3)
adam = _multi_tensor(portable.adam, 4)


def clip_grads(grads: Arrays, max_norm: float) -> None:
    # The sums of squares are float64 and stay on the device, where the `clip` kernel reads them.
    tables, rest = _multi_tensor_tables(grads)
    if rest:
        return portable.clip_grads(grads, max_norm)
    workspace = _workspace(*_stream_key())
    for i, (dtype, table) in enumerate(tables):
        for scaled in (0, 1) if dtype == "d" else (0,):
            blocks = min(len(table), _BLOCKS)
            _launch_table("square_sum", dtype, blocks, (table, *map(_number, (len(table), i, scaled)), workspace))
    for dtype, table in tables:
        _launch_table("clip", dtype, len(table), (table, workspace, _number(float(max_norm))))
    return None


def all_finite(arrays: Arrays) -> Scalar:
    tables, rest = _multi_tensor_tables(arrays)
    if rest or len(tables) != 1:
        return portable.all_finite(arrays)
    ((dtype, table),) = tables
    finite = Array((), numpy.bool_)
    arrays = table, _workspace(*_stream_key()), finite
    _launch_table("all_finite", dtype, min(len(table), _BLOCKS), (*arrays, _number(len(table))))
    return finite


# ---- device memory kept between calls ---------------------------------------------------------------
# Allocated per stream and thread: stream order makes it safe to use, reuse and free.


def _stream_key() -> tuple[int, int, int]:
    """Return thread, device and stream; the thread, because CuPy's per-thread default stream has one pointer in all."""
    return threading.get_ident(), cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr


@functools.lru_cache(maxsize=64)
def _workspace(*key: int) -> Array:
    """Return a `Workspace` of cuda.cu with counters of 0.

    Raises
    ------
    RuntimeError
        If the stream is being captured, which would record the zeroing without executing it.
    """
    if cupy.cuda.get_current_stream().is_capturing():
        raise RuntimeError("nnx: take one step on this stream before it is captured into a graph")
    return cupy.zeros(512 + 3 * 32 * 1024 + 2, numpy.float64)


def _multi_tensor_tables(*lists: Sequence[Any]) -> tuple[list[tuple[str, Array]], list[int]]:
    """Return a table of the elements of `lists` per dtype, and the indices in no table, which `portable` handles.

    lists[0][i], lists[1][i], ... are processed together. A row of the table holds an address for each
    list and a number of elements, at most `_CHUNK`. Tables are cached by the addresses and layouts of the
    arrays, which determine them, so that nothing is uploaded again for the same arrays.
    """
    if lists[0]:
        _check_device("the optimizer", lists[0][0])
    return _make_tables(_stream_key(), tuple(zip(*(map(_array_key, arrays) for arrays in lists), strict=True)))


_array_key = operator.attrgetter("data.ptr", "shape", "strides", "dtype.char")


@functools.lru_cache(maxsize=64)
def _make_tables(
    key: tuple[int, ...], groups: tuple[tuple[Any, ...], ...]
) -> tuple[list[tuple[str, Array]], list[int]]:
    rows: dict[str, list[numpy.ndarray]] = {}
    rest, extents = [], []
    for i, group in enumerate(groups):
        shape, _, dtype = group[0][1:]
        itemsize, size = numpy.dtype(dtype).itemsize, math.prod(shape)
        contiguous = tuple(math.prod(shape[k + 1 :]) * itemsize for k in range(len(shape)))
        if dtype not in _TYPES or any(tuple(layout) != (shape, contiguous, dtype) for _, *layout in group):
            rest.append(i)
        elif size:
            start = numpy.arange(0, size, _CHUNK)
            columns = [*(address + start * itemsize for address, *_ in group), numpy.minimum(size - start, _CHUNK)]
            rows.setdefault(dtype, []).append(numpy.stack(columns, axis=1))
            extents += [(address, address + size * itemsize) for address, *_ in group]
    extents.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(extents)):
        return [], list(range(len(groups)))  # duplicate or overlapping arrays: update sequentially
    return [(dtype, cupy.asarray(numpy.concatenate(parts))) for dtype, parts in rows.items()], rest
