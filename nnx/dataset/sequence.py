"""Problems for sequence-to-sequence models, as text: additions ("16+75  _91  ") and dates ("2/10/93" to "_1993-02-10").

N problems, Q characters per question, A per answer, with the "_" that it begins with.
"""

from __future__ import annotations

import datetime
import os

import numpy

from nnx.checks import check_integer
from nnx.dataset.files import data_folder, find_file

__all__ = ["get_vocab", "load_data"]

_PROBLEMS = 50_000
_DIGITS = 3
_DATE_LENGTH = 29  # of "WEDNESDAY, SEPTEMBER 27, 1994"
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FIRST_DAY, _LAST_DAY = datetime.date(1970, 1, 1).toordinal(), datetime.date(2019, 12, 31).toordinal()

_Pair = tuple[numpy.ndarray, numpy.ndarray]
_chars: list[str] = []  # of the last load_data


def load_data(
    file_name: str = "addition.txt", seed: int | None = 1984, folder: str | os.PathLike[str] | None = None
) -> tuple[_Pair, _Pair]:
    r"""Return (x_train, t_train), (x_test, t_test), the character ids of questions and answers; 90% are for training.

    The files are the book's addition.txt and date.txt, in `folder` or in the folder nnx of the user's cache directory
    (~/.cache/nnx, $XDG_CACHE_HOME/nnx, ~/Library/Caches/nnx or %LOCALAPPDATA%/nnx). Where one of these two is not
    there, 50,000 different problems of the same kind and format are generated, always the same ones, and a line says
    so; results are then comparable with the book's, but not equal.

    Parameters
    ----------
    file_name : str
        A file with a problem per line, a question and an answer that begins with "_", of equal lengths in all lines.
    seed : int or None
        Shuffles the problems as the book's code does, but the global generator is not seeded; None draws from it.
    folder : path or None

    Returns
    -------
    x_train, x_test : (N, Q) int64
    t_train, t_test : (N, A) int64
        Ids are assigned in order of first appearance in the file; `get_vocab` returns the characters.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a line is not a problem of the length of the first.

    Examples
    --------
    >>> from pathlib import Path
    >>> from nnx.dataset import sequence
    >>> lines = [f"{a}+{b}_{a + b:<2}\n" for a in range(10) for b in range(10)]
    >>> _ = Path("sums.txt").write_text("".join(lines))
    >>> (x_train, t_train), (x_test, t_test) = sequence.load_data("sums.txt", folder=".")
    >>> x_train.shape, t_train.shape, x_test.shape
    ((90, 3), (90, 3), (10, 3))
    """
    if seed is not None and check_integer("sequence.load_data: seed", seed, 0) >= 1 << 32:
        raise ValueError(f"sequence.load_data: seed must be below 2**32, got {seed}")
    questions, answers = _read(file_name, folder)
    text = "".join(q + a for q, a in zip(questions, answers, strict=True))
    codes = numpy.frombuffer(text.encode("utf-32-le"), numpy.dtype("<u4"))
    kinds, first, inverse = numpy.unique(codes, return_index=True, return_inverse=True)
    by_appearance = first.argsort()
    _chars[:] = map(chr, kinds[by_appearance].tolist())
    ids = by_appearance.argsort()[inverse].reshape(len(questions), -1)
    order = numpy.arange(len(ids))
    (numpy.random if seed is None else numpy.random.RandomState(seed)).shuffle(order)
    ids, width = ids[order], len(questions[0])
    x, t, split = ids[:, :width].copy(), ids[:, width:].copy(), len(ids) - len(ids) // 10
    return (x[:split], t[:split]), (x[split:], t[split:])


def get_vocab() -> tuple[dict[str, int], dict[int, str]]:
    r"""Return char_to_id and id_to_char of the last `load_data`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from nnx.dataset import sequence
    >>> _ = Path("sums.txt").write_text("1+1_2\n1+2_3\n")
    >>> _ = sequence.load_data("sums.txt", folder=".")
    >>> char_to_id, id_to_char = sequence.get_vocab()
    >>> char_to_id
    {'1': 0, '+': 1, '_': 2, '2': 3, '3': 4}
    """
    if not _chars:
        raise RuntimeError("sequence.get_vocab: the vocabulary is that of the loaded data; call load_data first")
    return {char: i for i, char in enumerate(_chars)}, dict(enumerate(_chars))


def _read(file_name: str, folder: str | os.PathLike[str] | None) -> tuple[list[str], list[str]]:
    """Return the questions and answers of a file, or generated ones."""
    path = find_file(file_name, folder)
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
    elif file_name in _GENERATORS:
        print(  # noqa: T201 - the reader should know
            f"sequence: no {file_name} in {data_folder(folder)}; generated {_PROBLEMS} problems of the same kind"
        )
        lines = _GENERATORS[file_name]()
    else:
        raise FileNotFoundError(f"sequence.load_data: no {file_name} in {data_folder(folder)}; put it there")
    problems = [line.partition("_") for line in lines]
    for number, (question, mark, answer) in enumerate(problems, 1):
        if not mark or (len(question), len(answer)) != (len(problems[0][0]), len(problems[0][2])):
            raise ValueError(
                f"sequence.load_data: {path}, line {number}: expected a question and an answer that begins with _, of "
                f"the lengths in line 1, got {lines[number - 1]!r:.80}"
            )
    if not problems:
        raise ValueError(f"sequence.load_data: {path} is empty")
    return [question for question, _, _ in problems], [mark + answer for _, mark, answer in problems]


def _generate_additions() -> list[str]:
    """Return different sums of two numbers of 1 to 3 digits, "16+75  _91  "."""
    rng = numpy.random.RandomState(0)  # whose numbers are the same in all versions of NumPy
    digits = rng.randint(1, _DIGITS + 1, (6 * _PROBLEMS, 2))
    pairs = _unique_rows((rng.random_sample(digits.shape) * 10**digits).astype(numpy.int64))
    width = 2 * _DIGITS + 1
    return [f"{f'{a}+{b}':{width}}_{a + b!s:{_DIGITS + 1}}" for a, b in pairs.tolist()]


def _generate_dates() -> list[str]:
    """Return different dates in different spellings, "2/10/93" and so on, and as "_1993-02-10"."""
    rng = numpy.random.RandomState(0)
    styles = 13
    pairs = numpy.stack(
        [rng.randint(_FIRST_DAY, _LAST_DAY + 1, 2 * _PROBLEMS), rng.randint(0, styles, 2 * _PROBLEMS)], axis=1
    )
    lines = []
    for ordinal, style in _unique_rows(pairs).tolist():
        date = datetime.date.fromordinal(ordinal)
        lines.append(f"{_spell(date, style):{_DATE_LENGTH}}_{date.isoformat()}")
    return lines


def _spell(date: datetime.date, style: int) -> str:
    """Return a date in one of 13 styles: the month as a number; its name, short or with the day of the week."""
    if style == 0:
        return f"{date.month}/{date.day}/{date.year % 100:02}"
    form, case = divmod(style - 1, 3)
    month = _MONTHS[date.month - 1]
    text = f"{month[:3] if form == 0 else month} {date.day}, {date.year}"
    if form == 2:
        text = f"{_DAYS[date.weekday()]}, {text}"
    if form == 3:
        text = f"{date.day} {month} {date.year}"
    return (text, text.lower(), text.upper())[case]


def _unique_rows(pairs: numpy.ndarray) -> numpy.ndarray:
    """Return the first `_PROBLEMS` different rows, in their order."""
    keys = pairs[:, 0] * (pairs.max() + 1) + pairs[:, 1]
    _, first = numpy.unique(keys, return_index=True)
    return pairs[numpy.sort(first)[:_PROBLEMS]]


_GENERATORS = {"addition.txt": _generate_additions, "date.txt": _generate_dates}
