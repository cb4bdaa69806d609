"""The examples of chapters 4 to 8 of the book: language model, word vectors, and sequence to sequence."""

import random
import runpy
from pathlib import Path

import numpy
import pytest

from nnx import np, to_cpu


def load(name):
    """Return the names that an example defines."""
    return runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"))


def test_char_lm_learns_a_text_and_continues_it(tmp_path, capsys):
    (tmp_path / "text").write_text("over and over " * 400, encoding="utf-8")
    options = {"epochs": 10, "hidden_size": 16, "lr": 0.03, "temperature": 0.1, "length": 28}
    before, after = load("char_lm")["main"](text=tmp_path / "text", **options)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "5,040 characters to train on, 560 held out, 8 different ones"
    assert len(out[-2]) == 128
    assert out[-2] in "over and over " * 11
    assert out[-1] == f"perplexity on the held-out text: {before:.1f} before training, {after:.2f} after"
    assert 7 < before < 9
    assert 1 <= after < 1.5


def test_word_vectors_finds_words_of_the_same_contexts(tmp_path, capsys):
    """The two words of a pair occur in the same sentences."""
    draw = random.Random(0)
    sentences = "some {} catches mice", "they drive the {} home", "we drink hot {} with sugar"
    pairs = ("cat", "owl"), ("car", "bus"), ("tea", "mocha")
    text = [sentences[i].format(draw.choice(pairs[i])) for i in draw.choices(range(3), k=120)]
    (tmp_path / "text").write_text("\n".join(text), encoding="utf-8")
    options = {"epochs": 6, "lr": 0.1, "window": 2, "vector_size": 16, "sample_size": 2, "threshold": 1}
    words = [first for first, _ in pairs]
    load("word_vectors")["main"](text=tmp_path / "text", words=[*words, "missing"], **options)
    out = capsys.readouterr().out
    for first, second in pairs:
        assert out.split(f"[query] {first}\n")[1].startswith(f" {second}: ")
    assert "missing is not found" in out
    assert out.splitlines()[-1].startswith("loss ")


def test_seq2seq_attention_reads_dates_and_draws_its_attention(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("nnx.dataset.sequence.find_file", lambda name, folder: tmp_path / name)
    dates = [f"{day}/{month}/1999_1999-{month}-{day}" for month in range(10, 13) for day in range(10, 28)] * 4
    (tmp_path / "date.txt").write_text("\n".join(dates), encoding="utf-8")
    accuracy = load("seq2seq_attention")["main"](epochs=2, plot=tmp_path / "attention.png")
    assert 0 <= accuracy <= 1
    assert capsys.readouterr().out.endswith(f"accuracy {accuracy:.4f} on 21 held-out dates\n")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_of_seq2seq_attention(rng):
    model = load("seq2seq_attention")["AttentionSeq2seq"](12, 5, 6, rng)
    x, t = rng.integers(0, 12, (4, 7)), rng.integers(0, 12, (4, 5))
    for param in model.params:
        param *= 3  # otherwise the attention is close to uniform, and has hardly a gradient
    model.forward(x, t)
    model.backward()
    for param, grad in zip(model.params, [g.copy() for g in model.grads], strict=True):
        step = np.asarray(rng.standard_normal(param.shape) * 1e-2, param.dtype)
        losses = []
        for sign in (1, -2):
            param += sign * step
            losses.append(float(model.forward(x, t)))
        param += step
        numpy.testing.assert_allclose((losses[0] - losses[1]) / 2, float((grad * step).sum()), rtol=0.03, atol=3e-6)


def test_attention_seq2seq_generates_what_it_scores_highest(rng):
    """Each character is the best one after those before it, and attention weights are those of its step."""
    model = load("seq2seq_attention")["AttentionSeq2seq"](12, 5, 6, rng)
    x = rng.integers(0, 12, (4, 7))
    answer, weights = model.generate(x, 3, 5)
    model.encode(x)
    scores = to_cpu(model.decode(numpy.concatenate([numpy.full((4, 1), 3), answer[:, :-1]], axis=1)))
    assert (scores.argmax(axis=2) == answer).all()
    numpy.testing.assert_allclose(weights, model.attention.attention_weights.swapaxes(0, 1), rtol=1e-4, atol=1e-6)
