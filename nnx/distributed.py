"""Many processes that train as one: `comm = init()`, on MPI through mpi4py, with NCCL between GPUs.

Each of R processes, the ranks, holds the whole model, computes the gradients of its rows of a batch,
and takes the same step with the sum over all ranks. `Trainer(..., comm=comm)` does so; in a loop of
your own:

    comm = nnx.distributed.init()  # first, before the data and the model
    comm.broadcast(model.params)
    for x, t in batches:  # the same on every rank, of at least as many rows as there are ranks
        part = comm.shard(len(x))
        model.forward(x[part], t[part])
        model.backward()
        comm.allreduce_gradients(model.grads, len(x[part]) / len(x))
        optimizer.update(model.params, model.grads)

Started with `mpiexec -n 4 python -m mpi4py train.py`: without `-m mpi4py` nobody notices a rank that leaves
by sys.exit while the others wait in calls of their own on `comm.mpi` (all else ends the job either way), nor a
launcher other than those of MPICH, Intel, Open MPI, Slurm and PyTorch.

Only gradients are summed. Each rank keeps its own statistics in BatchNorm, which sees the rank's rows
alone, and its own dropout masks: layers made with the same seed draw the same masks on every rank.
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
from typing import Any, NamedTuple

import numpy

from nnx.device import (
    address,
    asarray,
    bus_id,
    current_stream_ptr,
    empty_pinned_like,
    nccl,
    set_device,
    synchronize,
    to_cpu,
)
from nnx.np import Array, np

__all__ = ["Comm", "init"]

# What the launchers tell a process about the number of ranks: MPICH and Intel, Open MPI, srun, torchrun.
_LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")
_MAX_PLANS = 4  # that are trained in turns, for each of which a buffer is kept
_ABORT_TIMEOUT = 5  # seconds, for which a rank that failed lets the others save what they have


def init(cuda_aware: bool = False) -> Comm:
    """Join the ranks that a launcher such as mpiexec has started, and return what connects them.

    Call it first: it picks the GPU by the rank on this machine, gives BLAS its share of the cores, and sees
    to it that a rank that fails from here on, or ends while others wait for it, ends the job; for one that
    failed before, MPICH lets the others wait for ever. Without a launcher there is one rank, and nothing is
    imported. Later calls return the same object.

    Parameters
    ----------
    cuda_aware : bool
        True hands CuPy arrays to MPI as they are, which crashes unless that MPI was built for CUDA. By
        default they go by NCCL where it is installed and each rank has a GPU to itself, and else
        through host memory.

    Raises
    ------
    ImportError
        If there is a launcher and no mpi4py.
    RuntimeError
        If no MPI library can be loaded, or if the launcher says several ranks and MPI says one.
    """
    if not _instance:
        _instance.append(_connect(cuda_aware))
    return _instance[0]


_instance: list[Comm] = []


def _connect(cuda_aware: bool) -> Comm:
    counts = {name: os.environ.get(name, "") for name in _LAUNCHERS}
    told = next((f"{v} ranks ({k}={v})" for k, v in counts.items() if v.isdecimal() and int(v) > 1), "nothing")
    asked = {"mpi4py.run", "mpi4py.MPI"} & sys.modules.keys()  # by `python -m mpi4py`, or by the script
    if told == "nothing" and not asked:
        return Comm()
    try:
        MPI: Any = importlib.import_module("mpi4py.MPI")
        threads: Any = importlib.import_module("threadpoolctl")
    except ImportError as error:
        raise ImportError(
            f"nnx.distributed: the launcher says {told}, but {error.name} cannot be imported: "
            "pip install mpi4py threadpoolctl"
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"nnx.distributed: the launcher says {told}, but mpi4py finds no MPI library ({error}): load the MPI "
            "module of your cluster, or on a machine of your own pip install mpich"
        ) from error
    if MPI.COMM_WORLD.size == 1:
        if told == "nothing":
            return Comm()
        version = " ".join(MPI.Get_library_version().split()).partition(",")[0]
        raise RuntimeError(
            f"nnx.distributed: the launcher says {told}, but MPI says 1: mpi4py has loaded "
            f"{version:.40}, which this launcher does not belong to; start with the "
            "mpiexec of that MPI (under Slurm srun --mpi=...), or set MPI4PY_LIBMPI to the launcher's library"
        )
    return Comm(MPI, threads, cuda_aware)


class Comm:
    """The ranks that train together; made by `init`.

    All methods but `shard` are collective: every rank calls them, in the same order.

    Attributes
    ----------
    rank, size : int
        Which of how many ranks this process is.
    local_rank, local_size : int
        The same among the ranks of this machine.
    mpi : mpi4py.MPI.Comm or None
        All ranks, for calls of your own; None where there is one.
    """

    rank = local_rank = 0
    size = local_size = 1
    mpi: Any = None

    def __init__(self, MPI: Any = None, threads: Any = None, cuda_aware: bool = False) -> None:
        self.cuda_aware = cuda_aware
        if MPI is None:
            return
        self._MPI, self.mpi = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.mpi.rank, self.mpi.size
        local = self.mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        self._plans: dict[Any, tuple[list[Array], list[_Bucket]]] = {}
        self._collectives_started, self._window = _rma_counter(MPI)
        self._ending = self.mpi.Dup()  # where no other call can come between
        self._failed = False
        self._except = sys.excepthook
        sys.excepthook = self._excepthook
        atexit.register(self._shutdown)
        hosts = self.mpi.gather(f"{MPI.Get_processor_name()}:{os.getpid()}")
        if hosts:  # launchers name a process that was killed, and not its rank
            sys.stderr.write(f"nnx: ranks 0 to {self.size - 1} are the processes {', '.join(hosts)}\n")
        self.assert_equal_on_ranks("nnx.distributed", **{"the array module": np.__name__})

        set_device(self.local_rank)
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}
        sharers = sum(not mine.isdisjoint(cores) for cores in local.allgather(mine))
        share = max(1, len(mine) // sharers)
        threads.threadpool_limits(min([share, *(pool["num_threads"] for pool in threads.threadpool_info())]))

        library = None if cuda_aware else nccl()
        bus_ids = local.allgather(bus_id())
        usable = self.mpi.allreduce(library is not None and len({*bus_ids}) == len(bus_ids), MPI.LAND)
        self._nccl = _Nccl(library, self.mpi) if usable else None

    def shard(self, n: int) -> slice:
        """Return this rank's share of `n` rows; the shares differ by at most one row, the first are the larger."""
        least, more = divmod(n, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def broadcast(self, arrays: Iterable[Array]) -> None:
        """Write the arrays of rank 0, on either device, into those of the other ranks.

        Raises
        ------
        ValueError
            On all ranks, if their number, shapes or dtypes differ; it names a rank and what it has.
        """
        if self.size == 1:
            return
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
        """Make the gradients of this rank's rows, in place, those of the whole batch: the sum of grads * share.

        All ranks get the same bits.

        Parameters
        ----------
        grads : arrays of the same shapes and dtypes on all ranks
            Those of a loss that is a mean over rows.
        share : float
            This rank's part of the rows of the batch. A rank without rows passes 0; its `grads` are not read.
        """
        grads = list(grads)
        for g, mean in zip(grads, self.allreduce(grads, share)[0], strict=True):
            if mean is not g:
                g[...] = mean

    def allreduce(self, grads: Iterable[Array], share: float, *scalars: Any) -> tuple[list[Array], list[float]]:
        """Return what `allreduce_gradients` writes, and the sums of `scalars`, by one all-reduce for each dtype.

        The gradients lie in a buffer that the next call overwrites, which saves a copy; `grads` are only read.
        float16 is summed, and so returned, in float32 and then written into `grads`. The scalars travel in the
        dtype of the largest gradients; on the GPU they are waited for.
        """
        grads = list(grads)
        if self.size == 1:
            return grads, [float(s) for s in scalars]
        layout = (tuple((g.shape, g.dtype) for g in grads), len(scalars))
        if layout not in self._plans:
            if len(self._plans) == _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[layout] = _make_buckets(grads, len(scalars), pin=not self.cuda_aware and self._nccl is None)
        views, flats = self._plans[layout]
        for g, view in zip(grads, views, strict=True):
            if share:
                with numpy.errstate(under="ignore"):
                    np.multiply(g, float(share), out=view, dtype=view.dtype)
            else:
                view[...] = 0
        for i, scalar in enumerate(scalars):
            flats[-1].device[i - len(scalars)] = scalar
        self._collectives_started += 1
        for flat in flats:
            self._allreduce(flat)
        sums = to_cpu(flats[-1].host[len(flats[-1].host) - len(scalars) :]).tolist() if scalars else []
        for g, view in zip(grads, views, strict=True):
            if g.dtype != view.dtype:
                g[...] = view
        return [v if g.dtype == v.dtype else g for g, v in zip(grads, views, strict=True)], sums

    def all_sum(self, *scalars: Any) -> Any:
        """Return the sum of a number over all ranks, of several numbers a list; in float64."""
        total = numpy.array([float(s) for s in scalars])
        if self.size > 1:
            self._collectives_started += 1
            self.mpi.Allreduce(self._MPI.IN_PLACE, total)
        return total.item() if len(scalars) == 1 else total.tolist()

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.size > 1:
            self._collectives_started += 1
            self.mpi.Barrier()

    def main_process_first(self, function: Callable[[], Any]) -> Any:
        """Return what `function` returns or raises, called on rank 0 before the others: it may tidy up, or download."""
        if self.rank > 0:
            self.barrier()
        try:
            return function()
        finally:
            if self.rank == 0:
                self.barrier()

    def assert_equal_on_ranks(self, what: str, **values: Any) -> None:
        """Raise a ValueError on all ranks unless `values` are the same everywhere; `what` opens the message."""
        if self.size == 1:
            return
        self._collectives_started += 1
        first, *others = self.mpi.allgather(values)
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs[name] != value:
                    raise ValueError(
                        f"{what}: {name} must be the same on all ranks, but is {value} on rank 0 "
                        f"and {theirs[name]} on rank {rank}"
                    )

    def __reduce__(self) -> Any:  # a copy, as of a Trainer, is the same ranks
        return (init if self.size > 1 else Comm), ()

    def __repr__(self) -> str:
        way = "" if self.size == 1 else ", MPI" if self._nccl is None else ", NCCL"
        return f"Comm(rank {self.rank} of {self.size}, {self.local_rank} of {self.local_size} on this machine{way})"

    def _allreduce(self, flat: _Bucket) -> None:
        """Sum a buffer over all ranks, in place."""
        device, host = flat
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
        """Print an uncaught exception with the rank that raised it; `_shutdown` comes after it.

        In one piece, as the lines of several ranks would mix; and of Ctrl-C, which all ranks get, rank 0 prints more.
        """
        self._failed = True
        with contextlib.redirect_stderr(io.StringIO()) as text:
            if self.rank == 0 or not issubclass(kind, KeyboardInterrupt):
                self._except(kind, error, trace)
        sys.stderr.write(f"nnx: rank {self.rank} of {self.size} ends with {kind.__name__}: {error}\n{text.getvalue()}")

    def _shutdown(self) -> None:
        """Leave when all ranks leave; end the job if another waits for this one, which is gone.

        Such a rank has begun more collective calls than this one ever will. It is enough to look at the
        next rank: one of those that are gone is followed by one that is not.
        """
        if self._MPI.Is_finalized():
            return
        done, theirs, begin = self._ending.Ibarrier(), numpy.empty(1, numpy.int64), time.monotonic()
        while not done.Test():
            neighbour = (self.rank + 1) % self.size
            self._window.Lock(neighbour, self._MPI.LOCK_SHARED)
            self._window.Get(theirs, neighbour)
            self._window.Unlock(neighbour)
            late = time.monotonic() - begin
            if theirs > self._collectives_started or (self._failed and late > _ABORT_TIMEOUT):
                why = "failed" if self._failed else "has ended before the others (by sys.exit, or with fewer steps)"
                sys.stderr.write(f"nnx: rank {self.rank} of {self.size} {why}: the job is aborted\n")
                sys.stdout.flush()
                sys.stderr.flush()
                time.sleep(1)  # an aborting launcher drops what it has not read yet, and may be busy
                self.mpi.Abort(1)
            time.sleep(min(0.05, 0.001 + late / 10))
        self._window.Free()


class _Nccl:
    """Sums device buffers by NCCL, whose ranks find each other by a name that MPI carries."""

    def __init__(self, library: Any, mpi: Any) -> None:
        name = mpi.bcast(library.get_unique_id() if mpi.rank == 0 else None)
        self.communicator = library.NcclCommunicator(mpi.size, name, mpi.rank)
        self.kinds = {"f": library.NCCL_FLOAT32, "d": library.NCCL_FLOAT64}
        self.operation = library.NCCL_SUM

    def sum(self, device: Array) -> None:
        """Put the sum into CuPy's current stream: what comes after it there sees it, and the host does not wait."""
        where = address(device)
        self.communicator.allReduce(
            where, where, device.size, self.kinds[device.dtype.char], self.operation, current_stream_ptr()
        )


class _Bucket(NamedTuple):
    """A buffer that one all-reduce sums, and the host memory that MPI sees of it: itself where no copy is made."""

    device: Any
    host: Any


def _make_buckets(grads: Sequence[Array], scalars: int, pin: bool) -> tuple[list[Array], list[_Bucket]]:
    """Return a buffer for each dtype, `scalars` behind the last and largest, and the views of them that are `grads`."""
    wire = [np.dtype(np.float32 if g.dtype.itemsize == 2 else g.dtype) for g in grads] or [np.dtype(np.float32)]
    views, flats = {}, []
    for dtype in sorted(set(wire), key=lambda d: d.itemsize):
        members = [i for i, g in enumerate(grads) if wire[i] == dtype]
        ends = list(itertools.accumulate((grads[i].size for i in members), initial=0))
        device = np.zeros(ends[-1] + scalars, dtype)
        for i, start, end in zip(members, ends, ends[1:], strict=False):
            views[i] = device[start:end].reshape(grads[i].shape)
        flats.append(_Bucket(device, empty_pinned_like(device) if pin else device))
    return [views[i] for i in range(len(grads))], flats


def _rma_counter(MPI: Any) -> tuple[Any, Any]:
    """Return a count that starts at 0, and the window through which the other ranks read it."""
    window = MPI.Win.Allocate(8, comm=MPI.COMM_WORLD)
    begun = numpy.frombuffer(window, numpy.int64)
    begun[...] = 0
    MPI.COMM_WORLD.Barrier()
    return begun, window
