// The kernels that are launched by cuda.py, which defines before this file, once for each dtype:
//
//     T     the dtype of the arrays
//     A     the dtype to compute in: float for float16, else T
//     TEAM  4, 32, 256 or 1024 neighbouring threads that share a row of a softmax
//
// N rows, H outputs, C classes. Arrays are C-contiguous, indices have 64 bits. No float atomics: every
// sum has an order that follows from the shapes alone.

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK)
typedef long long Index;
const int BLOCK = TEAM > 256 ? TEAM : 256;  // threads of a block

struct Scratch {  // one for each stream; between launches the counters are 0
    unsigned counters[1024];
    double partials[32 * 1024], total[2];
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

// ---- softmax: a team of threads for each row, up to 1024 blocks that go on to further rows ----
// A warp reads several short rows at once; a long one has a block, and is in its cache after the first of
// three passes. Teams without a row keep in step with n = 0, because all threads meet in `reduce`.

// Return x - top, and 0 at the maximum also where that is infinite.
__device__ A shifted(A x, A top) { return x == top ? A(0) : x - top; }

__device__ Index label_at(const void* t, Index i, Index bytes) {
    switch (bytes) {
        case 1: return ((const signed char*)t)[i];
        case 2: return ((const short*)t)[i];
        case 4: return ((const int*)t)[i];
        default: return ((const Index*)t)[i];
    }
}

// y = exp(x - max) / sum(exp(x - max)) of x (N, C), and unless `loss` is null, for the labels t (N,),
// loss = mean(log(sum(exp(x - max))) - (x[t] - max)). A NaN score, or a label out of range, makes `total` NaN.
KERNEL softmax(const T* x, T* y, Index rows, Index classes, const void* t, Index label_bytes, T* loss,
               Scratch* scratch) {
    const Index lane = threadIdx.x % TEAM, teams = BLOCK / TEAM;
    double losses = 0;
    for (Index first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
        const Index row = first + threadIdx.x / TEAM;
        const Index n = row < rows ? classes : 0;
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

// dx = y * (dout - sum(dout * y)), all (N, C)
KERNEL softmax_grad(const T* dout, const T* y, T* dx, Index rows, Index classes) {
    const Index lane = threadIdx.x % TEAM, teams = BLOCK / TEAM;
    for (Index first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
        const Index row = first + threadIdx.x / TEAM, start = row * classes;
        const Index n = row < rows ? classes : 0;
        A sum = 0;
        for (Index k = lane; k < n; k += TEAM) sum += A(dout[start + k]) * A(y[start + k]);
        sum = reduce<TEAM>(sum, Sum());
        for (Index k = lane; k < n; k += TEAM) dx[start + k] = T(A(y[start + k]) * (A(dout[start + k]) - sum));
    }
}

// ---- sums of columns: a block for a tile of 1 to 32 columns and every slices-th group of rows ----
// Neighbouring threads read neighbouring columns, then the next row, so that narrow matrices too are read in line.

// Return the sum of `column` over a slice of the rows, to all threads of the block that have this column.
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

// out (H,) = the sum of the rows of dout (N, H); a grid of tiles x slices, whose last block of a tile adds the slices
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

// row idx[n] of out (V, H) = the sum of the rows m of dout (N, H) where idx[m] = idx[n], by the block of the first
KERNEL embedding_grad(const Index* idx, const T* dout, T* out, Index rows, Index vocabulary, Index columns) {
    __shared__ bool hits[BLOCK];
    for (Index n = blockIdx.x; n < rows; n += gridDim.x) {
        const Index id = idx[n];
        int done = id < 0 || id >= vocabulary;
        for (Index first = 0; first < n && !done; first += BLOCK) {  // all threads leave together
            const Index m = first + threadIdx.x;
            done = reduce<BLOCK>(int(m < n && idx[m] == id), Max());
        }
        if (done) continue;
        for (Index left = 0; left < columns; left += BLOCK) {
            const Index c = left + threadIdx.x;
            A sum = 0;
            for (Index first = n; first < rows; first += BLOCK) {
                const Index m = first + threadIdx.x;
                const int hit = m < rows && idx[m] == id;
                hits[threadIdx.x] = hit;
                if (!reduce<BLOCK>(hit, Max())) continue;  // its barriers part the writes of hits from the reads
                for (int k = 0; k < BLOCK && c < columns; k++)
                    if (hits[k]) sum += A(dout[(first + k) * columns + c]);
                __syncthreads();
            }
            if (c < columns) out[id * columns + c] = T(sum);
        }
    }
}

// ---- all parameters of a model: a block for each row of the table that cuda.py makes ----
// A row has an address for each list of arrays, and the number of elements there.

// An optimizer: FORMULA changes p and the state s, r of an element with gradient g, all in A; LISTS of them are given.
#define OPTIMIZER(NAME, LISTS, FORMULA, ...)                                                        \
    KERNEL NAME(const Index* table, __VA_ARGS__) {                                                  \
        const Index* row = table + blockIdx.x * Index(LISTS + 1);                                   \
        T *ps = (T*)row[0], *gs = (T*)row[1], *ss = (T*)row[LISTS > 2 ? 2 : 0], *rs = (T*)row[LISTS > 3 ? 3 : 0]; \
        const int n = row[LISTS];                                                                   \
        for (int i = threadIdx.x; i < n; i += BLOCK) {                                              \
            A p = A(ps[i]), g = A(gs[i]), s = A(ss[i]), r = A(rs[i]);                               \
            FORMULA;                                                                                \
            if (LISTS > 2) ss[i] = T(s);                                                            \
            if (LISTS > 3) rs[i] = T(r);                                                            \
            ps[i] = T(p);                                                                           \
        }                                                                                           \
    }

OPTIMIZER(sgd, 2, p = A(decay_factor) * p - A(lr) * g, double lr, double decay_factor)
OPTIMIZER(momentum, 3, s = A(momentum) * s - A(lr) * g; p = A(decay_factor) * p + s,
          double lr, double momentum, double decay_factor)
OPTIMIZER(nesterov, 3,
          s = A(momentum) * s - A(lr) * g; p = A(decay_factor) * p + (A(momentum) * s - A(lr) * g),
          double lr, double momentum, double decay_factor)
OPTIMIZER(adagrad, 3, s += g * g; p = A(decay_factor) * p - A(lr) * g / (sqrt(s) + A(eps)),
          double lr, double eps, double decay_factor)
OPTIMIZER(rmsprop, 3,
          s = A(decay) * s + A(1 - decay) * g * g; p = A(decay_factor) * p - A(lr) * g / (sqrt(s) + A(eps)),
          double lr, double decay, double eps, double decay_factor)
OPTIMIZER(adam, 4,
          s = A(beta1) * s + A(1 - beta1) * g; r = A(beta2) * r + A(1 - beta2) * (g * g);
          p = A(decay_factor) * p - A(lr) * s / (sqrt(r) + A(eps)),
          double lr, double beta1, double beta2, double eps, double decay_factor)

// Where squares of float64 overflow, the norm is that of the gradients times 2**-700, which are added up as well.
const double TINY = 1.90109156629516e-211;

// total[scaled] = sum(g * g) over all gradients, plus what those of another dtype gave if `add`; up to 1024 blocks,
// whose sums the last one adds
KERNEL square_sum(const Index* table, Index chunks, Index add, Index scaled, Scratch* scratch) {
    double sum = 0;
    for (Index c = blockIdx.x; c < chunks; c += gridDim.x) {
        const T* gs = (const T*)table[2 * c];
        for (int i = threadIdx.x; i < table[2 * c + 1]; i += BLOCK) {
            const double g = scaled ? double(gs[i]) * TINY : double(gs[i]);
            sum += g * g;
        }
    }
    if (sum_of_blocks(sum, scratch) && threadIdx.x == 0) {
        if (!add && !scaled) scratch->total[0] = scratch->total[1] = 0;
        scratch->total[scaled] += sum;
        if (sizeof(T) < sizeof(double)) scratch->total[1] += sum * TINY * TINY;  // infinite and NaN in both
    }
}

// g *= max_norm / (norm + 1e-6) where that is below 1 and the norm a number
KERNEL clip(const Index* table, const Scratch* scratch, double max_norm) {
    const double norm = sqrt(scratch->total[0]), scaled = sqrt(scratch->total[1]);
    const double rate = isfinite(norm) ? max_norm / (norm + 1e-6) : max_norm * TINY / scaled;
    if (!(rate < 1) || isinf(scaled)) return;
    const Index* row = table + blockIdx.x * Index(2);
    T* g = (T*)row[0];
    for (int i = threadIdx.x; i < row[1]; i += BLOCK) g[i] = T(A(double(g[i]) * rate));
}
