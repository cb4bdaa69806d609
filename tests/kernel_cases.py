"""What the tests of the kernels share: every kernel's shapes and arguments, and the comparison with `portable`."""

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
    """Shapes that every kernel over rows gets, and `shapes` of its own."""
    return [(5, 7), (1, 1), (0, 3), (1, 4), *shapes]


# kernel: the shapes it is tried on; the roles of its arguments
CASES = {
    "add_bias": (rows_for((30, 100)), ["any", "row"]),
    "sigmoid": (rows_for((2, 3, 4), (0,), (9,)), ["any"]),
    "sigmoid_grad": (rows_for((2, 3, 4)), ["any", "probability"]),
    "relu_grad": (rows_for((2, 3, 4)), ["any", "any"]),
    "tanh_grad": (rows_for((2, 3, 4)), ["any", "probability"]),
    "bias_grad": (rows_for((30, 100), (3000, 3), (5000, 1), (3000, 40), (3, 700), (2, 40000)), ["any", "empty row"]),
    "softmax": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any"]),
    "softmax_grad": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any", "probability"]),
    "softmax_loss": (rows_for((4,), (2, 3, 4), (70, 3), (9, 200), (3, 300), (2, 5000)), ["any", "labels"]),
    "softmax_loss_grad": ([(5, 7), (1, 1), (4,), (2, 3, 4), (9, 200)], ["probability", "labels", "number"]),
    "gelu": (rows_for((2, 3, 4)), ["wide"]),
    "gelu_grad": (rows_for((2, 3, 4)), ["any", "wide"]),
    "dropout": (rows_for((2, 3, 4), (3000, 3)), ["any", "number", "seed", "call"]),
    "embedding": ([(5, 7), (1, 1), (9, 200)], ["any", "indices"]),
    "embedding_grad": ([(5, 7), (1, 1), (9, 300), (1000, 3)], ["row indices", "any", "empty matrix"]),
    "sgd": (rows_for((2, 3, 4), (9000,)), ["list", "list", "number"]),
    "momentum": (rows_for((2, 3, 4), (9000,)), ["list", "list", "list", "number", "rate"]),
    "nesterov": (rows_for((2, 3, 4), (9000,)), ["list", "list", "list", "number", "rate"]),
    "adagrad": (rows_for((2, 3, 4), (9000,)), ["list", "list", "positive list", "number", "eps"]),
    "rmsprop": (rows_for((2, 3, 4), (9000,)), ["list", "list", "positive list", "number", "rate", "eps"]),
    "adam": (rows_for((2, 3, 4), (9000,)), ["list"] * 3 + ["positive list", "number", "rate", "rate", "eps", "rate"]),
    "clip_grads": (rows_for((2, 3, 4), (9000,)), ["list", "number"]),
}


ROLES = {"number": 0.25, "rate": 0.9, "eps": 1e-3, "seed": 2**63 + 5, "call": 7}


def arguments(roles, shape, dtype, layout, label_dtype="int64"):
    """The same numbers at every call."""
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
        if role == "row":
            return array(rng.normal(size=shape[1:]))
        if role == "empty row":
            return np.full(shape[1:], np.nan, dtype)
        return array(3 * rng.normal(size=shape))

    return [argument(role) for role in roles]


def outcome(module, name, *case, **options):
    """All results, and the arguments after the call: also what must not have been written."""
    given = arguments(CASES[name][1], *case, **options)
    result = getattr(module, name)(*given)
    results = list(result) if isinstance(result, tuple) else [result]
    flat = [a for value in (*results, *given) for a in (value if isinstance(value, list) else [value])]
    return [a for a in flat if isinstance(a, np.ndarray)]


def assert_same(results, expected, tolerance):
    for a, b in zip(results, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        numpy.testing.assert_allclose(to_cpu(a), to_cpu(b), rtol=tolerance, atol=tolerance)
