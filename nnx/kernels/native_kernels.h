/* The loops of the native kernels, for T = float or double; native.c includes this file once per type.

   N rows, D features or C classes, n elements. Arrays are C-contiguous. The order of summation depends only on the
   shapes and is the same for every instruction set: LANES interleaved partial sums, or rows in groups of two to eight.
   Results are therefore bitwise identical on all instruction sets; the softmax loss alone calls the C library's log. */

#include "native_math.h"

#define LANES (128 / (int)sizeof(T))
#define BLOCK 1024 /* elements per block, which stay in the L1 cache from one loop to the next */

INLINE T NAME(add_lanes)(T *lanes) {
    for (int k = 0; k < LANES / 2; k++) lanes[k] += lanes[k + LANES / 2];
    for (int k = 0; k < LANES / 4; k++) lanes[k] += lanes[k + LANES / 4];
    for (int k = 0; k < LANES / 8; k++) lanes[k] += lanes[k + LANES / 8];
    return IS_FLOAT ? (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]) : lanes[0] + lanes[1];
}

/* total = the sum of the expression `term` over k = 0, ..., n - 1. */
#define SUM(total, n, term)                                                                                            \
    do {                                                                                                               \
        T sum_ = 0;                                                                                                    \
        Size start_ = 0;                                                                                               \
        if ((n) >= LANES) {                                                                                            \
            T lanes_[LANES] = {0};                                                                                     \
            for (; start_ + LANES <= (n); start_ += LANES)                                                             \
                for (int lane_ = 0; lane_ < LANES; lane_++) {                                                          \
                    const Size k = start_ + lane_;                                                                     \
                    lanes_[lane_] += (term);                                                                           \
                }                                                                                                      \
            sum_ = NAME(add_lanes)(lanes_);                                                                            \
        }                                                                                                              \
        for (Size k = start_; k < (n); k++) sum_ += (term);                                                            \
        (total) = sum_;                                                                                                \
    } while (0)

/* ---- linear ---- */

FAST static void NAME(add_bias)(T *restrict y, const T *restrict b, Size rows, Size columns) {
    for (Size r = 0; r < rows; r++, y += columns)
        for (Size c = 0; c < columns; c++) y[c] += b[c];
}

FAST static void NAME(bias_grad)(const T *restrict dout, T *restrict out, Size rows, Size d) {
    Size r = 0;
    memset(out, 0, d * sizeof(T));
    for (; r + 8 <= rows; r += 8, dout += 8 * d)
        for (Size c = 0; c < d; c++)
            out[c] += ((dout[c] + dout[c + d]) + (dout[c + 2 * d] + dout[c + 3 * d])) +
                      ((dout[c + 4 * d] + dout[c + 5 * d]) + (dout[c + 6 * d] + dout[c + 7 * d]));
    for (; r < rows; r++, dout += d)
        for (Size c = 0; c < d; c++) out[c] += dout[c];
}

/* ---- activations ---- */

#define ELEMENTWISE(name, ...)                                                                                         \
    FAST static void NAME(name)(const T *restrict x, T *restrict y, Size n) {                                          \
        for (Size i = 0; i < n; i++) y[i] = (__VA_ARGS__);                                                             \
    }
#define ELEMENTWISE_GRAD(name, ...)                                                                                    \
    FAST static void NAME(name)(const T *restrict dout, const T *restrict y, T *restrict dx, Size n) {                 \
        for (Size i = 0; i < n; i++) {                                                                                 \
            const T d = dout[i];                                                                                       \
            dx[i] = (__VA_ARGS__);                                                                                     \
        }                                                                                                              \
    }

ELEMENTWISE(sigmoid, NAME(scalar_sigmoid)(x[i]))
ELEMENTWISE_GRAD(sigmoid_grad, (1 - y[i]) * y[i] * d)
ELEMENTWISE(relu, x[i] <= 0 ? 0 : x[i])
ELEMENTWISE_GRAD(relu_grad, y[i] > 0 ? d : 0)
ELEMENTWISE(tanh, NAME(scalar_tanh)(x[i]))
ELEMENTWISE_GRAD(tanh_grad, d * (1 - y[i] * y[i]))
ELEMENTWISE(gelu, NAME(scalar_gelu)(x[i]))
ELEMENTWISE_GRAD(gelu_grad, d *NAME(gelu_derivative)(y[i]))

#define LARGER(a, b) ((a) < (b) ? (b) : (a))

/* y = exp(x - max(x)) over each row, with x - max(x) = 0 at the maximum even if it is infinite; also store the maxima
   in `tops` and the sums in `totals`. */
INLINE void NAME(exp_rows)(const T *restrict x, T *restrict y, T *restrict tops, T *restrict totals, Size rows,
                           Size classes) {
    for (Size r = 0; r < rows; r++) {
        const T *row = x + r * classes;
        T lanes[LANES], top = row[0];
        Size c = 0;
        if (classes >= LANES) {
            for (int k = 0; k < LANES; k++) lanes[k] = row[k];
            for (c = LANES; c + LANES <= classes; c += LANES)
                for (int k = 0; k < LANES; k++) lanes[k] = LARGER(lanes[k], row[c + k]);
            for (int k = 0; k < LANES / 2; k++) lanes[k] = LARGER(lanes[k], lanes[k + LANES / 2]);
            for (int k = 0; k < LANES / 4; k++) lanes[k] = LARGER(lanes[k], lanes[k + LANES / 4]);
            top = lanes[0];
            for (int k = 1; k < LANES / 4; k++) top = LARGER(top, lanes[k]);
        }
        for (; c < classes; c++) top = LARGER(top, row[c]);
        tops[r] = top;
        T *out = y + r * classes;
        if (classes >= BLOCK) /* a long row: in one pass */
            SUM(totals[r], classes, out[k] = NAME(exp_nonpositive)(row[k] == top ? 0 : row[k] - top));
        else
            for (c = 0; c < classes; c++) out[c] = row[c] == top ? 0 : row[c] - top;
    }
    if (classes >= BLOCK) return;
    for (Size i = 0; i < rows * classes; i++) y[i] = NAME(exp_nonpositive)(y[i]);
    for (Size r = 0; r < rows; r++) SUM(totals[r], classes, y[r * classes + k]);
}

/* The number of rows per block. */
#define BLOCK_ROWS(classes) ((classes) < BLOCK ? BLOCK / (classes) : 1)

FAST static void NAME(softmax)(const T *restrict x, T *restrict y, Size rows, Size classes) {
    T tops[BLOCK], totals[BLOCK];
    const Size step = BLOCK_ROWS(classes);
    for (Size first = 0; first < rows; first += step, x += step * classes, y += step * classes) {
        const Size n = rows - first < step ? rows - first : step;
        NAME(exp_rows)(x, y, tops, totals, n, classes);
        for (Size r = 0; r < n; r++) {
            const T factor = 1 / totals[r];
            for (Size c = 0; c < classes; c++) y[r * classes + c] *= factor;
        }
    }
}

FAST static void NAME(softmax_grad)(const T *restrict dout, const T *restrict y, T *restrict dx, Size rows,
                                    Size classes) {
    for (Size r = 0; r < rows; r++, dout += classes, y += classes, dx += classes) {
        T total;
        SUM(total, classes, dout[k] * y[k]);
        for (Size c = 0; c < classes; c++) dx[c] = y[c] * (dout[c] - total);
    }
}

/* ---- losses: t has n elements in `groups` equal groups with weights `weight`, or NULL for a single group ---- */

/* Convert labels of 0 and 1 to T; return whether there are no others. */
INLINE int NAME(read_labels)(Labels t, Size first, Size count, T *restrict labels) {
    int64_t other_bits = 0;
#define READ(type)                                                                                                     \
    for (Size i = 0; i < count; i++) {                                                                                 \
        const type label = ((const type *)t.data)[first + i];                                                          \
        other_bits |= label & ~(type)1;                                                                                \
        labels[i] = (T)(int32_t)label; /* AVX2 cannot convert 64-bit integers */                                       \
    }
    switch (t.itemsize) {
    case 1: READ(int8_t) break;
    case 2: READ(int16_t) break;
    case 4: READ(int32_t) break;
    default: READ(int64_t)
    }
#undef READ
    return other_bits == 0;
}

/* Return the weighted sum of `count` losses, those of the elements from `first` on. */
INLINE double NAME(add_losses)(const T *restrict losses, Size first, Size count, Size group, const T *weight) {
    double sum = 0;
    if (weight) {
        for (Size i = 0; i < count; i++) {
            const T w = weight[(first + i) / group];
            if (w != 0) sum += (double)w * losses[i];
        }
    } else {
        T total;
        SUM(total, count, losses[k]);
        sum = total;
    }
    return sum;
}

FAST static double NAME(softmax_loss)(const T *restrict x, Labels t, T *restrict y, Size rows, Size classes,
                                      Size groups, const T *weight) {
    T tops[BLOCK], totals[BLOCK];
    double loss = 0;
    const Size step = BLOCK_ROWS(classes);
    for (Size first = 0; first < rows; first += step, x += step * classes, y += step * classes) {
        const Size n = rows - first < step ? rows - first : step;
        NAME(exp_rows)(x, y, tops, totals, n, classes);
        for (Size r = 0; r < n; r++) {
            const Size label = label_at(t, first + r);
            const int valid = 0 <= label && label < classes;
            const T total = valid ? totals[r] : (T)NAN, score = valid ? x[r * classes + label] : tops[r];
            totals[r] = LOG(total) - (score == tops[r] ? 0 : score - tops[r]);
            const T factor = 1 / total;
            for (Size c = 0; c < classes; c++) y[r * classes + c] *= factor;
        }
        loss += NAME(add_losses)(totals, first, n, rows / groups, weight);
    }
    return loss / (rows / groups);
}

/* dx = (y - onehot(t)) * factor, where factor = weight * dout / (N per group). */
FAST static void NAME(softmax_loss_grad)(const T *restrict y, Labels t, double dout, T *restrict dx, Size rows,
                                         Size classes, Size groups, const T *weight) {
    const Size group = rows / groups;
    for (Size m = 0, r = 0; m < groups; m++) {
        const T factor = (T)((weight ? weight[m] : 1) * (dout / group));
        const int left_out = weight && weight[m] == 0;
        if (left_out) memset(dx + r * classes, 0, group * classes * sizeof(T));
        for (Size end = r + group; r < end; r++) {
            if (left_out) continue;
            const T *row = y + r * classes;
            T *out = dx + r * classes;
            const Size label = label_at(t, r);
            for (Size c = 0; c < classes; c++) out[c] = row[c] * factor;
            if (0 <= label && label < classes) out[label] = (row[label] - 1) * factor;
        }
    }
}

FAST static double NAME(sigmoid_loss)(const T *restrict x, Labels t, T *restrict y, Size n, Size Py_UNUSED(classes),
                                      Size groups, const T *weight) {
    T labels[BLOCK], exps[BLOCK], losses[BLOCK];
    double loss = 0;
    for (Size first = 0; first < n; first += BLOCK, x += BLOCK, y += BLOCK) {
        const Size count = n - first < BLOCK ? n - first : BLOCK;
        const int valid = NAME(read_labels)(t, first, count, labels);
        for (Size i = 0; i < count; i++) {
            exps[i] = NAME(exp_nonpositive)(-FABS(x[i]));
            y[i] = (x[i] < 0 ? exps[i] : 1) / (1 + exps[i]);
        }
        for (Size i = 0; i < count; i++) {
            const T z = x[i] * (1 - 2 * labels[i]);
            losses[i] = (z > 0 ? z : 0) + NAME(log1p01)(exps[i]);
        }
        for (Size i = 0; i < count && !valid; i++)
            if (label_at(t, first + i) & ~(int64_t)1) losses[i] = y[i] = (T)NAN;
        loss += NAME(add_losses)(losses, first, count, n / groups, weight);
    }
    return loss / (n / groups);
}

/* dx = (y - t) * factor, where factor = weight * dout / (n per group). */
FAST static void NAME(sigmoid_loss_grad)(const T *restrict y, Labels t, double dout, T *restrict dx, Size n,
                                         Size Py_UNUSED(classes), Size groups, const T *weight) {
    T labels[BLOCK];
    const Size group = n / groups;
    for (Size m = 0, i = 0; m < groups; m++) {
        const T factor = (T)((weight ? weight[m] : 1) * (dout / group));
        for (Size end = i + group; i < end;) {
            const Size count = end - i < BLOCK ? end - i : BLOCK;
            NAME(read_labels)(t, i, count, labels);
            for (Size k = 0; k < count; k++) dx[i + k] = (y[i + k] - labels[k]) * factor;
            if (weight && weight[m] == 0) memset(dx + i, 0, count * sizeof(T));
            i += count;
        }
    }
}

FAST static double NAME(squared_error)(const T *restrict x, const T *restrict t, Size n, Size groups, const T *weight) {
    T losses[BLOCK];
    double loss = 0;
    for (Size first = 0; first < n; first += BLOCK, x += BLOCK, t += BLOCK) {
        const Size count = n - first < BLOCK ? n - first : BLOCK;
        for (Size i = 0; i < count; i++) losses[i] = (x[i] - t[i]) * (x[i] - t[i]);
        loss += NAME(add_losses)(losses, first, count, n / groups, weight);
    }
    return loss / (n / groups);
}

/* dx = (x - t) * factor, where factor = weight * 2 * dout / (n per group). */
FAST static void NAME(squared_error_grad)(const T *restrict x, const T *restrict t, double dout, T *restrict dx, Size n,
                                          Size groups, const T *weight) {
    const Size group = n / groups;
    for (Size m = 0; m < groups; m++, x += group, t += group, dx += group) {
        const T factor = (T)((weight ? weight[m] : 1) * (2 * dout / group));
        for (Size i = 0; i < group; i++) dx[i] = (x[i] - t[i]) * factor;
        if (weight && weight[m] == 0) memset(dx, 0, group * sizeof(T));
    }
}

/* ---- dropout, normalization, embedding ---- */

FAST static void NAME(dropout)(const T *restrict x, T *restrict y, Size n, const uint32_t *keys) {
    for (Size i = 0; i < n; i++) {
        const T value = x[i];
        y[i] = hash((uint32_t)i, keys[0], keys[1]) >= keys[2] ? value : 0;
    }
}

/* mean and m2, the sum of squared deviations from it, of each column, in one pass over the matrix: the update formula
   of Chan, Golub and LeVeque, four rows at a time. */
INLINE void NAME(column_moments)(const T *restrict x, T *restrict mean, T *restrict m2, Size rows, Size d) {
    Size r = 0;
    memset(mean, 0, d * sizeof(T));
    memset(m2, 0, d * sizeof(T));
    for (; r + 4 <= rows; r += 4, x += 4 * d) {
        const T share = (T)(4.0 / (r + 4)), between = (T)(4.0 * r / (r + 4));
        for (Size c = 0; c < d; c++) {
            const T a = x[c], b = x[c + d], e = x[c + 2 * d], f = x[c + 3 * d];
            const T center = ((a + b) + (e + f)) * (T)0.25, delta = center - mean[c];
            const T da = a - center, db = b - center, de = e - center, df = f - center;
            m2[c] += ((da * da + db * db) + (de * de + df * df)) + delta * delta * between;
            mean[c] += delta * share;
        }
    }
    for (; r < rows; r++, x += d) {
        const T share = (T)(1.0 / (r + 1)), between = (T)((double)r / (r + 1));
        for (Size c = 0; c < d; c++) {
            const T delta = x[c] - mean[c];
            m2[c] += delta * delta * between;
            mean[c] += delta * share;
        }
    }
}

FAST static void NAME(batch_norm)(const T *restrict x, const T *restrict gamma, const T *restrict beta,
                                  T *restrict running_mean, T *restrict running_var, double momentum, double eps,
                                  T *restrict y, T *restrict mean, T *restrict rstd, T *restrict scale, Size rows,
                                  Size d) {
    const T keep = (T)momentum, learn = (T)(1 - momentum), epsilon = (T)eps;
    NAME(column_moments)(x, mean, rstd, rows, d);
    for (Size c = 0; c < d; c++) {
        running_mean[c] = keep * running_mean[c] + learn * mean[c];
        if (rows > 1) running_var[c] = keep * running_var[c] + learn * (rstd[c] / (rows - 1));
        rstd[c] = 1 / SQRT(rstd[c] / rows + epsilon);
        scale[c] = rstd[c] * gamma[c];
    }
    for (Size r = 0; r < rows; r++, x += d, y += d)
        for (Size c = 0; c < d; c++) y[c] = (x[c] - mean[c]) * scale[c] + beta[c];
}

FAST static void NAME(batch_norm_grad)(const T *restrict dout, const T *restrict x, const T *restrict gamma,
                                       const T *restrict mean, const T *restrict rstd, T *restrict dgamma,
                                       T *restrict dbeta, T *restrict dx, T *restrict scratch, Size rows, Size d) {
    T *restrict scale = scratch, *restrict shift = scratch + d, *restrict slope = scratch + 2 * d;
    const T *a = dout, *b = x;
    Size r = 0;
    memset(dgamma, 0, d * sizeof(T));
    memset(dbeta, 0, d * sizeof(T));
    for (; r + 2 <= rows; r += 2, a += 2 * d, b += 2 * d)
        for (Size c = 0; c < d; c++) {
            dbeta[c] += a[c] + a[c + d];
            dgamma[c] += a[c] * (b[c] - mean[c]) + a[c + d] * (b[c + d] - mean[c]);
        }
    for (; r < rows; r++, a += d, b += d)
        for (Size c = 0; c < d; c++) {
            dbeta[c] += a[c];
            dgamma[c] += a[c] * (b[c] - mean[c]);
        }
    for (Size c = 0; c < d; c++) {
        dgamma[c] *= rstd[c];
        scale[c] = gamma[c] * rstd[c];
        shift[c] = dbeta[c] / rows;
        slope[c] = dgamma[c] / rows * rstd[c];
    }
    for (r = 0; r < rows; r++, dout += d, x += d, dx += d)
        for (Size c = 0; c < d; c++) dx[c] = scale[c] * (dout[c] - shift[c] - (x[c] - mean[c]) * slope[c]);
}

FAST static void NAME(layer_norm)(const T *restrict x, const T *restrict gamma, const T *restrict beta, double eps,
                                  T *restrict y, T *restrict means, T *restrict rstds, Size rows, Size d) {
    for (Size r = 0; r < rows; r++, x += d, y += d) {
        T mean, var;
        SUM(mean, d, x[k]);
        mean /= d;
        SUM(var, d, (x[k] - mean) * (x[k] - mean));
        const T rstd = 1 / SQRT(var / d + (T)eps);
        for (Size c = 0; c < d; c++) y[c] = (x[c] - mean) * rstd * gamma[c] + beta[c];
        means[r] = mean;
        rstds[r] = rstd;
    }
}

FAST static void NAME(layer_norm_grad)(const T *restrict dout, const T *restrict x, const T *restrict gamma,
                                       const T *restrict means, const T *restrict rstds, T *restrict dgamma,
                                       T *restrict dbeta, T *restrict dx, T *Py_UNUSED(scratch), Size rows, Size d) {
    memset(dgamma, 0, d * sizeof(T));
    memset(dbeta, 0, d * sizeof(T));
    for (Size r = 0; r < rows; r++, dout += d, x += d, dx += d) {
        const T mean = means[r], rstd = rstds[r];
        T sum, product;
        SUM(sum, d, dout[k] * gamma[k]);
        SUM(product, d, dout[k] * gamma[k] * (x[k] - mean));
        sum /= d;
        product = product * rstd / d * rstd; /* rstd * rstd may overflow */
        for (Size c = 0; c < d; c++) {
            const T centered = x[c] - mean;
            dgamma[c] += dout[c] * (centered * rstd);
            dbeta[c] += dout[c];
            dx[c] = rstd * (dout[c] * gamma[c] - sum - centered * product);
        }
    }
}

static void NAME(embedding)(const T *W, Labels idx, T *y, Size n, Size rows, Size columns) {
    for (Size i = 0; i < n; i++, y += columns) {
        const Size row = label_at(idx, i);
        if (0 <= row && row < rows)
            memcpy(y, W + row * columns, columns * sizeof(T));
        else
            for (Size c = 0; c < columns; c++) y[c] = (T)NAN;
    }
}

FAST static void NAME(embedding_grad)(Labels idx, const T *restrict dout, T *restrict out, Size n, Size rows,
                                      Size columns) {
    memset(out, 0, rows * columns * sizeof(T));
    for (Size i = 0; i < n; i++, dout += columns) {
        const Size row = label_at(idx, i);
        if (row < 0 || row >= rows) continue;
        for (Size c = 0; c < columns; c++) out[row * columns + c] += dout[c];
    }
}

/* ---- recurrent layers: time step t of arrays (n, steps, ...) with d hidden units, as in portable.py ---- */

/* For all r < n, with `at` the row of step t in arrays of `steps` rows for each r. */
#define FOR_STEP(at) for (Size r = 0, at = t; r < n; r++, at += steps)

INLINE void NAME(keep_state)(T *h_prev, const T *hs, Size at, Size steps, Size d, Size t) {
    if (t + 1 < steps) memcpy(h_prev + (at + 1) * d, hs + at * d, d * sizeof(T));
}

FAST static void NAME(rnn_step)(T *restrict hs, const T *restrict product, T *restrict h_prev, Size n, Size steps,
                                Size d, Size t) {
    FOR_STEP(at) {
        T *h = hs + at * d;
        for (Size k = 0; k < d; k++) h[k] = NAME(scalar_tanh)(h[k] + product[r * d + k]);
        NAME(keep_state)(h_prev, hs, at, steps, d, t);
    }
}

FAST static void NAME(rnn_step_grad)(const T *restrict hs, const T *restrict dhs, const T *restrict dh, T *restrict da,
                                     Size n, Size steps, Size d, Size t) {
    FOR_STEP(at)
    for (Size k = 0; k < d; k++) {
        const T h = hs[at * d + k];
        da[at * d + k] = (dhs[at * d + k] + dh[r * d + k]) * (1 - h * h);
    }
}

INLINE void NAME(lstm_row)(T *restrict f, T *restrict g, T *restrict i, T *restrict o, const T *restrict product,
                           const T *restrict c_prev, T *restrict c, T *restrict h, Size d) {
    for (Size k = 0; k < d; k++) {
        f[k] = NAME(scalar_sigmoid)(f[k] + product[k]);
        g[k] = NAME(scalar_tanh)(g[k] + product[k + d]);
        i[k] = NAME(scalar_sigmoid)(i[k] + product[k + 2 * d]);
        o[k] = NAME(scalar_sigmoid)(o[k] + product[k + 3 * d]);
        c[k] = f[k] * c_prev[k] + g[k] * i[k];
        h[k] = o[k] * NAME(scalar_tanh)(c[k]);
    }
}

FAST static void NAME(lstm_step)(T *restrict gates, const T *restrict product, T *restrict cs, T *restrict h_prev,
                                 T *restrict hs, Size n, Size steps, Size d, Size t) {
    FOR_STEP(at) {
        T *f = gates + at * 4 * d, *c = cs + (at + r) * d; /* cs has one more row for each r */
        NAME(lstm_row)(f, f + d, f + 2 * d, f + 3 * d, product + r * 4 * d, c, c + d, hs + at * d, d);
        NAME(keep_state)(h_prev, hs, at, steps, d, t);
    }
}

INLINE void NAME(lstm_row_grad)(const T *restrict y, const T *restrict c, const T *restrict dhs, const T *restrict dh,
                                T *restrict dc, T *restrict df, T *restrict dg, T *restrict di, T *restrict o, Size d) {
    for (Size k = 0; k < d; k++) {
        const T f = y[k], g = y[k + d], i = y[k + 2 * d], out = y[k + 3 * d], tanh_c = NAME(scalar_tanh)(c[k + d]);
        const T total = dhs[k] + dh[k], sum = dc[k] + total * out * (1 - tanh_c * tanh_c);
        df[k] = sum * c[k] * f * (1 - f);
        dg[k] = sum * i * (1 - g * g);
        di[k] = sum * g * i * (1 - i);
        o[k] = total * tanh_c * out * (1 - out);
        dc[k] = sum * f;
    }
}

FAST static void NAME(lstm_step_grad)(const T *restrict gates, const T *restrict cs, const T *restrict dhs,
                                      const T *restrict dh, T *restrict dc, T *restrict da, Size n, Size steps, Size d,
                                      Size t) {
    FOR_STEP(at) {
        T *df = da + at * 4 * d;
        NAME(lstm_row_grad)(gates + at * 4 * d, cs + (at + r) * d, dhs + at * d, dh + r * d, dc + r * d, df, df + d,
                            df + 2 * d, df + 3 * d, d);
    }
}

INLINE void NAME(gru_gates_row)(T *restrict z, T *restrict reset_gate, const T *restrict product,
                                const T *restrict h_prev, T *restrict reset, Size d) {
    for (Size k = 0; k < d; k++) {
        z[k] = NAME(scalar_sigmoid)(z[k] + product[k]);
        reset_gate[k] = NAME(scalar_sigmoid)(reset_gate[k] + product[k + d]);
        reset[k] = reset_gate[k] * h_prev[k];
    }
}

FAST static void NAME(gru_gates)(T *restrict gates, const T *restrict product, const T *restrict h_prev,
                                 T *restrict reset, Size n, Size steps, Size d, Size t) {
    FOR_STEP(at) {
        T *z = gates + at * 3 * d;
        NAME(gru_gates_row)(z, z + d, product + r * 2 * d, h_prev + at * d, reset + at * d, d);
    }
}

INLINE void NAME(gru_row)(const T *restrict z, T *restrict hat, const T *restrict product, const T *restrict h_prev,
                          T *restrict h, Size d) {
    for (Size k = 0; k < d; k++) {
        hat[k] = NAME(scalar_tanh)(hat[k] + product[k]);
        h[k] = (1 - z[k]) * h_prev[k] + z[k] * hat[k];
    }
}

FAST static void NAME(gru_step)(T *restrict gates, const T *restrict product, T *restrict h_prev, T *restrict hs,
                                Size n, Size steps, Size d, Size t) {
    FOR_STEP(at) {
        T *z = gates + at * 3 * d;
        NAME(gru_row)(z, z + 2 * d, product + r * d, h_prev + at * d, hs + at * d, d);
        NAME(keep_state)(h_prev, hs, at, steps, d, t);
    }
}

INLINE void NAME(gru_row_grad)(const T *restrict y, const T *restrict h_prev, const T *restrict dhs, T *restrict dh,
                               const T *restrict product, T *restrict dz, T *restrict dhat, Size d) {
    for (Size k = 0; k < d; k++) {
        const T z = y[k], hat = y[k + 2 * d], total = dhs[k] + dh[k] + product[k];
        dz[k] = total * (hat - h_prev[k]) * z * (1 - z);
        dhat[k] = total * z * (1 - hat * hat);
        dh[k] = total * (1 - z);
    }
}

FAST static void NAME(gru_step_grad)(const T *restrict gates, const T *restrict h_prev, const T *restrict dhs,
                                     T *restrict dh, const T *restrict product, T *restrict da, Size n, Size steps,
                                     Size d, Size t) {
    FOR_STEP(at) {
        T *dz = da + at * 3 * d;
        NAME(gru_row_grad)(gates + at * 3 * d, h_prev + at * d, dhs + at * d, dh + r * d, product + r * d, dz,
                           dz + 2 * d, d);
    }
}

FAST static void NAME(gru_gates_grad)(const T *restrict gates, const T *restrict h_prev, const T *restrict dreset,
                                      T *restrict dh, T *restrict da, Size n, Size steps, Size d, Size t) {
    FOR_STEP(at) {
        const T *reset_gate = gates + (at * 3 + 1) * d, *h = h_prev + at * d, *dr = dreset + r * d;
        T *out = da + (at * 3 + 1) * d;
        for (Size k = 0; k < d; k++) {
            out[k] = dr[k] * h[k] * reset_gate[k] * (1 - reset_gate[k]);
            dh[r * d + k] += dr[k] * reset_gate[k];
        }
    }
}

/* ---- optimizers: `a` holds the parameter, its gradient and its state, `s` the settings, last decay_factor ---- */

#define OPTIMIZER(name, ...)                                                                                           \
    FAST static void NAME(name)(char *const *a, Size n, const double *s) {                                             \
        T *restrict p = (T *)a[0], *restrict h = (T *)a[2], *restrict v = (T *)a[3];                                   \
        const T *restrict g = (const T *)a[1];                                                                         \
        __VA_ARGS__(void) h, (void)v;                                                                                  \
    }

OPTIMIZER(sgd, {
    const T lr = (T)s[0], decay = (T)s[1];
    for (Size i = 0; i < n; i++) p[i] = decay * p[i] - lr * g[i];
})
OPTIMIZER(momentum, {
    const T lr = (T)s[0], momentum = (T)s[1], decay = (T)s[2];
    for (Size i = 0; i < n; i++) {
        h[i] = momentum * h[i] - lr * g[i];
        p[i] = decay * p[i] + h[i];
    }
})
OPTIMIZER(nesterov, {
    const T lr = (T)s[0], momentum = (T)s[1], decay = (T)s[2];
    for (Size i = 0; i < n; i++) {
        const T step = lr * g[i];
        h[i] = momentum * h[i] - step;
        p[i] = decay * p[i] + (momentum * h[i] - step);
    }
})
OPTIMIZER(adagrad, {
    const T lr = (T)s[0], eps = (T)s[1], decay = (T)s[2];
    for (Size i = 0; i < n; i++) {
        h[i] += g[i] * g[i];
        p[i] = decay * p[i] - lr * g[i] / (SQRT(h[i]) + eps);
    }
})
OPTIMIZER(rmsprop, {
    const T lr = (T)s[0], keep = (T)s[1], learn = (T)(1 - s[1]), eps = (T)s[2], decay = (T)s[3];
    for (Size i = 0; i < n; i++) {
        h[i] = keep * h[i] + learn * (g[i] * g[i]);
        p[i] = decay * p[i] - lr * g[i] / (SQRT(h[i]) + eps);
    }
})
OPTIMIZER(adam, {
    const T lr = (T)s[0], keep1 = (T)s[1], learn1 = (T)(1 - s[1]), keep2 = (T)s[2], learn2 = (T)(1 - s[2]);
    const T eps = (T)s[3], decay = (T)s[4];
    for (Size i = 0; i < n; i++) {
        h[i] = keep1 * h[i] + learn1 * g[i];
        v[i] = keep2 * v[i] + learn2 * (g[i] * g[i]);
        p[i] = decay * p[i] - lr * h[i] / (SQRT(v[i]) + eps);
    }
})

/* Return the sum of (g * scale)^2. */
FAST static double NAME(square_sum)(const T *restrict g, Size n, double scale) {
    double lanes[LANES] = {0}, sum = 0;
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += (g[i + k] * scale) * (g[i + k] * scale);
    for (; i < n; i++) sum += (g[i] * scale) * (g[i] * scale);
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

FAST static void NAME(scale)(T *g, Size n, double factor) {
    for (Size i = 0; i < n; i++) g[i] = (T)(g[i] * factor);
}

/* Return whether x - x is 0 everywhere; it is NaN for infinity and NaN. */
FAST static int NAME(all_finite)(const T *restrict x, Size n) {
    int bad = 0;
    for (Size i = 0; i < n; i++) bad |= x[i] - x[i] != 0;
    return !bad;
}

#undef FABS
#undef SQRT
#undef LOG
#undef LANES
#undef T
#undef NAME
#undef IS_FLOAT
