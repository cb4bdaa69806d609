/* The kernels in C: the Python functions, with the names, arguments and results of those in portable.py.

   Each handles float32 or float64 arrays that are C-contiguous, aligned and in native byte order, and passes all
   other arguments to the function of the same name in portable.py. The loops are in native_kernels.h. They run in one
   thread and release the GIL for large arrays. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <numpy/arrayobject.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#endif

/* Compile a function for several instruction sets; the loader selects one. Not with sanitizers, which are not yet
   initialized at that time. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(SANITIZED) && (!defined(__clang__) || __clang_major__ >= 14)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#define INSTRUCTIONS (__builtin_cpu_supports("avx512f") ? "AVX-512" : __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2")
#else
#define FAST
#define INSTRUCTIONS "baseline"
#endif

typedef npy_intp Size;

/* ---- labels and indices: integers of 1, 2, 4 or 8 bytes ---- */

typedef struct {
    const void *data;
    int itemsize;
} Labels;

static inline int64_t label_at(Labels t, Size i) {
    switch (t.itemsize) {
    case 1: return ((const int8_t *)t.data)[i];
    case 2: return ((const int16_t *)t.data)[i];
    case 4: return ((const int32_t *)t.data)[i];
    default: return ((const int64_t *)t.data)[i];
    }
}

/* Return whether all n labels are in [0, stop). */
FAST static int labels_in_range(Labels t, Size n, int64_t stop) {
    int outside = 0;
#define LOOK_AT(type)                                                                                                  \
    for (Size i = 0; i < n; i++) {                                                                                     \
        const int64_t label = ((const type *)t.data)[i];                                                               \
        outside |= (label < 0) | (label >= stop);                                                                      \
    }
    switch (t.itemsize) {
    case 1: LOOK_AT(int8_t) break;
    case 2: LOOK_AT(int16_t) break;
    case 4: LOOK_AT(int32_t) break;
    default: LOOK_AT(int64_t)
    }
#undef LOOK_AT
    return !outside;
}

/* The hash of portable.dropout, of the index and two keys. */
static inline __attribute__((always_inline)) uint32_t mix(uint32_t bits) {
    bits = (bits ^ bits >> 16) * 0x7FEB352Du;
    bits = (bits ^ bits >> 15) * 0x846CA68Bu;
    return bits ^ bits >> 16;
}

static inline __attribute__((always_inline)) uint32_t hash(uint32_t index, uint32_t key, uint32_t other_key) {
    return mix(mix(index ^ key) ^ other_key);
}

#define T float
#define NAME(f) f##_f32
#define IS_FLOAT 1
#include "native_kernels.h"
#define T double
#define NAME(f) f##_f64
#define IS_FLOAT 0
#include "native_kernels.h"

/* ---- arrays ---- */

#define ARRAY(object) ((PyArrayObject *)(object))
#define DATA(object) ((void *)PyArray_DATA(ARRAY(object)))
#define SIZE(object) PyArray_SIZE(ARRAY(object))
#define NDIM(object) PyArray_NDIM(ARRAY(object))
#define DIM(object, axis) PyArray_DIM(ARRAY(object), axis)
#define WITHOUT_GIL (1 << 15) /* loops over at least this many elements release the GIL */

/* Return NPY_FLOAT or NPY_DOUBLE for an array that the loops support, otherwise 0. */
static inline int real_type(PyObject *x) {
    if (!PyArray_CheckExact(x) || !PyArray_ISCARRAY_RO(ARRAY(x)) || NDIM(x) == 0) return 0;
    const int type = PyArray_TYPE(ARRAY(x));
    return type == NPY_FLOAT || type == NPY_DOUBLE ? type : 0;
}

static inline int is_like(PyObject *x, int type, Size size) { return real_type(x) == type && SIZE(x) == size; }
static inline int is_writable(PyObject *x) { return PyArray_ISWRITEABLE(ARRAY(x)); }
static inline int same_shape(PyObject *a, PyObject *b) {
    return NDIM(a) == NDIM(b) && PyArray_CompareLists(PyArray_DIMS(ARRAY(a)), PyArray_DIMS(ARRAY(b)), NDIM(a));
}

/* Return whether t holds signed integers that label_at can read. */
static inline int is_labels(PyObject *t) {
    return PyArray_CheckExact(t) && PyArray_ISCARRAY_RO(ARRAY(t)) && PyTypeNum_ISSIGNED(PyArray_TYPE(ARRAY(t)));
}

static inline Labels as_labels(PyObject *t) { return (Labels){DATA(t), (int)PyArray_ITEMSIZE(ARRAY(t))}; }

static PyObject *new_array(int ndim, const Size *shape, int type);
#define NEW_LIKE(x, type) new_array(NDIM(x), PyArray_DIMS(ARRAY(x)), type)

static PyObject *scalar(double value, int type) {
    float single = (float)value;
    PyArray_Descr *descr = PyArray_DescrFromType(type);
    PyObject *result = PyArray_Scalar(type == NPY_FLOAT ? (void *)&single : (void *)&value, descr, NULL);
    Py_DECREF(descr);
    return result;
}

/* ---- definitions shared by all kernels ---- */

#define KERNEL(name) static PyObject *py_##name(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)

/* Call portable's function NAME in place of the kernel py_NAME, and return its result. */
static PyObject *call_portable(const char *py_name, PyObject *const *args, Py_ssize_t nargs) {
    PyObject *result = NULL, *portable = PyImport_ImportModule("nnx.kernels.portable");
    PyObject *function = portable ? PyObject_GetAttrString(portable, py_name + strlen("py_")) : NULL;
    if (function) result = PyObject_Vectorcall(function, args, nargs, NULL);
    Py_XDECREF(function);
    Py_XDECREF(portable);
    return result;
}

#define PORTABLE_UNLESS(...)                                                                                           \
    if (!(__VA_ARGS__)) return call_portable(__func__, args, nargs)

/* Call the loop `name` for the type, without the GIL for large arrays. */
#define RUN(type, size, name, ...)                                                                                     \
    do {                                                                                                               \
        PyThreadState *released = (size) >= WITHOUT_GIL ? PyEval_SaveThread() : NULL;                                  \
        if ((type) == NPY_FLOAT)                                                                                       \
            name##_f32(__VA_ARGS__);                                                                                   \
        else                                                                                                           \
            name##_f64(__VA_ARGS__);                                                                                   \
        if (released) PyEval_RestoreThread(released);                                                                  \
    } while (0)

/* ---- memory: freed blocks are cached for later arrays, which saves the system from clearing their pages again ---- */

#define LARGE (1 << 16) /* minimum size in bytes of an array that uses the cache */
#define MOST (1 << 28)  /* maximum size of the cache in bytes */
#define SLOTS 48
#define HEADER 64 /* bytes before an array: holds the block size, and keeps the array aligned */
#define HUGE_PAGE (1 << 21)
#define HUGE_SIZE (1 << 22) /* minimum size of arrays in huge pages, as in NumPy: they save misses of the TLB */
#define OLD 1024            /* number of allocations after which an unused block is freed */

typedef struct {
    char *block;
    size_t size;
    unsigned long freed_at;
} Slot;

static struct {
    Slot slots[SLOTS]; /* oldest first */
    int count;
    size_t size;
    unsigned long clock;
#ifdef Py_GIL_DISABLED
    PyMutex mutex;
#endif
} cache;

#ifdef Py_GIL_DISABLED
#define LOCK PyMutex_Lock(&cache.mutex)
#define UNLOCK PyMutex_Unlock(&cache.mutex)
#else /* the GIL protects the cache: it is held when arrays are created and freed */
#define LOCK
#define UNLOCK
#endif

static char *take(int slot) {
    char *block = cache.slots[slot].block;
    cache.size -= cache.slots[slot].size;
    memmove(cache.slots + slot, cache.slots + slot + 1, (--cache.count - slot) * sizeof(Slot));
    return block;
}

static void *cache_malloc(void *Py_UNUSED(context), size_t size) {
    char *block = NULL;
    size_t block_size = size;
    LOCK;
    if (cache.count && ++cache.clock - cache.slots[0].freed_at > OLD) free(take(0));
    for (int i = cache.count - 1; i >= 0 && !block; i--) {
        const size_t found = cache.slots[i].size;
        if (size <= found && found - size <= size / 8) block_size = found, block = take(i);
    }
    UNLOCK;
    if (!block) {
        void *memory; /* aligned_alloc would need a multiple of the alignment */
        if (posix_memalign(&memory, size < HUGE_SIZE ? HEADER : HUGE_PAGE, HEADER + size)) return NULL;
        block = memory;
#ifdef MADV_HUGEPAGE
        if (size >= HUGE_SIZE) madvise(block, HEADER + size, MADV_HUGEPAGE);
#endif
    }
    memcpy(block, &block_size, sizeof block_size);
    return block + HEADER;
}

static void cache_free(void *Py_UNUSED(context), void *pointer, size_t Py_UNUSED(size)) {
    if (!pointer) return;
    char *block = (char *)pointer - HEADER;
    size_t size;
    memcpy(&size, block, sizeof size);
    LOCK;
    if (size <= MOST) {
        while (cache.count && (cache.count == SLOTS || cache.size + size > MOST)) free(take(0));
        cache.slots[cache.count++] = (Slot){block, size, cache.clock};
        cache.size += size;
        block = NULL;
    }
    UNLOCK;
    free(block);
}

static void *cache_calloc(void *context, size_t count, size_t size) {
    void *pointer = cache_malloc(context, count * size);
    return pointer ? memset(pointer, 0, count * size) : NULL;
}

static void *cache_realloc(void *context, void *pointer, size_t size) {
    size_t old = 0;
    if (pointer) memcpy(&old, (char *)pointer - HEADER, sizeof old);
    void *moved = cache_malloc(context, size);
    if (moved && pointer) {
        memcpy(moved, pointer, old < size ? old : size);
        cache_free(context, pointer, old);
    }
    return moved;
}

static PyDataMem_Handler handler = {"nnx", 1, {NULL, cache_malloc, cache_calloc, cache_realloc, cache_free}};
static PyObject *handler_capsule;
static PyObject *matmul; /* numpy.matmul */

static PyObject *new_array(int ndim, const Size *shape, int type) {
    PyArray_Descr *descr = PyArray_DescrFromType(type);
    double size = (double)PyDataType_ELSIZE(descr);
    for (int i = 0; i < ndim; i++) size *= (double)shape[i];
    PyObject *before = NULL, *array = NULL;
    if (size < LARGE || (before = PyDataMem_SetHandler(handler_capsule)))
        array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, NULL, NULL, 0, NULL); /* steals descr */
    else
        Py_DECREF(descr);
    if (before) {
        PyObject *type_, *value, *traceback, *ours;
        PyErr_Fetch(&type_, &value, &traceback);
        if (!(ours = PyDataMem_SetHandler(before))) Py_CLEAR(array);
        Py_XDECREF(ours);
        Py_DECREF(before);
        if (type_) PyErr_Restore(type_, value, traceback);
    }
    return array;
}

KERNEL(in_range) {
    const Py_ssize_t stop = nargs == 2 && PyLong_CheckExact(args[1]) ? PyLong_AsSsize_t(args[1]) : -1;
    if (stop < 0) PyErr_Clear();
    PORTABLE_UNLESS(stop >= 0 && is_labels(args[0]));
    return PyBool_FromLong(labels_in_range(as_labels(args[0]), SIZE(args[0]), stop));
}

/* ---- linear ---- */

/* Return whether x is a matrix of the type, in any layout and in native byte order, as NumPy's product needs. */
static inline int is_matrix(PyObject *x, int type) {
    return PyArray_CheckExact(x) && NDIM(x) == 2 && PyArray_TYPE(ARRAY(x)) == type && PyArray_ISNOTSWAPPED(ARRAY(x));
}

/* Write a @ b into out and return it. dot copies b if it is only some columns of a matrix; matmul does not. */
static PyObject *multiply(PyObject *a, PyObject *b, PyObject *out) {
    if (PyArray_ISONESEGMENT(ARRAY(b)) && PyArray_IS_C_CONTIGUOUS(ARRAY(out)))
        return PyArray_MatrixProduct2(a, b, ARRAY(out));
    return PyObject_Vectorcall(matmul, (PyObject *[]){a, b, out}, 3, NULL);
}

/* Return a @ b, or a @ b.T if `transposed`, in a new array. */
static PyObject *product(PyObject *a, PyObject *b, int transposed) {
    const Size shape[] = {DIM(a, 0), DIM(b, !transposed)};
    PyObject *out = new_array(2, shape, PyArray_TYPE(ARRAY(a)));
    PyObject *right = transposed ? PyArray_Transpose(ARRAY(b), NULL) : Py_NewRef(b);
    PyObject *result = out && right ? multiply(a, right, out) : NULL;
    Py_XDECREF(right);
    Py_XDECREF(out);
    return result;
}

/* After numpy.seterr(under="raise") NumPy's product raises on underflow, which portable ignores: call it instead. */
#define PORTABLE_IF_FLAGGED(result)                                                                                    \
    if (!(result) && (PyErr_ExceptionMatches(PyExc_FloatingPointError) || PyErr_ExceptionMatches(PyExc_Warning))) {    \
        PyErr_Clear();                                                                                                 \
        return call_portable(__func__, args, nargs);                                                                   \
    }

KERNEL(affine) {
    const int type = nargs == 3 && PyArray_CheckExact(args[0]) ? PyArray_TYPE(ARRAY(args[0])) : 0;
    PORTABLE_UNLESS((type == NPY_FLOAT || type == NPY_DOUBLE) && is_matrix(args[0], type) && is_matrix(args[1], type) &&
                    (args[2] == Py_None || (is_like(args[2], type, DIM(args[1], 1)) && NDIM(args[2]) == 1)));
    PyObject *y = product(args[0], args[1], 0);
    PORTABLE_IF_FLAGGED(y);
    if (y && args[2] != Py_None) RUN(type, SIZE(y), add_bias, DATA(y), DATA(args[2]), DIM(y, 0), DIM(y, 1));
    return y;
}

KERNEL(bias_grad) {
    const int type = nargs == 2 ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && NDIM(args[0]) == 2 && is_like(args[1], type, DIM(args[0], 1)) && NDIM(args[1]) == 1 &&
                    is_writable(args[1]));
    RUN(type, SIZE(args[0]), bias_grad, DATA(args[0]), DATA(args[1]), DIM(args[0], 0), DIM(args[0], 1));
    Py_RETURN_NONE;
}

KERNEL(affine_grad) {
    const int type = nargs == 4 && PyArray_CheckExact(args[0]) ? PyArray_TYPE(ARRAY(args[0])) : 0;
    PORTABLE_UNLESS((type == NPY_FLOAT || type == NPY_DOUBLE) && is_matrix(args[0], type) && is_matrix(args[1], type) &&
                    is_matrix(args[2], type) &&
                    (args[3] == Py_None || (real_type(args[1]) && is_like(args[3], type, DIM(args[1], 1)) &&
                                            NDIM(args[3]) == 1 && is_writable(args[3]))));
    PyObject *x_T = PyArray_Transpose(ARRAY(args[0]), NULL);
    PyObject *dW = x_T ? multiply(x_T, args[1], args[2]) : NULL;
    Py_XDECREF(x_T);
    PORTABLE_IF_FLAGGED(dW);
    if (!dW) return NULL;
    Py_DECREF(dW);
    if (args[3] != Py_None)
        RUN(type, SIZE(args[1]), bias_grad, DATA(args[1]), DATA(args[3]), DIM(args[1], 0), DIM(args[1], 1));
    Py_RETURN_NONE;
}

KERNEL(input_grad) {
    const int type = nargs == 2 && PyArray_CheckExact(args[0]) ? PyArray_TYPE(ARRAY(args[0])) : 0;
    PORTABLE_UNLESS((type == NPY_FLOAT || type == NPY_DOUBLE) && is_matrix(args[0], type) && is_matrix(args[1], type));
    PyObject *dx = product(args[0], args[1], 1);
    PORTABLE_IF_FLAGGED(dx);
    return dx;
}

/* ---- activations ---- */

#define ELEMENTWISE_KERNEL(name)                                                                                       \
    KERNEL(name) {                                                                                                     \
        const int type = nargs == 1 ? real_type(args[0]) : 0;                                                          \
        PORTABLE_UNLESS(type);                                                                                         \
        PyObject *y = NEW_LIKE(args[0], type);                                                                         \
        if (y) RUN(type, SIZE(y), name, DATA(args[0]), DATA(y), SIZE(y));                                              \
        return y;                                                                                                      \
    }

/* name(dout, y) */
#define ELEMENTWISE_GRAD_KERNEL(name)                                                                                  \
    KERNEL(name) {                                                                                                     \
        const int type = nargs == 2 ? real_type(args[0]) : 0;                                                          \
        PORTABLE_UNLESS(type && real_type(args[1]) == type && same_shape(args[0], args[1]));                           \
        PyObject *dx = NEW_LIKE(args[1], type);                                                                        \
        if (dx) RUN(type, SIZE(dx), name, DATA(args[0]), DATA(args[1]), DATA(dx), SIZE(dx));                           \
        return dx;                                                                                                     \
    }

ELEMENTWISE_KERNEL(sigmoid)
ELEMENTWISE_GRAD_KERNEL(sigmoid_grad)
ELEMENTWISE_KERNEL(relu)
ELEMENTWISE_GRAD_KERNEL(relu_grad)
ELEMENTWISE_KERNEL(tanh)
ELEMENTWISE_GRAD_KERNEL(tanh_grad)
ELEMENTWISE_KERNEL(gelu)
ELEMENTWISE_GRAD_KERNEL(gelu_grad)

#define LAST(x) DIM(x, NDIM(x) - 1)
#define SIZED(x) (PyArray_CheckExact(x) && NDIM(x) && SIZE(x))

KERNEL(softmax) {
    const int type = nargs == 1 ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && SIZE(args[0]));
    PyObject *y = NEW_LIKE(args[0], type);
    if (y) RUN(type, SIZE(y), softmax, DATA(args[0]), DATA(y), SIZE(y) / LAST(y), LAST(y));
    return y;
}

KERNEL(softmax_grad) {
    const int type = nargs == 2 ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && real_type(args[1]) == type && same_shape(args[0], args[1]) && SIZE(args[0]));
    PyObject *dx = NEW_LIKE(args[1], type);
    if (dx) RUN(type, SIZE(dx), softmax_grad, DATA(args[0]), DATA(args[1]), DATA(dx), SIZE(dx) / LAST(dx), LAST(dx));
    return dx;
}

/* ---- losses ---- */

/* The weights of a loss of `terms` elements; `ready` is whether the loops support them. */
typedef struct {
    Size groups;
    void *data;
    int ready;
} Weight;

static Weight as_weight(PyObject *weight, int type, Size terms) {
    if (weight == Py_None) return (Weight){1, NULL, terms > 0};
    const int ready =
        real_type(weight) == type && NDIM(weight) == 1 && SIZE(weight) && terms && terms % SIZE(weight) == 0;
    return (Weight){ready ? SIZE(weight) : 1, ready ? DATA(weight) : NULL, ready};
}

/* Return whether `object` is a number that converts to double as in Python, and store it in `value`. */
static int read_number(PyObject *object, double *value) {
    if (PyFloat_Check(object))
        *value = PyFloat_AS_DOUBLE(object); /* numpy.float64 too */
    else if (PyLong_CheckExact(object))
        *value = PyLong_AsDouble(object);
    else
        return 0;
    if (*value == -1 && PyErr_Occurred()) return PyErr_Clear(), 0;
    return 1;
}

/* Call the loop `name` as RUN does, and store its return value in `result`. */
#define RUN_RETURNING(result, type, size, name, ...)                                                                   \
    do {                                                                                                               \
        PyThreadState *released = (size) >= WITHOUT_GIL ? PyEval_SaveThread() : NULL;                                  \
        result = (type) == NPY_FLOAT ? name##_f32(__VA_ARGS__) : name##_f64(__VA_ARGS__);                              \
        if (released) PyEval_RestoreThread(released);                                                                  \
    } while (0)

/* Return the tuple (loss as a scalar of the type, y). */
static PyObject *loss_and(double loss, int type, PyObject *y) {
    PyObject *value = scalar(loss, type), *result = value ? PyTuple_Pack(2, value, y) : NULL;
    Py_XDECREF(value);
    Py_DECREF(y);
    return result;
}

/* A loss for labels, with `classes` scores per label, and its gradient; `fitting` is whether x and t match in shape. */
#define CLASS_LOSS_KERNELS(name, classes, fitting)                                                                     \
    KERNEL(name) {                                                                                                     \
        PORTABLE_UNLESS(nargs == 3);                                                                                   \
        PyObject *x = args[0], *t = args[1], *y;                                                                       \
        const int type = SIZED(x) && is_labels(t) && (fitting) ? real_type(x) : 0;                                     \
        const Weight w = type ? as_weight(args[2], type, SIZE(t)) : (Weight){0};                                       \
        PORTABLE_UNLESS(w.ready);                                                                                      \
        double loss;                                                                                                   \
        if (!(y = NEW_LIKE(x, type))) return NULL;                                                                     \
        RUN_RETURNING(loss, type, SIZE(x), name, DATA(x), as_labels(t), DATA(y), SIZE(t), classes, w.groups, w.data);  \
        return loss_and(loss, type, y);                                                                                \
    }                                                                                                                  \
    KERNEL(name##_grad) {                                                                                              \
        PORTABLE_UNLESS(nargs == 4);                                                                                   \
        PyObject *x = args[0], *t = args[1], *dx;                                                                      \
        double dout;                                                                                                   \
        const int type = SIZED(x) && is_labels(t) && (fitting) ? real_type(x) : 0;                                     \
        const Weight w = type ? as_weight(args[3], type, SIZE(t)) : (Weight){0};                                       \
        PORTABLE_UNLESS(w.ready && read_number(args[2], &dout));                                                       \
        if ((dx = NEW_LIKE(x, type)))                                                                                  \
            RUN(type, SIZE(x), name##_grad, DATA(x), as_labels(t), dout, DATA(dx), SIZE(t), classes, w.groups,         \
                w.data);                                                                                               \
        return dx;                                                                                                     \
    }

CLASS_LOSS_KERNELS(softmax_loss, LAST(x),
                   NDIM(t) == NDIM(x) - 1 &&
                       PyArray_CompareLists(PyArray_DIMS(ARRAY(x)), PyArray_DIMS(ARRAY(t)), NDIM(t)))
CLASS_LOSS_KERNELS(sigmoid_loss, 1, same_shape(x, t))

KERNEL(squared_error) {
    const int type = nargs == 3 ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && real_type(args[1]) == type && same_shape(args[0], args[1]));
    const Weight w = as_weight(args[2], type, SIZE(args[0]));
    PORTABLE_UNLESS(w.ready);
    double loss;
    RUN_RETURNING(loss, type, SIZE(args[0]), squared_error, DATA(args[0]), DATA(args[1]), SIZE(args[0]), w.groups,
                  w.data);
    return scalar(loss, type);
}

KERNEL(squared_error_grad) {
    double dout;
    const int type = nargs == 4 && read_number(args[2], &dout) ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && real_type(args[1]) == type && same_shape(args[0], args[1]));
    const Weight w = as_weight(args[3], type, SIZE(args[0]));
    PORTABLE_UNLESS(w.ready);
    PyObject *x = args[0], *dx = NEW_LIKE(x, type);
    if (dx) RUN(type, SIZE(x), squared_error_grad, DATA(x), DATA(args[1]), dout, DATA(dx), SIZE(x), w.groups, w.data);
    return dx;
}

/* ---- dropout, normalization, embedding ---- */

/* The keys are those of portable.dropout_keys. */
KERNEL(dropout) {
    const int type = nargs == 4 ? real_type(args[0]) : 0;
    double ratio;
    PORTABLE_UNLESS(type && read_number(args[1], &ratio) && 0 <= ratio && ratio < 1 && PyLong_CheckExact(args[2]) &&
                    PyLong_CheckExact(args[3]));
    uint64_t z = PyLong_AsUnsignedLongLongMask(args[2]) + 0x9E3779B97F4A7C15u * PyLong_AsUnsignedLongLongMask(args[3]);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const uint32_t keys[] = {(uint32_t)z, (uint32_t)(z >> 32), (uint32_t)(ratio * 4294967296.0)};
    PyObject *x = args[0], *y = NEW_LIKE(x, type);
    if (y) RUN(type, SIZE(x), dropout, DATA(x), DATA(y), SIZE(x), keys);
    return y;
}

/* Return whether the arrays args[first], ..., args[last] are vectors of length n and of the type. */
static int are_vectors(PyObject *const *args, int first, int last, int type, Size n) {
    for (int i = first; i <= last; i++)
        if (!is_like(args[i], type, n) || NDIM(args[i]) != 1) return 0;
    return 1;
}

/* Return the tuple (y, mean, rstd), or NULL if one of them is NULL. */
static PyObject *normalized(PyObject *y, PyObject *mean, PyObject *rstd) {
    PyObject *result = y && mean && rstd ? PyTuple_Pack(3, y, mean, rstd) : NULL;
    Py_XDECREF(y);
    Py_XDECREF(mean);
    Py_XDECREF(rstd);
    return result;
}

KERNEL(batch_norm) {
    double momentum, eps;
    const int type =
        nargs == 7 && read_number(args[5], &momentum) && read_number(args[6], &eps) ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && NDIM(args[0]) == 2 && SIZE(args[0]) && are_vectors(args, 1, 4, type, DIM(args[0], 1)) &&
                    is_writable(args[3]) && is_writable(args[4]));
    PyObject *x = args[0], *y = NEW_LIKE(x, type), *mean = NEW_LIKE(args[1], type), *rstd = NEW_LIKE(args[1], type);
    void *scale = PyMem_Malloc(DIM(x, 1) * PyArray_ITEMSIZE(ARRAY(x)));
    if (!scale) PyErr_NoMemory();
    if (scale && y && mean && rstd)
        RUN(type, SIZE(x), batch_norm, DATA(x), DATA(args[1]), DATA(args[2]), DATA(args[3]), DATA(args[4]), momentum,
            eps, DATA(y), DATA(mean), DATA(rstd), scale, DIM(x, 0), DIM(x, 1));
    else
        Py_CLEAR(y);
    PyMem_Free(scale);
    return normalized(y, mean, rstd);
}

KERNEL(layer_norm) {
    double eps;
    const int type = nargs == 4 && read_number(args[3], &eps) ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && NDIM(args[0]) == 2 && SIZE(args[0]) && are_vectors(args, 1, 2, type, DIM(args[0], 1)));
    PyObject *x = args[0], *y = NEW_LIKE(x, type);
    PyObject *mean = new_array(1, PyArray_DIMS(ARRAY(x)), type), *rstd = new_array(1, PyArray_DIMS(ARRAY(x)), type);
    if (y && mean && rstd)
        RUN(type, SIZE(x), layer_norm, DATA(x), DATA(args[1]), DATA(args[2]), eps, DATA(y), DATA(mean), DATA(rstd),
            DIM(x, 0), DIM(x, 1));
    return normalized(y, mean, rstd);
}

/* name(dout, x, gamma, mean, rstd, dgamma, dbeta), where mean and rstd have the length of this axis of x. */
#define NORM_GRAD_KERNEL(name, axis)                                                                                   \
    KERNEL(name) {                                                                                                     \
        const int type = nargs == 7 ? real_type(args[0]) : 0;                                                          \
        PORTABLE_UNLESS(type && NDIM(args[0]) == 2 && real_type(args[1]) == type && same_shape(args[0], args[1]) &&    \
                        SIZE(args[0]) && are_vectors(args, 2, 2, type, DIM(args[0], 1)) &&                             \
                        are_vectors(args, 3, 4, type, DIM(args[0], axis)) &&                                           \
                        are_vectors(args, 5, 6, type, DIM(args[0], 1)) && is_writable(args[5]) &&                      \
                        is_writable(args[6]));                                                                         \
        PyObject *x = args[1], *dx = NEW_LIKE(x, type);                                                                \
        void *scratch = PyMem_Malloc(3 * DIM(x, 1) * PyArray_ITEMSIZE(ARRAY(x)));                                      \
        if (!scratch) PyErr_NoMemory();                                                                                \
        if (dx && scratch)                                                                                             \
            RUN(type, SIZE(x), name, DATA(args[0]), DATA(x), DATA(args[2]), DATA(args[3]), DATA(args[4]),              \
                DATA(args[5]), DATA(args[6]), DATA(dx), scratch, DIM(x, 0), DIM(x, 1));                                \
        else                                                                                                           \
            Py_CLEAR(dx);                                                                                              \
        PyMem_Free(scratch);                                                                                           \
        return dx;                                                                                                     \
    }

NORM_GRAD_KERNEL(batch_norm_grad, 1)
NORM_GRAD_KERNEL(layer_norm_grad, 0)

KERNEL(embedding) {
    const int type = nargs == 2 ? real_type(args[0]) : 0;
    PORTABLE_UNLESS(type && NDIM(args[0]) == 2 && is_labels(args[1]) && NDIM(args[1]) < NPY_MAXDIMS);
    Size shape[NPY_MAXDIMS + 1];
    const int ndim = NDIM(args[1]);
    for (int i = 0; i < ndim; i++) shape[i] = DIM(args[1], i);
    shape[ndim] = DIM(args[0], 1);
    PyObject *W = args[0], *y = new_array(ndim + 1, shape, type);
    if (y) RUN(type, SIZE(y), embedding, DATA(W), as_labels(args[1]), DATA(y), SIZE(args[1]), DIM(W, 0), DIM(W, 1));
    return y;
}

KERNEL(embedding_grad) {
    const int type = nargs == 3 ? real_type(args[1]) : 0;
    PORTABLE_UNLESS(type && real_type(args[2]) == type && is_labels(args[0]) && NDIM(args[0]) == 1 &&
                    NDIM(args[1]) == 2 && NDIM(args[2]) == 2 && DIM(args[1], 1) == DIM(args[2], 1) &&
                    DIM(args[1], 0) == SIZE(args[0]) && is_writable(args[2]));
    const Labels idx = as_labels(args[0]);
    const Size rows = DIM(args[2], 0);
    PORTABLE_UNLESS(labels_in_range(idx, SIZE(args[0]), rows));
    RUN(type, SIZE(args[1]) + SIZE(args[2]), embedding_grad, idx, DATA(args[1]), DATA(args[2]), SIZE(args[0]), rows,
        DIM(args[2], 1));
    Py_RETURN_NONE;
}

/* ---- recurrent layers ---- */

typedef struct {
    Size n, steps, units;
} Steps;

/* Return whether the arrays args[0], args[1], ... have the axes that `axes` names, such as "*NT4 NH": N rows, T time
   steps, S = T + 1, H hidden units, a digit for that many times H, an asterisk for an array that is written. The sizes
   are those of the array NTH; t must be a time step. */
static int are_steps(PyObject *const *args, const char *axes, int type, PyObject *t, Steps *s, Size *step) {
    int i = 0, ndim = 0, written = 0;
    for (const char *c = axes;; c++) {
        if (*c == '*') {
            written = 1;
        } else if (*c == ' ' || !*c) {
            if (NDIM(args[i]) != ndim || (written && !is_writable(args[i]))) return 0;
            if (!*c) break;
            i++, ndim = written = 0;
        } else {
            if (!ndim && real_type(args[i]) != type) return 0;
            if (ndim >= NDIM(args[i])) return 0;
            const Size size = *c == 'N'   ? s->n
                              : *c == 'T' ? s->steps
                              : *c == 'S' ? s->steps + 1
                              : *c == 'H' ? s->units
                                          : (*c - '0') * s->units;
            if (DIM(args[i], ndim++) != size) return 0;
        }
    }
    *step = PyLong_CheckExact(t) ? PyLong_AsSsize_t(t) : -1;
    if (*step == -1) PyErr_Clear();
    return 0 <= *step && *step < s->steps;
}

#define DATA_3(a) DATA(a[0]), DATA(a[1]), DATA(a[2])
#define DATA_4(a) DATA_3(a), DATA(a[3])
#define DATA_5(a) DATA_4(a), DATA(a[4])
#define DATA_6(a) DATA_5(a), DATA(a[5])

/* name(arrays..., t), where array number `like` is (N, T, H). */
#define STEP_KERNEL(name, count, like, axes)                                                                           \
    KERNEL(name) {                                                                                                     \
        const int type = nargs == count + 1 && PyArray_CheckExact(args[like]) ? real_type(args[like]) : 0;             \
        PORTABLE_UNLESS(type && NDIM(args[like]) == 3);                                                                \
        Steps s = {DIM(args[like], 0), DIM(args[like], 1), DIM(args[like], 2)};                                        \
        Size t;                                                                                                        \
        PORTABLE_UNLESS(are_steps(args, axes, type, args[count], &s, &t));                                             \
        RUN(type, s.n * s.units, name, DATA_##count(args), s.n, s.steps, s.units, t);                                  \
        Py_RETURN_NONE;                                                                                                \
    }

STEP_KERNEL(rnn_step, 3, 0, "*NTH NH *NTH")
STEP_KERNEL(rnn_step_grad, 4, 0, "NTH NTH NH *NTH")
STEP_KERNEL(lstm_step, 5, 4, "*NT4 N4 *NSH *NTH *NTH")
STEP_KERNEL(lstm_step_grad, 6, 2, "NT4 NSH NTH NH *NH *NT4")
STEP_KERNEL(gru_gates, 4, 2, "*NT3 N2 NTH *NTH")
STEP_KERNEL(gru_step, 4, 2, "*NT3 NH *NTH *NTH")
STEP_KERNEL(gru_step_grad, 6, 1, "NT3 NTH NTH *NH NH *NT3")
STEP_KERNEL(gru_gates_grad, 5, 1, "NT3 NTH NH *NH *NT3")

/* ---- optimizers ---- */

static inline int overlap(PyObject *a, PyObject *b) {
    const char *start = DATA(a), *other = DATA(b);
    return start < other + PyArray_NBYTES(ARRAY(b)) && other < start + PyArray_NBYTES(ARRAY(a));
}

/* Return whether the loops support these arrays: a parameter, its gradient and its state. All but the gradient are
   written, so the arrays must not overlap. */
static int are_ready(PyObject *const *arrays, int count) {
    const int type = real_type(arrays[0]);
    for (int j = 0; j < count; j++) {
        if (!type || real_type(arrays[j]) != type || !same_shape(arrays[0], arrays[j])) return 0;
        if (j != 1 && !is_writable(arrays[j])) return 0;
        for (int i = 0; i < j; i++)
            if (overlap(arrays[i], arrays[j])) return 0;
    }
    return 1;
}

#define MOST_LISTS 4

/* Copies of lists as tuples, because another thread may modify the lists while a loop runs without the GIL. */
typedef struct {
    PyObject *tuples[MOST_LISTS];
    Py_ssize_t length;
    int count, ready;
} Lists;

static void item(const Lists *lists, Py_ssize_t i, PyObject **arrays) {
    for (int j = 0; j < lists->count; j++) arrays[j] = PyTuple_GET_ITEM(lists->tuples[j], i);
}

static void release(Lists *lists) {
    for (int j = 0; j < lists->count; j++) Py_XDECREF(lists->tuples[j]);
}

/* Take references to the items of `count` lists, and check whether the loops support all of them. */
static Lists hold(PyObject *const *args, int count) {
    Lists lists = {{NULL}, 0, count, 1};
    for (int j = 0; j < count; j++) {
        lists.tuples[j] = PyList_CheckExact(args[j]) ? PyList_AsTuple(args[j]) : NULL;
        if (!lists.tuples[j] || PyTuple_GET_SIZE(lists.tuples[j]) != PyTuple_GET_SIZE(lists.tuples[0])) lists.ready = 0;
    }
    PyErr_Clear();
    lists.length = lists.ready ? PyTuple_GET_SIZE(lists.tuples[0]) : 0;
    for (Py_ssize_t i = 0; i < lists.length && lists.ready; i++) {
        PyObject *arrays[MOST_LISTS];
        item(&lists, i, arrays);
        lists.ready = are_ready(arrays, count);
    }
    if (!lists.ready) lists.length = 0;
    return lists;
}

KERNEL(can_update) {
    PORTABLE_UNLESS(nargs == 2);
    Lists lists = hold(args, 2);
    release(&lists);
    PORTABLE_UNLESS(lists.ready);
    Py_RETURN_TRUE;
}

/* An optimizer whose arguments are `list_count` lists of arrays and `setting_count` numbers. */
#define OPTIMIZER_KERNEL(name, list_count, setting_count)                                                              \
    KERNEL(name) {                                                                                                     \
        double s[setting_count];                                                                                       \
        PORTABLE_UNLESS(nargs == list_count + setting_count);                                                          \
        for (int k = 0; k < setting_count; k++) PORTABLE_UNLESS(read_number(args[list_count + k], s + k));             \
        Lists lists = hold(args, list_count);                                                                          \
        for (Py_ssize_t i = 0; i < lists.length; i++) {                                                                \
            PyObject *arrays[MOST_LISTS];                                                                              \
            char *a[MOST_LISTS] = {NULL};                                                                              \
            item(&lists, i, arrays);                                                                                   \
            for (int j = 0; j < list_count; j++) a[j] = DATA(arrays[j]);                                               \
            RUN(PyArray_TYPE(ARRAY(arrays[0])), SIZE(arrays[0]), name, a, SIZE(arrays[0]), s);                         \
        }                                                                                                              \
        release(&lists);                                                                                               \
        PORTABLE_UNLESS(lists.ready);                                                                                  \
        Py_RETURN_NONE;                                                                                                \
    }

OPTIMIZER_KERNEL(sgd, 2, 2)
OPTIMIZER_KERNEL(momentum, 3, 3)
OPTIMIZER_KERNEL(nesterov, 3, 3)
OPTIMIZER_KERNEL(adagrad, 3, 3)
OPTIMIZER_KERNEL(rmsprop, 3, 4)
OPTIMIZER_KERNEL(adam, 4, 5)

static double square_sum(const Lists *grads, double scale) {
    double sum = 0, part;
    for (Py_ssize_t i = 0; i < grads->length; i++) {
        PyObject *g = PyTuple_GET_ITEM(grads->tuples[0], i);
        RUN_RETURNING(part, PyArray_TYPE(ARRAY(g)), SIZE(g), square_sum, DATA(g), SIZE(g), scale);
        sum += part;
    }
    return sum;
}

KERNEL(clip_grads) {
    const double tiny = 0x1p-700;
    double max_norm;
    PORTABLE_UNLESS(nargs == 2 && read_number(args[1], &max_norm));
    Lists grads = hold(args, 1);
    double norm = sqrt(square_sum(&grads, 1)), rate = max_norm / (norm + 1e-6);
    if (!isfinite(norm)) {
        norm = sqrt(square_sum(&grads, tiny));
        rate = isfinite(norm) ? max_norm * tiny / norm : 1;
    }
    for (Py_ssize_t i = 0; rate < 1 && i < grads.length; i++) {
        PyObject *g = PyTuple_GET_ITEM(grads.tuples[0], i);
        RUN(PyArray_TYPE(ARRAY(g)), SIZE(g), scale, DATA(g), SIZE(g), rate);
    }
    release(&grads);
    PORTABLE_UNLESS(grads.ready);
    Py_RETURN_NONE;
}

KERNEL(all_finite) {
    PORTABLE_UNLESS(nargs == 1);
    Lists arrays = hold(args, 1);
    int finite = 1;
    for (Py_ssize_t i = 0; finite && i < arrays.length; i++) {
        PyObject *a = PyTuple_GET_ITEM(arrays.tuples[0], i);
        RUN_RETURNING(finite, PyArray_TYPE(ARRAY(a)), SIZE(a), all_finite, DATA(a), SIZE(a));
    }
    release(&arrays);
    PORTABLE_UNLESS(arrays.ready);
    return PyBool_FromLong(finite);
}

/* ---- the module ---- */

#define METHOD(name)                                                                                                   \
    {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, "As nnx.kernels.portable." #name "."}

static PyMethodDef methods[] = {
    METHOD(in_range),
    METHOD(affine),
    METHOD(affine_grad),
    METHOD(input_grad),
    METHOD(bias_grad),
    METHOD(sigmoid),
    METHOD(sigmoid_grad),
    METHOD(relu),
    METHOD(relu_grad),
    METHOD(tanh),
    METHOD(tanh_grad),
    METHOD(gelu),
    METHOD(gelu_grad),
    METHOD(softmax),
    METHOD(softmax_grad),
    METHOD(softmax_loss),
    METHOD(softmax_loss_grad),
    METHOD(sigmoid_loss),
    METHOD(sigmoid_loss_grad),
    METHOD(squared_error),
    METHOD(squared_error_grad),
    METHOD(dropout),
    METHOD(batch_norm),
    METHOD(batch_norm_grad),
    METHOD(layer_norm),
    METHOD(layer_norm_grad),
    METHOD(embedding),
    METHOD(embedding_grad),
    METHOD(rnn_step),
    METHOD(rnn_step_grad),
    METHOD(lstm_step),
    METHOD(lstm_step_grad),
    METHOD(gru_gates),
    METHOD(gru_gates_grad),
    METHOD(gru_step),
    METHOD(gru_step_grad),
    METHOD(can_update),
    METHOD(sgd),
    METHOD(momentum),
    METHOD(nesterov),
    METHOD(adagrad),
    METHOD(rmsprop),
    METHOD(adam),
    METHOD(clip_grads),
    METHOD(all_finite),
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    import_array1(-1);
    if (!handler_capsule) handler_capsule = PyCapsule_New(&handler, "mem_handler", NULL);
    PyObject *numpy = handler_capsule ? PyImport_ImportModule("numpy") : NULL;
    if (numpy && !matmul) matmul = PyObject_GetAttrString(numpy, "matmul");
    Py_XDECREF(numpy);
    PyObject *names = matmul ? PyList_New(0) : NULL;
    int status = names ? 0 : -1;
    for (PyMethodDef *method = methods; !status && method->ml_name; method++) {
        PyObject *name = PyUnicode_FromString(method->ml_name);
        status = name ? PyList_Append(names, name) : -1;
        Py_XDECREF(name);
    }
    if (!status) status = PyModule_AddObjectRef(module, "__all__", names);
    Py_XDECREF(names);
    return status ? status : PyModule_AddStringConstant(module, "INSTRUCTIONS", INSTRUCTIONS);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* nor does NumPy */
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "nnx.kernels.native",
    .m_methods = methods,
    .m_slots = slots,
    .m_doc = "The kernels in C, on NumPy's C API.",
};

PyMODINIT_FUNC PyInit_native(void) { return PyModuleDef_Init(&definition); }
