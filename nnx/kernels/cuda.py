"""The kernels in CUDA C++, one launch each where `portable` needs several.

N rows (all leading axes together), H outputs, C classes. T is the dtype of the arrays and A the one
that is computed in: float for float16, else T. No kernel waits for the device or adds with float
atomics: every sum has a fixed order, so that runs repeat bit for bit.

Elementwise formulas are CuPy's ElementwiseKernel, which takes any layout and any size. The others
are in cuda.cu: they index with 64 bits and want C-contiguous arrays, which are made here of what is
not. Both are compiled at their first call, for each dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cupy
import numpy

from nnx.kernels import portable
from nnx.kernels.portable import Arrays
from nnx.np import Array, Scalar

__all__ = [
    "adagrad",
    "adam",
    "affine",
    "affine_grad",
    "bias_grad",
    "clip_grads",
    "dropout",
    "embedding",
    "embedding_grad",
    "gelu",
    "gelu_grad",
    "momentum",
    "nesterov",
    "relu_grad",
    "rmsprop",
    "sgd",
    "sigmoid",
    "sigmoid_grad",
    "softmax",
    "softmax_grad",
    "softmax_loss",
    "softmax_loss_grad",
    "tanh_grad",
]

_BLOCK = 256  # threads of a block
_BLOCKS = 1024  # blocks whose sums are added to one: enough to fill a device
_CHUNK = 4096  # elements of a parameter that one block works on

# ---- elementwise ------------------------------------------------------------------------------------

_WIDE = """
#include <cupy/math_constants.h>
template <class V> struct Wide { typedef V type; };
template <> struct Wide<float16> { typedef float type; };
typedef Wide<T>::type A;
"""


def _elementwise(name: str, inputs: str, output: str, formula: str, first: str = "") -> Any:
    code = f"{first}{output} = T({formula})"
    return cupy.ElementwiseKernel(inputs, f"T {output}", code, f"nnx_{name}", preamble=_WIDE)


_add_bias = _elementwise("add_bias", "T b", "y", "A(y) + A(b)")
_sigmoid = _elementwise("sigmoid", "T x", "y", "A(1) / (A(1) + exp(-A(x)))")
_sigmoid_grad = _elementwise("sigmoid_grad", "T dout, T y", "dx", "A(dout) * A(y) * (A(1) - A(y))")
_relu_grad = _elementwise("relu_grad", "T dout, T y", "dx", "A(y) > A(0) ? A(dout) : A(0)")
_tanh_grad = _elementwise("tanh_grad", "T dout, T y", "dx", "A(dout) * (A(1) - A(y) * A(y))")
_GELU = f"""
    const A c = max(A(-30), min(A(30), A(x))), cc = c * c, root = A({math.sqrt(2 / math.pi)!r});
    const A s = A(1) / (A(1) + exp(A(-2) * root * c * (A(1) + A(0.044715) * cc)));
    const A du = root * (A(1) + A(3 * 0.044715) * cc);
"""
_gelu = _elementwise("gelu", "T x", "y", "isnan(A(x)) ? A(x) : (A(x) < A(0) ? c : A(x)) * s", _GELU)
_gelu_grad = _elementwise(
    "gelu_grad",
    "T dout, T x",
    "dx",
    "isnan(A(x)) ? A(x) : A(dout) * (s + c * s * (A(1) - s) * A(2) * du)",
    _GELU,
)
_dropout = _elementwise(
    "dropout",
    "T x, uint32 first, uint32 second, uint32 threshold",
    "y",
    "hash >= threshold ? A(x) : A(0)",
    """
    unsigned hash = (unsigned)i;
    for (int k = 0; k < 2; k++) {
        hash ^= k ? second : first;
        hash = (hash ^ hash >> 16) * 0x7FEB352Du;
        hash = (hash ^ hash >> 15) * 0x846CA68Bu;
        hash ^= hash >> 16;
    }
    """,
)
_embedding = _elementwise(
    "embedding",
    "raw T W, raw I idx, int64 rows, int64 columns",
    "y",
    "0 <= id && id < rows ? A(W[id * columns + i % columns]) : A(CUDART_NAN)",
    "const long long id = idx[i / columns];",
)
_softmax_loss_grad, _softmax_loss_grad_array = (
    _elementwise(
        f"softmax_loss_grad_{dout}",
        f"T y, raw I t, {dout} dout, int64 classes, int64 rows",
        "dx",
        "(A(y) - A(t[i / classes] == i % classes)) * (A(dout) / A(rows))",
    )
    for dout in ("float64", "S")  # a number, and an array of any dtype
)


def affine(x: Array, W: Array, b: Array | None) -> Array:
    """Return x @ W + b of `x` (N, D), `W` (D, H) and `b` (H,) or None."""
    y = x.dot(W)
    if b is not None:
        _add_bias(b, y)
    return y


def affine_grad(x: Array, dout: Array, dW: Array, db: Array | None) -> None:
    """Write x.T @ dout into `dW` (D, H), and the sum of the rows of `dout` (N, H) into `db` (H,) or nowhere."""
    _check_shape("affine_grad: dW", dW, (x.shape[1], dout.shape[1]))  # CuPy would fill any array of this size
    x.T.dot(dout, dW)
    if db is not None:
        bias_grad(dout, db)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose reciprocal is 0."""
    return _sigmoid(x)


def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    return _sigmoid_grad(dout, y)


def relu_grad(dout: Array, y: Array) -> Array:
    """Return `dout` where y > 0, else 0 (also where `dout` is infinite)."""
    return _relu_grad(dout, y)


def tanh_grad(dout: Array, y: Array) -> Array:
    """Return dout * (1 - y**2)."""
    return _tanh_grad(dout, y)


def gelu(x: Array) -> Array:
    """Return x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    return _gelu(x)


def gelu_grad(dout: Array, x: Array) -> Array:
    """Return dout * (s + x * s * (1 - s) * 2 * du/dx), s = (1 + tanh(u)) / 2."""
    return _gelu_grad(dout, x)


def dropout(x: Array, ratio: float, seed: int, call: int) -> Array:
    """Return `x` with a share `ratio` of its elements 0, chosen by a hash of seed, call and index (in C order)."""
    return _dropout(x, *portable.dropout_keys(ratio, seed, call))


def embedding(W: Array, idx: Array) -> Array:
    """Return W[idx]; an index outside [0, V) gives a row of NaN."""
    return _embedding(W, idx, *W.shape, cupy.empty((*idx.shape, W.shape[1]), W.dtype))


def softmax_loss_grad(y: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    """Return (y - onehot(t)) * dout / N; `dout` is a number, or an array without axes, which is not waited for."""
    if weight is not None:
        return portable.softmax_loss_grad(y, t, dout, weight)
    _check_shape("softmax_loss_grad: t", t, y.shape[:-1])
    kernel = _softmax_loss_grad_array if isinstance(dout, Array) else _softmax_loss_grad
    return kernel(y, t, dout, y.shape[-1], t.size)


# ---- in CUDA C++: cuda.cu ---------------------------------------------------------------------------

_SOURCE = Path(__file__).with_name("cuda.cu").read_text(encoding="utf-8")
_TYPES = {"e": ("float16", "float"), "f": ("float", "float"), "d": ("double", "double")}


@functools.cache
def _kernel(name: str, dtype: str, team: int = 32) -> Any:
    """Return the kernel `name` of cuda.cu for the dtype of this letter, with `team` threads to a row."""
    return _module(dtype, team).get_function(name)


@functools.cache
def _module(dtype: str, team: int) -> Any:
    head = "".join(f"#include <cupy/{name}>\n" for name in ("carray.cuh", "float16.cuh", "math_constants.h"))
    t, a = _TYPES[dtype]
    return cupy.RawModule(code=f"{head}typedef {t} T;\ntypedef {a} A;\nconst int TEAM = {team};\n{_SOURCE}")


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,).

    A block adds a tile of up to 32 columns, so that its warps read neighbouring elements, also of
    narrow matrices. Tall ones are cut into slices of rows, which the last block of a tile adds.
    """
    _check_shape("bias_grad: out", out, dout.shape[1:])
    if not out.flags.c_contiguous or out.dtype != dout.dtype:
        return portable.bias_grad(dout, out)
    if out.size:
        dout = cupy.ascontiguousarray(dout)
        tile = min(32, 1 << (out.size - 1).bit_length())
        tiles = -(-out.size // tile)
        slices = max(1, min(_BLOCKS // tiles, len(dout) * tile // (16 * _BLOCK)))  # 16 rows a thread, or more
        scratch = _scratch(*_here()) if slices > 1 else 0
        _kernel("bias_grad", dout.dtype.char)(
            (tiles, slices), (_BLOCK,), (dout, out, len(dout), out.size, tile, scratch)
        )
    return None


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    return _softmax(x)


def softmax_loss(x: Array, t: Array, weight: Array | None) -> tuple[Scalar, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    A label outside [0, C) makes its row of softmax(x), and so the loss, NaN. The last block to
    finish adds the sums of the others, so that one launch yields both.
    """
    if weight is not None:
        return portable.softmax_loss(x, t, weight)
    _check_shape("softmax_loss: t", t, x.shape[:-1])
    t = cupy.ascontiguousarray(t if t.dtype.kind == "i" else t.astype(numpy.int64))
    loss = cupy.empty((), x.dtype)
    return loss, _softmax(x, t, t.itemsize, loss, _scratch(*_here()))


def _softmax(x: Array, t: Any = 0, label_bytes: int = 0, loss: Any = 0, scratch: Any = 0) -> Array:
    x = cupy.ascontiguousarray(x)
    y = cupy.empty(x.shape, x.dtype)
    _launch_rows("softmax", (x, y), t, label_bytes, loss, scratch)
    return y


def softmax_grad(dout: Array, y: Array) -> Array:
    """Return y * (dout - sum(dout * y)) over the last axis."""
    _check_shape("softmax_grad: dout", dout, y.shape)
    y = cupy.ascontiguousarray(y)
    dx = cupy.empty(y.shape, y.dtype)
    _launch_rows("softmax_grad", (cupy.ascontiguousarray(dout, y.dtype), y, dx))
    return dx


def _launch_rows(name: str, arrays: tuple[Array, ...], *more: Any) -> None:
    """Launch a kernel over the rows of `arrays`: 4 threads share a short row, 1024 a long one."""
    x = arrays[0]
    classes = x.shape[-1]
    rows = x.size // max(1, classes)
    team = next((team for team in (4, 32, _BLOCK) if classes <= 8 * team), 1024)
    block = max(team, _BLOCK)
    blocks = max(1, min(_BLOCKS, -(-rows * team // block)))
    _kernel(name, x.dtype.char, team)((blocks,), (block,), (*arrays, rows, classes, *more))


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i.

    A block belongs to the first row with an index and adds the others behind it, in their order. To
    find them it reads all N indices.
    """
    _check_shape("embedding_grad: dout", dout, (idx.size, out.shape[1]))
    if not out.flags.c_contiguous:
        return portable.embedding_grad(idx, dout, out)
    out.fill(0)
    if dout.size:
        arrays = cupy.ascontiguousarray(idx, numpy.int64), cupy.ascontiguousarray(dout, out.dtype), out
        _kernel("embedding_grad", out.dtype.char)((min(idx.size, 1 << 30),), (_BLOCK,), (*arrays, len(idx), *out.shape))
    return None


def _multi_tensor(formula: Callable[..., None], lists: int) -> Callable[..., None]:
    """Return an optimizer's `formula`, whose first `lists` arguments are lists, as one launch for each dtype."""

    @functools.wraps(formula)
    def update(*arguments: Any) -> None:
        arrays, settings = arguments[:lists], [float(value) for value in arguments[lists:]]
        tables, rest = _tables(*arrays)
        for dtype, table in tables:
            _kernel(formula.__name__, dtype)((len(table),), (_BLOCK,), (table, *settings))
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
    """Scale all of `grads` by max_norm / (norm + 1e-6) where that is below 1, in place.

    The sums of squares are float64 and stay on the device, where the launches of `clip` find them.
    """
    tables, rest = _tables(grads)
    if rest:
        return portable.clip_grads(grads, max_norm)
    scratch = _scratch(*_here())
    for i, (dtype, table) in enumerate(tables):
        for scaled in (0, 1) if dtype == "d" else (0,):
            blocks = min(len(table), _BLOCKS)
            _kernel("square_sum", dtype)((blocks,), (_BLOCK,), (table, len(table), i, scaled, scratch))
    for dtype, table in tables:
        _kernel("clip", dtype)((len(table),), (_BLOCK,), (table, scratch, float(max_norm)))
    return None


# ---- what is kept on the device between calls -------------------------------------------------------
# It belongs to one stream of one thread, whose order makes it safe to use, to use again and to free.


def _here() -> tuple[int, int, int]:
    """Return thread, device and stream. The thread, because CuPy's per-thread stream has one address in all."""
    return threading.get_ident(), cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr


@functools.lru_cache(maxsize=64)
def _scratch(*here: int) -> Array:
    """Return a `Scratch` of cuda.cu, its counters at 0.

    Raises
    ------
    RuntimeError
        If the stream is being captured, which would record the zeros and not write them.
    """
    if cupy.cuda.get_current_stream().is_capturing():
        raise RuntimeError("nnx: take one step on this stream before it is captured into a graph")
    return cupy.zeros(512 + 32 * 1024 + 2, numpy.float64)


def _tables(*lists: Sequence[Any]) -> tuple[list[tuple[str, Array]], list[int]]:
    """Return for each dtype a table of the elements of `lists`, and the indices that are in none, for `portable`.

    lists[0][i], lists[1][i], ... are treated together. A row of the table holds an address for each
    list and a number of elements, `_CHUNK` or fewer. A table follows from the addresses and layouts
    of the arrays, and is kept under them: for the same arrays nothing is uploaded again, and for
    others it is not found.
    """
    layouts = [[(a.data.ptr, a.shape, a.strides, a.dtype.char) for a in arrays] for arrays in lists]
    return _upload(_here(), tuple(zip(*layouts, strict=True)))


@functools.lru_cache(maxsize=64)
def _upload(here: tuple[int, ...], groups: tuple[tuple[Any, ...], ...]) -> tuple[list[tuple[str, Array]], list[int]]:
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
        return [], list(range(len(groups)))  # an array that stands twice: one treatment after the other
    return [(dtype, cupy.asarray(numpy.concatenate(parts))) for dtype, parts in rows.items()], rest


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise unless `array` has `shape`: a kernel would read or write beside it."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
