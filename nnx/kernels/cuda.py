"""The kernels in CUDA C++, one launch each where `portable` needs several; not yet run on a GPU.

N rows (all leading axes together), H outputs, C classes. T is the dtype of the arrays and A the one
that is computed in: float for float16, else T. No kernel waits for the device or adds with float
atomics: every sum has a fixed order, so that runs repeat bit for bit.

Elementwise formulas are CuPy's ElementwiseKernel, which takes any layout and any size. The others
index with 64 bits and want C-contiguous arrays, which they make of what is not; they are compiled
at their first call, by dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import cupy
import numpy

from nnx.kernels import portable
from nnx.np import Array

__all__ = [
    "add_bias",
    "bias_grad",
    "clip_grads",
    "relu_grad",
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
template <class V> struct Wide { typedef V type; };
template <> struct Wide<float16> { typedef float type; };
typedef Wide<T>::type A;
"""


def _elementwise(name: str, inputs: str, output: str, formula: str) -> Any:
    return cupy.ElementwiseKernel(inputs, f"T {output}", f"{output} = T({formula})", f"nnx_{name}", preamble=_WIDE)


_add_bias = _elementwise("add_bias", "T b", "y", "A(y) + A(b)")
_sigmoid = _elementwise("sigmoid", "T x", "y", "A(1) / (A(1) + exp(-A(x)))")
_sigmoid_grad = _elementwise("sigmoid_grad", "T dout, T y", "dx", "A(dout) * A(y) * (A(1) - A(y))")
_relu_grad = _elementwise("relu_grad", "T dout, T y", "dx", "A(y) > A(0) ? A(dout) : A(0)")
_tanh_grad = _elementwise("tanh_grad", "T dout, T y", "dx", "A(dout) * (A(1) - A(y) * A(y))")
_softmax_loss_grad, _softmax_loss_grad_array = (
    _elementwise(
        f"softmax_loss_grad_{dout}",
        f"T y, raw I t, {dout} dout, int64 classes, int64 rows",
        "dx",
        "(A(y) - A(t[i / classes] == i % classes)) * (A(dout) / A(rows))",
    )
    for dout in ("float64", "S")  # a number, and an array of any dtype
)


def add_bias(y: Array, b: Array) -> None:
    """Add `b` (H,) to every row of `y` (N, H), in place."""
    _add_bias(b, y)


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


def softmax_loss_grad(y: Array, t: Array, dout: Any) -> Array:
    """Return (y - onehot(t)) * dout / N; `dout` is a number, or an array without axes, which is not waited for."""
    _check_shape("softmax_loss_grad: t", t, y.shape[:-1])
    kernel = _softmax_loss_grad_array if isinstance(dout, Array) else _softmax_loss_grad
    return kernel(y, t, dout, y.shape[-1], t.size)


# ---- in CUDA C++ ------------------------------------------------------------------------------------

_COMMON = """
#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK)
typedef long long Index;
const int BLOCK = TEAM > 256 ? TEAM : 256;  // threads of a block

struct Scratch {  // one for each stream; between launches the counters are 0
    unsigned counters[1024];
    double partials[32 * 1024], total;
};

struct Sum { template <class V> __device__ V operator()(V a, V b) const { return a + b; } };
struct Max { template <class V> __device__ V operator()(V a, V b) const { return a > b ? a : b; } };

// Combine the values of SIZE neighbouring threads in a fixed order; each of them gets the result.
template <int SIZE, class V, class F> __device__ V reduce(V v, F combine) {
    for (int d = (SIZE < 32 ? SIZE : 32) / 2; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
    if (SIZE > 32) {
        __shared__ V warps[32];
        __syncthreads();  // what the call before left here has been read
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
        __syncthreads();
        v = warps[threadIdx.x % (SIZE > 32 ? SIZE / 32 : 1)];
        for (int d = SIZE / 64; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
    }
    return v;
}

// Return whether this block is the last of `blocks` to come here, which sees what the others wrote before.
__device__ bool is_last(unsigned* counter, unsigned blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Make `v` the sum over all threads of all blocks in the last block, which alone gets true.
__device__ bool sum_of_blocks(double& v, Scratch* scratch) {
    v = reduce<BLOCK>(v, Sum());
    if (threadIdx.x == 0) scratch->partials[blockIdx.x] = v;
    if (!is_last(scratch->counters, gridDim.x)) return false;
    v = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += BLOCK) v += scratch->partials[i];
    v = reduce<BLOCK>(v, Sum());
    return true;
}
"""

_SOFTMAX = """
// x - top, and 0 at the maximum also where that is infinite
__device__ A shifted(A x, A top) { return x == top ? A(0) : x - top; }

__device__ Index label_at(const void* t, Index i, Index bytes) {
    switch (bytes) {
        case 1: return ((const signed char*)t)[i];
        case 2: return ((const short*)t)[i];
        case 4: return ((const int*)t)[i];
        default: return ((const Index*)t)[i];
    }
}

KERNEL softmax(const T* x, T* y, Index rows, Index classes,
                                   const void* t, Index label_bytes, T* loss, Scratch* scratch) {
    const Index lane = threadIdx.x % TEAM, teams = BLOCK / TEAM;
    double losses = 0;
    for (Index first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
        const Index row = first + threadIdx.x / TEAM;
        const Index n = row < rows ? classes : 0;  // a team without a row keeps in step
        const T* scores = x + row * classes;
        A top = n ? A(scores[0]) : A(0), total = 0;
        for (Index k = lane; k < n; k += TEAM) top = Max()(top, A(scores[k]));
        top = reduce<TEAM>(top, Max());
        for (Index k = lane; k < n; k += TEAM) total += exp(shifted(A(scores[k]), top));
        total = reduce<TEAM>(total, Sum());
        if (loss && n) {
            const Index label = label_at(t, row, label_bytes);
            const bool valid = 0 <= label && label < classes;
            if (!valid) total = CUDART_NAN;
            if (lane == 0) losses += log(total) - (valid ? shifted(A(scores[label]), top) : A(0));
        }
        for (Index k = lane; k < n; k += TEAM) y[row * classes + k] = T(exp(shifted(A(scores[k]), top)) / total);
    }
    if (loss && sum_of_blocks(losses, scratch) && threadIdx.x == 0) *loss = T(A(losses / rows));
}
"""

_SOFTMAX_GRAD = """
KERNEL softmax_grad(const T* dout, const T* y, T* dx, Index rows, Index classes) {
    const Index lane = threadIdx.x % TEAM, teams = BLOCK / TEAM;
    for (Index first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
        const Index row = first + threadIdx.x / TEAM, start = row * classes;
        const Index n = row < rows ? classes : 0;  // a team without a row keeps in step
        A sum = 0;
        for (Index k = lane; k < n; k += TEAM) sum += A(dout[start + k]) * A(y[start + k]);
        sum = reduce<TEAM>(sum, Sum());
        for (Index k = lane; k < n; k += TEAM) dx[start + k] = T(A(y[start + k]) * (A(dout[start + k]) - sum));
    }
}
"""

_BIAS_GRAD = """
// Return the sum of `column` over every `slices`-th group of rows, to all threads of a block that share the column.
template <class V> __device__ A column_sum(const V* matrix, Index rows, Index columns, Index column, Index tile,
                                           Index slice, Index slices) {
    const Index height = BLOCK / tile;
    A sum = 0;
    if (column < columns)
        for (Index r = slice * height + threadIdx.x / tile; r < rows; r += slices * height)
            sum += A(matrix[r * columns + column]);
    for (int d = 16; d >= tile; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    __shared__ A warps[BLOCK / 32][32];
    warps[threadIdx.x / 32][threadIdx.x % 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < BLOCK / 32; w++) sum += warps[w][threadIdx.x % tile];
    return sum;
}

KERNEL bias_grad(const T* dout, T* out, Index rows, Index columns, Index tile, Scratch* scratch) {
    const Index column = blockIdx.x * Index(tile) + threadIdx.x % tile;
    const bool writes = threadIdx.x < tile && column < columns;
    A sum = column_sum(dout, rows, columns, column, tile, blockIdx.y, gridDim.y);
    if (gridDim.y > 1) {
        A* partials = (A*)scratch->partials;
        if (writes) partials[blockIdx.y * columns + column] = sum;
        if (!is_last(scratch->counters + blockIdx.x, gridDim.y)) return;
        sum = column_sum(partials, gridDim.y, columns, column, tile, 0, 1);
    }
    if (writes) out[column] = T(sum);
}
"""

_SQUARE_SUM = """
KERNEL square_sum(const Index* table, Index chunks, Index add, Scratch* scratch) {
    double sum = 0;
    for (Index c = blockIdx.x; c < chunks; c += gridDim.x) {
        const T* g = (const T*)table[2 * c];
        for (int i = threadIdx.x; i < table[2 * c + 1]; i += BLOCK) sum += double(g[i]) * double(g[i]);
    }
    if (sum_of_blocks(sum, scratch) && threadIdx.x == 0) scratch->total = add ? scratch->total + sum : sum;
}
"""


def _each(name: str, arrays: str, settings: str, formula: str, once: str = "") -> str:
    """Return the source of a kernel that works on all elements of a model: a block takes one row of the table.

    `arrays` names a pointer for each list that `_tables` was given, `formula` treats element i of
    them, `once` comes before it in every thread. This is all that a new optimizer has to write.
    """
    names = arrays.split()
    pointers = "\n".join(f"    T* {a} = (T*)row[{k}];" for k, a in enumerate(names))
    return f"""
KERNEL {name}(const Index* table, {settings}) {{
    const Index* row = table + blockIdx.x * Index({len(names) + 1});
{pointers}
    {once}
    for (int i = threadIdx.x; i < row[{len(names)}]; i += BLOCK) {formula}
}}
"""


_SOURCES = {
    "bias_grad": _BIAS_GRAD,
    "softmax": _SOFTMAX,
    "softmax_grad": _SOFTMAX_GRAD,
    "square_sum": _SQUARE_SUM,
    "sgd": _each("sgd", "p g", "double lr", "p[i] = T(A(p[i]) - A(lr) * A(g[i]));"),
    "clip": _each(
        "clip",
        "g",
        "const Scratch* scratch, double max_norm",
        "g[i] = T(A(double(g[i]) * rate));",
        "const double rate = max_norm / (sqrt(scratch->total) + 1e-6);\n    if (rate >= 1) return;",
    ),
}
_TYPES = {"e": ("float16", "float"), "f": ("float", "float"), "d": ("double", "double")}


@functools.cache
def _kernel(name: str, dtype: str, team: int = 32) -> Any:
    """Return the kernel `name` for arrays of the dtype with this letter; `team` threads share a row."""
    t, a = _TYPES[dtype]
    head = "#include <cupy/carray.cuh>\n#include <cupy/float16.cuh>\n#include <cupy/math_constants.h>\n"
    types = f"typedef {t} T;\ntypedef {a} A;\nconst int TEAM = {team};\n"
    return cupy.RawKernel(head + types + _COMMON + _SOURCES[name], name)


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
        arguments = (dout, out, len(dout), out.size, tile, _scratch(*_here()))
        _kernel("bias_grad", dout.dtype.char)((tiles, slices), (_BLOCK,), arguments)
    return None


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    return _softmax(x, 0, 0, 0, 0)


def softmax_loss(x: Array, t: Array) -> tuple[Array, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    A label outside [0, C) makes its row of softmax(x), and so the loss, NaN. The last block to
    finish adds the sums of the others, so that one launch yields both.
    """
    _check_shape("softmax_loss: t", t, x.shape[:-1])
    t = cupy.ascontiguousarray(t if t.dtype.kind == "i" else t.astype(numpy.int64))
    loss = cupy.empty((), x.dtype)
    return loss, _softmax(x, t, t.itemsize, loss, _scratch(*_here()))


def _softmax(x: Array, *labels: Any) -> Array:
    x = cupy.ascontiguousarray(x)
    y = cupy.empty(x.shape, x.dtype)
    _launch_rows("softmax", x, y, labels=labels)
    return y


def softmax_grad(dout: Array, y: Array) -> Array:
    """Return y * (dout - sum(dout * y)) over the last axis."""
    _check_shape("softmax_grad: dout", dout, y.shape)
    y = cupy.ascontiguousarray(y)
    dx = cupy.empty(y.shape, y.dtype)
    _launch_rows("softmax_grad", cupy.ascontiguousarray(dout, y.dtype), y, dx)
    return dx


def _launch_rows(name: str, first: Array, *arrays: Array, labels: tuple[Any, ...] = ()) -> None:
    """Launch a kernel whose teams of threads share a row: 4 a short one, 1024 a long one, 8 elements each or more."""
    classes = first.shape[-1]
    rows = first.size // classes if classes else 0
    team = next((team for team in (4, 32, _BLOCK) if classes <= 8 * team), 1024)
    block = max(team, _BLOCK)
    blocks = min(_BLOCKS, -(-rows * team // block)) or 1
    _kernel(name, first.dtype.char, team)((blocks,), (block,), (first, *arrays, rows, classes, *labels))


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """Subtract lr * grad from every parameter, in place, in one launch for each dtype among them."""
    tables, rest = _tables(params, grads)
    for dtype, table in tables:
        _kernel("sgd", dtype)((len(table),), (_BLOCK,), (table, float(lr)))
    portable.sgd([params[i] for i in rest], [grads[i] for i in rest], lr)


def clip_grads(grads: Sequence[Array], max_norm: float) -> None:
    """Scale all of `grads` by max_norm / norm where their common norm exceeds `max_norm`, in place.

    The sum of squares is float64 and stays on the device, where the second launch finds it.
    """
    tables, rest = _tables(grads)
    if rest:
        return portable.clip_grads(grads, max_norm)
    scratch = _scratch(*_here())
    for i, (dtype, table) in enumerate(tables):
        _kernel("square_sum", dtype)((min(len(table), _BLOCKS),), (_BLOCK,), (table, len(table), i, scratch))
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
    """Return a `Scratch`."""
    return cupy.zeros(512 + 32 * 1024 + 1, numpy.float64)


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
        if any(tuple(layout) != (shape, contiguous, dtype) for _, *layout in group):
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
