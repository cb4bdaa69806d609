"""Type checkers reject invalid layers, models, optimizers and callbacks, and accept those without a base class."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("typing")


@pytest.fixture(scope="module")
def errors():
    """Return the lines with errors of mypy --strict, by file, and its output."""
    api = pytest.importorskip("mypy.api", reason="without mypy, which is in the extra `dev`")
    printed, _, _ = api.run(["--strict", "--follow-imports=silent", *map(str, sorted(FOLDER.glob("*.py")))])
    found = re.findall(r"^.*?(\w+\.py):(\d+): (error: .*)$", printed, re.MULTILINE)
    return {name: {int(line): message for file, line, message in found if file == name} for name, *_ in found}


def test_right_arguments_are_accepted(errors):
    assert errors.get("accepted.py", {}) == {}


def test_wrong_arguments_are_rejected(errors):
    lines = (FOLDER / "rejected.py").read_text(encoding="utf-8").splitlines()
    marked = [number for number, line in enumerate(lines, 1) if line.endswith("# rejected")]
    assert sorted(errors["rejected.py"]) == marked
