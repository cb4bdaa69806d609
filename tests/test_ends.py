"""Resuming after kills and signals, on another device, and resources used by long training."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from training import OPTIMIZERS, At, Stop, check_resumed, fit, new_trainer, stop

import nnx
from nnx import checkpoint
from nnx.callbacks import Checkpoint

pytest.importorskip("safetensors")
resource = pytest.importorskip("resource", reason="kills, signals and limits of Unix")
ROOT = Path(__file__).parent.parent


def run(optimizer, folder, how="run"):
    """Start tests/training.py."""
    command = [sys.executable, "tests/training.py", optimizer, str(folder), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def check_killed(optimizer, folder):
    assert list(folder.glob("epoch*"))
    check_resumed(folder, optimizer, epochs=60)


def kill(optimizer, folder, delay):
    """Kill the program `delay` seconds after its first checkpoint; return whether it had finished, or was saving."""
    process = run(optimizer, folder)
    while process.poll() is None and not list(folder.glob("epoch*")):
        time.sleep(0.001)
    time.sleep(delay)  # a random delay, not waiting for a condition
    process.kill()
    process.communicate()
    done, writing = process.returncode == 0, bool(list(folder.glob(".saving*")))
    check_killed(optimizer, folder)
    return done, writing


@pytest.mark.parametrize("optimizer", ["Adam", "Momentum"])
def test_killed_at_a_random_moment(optimizer, tmp_path):
    kill(optimizer, tmp_path, random.uniform(0, 0.3))


def test_killed_while_a_file_is_written(tmp_path):
    process = run("Adam", tmp_path, "write")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".saving*"))
    check_killed("Adam", tmp_path)
    trainer = new_trainer()
    trainer.resume(tmp_path)
    fit(trainer, Checkpoint(tmp_path), epochs=60)
    assert not list(tmp_path.glob(".saving*"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_forty_random_moments(optimizer, tmp_path):
    rng = random.Random(optimizer)
    kills = 6 if optimizer != "Adam" else 4
    ends = [kill(optimizer, tmp_path / str(i), rng.uniform(0, 0.6)) for i in range(kills)]
    done, writing = map(sum, zip(*ends, strict=True))
    print(f"{optimizer}: {kills} kills, {writing} while a file was written, {done} too late")
    assert done < kills


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [("term", -signal.SIGTERM, ""), ("int", -signal.SIGINT, "interrupted in epoch 2 after 2 of 5")],
)
def test_signals_save_and_end_the_program(how, status, words, tmp_path):
    process = run("Adam", tmp_path, how)
    _, err = process.communicate()
    assert process.returncode == status, err
    assert words in err
    assert [p.name for p in tmp_path.glob("epoch*")] == ["epoch-0001-step-000002.safetensors"]
    check_killed("Adam", tmp_path)


@pytest.fixture
def term():
    """The signal numbers received by a user's SIGTERM handler, and a function that sends it."""
    got = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: got.append(signum))
    yield got, lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, previous)


def test_user_signal_handler_runs_after_the_save(tmp_path, term):
    got, send = term
    trainer = new_trainer()
    handler = signal.getsignal(signal.SIGTERM)
    fit(trainer, Checkpoint(tmp_path, every_epochs=None), At(7, send))
    assert got == [signal.SIGTERM]
    assert sorted(p.name for p in tmp_path.glob("epoch*")) == [
        "epoch-0001-step-000002.safetensors",
        "epoch-0003-step-000000.safetensors",
    ]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_is_deferred_to_the_end_of_the_step(term):
    got, send = term
    seen = []
    fit(new_trainer(), At(7, lambda: [send(), seen.extend(got)]), At(8, lambda: seen.extend(got)))
    assert seen == [signal.SIGTERM]


def test_a_signal_during_an_error_is_not_lost(tmp_path, term):
    got, send = term

    def both():
        send()
        stop()

    with pytest.raises(Stop):
        fit(new_trainer(), Checkpoint(tmp_path), At(7, both))
    assert got == [signal.SIGTERM]


OTHER = """
import sys, nnx
from training import fit, new_trainer
from nnx import checkpoint
assert nnx.GPU is (sys.argv[3] == "1")
trainer = new_trainer("Adam", dtype="float64")
if sys.argv[5] == "float32":
    trainer = nnx.Trainer(nnx.TwoLayerNet(2, 10, 3, rng=1), nnx.Momentum(0.1), rng=0)
if sys.argv[1] != "new":
    trainer.resume(sys.argv[1])
fit(trainer, epochs=int(sys.argv[4]))
checkpoint.save(sys.argv[2], trainer.model, trainer.optimizer, trainer)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not nnx.GPU, reason="needs CuPy (NNX_GPU=1)")
@pytest.mark.parametrize(("first", "second"), [("0", "1"), ("1", "0")])
@pytest.mark.parametrize("net", ["float32", "float64"])  # the spiral net, and the one with all kinds of state
def test_resume_on_the_other_device(first, second, net, tmp_path):
    begun = tmp_path / "begun.safetensors"

    def train(source, target, device, epochs):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "NNX_GPU": device, "PYTHONPATH": path}
        command = [sys.executable, "-c", OTHER, str(source), str(target), device, str(epochs), net]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        file = checkpoint._read(target)
        return {name: file.read(name) for name in file.arrays if name != "trainer.history.columns.seconds"}

    train("new", begun, first, 4)
    stayed = train(begun, tmp_path / "stayed.safetensors", first, 20)  # 100 further steps
    moved = train(begun, tmp_path / "moved.safetensors", second, 20)
    assert len(stayed["trainer.loss_list"]) == 48
    assert stayed.keys() == moved.keys()
    for name, array in stayed.items():
        numpy.testing.assert_allclose(moved[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_thousand_saves_do_not_leak(tmp_path, monkeypatch):
    """200,000 steps with a checkpoint every 100, in this process: constant memory, no leaked file descriptors."""
    x, t = nnx.spiral.load_data()
    trainer = nnx.Trainer(nnx.TwoLayerNet(2, 10, 3, rng=1), nnx.Adam(), rng=0)
    callback = Checkpoint(tmp_path, every_epochs=None, every_steps=100)

    def used():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))

    saves, seen, save = [], [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *args: saves.append(0) or save(path, *args))
    for _ in range(20):
        trainer.fit(x, t, 1000, 30, eval_interval=None, verbose=False, callbacks=[callback])
        trainer.history.clear()  # it grows with the epochs, by less than a kilobyte each
        seen.append(used())
    print("MiB and descriptors after every 10,000 steps and 100 saves:", seen)
    memory, descriptors = zip(*seen, strict=True)
    assert max(memory[1:]) <= 1.01 * memory[0]
    assert set(descriptors) == {descriptors[0]}
    assert trainer.current_epoch == 20_000
    assert len(saves) >= 2000
    assert len(list(tmp_path.iterdir())) == 3
