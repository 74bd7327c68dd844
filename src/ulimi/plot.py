"""The curve of a run, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # there may be no screen
from matplotlib import pyplot as plt


def plot_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw validation and training loss over time, and where averaging began, if not at once.

    Args:
        rows: of metrics.jsonl.
        path: the PNG to write.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    minutes = [row["seconds"] / 60 for row in rows]
    axis.plot(minutes, [row["valid_nll"] for row in rows], marker=".", label="validation")
    axis.plot(minutes, [row["train_loss"] for row in rows], marker=".", label="training loss (with dropout)")
    averaging = [m for m, row in zip(minutes, rows, strict=True) if row["averaging"]]
    if len(averaging) not in (0, len(rows)):
        axis.axvline(averaging[0], linestyle=":", color="grey", label="first averaged epoch")
    bits = rows[-1]["valid_bits_per_char"] if rows else float("nan")
    axis.set(
        xlabel="minutes", ylabel="nats per token", title=f"{len(rows)} epochs, validation {bits:.3f} bits per character"
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)
