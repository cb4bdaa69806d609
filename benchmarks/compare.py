"""Compare nnx with other libraries, and write `cpu.json`, `.md` and `.png`, and `cpu-layers.png`.

    python -m benchmarks.compare [--quick] [--only 2-10-3/30 'layers/*' ...]    # in the repository root, on Linux
    python -m benchmarks.compare --update --only 'LSTM*' 'GRU*' 'CBOW*'         # these groups of the files anew

It times a training step of each workload D-H-C/N and of those of `language.py`, complete programs from start to
exit, single layers and optimizers (`layers`), and an epoch of `Trainer` on arrays in several memory layouts (`data`),
for the variants of `peers.py`: each in a separate process, alternating, on the same cores. A variant whose results
differ from the first one's is reported and not timed; a library that is not installed is reported as absent.
A ratio is the median over rounds of the ratio of two times in the same round.
Page faults are those of a step in the last round. With NNX_GPU=1 everything runs on the GPU, and the
files are named after it.
"""

import argparse
import compileall
import contextlib
import fnmatch
import importlib.metadata
import itertools
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
from typing import NamedTuple

import numpy

import nnx
from benchmarks import language, report
from benchmarks.layers import OPTIMIZERS, SIZES
from benchmarks.peers import DATA, JOBS, LAYOUTS, VARIANTS
from nnx import GPU

ROOT = Path(__file__).parents[1]
WORKLOADS = ["2-10-3/30", "64-100-10/100", "784-100-10/100", "784-512-10/128", "784-1024-10/1024", "1024-4096-1024/512"]
COMPILED = ["floor", "nnx", "PyTorch eager", "torch.compile", "jax.jit"]
OTHERS = {  # the book's net has two layers, Sigmoid and SGD
    "1024-1024-1024-1024-1024-1024/256": ["nnx Trainer", *COMPILED],
    "ReLU Adam 64-100-10/100": COMPILED,
    "ReLU Adam 784-512-512-10/128": COMPILED,
    "BatchNorm ReLU Dropout Adam 784-512-512-10/128": COMPILED,
    "LayerNorm GELU AdamW 512-2048-512-10/1024": COMPILED,
}
WHOLE = ["nnx", "book float64", "PyTorch eager", "jax.jit"]
PAIR = ["nnx", "PyTorch eager"]
GROUPS = {
    "layers": [f"{name} {size}" for size, names in SIZES.items() for name in names],
    **{workload: list(VARIANTS) for workload in WORKLOADS},
    **OTHERS,
    **{workload: list(language.MAKE) for workload in language.MODELS},
    language.CBOW: [variant for variant in language.MAKE if variant != "floor"],
    "data": LAYOUTS,
    **dict.fromkeys(("import", *JOBS), WHOLE),  # the book imports NumPy, and nothing else
}
BASES = {"layers": PAIR[1:], "data": LAYOUTS[:1], language.CBOW: ["nnx"]}  # of the ratios; by default nnx and its floor
WHAT = {
    "layers": "forward and backward, or an optimizer's step, compared with PyTorch",
    "data": f"an epoch of Trainer at {DATA} on 30,000 rows, by their memory layout",
    **dict.fromkeys(language.MODELS[:2], "a training step of a language model, V-H/NxT"),
    **dict.fromkeys(
        language.MODELS[2:], "a training step of a language model, V-H/NxT; PyTorch's GRU is another formula"
    ),
    language.CBOW: "a training step of word2vec with negative sampling, V-H/N",
}
CUDA = ["cupy-cuda12x", "cupy-cuda13x", "cuda-toolkit[cublas,cudart,curand,nvrtc]"] if GPU else []
INSTALLED = {  # what each requires in an empty environment
    "nnx": ["numpy", "tqdm", *CUDA],
    "book": ["numpy", *CUDA],
    "PyTorch": ["torch"],
    "JAX": ["jax", *(["jax[cuda12]", "jax[cuda13]"] if GPU else [])],
}


class Effort(NamedTuple):
    """Duration of the measurements."""

    rounds: int
    least: float  # seconds per round
    pause: float  # seconds: OpenBLAS threads spin for 0.1 s after their last call
    shared: bool  # one process for all layers of a size: fewer imports, but freed memory is reused between layers


FULL, QUICK = Effort(9, 0.2, 0.15, shared=False), Effort(3, 0.01, 0, shared=True)


class Worker(subprocess.Popen):
    """The process of a row's variant, which waits for commands."""

    def __init__(self, row, *data):
        device = "cuda" if GPU else "cpu"
        command = [sys.executable, "-m", "benchmarks.peers", device, row["variant"], row["group"], *data]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self):
        line = self.stdout.readline()
        return json.loads(line) if line else {"note": f"failed: its process ended with {self.wait()}"}

    def send(self, line):
        with contextlib.suppress(BrokenPipeError):  # the answer is then a note
            print(line, file=self.stdin, flush=True)

    def time(self, count):
        """Return seconds, page faults and steps of `count` runs; NaN if the process has ended."""
        self.send(count)
        return {"seconds": math.nan, "faults": math.nan, "steps": 1} | self.answer()

    @contextlib.contextmanager
    def turn(self, name):
        """Select a layer in a process that serves several."""
        self.send(name)
        yield self
        self.send("")


def check(rows):
    """Add a note to rows whose results differ from the book's in float64, or else from the first row with results."""
    rows = sorted((row for row in rows if row.get("results")), key=lambda row: row["variant"] != "book float64")
    for row in rows:
        adam = "Adam" in row["group"] or row["group"] == language.CBOW
        tolerance = 1e-3 if adam else 1e-4  # PyTorch adds eps after the bias correction
        for got, want in zip(row["results"], rows[0]["results"], strict=True):
            if not numpy.allclose(got, want, rtol=0, atol=tolerance * numpy.abs(want).max()):
                row["note"] = f"not timed: results differ from those of {rows[0]['variant']}"


def turns(rows, effort, measure):
    """Append one time per round to `seconds` of the rows without a note, alternating forward and reverse order."""
    rows = [row for row in rows if "note" not in row]
    for _ in range(effort.rounds):
        for row in rows:
            time.sleep(effort.pause)
            row["seconds"].append(measure(row))
        rows.reverse()


def time_steps(rows, effort, start):
    """Start and warm up the variants sequentially, then time them; `start` creates a row's worker."""
    workers, counts = {}, {}
    with contextlib.ExitStack() as stack:
        for row in rows:
            name = row["variant"]
            workers[name], counts[name] = stack.enter_context(start(row)), 1
            row |= workers[name].answer()
            seconds = math.nan if "note" in row else workers[name].time(1)["seconds"]
            while seconds < effort.least:
                counts[name] = math.ceil(counts[name] * min(10, 1.2 * effort.least / seconds))
                seconds = workers[name].time(counts[name])["seconds"]
        check(rows)

        def measure(row):
            done = workers[row["variant"]].time(counts[row["variant"]])
            row["faults"] = done["faults"] / done["steps"]
            return done["seconds"] / done["steps"]

        turns(rows, effort, measure)


def time_layers(names, effort):
    """Start nnx and PyTorch, and return the rows of all layers for both."""
    with contextlib.ExitStack() as stack:
        workers = {v: stack.enter_context(Worker({"group": "layers", "variant": v})) for v in PAIR}
        abouts = {v: worker.answer() for v, worker in workers.items()}
        rows = []
        for name in names:
            pair = [{"group": name, "variant": v, "seconds": []} | about for v, about in abouts.items()]
            there = [row for row in pair if "note" not in row]
            time_steps(there, effort, lambda row: workers[row["variant"]].turn(row["group"]))
            rows += relate(pair, BASES["layers"])
    return rows


def time_programs(rows, effort, *data):
    """Time processes from start to exit; the first run of each warms the file cache and is used for comparison."""

    def run(row):
        begin = time.perf_counter()
        with Worker(row, *data) as worker:
            row |= worker.answer()
        return time.perf_counter() - begin

    for row in rows:
        run(row)
    check(rows)
    turns(rows, effort, run)


def save_data(job, folder):
    """Write a job's training data, in complete batches, and return the files."""
    if job == "data":
        rng = numpy.random.default_rng(0)
        D, _, C, _ = map(int, re.split("[-/]", DATA))
        x, t = rng.standard_normal((30_000, D), "float32"), rng.integers(C, size=30_000)
    elif job == "spiral":
        x, t = nnx.spiral.load_data()
        t = t.argmax(axis=1)
    else:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra

        x, t = load_digits(return_X_y=True)
        x, t = x[:1700] / 16, t[:1700]
    files = [f"{folder}/{job}.{name}.npy" for name in "xt"]  # not an archive, which takes longer to open than to read
    for file, data in zip(files, (x, t), strict=True):
        numpy.save(file, data)
    return files


def measure(group, variants, effort, folder):
    """Return a row for each variant of a group."""
    if group == "layers":
        processes = itertools.groupby(variants, key=lambda name: name.split()[1] if effort.shared else name)
        return [row for _, names in processes for row in time_layers(names, effort)]
    rows = [{"group": group, "variant": variant, "seconds": []} for variant in variants]
    try:
        files = save_data(group, folder) if group == "data" or group in JOBS else []
    except ImportError as error:
        return [row | {"note": f"absent: {error}", "quartiles": None} for row in rows]
    if group == "data" or "/" in group:
        time_steps(rows, effort, lambda row: Worker(row, *files))
    else:
        time_programs(rows, effort, *files)
    return relate(rows, bases(group))


def bases(group):
    return BASES.get(group, ["nnx", "floor"])


def relate(rows, bases):
    """Add to `rows` the quartiles of their seconds and of their ratios to the `bases` in each round."""
    seconds = {row["variant"]: row["seconds"] for row in rows}
    for row in rows:
        row.pop("results", None)
        row["quartiles"] = quartiles(row["seconds"])
        for base in bases:
            row[f"to {base}"] = quartiles([a / b for a, b in zip(row["seconds"], seconds.get(base, ()), strict=False)])
    return rows


def quartiles(values):
    values = [v for v in values if math.isfinite(v)]
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else None


def spread(row):
    """Format a row's median and quartiles, or the reason why there are none."""
    if not row["quartiles"]:
        return row.get("note", "failed")
    low, median, high = map(report.duration, row["quartiles"])
    return f"{median} ({low}-{high})"


def ratio(row, base):
    return report.ratio(quartiles) if (quartiles := row.get(f"to {base}")) else ""


def faults(row):
    return f"{row['faults']:.0f}" if math.isfinite(row.get("faults", math.nan)) else ""


def tables(group, rows):
    """Return the tables of a group, each a list of rows of cells, header first."""
    if group == "layers":
        head = ["", *PAIR, " / ".join(PAIR), "page faults", "PyTorch's"]
        pairs = zip(*[[row for row in rows if row["variant"] == v] for v in PAIR], strict=True)
        cells = [
            [mine["group"], spread(mine), spread(peer), ratio(mine, PAIR[1]), faults(mine), faults(peer)]
            for mine, peer in pairs
        ]
        libraries = {row["variant"]: row["about"] for row in rows if "about" in row}
        return [[head, *cells], means(rows), [["library", "BLAS and threads"], *libraries.items()]]
    head = ["", "median (quartiles)", *(f"times {base}" for base in bases(group))]
    head += ["page faults", "peak memory", "library, BLAS and threads"]
    cells = []
    for row in rows:
        ratios = [ratio(row, base) for base in bases(group)]
        cells.append(
            [row["variant"], spread(row), *ratios, faults(row), megabytes(row.get("bytes")), row.get("about", "")]
        )
    filled = [column for column in zip(head, *cells, strict=True) if any(column[1:])]
    return [[*zip(*filled, strict=True)]]


def means(rows):
    """Return a table of the geometric means of the ratios of nnx's times to PyTorch's."""
    ratios = {row["group"]: q[1] for row in rows if row["variant"] == "nnx" and (q := row[f"to {PAIR[1]}"])}

    def part(*words):
        return {name: r for name, r in ratios.items() if {*words} & {*name.split()}}

    cells = []
    parts = {"all": ratios, **{size: part(size) for size in SIZES}, "optimizers": part(*OPTIMIZERS)}
    for name, of in parts.items():
        if of:
            worst, above = max(of, key=of.get), sum(r > 1 for r in of.values())
            mean = statistics.geometric_mean(of.values())
            cells.append([name, f"{mean:.2f}", f"{above} of {len(of)}", f"{worst}: {of[worst]:.2f}"])
    return [["rows", "geometric mean", "above 1", "worst"], *cells]


def megabytes(size):
    return "" if size is None else f"{size / 1e6:.0f} MB"


def show(name, rows):
    """Print the tables of a group."""
    for (first, *head), *cells in tables(name, rows):
        table = [[first or name, *head], *cells]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for cells in table:
            print("  ".join(map(str.ljust, cells, widths)).rstrip(), flush=True)


def installed(requirements):
    """Return the size in bytes of distributions with their dependencies; None if the first is absent."""
    sizes, todo = {}, list(requirements)
    for requirement in todo:  # grows
        name, extras = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups(default="")
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform, or the first one
            continue
        paths = [Path(found.locate_file(file)) for file in found.files or ()]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
        for line in found.requires or ():
            needed, only_for = line.partition(";")[0], re.findall(r"extra == [\"']([\w-]+)", line)
            if needed not in todo and (not only_for or {*only_for} & {*extras.split(",")}):
                todo.append(needed)
    return sum(sizes.values()) if requirements[0] in sizes else None


def configuration(threads):
    """Return the configuration that the results depend on, by name."""
    product = "import torch; torch.ones(9, 9) @ torch.ones(9, 9)"
    mkl = report.output("env", "MKL_VERBOSE=1", sys.executable, "-c", product)  # its kernels are only reported so
    return report.configuration(threads=f"{threads} for every variant", MKL=mkl.removeprefix("MKL_VERBOSE "))


def draw(path, groups):
    """Draw one panel per group and one bar per row, as relative times; layers go to a separate file."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - an extra
    except ImportError:
        return
    layers = [row for row in groups.get("layers", ()) if row["variant"] == "nnx" and row[f"to {PAIR[1]}"]]
    if layers:
        figure, ax = pyplot.subplots(figsize=(8, 1 + 0.22 * len(layers)), dpi=150, layout="constrained")
        bars = ax.barh([row["group"] for row in layers], [row[f"to {PAIR[1]}"][1] - 1 for row in layers], left=1)
        ax.bar_label(bars, [f" {row[f'to {PAIR[1]}'][1]:.2f} " for row in layers])
        ax.axvline(1, color="black")
        ax.set(xscale="log", title="time of nnx / time of PyTorch: left of 1, nnx is faster")
        ax.margins(x=0.1, y=0.01)
        ax.invert_yaxis()
        figure.savefig(path.with_name(f"{path.stem}-layers.png"))
    groups = {
        (name, base): timed
        for name, rows in groups.items()
        if name != "layers" and (timed := [row for row in rows if row.get(f"to {(base := bases(name)[0])}")])
    }
    if not groups:
        return
    heights = [len(rows) + 2 for rows in groups.values()]
    totals = list(itertools.accumulate(heights))
    half = 1 + sum(total < totals[-1] / 2 for total in totals)
    columns = [[*groups.items()][part] for part in (slice(half), slice(half, None))]
    tallest = max(totals[half - 1], totals[-1] - totals[half - 1])
    figure = pyplot.figure(figsize=(9, 0.5 + 0.22 * tallest), dpi=150, layout="constrained")
    for column, part in zip(columns, figure.subfigures(1, 2), strict=True):
        ratios = [len(rows) + 2 for _, rows in column]
        ratios.append(tallest - sum(ratios) + 0.01)  # empty: bars are equally thick in both columns
        *axes, empty = part.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios).flat
        empty.set_axis_off()
        for ax, ((name, base), rows) in zip(axes, column, strict=True):
            colors = ["tab:orange" if "nnx" in row["variant"] else "tab:blue" for row in rows]
            bars = ax.barh([row["variant"] for row in rows], [row[f"to {base}"][1] for row in rows], color=colors)
            ax.bar_label(bars, fmt=" %.2f")
            title = name if base == "nnx" else f"{name}, relative to {base}"
            ax.set_title(title, loc="left", x=-0.3, fontsize=9, weight="bold")
            ax.margins(x=0.2, y=0.02)
            ax.set_xticks([])
            ax.spines[["top", "right", "bottom"]].set_visible(False)
            ax.invert_yaxis()
    figure.suptitle("time relative to nnx: shorter is faster")
    figure.savefig(path)


def write(path, device, groups, about):
    """Write the rows as JSON, as tables, and as a bar chart."""
    sizes = {name: installed(requirements) for name, requirements in INSTALLED.items()}
    sizes["nnx"] += sum(file.stat().st_size for file in Path(nnx.__file__).parent.rglob("*.*") if file.suffix != ".pyc")
    lines = [f"# nnx compared with other libraries on {device}", *report.table(["", ""], about.items())]
    lines += ["", "Ratios are medians (quartiles) of the ratios in each round."]
    for name, rows in groups.items():
        what = WHAT.get(name, "a training step, D-H-C/N" if "/" in name else "a process from start to exit")
        lines += ["", f"## {name}: {what}"]
        for head, *cells in tables(name, rows):
            lines += report.table(head, cells)
    rows = [[name, megabytes(size) or "absent"] for name, size in sizes.items()]
    lines += ["", "## Installed size, including dependencies", *report.table(["", "on disk"], rows)]
    report.write(path, lines, {"configuration": about, "groups": groups, "installed": sizes})
    draw(path.with_suffix(".png"), groups)


def add_earlier(path, groups, about):
    """Return `groups` and those of the file of an earlier run that are missing; say so in `about`."""
    earlier = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    kept = [name for name in earlier["groups"] if name not in groups]
    when = " of ".join(filter(None, map(earlier["configuration"].get, ("commit", "date"))))
    about["measured before"] = f"{', '.join(kept)}: {when}"
    return {name: {**earlier["groups"], **groups}[name] for name in GROUPS if name in groups or name in kept}


def main(only, rounds, quick, update, threads, out):
    if "OPENBLAS_CORETYPE" in os.environ:
        print(f"warning: OPENBLAS_CORETYPE={os.environ['OPENBLAS_CORETYPE']} selects the kernels of NumPy's products")
    effort = QUICK if quick else FULL
    effort = effort._replace(rounds=max(2, rounds or effort.rounds))
    device = report.device_name() if GPU else "the CPU"
    path = Path(out).resolve() / (report.slug(device) if GPU else "cpu")
    os.chdir(ROOT)
    for package in (Path(nnx.__file__).parent, ROOT / "benchmarks"):  # as pip does for the other libraries
        compileall.compile_dir(package, quiet=2)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # inherited by the processes, respected by XLA
    threads = len(os.sched_getaffinity(0))
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    groups = {}
    with tempfile.TemporaryDirectory() as folder:
        for group, names in GROUPS.items():
            chosen = [v for v in names if any(fnmatch.fnmatch(f"{group}/{v}", p) or group == p for p in only)]
            if chosen:
                groups[group] = measure(group, chosen, effort, folder)
                show(group, groups[group])
    about = configuration(threads)
    if update:
        groups = add_earlier(path, groups, about)
    write(path, device, groups, about)
    print(f"\nwritten: {path}.md, .json and, with matplotlib, .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GROUP[/VARIANT]", help="shell-style patterns")
    parser.add_argument("--rounds", type=int, help="at least 2 (default: 9)")
    parser.add_argument("--quick", action="store_true", help="few short rounds: a test, not a measurement")
    parser.add_argument("--update", action="store_true", help="keep the other groups of the files that are there")
    parser.add_argument("--threads", type=int, help="per variant (default: all cores)")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    main(**vars(parser.parse_args()))
