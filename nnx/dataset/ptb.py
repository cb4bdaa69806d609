"""The Penn Treebank corpus in Mikolov's preparation: 10,000 words, with <unk> for others and <eos> at ends of lines."""

from __future__ import annotations

import os
from pathlib import Path

import numpy

from nnx.dataset.files import data_folder, download, find_file

__all__ = ["load_data", "load_vocab"]

url_base = "https://raw.githubusercontent.com/tomsercu/lstm/master/data/"
key_file = {"train": "ptb.train.txt", "test": "ptb.test.txt", "valid": "ptb.valid.txt"}
_WORDS = {"train": 929_589, "test": 82_430, "valid": 73_760}
_VOCAB_SIZE = 10_000
_MAX_BYTES = 1 << 24


def load_data(
    data_type: str = "train", folder: str | os.PathLike[str] | None = None
) -> tuple[numpy.ndarray, dict[str, int], dict[int, str]]:
    r"""Return the corpus (N,) as word ids, word_to_id and id_to_word.

    The files are ptb.train.txt, ptb.test.txt and ptb.valid.txt, those of the book, in `folder` or in the folder nnx of
    the user's cache directory (~/.cache/nnx, $XDG_CACHE_HOME/nnx, ~/Library/Caches/nnx or %LOCALAPPDATA%/nnx). A file
    that is not there is downloaded to it, over verified TLS. No checksum of the files is known to nnx: a download is
    kept only if it has exactly the words of the published corpus in number (929,589, 82,430 and 73,760) and, for
    training, in kind (10,000). A file that was put there is not checked.

    Parameters
    ----------
    data_type : "train", "test", "valid" or "val"
    folder : path or None

    Returns
    -------
    corpus : (N,) int64
    word_to_id, id_to_word : dicts
        Of the training corpus, with ids in order of first appearance, whatever the `data_type`.

    Raises
    ------
    OSError
        If a file is neither there nor can be downloaded.
    ValueError
        If a download is not the published corpus, or a corpus has a word that is not in the training corpus.

    Examples
    --------
    >>> from pathlib import Path
    >>> from nnx.dataset import ptb
    >>> _ = Path("ptb.train.txt").write_text(" you say goodbye \n i say hello \n")  # in place of the published file
    >>> corpus, word_to_id, id_to_word = ptb.load_data("train", folder=".")
    >>> print(corpus, id_to_word[3])
    [0 1 2 3 4 1 5 3] <eos>
    """
    key = {"val": "valid"}.get(data_type, data_type)
    if key not in key_file:
        raise ValueError(f'ptb.load_data: data_type must be "train", "test", "valid" or "val", got {data_type!r}')
    words = _read_words("train", folder)
    word_to_id, id_to_word = _vocabulary(words)
    if key != "train":
        words = _read_words(key, folder)
    try:
        corpus = numpy.fromiter(map(word_to_id.__getitem__, words), numpy.int64, len(words))
    except KeyError as error:
        raise ValueError(f"ptb.load_data: {key_file[key]} has {error}, which {key_file['train']} has not") from None
    return corpus, word_to_id, id_to_word


def load_vocab(folder: str | os.PathLike[str] | None = None) -> tuple[dict[str, int], dict[int, str]]:
    r"""Return word_to_id and id_to_word of the training corpus; see `load_data`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from nnx.dataset import ptb
    >>> _ = Path("ptb.train.txt").write_text(" you say goodbye \n")  # in place of the published file
    >>> word_to_id, id_to_word = ptb.load_vocab(folder=".")
    >>> word_to_id
    {'you': 0, 'say': 1, 'goodbye': 2, '<eos>': 3}
    """
    return _vocabulary(_read_words("train", folder))


def _vocabulary(words: list[str]) -> tuple[dict[str, int], dict[int, str]]:
    """Return word_to_id and id_to_word, with ids in order of first appearance."""
    word_to_id = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return word_to_id, {i: word for word, i in word_to_id.items()}


def _read_words(key: str, folder: str | os.PathLike[str] | None) -> list[str]:
    name = key_file[key]
    path = find_file(name, folder) or _download(key, data_folder(folder) / name)
    return _split(path.read_text(encoding="utf-8"))


def _split(text: str) -> list[str]:
    """Return the words of a text, with <eos> for each end of a line."""
    return text.replace("\n", " <eos> ").split()


def _download(key: str, path: Path) -> Path:
    url = url_base + path.name

    def check(text: str) -> None:
        words = _split(text)
        kinds = len(set(words)) if key == "train" else _VOCAB_SIZE
        if (len(words), kinds) != (_WORDS[key], _VOCAB_SIZE):
            raise ValueError(
                f"expected {_WORDS[key]} words, got {len(words)}"
                + (f"; expected {_VOCAB_SIZE} different ones, got {kinds}" if key == "train" else "")
            )

    try:
        download(url, path, check, _MAX_BYTES)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"ptb: {url} could not be downloaded ({error}); put the file {path.name} into the folder {path.parent}"
        ) from error
    return path
