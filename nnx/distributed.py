"""Data-parallel training in several processes: `comm = init()`, on MPI through mpi4py, with NCCL between GPUs.

Each of R processes, the ranks, holds the whole model, computes the gradients of its rows of a batch,
and takes the same step with the sum over all ranks. `Trainer(..., comm=comm)` does so; in a custom
training loop::

    comm = nnx.distributed.init()  # first, before the data and the model
    comm.broadcast(model.params)
    for x, t in batches:  # the same on every rank, of at least as many rows as there are ranks
        part = comm.shard(len(x))
        model.forward(x[part], t[part])
        model.backward()
        comm.allreduce_gradients(model.grads, len(x[part]) / len(x))
        optimizer.update(model.params, model.grads)

Start with `mpiexec -n 4 python -m mpi4py train.py`. Without `-m mpi4py` the job hangs if a rank exits by sys.exit
while the others wait in their own calls on `comm.mpi` (all other failures end the job either way), and only the
launchers of MPICH, Intel, Open MPI, Slurm and PyTorch are detected. MPICH itself reports success for a rank that
ends by `os._exit(0)`, and ends the others.

Only gradients are summed. BatchNorm statistics are computed from each rank's own rows and are not synchronized.
Dropout masks are drawn on each rank: layers with the same seed draw the same masks on every rank.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy

from nnx.device import (
    address,
    asarray,
    bus_id,
    current_stream_ptr,
    empty_pinned_like,
    nccl,
    quiet,
    set_device,
    synchronize,
    to_cpu,
)
from nnx.np import Array, np
from nnx.signals import SIGNALS

__all__ = ["Comm", "init"]

# Environment variables with the number of ranks: MPICH and Intel, Open MPI, srun, torchrun.
_LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")
_MAX_PLANS = 4  # models trained alternately whose buffers are kept
Stops: TypeAlias = tuple[int, bool]  # the pending signal or 0, and whether to stop after the epoch
_ABORT_TIMEOUT = 5  # seconds that a failed rank leaves the others to save their state


def init(cuda_aware: bool = False) -> Comm:
    """Join the ranks started by a launcher such as mpiexec, and return their communicator.

    Call it first: it selects the GPU by the local rank, limits BLAS to this rank's share of the cores, and
    aborts the job if from then on a rank fails, or exits while others wait for it; MPICH does not abort the
    job if a rank fails before init(). Without a launcher there is one rank, and nothing is imported. Later
    calls return the same object.

    Parameters
    ----------
    cuda_aware : bool
        If True, pass CuPy arrays directly to MPI, which crashes unless MPI was built for CUDA. By default they
        are sent by NCCL if it is installed and no two ranks share a GPU, and otherwise through host memory.

    Raises
    ------
    ImportError
        If there is a launcher, but mpi4py is not installed.
    RuntimeError
        If no MPI library can be loaded, or if the launcher reports several ranks and MPI only one.

    Examples
    --------
    >>> import nnx
    >>> comm = nnx.distributed.init()
    >>> comm.rank, comm.size  # without mpiexec
    (0, 1)
    """
    if not _instance:
        _instance.append(_connect(cuda_aware))
    return _instance[0]


_instance: list[Comm] = []


def _connect(cuda_aware: bool) -> Comm:
    counts = {name: os.environ.get(name, "") for name in _LAUNCHERS}
    reported = next((f"{v} ranks ({k}={v})" for k, v in counts.items() if v.isdecimal() and int(v) > 1), "no ranks")
    imported = {"mpi4py.run", "mpi4py.MPI"} & sys.modules.keys()  # by `python -m mpi4py`, or by the script
    if reported == "no ranks" and not imported:
        return Comm()
    try:
        MPI: Any = importlib.import_module("mpi4py.MPI")
        threads: Any = importlib.import_module("threadpoolctl")
    except ImportError as error:
        raise ImportError(
            f"nnx.distributed: the launcher reports {reported}, but {error.name} cannot be imported: "
            "pip install mpi4py threadpoolctl"
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"nnx.distributed: the launcher reports {reported}, but mpi4py finds no MPI library ({error}): load the "
            "MPI module of your cluster, or on your own machine pip install mpich"
        ) from error
    if MPI.COMM_WORLD.size == 1:
        if reported == "no ranks":
            return Comm()
        version = " ".join(MPI.Get_library_version().split()).partition(",")[0]
        raise RuntimeError(
            f"nnx.distributed: the launcher reports {reported}, but MPI reports 1: mpi4py has loaded "
            f"{version:.40}, which does not belong to this launcher; start with the "
            "mpiexec of that MPI (under Slurm srun --mpi=...), or set MPI4PY_LIBMPI to the launcher's library"
        )
    return _MPIComm(MPI, threads, cuda_aware)


class Comm:
    """One rank, on which communication does nothing; `init` returns its subclass for several ranks.

    All methods except `shard` are collective: every rank must call them, in the same order.

    Attributes
    ----------
    rank, size : int
        The index of this process, and the number of ranks that train together.
    local_rank, local_size : int
        The same among the ranks on this machine.
    mpi : mpi4py.MPI.Comm or None
        The MPI communicator of all ranks, for custom calls; None if there is only one rank.

    Examples
    --------
    >>> from nnx.distributed import Comm
    >>> comm = Comm()  # a single process; `init` returns the one of several
    >>> comm.rank, comm.size, comm.shard(100), comm.all_sum(1.5)
    (0, 1, slice(0, 100, None), 1.5)
    """

    rank = local_rank = 0
    size = local_size = 1
    mpi: Any = None

    def shard(self, n: int) -> slice:
        """Return this rank's slice of `n` rows; the sizes differ by at most one row, the larger slices first."""
        rows, remainder = divmod(n, self.size)
        start = self.rank * rows + min(self.rank, remainder)
        return slice(start, start + rows + (self.rank < remainder))

    def broadcast(self, arrays: Iterable[Array]) -> None:
        """Copy the arrays of rank 0, on the host or the device, into those of the other ranks.

        Raises
        ------
        ValueError
            On all ranks, if the number, shapes or dtypes of the arrays differ; it names a differing rank.
        """

    def allreduce_gradients(self, grads: Iterable[Array], share: float) -> None:
        """Replace the gradients of this rank's rows, in place, by those of the whole batch: the sum of grads * share.

        The result is bitwise identical on all ranks.

        Parameters
        ----------
        grads : arrays of the same shapes and dtypes on all ranks
            The gradients of a loss that is a mean over rows.
        share : float
            This rank's fraction of the rows of the batch. A rank without rows passes 0; its `grads` are not read.
        """

    def allreduce(self, grads: Iterable[Array], share: float, *scalars: Any) -> tuple[list[Array], list[float]]:
        """Return the results of `allreduce_gradients`, and the sums of `scalars`, with one all-reduce per dtype.

        The returned gradients are views of a buffer that the next call overwrites, which saves a copy; only float16,
        which is summed in float32, is written into `grads` and returned from there. The scalars are summed in the
        widest dtype of the gradients; on the GPU the call waits for them.
        """
        return list(grads), [float(s) for s in scalars]

    def all_sum(self, *scalars: Any) -> Any:
        """Return the sum of each scalar over all ranks, in float64: a number, or a list for several scalars."""
        return float(scalars[0]) if len(scalars) == 1 else [float(s) for s in scalars]

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""

    def main_process_first(self, function: Callable[[], Any]) -> Any:
        """Run `function`, such as a download, on rank 0 first, then on the other ranks; return its result."""
        return function()

    def assert_equal_on_ranks(self, what: str, **values: Any) -> None:
        """Raise a ValueError on all ranks unless `values` are equal on all of them; `what` starts the message."""

    def reduce_step(
        self, grads: list[Array], loss: Any, part: int, rows: int, loss_layer: Any, stops: Stops
    ) -> tuple[list[Array], Any, Stops]:
        """Return the gradients and the loss of a whole batch of `rows` rows, of which this rank has `part`.

        With `loss_layer`, not None if rows have weights, each rank counts by the weights of its rows.
        With them the ranks agree on `stops`: the signal to deliver, and whether to stop after the epoch.
        """
        return grads, loss, stops

    def exchange_stops(self, stops: Stops) -> Stops:
        """Return the signal and the stop request that any rank has."""
        return stops

    def agreed_signal(self, agreed: int, pending: int) -> int:
        """Return the signal to deliver now: of one rank the pending one, of several the one they have agreed on."""
        return pending

    def __repr__(self) -> str:
        return "Comm(rank 0 of 1)"


class _MPIComm(Comm):
    """Several ranks, joined by MPI."""

    def __init__(self, MPI: Any, threads: Any, cuda_aware: bool = False) -> None:
        self.cuda_aware = cuda_aware
        self._MPI, self.mpi = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.mpi.rank, self.mpi.size
        local = self.mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        self._plans: dict[Any, tuple[list[Array], list[_Bucket]]] = {}
        self._collectives_started, self._window = _rma_counter(MPI)
        self._ending = self.mpi.Dup()  # a separate communicator, so that no other collective call interferes
        self._failed = False
        self._except = sys.excepthook
        sys.excepthook = self._excepthook
        atexit.register(self._shutdown)
        # MPI calls this at the start of a Finalize in the script; that of mpi4py at exit comes after Python has ended
        key = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, value: self._shutdown())
        MPI.COMM_SELF.Set_attr(key, None)
        hosts = self.mpi.gather(f"{MPI.Get_processor_name()}:{os.getpid()}")
        if hosts:  # a launcher reports a killed process by its pid, not by its rank
            sys.stderr.write(f"nnx: ranks 0 to {self.size - 1} are the processes {', '.join(hosts)}\n")
        self.assert_equal_on_ranks("nnx.distributed", **{"the array module": np.__name__})

        set_device(self.local_rank)
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}
        sharers = sum(not cores.isdisjoint(others) for others in local.allgather(cores))
        share = max(1, len(cores) // sharers)
        threads.threadpool_limits(min([share, *(pool["num_threads"] for pool in threads.threadpool_info())]))

        library = None if cuda_aware else nccl()
        bus_ids = local.allgather(bus_id())
        usable = self.mpi.allreduce(library is not None and len({*bus_ids}) == len(bus_ids), MPI.LAND)
        self._nccl = _Nccl(library, self.mpi) if usable else None

    def broadcast(self, arrays: Iterable[Array]) -> None:
        arrays = list(arrays)
        layout = {f"array {i}": f"{a.shape} {a.dtype}" for i, a in enumerate(arrays)}
        self.assert_equal_on_ranks("Comm.broadcast", **{"the number of arrays": len(arrays)}, **layout)
        for a in arrays:
            host = numpy.array(to_cpu(a), order="C")
            self._collectives_started += 1
            self.mpi.Bcast(host.reshape(-1).view(numpy.uint8))
            if self.rank > 0:
                a[...] = host if isinstance(a, numpy.ndarray) else asarray(host)

    def allreduce_gradients(self, grads: Iterable[Array], share: float) -> None:
        grads = list(grads)
        for g, mean in zip(grads, self.allreduce(grads, share)[0], strict=True):
            if mean is not g:
                g[...] = mean

    def allreduce(self, grads: Iterable[Array], share: float, *scalars: Any) -> tuple[list[Array], list[float]]:
        grads = list(grads)
        layout = (tuple((g.shape, g.dtype) for g in grads), len(scalars))
        if layout not in self._plans:
            if len(self._plans) == _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[layout] = _make_buckets(grads, len(scalars), pin=not self.cuda_aware and self._nccl is None)
        views, buckets = self._plans[layout]
        for g, view in zip(grads, views, strict=True):
            _scale(g, share, view)
        for i, scalar in enumerate(scalars):
            buckets[-1].device[i - len(scalars)] = scalar
        self._collectives_started += 1
        for bucket in buckets:
            self._allreduce(bucket)
        sums = to_cpu(buckets[-1].host[len(buckets[-1].host) - len(scalars) :]).tolist() if scalars else []
        for g, view in zip(grads, views, strict=True):
            if g.dtype != view.dtype:
                g[...] = view
        return [v if g.dtype == v.dtype else g for g, v in zip(grads, views, strict=True)], sums

    def all_sum(self, *scalars: Any) -> Any:
        total = numpy.array([float(s) for s in scalars])
        self._collectives_started += 1
        self.mpi.Allreduce(self._MPI.IN_PLACE, total)
        return total.item() if len(scalars) == 1 else total.tolist()

    def barrier(self) -> None:
        self._collectives_started += 1
        self.mpi.Barrier()

    def main_process_first(self, function: Callable[[], Any]) -> Any:
        if self.rank > 0:
            self.barrier()
        try:
            return function()
        finally:
            if self.rank == 0:
                self.barrier()

    def assert_equal_on_ranks(self, what: str, **values: Any) -> None:
        self._collectives_started += 1
        first, *others = self.mpi.allgather(values)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"{what}: {name} must be the same on all ranks, but is {value} on rank 0 "
                        f"and {other[name]} on rank {rank}"
                    )

    def reduce_step(
        self, grads: list[Array], loss: Any, part: int, rows: int, loss_layer: Any, stops: Stops
    ) -> tuple[list[Array], Any, Stops]:
        share = part / rows
        if loss_layer is not None:
            weight = float(loss_layer.weight_sum) if part else 0.0
            share = weight / (self.all_sum(weight) or 1.0)
        grads, (loss, *flags) = self.allreduce(grads, share, loss * share, *_stop_flags(stops))
        return grads, loss, _stops(flags)

    def exchange_stops(self, stops: Stops) -> Stops:
        return _stops(self.all_sum(*_stop_flags(stops)))

    def agreed_signal(self, agreed: int, pending: int) -> int:
        return agreed

    def __reduce__(self) -> Any:  # a copy, for example with a Trainer, refers to the same ranks
        return init, ()

    def __repr__(self) -> str:
        backend = "MPI" if self._nccl is None else "NCCL"
        return (
            f"Comm(rank {self.rank} of {self.size}, {self.local_rank} of {self.local_size} on this machine, {backend})"
        )

    def _allreduce(self, bucket: _Bucket) -> None:
        """Sum a buffer over all ranks, in place."""
        device, host = bucket
        if self._nccl is not None:
            self._nccl.sum(device)
            return
        if host is not device:
            device.get(out=host)
        synchronize()
        self.mpi.Allreduce(self._MPI.IN_PLACE, host)
        if host is not device:
            device.set(host)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print an uncaught exception with the rank that raised it; `_shutdown` runs after it.

        In one write, so that the output of ranks does not mix. Only rank 0 prints the traceback of Ctrl-C, sent to all.
        """
        self._failed = True
        with contextlib.redirect_stderr(io.StringIO()) as text:
            if self.rank == 0 or not issubclass(kind, KeyboardInterrupt):
                self._except(kind, error, trace)
        sys.stderr.write(f"nnx: rank {self.rank} of {self.size} ends with {kind.__name__}: {error}\n{text.getvalue()}")

    def _shutdown(self) -> None:
        """Wait for all ranks to exit; abort the job if another rank waits for this one in a collective call.

        A waiting rank has started more collective calls than this one. Checking the next rank is enough: some
        exited rank always precedes a running one.
        """
        if self._MPI.Is_finalized():
            return
        done, started, begin = self._ending.Ibarrier(), numpy.empty(1, numpy.int64), time.monotonic()
        while not done.Test():
            neighbour = (self.rank + 1) % self.size
            self._window.Lock(neighbour, self._MPI.LOCK_SHARED)
            self._window.Get(started, neighbour)
            self._window.Unlock(neighbour)
            elapsed = time.monotonic() - begin
            if started > self._collectives_started or (self._failed and elapsed > _ABORT_TIMEOUT):
                why = "failed" if self._failed else "has ended before the others (by sys.exit, or with fewer steps)"
                sys.stderr.write(f"nnx: rank {self.rank} of {self.size} {why}: the job is aborted\n")
                sys.stdout.flush()
                sys.stderr.flush()
                time.sleep(1)  # the launcher drops output that it has not read before the abort
                self.mpi.Abort(1)
            time.sleep(min(0.05, 0.001 + elapsed / 10))
        self._window.Free()


@quiet
def _scale(g: Array, share: float, out: Array) -> None:
    """Write g * share to `out`, or 0 for a rank without rows, whose gradients are stale."""
    if share:
        np.multiply(g, float(share), out=out, dtype=out.dtype)
    else:
        out[...] = 0


def _stop_flags(stops: Stops) -> list[bool]:
    """Return one flag for each signal, and one for a stop request: numbers that can be summed over ranks."""
    pending, stop = stops
    return [*(pending == signum for signum in SIGNALS), stop]


def _stops(flags: Sequence[float]) -> Stops:
    """Return the signal and the stop request of any rank; `flags` are the sums of `_stop_flags`."""
    *signals, stop = (flag > 0 for flag in flags)
    return next((signum for signum, flag in zip(SIGNALS, signals, strict=True) if flag), 0), stop


class _Nccl:
    """All-reduce of device buffers by NCCL, whose unique id MPI broadcasts."""

    def __init__(self, library: Any, mpi: Any) -> None:
        unique_id = mpi.bcast(library.get_unique_id() if mpi.rank == 0 else None)
        self.communicator = library.NcclCommunicator(mpi.size, unique_id, mpi.rank)
        self.dtypes = {"f": library.NCCL_FLOAT32, "d": library.NCCL_FLOAT64}
        self.operation = library.NCCL_SUM

    def sum(self, device: Array) -> None:
        """Enqueue the in-place sum on CuPy's current stream, without waiting for it on the host."""
        pointer = address(device)
        self.communicator.allReduce(
            pointer, pointer, device.size, self.dtypes[device.dtype.char], self.operation, current_stream_ptr()
        )


class _Bucket(NamedTuple):
    """The buffer of one all-reduce, and the host memory passed to MPI: the same object if no copy is needed."""

    device: Any
    host: Any


def _make_buckets(grads: Sequence[Array], scalars: int, pin: bool) -> tuple[list[Array], list[_Bucket]]:
    """Return views for `grads`, and one bucket per dtype; the last, of the widest dtype, ends with the `scalars`."""
    dtypes = [np.dtype(np.float32 if g.dtype.itemsize == 2 else g.dtype) for g in grads] or [np.dtype(np.float32)]
    views, buckets = {}, []
    for dtype in sorted(set(dtypes), key=lambda d: d.itemsize):
        members = [i for i in range(len(grads)) if dtypes[i] == dtype]
        ends = list(itertools.accumulate((grads[i].size for i in members), initial=0))
        device = np.zeros(ends[-1] + scalars, dtype)
        for i, start, end in zip(members, ends, ends[1:], strict=False):
            views[i] = device[start:end].reshape(grads[i].shape)
        buckets.append(_Bucket(device, empty_pinned_like(device) if pin else device))
    return [views[i] for i in range(len(grads))], buckets


def _rma_counter(MPI: Any) -> tuple[Any, Any]:
    """Return a counter that starts at 0, and the RMA window through which the other ranks read it."""
    window = MPI.Win.Allocate(8, comm=MPI.COMM_WORLD)
    counter = numpy.frombuffer(window, numpy.int64)
    counter[...] = 0
    MPI.COMM_WORLD.Barrier()
    return counter, window
