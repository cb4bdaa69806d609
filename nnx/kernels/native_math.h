/* Elementary functions of the native kernels, for T = float or double.

   native_kernels.h includes this file once per type, with T, IS_FLOAT (1 or 0) and NAME(f), which appends
   the type's suffix. The functions use selects instead of branches, so that the compiler vectorizes the
   loops that call them. Without fused multiply-add (-ffp-contract=off) results are bitwise identical on all
   instruction sets. NaN propagates. "Error" is the largest measured, float / double, in units in the last place. */

#define INLINE static inline __attribute__((always_inline))
#define C(literal) ((T)(literal))

#if IS_FLOAT
#define BITS uint32_t
#define FABS __builtin_fabsf
#define SQRT __builtin_sqrtf
#define LOG logf
#define COPYSIGN __builtin_copysignf
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define ROUND_SHIFT C(12582912.0) /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
#define LN2_HIGH C(0.693359375)   /* short mantissa, so that n * LN2_HIGH is exact */
#define LN2_LOW C(-2.12194440054690583e-4)
#define EXP_ZERO C(-88.03)   /* -EXPONENT_BIAS * ln2, where exp_bounded returns 0 */
#define GELU_LIMIT C(10.031) /* sqrt(8 / pi) * (x + 0.044715 x^3) is -EXP_ZERO */
#else
#define BITS uint64_t
#define FABS __builtin_fabs
#define SQRT __builtin_sqrt
#define LOG log
#define COPYSIGN __builtin_copysign
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define ROUND_SHIFT C(6755399441055744.0) /* 1.5 * 2^52 */
#define LN2_HIGH C(6.93147180369123816490e-01)
#define LN2_LOW C(1.90821492927058770002e-10)
#define EXP_ZERO C(-709.09) /* -1023 ln2 */
#define GELU_LIMIT C(21.1527)
#endif

INLINE BITS NAME(to_bits)(T x) {
    union {
        T value;
        BITS bits;
    } u = {x};
    return u.bits;
}

/* 2^n, from the low bits of `n`; 0 for n = -EXPONENT_BIAS. */
INLINE T NAME(power_of_two)(BITS n) {
    union {
        BITS bits;
        T value;
    } u = {(n + EXPONENT_BIAS) << MANTISSA_BITS};
    return u.value;
}

/* exp(x) = 2^n * m: returns m in [0.7, 1.42] and stores n in the low bits of `n`.
   Cody and Waite's argument reduction, then a minimax polynomial (Remez) on [-ln2/2, ln2/2]. */
INLINE T NAME(exp_parts)(T x, BITS *n) {
    T shifted = x * C(1.44269504088896341) + ROUND_SHIFT, k = shifted - ROUND_SHIFT;
    T r = (x - k * LN2_HIGH) - k * LN2_LOW;
#if IS_FLOAT
    T p = (((C(0.0013814462623) * r + C(0.0083687804546)) * r + C(0.041668394293)) * r + C(0.16666520107)) * r +
          C(0.49999993412);
#else
    T p = ((((((((C(2.49999705548344989e-8) * r + C(2.76303786118725452e-7)) * r + C(2.75575873212122346e-6)) * r +
                C(2.48014927626099010e-5)) *
                   r +
               C(1.98412695047945233e-4)) *
                  r +
              C(1.38888889439224562e-3)) *
                 r +
             C(8.33333333349560764e-3)) *
                r +
            C(4.16666666665291894e-2)) *
               r +
           C(0.166666666666664103)) *
              r +
          C(0.500000000000001072);
#endif
    *n = NAME(to_bits)(shifted);
    return (p * (r * r) + r) + C(1.0);
}

/* exp(x) for EXP_ZERO <= x <= 0; the scale factor is 0 for n = -EXPONENT_BIAS, so that exp(EXP_ZERO) is 0. */
INLINE T NAME(exp_bounded)(T x) {
    BITS n;
    T m = NAME(exp_parts)(x, &n);
    return m * NAME(power_of_two)(n);
}

/* exp(x) for x <= 0; results below 2^-126.5 / 2^-1022.5 are 0. Error 0.98 / 0.99. */
INLINE T NAME(exp_nonpositive)(T x) { return NAME(exp_bounded)(x < EXP_ZERO ? EXP_ZERO : x); }

/* 1 / (1 + exp(-x)), for x < 0 as exp(x) / (1 + exp(x)), so that exp cannot overflow. Error 2.4 / 2.4. */
INLINE T NAME(scalar_sigmoid)(T x) {
    T e = NAME(exp_nonpositive)(-FABS(x));
    return (x < C(0.0) ? e : C(1.0)) / (C(1.0) + e);
}

/* tanh(x): |x| < 0.625 by x + x^3 P(x^2) / Q(x^2) (float: Pade approximant, double: Cephes), otherwise by
   1 - 2 exp(-2|x|) / (1 + exp(-2|x|)). Both cases use the same division. Error 1.5 / 1.5. */
INLINE T NAME(scalar_tanh)(T x) {
    T a = FABS(x), z = x * x, e = NAME(exp_nonpositive)(C(-2.0) * a);
#if IS_FLOAT
    T p = C(-14.0 / 15.0) * z - C(21.0);
    T q = (z + C(28.0)) * z + C(63.0);
#else
    T p = (C(-9.64399179425052238628e-1) * z - C(9.92877231001918586564e1)) * z - C(1.61468768441708447952e3);
    T q = ((z + C(1.12811678491632931402e2)) * z + C(2.23548839060100448583e3)) * z + C(4.84406305325125486048e3);
#endif
    int small = a < C(0.625);
    T numerator = small ? a * z * p : C(-2.0) * e, denominator = small ? q : C(1.0) + e;
    return COPYSIGN((small ? a : C(1.0)) + numerator / denominator, x);
}

/* log(1 + u) for 0 <= u <= 1, by the method of fdlibm: 1 + u = 2^k (1 + f), s = f / (2 + f),
   log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + R(s^2))), R minimax (Remez) on -1/4 <= f <= 1/2. Error 0.93 / 0.94. */
INLINE T NAME(log1p01)(T u) {
    T k = u > C(0.5) ? C(1.0) : C(0.0), f = (u - k) * (C(1.0) - C(0.5) * k);
    T s = f / (C(2.0) + f), z = s * s, h = C(0.5) * (f * f);
#if IS_FLOAT
    T r = (C(0.30360561365) * z + C(0.3995782584)) * z + C(0.66666947346);
#else
    T r = ((((((C(0.0959325974290810804) * z + C(0.138484399522663787)) * z + C(0.153475478578339483)) * z +
              C(0.181831314512330903)) *
                 z +
             C(0.222221969667676447)) *
                z +
            C(0.285714288322369615)) *
               z +
           C(0.399999999986981619)) *
              z +
          C(0.666666666666689685);
#endif
    return k * LN2_HIGH - ((h - (s * (h + r * z) + k * LN2_LOW)) - f);
}

/* The tanh form of GELU is x * sigmoid(v), v = sqrt(8 / pi) * (x + 0.044715 x^3): returns exp(-|v|) and stores
   min(|x|, GELU_LIMIT) in `a`. */
INLINE T NAME(gelu_parts)(T x, T *a) {
    T limited = FABS(x) > GELU_LIMIT ? GELU_LIMIT : FABS(x);
    *a = limited;
    return NAME(exp_bounded)(limited * (C(-0.0713548162726002488) * limited * limited - C(1.59576912160573071)));
}

/* GELU: x * sigmoid(v). Error 1.5 / 1.6 ulp of max(1, |x|). */
INLINE T NAME(scalar_gelu)(T x) {
    T a, e = NAME(gelu_parts)(x, &a);
    return (x < C(0.0) ? -a * e : x) / (C(1.0) + e);
}

/* Derivative of GELU: sigmoid(v) + x * sigmoid(v) * sigmoid(-v) * dv/dx. Error 1.8 / 1.9 ulp of max(1, |x|). */
INLINE T NAME(gelu_derivative)(T x) {
    T a, e = NAME(gelu_parts)(x, &a), large = C(1.0) / (C(1.0) + e), small = e * large;
    T slope = C(1.59576912160573071) + C(0.214064448817800746) * a * a;
    return (x < C(0.0) ? small : large) + COPYSIGN(a * slope * (small * large), x);
}

#undef BITS
#undef COPYSIGN
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
#undef ROUND_SHIFT
#undef LN2_HIGH
#undef LN2_LOW
#undef EXP_ZERO
#undef GELU_LIMIT
