"""Training interrupted at any step resumes from its last checkpoint and is reproduced bit for bit."""

import os
import pickle
import signal
from pathlib import Path

import pytest
from training import GENERATORS, OPTIMIZERS, At, Stop, callbacks, check_resumed, everything, fit, new_trainer, stop

import nnx
from nnx import checkpoint
from nnx.callbacks import BestWeights, Checkpoint, EarlyStopping, LearningRateScheduler
from nnx.optimizer import step_decay

pytest.importorskip("safetensors")
ROOT = Path(__file__).parent.parent


def start(trainer, folder, steps, *others, **options):
    """Train `steps` steps, with a checkpoint after each, then exit."""
    with pytest.raises(Stop):
        fit(trainer, Checkpoint(folder, every_steps=1), *others, At(steps, stop), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 4, 5, 6, 14])
def test_resumed_training_matches_uninterrupted_training(optimizer, steps, tmp_path):
    start(new_trainer(optimizer), tmp_path, steps, *callbacks())
    check_resumed(tmp_path, optimizer)


@pytest.mark.parametrize("generator", GENERATORS)
def test_resume_with_every_generator(generator, tmp_path):
    start(new_trainer(generator=generator), tmp_path, 8, *callbacks())
    check_resumed(tmp_path, generator=generator)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_resume_with_every_dtype(dtype, tmp_path):
    expected, first, second = (new_trainer("Momentum", dtype=dtype) for _ in range(3))
    fit(expected)
    start(first, tmp_path, 8)
    second.resume(tmp_path)
    fit(second)
    assert everything(second) == everything(expected)


def test_a_resumed_training_can_be_stopped_and_resumed_again(tmp_path):
    start(new_trainer(), tmp_path, 3, *callbacks())
    for _ in range(5):
        trainer = new_trainer(seed=2)
        trainer.resume(tmp_path)
        start(trainer, tmp_path, 2, *callbacks())
    check_resumed(tmp_path)


def test_resume_with_drop_last(tmp_path):
    start(new_trainer(), tmp_path, 7, *callbacks(), drop_last=True)
    check_resumed(tmp_path, drop_last=True)


def test_early_stopping_patience_is_restored(tmp_path):
    def others():
        return [
            Checkpoint(tmp_path, every_steps=1, keep=99),
            EarlyStopping(3),
            LearningRateScheduler(step_decay(3.0, 2)),
        ]

    trainer = new_trainer("SGD")
    stopping = others()
    fit(trainer, *stopping, epochs=30)
    assert trainer.current_epoch < 30
    for since in (1, 2):
        path = tmp_path / f"epoch-{trainer.current_epoch - since:04d}-step-000002.safetensors"
        other = new_trainer("SGD", seed=2)
        other.resume(path)
        fit(other, *others()[1:], epochs=30)
        assert everything(other) == everything(trainer)


def test_best_weights_from_before_the_interruption_are_restored(tmp_path):
    def others():
        return [LearningRateScheduler(lambda step: 0.5 if step < 5 else 30.0), BestWeights()]

    best = others()
    start(new_trainer("SGD"), tmp_path, 12, *best)
    check_resumed(tmp_path, "SGD", others=others)
    assert best[1].epoch == 1


def test_resuming_finished_training_does_nothing(tmp_path):
    fit(new_trainer(), Checkpoint(tmp_path), *callbacks())
    check_resumed(tmp_path)
    trainer = new_trainer()
    trainer.resume(tmp_path)
    fit(trainer, Checkpoint(tmp_path))
    fit(trainer, Checkpoint(tmp_path))
    assert trainer.current_epoch == 6  # the second call of fit is a new one


def test_resuming_after_early_stopping_does_nothing(tmp_path):
    trainer = new_trainer()
    fit(trainer, Checkpoint(tmp_path, every_epochs=10), At(7, trainer.stop), epochs=20)
    assert trainer.current_epoch == 2
    other = new_trainer()
    other.resume(tmp_path)
    fit(other, epochs=20)
    assert other.current_epoch == 2


def test_stop_within_an_epoch_takes_effect_at_its_end(tmp_path):
    trainer = new_trainer()
    start(trainer, tmp_path, 8, At(7, trainer.stop), epochs=20)
    other = new_trainer()
    other.resume(tmp_path)
    fit(other, epochs=20)
    assert (other.current_epoch, other.iteration) == (2, 0)


def test_resume_from_a_manual_save_within_an_epoch(tmp_path):
    trainer, path = new_trainer(), tmp_path / "mine.safetensors"
    everyday = callbacks()
    with pytest.raises(Stop):
        fit(
            trainer,
            *everyday,
            At(9, lambda: checkpoint.save(path, trainer.model, trainer.optimizer, trainer)),
            At(11, stop),
        )
    check_resumed(path)


def test_trainer_saved_between_two_fits_starts_a_new_one(tmp_path):
    trainer, path = new_trainer(), tmp_path / "between.safetensors"
    fit(trainer)
    checkpoint.save(path, trainer.model, trainer.optimizer, trainer)
    other = new_trainer(seed=2)
    other.resume(path)
    for t in (trainer, other):
        fit(t)
    assert everything(other) == everything(trainer)
    assert other.current_epoch == 6


def test_partial_epoch_requires_the_same_batches(tmp_path):
    start(new_trainer(), tmp_path, 7)
    trainer = new_trainer()
    trainer.resume(tmp_path)
    with pytest.raises(ValueError, match="has 70 rows in 5 batches of 16, got 70 rows in 7 batches of 10; finish it"):
        fit(trainer, batch_size=10)
    with pytest.raises(ValueError, match="later than"):  # the resumed state is kept
        Checkpoint(tmp_path).on_begin(new_trainer())
    fit(trainer, *callbacks())
    assert trainer.current_epoch == 3


def test_resumed_state_is_used_by_one_successful_fit(tmp_path):
    start(new_trainer(), tmp_path / "run", 7)
    trainer, other = new_trainer(), new_trainer()
    for t in (trainer, other):
        t.resume(tmp_path / "run")
    fit(new_trainer(), Checkpoint(tmp_path / "taken"))
    with pytest.raises(ValueError, match="choose another folder"):
        fit(trainer, Checkpoint(tmp_path / "taken"))
    for t in (trainer, other):
        fit(t, epochs=2)
    assert everything(trainer) == everything(other)
    trainer.resume(tmp_path / "run")
    with pytest.raises(Stop):
        fit(trainer, At(1, stop))
    assert (trainer.current_epoch, trainer.iteration) == (1, 3)
    fit(trainer, epochs=1, batch_size=10)
    assert trainer.current_epoch == 2


def test_progress_bar_starts_at_the_resumed_step(tmp_path, capsys, monkeypatch):
    start(new_trainer(), tmp_path, 7)
    trainer = new_trainer()
    trainer.resume(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(trainer, verbose=None)
    assert "10/10" in capsys.readouterr().err


def test_files_are_numbered_and_the_newest_are_kept(tmp_path):
    trainer = new_trainer()
    fit(trainer, Checkpoint(tmp_path, every_epochs=2, every_steps=3, keep=4), epochs=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "epoch-0004-step-000000.safetensors",
        "epoch-0004-step-000001.safetensors",
        "epoch-0004-step-000004.safetensors",
        "epoch-0005-step-000000.safetensors",
    ]


def test_best_checkpoint_is_kept(tmp_path):
    trainer = new_trainer("SGD")
    rates = LearningRateScheduler(lambda step: 0.5 if step < 15 else 30.0)
    callback = Checkpoint(tmp_path, every_epochs=4)
    fit(trainer, callback, rates, epochs=8)
    best = min(range(8), key=lambda epoch: trainer.val_list[epoch][0])
    other = new_trainer()
    checkpoint.load(tmp_path / "best.safetensors", other.model)
    x, t = nnx.spiral.load_data()
    assert other.model.evaluate(x[1::9], t[1::9]) == trainer.val_list[best]
    assert callback.best_loss == trainer.val_list[best][0]
    assert best < 7
    fit(new_trainer(), Checkpoint(tmp_path / "none", best=False))
    assert not (tmp_path / "none" / "best.safetensors").exists()


def test_one_folder_per_training(tmp_path):
    fit(new_trainer(), Checkpoint(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"epoch-0003-step-000000\.safetensors is later than epoch 0, step 0, where"):
        fit(new_trainer(), Checkpoint(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_max_epoch_below_the_finished_epochs_is_an_error(tmp_path):
    start(new_trainer(), tmp_path, 7, *callbacks())
    trainer = new_trainer()
    trainer.resume(tmp_path)
    assert (trainer.current_epoch, trainer.iteration) == (1, 2)
    before = everything(trainer)
    with pytest.raises(ValueError, match="the saved fit has begun 2 epochs; max_epoch counts these too, got 1"):
        fit(trainer, *callbacks(), epochs=1)
    assert everything(trainer) == before
    start(trainer, tmp_path, 8, *callbacks())
    check_resumed(tmp_path)


def test_relative_folder_is_resolved_at_construction(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fit(new_trainer(), At(2, lambda: monkeypatch.chdir("elsewhere")), Checkpoint("folder"), epochs=1)
    assert [p.name for p in tmp_path.glob("folder/epoch*")] == ["epoch-0001-step-000000.safetensors"]


@pytest.mark.parametrize("setting", ["every_epochs", "every_steps", "keep"])
def test_checkpoint_settings_are_validated(setting):
    with pytest.raises(ValueError, match=f"Checkpoint: {setting} must be at least 1, got 0"):
        Checkpoint("folder", **{setting: 0})


def test_resume_skips_a_damaged_newest_file(tmp_path):
    start(new_trainer(), tmp_path, 8, *callbacks())
    *_, before, newest = sorted(tmp_path.glob("epoch*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    trainer = new_trainer()
    with pytest.warns(RuntimeWarning, match=rf"{newest.name}.*; set aside as {newest.name}\.damaged") as warned:
        assert trainer.resume(tmp_path) == before
    assert warned[0].filename == __file__  # the line in user code
    start(trainer, tmp_path, 3, *callbacks())
    check_resumed(tmp_path)
    with pytest.raises(FileNotFoundError, match="no intact checkpoint found"):
        trainer.resume(tmp_path / "..")


def test_a_file_of_another_training_changes_nothing(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, new_trainer().model)
    trainer = new_trainer("SGD", "Philox", seed=2)
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"optimizer\.SGD: here, but not in the file\n  trainer: here, but not"):
        trainer.resume(path)
    start(new_trainer(), tmp_path, 7)
    with pytest.raises(ValueError, match=r"optimizer\.Adam: in the file, but not here") as error:
        trainer.resume(tmp_path)
    assert "optimizer.SGD: here, but not in the file" in str(error.value)
    message = "trainer: invalid generator state (that of Generator PCG64, and here is Generator Philox)"
    assert message in str(error.value)
    assert everything(trainer) == before


def test_full_disk_issues_a_warning_and_training_continues(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of Unix")
    expected = new_trainer()
    fit(expected, *callbacks())
    trainer = new_trainer()
    size = 0

    def fill():
        nonlocal size
        size = max(p.stat().st_size for p in tmp_path.glob("epoch*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.warns(RuntimeWarning, match=r"not saved: .*; training continues") as warned:
            fit(trainer, Checkpoint(tmp_path, every_epochs=1, best=False), At(7, fill), *callbacks())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [Path(str(w.message).split(": ")[1]).name for w in warned] == [
        "epoch-0002-step-000000.safetensors",
        "epoch-0003-step-000000.safetensors",
    ]
    assert {Path(w.filename).name for w in warned} == {"training.py"}  # the line that calls trainer.fit
    assert everything(trainer) == everything(expected)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001-step-000000.safetensors"]
    check_resumed(tmp_path)


def test_failed_save_does_not_change_best_loss(tmp_path, monkeypatch):
    save = checkpoint.save

    def full(path, model, optimizer, trainer):
        if trainer.current_epoch == 2:
            raise OSError("full")
        save(path, model, optimizer, trainer)

    monkeypatch.setattr(checkpoint, "save", full)
    trainer, callback, losses = new_trainer(), Checkpoint(tmp_path), iter([0, 5, 3, 4])
    trainer.model.evaluate = lambda x, t: (next(losses), None)
    with pytest.warns(RuntimeWarning, match="full; training continues"):
        fit(trainer, callback)
    assert callback.best_loss == 4
    other = new_trainer()
    other.resume(tmp_path / "best.safetensors")
    assert other.val_list == [(5, None), (3, None), (4, None)]


def test_unreadable_checkpoints_are_skipped(tmp_path, monkeypatch):
    trainer = new_trainer()
    fit(trainer, Checkpoint(tmp_path), epochs=3)
    first, second, third = checkpoint.list_checkpoints(tmp_path)
    third.write_bytes(b"damaged")
    read = checkpoint._read

    def unreadable(path):
        if path == second:
            raise PermissionError("refused")
        return read(path)

    def no_rename(self, target):
        raise PermissionError("refused")

    monkeypatch.setattr(checkpoint, "_read", unreadable)
    monkeypatch.setattr(type(third), "replace", no_rename)
    with pytest.warns(RuntimeWarning, match="skipped, and not renamed: refused"):
        assert checkpoint.latest_checkpoint(tmp_path) == first


def test_old_files_that_cannot_be_removed_are_a_warning(tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise PermissionError("refused")

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.warns(RuntimeWarning, match="could not be removed: refused; training continues"):
        fit(new_trainer(), Checkpoint(tmp_path, keep=1, best=False), epochs=2)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("value", [{1: 2}, {"seen": [{3: 4}]}, {1, 2}, object()])
def test_callback_state_that_cannot_be_saved_is_refused_when_fit_begins(value):
    class Remembers(nnx.callbacks.Callback):
        state_names = ("seen",)

    callback, trainer = Remembers(), new_trainer()
    callback.seen = value
    with pytest.raises(TypeError, match=r"Remembers\.seen.* cannot be saved"):
        fit(trainer, callback)
    assert trainer.current_epoch == 0


def test_a_pickled_trainer_holds_no_validation_data():
    trainer = new_trainer()
    fit(trainer)
    assert trainer.validation is not None
    assert pickle.loads(pickle.dumps(trainer)).validation is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_receives_signals_as_before():
    statuses = []

    def child():
        ready, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            os.write(write, b"1")
            while True:
                signal.pause()
        os.read(ready, 1)  # before that the child discards signals
        os.kill(pid, signal.SIGTERM)
        statuses.append(os.waitpid(pid, 0)[1])

    fit(new_trainer(), At(2, child), Interrupts())
    assert os.WTERMSIG(statuses[0]) == signal.SIGTERM


class Interrupts:
    """Makes fit defer SIGTERM."""

    def on_interrupt(self, trainer):
        raise AssertionError("the parent received no signal")
