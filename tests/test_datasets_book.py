"""The book's text data sets: read from the user's files, downloaded with checks, or generated."""

import io
import os
import re
import urllib.error
import urllib.request
from datetime import date

import numpy
import pytest

import nnx
from nnx.dataset import ptb, sequence
from nnx.dataset.files import data_folder

PTB = {
    "ptb.train.txt": " the cat <unk> the mat \n a dog N times \n",
    "ptb.test.txt": " the dog \n",
    "ptb.valid.txt": " a mat a mat \n the cat\n",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Let the user's cache directory be an empty one, and no download succeed."""

    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path / "cache" / "nnx"


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def test_data_folder(monkeypatch, cache):
    assert data_folder() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = data_folder("~")
    assert data_folder() == home / ".cache" / "nnx"
    monkeypatch.setattr("sys.platform", "darwin")
    assert data_folder() == home / "Library" / "Caches" / "nnx"
    monkeypatch.setattr("sys.platform", "win32")
    assert data_folder() == cache


@pytest.mark.parametrize("given", [True, False])
def test_ptb_reads_the_users_files(given, tmp_path, cache):
    folder = tmp_path / "mine" if given else cache
    write(folder, PTB)
    options = {"folder": folder} if given else {}
    corpus, word_to_id, id_to_word = ptb.load_data("train", **options)
    words = ["the", "cat", "<unk>", "the", "mat", "<eos>", "a", "dog", "N", "times", "<eos>"]
    assert list(word_to_id) == list(dict.fromkeys(words))
    assert [id_to_word[i] for i in corpus.tolist()] == words
    assert (type(corpus), corpus.dtype) == (numpy.ndarray, numpy.int64)
    for data_type, words in (
        ("test", "the dog <eos>"),
        ("valid", "a mat a mat <eos> the cat <eos>"),
        ("val", "a mat a mat <eos> the cat <eos>"),
    ):
        corpus, *vocab = ptb.load_data(data_type, **options)
        assert vocab == [word_to_id, id_to_word] == [*ptb.load_vocab(**options)]
        assert " ".join(id_to_word[i] for i in corpus.tolist()) == words
    assert sorted(os.listdir(folder)) == sorted(PTB)


def test_ptb_errors(cache):
    write(cache, PTB | {"ptb.test.txt": " the wolf \n"})
    with pytest.raises(ValueError, match=r"ptb.test.txt has 'wolf', which ptb.train.txt has not"):
        ptb.load_data("test")
    with pytest.raises(ValueError, match=r'data_type must be "train", "test", "valid" or "val", got \'dev\''):
        ptb.load_data("dev")


def test_ptb_offline_names_the_file_and_the_folder(cache):
    with pytest.raises(OSError, match=r"no network.*; put the file ptb.train.txt into the folder") as info:
        ptb.load_data()
    assert str(cache) in str(info.value)
    assert not cache.exists()


def _published(words=929_589, kinds=10_000):
    """Return a text with the size of the training corpus."""
    names = [f"w{i}" for i in range(kinds - 1)]
    names += ["w0"] * (words - len(names) - 1)
    return (" ".join(names) + " \n").encode()


class Server:
    def __init__(self, contents, monkeypatch):
        self.contents, self.calls = contents, []
        monkeypatch.setattr(urllib.request, "urlopen", self.urlopen)

    def urlopen(self, url, **options):
        self.calls.append((url, options))
        return io.BytesIO(self.contents)


def test_ptb_downloads_once_to_the_cache(cache, monkeypatch):
    server = Server(_published(), monkeypatch)
    corpus, word_to_id, _ = ptb.load_data()
    assert (len(corpus), len(word_to_id)) == (929_589, 10_000)
    (url, options), *more = server.calls
    assert not more
    assert url == "https://raw.githubusercontent.com/tomsercu/lstm/master/data/ptb.train.txt"
    assert options.keys() == {"timeout"}  # no context: certificates are verified
    assert os.listdir(cache) == ["ptb.train.txt"]
    assert not any(path.endswith(".txt") for path in os.listdir(os.path.dirname(nnx.dataset.__file__)))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (_published(words=929_588), "expected 929589 words, got 929588"),
        (_published(kinds=9_999), "expected 10000 different ones, got 9999"),
        (b"<html>404</html>", "expected 929589 words, got 1"),
        (b"\xff", "utf-8"),
        (b"a " * (1 << 23) + b"a", "more than 16777216 bytes"),
    ],
)
def test_ptb_keeps_no_download_of_other_contents(contents, message, cache, monkeypatch):
    Server(contents, monkeypatch)
    with pytest.raises(ValueError, match=rf"{message}.*put the file ptb.train.txt into the folder"):
        ptb.load_vocab()
    assert not cache.exists()


def test_ptb_does_not_change_how_certificates_are_verified():
    import ssl

    before = ssl._create_default_https_context
    with pytest.raises(OSError, match="no network"):
        ptb.load_data()
    assert ssl._create_default_https_context is before


def by_loop(lines, seed):
    """Return the shuffled questions and answers."""
    order = numpy.arange(len(lines))
    numpy.random.RandomState(seed).shuffle(order)
    return [lines[i].split("_")[0] for i in order], ["_" + lines[i].split("_")[1] for i in order]


LINES = ["16+75  _91  ", "52+607 _659 ", "75+22  _97  ", "63+22  _85  ", "795+3  _798 "] * 5


def as_text(ids):
    _, id_to_char = sequence.get_vocab()
    return ["".join(id_to_char[i] for i in row) for row in ids.tolist()]


@pytest.mark.parametrize("end", ["", "\n"])  # the book cuts the last character of a file without the latter
@pytest.mark.parametrize("given", [True, False])
def test_sequence_reads_the_users_file(end, given, tmp_path, cache, capsys):
    folder = tmp_path / "mine" if given else cache
    write(folder, {"addition.txt": "\n".join(LINES) + end})
    (x_train, t_train), (x_test, t_test) = sequence.load_data(seed=5, **({"folder": folder} if given else {}))
    assert (x_train.shape, t_train.shape, x_test.shape, t_test.shape) == ((23, 7), (23, 5), (2, 7), (2, 5))
    questions, answers = by_loop(LINES, 5)
    assert as_text(x_train) + as_text(x_test) == questions
    assert as_text(t_train) + as_text(t_test) == answers
    char_to_id, id_to_char = sequence.get_vocab()
    assert list(char_to_id) == list(dict.fromkeys("".join(LINES)))
    assert id_to_char == {i: char for char, i in char_to_id.items()}
    assert not capsys.readouterr().out


def test_sequence_vocabulary_is_that_of_the_last_file(cache, monkeypatch):
    write(cache, {"a.txt": "ab_c\nba_d\n", "b.txt": "xä_y\n"})
    sequence.load_data("a.txt")
    first, _ = sequence.get_vocab()
    sequence.load_data("b.txt")
    assert sequence.get_vocab() == ({"x": 0, "ä": 1, "_": 2, "y": 3}, {0: "x", 1: "ä", 2: "_", 3: "y"})
    assert list(first) == ["a", "b", "_", "c", "d"]
    monkeypatch.setattr(sequence, "_chars", [])
    with pytest.raises(RuntimeError, match="call load_data first"):
        sequence.get_vocab()


def test_sequence_errors(cache):
    write(cache, {"a.txt": "ab_c\nba_dd\n", "b.txt": "ab_c\nab c\n", "empty.txt": ""})
    for name, line in (("a.txt", "ba_dd"), ("b.txt", "ab c")):
        with pytest.raises(ValueError, match=rf"{name}, line 2: expected a question and an answer .* got '{line}'"):
            sequence.load_data(name)
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        sequence.load_data("empty.txt")
    with pytest.raises(FileNotFoundError, match=rf"no none.txt in {re.escape(str(cache))}; put it there"):
        sequence.load_data("none.txt")


def test_sequence_does_not_change_the_global_generator(cache):
    write(cache, {"addition.txt": "\n".join(LINES)})
    numpy.random.seed(5)
    expected = numpy.random.rand()
    numpy.random.seed(5)
    sequence.load_data()
    assert numpy.random.rand() == expected
    numpy.random.seed(7)
    (x, _), _ = sequence.load_data(seed=None)  # draws from it, as in the book
    numpy.testing.assert_array_equal(x, sequence.load_data(seed=7)[0][0])


def test_generated_additions(capsys):
    (x_train, t_train), (x_test, t_test) = sequence.load_data()
    line = capsys.readouterr().out
    assert re.fullmatch(r"sequence: no addition.txt in .*; generated 50000 problems of the same kind\n", line)
    assert (x_train.shape, t_train.shape, x_test.shape, t_test.shape) == ((45000, 7), (45000, 5), (5000, 7), (5000, 5))
    assert set(sequence.get_vocab()[0]) == set("0123456789+ _")
    questions, answers = as_text(x_train) + as_text(x_test), as_text(t_train) + as_text(t_test)
    assert len(set(questions)) == 50_000  # no test problem is a training problem
    for question, answer in zip(questions, answers, strict=True):
        assert re.fullmatch(r"\d{1,3}\+\d{1,3} *", question)
        assert answer == f"_{sum(map(int, question.split('+'))):<4}"
    lengths = {(len(a), len(b.strip())) for a, b in (q.split("+") for q in questions)}
    assert len(lengths) == 9
    first, second = numpy.array([[int(n) for n in q.split("+")] for q in questions]).mean(axis=0)
    assert first == pytest.approx(second, rel=0.05)
    numpy.testing.assert_array_equal(sequence.load_data()[0][0], x_train)


FORMS = [
    r"(\d{1,2})/(\d{1,2})/(\d\d)",
    r"([a-z]{3}) (\d{1,2}), (\d{4})",
    r"([a-z]+) (\d{1,2}), (\d{4})",
    r"[a-z]+, ([a-z]+) (\d{1,2}), (\d{4})",
    r"(\d{1,2}) ([a-z]+) (\d{4})",
]
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


def test_generated_dates(capsys):
    (x_train, t_train), (x_test, t_test) = sequence.load_data("date.txt")
    assert "no date.txt" in capsys.readouterr().out
    assert (x_train.shape, t_train.shape, x_test.shape, t_test.shape) == (
        *((45000, 29), (45000, 11)),
        *((5000, 29), (5000, 11)),
    )
    assert len(sequence.get_vocab()[0]) == 59  # as in the book
    questions, answers = as_text(x_train) + as_text(x_test), as_text(t_train) + as_text(t_test)
    seen = set()
    for question, answer in zip(questions, answers, strict=True):
        assert answer[0] == "_"
        day = date.fromisoformat(answer[1:])
        text = question.strip()
        form, match = next((f, m) for f, m in ((f, re.fullmatch(f, text.lower())) for f in FORMS) if m)
        assert text in (text.lower(), text.upper(), text.title())
        seen.add((form, text.islower(), text.isupper()))
        a, b, year = match.groups()
        number, month = (b, a) if form != FORMS[4] else (a, b)
        assert int(number) == day.day
        assert (int(month) if month.isdecimal() else MONTHS.index(month[:3]) + 1) == day.month
        assert year == str(day.year)[-len(year) :]
        if form == FORMS[3]:
            assert text.lower().startswith(["mon", "tue", "wed", "thu", "fri", "sat", "sun"][day.weekday()])
    assert len(seen) == 13
