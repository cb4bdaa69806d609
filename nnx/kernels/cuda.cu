// The kernels launched by cuda.py, which compiles this file once for each dtype, after definitions of:
//
//     T            the dtype of the arrays
//     A            the accumulation dtype: float for float16, otherwise T
//     ROW_THREADS  the number of neighboring threads per row: 4, 32, 256 or 1024 for the row kernels, which are
//                  compiled separately; 0 for the kernels over elements, columns and tables
//
// N rows, D features, H outputs, C classes. Arrays are C-contiguous, indices have 64 bits. The arguments of a kernel
// are its arrays, then the sizes that its geometry in cuda.py computes from a shape, then numbers. There are no
// floating-point atomics: the order of every sum depends only on the shapes.

#define KERNEL(NAME) extern "C" __global__ void __launch_bounds__(BLOCK) nnx_##NAME
typedef long long Index;
const int BLOCK = ROW_THREADS > 256 ? ROW_THREADS : 256;  // threads per block

struct Workspace {  // one per stream; the counters are 0 between launches
    unsigned counters[1024];
    double partials[3 * 32 * 1024], total[2];
};

// Accumulators of column sums: two terms, or count, mean and squared deviations (m2), combined by Chan's formulas.
struct Pair { A first, second; };
struct Moments { A n, mean, m2; };
__device__ Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
__device__ Moments operator+(Moments a, Moments b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    const A n = a.n + b.n, share = b.n / n, d = b.mean - a.mean;
    return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.n * share};
}

struct Sum { template <class V> __device__ V operator()(V a, V b) const { return a + b; } };
struct Max { template <class V> __device__ V operator()(V a, V b) const { return a > b ? a : b; } };

// Return the value of v in the thread whose lane is this one's XOR d.
template <class V> __device__ V exchange(V v, int d) { return __shfl_xor_sync(~0u, v, d); }
__device__ Pair exchange(Pair v, int d) { return {exchange(v.first, d), exchange(v.second, d)}; }
__device__ Moments exchange(Moments v, int d) { return {exchange(v.n, d), exchange(v.mean, d), exchange(v.m2, d)}; }

// Combine the values of SIZE neighboring threads in a fixed order; return the result in each of them.
template <int SIZE, class V, class F> __device__ V reduce(V v, F combine) {
    for (int d = (SIZE < 32 ? SIZE : 32) / 2; d; d /= 2) v = combine(v, exchange(v, d));
    if (SIZE > 32) {
        __shared__ V warps[32];
        __syncthreads();  // all threads have read the values of the previous call
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
        __syncthreads();
        v = warps[threadIdx.x % (SIZE > 32 ? SIZE / 32 : 1)];
        for (int d = SIZE / 64; d; d /= 2) v = combine(v, exchange(v, d));
    }
    return v;
}

// Return whether this block is the last of `blocks` to call this; the writes of the others are then visible to it.
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

// In the last block to finish, set `v` to the sum over all threads of all blocks and return true; otherwise false.
__device__ bool sum_of_blocks(double& v, Workspace* workspace) {
    v = reduce<BLOCK>(v, Sum());
    if (threadIdx.x == 0) workspace->partials[blockIdx.x] = v;
    if (!is_last(workspace->counters, gridDim.x)) return false;
    v = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += BLOCK) v += workspace->partials[i];
    v = reduce<BLOCK>(v, Sum());
    return true;
}

__device__ Index label_at(const void* t, Index i, Index bytes) {
    switch (bytes) {
        case 1: return ((const signed char*)t)[i];
        case 2: return ((const short*)t)[i];
        case 4: return ((const int*)t)[i];
        default: return ((const Index*)t)[i];
    }
}

// Return the weight of term i of n in a mean weighted over `groups` equal groups; 1 without weights.
__device__ A weight_of(const A* weight, Index groups, Index i, Index n) {
    return weight ? weight[i / (n / groups)] * A(groups) : A(1);
}

#if !ROW_THREADS

// ---- elements: one thread per element, or per several elements of a large array ----

#define FOR_ELEMENTS(I) \
    for (Index I = blockIdx.x * Index(BLOCK) + threadIdx.x; I < size; I += gridDim.x * Index(BLOCK))

__device__ A sigmoid(A x) { return A(1) / (A(1) + exp(-x)); }

KERNEL(sigmoid)(const T* x, T* y, Index size) {
    FOR_ELEMENTS(i) y[i] = T(sigmoid(A(x[i])));
}

KERNEL(sigmoid_grad)(const T* dout, const T* y, T* dx, Index size) {
    FOR_ELEMENTS(i) dx[i] = T(A(dout[i]) * A(y[i]) * (A(1) - A(y[i])));
}

KERNEL(relu)(const T* x, T* y, Index size) {
    FOR_ELEMENTS(i) y[i] = A(x[i]) <= A(0) ? T(A(0)) : x[i];
}

KERNEL(relu_grad)(const T* dout, const T* y, T* dx, Index size) {
    FOR_ELEMENTS(i) dx[i] = A(y[i]) > A(0) ? dout[i] : T(A(0));
}

KERNEL(tanh)(const T* x, T* y, Index size) {
    FOR_ELEMENTS(i) y[i] = T(tanh(A(x[i])));
}

KERNEL(tanh_grad)(const T* dout, const T* y, T* dx, Index size) {
    FOR_ELEMENTS(i) dx[i] = T(A(dout[i]) * (A(1) - A(y[i]) * A(y[i])));
}

// c = x clipped to [-30, 30], beyond which s is 0 or 1; s = (1 + tanh(u)) / 2 = sigmoid(2 * u) and du = du/dx at c
struct Gelu {
    A c, s, du;
    __device__ Gelu(A x) {
        const A root = A(0.7978845608028654);  // sqrt(2 / pi)
        c = max(A(-30), min(A(30), x));
        s = sigmoid(A(2) * root * c * (A(1) + A(0.044715) * c * c));
        du = root * (A(1) + A(3 * 0.044715) * c * c);
    }
};

KERNEL(gelu)(const T* x, T* y, Index size) {
    FOR_ELEMENTS(i) {
        const A v = A(x[i]);
        const Gelu g(v);
        y[i] = T(isnan(v) ? v : (v < A(0) ? g.c : v) * g.s);
    }
}

KERNEL(gelu_grad)(const T* dout, const T* x, T* dx, Index size) {
    FOR_ELEMENTS(i) {
        const A v = A(x[i]);
        const Gelu g(v);
        dx[i] = T(isnan(v) ? v : A(dout[i]) * (g.s + g.c * g.s * (A(1) - g.s) * A(2) * g.du));
    }
}

KERNEL(dropout)(const T* x, T* y, Index size, Index first, Index second, Index threshold) {
    FOR_ELEMENTS(i) {
        unsigned hash = unsigned(i);
        for (int k = 0; k < 2; k++) {
            hash ^= unsigned(k ? second : first);
            hash = (hash ^ hash >> 16) * 0x7FEB352Du;
            hash = (hash ^ hash >> 15) * 0x846CA68Bu;
            hash ^= hash >> 16;
        }
        y[i] = hash >= unsigned(threshold) ? x[i] : T(A(0));
    }
}

// loss = mean(log(1 + exp(z))), z = -x where t is 1 and x where it is 0, and y = sigmoid(x); NaN for other labels
KERNEL(sigmoid_loss)(const T* x, const void* t, const A* weight, T* y, T* loss, Workspace* workspace, Index size,
                     Index label_bytes, Index groups) {
    double losses = 0;
    FOR_ELEMENTS(i) {
        const Index label = label_at(t, i, label_bytes);
        const A v = label == 0 || label == 1 ? A(x[i]) : A(CUDART_NAN), z = label ? -v : v;
        const A w = weight_of(weight, groups, i, size);
        if (w != 0) losses += w * ((z > A(0) ? z : A(0)) + log1p(exp(-abs(z))));
        y[i] = T(sigmoid(v));
    }
    if (sum_of_blocks(losses, workspace) && threadIdx.x == 0) *loss = T(A(losses / size));
}

KERNEL(sigmoid_loss_grad)(const T* y, const void* t, const A* weight, const double* dout, T* dx, Index size,
                          Index label_bytes, Index groups, double factor) {
    const A scale = A((dout ? *dout : factor) / size);
    FOR_ELEMENTS(i) {
        const A w = weight_of(weight, groups, i, size);
        dx[i] = T(w == 0 ? A(0) : (A(y[i]) - A(label_at(t, i, label_bytes))) * (w * scale));
    }
}

KERNEL(squared_error)(const T* x, const T* t, const A* weight, T* loss, Workspace* workspace, Index size,
                      Index groups) {
    double losses = 0;
    FOR_ELEMENTS(i) {
        const A w = weight_of(weight, groups, i, size), d = A(x[i]) - A(t[i]);
        if (w != 0) losses += w * (d * d);
    }
    if (sum_of_blocks(losses, workspace) && threadIdx.x == 0) *loss = T(A(losses / size));
}

KERNEL(squared_error_grad)(const T* x, const T* t, const A* weight, const double* dout, T* dx, Index size,
                           Index groups, double factor) {
    const A scale = A(2 * (dout ? *dout : factor) / size);
    FOR_ELEMENTS(i) {
        const A w = weight_of(weight, groups, i, size);
        dx[i] = T(w == 0 ? A(0) : (A(x[i]) - A(t[i])) * (w * scale));
    }
}

// ---- columns: each block handles one tile of 1 to 32 columns and every slices-th group of rows ----
// Neighboring threads have neighboring columns, then the next row, so that reads are coalesced even in narrow matrices.

#define MATRIX Index rows, Index columns, Index tile, Index tiles
#define FOR_ROWS(R)                                                                                              \
    const Index slices = gridDim.x / unsigned(tiles), slice = blockIdx.x / unsigned(tiles), height = BLOCK / tile, \
                c = blockIdx.x % unsigned(tiles) * tile + threadIdx.x % unsigned(tile);                          \
    for (Index R = slice * height + threadIdx.x / unsigned(tile); R < rows && c < columns; R += slices * height)

// Return the sum of `v` over the threads of the block with the same column, in each of them.
template <class V> __device__ V sum_of_column(V v, Index tile) {
    for (int d = 16; d >= tile; d /= 2) v = v + exchange(v, d);
    __shared__ V warps[BLOCK / 32][32];
    __syncthreads();
    warps[threadIdx.x / 32][threadIdx.x % 32] = v;
    __syncthreads();
    V sum = warps[0][threadIdx.x % unsigned(tile)];
    for (int w = 1; w < BLOCK / 32; w++) sum = sum + warps[w][threadIdx.x % unsigned(tile)];
    return sum;
}

// Set `v` to the sum over all rows, and return true in one thread per column c, which writes the result.
template <class V> __device__ bool sum_of_rows(V& v, Index c, Index columns, Index tile, Index tiles,
                                               Workspace* workspace) {
    const bool writes = threadIdx.x < tile && c < columns;
    const unsigned slices = gridDim.x / unsigned(tiles), slice = blockIdx.x / unsigned(tiles);
    v = sum_of_column(v, tile);
    if (slices > 1) {
        V* partials = (V*)workspace->partials;
        if (writes) partials[slice * columns + c] = v;
        if (!is_last(workspace->counters + blockIdx.x % unsigned(tiles), slices)) return false;
        v = V();
        for (Index r = threadIdx.x / unsigned(tile); r < slices && c < columns; r += BLOCK / tile)
            v = v + partials[r * columns + c];
        v = sum_of_column(v, tile);
    }
    return writes;
}

KERNEL(add_bias)(const T* b, T* y, MATRIX) {
    FOR_ROWS(r) y[r * columns + c] = T(A(y[r * columns + c]) + A(b[c]));
}

KERNEL(bias_grad)(const T* dout, T* out, Workspace* workspace, MATRIX) {
    A sum = 0;
    FOR_ROWS(r) sum += A(dout[r * columns + c]);
    if (sum_of_rows(sum, c, columns, tile, tiles, workspace)) out[c] = T(sum);
}

KERNEL(embedding)(const T* W, const void* idx, T* y, MATRIX, Index vocabulary,
                  Index index_bytes) {
    FOR_ROWS(r) {
        const Index id = label_at(idx, r, index_bytes);
        y[r * columns + c] = 0 <= id && id < vocabulary ? W[id * columns + c] : T(A(CUDART_NAN));
    }
}

// Copy rows of 4-byte words or of bytes; an index out of range wraps around, as in CuPy.
KERNEL(gather)(const void* x, const Index* idx, void* y, MATRIX, Index length,
               Index word) {
    FOR_ROWS(r) {
        const Index id = idx[r], from = ((id % length + length) % length) * columns + c, to = r * columns + c;
        if (word == 4) ((int*)y)[to] = ((const int*)x)[from];
        else ((char*)y)[to] = ((const char*)x)[from];
    }
}

// dx = (y - onehot(t)) * dout / N
KERNEL(softmax_loss_grad)(const T* y, const void* t, const A* weight, const double* dout, T* dx, MATRIX,
                          Index label_bytes, Index groups, double factor) {
    const A scale = A((dout ? *dout : factor) / rows);
    FOR_ROWS(r) {
        const A w = weight_of(weight, groups, r, rows), hit = label_at(t, r, label_bytes) == c;
        dx[r * columns + c] = T(w == 0 ? A(0) : (A(y[r * columns + c]) - hit) * (w * scale));
    }
}

KERNEL(batch_norm_statistics)(const T* x, A* mean, A* rstd, T* running_mean, A* running_var, Workspace* workspace,
                              MATRIX, double momentum, double eps) {
    Moments m = {0, 0, 0};
    FOR_ROWS(r) {
        const A v = A(x[r * columns + c]), d = v - m.mean;
        m.n += A(1);
        m.mean += d / m.n;
        m.m2 += d * (v - m.mean);
    }
    if (!sum_of_rows(m, c, columns, tile, tiles, workspace)) return;
    mean[c] = m.mean;
    rstd[c] = A(1) / sqrt(m.m2 / m.n + A(eps));
    running_mean[c] = T(A(momentum) * A(running_mean[c]) + A(1 - momentum) * m.mean);
    if (rows > 1) running_var[c] = A(momentum) * running_var[c] + A(1 - momentum) * (m.m2 / (m.n - A(1)));
}

// y = gamma * (x - mean) * rstd + beta, with mean and rstd per column
KERNEL(batch_norm)(const T* x, const T* gamma, const T* beta, const A* mean, const A* rstd, T* y, MATRIX) {
    FOR_ROWS(r) y[r * columns + c] = T((A(x[r * columns + c]) - mean[c]) * rstd[c] * A(gamma[c]) + A(beta[c]));
}

// dgamma = sum_xn = sum(dout * xn), dbeta = sum = sum(dout), with mean and rstd per row or per column
KERNEL(norm_sums)(const T* dout, const T* x, const A* mean, const A* rstd, T* dgamma, T* dbeta, A* sum_xn, A* sum,
                  Workspace* workspace, MATRIX, Index of_rows) {
    Pair sums = {0, 0};
    FOR_ROWS(r) {
        const A d = A(dout[r * columns + c]);
        const Index k = of_rows ? r : c;
        sums = sums + Pair{d * ((A(x[r * columns + c]) - mean[k]) * rstd[k]), d};
    }
    if (!sum_of_rows(sums, c, columns, tile, tiles, workspace)) return;
    dgamma[c] = T(sums.first);
    dbeta[c] = T(sums.second);
    if (sum) sum_xn[c] = sums.first, sum[c] = sums.second;
}

// dx = gamma * rstd * (dout - mean(dout) - xn * mean(dout * xn))
KERNEL(batch_norm_grad)(const T* dout, const T* x, const T* gamma, const A* mean, const A* rstd, const A* sum_xn,
                        const A* sum, T* dx, MATRIX) {
    FOR_ROWS(r) {
        const A xn = (A(x[r * columns + c]) - mean[c]) * rstd[c];
        dx[r * columns + c] = T(A(gamma[c]) * rstd[c] *
                                (A(dout[r * columns + c]) - sum[c] / A(rows) - xn * (sum_xn[c] / A(rows))));
    }
}

// row idx[n] of out (V, H) = the sum of the rows m of dout (N, H) with idx[m] = idx[n], by the block of the first
KERNEL(embedding_grad)(const Index* idx, const T* dout, T* out, Index rows, Index vocabulary, Index columns) {
    __shared__ bool hits[BLOCK];
    for (Index n = blockIdx.x; n < rows; n += gridDim.x) {
        const Index id = idx[n];
        int done = id < 0 || id >= vocabulary;
        for (Index first = 0; first < n && !done; first += BLOCK) {  // `done` is uniform over the block
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
                if (!reduce<BLOCK>(hit, Max())) continue;  // its barriers separate the writes of hits from the reads
                for (int k = 0; k < BLOCK && c < columns; k++)
                    if (hits[k]) sum += A(dout[(first + k) * columns + c]);
                __syncthreads();
            }
            if (c < columns) out[id * columns + c] = T(sum);
        }
    }
}

// ---- recurrent layers: one thread per row n < N and hidden unit; time step t of arrays (N, T, ...), as in portable.py ----

#define STEP Index size, Index steps, Index units, Index t
// `at` is the index of the element in an array (N, T, H).
#define FOR_STEP(I)                                                                               \
    for (Index I = blockIdx.x * Index(BLOCK) + threadIdx.x; I < size; I += gridDim.x * Index(BLOCK)) \
        for (Index n = I / units, k = I % units, at = (n * steps + t) * units + k, once = 1; once; once = 0)

// Store `h` in `hs`, and as the state before the next step.
__device__ void store_state(A h, T* hs, T* h_prev, Index at, STEP) {
    hs[at] = T(h);
    if (t + 1 < steps) h_prev[at + units] = T(h);
}

KERNEL(rnn_step)(T* hs, const T* product, T* h_prev, STEP) {
    FOR_STEP(i) store_state(tanh(A(hs[at]) + A(product[i])), hs, h_prev, at, size, steps, units, t);
}

KERNEL(rnn_step_grad)(const T* hs, const T* dhs, const T* dh, T* da, STEP) {
    FOR_STEP(i) da[at] = T((A(dhs[at]) + A(dh[i])) * (A(1) - A(hs[at]) * A(hs[at])));
}

KERNEL(lstm_step)(T* gates, const T* product, T* cs, T* h_prev, T* hs, STEP) {
    FOR_STEP(i) {
        T *y = gates + (4 * (n * steps + t) * units + k), *c_prev = cs + (at + n * units);
        const T* p = product + (4 * n * units + k);
        const A f = sigmoid(A(y[0]) + A(p[0])), g = tanh(A(y[units]) + A(p[units]));
        const A in = sigmoid(A(y[2 * units]) + A(p[2 * units])), o = sigmoid(A(y[3 * units]) + A(p[3 * units]));
        const A c = f * A(*c_prev) + g * in;
        y[0] = T(f), y[units] = T(g), y[2 * units] = T(in), y[3 * units] = T(o);
        c_prev[units] = T(c);
        store_state(o * tanh(c), hs, h_prev, at, size, steps, units, t);
    }
}

KERNEL(lstm_step_grad)(const T* gates, const T* cs, const T* dhs, const T* dh, T* dc, T* da, STEP) {
    FOR_STEP(i) {
        const Index first = 4 * (n * steps + t) * units + k, of_c = at + n * units;
        const T* y = gates + first;
        T* d = da + first;
        const A f = A(y[0]), g = A(y[units]), in = A(y[2 * units]), o = A(y[3 * units]);
        const A tanh_c = tanh(A(cs[of_c + units])), total = A(dhs[at]) + A(dh[i]);
        const A sum = A(dc[i]) + total * o * (A(1) - tanh_c * tanh_c);
        d[0] = T(sum * A(cs[of_c]) * f * (A(1) - f));
        d[units] = T(sum * in * (A(1) - g * g));
        d[2 * units] = T(sum * g * in * (A(1) - in));
        d[3 * units] = T(total * tanh_c * o * (A(1) - o));
        dc[i] = T(sum * f);
    }
}

KERNEL(gru_gates)(T* gates, const T* product, const T* h_prev, T* reset, STEP) {
    FOR_STEP(i) {
        T* y = gates + (3 * (n * steps + t) * units + k);
        const T* p = product + (2 * n * units + k);
        y[0] = T(sigmoid(A(y[0]) + A(p[0])));
        y[units] = T(sigmoid(A(y[units]) + A(p[units])));
        reset[at] = T(A(y[units]) * A(h_prev[at]));
    }
}

KERNEL(gru_step)(T* gates, const T* product, T* h_prev, T* hs, STEP) {
    FOR_STEP(i) {
        T* y = gates + (3 * (n * steps + t) * units + k);
        const A z = A(y[0]), hat = tanh(A(y[2 * units]) + A(product[i]));
        y[2 * units] = T(hat);
        store_state((A(1) - z) * A(h_prev[at]) + z * hat, hs, h_prev, at, size, steps, units, t);
    }
}

KERNEL(gru_step_grad)(const T* gates, const T* h_prev, const T* dhs, T* dh, const T* product, T* da, STEP) {
    FOR_STEP(i) {
        const Index first = 3 * (n * steps + t) * units + k;
        const A z = A(gates[first]), hat = A(gates[first + 2 * units]);
        const A total = A(dhs[at]) + A(dh[i]) + A(product[i]);
        da[first] = T(total * (hat - A(h_prev[at])) * z * (A(1) - z));
        da[first + 2 * units] = T(total * z * (A(1) - hat * hat));
        dh[i] = T(total * (A(1) - z));
    }
}

KERNEL(gru_gates_grad)(const T* gates, const T* h_prev, const T* dreset, T* dh, T* da, STEP) {
    FOR_STEP(i) {
        const Index at_r = (3 * (n * steps + t) + 1) * units + k;
        const A r = A(gates[at_r]), d = A(dreset[i]);
        da[at_r] = T(d * A(h_prev[at]) * r * (A(1) - r));
        dh[i] = T(A(dh[i]) + d * r);
    }
}

// ---- all parameters of a model: one block per row of the table built by cuda.py ----
// A row holds an address for each list of arrays, and the number of elements.

// An optimizer: FORMULA updates p and the state s, r of an element with gradient g, all in A, given LISTS lists.
#define OPTIMIZER(NAME, LISTS, FORMULA, ...)                                                        \
    KERNEL(NAME)(const Index* table, __VA_ARGS__) {                                                  \
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

// If squares overflow in float64, the norm is computed from the gradients times 2**-700, whose squares are summed too.
const double TINY = 1.90109156629516e-211;

// total[scaled] = sum(g * g) over all gradients, added to the sum of those of other dtypes if `add`; up to 1024 blocks,
// whose sums the last one adds
KERNEL(square_sum)(const Index* table, Index chunks, Index add, Index scaled, Workspace* workspace) {
    double sum = 0;
    for (Index c = blockIdx.x; c < chunks; c += gridDim.x) {
        const T* gs = (const T*)table[2 * c];
        for (int i = threadIdx.x; i < table[2 * c + 1]; i += BLOCK) {
            const double g = scaled ? double(gs[i]) * TINY : double(gs[i]);
            sum += g * g;
        }
    }
    if (sum_of_blocks(sum, workspace) && threadIdx.x == 0) {
        if (!add && !scaled) workspace->total[0] = workspace->total[1] = 0;
        workspace->total[scaled] += sum;
        if (sizeof(T) < sizeof(double)) workspace->total[1] += sum * TINY * TINY;  // infinite and NaN in both
    }
}

// g *= max_norm / (norm + 1e-6) if that is below 1 and the norm is finite
KERNEL(clip)(const Index* table, const Workspace* workspace, double max_norm) {
    const double norm = sqrt(workspace->total[0]), scaled = sqrt(workspace->total[1]);
    const double rate = isfinite(norm) ? max_norm / (norm + 1e-6) : max_norm * TINY / scaled;
    if (!(rate < 1) || isinf(scaled)) return;
    const Index* row = table + blockIdx.x * Index(2);
    T* g = (T*)row[0];
    for (int i = threadIdx.x; i < row[1]; i += BLOCK) g[i] = T(A(double(g[i]) * rate));
}

// *finite = whether all elements are finite; up to 1024 blocks
KERNEL(all_finite)(const Index* table, Workspace* workspace, bool* finite, Index chunks) {
    double bad = 0;
    for (Index c = blockIdx.x; c < chunks; c += gridDim.x) {
        const T* values = (const T*)table[2 * c];
        for (int i = threadIdx.x; i < table[2 * c + 1]; i += BLOCK) bad += !isfinite(A(values[i]));
    }
    if (sum_of_blocks(bad, workspace) && threadIdx.x == 0) *finite = bad == 0;
}

#else

// ---- rows: ROW_THREADS threads per row, in up to 1024 blocks that loop over further rows ----
// A warp reads several short rows at once; a long row has a whole block, and is cached after the first of several
// passes. Threads without a row run the loop with n = 0, because `reduce` synchronizes all threads of the block.

#define FOR_ROW_GROUPS(FIRST)                                                           \
    for (Index FIRST = blockIdx.x * Index(BLOCK / ROW_THREADS); FIRST < rows;           \
         FIRST += gridDim.x * Index(BLOCK / ROW_THREADS))
#define ROW                                                                   \
    const Index row = first + threadIdx.x / ROW_THREADS, start = row * columns;      \
    const Index n = row < rows ? columns : 0, lane = threadIdx.x % ROW_THREADS
#define FOR_COLUMNS(K) for (Index K = lane; K < n; K += ROW_THREADS)

// Return x - top, or 0 at the maximum even if it is infinite.
__device__ A shifted(A x, A top) { return x == top ? A(0) : x - top; }

// y = exp(x - max) / sum(exp(x - max)) for x (N, C), and unless `loss` is null, for the labels t (N,),
// loss = mean(log(sum(exp(x - max))) - (x[t] - max)). A NaN score or a label out of range makes `total` NaN.
KERNEL(softmax)(const T* x, const void* t, const A* weight, T* y, T* loss, Workspace* workspace, Index rows,
                Index columns, Index label_bytes, Index groups) {
    double losses = 0;
    FOR_ROW_GROUPS(first) {
        ROW;
        const T* scores = x + start;
        A top = n ? A(scores[0]) : A(0), total = 0;
        FOR_COLUMNS(k) top = Max()(top, A(scores[k]));
        top = reduce<ROW_THREADS>(top, Max());
        FOR_COLUMNS(k) total += exp(shifted(A(scores[k]), top));
        total = reduce<ROW_THREADS>(total, Sum());
        if (loss && n) {
            const Index label = label_at(t, row, label_bytes);
            const bool valid = 0 <= label && label < columns;
            if (!valid) total = CUDART_NAN;
            const A w = weight_of(weight, groups, row, rows);
            if (lane == 0 && w != 0) losses += w * (log(total) - (valid ? shifted(A(scores[label]), top) : A(0)));
        }
        FOR_COLUMNS(k) y[start + k] = T(exp(shifted(A(scores[k]), top)) / total);
    }
    if (loss && sum_of_blocks(losses, workspace) && threadIdx.x == 0) *loss = T(A(losses / rows));
}

// dx = y * (dout - sum(dout * y)), all (N, C)
KERNEL(softmax_grad)(const T* dout, const T* y, T* dx, Index rows, Index columns) {
    FOR_ROW_GROUPS(first) {
        ROW;
        A sum = 0;
        FOR_COLUMNS(k) sum += A(dout[start + k]) * A(y[start + k]);
        sum = reduce<ROW_THREADS>(sum, Sum());
        FOR_COLUMNS(k) dx[start + k] = T(A(y[start + k]) * (A(dout[start + k]) - sum));
    }
}

// y = gamma * (x - mean) * rstd + beta, with mean and rstd = 1 / sqrt(var + eps) per row
KERNEL(layer_norm)(const T* x, const T* gamma, const T* beta, T* y, A* means, A* rstds, Index rows, Index columns,
                   double eps) {
    FOR_ROW_GROUPS(first) {
        ROW;
        A mean = 0, var = 0;
        FOR_COLUMNS(k) mean += A(x[start + k]);
        mean = reduce<ROW_THREADS>(mean, Sum()) / A(columns);
        FOR_COLUMNS(k) var += (A(x[start + k]) - mean) * (A(x[start + k]) - mean);
        var = reduce<ROW_THREADS>(var, Sum()) / A(columns);
        const A rstd = A(1) / sqrt(var + A(eps));
        FOR_COLUMNS(k) y[start + k] = T((A(x[start + k]) - mean) * rstd * A(gamma[k]) + A(beta[k]));
        if (lane == 0 && n) means[row] = mean, rstds[row] = rstd;
    }
}

// dx = rstd * (dxn - mean(dxn) - xn * mean(dxn * xn)), dxn = dout * gamma
KERNEL(layer_norm_grad)(const T* dout, const T* x, const T* gamma, const A* means, const A* rstds, T* dx, Index rows,
                        Index columns) {
    FOR_ROW_GROUPS(first) {
        ROW;
        const A mean = n ? means[row] : A(0), rstd = n ? rstds[row] : A(0);
        A sum = 0, sum_xn = 0;
        FOR_COLUMNS(k) {
            const A dxn = A(dout[start + k]) * A(gamma[k]);
            sum += dxn;
            sum_xn += dxn * ((A(x[start + k]) - mean) * rstd);
        }
        sum = reduce<ROW_THREADS>(sum, Sum()) / A(columns);
        sum_xn = reduce<ROW_THREADS>(sum_xn, Sum()) / A(columns);
        FOR_COLUMNS(k) {
            const A xn = (A(x[start + k]) - mean) * rstd;
            dx[start + k] = T(rstd * (A(dout[start + k]) * A(gamma[k]) - sum - xn * sum_xn));
        }
    }
}

#endif
