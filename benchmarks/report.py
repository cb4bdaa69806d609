"""Write the results of `on_gpu.sh` to `<device>.json` and `<device>.md`.

    NNX_GPU=1 python -m benchmarks.report BENCHMARKS.json STAGES.tsv FOLDER

The first is pytest-benchmark's file, the second has one line per stage. The tables have one row per group and
one column per variant: the median, and its ratio to the first one in the row.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
from pathlib import Path

from nnx import np, show_config


def output(*command):
    """Return the first line that `command` prints, or "unknown"."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return lines[0] if lines else "unknown"


def configuration(**more):
    """Return the known configuration that the results depend on, by name, followed by `more`."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        show_config()
    about = dict(line.split(maxsplit=1) for line in text.getvalue().splitlines()) | {
        "CPU": output("sed", "-n", f"s/^model name.*: \\(.*\\)/\\1, {os.cpu_count()} cores/p", "/proc/cpuinfo"),
        "NVIDIA driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
    return {name: value for name, value in (about | more).items() if value != "unknown"}


def device_name():
    """Return the name of the GPU."""
    return np.cuda.runtime.getDeviceProperties(np.cuda.Device().id)["name"].decode()


def slug(name):
    """Return `name` as a valid file name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def table(head, rows):
    """Return the lines of a table with all columns but the first right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


def duration(seconds):
    """Format `seconds` in the unit that gives one to three digits before the decimal point."""
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)) if seconds >= s)
    return f"{seconds / scale:.4g} {unit}"


def ratio(quartiles):
    return "{1:.2f} ({0:.2f}-{2:.2f})".format(*quartiles)


def write(path, lines, result):
    """Write `lines` as <path>.md and `result` as <path>.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def medians(benchmarks):
    """Yield the lines of one table per file, with groups and variants in execution order."""
    files = {}
    for b in benchmarks:
        groups = files.setdefault(b["fullname"].split("::")[0], {})
        groups.setdefault(b["group"], {})[b["params"]["variant"]] = b["stats"]["median"]
    for file, groups in files.items():
        variants = list(dict.fromkeys(v for row in groups.values() for v in row))
        rows = []
        for group, row in groups.items():
            first = next(iter(row.values()))
            cells = [f"{duration(row[v])} ({row[v] / first:.2f})" if v in row else "" for v in variants]
            rows.append([group, *cells])
        yield from ["", f"## {Path(file).name}", *table(["median", *variants], rows)]


def main(benchmarks, stages, folder):
    result = json.loads(Path(benchmarks).read_text()) if Path(benchmarks).exists() else {"benchmarks": []}
    device = device_name()
    result["nnx"] = configuration()
    result.get("machine_info", {}).pop("node", None)  # the host name is private
    for b in result["benchmarks"]:
        b["stats"].pop("data")  # all individual timings: 80 MB
    lines = [f"# nnx on {device}", *table(["", ""], result["nnx"].items())]
    lines += table(
        ["stage", "", "seconds", "last line"], [s.split("\t") for s in Path(stages).read_text().splitlines()]
    )
    lines += medians(result["benchmarks"])
    path = Path(folder, slug(device))
    write(path, lines, result)
    print(f"written: {path}.json and {path.name}.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("benchmarks", "stages", "folder"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
