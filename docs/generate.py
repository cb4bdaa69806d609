"""Write the parts of the documentation that come from other files of the repository.

`python docs/generate.py` puts the measured speed into the READMEs as well; a test compares them with the results.
"""

import ast
import io
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUT = DOCS / "_generated"
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot

from benchmarks.compare import means
from benchmarks.report import duration, table

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
GROUPS = RESULTS["groups"]
STEPS = {name: rows for name, rows in GROUPS.items() if "/" in name}
PROGRAMS = {name: rows for name, rows in GROUPS.items() if rows[0].get("bytes")}
OTHERS = ["book", "PyTorch eager", "torch.compile", "jax.jit"]
PEERS = OTHERS[1:]
CHOSEN = (  # the steps in README
    *("2-10-3/30", "64-100-10/100", "784-512-10/128", "784-1024-10/1024", "1024-4096-1024/512"),
    *("ReLU Adam 784-512-512-10/128", "BatchNorm ReLU Dropout Adam 784-512-512-10/128"),
    "LayerNorm GELU AdamW 512-2048-512-10/1024",
)


def ratio(rows, variant, base="nnx"):
    """Return the median ratio of the variant's time to that of `base`, None if it was not measured."""
    # The book's weights are float64 in its first chapters, float32 later.
    names = ("book float64", "book float32") if variant == "book" else (variant,)
    quartiles = next((row.get(f"to {base}") for name in names for row in rows if row["variant"] == name), None)
    return quartiles and quartiles[1]


def cell(value, *, bold=True):
    """Format a ratio, in bold if the other one is faster than nnx."""
    return "-" if value is None else f"**{value:.2f}**" if bold and round(value, 2) < 1 else f"{value:.2f}"


def time_of(rows, variant="nnx"):
    """Return the median time of a variant."""
    return next(duration(row["quartiles"][1]) for row in rows if row["variant"] == variant)


def steps_table(others, names=STEPS):
    """Return the lines of the table of training steps."""
    rows = [
        [
            name,
            time_of(rows),
            cell(ratio(rows, "nnx", "floor"), bold=False),
            *(cell(ratio(rows, other)) for other in others),
        ]
        for name, rows in STEPS.items()
        if name in names
    ]
    return table(["step", "nnx", "times its products", *others], rows)


def programs_table():
    """Return the lines of the table of complete programs."""
    peers = [other for other in OTHERS if any(ratio(rows, other) for rows in PROGRAMS.values())]
    rows = [
        [name, time_of(rows), f"{rows[0]['bytes'] / 1e6:.0f} MB", *(cell(ratio(rows, peer)) for peer in peers)]
        for name, rows in PROGRAMS.items()
    ]
    return table(["program", "nnx", "peak memory", *peers], rows)


def layer_ratios():
    """Return the ratio of nnx's time to PyTorch's for each layer and optimizer."""
    rows = [row for row in GROUPS["layers"] if row["variant"] == "nnx" and row["to PyTorch eager"]]
    return {row["group"]: row["to PyTorch eager"][1] for row in rows}


def losses():
    """Return the measurements in which another library is faster, with the ratio of nnx's time to its."""
    layers = layer_ratios()
    slower = sorted((name for name in layers if round(layers[name], 2) > 1), key=layers.get, reverse=True)
    found = [f"{name} (PyTorch {layers[name]:.2f})" for name in slower]
    for name, rows in STEPS.items():
        ratios = {peer: ratio(rows, peer) for peer in PEERS}
        found += [f"{name} ({peer} {1 / r:.2f})" for peer, r in ratios.items() if r and round(r, 2) < 1]
    return f"{len(found)} / {len(layers) + len(STEPS)}: {', '.join(found)}"


def readme(text):
    """Return the `text` of a README, in any language, with the measured rows of its table, and the losses."""
    rows = "\n".join(steps_table(PEERS, CHOSEN)[3:])
    for block, measured in {"speed": rows, "losses": textwrap.fill(losses(), 119, break_on_hyphens=False)}.items():
        # The heading of a table, up to its rule, stays.
        pattern = rf"(<!-- {block} -->\n+(?:\|.*\n\| ---.*\n)?)(?:.|\n)*?(?=\n+<!-- end -->)"
        text, found = re.subn(pattern, lambda match, measured=measured: match[1] + measured, text)
        if not found:
            raise ValueError(f"README has no block {block}")
    return text


def draw(name, points, xlabel):
    """Draw a row of points per label on a logarithmic axis, as SVG within a page, whose text colour it takes."""
    series = list(dict.fromkeys(label for row in points.values() for label in row))
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    with pyplot.rc_context({**grey, "font.size": 9, "svg.hashsalt": name, "legend.labelcolor": "#808080"}):
        figure, ax = pyplot.subplots(figsize=(5.6, 1.2 + 0.3 * len(points)), layout="constrained")
        for label, color in zip(series, ("#e8710a", "#3b82c4", "#2f9e62"), strict=False):
            rows = [(row[label], y) for y, row in enumerate(points.values()) if row.get(label)]
            ax.plot(*zip(*rows, strict=True), "o", color=color, label=label)
        ax.axvline(1, color="#808080", linewidth=1)
        ax.set(xscale="log", yticks=range(len(points)), yticklabels=points)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(color="#808080", alpha=0.25)
        ax.invert_yaxis()
        figure.supxlabel(xlabel, fontsize=9)
        figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
        figure.savefig(
            buffer := io.StringIO(), format="svg", transparent=True, metadata={"Date": None, "Title": xlabel}
        )
        pyplot.close(figure)
    picture = "<svg" + buffer.getvalue().partition("<svg")[2].replace("#808080", "currentColor")
    (OUT / f"{name}.svg").write_text(picture, encoding="utf-8")


def draw_speed():
    """Draw the steps and the layers compared with the other libraries."""
    steps = {
        re.sub(r" (?=\S+$)", "\n", name): {peer: ratio(rows, peer) for peer in PEERS} for name, rows in STEPS.items()
    }
    draw("steps", steps, "time divided by that of nnx: right of 1, nnx is faster")
    sizes = {"32x64": "small", "128x512": "medium", "1024x1024": "large"}
    sizes |= {"64-100-10": "small", "784-512-10": "medium", "1024-4096-1024": "large", "10000x100": "medium"}
    layers = {}
    for name, value in layer_ratios().items():
        layer, size = name.split()
        layers.setdefault(layer, {})[sizes.get(size, size)] = 1 / value
    draw("layers", layers, "PyTorch's time divided by that of nnx: right of 1, nnx is faster")


def write(name, lines):
    """Write a fragment, which a page includes."""
    (OUT / f"{name}.inc.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def examples():
    """Yield the lines of the examples page: docstring, command, picture and source of each script."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        head, _, rest = ast.get_docstring(ast.parse(text)).partition("\n\n")
        yield f"\n## {path.stem}\n\n**{head}**\n\n{rest}\n\n```sh\npython examples/{path.name}\n```"
        for picture in re.findall(r"\w+\.png", text):
            if path.with_name(picture).exists():
                yield f"\n![what {path.name} draws](../examples/{picture})"
        yield f"\n:::{{dropdown}} {path.name}\n```{{literalinclude}} ../examples/{path.name}\n```\n:::"


def main():
    """Write all parts."""
    OUT.mkdir(exist_ok=True)
    shutil.copy(ROOT / "examples" / "chapter1.ipynb", DOCS)
    write("examples", examples())
    write("configuration", [re.sub("-+:", "---", line) for line in table(["", ""], RESULTS["configuration"].items())])
    write("steps", steps_table(OTHERS))
    write("losses", [losses()])
    head, *rows = means(GROUPS["layers"])
    write("layers", table(head, rows))
    write("programs", programs_table())
    sizes = [[name, f"{size / 1e6:.0f} MB"] for name, size in RESULTS["installed"].items() if size]
    write("installed", table(["library", "on disk"], sizes))
    draw_speed()


if __name__ == "__main__":
    for path in sorted(ROOT.glob("README*.md")):
        path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
