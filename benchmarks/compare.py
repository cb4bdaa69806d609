"""Measure nnx beside what a reader would pick instead, and write `cpu.json`, `cpu.md` and `cpu.png`.

    python -m benchmarks.compare [--quick] [--only 2-10-3/30 'spiral/*' ...]    # in the root, on Linux

A training step of each workload D-H-C/N, and whole programs from start to exit, in the variants of
`peers.py`: each in a process of its own, in turns, on the same cores. What computes other losses
than the book's formulas is reported and not timed; a peer that is not installed is a row that says
so. A ratio is the median of the rounds' ratios: each round's time beside another's in the same
round. With NNX_GPU=1 all of it runs on the GPU, and the files bear its name.
"""

import argparse
import compileall
import contextlib
import fnmatch
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

import nnx
from benchmarks import report
from benchmarks.peers import JOBS, VARIANTS
from nnx import GPU

ROOT = Path(__file__).parents[1]
WORKLOADS = ["2-10-3/30", "64-100-10/100", "784-100-10/100", "784-512-10/128", "784-1024-10/1024", "1024-4096-1024/512"]
WHOLE = ["nnx", "book float64", "PyTorch eager", "jax.jit"]
GROUPS = {
    **{workload: list(VARIANTS) for workload in WORKLOADS},
    "1024-1024-1024-1024-1024-1024/256": [v for v in VARIANTS if "book" not in v],  # the book's net has two layers
    **dict.fromkeys(("import", *JOBS), WHOLE),  # the book imports NumPy, and nothing else
}
BASES = ["nnx", "floor"]
PAUSE = 0.15  # seconds: OpenBLAS's threads spin for a tenth of a second after their last call, on the next one's cores
HEAD = ["", "median (quartiles)", "times nnx", "times the floor", "peak memory"]
CUDA = ["cupy-cuda12x", "cupy-cuda13x", "cuda-toolkit[cublas,cudart,curand,nvrtc]"] if GPU else []
INSTALLED = {  # what each asks of an empty environment
    "nnx": ["numpy", "tqdm", *CUDA],
    "book": ["numpy", *CUDA],
    "PyTorch": ["torch"],
    "JAX": ["jax", *(["jax[cuda12]", "jax[cuda13]"] if GPU else [])],
}


class Worker(subprocess.Popen):
    """The process of a row's variant, which waits for its turn."""

    def __init__(self, row, *data):
        device = "cuda" if GPU else "cpu"
        command = [sys.executable, "-m", "benchmarks.peers", device, row["variant"], row["group"], *data]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self):
        line = self.stdout.readline()
        return json.loads(line) if line else {"note": f"failed: its process ended with {self.wait()}"}

    def seconds(self, tens):
        """Return what `tens` times ten steps take; NaN in a process that is gone."""
        if self.poll() is not None:
            return math.nan
        print(tens, file=self.stdin, flush=True)
        return self.answer().get("seconds", math.nan)


def check(rows):
    """Note the rows whose losses are not those of the book's float64, or else of the first that has any."""
    rows = sorted((row for row in rows if row.get("losses")), key=lambda row: row["variant"] != "book float64")
    for row in rows:
        if not numpy.allclose(row["losses"], rows[0]["losses"], rtol=1e-4, atol=1e-5):
            row["note"] = f"not timed: its losses are not those of {rows[0]['variant']}"


def turns(rows, rounds, measure):
    """Append a figure a round to `seconds` of the rows without a note, forwards, then backwards, and so on."""
    rows = [row for row in rows if "note" not in row]
    for _ in range(rounds):
        for row in rows:
            time.sleep(PAUSE)
            row["seconds"].append(measure(row))
        rows.reverse()


def time_steps(rows, rounds, least):
    """Start and warm up the variants of a workload one after the other, then time them `least` seconds a round."""
    workers, tens = {}, {}
    with contextlib.ExitStack() as stack:
        for row in rows:
            name = row["variant"]
            workers[name], tens[name] = stack.enter_context(Worker(row)), 1
            row |= workers[name].answer()
            seconds = math.nan if "note" in row else workers[name].seconds(1)
            while seconds < least:
                tens[name] = math.ceil(tens[name] * min(10, 1.2 * least / seconds))
                seconds = workers[name].seconds(tens[name])
        check(rows)
        turns(rows, rounds, lambda row: workers[name := row["variant"]].seconds(tens[name]) / (10 * tens[name]))


def time_programs(rows, rounds, *data):
    """Time processes from start to exit; the first of each warms the file cache, and is compared."""

    def run(row):
        begin = time.perf_counter()
        with Worker(row, *data) as worker:
            row |= worker.answer()
        return time.perf_counter() - begin

    for row in rows:
        run(row)
    check(rows)
    turns(rows, rounds, run)


def save_data(job, folder):
    """Write the rows that a job trains on, in whole batches, and return the files."""
    if job == "spiral":
        x, t = nnx.spiral.load_data()
        t = t.argmax(axis=1)
    else:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra

        x, t = load_digits(return_X_y=True)
        x, t = x[:1700] / 16, t[:1700]
    files = [f"{folder}/{job}.{name}.npy" for name in "xt"]  # no archive, which takes longer to open than to read
    for file, data in zip(files, (x, t), strict=True):
        numpy.save(file, data)
    return files


def measure(group, variants, rounds, quick, folder):
    """Return a row for each variant of a group."""
    rows = [{"group": group, "variant": variant, "seconds": []} for variant in variants]
    if "/" in group:
        time_steps(rows, rounds, least=0.02 if quick else 0.2)
    elif group not in JOBS:
        time_programs(rows, rounds)
    else:
        try:
            time_programs(rows, rounds, *save_data(group, folder))
        except ImportError as error:
            rows = [row | {"note": f"absent: {error}"} for row in rows]
    seconds = {row["variant"]: row["seconds"] for row in rows}
    for row in rows:
        row["quartiles"] = quartiles(row["seconds"])
        for base in BASES:
            row[f"to {base}"] = quartiles([a / b for a, b in zip(row["seconds"], seconds.get(base, ()), strict=False)])
    return rows


def quartiles(values):
    values = [v for v in values if math.isfinite(v)]
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else None


def cells(row):
    """Return a row's cells under HEAD, or why there are none."""
    if not row["quartiles"]:
        return [row["variant"], row.get("note", "failed"), *[""] * 3]
    low, median, high = map(report.duration, row["quartiles"])
    ratios = [report.ratio(q) if (q := row[f"to {base}"]) else "" for base in BASES]
    return [row["variant"], f"{median} ({low}-{high})", *ratios, megabytes(row.get("bytes"))]


def megabytes(size):
    return "" if size is None else f"{size / 1e6:.0f} MB"


def show(name, rows):
    """Print the table of a group."""
    print()
    for first, *others in [[name, *HEAD[1:]], *map(cells, rows)]:
        print(f"{first:34}" + "".join(f"{cell:>30}" for cell in others).rstrip(), flush=True)


def installed(requirements):
    """Return the bytes of distributions with all that they require; None where the first is absent."""
    sizes, todo = {}, list(requirements)
    for requirement in todo:  # grows
        name, extras = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups(default="")
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system, or the first
            continue
        paths = [Path(found.locate_file(file)) for file in found.files or ()]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
        for line in found.requires or ():
            needed, only_for = line.partition(";")[0], re.findall(r"extra == [\"']([\w-]+)", line)
            if needed not in todo and (not only_for or {*only_for} & {*extras.split(",")}):
                todo.append(needed)
    return sum(sizes.values()) if requirements[0] in sizes else None


def configuration(groups, threads):
    """Return what the figures depend on, by name."""
    peers = {row["about"] for rows in groups.values() for row in rows if row.get("about")}
    return report.configuration(threads=f"{threads} for every variant", peers="; ".join(sorted(peers)) or "none")


def draw(path, groups):
    """Draw a panel a group and a bar a row: its time as a multiple of nnx's."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - an extra
    except ImportError:
        return
    groups = {name: timed for name, rows in groups.items() if (timed := [row for row in rows if row["to nnx"]])}
    figure, panels = pyplot.subplots(-(-len(groups) // 2) or 1, 2, figsize=(12, 1 + len(groups)), layout="constrained")
    for ax, (name, rows) in zip(panels.flat, groups.items(), strict=False):
        colors = ["tab:orange" if "nnx" in row["variant"] else "tab:blue" for row in rows]
        bars = ax.barh([row["variant"] for row in rows], [row["to nnx"][1] for row in rows], color=colors)
        ax.bar_label(bars, fmt=" %.2f")
        ax.set_title(name, loc="left", fontsize="medium")
        ax.margins(x=0.2)
        ax.invert_yaxis()
    figure.suptitle("time as a multiple of nnx: shorter is faster")
    figure.savefig(path)


def write(path, device, groups, about):
    """Write the rows as they are, as tables, and as bars."""
    sizes = {name: installed(requirements) for name, requirements in INSTALLED.items()}
    sizes["nnx"] += sum(file.stat().st_size for file in Path(nnx.__file__).parent.rglob("*.*") if file.suffix != ".pyc")
    lines = [f"# nnx beside its peers on {device}", *report.table(["", ""], about.items())]
    lines += ["", "Ratios are medians (quartiles) of the rounds' own ratios."]
    for name, rows in groups.items():
        what = "a training step, D-H-C/N" if "/" in name else "a process from start to exit"
        lines += ["", f"## {name}: {what}", *report.table(HEAD, map(cells, rows))]
    rows = [[name, megabytes(size) or "absent"] for name, size in sizes.items()]
    lines += ["", "## Installed, with all that it requires", *report.table(["", "on disk"], rows)]
    report.write(path, lines, {"configuration": about, "groups": groups, "installed": sizes})
    draw(path.with_suffix(".png"), groups)


def main(only, rounds, quick, threads, out):
    device = report.device_name() if GPU else "the CPU"
    path = Path(out).resolve() / (report.slug(device) if GPU else "cpu")
    os.chdir(ROOT)
    for package in (Path(nnx.__file__).parent, ROOT / "benchmarks"):  # as pip does for the peers
        compileall.compile_dir(package, quiet=2)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # the processes inherit it, and XLA obeys it
    threads = len(os.sched_getaffinity(0))
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    groups = {}
    with tempfile.TemporaryDirectory() as folder:
        for group, names in GROUPS.items():
            chosen = [v for v in names if any(fnmatch.fnmatch(f"{group}/{v}", p) or group == p for p in only)]
            if chosen:
                groups[group] = measure(group, chosen, rounds, quick, folder)
                show(group, groups[group])
    write(path, device, groups, configuration(groups, threads))
    print(f"\nwritten: {path}.md, .json and, with matplotlib, .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GROUP[/VARIANT]", help="patterns as of a shell")
    parser.add_argument("--rounds", type=int, help="at least 2 (default: 9)")
    parser.add_argument("--quick", action="store_true", help="few short rounds: a test, no measurement")
    parser.add_argument("--threads", type=int, help="of every variant (default: all cores)")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    options = parser.parse_args()
    options.rounds = max(2, options.rounds or (3 if options.quick else 9))
    main(**vars(options))
