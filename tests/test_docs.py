"""Every public name is in the API reference, with an example that runs; so does the code in README and in docs/."""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import nnx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
READMES = sorted(ROOT.glob("README*.md"))
PAGES = [*READMES, *sorted(DOCS.glob("*.md"))]
# modules whose names users get elsewhere, or not at all
INTERNAL = "__main__ _version arguments batches checks config device info kernels np rng signals train_state tree"
NAMES = {module.name for module in pkgutil.iter_modules(nnx.__path__)} - {*INTERNAL.split()}
PUBLIC = ["nnx", *(f"nnx.{name}" for name in sorted(NAMES))]


def documented():
    """Yield the classes and functions listed in the API reference, by name."""
    for page in sorted(DOCS.glob("api/*.rst")):
        text = page.read_text(encoding="utf-8")
        module = re.search(r"automodule:: (\S+)", text)[1]
        for name in re.findall(r"^   ([A-Za-z_][\w.]*)$", text.partition("autosummary::")[2], re.MULTILINE):
            yield f"{module}.{name}", pkgutil.resolve_name(f"{module}.{name}")


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_api_reference(name):
    module = importlib.import_module(name)
    for key in getattr(module, "__all__", ()):
        value = getattr(module, key)
        if isinstance(value, type | FunctionType) and value.__module__.startswith("nnx"):
            assert any(value is other for other in DOCUMENTED.values()), f"{name}.{key}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(DOCUMENTED[name]), {}, name, None, 0)
    assert examples.examples, f"{name} has no example"
    report = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append)
    assert not report, "".join(report)


def blocks(text):
    """Yield the language, the code and the number of the first line of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2], text.count("\n", 0, match.start(2))


def output_of(script, name, folder):
    """Run the script in the folder and return what it prints."""
    (folder / name).write_text(script, encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, name], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_pages_runs_and_prints_the_shown_output(page, tmp_path):
    """The python blocks of a page are one script; a block "output" shows what the block before it prints."""
    if nnx.GPU and page.stem in ("training", "from_keras", "from_sklearn", "README.ja", "README.ko", "README.zh"):
        pytest.skip("long trainings, whose parts are tested on CuPy elsewhere, or the code of README.md")
    script, shown = "", []
    for language, code, line in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            # blank lines, so that a traceback has the line numbers of the page
            script += "\n" * (line - script.count("\n")) + code + "print(end='\\0')\n"
            shown.append(None)
        elif language == "output":
            shown[-1] = code
    for want, got in zip(shown, output_of(script, page.name, tmp_path).split("\0"), strict=False):
        assert want is None or doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS), f"{want}\n{got}"


def test_notebook_runs_and_is_stored_without_outputs(tmp_path):
    notebook = json.loads((ROOT / "examples" / "chapter1.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    script = "\n".join("".join(cell["source"]).removeprefix("%matplotlib inline") for cell in cells)
    accuracies = re.findall(r"accuracy (\S+)", output_of(script, "chapter1.py", tmp_path))
    assert [float(accuracy) > 0.94 for accuracy in accuracies] == [True, True]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        folders = page.parent, ROOT / "examples"  # generate.py copies the notebook from there into docs/
        assert any((folder / link).exists() for folder in folders), link


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.stem)
def test_readme_is_short_and_has_the_measured_speed(page):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert generate["readme"](text) == text, "run docs/generate.py"


def untranslated(page):
    """Return what a README has in any language: its markers, headings and code, and its links to the other READMEs."""
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^(?:<!-- \w+ -->$|#+ |```(?:.|\n)*?^```$)", text, re.MULTILINE)
    prose = {*re.findall(r"`[^`\n]+`", text), *re.findall(r"\]\((.*?)\)", text), page.name}
    return [re.sub(" +# .*", "", part) for part in parts], prose


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.stem)
def test_translations_have_the_code_links_and_headings_of_readme(page):
    assert {other.name for other in READMES} == {f"README{language}.md" for language in ("", ".ja", ".ko", ".zh")}
    assert untranslated(page) == untranslated(ROOT / "README.md")


def test_picture_of_the_modules_has_every_module():
    picture = (DOCS / "modules.svg").read_text(encoding="utf-8")
    modules = {module.name for module in pkgutil.iter_modules(nnx.__path__)} - {"__main__", "_version"}
    assert {name for name in modules if not re.search(rf">{name}\b", picture)} == set()
