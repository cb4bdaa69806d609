"""Where the files of data sets are: a folder of the user's, or the user's cache directory; never the package."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["data_folder", "download", "find_file"]

_TIMEOUT = 30  # seconds without an answer


def data_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return `folder`, or by default the folder nnx in the user's cache directory, which need not exist.

    That is $XDG_CACHE_HOME/nnx or ~/.cache/nnx, on macOS ~/Library/Caches/nnx, on Windows %LOCALAPPDATA%/nnx.
    """
    if folder is not None:
        return Path(folder).expanduser()
    home = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    default = {"darwin": "~/Library/Caches", "win32": "~/AppData/Local"}.get(sys.platform, "~/.cache")
    return Path(home or default).expanduser() / "nnx"


def find_file(file_name: str, folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the path of a file in `data_folder(folder)`, or None if it is not there."""
    path = data_folder(folder) / file_name
    return path if path.is_file() else None


def download(url: str, path: Path, check: Callable[[str], None], max_bytes: int) -> None:
    """Save the text at `url`, an https address, as `path`, once it is complete and `check(text)` has not raised.

    Certificates are verified, as by Python's default.

    Raises
    ------
    OSError
        If the download fails, or the file cannot be written.
    ValueError
        If the text is longer than `max_bytes`, is not UTF-8, or `check` raises one.
    """
    from urllib.request import urlopen  # noqa: PLC0415 - it loads ssl, and `import nnx` loads nothing that few need

    with urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310 - https, see above
        data = response.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{url}: more than {max_bytes} bytes")
    check(data.decode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as temporary:
        file = Path(temporary, path.name)
        file.write_bytes(data)
        file.replace(path)
