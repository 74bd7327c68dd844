"""What the benchmarks share: contenders that take turns, medians, the machine, and JSON.

One thread each: a figure is units a second of that thread's own processor time, in which other programs take no part.
Import this module first, since libraries read the number of threads when they are loaded.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import ulimi
from ulimi.provenance import describe_machine

RESULTS = Path(__file__).parent / "results"

Turn = Callable[[], int]
"""does some work, and says how many units it was"""


def arguments(doc: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Read the command line.

    Args:
        doc: the script's own.
        more: further options, as `add_argument` takes them.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, after one that warms it up")
    parser.add_argument("--tiny", action="store_true", help="sizes at which nothing is measured, for a test")
    parser.add_argument(
        "--out", type=Path, help="the JSON file to write; benchmarks/results has those of docs/performance.md"
    )
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def take_turns(contenders: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Let all contenders take turns, and give each one's median units a second of processor time."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, turn in contenders.items():
            started = time.process_time()
            num_units = turn()
            seconds = time.process_time() - started
            if number:  # the first warms up
                rates[name].append(num_units / seconds)
    return {name: statistics.median(found) for name, found in rates.items()}


def bandwidth(num_bytes: int) -> float:
    """Bytes a second at which one core reads an array of this size again and again."""
    array = np.ones(max(1, num_bytes // 4), dtype=np.float32)

    def read() -> int:
        array.max()
        return array.nbytes

    return take_turns({"read": read}, 21)["read"]


def versions(*packages: str) -> dict[str, str]:
    """Name what was measured, as far as it is installed."""
    found = {"python": platform.python_version(), "ulimi": ulimi.__version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def finish(args: argparse.Namespace, rows: list[dict[str, Any]], packages: tuple[str, ...], **facts: Any) -> None:
    """Show the rows, and write them with the machine and the versions."""
    for row in rows:
        print("  ".join(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    if args.out:
        result = {"machine": describe_machine(), "versions": versions(*packages), **facts, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
