"""Put the figures of benchmarks/results into docs/performance.md, and draw docs/performance.png.

    python benchmarks/report.py

A table stands between <!-- table NAME --> and <!-- end -->; what is between them is replaced.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = PAGE.with_suffix(".png")

Result = dict[str, Any]
OURS = "ulimi, int8"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine(result: Result) -> str:
    """Name what a file was measured on."""
    names = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    if "gpu" in result:
        return f"{result['gpu']}; {names}."
    num = result.get("threads", 1)
    cores = {1: "one core", 2: "two cores"}.get(num, f"{num} cores")
    return f"{result['machine']['cpu']}, {cores} of {result['machine']['cores']}; {names}."


def generation(result: Result) -> str:
    """Tokens a second by size and batch, and how many times as many ulimi writes."""
    rates = {(row["contender"], row["size"], row["batch"]): row["tokens_per_s"] for row in result["rows"]}
    columns = list(dict.fromkeys((row["size"], row["batch"]) for row in result["rows"]))
    contenders = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    head = [f"{size}, {batch}" for size, batch in columns]

    def cells(contender: str, show: Callable[[float, float], str]) -> list[str]:
        return [
            show(rates[contender, *column], rates[OURS, *column]) if (contender, *column) in rates else "–"
            for column in columns
        ]

    table = markdown(
        ["tokens/s", *head], [[name, *cells(name, lambda rate, ours: f"{rate:,.0f}")] for name in contenders]
    )
    # The last two are no contenders, but limits.
    ratios = [
        [name, *cells(name, lambda rate, ours: f"{ours / rate:,.2g}" if ours < 10 * rate else f"{ours / rate:,.0f}")]
        for name in contenders
        if name != OURS
    ]
    floors = "; ".join(
        f"{row['size']}: {row['num_bytes'] / 1e6:.1f} MB a token at {row['gb_per_s']:g} GB/s"
        for row in result["rows"]
        if row["contender"] == "the floor"
    )
    return "\n\n".join([table, markdown([f"{OURS} is … times as fast as", *head], ratios), f"The floor: {floors}."])


def scoring(result: Result) -> str:
    """Tokens a second of each way to score."""
    facts = f"{result['num_tokens']:,} tokens; {result['num_ngrams']:,} n-grams."
    rows = [[row["contender"], f"{row['tokens_per_s']:,.0f}"] for row in result["rows"]]
    return f"{markdown(['', 'tokens/s'], rows)}\n\n{facts}"


def install(result: Result) -> str:
    """Megabytes and milliseconds."""
    sizes = [[row["what"], f"{row['MB']:.0f}"] for row in result["rows"] if "MB" in row]
    times = [[row["what"], f"{row['seconds'] * 1000:.0f}"] for row in result["rows"] if "seconds" in row]
    return f"{markdown(['', 'MB'], sizes)}\n\n{markdown(['', 'ms'], times)}"


def train_step(result: Result) -> str:
    """Tokens a second, share of the best product and memory of a step, by size and batch."""
    cells = {(row["contender"], row["shape"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    contenders = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "of the limit": lambda row: f"{row['share_of_limit']:.0%}",
        "peak MB": lambda row: f"{row['peak_mb']:,.0f}",
    }
    rows = [
        [f"{name}, {what}", *(show(cells[name, shape]) for shape in shapes)]
        for what, show in shown.items()
        for name in contenders
    ]
    limits = {name.endswith("bf16"): name for name in reversed(contenders)}
    shown_limits = "; ".join(
        "of bf16 " * half + ", ".join(f"{shape} {cells[limits[half], shape]['limit_gflops']:.0f}" for shape in shapes)
        for half in sorted(limits)
    )
    return f"{markdown(['', *shapes], rows)}\n\nThe limit, GFLOP/s: {shown_limits}."


def gpu_step(result: Result) -> str:
    """Milliseconds a window and seconds an epoch, by batch."""
    cells = {(row["code"], row["precision"], row["batch_size"]): row for row in result["rows"]}
    batches = list(dict.fromkeys(row["batch_size"] for row in result["rows"]))
    ways = list(dict.fromkeys((row["code"], row["precision"]) for row in result["rows"]))
    head = [f"B {batch}, {unit}" for batch in batches for unit in ("ms a window", "s an epoch")]
    rows = [
        [f"{code}, {precision}"]
        + [f"{cells[code, precision, batch][key]:.1f}" for batch in batches for key in ("ms_a_window", "epoch_seconds")]
        for code, precision in ways
    ]
    return markdown(["", *head], rows)


TABLES: dict[str, Callable[[Result], str]] = {
    "generation": generation,
    "generation_zen4": generation,
    "scoring": scoring,
    "install": install,
    "train_step": train_step,
    "train_step_2": train_step,
    "train_step_zen4": train_step,
    "train_step_zen4_2": train_step,
    "gpu_step": gpu_step,
}


def read(name: str) -> Result:
    """Read the results of one question."""
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def filled(page: str) -> str:
    """Give the page with the tables of the results."""
    for name, table in TABLES.items():
        result = read(name)
        block = f"<!-- table {name} -->\n\n{table(result)}\n\n{machine(result)}\n\n<!-- end -->"
        page, num = re.subn(rf"<!-- table {name} -->.*?<!-- end -->", lambda _: block, page, flags=re.S)  # noqa: B023
        assert num == 1, f"{PAGE.name} has {num} places for the table {name}"
    return page


def draw(result: Result, path: Path) -> None:
    """Draw the tokens a second of all contenders, a panel a size and batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    figure, axes = plt.subplots(2, len(sizes), figsize=(11, 6), layout="constrained", squeeze=False, sharex=True)
    for column, size in enumerate(sizes):
        for axis, batch in zip(axes[:, column], (1, 64), strict=True):
            rows = [row for row in result["rows"] if (row["size"], row["batch"]) == (size, batch)]
            names = [row["contender"] for row in rows]
            bars = axis.barh(names, [row["tokens_per_s"] for row in rows])
            for bar, name in zip(bars, names, strict=True):
                bar.set_color("tab:orange" if name == OURS else "tab:gray" if "floor" in name else "tab:blue")
            axis.bar_label(bars, [f" {row['tokens_per_s']:,.0f}" for row in rows], fontsize=8)
            axis.set(title=f"{size}, {batch} text{'s' * (batch > 1)} at once", xscale="log")
            axis.invert_yaxis()
            axis.margins(x=0.2)
    figure.supxlabel("tokens a second of one core, sampled")
    figure.savefig(path, format="png", dpi=90)
    plt.close(figure)


def main() -> None:
    """See the module."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(read("generation"), PICTURE)


if __name__ == "__main__":
    main()
