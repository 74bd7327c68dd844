"""A study on paper: tables in Markdown, CSV and JSON, and one page with plots and samples, coloured by probability."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # there may be no screen
from matplotlib import pyplot as plt

from ulimi.files import write_text
from ulimi.study import METRICS, Figure
from ulimi.words import PROBABILITY_STEPS

Rows = Sequence[Mapping[str, Any]]

DIGITS = {"bleu": 2, "chrf": 1, "words": 1}
"""after the point; the others have 3"""

HUES = tuple(zip(PROBABILITY_STEPS, ("#a6dba0", "#d9f0d3", "#fff7bc", "#fdd0a2", "#fcae91"), strict=True))
"""background of a word that is at least so probable"""

PLOTS = (("attested", "mauve"), ("words", "attested"), ("nats", "attested"))


def write_report(
    out: Path, title: str, notes: Sequence[str], models: Mapping[str, Mapping[str, Any]], rows: Rows
) -> None:
    """Write table.md, table.csv, results.json and index.html into a folder.

    Args:
        out: the folder.
        title: of the page.
        notes: lines that say what was studied.
        models: name -> scores of its distributions on the text (`DistributionScore.as_dict`).
        rows: of `ulimi.study.Study.run`.
    """
    write_text(out / "table.md", "\n\n".join([*notes, model_table(models), markdown_table(rows)]) + "\n")
    write_text(out / "table.csv", csv_table(rows))
    plain = [{**row, **{name: _as_dict(row[name]) for name in METRICS}} for row in rows]
    write_text(out / "results.json", json.dumps({"models": models, "rows": plain}, ensure_ascii=False, indent=1))
    write_text(out / "index.html", page(title, notes, models, rows))


def markdown_table(rows: Rows) -> str:
    """Set all figures side by side; intervals behind them, missing ones as a dash."""
    names = _measured(rows)
    lines = ["| model | strategy | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    lines += [
        f"| {row['model']} | {row['strategy']} | " + " | ".join(_show(row[name], name) for name in names) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def model_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Set the models' own scores side by side."""
    head, *rows = _model_cells(models)
    lines = [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def _model_cells(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [
        ("model", "ε-perplexity", "sparsemax score", "JS divergence", "support", "impossible")
    ]
    for name, s in models.items():
        perplexity = "∞" if s["epsilon_perplexity"] is None else f"{s['epsilon_perplexity']:.2f}"
        cells.append((
            name, perplexity, f"{s['sparsemax_score']:.4f}", f"{s['js_divergence']:.4f}", f"{s['support']:.1f}",
            f"{s['impossible']:.2%}",
        ))  # fmt: skip
    return cells


def csv_table(rows: Rows) -> str:
    """Give each figure and its interval a column of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "strategy", *(column for name in METRICS for column in (name, f"{name}_half_width"))])
    for row in rows:
        cells: list[Any] = [row["model"], row["strategy"]]
        for name in METRICS:
            figure: Figure | None = row[name]
            cells += (
                ["", ""] if figure is None else [figure.mean, "" if figure.half_width is None else figure.half_width]
            )
        writer.writerow(cells)
    return text.getvalue()


def page(title: str, notes: Sequence[str], models: Mapping[str, Mapping[str, Any]], rows: Rows) -> str:
    """Write one HTML page that needs nothing beside it."""
    names = _measured(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("model", "strategy", *names))
    body = "".join(
        f"<tr><td>{html.escape(row['model'])}</td><td>{html.escape(row['strategy'])}</td>"
        + "".join(f"<td>{_show(row[name], name)}</td>" for name in names)
        + "</tr>"
        for row in rows
    )
    own = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in _model_cells(models)
    )
    plots = "".join(_plot(rows, x, y) for x, y in PLOTS if {x, y} <= set(names))
    legend = " ".join(f'<span style="background:{colour}">p ≥ {least}</span>' for least, colour in HUES)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px }} td, th {{ padding: .2rem .5rem; border-bottom: 1px solid #ddd }}
td:nth-child(n+3) {{ text-align: right; white-space: nowrap }} .plots {{ display: flex; flex-wrap: wrap }}
.samples td:nth-child(n) {{ text-align: left; white-space: normal; vertical-align: top }}
</style></head><body><h1>{html.escape(title)}</h1>
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
<table>{own}</table><p></p>
<table><tr>{head}</tr>{body}</table><div class="plots">{plots}</div>
<h2>Samples</h2><p>A word's colour is its probability under the model: {legend}</p>{_samples(rows)}</body></html>
"""


def _samples(rows: Rows) -> str:
    parts = []
    for index, first in enumerate(rows[0]["samples"] if rows else []):
        lines = []
        for row in rows:
            words = "".join(_coloured(text, p) for text, p in row["samples"][index]["words"])
            lines.append(
                f"<tr><td>{html.escape(row['model'])}</td><td>{html.escape(row['strategy'])}</td><td>{words}</td></tr>"
            )
        parts.append(f'<h3>{html.escape(first["prompt"])}…</h3><table class="samples">{"".join(lines)}</table>')
    return "".join(parts)


def _coloured(text: str, probability: float) -> str:
    colour = next(colour for least, colour in HUES if probability >= least)
    body = text.lstrip()
    return f'{html.escape(text[: len(text) - len(body)])}<span style="background:{colour}">{html.escape(body)}</span>'


def _plot(rows: Rows, x: str, y: str) -> str:
    """Draw two metrics against each other, a point a row, as SVG."""
    figure, axis = plt.subplots(figsize=(6.2, 4.6), layout="constrained")
    for model in dict.fromkeys(row["model"] for row in rows):
        points = [row for row in rows if row["model"] == model and row[x] is not None and row[y] is not None]
        if not points:
            continue
        look = {"s": 16, "label": model} if model else {"s": 60, "marker": "*", "color": "black"}
        axis.scatter([row[x].mean for row in points], [row[y].mean for row in points], **look)
        for row in points:
            axis.annotate(
                row["strategy"], (row[x].mean, row[y].mean), fontsize=6, xytext=(3, 2), textcoords="offset points"
            )
    axis.set(xlabel=x, ylabel=y)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _measured(rows: Rows) -> list[str]:
    return [name for name in METRICS if any(row[name] is not None for row in rows)]


def _show(figure: Figure | None, name: str) -> str:
    if figure is None:
        return "–"
    digits = DIGITS.get(name, 3)
    width = "" if figure.half_width is None else f" ± {figure.half_width:.{digits}f}"
    return f"{figure.mean:.{digits}f}{width}"


def _as_dict(figure: Figure | None) -> dict[str, float | None] | None:
    return None if figure is None else {"mean": figure.mean, "half_width": figure.half_width}
