"""The optimizers, clipping and the schedules: a step by hand, convergence, layouts, errors."""

import math

import numpy
import pytest

import nnx
from nnx import SGD, clip_grads, np, to_cpu
from nnx.optimizer import cosine_decay, linear_warmup, step_decay


def arrays(rng, *shapes, dtype="float32"):
    return [np.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sgd_updates_in_place(rng, dtype):
    shapes = [(3, 4), (4,), (300, 300), (0, 2), (1,)]  # below and above the size of a block
    params, grads = arrays(rng, *shapes, dtype=dtype), arrays(rng, *shapes, dtype=dtype)
    before = [to_cpu(p).copy() for p in params]
    same = list(params)
    SGD(lr=0.1).update(params, grads)
    for p, q, b, g in zip(params, same, before, grads, strict=True):
        assert p is q
        assert p.dtype == dtype
        step = numpy.asarray(0.1, dtype) * to_cpu(g)
        numpy.testing.assert_allclose(to_cpu(p), b - step, rtol=1e-5, atol=4 * numpy.finfo(dtype).eps)


def test_sgd_accepts_parameters_of_any_layout(rng):
    (base, wide), grads = arrays(rng, (300, 400), (300, 800)), arrays(rng, (400, 300), (300, 400))
    params = [base.T, wide[:, ::2]]
    before = [to_cpu(p).copy() for p in params]
    SGD(0.5).update(params, grads)
    for p, b, g in zip(params, before, grads, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), b - numpy.float32(0.5) * to_cpu(g), rtol=1e-6)
    numpy.testing.assert_array_equal(to_cpu(base), to_cpu(params[0]).T)


def test_lr_may_change_between_steps():
    p, g = [np.zeros(1)], [np.ones(1)]
    optimizer = SGD(0.1)
    optimizer.update(p, g)
    optimizer.lr = 1.0
    optimizer.update(p, g)
    assert float(p[0][0]) == pytest.approx(-1.1)


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ([(2, 3)], "every parameter needs a gradient, got 2 params and 1 grads"),
        ([(2, 3), (1,)], r"grads\[1\] must have the shape of params\[1\] \(3,\), got \(1,\)"),
        ([(2, 3), (1, 3)], r"grads\[1\] must have the shape of params\[1\] \(3,\), got \(1, 3\)"),
    ],
)
def test_sgd_rejects_lists_that_do_not_match(grads, words):
    params = [np.ones((2, 3)), np.ones(3)]
    with pytest.raises(ValueError, match=f"SGD: {words}"):
        SGD().update(params, [np.ones(shape) for shape in grads])
    assert all(float(p.min()) == float(p.max()) == 1 for p in params)


def test_clip_grads_scales_to_the_common_norm():
    grads = [np.asarray([3.0, 0.0], "float32"), np.asarray([[4.0]], "float32")]
    clip_grads(grads, 10)
    assert [float(g.sum()) for g in grads] == [3, 4]
    clip_grads(grads, 2.5)
    assert [float(g.sum()) for g in grads] == pytest.approx([1.5, 2], rel=1e-5)
    assert grads[0].dtype == np.float32


def test_clip_grads_of_extreme_values():
    grads = [np.full(4, 2e38, "float32")]
    clip_grads(grads, 1.0)
    assert float(grads[0][0]) == pytest.approx(0.5)
    clip_grads([], 1.0)
    for dtype in ("float32", "float64"):
        for value in (math.nan, math.inf, -math.inf):  # there is no norm, and nothing is scaled
            bad = [np.asarray([value, 7.0], dtype), np.asarray([5.0])]
            clip_grads(bad, 1.0)
            numpy.testing.assert_array_equal(to_cpu(bad[0]), [value, 7.0])
            assert float(bad[1][0]) == 5


def test_norm_of_float64_gradients_does_not_overflow():
    grads = [np.asarray([3e200, 4e200]), np.zeros((0, 3)), np.asarray([0.0], "float32")]
    clip_grads(grads, 1.0)
    numpy.testing.assert_allclose(to_cpu(grads[0]), [0.6, 0.8], rtol=1e-12)
    grads = [np.full(4, 1.5e308)]
    clip_grads(grads, 6.0)
    numpy.testing.assert_allclose(to_cpu(grads[0]), 3, rtol=1e-12)


def test_clip_grads_accepts_an_iterator():
    grads = [np.asarray([3.0, 4.0])]
    clip_grads((g for g in grads), 1.0)
    assert float(grads[0][0]) == pytest.approx(0.6)


def test_clip_grads_changes_nothing_on_error():
    others = [np.ones(3, int), [1.0, 2.0], None, 2.0, np.ones(3, complex)]
    if not nnx.GPU:
        others += [masked([0, 1, 0]), read_only()]
    for other in others:
        grads = [np.full(3, 7.0), other]
        with pytest.raises((TypeError, ValueError), match=r"clip_grads: grads\[1\](:| must be| is read-only)"):
            clip_grads(grads, 1.0)
        assert float(grads[0][0]) == 7
    with pytest.raises(TypeError, match="max_norm must be a number, got '1'"):
        clip_grads([np.full(3, 7.0)], "1")


@pytest.mark.parametrize("max_norm", [0, -1, math.nan])
def test_clip_grads_rejects_invalid_norms(max_norm):
    with pytest.raises(ValueError, match="clip_grads: max_norm must be positive"):
        clip_grads([np.ones(2)], max_norm)


OPTIMIZERS = {  # settings that converge on both problems
    "SGD": (nnx.SGD, {"lr": 0.002}),
    "Momentum": (nnx.Momentum, {"lr": 0.0005}),
    "Nesterov": (nnx.Nesterov, {"lr": 0.0005}),
    "AdaGrad": (nnx.AdaGrad, {"lr": 0.5}),
    "RMSprop": (nnx.RMSprop, {"lr": 0.002}),
    "Adam": (nnx.Adam, {"lr": 0.02}),
    "AdamW": (nnx.AdamW, {"lr": 0.02, "weight_decay": 1e-5}),
}


def parabola(x):
    """Return the gradient at `x` of (a - 1)**2 + (b + 2)**2, and the minimum."""
    return 2 * (x - numpy.array([1.0, -2.0])), [1, -2]


def rosenbrock(x):
    """Return the gradient at `x` of (1 - a)**2 + 10 * (b - a**2)**2, and the minimum."""
    a, b = x
    return numpy.array([-2 * (1 - a) - 40 * a * (b - a * a), 20 * (b - a * a)]), [1, 1]


@pytest.mark.parametrize("problem", [parabola, rosenbrock])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_converge(name, problem):
    """On a parabola, and in Rosenbrock's valley (of steepness 10) from (-1, 1)."""
    optimizer, settings = OPTIMIZERS[name]
    optimizer = optimizer(**settings)
    p, g = np.asarray([-1.0, 1.0]), np.zeros(2)
    for _ in range(8000 if not nnx.GPU else 4000):
        gradient, target = problem(to_cpu(p))
        g[...] = np.asarray(gradient)
        optimizer.update([p], [g])
    numpy.testing.assert_allclose(to_cpu(p), target, atol=0.05)


def test_every_optimizer_is_in_the_table():
    classes = {name for name, value in vars(nnx.optimizer).items() if hasattr(value, "update") and name[0] != "_"}
    assert classes == set(OPTIMIZERS)


def steps_by_hand(name, p, gradients, eps=1e-7, weight_decay=None):
    """The formulas of the docstrings in float64, over a list of gradients."""
    lr, a, b = 0.1, 0.0, 0.0
    decay = (0.01 if name == "AdamW" else 0.0) if weight_decay is None else weight_decay
    for i, g in enumerate(gradients, 1):
        p = p - lr * decay * p
        if name == "SGD":
            p = p - lr * g
        elif name == "Momentum":
            a = 0.9 * a - lr * g
            p = p + a
        elif name == "Nesterov":
            p = p + 0.81 * a - 1.9 * lr * g  # the book's form, with the previous velocity
            a = 0.9 * a - lr * g
        elif name == "AdaGrad":
            a = a + g**2
            p = p - lr * g / (a**0.5 + eps)
        elif name == "RMSprop":
            a = 0.99 * a + 0.01 * g**2
            p = p - lr * g / (a**0.5 + eps)
        else:
            a, b = 0.9 * a + 0.1 * g, 0.999 * b + 0.001 * g**2
            p = p - lr * math.sqrt(1 - 0.999**i) / (1 - 0.9**i) * a / (b**0.5 + eps)
    return p


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3}, {"eps": 0.5}, {"eps": 0.01, "weight_decay": 0.05}])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (300, 300)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_by_hand(name, shape, settings, rng):
    if "eps" in settings and name in ("SGD", "Momentum", "Nesterov"):
        settings = {"weight_decay": 0}
    gradients = rng.standard_normal((4, *shape))
    start = rng.standard_normal(shape)
    for dtype, rtol in (("float64", 1e-12), ("float32", 1e-4)):
        p, g = [np.array(start, dtype)], [np.zeros(start.shape, dtype)]
        made, assigned = OPTIMIZERS[name][0](lr=0.1, **settings), OPTIMIZERS[name][0](lr=0.1)
        q = [p[0].copy()]
        for setting, value in settings.items():
            setattr(assigned, setting, value)
        for gradient in gradients:
            g[0][...] = np.asarray(gradient)
            made.update(p, g)
            assigned.update(q, g)
        assert p[0].dtype == dtype
        expected = steps_by_hand(name, start, gradients, **settings)
        numpy.testing.assert_allclose(to_cpu(p[0]), expected, rtol=rtol, atol=rtol)
        numpy.testing.assert_array_equal(to_cpu(p[0]), to_cpu(q[0]))
        for slot in made._slots:
            assert getattr(made, slot)[0].dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (lambda: nnx.Adam(0.1, 0.0, 0.0), 0.1),
        (lambda: nnx.AdamW(0.1, 0.0, 0.0, 0.0), 0.1),
        (lambda: nnx.RMSprop(0.1, 0.0), 0.1),
        (lambda: nnx.Adam(0.1, 0.9, 0.0), None),
    ],
)
def test_averages_do_not_retain_large_gradients_without_decay(optimizer, state, dtype):
    """With decay 0 every step has the size of the learning rate, independent of previous gradients."""
    optimizer, p = optimizer(), np.zeros(1, dtype)
    for gradient in (1e4, 1.0, 1e-4):
        before = float(p[0])
        optimizer.update([p], [np.full(1, gradient, dtype)])
        if state:
            assert before - float(p[0]) == pytest.approx(state, rel=2e-3)
    for slot in set(optimizer._slots) & {"h", "v"}:
        assert float(getattr(optimizer, slot)[0][0]) == pytest.approx(1e-8, rel=1e-5)


def test_adamw_is_adam_with_decay(rng):
    (p, g) = arrays(rng, (50,), (50,))
    q, optimizers = p.copy(), (nnx.AdamW(0.01, weight_decay=0.1), nnx.Adam(0.01, weight_decay=0.1))
    for _ in range(5):
        optimizers[0].update([p], [g])
        optimizers[1].update([q], [g])
    numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layout_makes_no_difference(name, rng):
    start, gradient = rng.standard_normal((300, 300)), np.asarray(rng.standard_normal((300, 300)))
    plain, wide = np.array(start), np.zeros((300, 600))
    turned, gaps = np.asarray(start.T.copy()).T, wide[:, ::2]
    gaps[...] = plain
    for p in (plain, turned, gaps):
        optimizer = OPTIMIZERS[name][0](lr=0.1)
        for _ in range(3):
            optimizer.update([p], [gradient])
    numpy.testing.assert_allclose(to_cpu(turned), to_cpu(plain), rtol=1e-12)
    numpy.testing.assert_allclose(to_cpu(gaps), to_cpu(plain), rtol=1e-12)
    assert not to_cpu(wide[:, 1::2]).any()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD"])
def test_state_is_bound_to_its_parameters(name):
    optimizer = OPTIMIZERS[name][0]()
    p, q = [np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)]
    optimizer.update(p, [np.ones(2), np.ones(3)])
    for other in (q, p[:1], p[::-1]):
        with pytest.raises(ValueError, match=rf"{name}: these {len(other)} params are not .*reset\(\)"):
            optimizer.update(other, [np.ones(a.shape) for a in other])
    assert all(float(a.min()) == 1 for a in q)
    optimizer.reset()
    optimizer.update(q, [np.ones(2), np.ones(3)])
    numpy.testing.assert_array_equal(to_cpu(q[0]), to_cpu(p[0]))


@pytest.mark.skipif(nnx.GPU, reason="PyTorch's CPU build is compared with NumPy")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {}),
        ("Momentum", {"momentum": 0.9}),
        ("Nesterov", {"momentum": 0.9, "nesterov": True}),
        ("AdaGrad", {"eps": 1e-7}),
        ("RMSprop", {"alpha": 0.99, "eps": 1e-7}),
    ],
)
def test_steps_match_pytorch(name, settings, rng):
    """Adam is omitted: PyTorch adds eps after the bias correction, the book (and the paper's last form) before it."""
    torch = pytest.importorskip("torch")
    peer = {"Momentum": "SGD", "Nesterov": "SGD", "AdaGrad": "Adagrad"}.get(name, name)
    start = rng.standard_normal(50)
    theirs = torch.tensor(start, requires_grad=True)
    optimizer = getattr(torch.optim, peer)([theirs], lr=0.01, **settings)
    p, ours = [np.asarray(start.copy())], OPTIMIZERS[name][0](lr=0.01)
    for gradient in rng.standard_normal((100, 50)):
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        ours.update(p, [np.asarray(gradient)])
    numpy.testing.assert_allclose(to_cpu(p[0]), theirs.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_schedules():
    step = step_decay(0.8, every=10, factor=0.5)
    assert [step(i) for i in (0, 9, 10, 25)] == [0.8, 0.8, 0.4, 0.2]
    cosine = cosine_decay(1.0, steps=100, final=0.1)
    assert [cosine(i) for i in (0, 50, 100, 1000)] == pytest.approx([1, 0.55, 0.1, 0.1])
    warm = linear_warmup(4, cosine)
    assert [warm(i) for i in range(3)] == pytest.approx([0.25 * cosine(0), 0.5 * cosine(1), 0.75 * cosine(2)])
    assert warm(50) == cosine(50)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numpy_scalar_learning_rate_gives_identical_results(name, rng):
    (p, g) = arrays(rng, (50,), (50,))
    q, optimizers = p.copy(), [getattr(nnx, name)(lr=lr) for lr in (0.1, numpy.float64(0.1))]
    for _ in range(20):
        optimizers[0].update([p], [g])
        optimizers[1].update([q], [g])
    numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_invalid_gradient_dtypes_are_rejected_without_changes(name, dtype):
    params = [np.ones(3), np.ones(3)]
    with pytest.raises(TypeError, match=rf"{name}: grads\[1\] must be a \w+ array of a floating dtype, got .*{dtype}"):
        getattr(nnx, name)().update(params, [np.ones(3), np.ones(3, dtype)])
    assert all((to_cpu(p) == 1).all() for p in params)


@pytest.mark.parametrize(
    ("weights", "gradients"), [("float32", "float16"), ("float32", "float64"), ("float64", "float32")]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_cast_to_the_dtype_of_the_parameter(name, weights, gradients, rng):
    """Small gradients: the square of 1e-5 is 0 in float16."""
    p, g = np.ones(4, weights), np.asarray(1e-5 * rng.standard_normal(4), gradients)
    q, optimizers = p.copy(), [getattr(nnx, name)(), getattr(nnx, name)()]
    for _ in range(20):
        optimizers[0].update([p], [g])
        optimizers[1].update([q], [g.astype(weights)])
    numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


# ---- errors -----------------------------------------------------------------------------------------


def masked(mask):
    return numpy.ma.array(numpy.ones(3), mask=mask)


def read_only():
    p = numpy.ones(3)
    p.flags.writeable = False
    return p


WRONG = {  # replacement for params[1] or grads[1], or the lists to pass
    "an integer gradient": ("grads", lambda: np.ones(3, int), TypeError, r"grads\[1\] must be .* floating dtype"),
    "no gradient": ("grads", lambda: None, TypeError, r"grads\[1\] must be .* got NoneType"),
    "a number": ("grads", lambda: 1.0, TypeError, r"grads\[1\] must be .* got float"),
    "another shape": ("grads", lambda: np.ones((3, 1)), ValueError, r"grads\[1\] must have the shape of params\[1\]"),
    "one that would broadcast": ("grads", lambda: np.ones(()), ValueError, r"grads\[1\] must have the shape"),
    "an integer parameter": ("params", lambda: np.ones(3, int), TypeError, r"params\[1\] must be .* floating dtype"),
    "a list": ("params", lambda: [1.0, 1, 1], TypeError, r"params\[1\] must be .* got list"),
}
if not nnx.GPU:
    WRONG |= {
        "a masked gradient": ("grads", lambda: masked([0, 1, 0]), TypeError, r"grads\[1\]: .* without a mask"),
        "a masked parameter": ("params", lambda: masked([0, 1, 0]), TypeError, r"params\[1\] must be a numpy array"),
        "a parameter with a mask": ("params", lambda: masked(False), TypeError, r"params\[1\] must be a numpy array"),
        "a matrix": ("params", lambda: np.ones((1, 3)).view(numpy.matrix), TypeError, r"params\[1\] must be .*matrix"),
        "a read-only parameter": ("params", read_only, ValueError, r"params\[1\] is read-only; .*copy\(\)"),
        "bytes of another order": ("params", lambda: np.ones(3, ">f8"), TypeError, r"params\[1\] must be"),
    }
SETTINGS = ["lr", "momentum", "decay_rate", "beta1", "beta2", "eps", "weight_decay"]


def everything(optimizer):
    """Return the state of an optimizer, with arrays as lists of numbers, and the arrays themselves."""
    held = {n: [to_cpu(a).tolist() for a in v] if isinstance(v, list) else v for n, v in vars(optimizer).items()}
    return held, [a for v in vars(optimizer).values() if isinstance(v, list) for a in v]


def assert_fails_and_changes_nothing(optimizer, params, grads, error, words):
    before, values = everything(optimizer), [to_cpu(p).tolist() if hasattr(p, "shape") else p for p in params]
    for call in (optimizer.check_update, optimizer.update):
        with pytest.raises(error, match=f"{type(optimizer).__name__}: {words}"):
            call(params, grads)
        after = everything(optimizer)
        assert after[0] == before[0]
        assert all(a is b for a, b in zip(after[1], before[1], strict=True))
        assert [to_cpu(p).tolist() if hasattr(p, "shape") else p for p in params] == values


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_of_invalid_arrays_changes_nothing(name, wrong, steps):
    which, make, error, words = WRONG[wrong]
    optimizer = OPTIMIZERS[name][0]()
    lists = {"params": [np.ones(2), np.ones(3)], "grads": [np.ones(2), np.ones(3)]}
    for _ in range(steps):
        optimizer.update(**lists)
    lists[which][1] = make()
    assert_fails_and_changes_nothing(optimizer, *lists.values(), error, words)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [None, "0.1", [0.1], 1j, np.ones(1)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_with_a_non_numeric_setting_changes_nothing(name, value, steps):
    for setting in SETTINGS:
        optimizer, params, grads = OPTIMIZERS[name][0](), [np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)]
        if hasattr(optimizer, setting):
            for _ in range(steps):
                optimizer.update(params, grads)
            setattr(optimizer, setting, value)
            assert_fails_and_changes_nothing(optimizer, params, grads, TypeError, f"{setting} must be a number, got")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("beta", [1, 1.5, -0.1, math.nan])
@pytest.mark.parametrize("setting", ["beta1", "beta2"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_update_with_an_invalid_beta_changes_nothing(name, setting, beta, steps):
    optimizer, p = OPTIMIZERS[name][0](), [np.ones(2)]
    for _ in range(steps):
        optimizer.update(p, [np.ones(2)])
    setattr(optimizer, setting, beta)
    assert_fails_and_changes_nothing(optimizer, p, [np.ones(2)], ValueError, rf"{setting} must be in \[0, 1\), got")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD"])
def test_failed_first_update_does_not_bind_the_parameters(name):
    optimizer = OPTIMIZERS[name][0]()
    optimizer.lr = None
    with pytest.raises(TypeError, match="lr must be a number"):
        optimizer.update([np.ones(2)], [np.ones(2)])
    optimizer.lr, p, q, same = 0.1, [np.ones(3)], [np.ones(3)], OPTIMIZERS[name][0](lr=0.1)
    optimizer.update(p, [np.ones(3)])
    same.update(q, [np.ones(3)])
    numpy.testing.assert_array_equal(to_cpu(p[0]), to_cpu(q[0]))


@pytest.mark.skipif(nnx.GPU, reason="NumPy's subclasses")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_ndarray_subclasses(name):
    steps = []
    for kind in (numpy.asarray, numpy.ma.array, lambda g: g.view(numpy.matrix)):
        p, g = np.ones((1, 3)), kind(np.array([[3.0, 0.0, 4.0]]))
        clip_grads([g], 1.0)
        numpy.testing.assert_allclose(numpy.asarray(g), [[0.6, 0, 0.8]], rtol=1e-6)
        for _ in range(2):
            OPTIMIZERS[name][0](lr=0.1).update([p], [g])
        steps.append(p.tolist())
    assert steps[0] == steps[1] == steps[2]


def test_sgd_accepts_a_learning_rate_of_any_number_type():
    for n in (4, 40_000):  # NumPy uses another code path
        p = np.zeros(n, "float32")
        nnx.SGD(numpy.uint8(1)).update([p], [np.ones(n, "float32")])
        assert (to_cpu(p) == -1).all()


def test_clip_grads_of_zeros():
    grads = [np.zeros(3, "float32")]
    clip_grads(grads, 1.0)
    assert (to_cpu(grads[0]) == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_keeps_the_settings(name, tmp_path):
    model, made, other = nnx.TwoLayerNet(2, 3, 2, rng=0), OPTIMIZERS[name][0](weight_decay=0.25), OPTIMIZERS[name][0]()
    if hasattr(made, "eps"):
        made.eps = 1e-3
    nnx.checkpoint.save(tmp_path / "a", model, made)
    nnx.checkpoint.load(tmp_path / "a", model, other)
    assert vars(other) == vars(made)
