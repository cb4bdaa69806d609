"""Shapes and arguments of every kernel, and the comparison with `portable`, for the kernel tests."""

import numpy

from nnx import np, to_cpu

DTYPES = ["float16", "float32", "float64"]
TOLERANCE = {"float16": 6e-3, "float32": 4e-6, "float64": 1e-13}
LABELS = ["int8", "int16", "int32", "int64"]
LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
}


def rows_for(*shapes):
    """Return the shapes for all kernels over rows, and `shapes` specific to one."""
    return [(5, 7), (1, 1), (0, 3), (1, 4), *shapes]


LISTS = rows_for((2, 3, 4), (9000,))
STEPS = [(5, 3, 7), (1, 1, 1), (3, 2, 40), (1, 4, 300), (2, 1, 3), (0, 2, 3), (70, 2, 33)]  # (N, T, H)
MATRICES = [(5, 7), (1, 1), (1, 4), (40, 100), (300, 17), (9, 700), (3000, 3)]

# kernel: the shapes to test; the roles of its arguments
CASES = {
    "affine": (rows_for((30, 100)), ["any", "weights", "row of 3"]),
    "affine_grad": (rows_for((30, 100)), ["any", "rows of 3", "empty weights", "empty row of 3"]),
    "input_grad": (rows_for((30, 100)), ["rows of 3", "weights"]),
    "in_range": (rows_for((30, 100)), ["labels", "count"]),
    "sigmoid": (rows_for((2, 3, 4), (0,), (9,)), ["any"]),
    "sigmoid_grad": (rows_for((2, 3, 4)), ["any", "probability"]),
    "relu": (rows_for((2, 3, 4)), ["any"]),
    "relu_grad": (rows_for((2, 3, 4)), ["any", "any"]),
    "tanh": (rows_for((2, 3, 4)), ["any"]),
    "tanh_grad": (rows_for((2, 3, 4)), ["any", "probability"]),
    "bias_grad": (rows_for((30, 100), (3000, 3), (5000, 1), (3000, 40), (3, 700), (2, 40000)), ["any", "empty row"]),
    "softmax": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any"]),
    "softmax_grad": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any", "probability"]),
    "softmax_loss": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any", "labels", "weight"]),
    "softmax_loss_grad": (
        [(5, 7), (1, 1), (4,), (2, 3, 4), (9, 200)],
        ["probability", "labels", "number", "weight"],
    ),
    "sigmoid_loss": ([(5, 7), (1, 1), (4,), (2, 3, 4), (3000,)], ["any", "bits", "element weight"]),
    "sigmoid_loss_grad": ([(5, 7), (1, 1), (4,), (2, 3, 4)], ["probability", "bits", "number", "element weight"]),
    "squared_error": ([(5, 7), (1, 1), (4,), (2, 3, 4), (3000,)], ["any", "probability", "element weight"]),
    "squared_error_grad": ([(5, 7), (1, 1), (4,), (2, 3, 4)], ["any", "probability", "number", "element weight"]),
    "batch_norm": (MATRICES, ["any", "row", "row", "row", "positive row", "rate", "eps"]),
    "batch_norm_grad": (MATRICES, ["any", "any", "row", "wide row", "wide row", "empty row", "empty row"]),
    "layer_norm": (MATRICES, ["any", "row", "row", "eps"]),
    "layer_norm_grad": (MATRICES, ["any", "any", "row", "wide column", "wide column", "empty row", "empty row"]),
    "gelu": (rows_for((2, 3, 4)), ["wide"]),
    "gelu_grad": (rows_for((2, 3, 4)), ["any", "wide"]),
    "dropout": (rows_for((2, 3, 4), (3000, 3)), ["any", "number", "seed", "call"]),
    "embedding": ([(5, 7), (1, 1), (9, 200)], ["any", "indices"]),
    "embedding_grad": ([(5, 7), (1, 1), (9, 300), (1000, 3)], ["row indices", "any", "empty matrix"]),
    "rnn_step": (STEPS, ["any", "step 1", "any", "t"]),
    "rnn_step_grad": (STEPS, ["any", "any", "step 1", "steps 1", "t"]),
    "lstm_step": (STEPS, ["steps 4", "step 4", "cells", "any", "steps 1", "t"]),
    "lstm_step_grad": (STEPS, ["gates 4", "cells", "any", "step 1", "step 1", "steps 4", "t"]),
    "gru_gates": (STEPS, ["steps 3", "step 2", "any", "steps 1", "t"]),
    "gru_gates_grad": (STEPS, ["gates 3", "any", "step 1", "step 1", "steps 3", "t"]),
    "gru_step": (STEPS, ["steps 3", "step 1", "any", "steps 1", "t"]),
    "gru_step_grad": (STEPS, ["gates 3", "any", "any", "step 1", "step 1", "steps 3", "t"]),
    "sgd": (LISTS, ["list", "list", "number", "rate"]),
    "momentum": (LISTS, ["list", "list", "list", "number", "rate", "rate"]),
    "nesterov": (LISTS, ["list", "list", "list", "number", "rate", "rate"]),
    "adagrad": (LISTS, ["list", "list", "positive list", "number", "eps", "rate"]),
    "rmsprop": (LISTS, ["list", "list", "positive list", "number", "rate", "eps", "rate"]),
    "adam": (LISTS, ["list"] * 3 + ["positive list", "number", "rate", "rate", "eps", "rate"]),
    "clip_grads": (LISTS, ["list", "number"]),
    "can_update": (LISTS, ["list", "list"]),
    "all_finite": (LISTS, ["list"]),
    "gather": ([(5, 7), (1, 1), (9, 200), (4,), (2, 3, 4), (700, 3)], ["any", "row indices"]),
}


PARTS = {  # of a product (N, D) @ (D, 3)
    "weights": lambda shape: (shape[1], 3),
    "row of 3": lambda shape: (3,),
    "rows of 3": lambda shape: (shape[0], 3),
    "empty weights": lambda shape: (shape[1], 3),
    "empty row of 3": lambda shape: (3,),
}
ROLES = {"count": 3, "number": 0.25, "rate": 0.9, "eps": 1e-3, "seed": 2**63 + 5, "call": 7}


def arguments(roles, shape, dtype, layout, label_dtype="int64", weighted=False):
    """Return the same values on every call."""
    rng = numpy.random.default_rng(0)

    def array(values):
        return LAYOUTS[layout](np.asarray(values.astype(dtype)))

    def argument(role):
        if role in ROLES:
            return ROLES[role]
        if role.endswith("list"):
            lists = [rng.normal(size=s) for s in (shape, (3,), (0, 2), (4097, 2), (1,))]
            return [array(abs(a) if role == "positive list" else a) for a in lists]
        if role == "indices":
            return np.asarray(rng.integers(-1, shape[0] + 1, (2, 3)))
        if role == "row indices":
            return np.asarray(rng.integers(0, shape[0] // 2 + 1, shape[0]))
        if role == "empty matrix":
            return np.full((shape[0] // 2 + 1, shape[1]), np.nan, dtype)
        if role == "wide":
            return array(20 * rng.normal(size=shape))
        if role == "labels":
            return np.asarray(rng.integers(0, min(shape[-1], 127), shape[:-1]).astype(label_dtype))
        if role == "probability":
            return array(rng.uniform(size=shape))
        if role == "bits":
            return np.asarray(rng.integers(0, 2, shape).astype(label_dtype))
        if role in ("weight", "element weight"):
            if not weighted:
                return None
            groups = shape if role == "element weight" else shape[:-1]
            weight = rng.integers(0, 3, groups[:1] or 1).astype("float32" if dtype == "float16" else dtype)
            return np.asarray(weight / max(1, weight.sum()))
        if role == "t":
            return shape[1] // 2
        if role == "cells":
            return array(rng.normal(size=(shape[0], shape[1] + 1, shape[2])))
        if role.startswith(("step", "gates")):
            kind, times = role.split()
            size = *shape[: 1 if kind == "step" else 2], int(times) * shape[2]
            return array(rng.uniform(size=size) if kind == "gates" else rng.normal(size=size))
        if role in PARTS:
            part = PARTS[role](shape)
            return np.full(part, np.nan, dtype) if role.startswith("empty") else array(rng.normal(size=part))
        if role in ("row", "positive row"):
            values = rng.normal(size=shape[1:])
            return array(abs(values) if role == "positive row" else values)
        if role in ("wide row", "wide column"):  # intermediates of normalization, float32 for float16
            size = shape[1:] if role == "wide row" else shape[:1]
            return np.asarray(rng.uniform(0.5, 2, size).astype("float32" if dtype == "float16" else dtype))
        if role == "empty row":
            return np.full(shape[1:], np.nan, dtype)
        return array(3 * rng.normal(size=shape))

    return [argument(role) for role in roles]


def outcome(module, name, *case, **options):
    """Return all results, and the arguments after the call, including those that must not be modified."""
    given = arguments(CASES[name][1], *case, **options)
    result = getattr(module, name)(*given)
    results = list(result) if isinstance(result, tuple) else [result]
    flat = [a for value in (*results, *given) for a in (value if isinstance(value, list) else [value])]
    return [a for a in flat if isinstance(a, np.ndarray)]


def assert_same(results, expected, tolerance):
    for a, b in zip(results, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        numpy.testing.assert_allclose(to_cpu(a), to_cpu(b), rtol=tolerance, atol=tolerance)
