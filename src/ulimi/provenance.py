"""Where a run comes from: what its meta.json says of version, commit, machine and text.

Light floor: an n-gram model is made without PyTorch.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ulimi
from ulimi.corpus import Corpus
from ulimi.data import EncodedText
from ulimi.run import FORMAT


def new_meta(machine: dict[str, Any]) -> dict[str, Any]:
    """Give what meta.json says of any run that begins now, on `machine`, as `describe_machine` names it."""
    return {
        "format": FORMAT,
        "ulimi": ulimi.__version__,
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "scores": {},
    }


def describe_corpus(corpus: Corpus, train_text: EncodedText, valid_text: EncodedText) -> dict[str, Any]:
    """Give the data of a run's meta.json."""
    return {
        "train": describe_text(corpus.train_path, train_text),
        "valid": describe_text(corpus.valid_path, valid_text),
        "report": corpus.report,
    }


def describe_text(path: Path, text: EncodedText) -> dict[str, Any]:
    """Name a text, and count what is in it."""
    return {"path": str(path.resolve()), "num_tokens": len(text.ids), **asdict(text.stats)}


def describe_machine(threads: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Name what a figure was measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = _processor(lines) or cpu
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "python": platform.python_version(),
        "system": platform.system(),  # no more of it: a kernel's name may be that of somebody's cluster
    }


def _processor(lines: Sequence[str]) -> str | None:
    """Name the first processor of /proc/cpuinfo, with its numbers: a rented machine may say no more than its maker."""
    pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    first = {key: value for key, value in reversed(pairs) if key in ("model name", "cpu family", "model")}
    if len(first) == 3 and all(first.values()):
        return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"
    return first.get("model name")


def _commit() -> str | None:
    """The commit of this source tree, if it is one, and not a copy inside somebody else's."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
