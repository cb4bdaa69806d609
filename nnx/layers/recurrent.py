"""Recurrent layers, under the names of *Deep Learning from Scratch 2*: cells of one time step, and layers of T steps.

N rows, T time steps, D inputs, H hidden units, V words. xs is (N, T, D), hs (N, T, H). The products of all time steps
with Wx, and those for the gradients of Wx, Wh, b and xs, are one matrix product each; a time step is its product with
Wh and a kernel for its gates.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

import numpy

from nnx.arguments import format_repr
from nnx.checks import as_floating, check_bool, check_grad_output, check_weights
from nnx.device import quiet
from nnx.initializers import Initializer, draw_weight, xavier
from nnx.kernels import (
    affine,
    affine_grad,
    gru_gates,
    gru_gates_grad,
    gru_step,
    gru_step_grad,
    input_grad,
    lstm_step,
    lstm_step_grad,
    rnn_step,
    rnn_step_grad,
)
from nnx.layers.base import BaseLayer
from nnx.layers.dropout import Dropout
from nnx.layers.embedding import Embedding
from nnx.layers.linear import Affine
from nnx.layers.loss import SigmoidWithLoss, SoftmaxWithLoss
from nnx.np import Array, np
from nnx.rng import as_generator

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Simple_TimeAffine",
    "Simple_TimeSoftmaxWithLoss",
    "TimeAffine",
    "TimeBiLSTM",
    "TimeDropout",
    "TimeEmbedding",
    "TimeGRU",
    "TimeLSTM",
    "TimeRNN",
    "TimeSigmoidWithLoss",
    "TimeSoftmaxWithLoss",
]


class _Recurrent(BaseLayer):
    """Base class of the recurrent layers: their weights, and the pass over all time steps in either direction."""

    batch_names: tuple[str, ...] = ("xs", "gates", "h_prev", "dh")
    param_names = ("Wx", "Wh", "b")
    torch_names: ClassVar[dict[str, str]] = {"Wx": "weight_ih.T", "Wh": "weight_hh.T", "b": "bias_ih"}
    _blocks: ClassVar[int]  # of H columns in Wx, Wh and b, one for each gate
    _states: ClassVar[tuple[str, ...]] = ("h",)
    xs: Array  # (N, T, D), of the last forward
    gates: Array  # (N, T, _blocks * H), x Wx + b and then the outputs of the gates
    h_prev: Array  # (N, T, H), h before each step
    dh: Array | None = None  # (N, H), gradient of h before the first step

    def __init__(self, Wx: Array, Wh: Array, b: Array | None = None) -> None:
        name, weights = type(self).__name__, {"Wx": Wx, "Wh": Wh} | ({} if b is None else {"b": b})
        check_weights(name, **weights)
        H = len(Wh) if Wh.ndim else 0
        columns = self._blocks * H
        shapes = {"Wx": (*Wx.shape[:1], columns), "Wh": (H, columns), "b": (columns,)}
        if not H or any(w.shape != shapes[n] or w.dtype != Wx.dtype for n, w in weights.items()):
            wide = "H" if self._blocks == 1 else f"{self._blocks}H"
            raise ValueError(
                f"{name}: Wx, Wh and b must have shapes (D, {wide}), (H, {wide}) and ({wide},) and the same dtype, got "
                + ", ".join(f"{w.dtype} {w.shape}" for w in weights.values())
            )
        self.params = list(weights.values())
        self.grads = [np.zeros(w.shape, w.dtype) for w in self.params]

    @classmethod
    def init(
        cls,
        input_size: int,
        hidden_size: int,
        *,
        initializer: Initializer = xavier,
        dtype: Any = numpy.float32,
        rng: Any = None,
        **settings: Any,
    ) -> Self:
        """Return a layer with weights of `initializer`, drawn for one gate after the other, and a bias of zeros.

        `settings` are those of the constructor, such as `stateful`; the other options are those of `Affine.init`.
        """

        def draw(**sizes: int) -> Array:
            blocks = [draw_weight(f"{cls.__name__}.init", initializer, dtype, rng, **sizes) for _ in range(cls._blocks)]
            return np.concatenate(blocks, axis=1)

        rng = as_generator(rng)
        Wx = draw(input_size=input_size, hidden_size=hidden_size)
        Wh = draw(state_size=hidden_size, hidden_size=hidden_size)
        return cls(Wx, Wh, np.zeros(Wx.shape[1:], Wx.dtype), **settings)

    def __repr__(self) -> str:
        return format_repr(self, len(self.params[0]), len(self.params[1]))

    def _forward(self, xs: Any, *states: Any) -> Array:
        """Return hs for the initial `states` (N, H); None is a state of zeros."""
        name, (Wx, Wh, *b) = type(self).__name__, self.params
        xs = as_floating(xs, Wx.dtype, name)
        if xs.ndim != 3 or xs.shape[2] != len(Wx) or not xs.shape[1]:
            raise ValueError(
                f"{name}: xs must have shape (N, T, {len(Wx)}), with T at least 1, to match Wx {Wx.shape}, "
                f"got {xs.shape}"
            )
        N, T, D = xs.shape
        initial = [_as_state(name, *state, (N, len(Wh)), Wx.dtype) for state in zip(self._states, states, strict=True)]
        self.xs = xs
        self.gates = affine(xs.reshape(N * T, D), Wx, b[0] if b else None).reshape(N, T, Wx.shape[1])
        self.h_prev = np.empty((N, T, len(Wh)), Wx.dtype)
        self.h_prev[:, 0] = initial[0]
        return self._run(*initial[1:])

    def _backward(self, dhs: Any, *dstates: Any) -> Array:
        """Write the gradients; return that of xs. `dstates` are those of the last states other than h, None if 0."""
        Wx, (dWx, dWh, *db), (N, T, D) = self.params[0], self.grads, self.xs.shape
        dhs = np.ascontiguousarray(check_grad_output(self, dhs, self.h_prev.shape, Wx.dtype))
        da = np.empty((N, T, Wx.shape[1]), Wx.dtype)  # gradient of x Wx + h Wh + b
        self.dh = self._run_back(dhs, da, *dstates)
        rows = da.reshape(N * T, Wx.shape[1])
        affine_grad(self.xs.reshape(N * T, D), rows, dWx, db[0] if db else None)
        self._write_dWh(rows, dWh)
        return input_grad(rows, Wx).reshape(N, T, D)

    def _write_dWh(self, rows: Array, dWh: Array) -> None:
        affine_grad(self.h_prev.reshape(len(rows), len(dWh)), rows, dWh, None)

    def _run(self) -> Array:
        """Run all time steps; return hs."""
        raise NotImplementedError

    def _run_back(self, dhs: Array, da: Array) -> Array:
        """Write `da` of all time steps, the last one first; return the gradient of the first h."""
        raise NotImplementedError

    def _zeros(self) -> Array:
        """Return a state, or a gradient of one, of zeros (N, H)."""
        return np.zeros((len(self.h_prev), self.h_prev.shape[2]), self.h_prev.dtype)


def _as_state(name: str, what: str, state: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """Return `state` as an array of the dtype; zeros for None."""
    if state is None:
        return np.zeros(shape, dtype)
    state = as_floating(state, dtype, name)
    if state.shape != shape:
        raise ValueError(
            f"{name}: the state {what} must have shape {shape}, got {state.shape}"
            + ("; call reset_state() before a batch of another size" if state.shape[1:] == shape[1:] else "")
        )
    return state


# ---- the steps of each kind -------------------------------------------------------------------------


class _RNN(_Recurrent):
    torch_gates = (0,)
    _blocks = 1

    def _run(self) -> Array:
        hs, h_prev, Wh = self.gates, self.h_prev, self.params[1]
        for t in range(hs.shape[1]):
            rnn_step(hs, affine(h_prev[:, t], Wh, None), h_prev, t)
        return hs

    def _run_back(self, dhs: Array, da: Array) -> Array:
        dh, Wh = self._zeros(), self.params[1]
        for t in reversed(range(dhs.shape[1])):
            rnn_step_grad(self.gates, dhs, dh, da, t)
            dh = input_grad(da[:, t], Wh)
        return dh


class _LSTM(_Recurrent):
    batch_names = (*_Recurrent.batch_names, "cs", "dc")
    torch_gates = (2, 0, 1, 3)  # i, f, g, o
    _blocks = 4
    _states = ("h", "c")
    cs: Array  # (N, T + 1, H), c before the first and after each step
    dc: Array | None = None  # (N, H), gradient of c before the first step

    def _run(self, c: Any = 0) -> Array:
        gates, h_prev, Wh = self.gates, self.h_prev, self.params[1]
        N, T, H = h_prev.shape
        self.cs, hs = np.empty((N, T + 1, H), gates.dtype), np.empty((N, T, H), gates.dtype)
        self.cs[:, 0] = c
        for t in range(T):
            lstm_step(gates, affine(h_prev[:, t], Wh, None), self.cs, h_prev, hs, t)
        return hs

    def _run_back(self, dhs: Array, da: Array, dc: Any = None) -> Array:
        dh, Wh = self._zeros(), self.params[1]
        self.dc = _as_state(type(self).__name__, "dc", dc, dh.shape, dh.dtype).copy()  # the steps overwrite it
        for t in reversed(range(dhs.shape[1])):
            lstm_step_grad(self.gates, self.cs, dhs, dh, self.dc, da, t)
            dh = input_grad(da[:, t], Wh)
        return dh


class _GRU(_Recurrent):
    batch_names = (*_Recurrent.batch_names, "reset")
    torch_difference = "PyTorch's GRU applies the reset gate after the product with Wh, not before it"
    _blocks = 3
    reset: Array  # (N, T, H), r * h_prev

    def _run(self) -> Array:
        gates, h_prev, (of_gates, of_reset) = self.gates, self.h_prev, self._split(self.params[1])
        self.reset, hs = np.empty(h_prev.shape, gates.dtype), np.empty(h_prev.shape, gates.dtype)
        for t in range(hs.shape[1]):
            gru_gates(gates, affine(h_prev[:, t], of_gates, None), h_prev, self.reset, t)
            gru_step(gates, affine(self.reset[:, t], of_reset, None), h_prev, hs, t)
        return hs

    @quiet
    def _run_back(self, dhs: Array, da: Array) -> Array:
        gates, h_prev, (of_gates, of_reset) = self.gates, self.h_prev, self._split(self.params[1])
        dgates, dcandidate = self._split(da)
        dh, product = self._zeros(), self._zeros()  # the gradient of h is their sum
        for t in reversed(range(dhs.shape[1])):
            gru_step_grad(gates, h_prev, dhs, dh, product, da, t)
            gru_gates_grad(gates, h_prev, input_grad(dcandidate[:, t], of_reset), dh, da, t)
            product = input_grad(dgates[:, t], of_gates)
        return dh + product

    def _write_dWh(self, rows: Array, dWh: Array) -> None:
        for h, da, out in zip((self.h_prev, self.reset), self._split(rows), self._split(dWh), strict=True):
            affine_grad(h.reshape(len(rows), len(dWh)), da, out, None)

    def _split(self, a: Array) -> tuple[Array, Array]:
        """Return the columns of the gates z and r, and those of the candidate state."""
        columns = 2 * len(self.params[1])
        return a[..., :columns], a[..., columns:]


# ---- cells ------------------------------------------------------------------------------------------


class _Cell(_Recurrent):
    def forward(self, x: Any, h_prev: Any) -> Array:
        """Return h of this step."""
        return self._forward(_as_step(self, x), h_prev)[:, 0]

    def backward(self, dh_next: Any) -> tuple[Array, Array | None]:
        """Write the gradients of the weights; return those of x and h_prev."""
        return self._backward(_as_step(self, dh_next))[:, 0], self.dh


def _as_step(layer: _Recurrent, x: Any) -> Array:
    """Return `x` (N, D) as (N, 1, D)."""
    x = as_floating(x, layer.params[0].dtype, type(layer).__name__)
    if x.ndim != 2:
        raise ValueError(f"{type(layer).__name__}: expected an array of one time step, with two axes, got {x.shape}")
    return x[:, None]


class RNN(_RNN, _Cell):
    """One time step of a recurrent network: h = tanh(x @ Wx + h_prev @ Wh + b).

    Parameters
    ----------
    Wx : (D, H)
    Wh : (H, H)
    b : (H,) or None
        Floating arrays of the array module, of one dtype, in which the layer computes. They are used as `params`
        without a copy. None is no bias.

    Shapes
    ------
    x : (N, D)    h_prev, h : (N, H)

    Raises
    ------
    TypeError
        If a weight is not a floating array of the array module.
    ValueError
        If shapes or dtypes do not match.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import RNN
    >>> rnn = RNN(np.ones((1, 1)), np.ones((1, 1)), np.zeros(1))
    >>> h = rnn.forward([[0.5]], [[0.0]])
    >>> print(h.round(3), rnn.forward([[0.5]], h).round(3))
    [[0.462]] [[0.745]]
    """


class LSTM(_LSTM):
    """One time step of an LSTM: c = f * c_prev + g * i, h = o * tanh(c).

    f, i and o are the sigmoid, and g the tanh, of a quarter of the columns of x @ Wx + h_prev @ Wh + b, in the order
    f, g, i, o.

    Parameters
    ----------
    Wx : (D, 4H)
    Wh : (H, 4H)
    b : (4H,) or None
        As for `RNN`.

    Shapes
    ------
    x : (N, D)    h_prev, c_prev, h, c : (N, H)

    References
    ----------
    Hochreiter and Schmidhuber, "Long short-term memory", 1997.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import LSTM
    >>> lstm = LSTM.init(3, 4, rng=0)
    >>> h, c = lstm.forward(np.ones((2, 3)), np.zeros((2, 4)), np.zeros((2, 4)))
    >>> h.shape, c.shape
    ((2, 4), (2, 4))
    """

    def forward(self, x: Any, h_prev: Any, c_prev: Any) -> tuple[Array, Array]:
        """Return h and c of this step."""
        return self._forward(_as_step(self, x), h_prev, c_prev)[:, 0], self.cs[:, 1]

    def backward(self, dh_next: Any, dc_next: Any) -> tuple[Array, Array | None, Array | None]:
        """Write the gradients of the weights; return those of x, h_prev and c_prev."""
        return self._backward(_as_step(self, dh_next), dc_next)[:, 0], self.dh, self.dc


class GRU(_GRU, _Cell):
    """One time step of a GRU: h = (1 - z) * h_prev + z * k.

    The gates z and r are the sigmoid of x @ Wx + h_prev @ Wh + b in the first two thirds of the columns; the candidate
    k is tanh(x @ Wx + (r * h_prev) @ Wh + b) in the last. In PyTorch's GRU, r multiplies the product with Wh instead
    (with a bias of its own), and z and 1 - z are exchanged.

    Parameters
    ----------
    Wx : (D, 3H)
    Wh : (H, 3H)
    b : (3H,) or None
        As for `RNN`.

    Shapes
    ------
    x : (N, D)    h_prev, h : (N, H)

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", 2014.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import GRU
    >>> gru = GRU.init(3, 4, rng=0)
    >>> gru.forward(np.ones((2, 3)), np.zeros((2, 4))).shape
    (2, 4)
    """


# ---- layers of T time steps -------------------------------------------------------------------------


class _TimeRecurrent(_Recurrent):
    """All time steps of a recurrent layer, and the state that it keeps for the next batch."""

    state_names = ("state",)
    torch_names: ClassVar[dict[str, str]] = {"Wx": "weight_ih_l0.T", "Wh": "weight_hh_l0.T", "b": "bias_ih_l0"}
    h: Array | None = None

    def __init__(self, Wx: Array, Wh: Array, b: Array | None = None, stateful: bool = False) -> None:
        super().__init__(Wx, Wh, b)
        self.stateful = check_bool(f"{type(self).__name__}: stateful", stateful)

    def forward(self, xs: Any) -> Array:
        """Return hs, the states h of all steps; if stateful, starting from the state of the last call."""
        hs = self._forward(xs, *(getattr(self, name) if self.stateful else None for name in self._states))
        self.h = hs[:, -1].copy()
        return hs

    def backward(self, dhs: Any) -> Array:
        """Write the gradients of the weights and of the initial state, `dh`; return that of xs."""
        return self._backward(dhs, *[None] * (len(self._states) - 1))

    def set_state(self, h: Any) -> None:
        """Let the next forward of a stateful layer start from `h` (N, H)."""
        self.h = h

    def reset_state(self) -> None:
        """Let the next forward start from zeros."""
        for name in self._states:
            setattr(self, name, None)

    @property
    def state(self) -> list[Array | None]:
        """What a stateful layer continues from, for checkpoints; an empty list for other layers."""
        return [getattr(self, name) for name in self._states] if self.stateful else []

    @state.setter
    def state(self, state: list[Array | None]) -> None:
        for name, value in zip(self._states, state, strict=False):
            setattr(self, name, value)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the layer can continue from `state`."""
        values, H = state["state"], len(self.params[1])
        if len(values) != len(self.state) or any(v is not None and v.shape[1:] != (H,) for v in values):
            raise ValueError(
                f"state must hold {' and '.join(self._states) if self.stateful else 'nothing'}, (N, {H}) or None, got "
                f"{[getattr(v, 'shape', v) for v in values]}"
            )


class TimeRNN(_RNN, _TimeRecurrent):
    """`RNN` over T time steps: h[t] = tanh(xs[t] @ Wx + h[t - 1] @ Wh + b).

    Parameters
    ----------
    Wx, Wh, b
        As for `RNN`.
    stateful : bool
        True starts each forward from the last state of the one before (truncated backpropagation through time), False
        from zeros.

    Shapes
    ------
    xs : (N, T, D)    hs, dhs : (N, T, H)

    Attributes
    ----------
    h : (N, H) or None
        The last state of the last forward. It is part of the state in checkpoints if the layer is stateful.
    dh : (N, H) or None
        The gradient of the state that the last forward started from.

    Raises
    ------
    TypeError, ValueError
        As for `RNN`; a ValueError if the kept state is of another batch size: call `reset_state`.

    Notes
    -----
    `Sequential.predict` starts from the kept state and leaves it as it was.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeRNN
    >>> rnn = TimeRNN(np.ones((1, 1)), np.ones((1, 1)), np.zeros(1))
    >>> print(rnn.forward([[[0.5], [0.5], [0.5]]]).round(3).squeeze())
    [0.462 0.745 0.847]
    >>> print(rnn.backward(np.ones((1, 3, 1))).round(3).squeeze())
    [1.235 0.57  0.283]
    """


class TimeLSTM(_LSTM, _TimeRecurrent):
    """`LSTM` over T time steps.

    Parameters
    ----------
    Wx, Wh, b
        As for `LSTM`.
    stateful : bool
        As for `TimeRNN`.

    Shapes
    ------
    xs : (N, T, D)    hs, dhs : (N, T, H)

    Attributes
    ----------
    h, c : (N, H) or None
        The last states of the last forward, as for `TimeRNN`.
    dh, dc : (N, H) or None
        The gradients of the states that the last forward started from.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeLSTM
    >>> lstm = TimeLSTM.init(3, 4, rng=0, stateful=True)
    >>> lstm.forward(np.ones((2, 5, 3))).shape
    (2, 5, 4)
    >>> lstm.h.shape, lstm.c.shape  # the next forward starts from these
    ((2, 4), (2, 4))
    >>> lstm.reset_state()
    """

    c: Array | None = None

    def forward(self, xs: Any) -> Array:
        """Return hs, the states h of all steps; if stateful, starting from the states of the last call."""
        hs = super().forward(xs)
        self.c = self.cs[:, -1].copy()
        return hs

    def set_state(self, h: Any, c: Any = None) -> None:
        """Let the next forward of a stateful layer start from `h` and `c` (N, H), or from c = 0."""
        self.h, self.c = h, c


class TimeGRU(_GRU, _TimeRecurrent):
    """`GRU` over T time steps.

    Parameters
    ----------
    Wx, Wh, b
        As for `GRU`.
    stateful : bool
        As for `TimeRNN`, as are the attributes `h` and `dh`.

    Shapes
    ------
    xs : (N, T, D)    hs, dhs : (N, T, H)

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeGRU
    >>> gru = TimeGRU.init(3, 4, rng=0)
    >>> gru.forward(np.ones((2, 5, 3))).shape
    (2, 5, 4)
    """


class TimeBiLSTM(BaseLayer):
    """Two `TimeLSTM`, one over the time steps in order and one from the last to the first, side by side.

    Parameters
    ----------
    Wx1, Wh1, b1 : weights of the LSTM that runs forward
    Wx2, Wh2, b2 : weights of the one that runs backward
    stateful : bool
        As for `TimeRNN`, for both.

    Shapes
    ------
    xs : (N, T, D)    hs, dhs : (N, T, 2H)

    Attributes
    ----------
    forward_lstm, backward_lstm : TimeLSTM

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeBiLSTM, TimeLSTM
    >>> first, second = TimeLSTM.init(3, 4, rng=0), TimeLSTM.init(3, 4, rng=1)
    >>> TimeBiLSTM(*first.params, *second.params).forward(np.ones((2, 5, 3))).shape
    (2, 5, 8)
    """

    param_names = ("Wx1", "Wh1", "b1", "Wx2", "Wh2", "b2")
    torch_names: ClassVar[dict[str, str]] = {
        **{f"forward_lstm.{name}": torch_name for name, torch_name in TimeLSTM.torch_names.items()},
        "backward_lstm.Wx": "weight_ih_l0_reverse.T",
        "backward_lstm.Wh": "weight_hh_l0_reverse.T",
        "backward_lstm.b": "bias_ih_l0_reverse",
    }
    torch_gates = TimeLSTM.torch_gates

    def __init__(
        self, Wx1: Array, Wh1: Array, b1: Array, Wx2: Array, Wh2: Array, b2: Array, stateful: bool = False
    ) -> None:
        check_weights("TimeBiLSTM", b1=b1, b2=b2)
        self.forward_lstm, self.backward_lstm = TimeLSTM(Wx1, Wh1, b1, stateful), TimeLSTM(Wx2, Wh2, b2, stateful)
        if len(Wx1) != len(Wx2) or Wx1.dtype != Wx2.dtype:
            raise ValueError(
                f"TimeBiLSTM: Wx1 and Wx2 must have the same dtype and number of rows, got {Wx1.dtype} {Wx1.shape} and "
                f"{Wx2.dtype} {Wx2.shape}"
            )
        self.params = [*self.forward_lstm.params, *self.backward_lstm.params]
        self.grads = [*self.forward_lstm.grads, *self.backward_lstm.grads]

    @property
    def stateful(self) -> bool:
        """Whether each forward starts from the last states of the one before."""
        return self.forward_lstm.stateful

    def __repr__(self) -> str:
        return format_repr(self, len(self.params[0]), len(self.params[1]))

    def forward(self, xs: Any) -> Array:
        """Return the states h of both, concatenated."""
        return self._both(self.forward_lstm, self.backward_lstm, xs)

    def predict(self, xs: Any) -> Array:
        """Return the same without keeping anything."""
        return self._both(copy.copy(self.forward_lstm), copy.copy(self.backward_lstm), xs)

    def _both(self, first: TimeLSTM, second: TimeLSTM, xs: Any) -> Array:
        xs = as_floating(xs, self.params[0].dtype, "TimeBiLSTM")
        hs = first.forward(xs)  # checks xs
        return np.concatenate((hs, second.forward(xs[:, ::-1])[:, ::-1]), axis=2)

    @quiet
    def backward(self, dhs: Any) -> Array:
        """Write the gradients of all weights; return that of xs."""
        (N, T, H), width = self.forward_lstm.h_prev.shape, self.backward_lstm.h_prev.shape[2]
        dhs = check_grad_output(self, dhs, (N, T, H + width), self.params[0].dtype)
        dxs = self.forward_lstm.backward(dhs[:, :, :H])
        dxs += self.backward_lstm.backward(dhs[:, ::-1, H:])[:, ::-1]
        return dxs

    def reset_state(self) -> None:
        """Let the next forward start from zeros."""
        self.forward_lstm.reset_state()
        self.backward_lstm.reset_state()


# ---- other layers of T time steps: those for any number of leading axes, under the book's names -------


class TimeEmbedding(Embedding):
    """`Embedding` at every time step: y = W[idx], idx (N, T), y (N, T, H).

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeEmbedding
    >>> TimeEmbedding(np.ones((10, 3))).forward([[1, 2, 3, 4], [5, 6, 7, 8]]).shape
    (2, 4, 3)
    """


class TimeAffine(Affine):
    """`Affine` at every time step: y = x @ W + b, x (N, T, D), y (N, T, H).

    W may be the transposed view of another layer's weight, as `TimeAffine(W_embed.T, b)`: an update of one is one of
    both.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeAffine
    >>> affine = TimeAffine(np.ones((3, 4)), np.zeros(4))
    >>> affine.forward(np.ones((2, 5, 3))).shape  # 2 rows, 5 time steps
    (2, 5, 4)
    >>> affine.backward(np.ones((2, 5, 4))).shape
    (2, 5, 3)
    """


class Simple_TimeAffine(Affine):
    """The same as `TimeAffine`.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import Simple_TimeAffine
    >>> Simple_TimeAffine(np.ones((3, 4)), np.zeros(4)).forward(np.ones((2, 5, 3))).shape
    (2, 5, 4)
    """


class TimeSoftmaxWithLoss(SoftmaxWithLoss):
    """`SoftmaxWithLoss` over all time steps, without those whose label is -1.

    The loss is the mean over the labels that are kept, 0 if there are none; ignored scores have no gradient, whatever
    their values.

    Parameters
    ----------
    class_weight, ignore_label
        As for `SoftmaxWithLoss`.

    Shapes
    ------
    x : (N, T, V)    t : (N, T) integers in [0, V) or -1, or (N, T, V) one-hot

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeSoftmaxWithLoss
    >>> loss_layer = TimeSoftmaxWithLoss()
    >>> loss = loss_layer.forward(np.zeros((2, 3, 4)), [[0, 1, -1], [3, -1, -1]])
    >>> print(f"{float(loss):.4f}")  # log(4), the mean over three labels
    1.3863
    """

    def __init__(self, class_weight: Any = None, ignore_label: int | None = -1) -> None:
        super().__init__(class_weight, ignore_label)


class Simple_TimeSoftmaxWithLoss(SoftmaxWithLoss):
    """`SoftmaxWithLoss` over all time steps, x (N, T, V), t (N, T); no label is ignored.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import Simple_TimeSoftmaxWithLoss
    >>> loss = Simple_TimeSoftmaxWithLoss().forward(np.zeros((2, 3, 4)), [[0, 1, 2], [3, 0, 1]])
    >>> print(f"{float(loss):.4f}")  # log(4)
    1.3863
    """


class TimeSigmoidWithLoss(SigmoidWithLoss):
    """`SigmoidWithLoss` over all time steps, x and t (N, T).

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeSigmoidWithLoss
    >>> print(f"{float(TimeSigmoidWithLoss().forward(np.zeros((2, 3)), [[0, 1, 1], [1, 0, 0]])):.4f}")  # log(2)
    0.6931
    """


class TimeDropout(Dropout):
    """Zeroes each element with probability `dropout_ratio` in training: y = x * mask / (1 - dropout_ratio).

    Other than in `Dropout`, the elements that are kept are scaled in training; in inference y = x.

    Parameters
    ----------
    dropout_ratio, rng
        As for `Dropout`.

    Attributes
    ----------
    train_flg : bool
        The mode of a forward without the argument of that name; True at first. The book's models assign it.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeDropout
    >>> print(TimeDropout(0.5, rng=0).forward(np.ones((1, 2, 3))))
    [[[0. 2. 0.]
      [2. 0. 0.]]]
    """

    def __init__(self, dropout_ratio: float = 0.5, *, rng: Any = None) -> None:
        super().__init__(dropout_ratio, rng=rng)
        self.train_flg = True

    def forward(self, x: Any, train_flg: bool | None = None) -> Array:
        """Return x * mask / (1 - dropout_ratio) with a new mask, or a copy of x in inference."""
        return self._forward(x, self.train_flg if train_flg is None else train_flg)

    def _scale(self) -> float:
        return 1 / (1 - self._ratio) if self._training else 1
