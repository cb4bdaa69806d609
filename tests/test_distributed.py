"""Training on several ranks: sums, synchronization, termination. Each test starts mpiexec with a time limit."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy
import pytest

import nnx
from tests import ranks

ROOT = Path(__file__).parents[1]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
OPEN_MPI = {  # allow running as root, and more ranks than cores
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

needs_mpi = pytest.mark.skipif(
    not (MPIEXEC.exists() and importlib.util.find_spec("mpi4py")),
    reason="needs mpi4py, and mpiexec in the folder of Python: pip install mpi4py mpich threadpoolctl",
)


def run(n, *command, env=(), timeout=30):
    """Run a job of `ranks.py` on `n` ranks; return its process after it and its children have ended."""
    mark = uuid.uuid4().hex
    # if the tests run under a launcher, do not pass its variables to the ranks
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "SLURM_"))}
    environment |= OPEN_MPI | {"PYTHONPATH": str(ROOT), "NNX_TEST_RUN": mark}
    launcher = [MPIEXEC, "-n", str(n)] if n else []
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "tests.ranks", *map(str, command)],
        cwd=ROOT,
        env=environment | dict(env),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout,
    )
    deadline = time.monotonic() + 2
    while left := alive(mark):
        assert time.monotonic() < deadline, f"processes left over: {left}"
    return done


def alive(mark):
    """Return the live processes started by a run with this mark (Linux only)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # of another user, or already ended
            continue
    return found


def results(n, *command, **options):
    """Return the results of the ranks of a job."""
    done = run(n, *command, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def parameters(state, dtype="float32"):
    return numpy.frombuffer(bytes.fromhex(state), dtype)


def close(state, reference):
    """Return whether all parameters are within 1e-6 of the reference, relative to its norm and its largest."""
    got, want = parameters(state).astype("float64"), parameters(reference).astype("float64")
    norm = numpy.linalg.norm(got - want) / numpy.linalg.norm(want)
    return norm < 1e-6 and abs(got - want).max() < 1e-6 * abs(want).max()


def test_import_nnx_does_not_import_mpi():
    program = "import sys, nnx; nnx.distributed.init(); print({'mpi4py', 'threadpoolctl'} & {*sys.modules})"
    assert run_python(program).stdout == "set()\n"


def run_python(program, **env):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


def test_one_rank_needs_no_launcher():
    comm = nnx.distributed.init()
    assert ranks.methods(comm) == {
        "slice": [0, 7],
        "sum": 1.0,
        "sums": [0.0, 1.0, 0.5],
        "place": [0, 1, 0, 1],
        "mpi": False,
        "repr": "Comm(rank 0 of 1)",
        "again": True,
    }
    comm.barrier()
    got = ranks.mixed(comm)
    assert got["before"] == got["reduced"] == got["averaged"] == got["sent"]


@needs_mpi
def test_methods_on_three_ranks():
    first, second, third = results(3, "methods")
    assert [r["slice"] for r in (first, second, third)] == [[0, 3], [3, 5], [5, 7]]
    assert [r["place"] for r in (first, second, third)] == [[0, 3, 0, 3], [1, 3, 1, 3], [2, 3, 2, 3]]
    assert first["repr"] == "Comm(rank 0 of 3, 0 of 3 on this machine, MPI)"
    for r in (first, second, third):
        assert (r["sum"], r["sums"], r["mpi"], r["again"]) == (6, [3, 3, 1.5], True, True)


@needs_mpi
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks_match_a_single_process(n):
    """125 rows divide by none of 2, 3, 4."""
    first, *others = results(n, "steps", 125)
    assert all(other == first for other in others)  # bit for bit
    assert close(first, ranks.steps(nnx.distributed.init(), 125))


@needs_mpi
def test_the_difference_is_rounding():
    first, *_ = results(3, "steps", 125, 200, "float64")
    want = parameters(ranks.steps(nnx.distributed.init(), 125, 200, "float64"), "float64")
    numpy.testing.assert_allclose(parameters(first, "float64"), want, rtol=0, atol=1e-14 * abs(want).max())


@needs_mpi
def test_fewer_rows_than_ranks_is_reproducible():
    first, *others = results(4, "steps", 3)
    assert all(other == first for other in others)
    assert close(first, ranks.steps(nnx.distributed.init(), 3))
    assert results(4, "steps", 3)[0] == first


@needs_mpi
def test_allreduce_and_broadcast_every_dtype_and_layout():
    ranks_ = results(3, "mixed")
    dtypes = ["float32", "float16", "float64", "float32", "float64", "float32", "float64"]
    for i, dtype in enumerate(dtypes):
        want = sum(r["share"] * numpy.array(r["before"][i]) for r in ranks_)
        if dtype == "float16":  # summed in float32 and rounded once
            want = want.astype("float16")
        tolerance = {"float16": 0, "float32": 1e-6, "float64": 1e-12}[dtype]
        for r in ranks_:
            numpy.testing.assert_allclose(r["reduced"][i], want, rtol=tolerance, atol=tolerance)
            assert r["reduced"][i] == r["averaged"][i] == ranks_[0]["reduced"][i]
            assert r["sent"][i] == ranks_[0]["before"][i]
            assert r["sums"] == [4.5, 3]


@needs_mpi
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("exception", "rank 2 of 3 ends with ArithmeticError: the last rank has had enough"),
        ("sys.exit", "rank 2 of 3 has ended before the others"),
        ("fewer steps", "rank 2 of 3 has ended before the others"),
        ("Finalize", "rank 2 of 3 has ended before the others"),
        ("own calls", "rank 2 of 3 ends with ArithmeticError: the last rank has had enough"),
        ("model", r"array 0 must be the same on all ranks, but is (20, 30) float32 on rank 0 and (20, 31) float32 on"),
        ("dtype", r"array 0 must be the same on all ranks, but is (20, 30) float32 on rank 0 and (20, 30) float64 on"),
        ("layers", "the number of arrays must be the same on all ranks, but is 4 on rank 0 and 3 on rank 2"),
    ],
)
def test_failure_of_one_rank_ends_the_job(kind, message):
    begin = time.monotonic()
    done = run(3, "fault", kind, timeout=10)
    assert time.monotonic() - begin < 10
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("rank", "kind", "traced"), [(1, OSError, 1), (0, KeyboardInterrupt, 1), (1, KeyboardInterrupt, 0)]
)
def test_rank_writes_its_error_atomically(rank, kind, traced, monkeypatch):
    """Tracebacks of several ranks must not interleave; on Ctrl-C only rank 0 prints one."""
    comm, pieces = object.__new__(nnx.distributed._MPIComm), []
    comm.rank, comm.size, comm._except = rank, 2, sys.__excepthook__
    monkeypatch.setattr(sys.stderr, "write", pieces.append)
    comm._excepthook(kind, kind("why"), None)
    (text,) = pieces
    assert text.startswith(f"nnx: rank {rank} of 2 ends with {kind.__name__}: why\n")
    assert text.count(f"\n{kind.__name__}: why\n") == traced


@needs_mpi
def test_killed_rank_ends_the_job():
    """The launcher reports its process and signal; rarely MPICH reports another that it terminated in response."""
    for _ in range(3):
        done = run(2, "fault", "SIGKILL", timeout=10)
        assert done.returncode != 0
        places = next(line for line in done.stderr.splitlines() if "ranks 0 to 1 are the processes" in line)
        said = (done.stdout + done.stderr).replace(places, "")
        assert "signal 9" in said
        first, last = (place.rpartition(":")[2] for place in places.split(","))
        assert first in said or last in said
        if last in said:
            return
    pytest.fail(f"the launcher has not named process {last}: {said}")


@needs_mpi
def test_rank_may_exit_before_the_others():
    done = run(2, "late")
    assert done.returncode == 0, done.stderr
    assert "rank 0 is done" in done.stdout


@needs_mpi
def test_ranks_share_the_cores():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "")
    shared = results(2, "threads", env=free)
    assert all({*pools} <= {max(1, cores // 2)} for pools in shared)
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    assert all(shared) or "openblas" not in blas  # which threadpoolctl finds
    capped = results(2, "threads", env={"OMP_NUM_THREADS": "1"})
    assert all({*pools} <= {1} for pools in capped)  # a smaller user setting is respected


@needs_mpi
def test_nccl_calls():
    """A mock of NCCL that sums, so that training works, and records its calls."""
    first, second = results(2, "fake_nccl")
    plain = results(2, "steps", 125, 3)
    assert [first[0], second[0]] == plain
    size = sum(p.size for p in nnx.TwoLayerNet(20, 30, 5).params)
    sums = [["allReduce", True, size, 7, 0, True]] * 3
    assert first[1] == [["set_device", 0], "get_unique_id", ["NcclCommunicator", 2, "the name", 0], *sums]
    assert second[1] == [["set_device", 1], ["NcclCommunicator", 2, "the name", 1], *sums]
    assert first[2].endswith("NCCL)")


@pytest.mark.skipif(nnx.device.nccl() is None, reason="needs a GPU and NCCL: not run")
def test_nccl_on_one_gpu():
    class OneRank:
        rank, size = 0, 1

        def bcast(self, name):
            return name

    for dtype in ("float32", "float64"):
        x = nnx.np.arange(1000, dtype=dtype)
        nnx.distributed._Nccl(nnx.device.nccl(), OneRank()).sum(x)
        numpy.testing.assert_array_equal(nnx.to_cpu(x), numpy.arange(1000, dtype=dtype))


@needs_mpi
@pytest.mark.skipif(not nnx.GPU, reason="compares CuPy with NumPy")
def test_sums_through_pinned_memory_match_numpy():
    assert results(2, "mixed") == results(2, "mixed", env={"NNX_GPU": "0"})
    on_gpu, on_cpu = results(2, "steps", 125), results(2, "steps", 125, env={"NNX_GPU": "0"})
    assert on_gpu[0] == on_gpu[1]
    assert close(on_gpu[0], on_cpu[0])


@needs_mpi
def test_wrong_launcher_error():
    done = run(0, "methods", env={"WORLD_SIZE": "2"})
    assert done.returncode != 0
    assert "the launcher reports 2 ranks (WORLD_SIZE=2), but MPI reports 1: mpi4py has loaded" in done.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModuleNotFoundError('no', name='mpi4py')", "mpi4py cannot be imported: pip install mpi4py threadpoolctl"),
        ("RuntimeError('cannot load MPI library')", "mpi4py finds no MPI library (cannot load MPI library): load the"),
    ],
)
def test_missing_component_error(error, message, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    for name in ("__init__", "run"):
        (tmp_path / "mpi4py" / f"{name}.py").write_text("", encoding="utf-8")
    (tmp_path / "mpi4py" / "MPI.py").write_text(f"raise {error}\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python("import nnx; nnx.distributed.init()", PYTHONPATH=path, PMI_SIZE="4")
    assert "the launcher reports 4 ranks (PMI_SIZE=4), but " + message in done.stderr
    # for an unknown launcher `-m mpi4py` is the only sign
    done = run_python("import mpi4py.run, nnx; nnx.distributed.init()", PYTHONPATH=path)
    assert "the launcher reports no ranks, but " + message in done.stderr


# ---- Trainer ----


def check_fit(got, reference):
    first, *others = got
    assert all(other == first for other in others)
    assert close(first["state"], reference["state"])
    numpy.testing.assert_allclose(first["losses"], reference["losses"], rtol=1e-5)
    numpy.testing.assert_allclose(first["validation"], reference["validation"], rtol=1e-5)
    assert first["history"] == reference["history"]


@needs_mpi
@pytest.mark.parametrize("n", [2, 3, 4])
def test_trainer_on_several_ranks_matches_one(n):
    """250 rows in batches of 31: 8 of them, and 2 rows for the last; 25 epochs are 225 steps."""
    check_fit(results(n, "fit", 31, 25), ranks.fit(nnx.distributed.init(), 31, 25))


@needs_mpi
@pytest.mark.parametrize("batch_size", [31, 2])
def test_unequal_weights_on_several_ranks_match_one(batch_size):
    """Ranks may have no rows in a batch, or only ignored rows."""
    arguments = "fit", batch_size, 5, "0", "", 2
    check_fit(results(3, *arguments), ranks.fit(nnx.distributed.init(), *arguments[1:]))


@needs_mpi
@pytest.mark.parametrize("batch_size", [31, 2])
def test_weights_of_rows_on_several_ranks_match_one(batch_size):
    arguments = "fit", batch_size, 5, "0", "", "", "weighted"
    check_fit(results(3, *arguments), ranks.fit(nnx.distributed.init(), *arguments[1:]))


@needs_mpi
def test_trainer_is_reproducible_bit_for_bit():
    first = results(3, "fit", 2, 1)  # two rows for three ranks
    check_fit(first, ranks.fit(nnx.distributed.init(), 2, 1))
    assert results(3, "fit", 2, 1) == first


@needs_mpi
def test_order_of_rows_comes_from_rank_0_with_the_global_generator():
    numpy.random.seed(0)
    check_fit(results(2, "fit", 31, 2, "None"), ranks.fit(nnx.distributed.init(), 31, 2, "None"))


@needs_mpi
def test_only_rank_0_reports():
    done = run(3, "fit", 125, 1, 0, "verbose")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| epoch 1 |  iter 1 / 2 |") == 1


@needs_mpi
@pytest.mark.parametrize(
    ("how", "place", "ending"),
    [
        ("SIGINT", [1, 3], "KeyboardInterrupt: Trainer.fit: interrupted in epoch 2 after 3 of 6 iterations"),
        ("NaN", [1, 6], "FloatingPointError: Trainer.fit: the loss is nan or a parameter is infinite or NaN in"),
        ("stop", [2, 0], "None"),
    ],
)
def test_all_ranks_stop_together(how, place, ending):
    """Rank 1 has a reason in step 8, the second of the second epoch; the others are notified in the next step."""
    first, second = results(2, "stopped", how)
    for result in (first, second):  # the sign of a NaN is unspecified
        result["state"] = result["state"].replace("c0ff", "c07f")
    assert first == second
    assert str(first["ending"]).startswith(ending)
    assert first["place"] == place


@needs_mpi
@pytest.mark.parametrize(("event", "epochs"), [("on_begin", 0), ("on_evaluate", 1), ("on_step", 1), ("on_epoch", 1)])
def test_stop_on_one_rank_stops_and_saves_all(event, epochs, tmp_path):
    pytest.importorskip("safetensors")
    files = [f"epoch-{epochs:04d}-step-000000.safetensors"] if epochs else []
    assert results(2, "wish", event, tmp_path) == [[epochs, files]] * 2


@needs_mpi
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGINT", "exception", "sys.exit"])
def test_resume_with_another_number_of_ranks(kind, tmp_path):
    pytest.importorskip("safetensors")
    done = run(2, "saved", tmp_path, kind, timeout=10)
    assert done.returncode != 0
    first, *others = results(3, "saved", tmp_path, "resume")
    assert all(other == first for other in others)
    asked = kind in ("SIGTERM", "SIGINT")  # these save where all stop; with the others the newest is of step 6
    assert first["begun"] == ([1, 3] if asked else [1, 0])
    whole = ranks.saved(nnx.distributed.init(), "", "whole")
    assert close(first["state"], whole["state"])
    numpy.testing.assert_allclose(first["losses"], whole["losses"], rtol=1e-5)


@needs_mpi
def test_only_rank_0_saves(tmp_path):
    pytest.importorskip("safetensors")
    assert results(2, "folders", tmp_path)[0] == ["0", "0/epoch-0001-step-000000.safetensors", "1"]


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_training_survives_random_kills(seed, tmp_path):
    """Each time one of 1 to 4 ranks is killed after a random delay, and the next run has another number of ranks."""
    pytest.importorskip("safetensors")
    rng, n = numpy.random.default_rng(seed), 2
    whole = ranks.long(nnx.distributed.init(), "", "")
    for kills in range(50):
        done = run(n, "long", tmp_path, f"{rng.integers(n)} {rng.uniform(0, 0.2) if kills else 0.03}")
        if done.returncode == 0:
            break
        n = n % 4 + 1
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert all(other == first for other in others)
    assert close(first["state"], whole["state"])
    numpy.testing.assert_allclose(first["losses"], whole["losses"], rtol=1e-4)


@needs_mpi
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "Trainer.fit: x must be the same on all ranks, but is (300, 20) float32 of checksum"),
        ("numbers", "Trainer.fit: x must be the same on all ranks, but is (300, 20) float32 of checksum"),
        ("batch size", "Trainer.fit: batch_size must be the same on all ranks, but is 50 on rank 0 and 49 on rank 1"),
        ("lr", "Trainer.fit: optimizer must be the same on all ranks, but is Momentum {'lr': np.float32(0.1)"),
        ("metrics", "Trainer.fit: metrics must be the same on all ranks, but is [] on rank 0 and ['rows'] on rank 1"),
        (
            "weights",
            "Trainer.fit: sample_weight must be the same on all ranks, but is None on rank 0 and (300,) float64",
        ),
        ("validation", "Trainer.fit: validation must be the same on all ranks, but is (300, 20) float32 of checksum"),
    ],
)
def test_trainer_requires_equal_arguments_on_all_ranks(what, message):
    done = run(2, "unlike", what, timeout=10)
    assert done.returncode != 0
    assert message in done.stderr


@needs_mpi
def test_copy_of_a_trainer_shares_its_comm():
    assert results(2, "copies") == [[True, 1], [True, 1]]


@needs_mpi
def test_number_of_cached_buffers_is_bounded():
    assert results(2, "many") == [nnx.distributed._MAX_PLANS] * 2


# ---- the benchmark ----


@needs_mpi
@pytest.mark.skipif(nnx.GPU or sys.platform != "linux", reason="the comparison without a GPU, on Linux")
def test_benchmark_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ranks", "--quick", "--out", tmp_path]
    env = os.environ | OPEN_MPI
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))
    assert len(result["seconds"]["one process"]["apart/128"]) == 3
    assert len(result["seconds"]["ranks"]["trainer/128"]) == 3
    assert result["bytes"] == sum(p.nbytes for p in nnx.TwoLayerNet(784, 512, 10).params)
    table = (tmp_path / "ranks.md").read_text(encoding="utf-8")
    assert "| all-reduce | 2.629 ms | 5.714 ms |" in table  # 14 x 25 us + 1.75 x 1,628,200 x 8 / 10^10; 126 ...
