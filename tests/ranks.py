"""Jobs for tests on several ranks, one function each: `mpiexec -n 2 python -m tests.ranks JOB ARGUMENT ...`.

Rank 0 prints the results of all ranks as a line of JSON.
"""

import copy
import importlib
import json
import math
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy

import nnx
from nnx import SGD, Affine, Momentum, Sequential, Sigmoid, SoftmaxWithLoss, Trainer, np, to_cpu
from nnx.callbacks import BestWeights, Checkpoint
from nnx.initializers import xavier

JOBS = {}


def job(function):
    JOBS[function.__name__] = function
    return function


def data(rows=300):
    """Return rows and labels computed from them with a matrix."""
    rng = numpy.random.default_rng(0)
    x = rng.standard_normal((rows, 20))
    return x.astype("float32"), (x @ rng.standard_normal((20, 5))).argmax(axis=1)


def net(seed, hidden=30, dtype="float32"):
    layers = [Affine(xavier((d, h), dtype, seed), np.zeros(h, dtype)) for d, h in ((20, hidden), (hidden, 5))]
    return Sequential([layers[0], Sigmoid(), layers[1]], SoftmaxWithLoss())


def state(model):
    """Return all parameters concatenated, as hexadecimal digits of their bytes."""
    return b"".join(to_cpu(p).tobytes() for p in model.params).hex()


@job
def steps(comm, batch_size, count=200, dtype="float32"):
    """Train in a custom loop on batches of `batch_size` rows."""
    x, t = data()
    model, optimizer = net(comm.rank, dtype=dtype), SGD(0.5)  # rank 0's weights are broadcast
    comm.broadcast(model.params)
    order = numpy.random.default_rng(1)
    for _ in range(int(count)):
        rows = order.permutation(len(x))[: int(batch_size)]
        part = rows[comm.shard(len(rows))]
        if len(part):
            model.forward(x[part], t[part])
            model.backward()
        comm.allreduce_gradients(model.grads, len(part) / len(rows))
        optimizer.update(model.params, model.grads)
    return state(model)


@job
def fault(comm, kind):
    """Make the last rank fail as given by `kind` while the others continue."""
    x, t = data()
    last = comm.rank == comm.size - 1
    dtype = "float64" if kind == "dtype" and last else "float32"
    model, optimizer = net(0, 31 if kind == "model" and last else 30, dtype), SGD(0.5)
    if kind == "layers" and last:
        model.params.pop()
    comm.broadcast(model.params)
    for step in range(10_000):
        if step == 20 and last:
            if kind == "exception":
                raise ArithmeticError("the last rank has had enough")
            if kind == "sys.exit":
                sys.exit(3)
            if kind == "fewer steps":
                break
            if kind == "Finalize":
                importlib.import_module("mpi4py.MPI").Finalize()
                return
            if kind == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "own calls":  # an exception while the others wait in an MPI call outside Comm
                nnx.distributed._ABORT_TIMEOUT = 0.5
                raise ArithmeticError("the last rank has had enough")
        model.forward(x, t)
        model.backward()
        if kind == "own calls":
            comm.mpi.Barrier()
        else:
            comm.allreduce_gradients(model.grads, 1 / comm.size)
        optimizer.update(model.params, model.grads)


@job
def late(comm):
    """Let rank 0 continue alone for a while, without any rank waiting."""
    comm.barrier()
    if comm.rank == 0:
        time.sleep(1)
        print("rank 0 is done", flush=True)


@job
def threads(comm):
    from threadpoolctl import threadpool_info

    return [pool["num_threads"] for pool in threadpool_info()]


@job
def mixed(comm):
    """Average and broadcast arrays of all dtypes and layouts, different on each rank, given as iterators."""
    rng = numpy.random.default_rng(comm.rank)
    kinds = [("float32", (40, 30)), ("float16", (200,)), ("float64", (3, 4)), ("float32", ()), ("float64", (0, 2))]
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for dtype, shape in kinds]
    arrays += [np.asarray(rng.standard_normal((6, 5)), "float32").T, np.asarray(rng.standard_normal((6, 8)))[:, ::2]]
    grads = [a.copy() for a in arrays]
    share = [0.0, 0.25, 0.75][comm.rank + 3 - comm.size] if comm.size > 1 else 1.0
    for g in grads if share == 0 else []:
        g[...] = math.nan  # ignored for a rank without rows
    views, sums = comm.allreduce(iter(grads), share, np.asarray(comm.rank + 0.5), 1)
    reduced = [to_cpu(a).ravel().tolist() for a in views]
    comm.allreduce_gradients(iter(grads), share)
    averaged = [to_cpu(a).ravel().tolist() for a in grads]
    before = [to_cpu(a).ravel().tolist() for a in arrays]
    comm.broadcast(iter(arrays))
    sent = [to_cpu(a).ravel().tolist() for a in arrays]
    return {"share": share, "before": before, "reduced": reduced, "averaged": averaged, "sums": sums, "sent": sent}


@job
def methods(comm):
    part = comm.shard(7)
    return {
        "slice": [part.start, part.stop],
        "sum": comm.all_sum(comm.rank + 1),
        "sums": comm.all_sum(comm.rank, np.ones(()), 0.5),
        "place": [comm.rank, comm.size, comm.local_rank, comm.local_size],
        "mpi": comm.mpi is not None,
        "repr": repr(comm),
        "again": nnx.distributed.init() is comm,
    }


def new_trainer(comm, rng=0, lr=0.1):
    """Return a trainer that differs between ranks except for the seed of the shuffles."""
    return Trainer(net(comm.rank), Momentum(lr), rng=rng, comm=comm)


@job
def fit(comm, batch_size, epochs, rng="0", verbose=None, ignore_label=None, weighted=None):
    """Train with clipping, validation and a smaller last batch."""
    numpy.random.seed(comm.rank)
    trainer = new_trainer(comm, None if rng == "None" else int(rng) + comm.rank)
    if ignore_label:
        trainer.model.loss_layer = SoftmaxWithLoss([1, 5, 0.5, 2, 0.25], int(ignore_label))
    x, t = data()
    trainer.fit(
        *(x[:250], t[:250], int(epochs), int(batch_size), 0.5, 3),
        validation=(x[250:], t[250:]),
        sample_weight=numpy.arange(250) % 7 if weighted else None,
        metrics={"rows": lambda scores, t: len(scores)} if weighted else None,
        verbose=None if verbose else False,
        callbacks=[BestWeights()],
    )
    history = [{n: v for n, v in row.items() if n in ("epoch", "lr", "val_rows")} for row in trainer.history]
    return {
        "state": state(trainer.model),
        "losses": [*trainer.loss_list, *(row["loss"] for row in trainer.history)],
        "validation": trainer.val_list,
        "history": history,
    }


class AtStep:
    """A callback that calls a function on one rank at one step."""

    def __init__(self, comm, rank, step, function):
        self.mine, self.step, self.function, self.count = comm.rank == rank, step, function, 0

    def on_step(self, trainer):
        self.count += 1
        if self.mine and self.count == self.step:
            self.function()


@job
def stopped(comm, how):
    """Give only rank 1 a reason to stop, and return where each rank stopped."""
    trainer = new_trainer(comm)
    reasons = {
        "SIGINT": lambda: signal.raise_signal(signal.SIGINT),
        "stop": trainer.stop,
        "NaN": lambda: trainer.model.params[0].fill(numpy.nan),
    }
    ending = None
    try:
        trainer.fit(*data(), 5, 50, verbose=False, callbacks=[AtStep(comm, 1, 8, reasons[how])])
    except (KeyboardInterrupt, FloatingPointError) as error:
        ending = f"{type(error).__name__}: {error}"
    return {
        "ending": ending,
        "place": [trainer.current_epoch, trainer.iteration],
        "state": state(trainer.model),
        "losses": repr(trainer.loss_list),
    }


@job
def wish(comm, event, folder):
    """Call stop at an event on rank 1 only, and return where each rank stopped and what is saved."""

    class Wish:
        def __getattr__(self, name):
            if name != event:
                raise AttributeError(name)
            return lambda trainer: trainer.stop() if comm.rank == 1 else None

    trainer = new_trainer(comm)
    trainer.fit(*data(), 3, 50, verbose=False, callbacks=[Checkpoint(folder, every_epochs=2), Wish()])
    comm.barrier()
    return [trainer.current_epoch, sorted(path.name for path in Path(folder).iterdir())]


@job
def saved(comm, folder, kind):
    """Train with checkpoints, from the newest one if there is any; at step 8 the last rank may fail."""

    def fail():
        if kind == "exception":
            raise ArithmeticError("the last rank has had enough")
        if kind == "sys.exit":
            sys.exit(3)
        os.kill(os.getpid(), getattr(signal, kind))

    trainer = new_trainer(comm)
    if kind == "resume":
        trainer.resume(folder)
    callbacks = [Checkpoint(folder, every_steps=3)] if folder else []
    if kind not in ("resume", "whole"):
        callbacks.append(AtStep(comm, comm.size - 1, 8, fail))
    begun = [trainer.current_epoch, trainer.iteration]
    trainer.fit(*data(), 4, 50, eval_interval=1, verbose=False, callbacks=callbacks)
    return {"begun": begun, "state": state(trainer.model), "losses": trainer.loss_list}


@job
def folders(comm, folder):
    """Give every rank a different checkpoint folder, and return what rank 0 finds."""
    Path(f"{folder}/{comm.rank}").mkdir()
    new_trainer(comm).fit(*data(), 1, 50, verbose=False, callbacks=[Checkpoint(f"{folder}/{comm.rank}")])
    comm.barrier()
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@job
def long(comm, folder, kill):
    """Train 200 steps, from a checkpoint if there is one; `kill` is a rank and the seconds until it is killed."""
    trainer = new_trainer(comm)
    if folder and any(Path(folder).glob("epoch-*")):
        trainer.resume(folder)
    if folder and kill:
        rank, seconds = kill.split()
        if comm.rank == int(rank):
            signal.setitimer(signal.ITIMER_REAL, float(seconds) + 1e-3)  # the signal ends the process
    callbacks = [Checkpoint(folder, every_steps=3)] if folder else []
    trainer.fit(*data(), 20, 31, eval_interval=1, verbose=False, callbacks=callbacks)
    return {"state": state(trainer.model), "losses": trainer.loss_list}


@job
def many(comm):
    """Train models of many sizes, and return the number of cached buffers."""
    buffers = []
    for hidden in range(10, 20):
        grads = net(0, hidden).grads
        view = comm.allreduce(grads, 1 / comm.size)[0][0]
        buffers.append(weakref.ref(view.base if view.base is not None else view))
    del view
    return sum(buffer() is not None for buffer in buffers)


@job
def copies(comm):
    together, alone = new_trainer(comm), Trainer(net(0), SGD())
    return copy.deepcopy(together).comm is comm, copy.deepcopy(alone).comm.size


@job
def unlike(comm, what):
    """Call fit with different arguments on the last rank."""
    last = comm.rank == comm.size - 1
    x, t = data(299 if what == "rows" and last else 300)
    if what == "numbers" and last:
        x = x[::-1]
    trainer = new_trainer(comm, lr=numpy.float32(0.2) if what == "lr" and last else numpy.float32(0.1))
    validation = [a[1:] if what == "validation" and last else a for a in (x, t)]
    batch_size = 49 if what == "batch size" and last else 50
    options = {"metrics": {"rows": lambda scores, t: 1}} if what == "metrics" and last else {}
    options |= {"sample_weight": numpy.ones(len(x))} if what == "weights" and last else {}
    trainer.fit(x, t, 1, batch_size, validation=validation, verbose=False, **options)


class FakeNccl:
    """A mock of cupy.cuda.nccl: records the calls, and sums the memory at the addresses through MPI."""

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = 7, 8, 0
    calls = []

    def get_unique_id(self):
        self.calls.append("get_unique_id")
        return b"the name"

    def NcclCommunicator(self, size, name, rank):
        self.calls.append(["NcclCommunicator", size, name.decode(), rank])
        return self

    def allReduce(self, send, receive, count, kind, operation, stream):
        import ctypes

        from mpi4py import MPI

        self.calls.append(
            ["allReduce", send == receive, count, kind, operation, stream == nnx.device.current_stream_ptr()]
        )
        number = {7: ctypes.c_float, 8: ctypes.c_double}[kind]
        if nnx.GPU:  # device memory cannot be read by the host
            memory = np.cuda.UnownedMemory(send, count * ctypes.sizeof(number), None)
            device = np.ndarray(count, np.dtype(number), np.cuda.MemoryPointer(memory, 0))
            host = device.get()
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, host)
            device.set(host)
        else:
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, numpy.ctypeslib.as_array((number * count).from_address(send)))


@job
def fake_nccl(comm):
    result = steps(comm, 125, 3)
    return result, FakeNccl.calls, repr(comm)


if __name__ == "__main__":
    if sys.argv[1] == "fake_nccl":
        nnx.distributed.nccl = FakeNccl
        nnx.distributed.bus_id = os.getpid  # a GPU for each
        nnx.distributed.set_device = lambda local_rank: FakeNccl.calls.append(["set_device", local_rank])
    comm = nnx.distributed.init()
    result = JOBS[sys.argv[1]](comm, *sys.argv[2:])
    results = [result] if comm.size == 1 else comm.mpi.gather(result)
    if comm.rank == 0:
        print(json.dumps(results), flush=True)
