"""What `pip install ulimi` costs: the size of its environment, and how long the first things take.

    python benchmarks/install.py --out benchmarks/results/install.json

Makes a fresh environment, installs this checkout without extras, and asks it: the size of everything but pip and
setuptools, which every environment has, and of the largest packages; seconds of `import ulimi`, of `ulimi --help`, and
of `ulimi generate` from its start to the first word on standard output. The files are in the system's cache, Python's
compiled ones are there; a bare `python -c pass` stands beside them. Wall time, medians.

`--tiny` measures the environment that it runs in.
"""

from common import arguments, finish  # isort: skip

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT = "Namhlanje"
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel")


def megabytes(folder: Path) -> float:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def until(command: list[str], enough: int) -> float:
    """Seconds from the start of a command until it has written more than so many characters, or ends."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        num = 0
        while num <= enough and (piece := process.stdout.read1(65536)):  # type: ignore[attr-defined]
            num += len(piece)
        seconds = time.perf_counter() - started
        process.stdout.read()
    assert process.returncode == 0, command
    return seconds


def sizes(packages: Path) -> list[dict[str, Any]]:
    """Sizes of an environment's packages: of all, and of the largest."""
    found = {folder.name: megabytes(folder) for folder in packages.iterdir() if folder.is_dir()}
    ours = {name: size for name, size in found.items() if name.split("-")[0] not in NOT_OURS}
    largest = sorted(ours, key=lambda name: ours[name], reverse=True)[:8]
    return [{"what": "everything but pip and setuptools", "MB": round(sum(ours.values()), 1)}] + [
        {"what": name, "MB": round(ours[name], 1)} for name in largest
    ]


def times(python: Path, ulimi: list[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each first thing, which take turns."""
    commands = {
        "python -c pass": ([str(python), "-c", "pass"], 0),
        "import ulimi": ([str(python), "-c", "import ulimi"], 0),
        "ulimi --help": ([*ulimi, "--help"], 10**9),
        "first word of ulimi generate": ([*ulimi, "generate", PROMPT, "--seed", "1"], len(PROMPT)),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (command, enough) in commands.items():
            seconds = until(command, enough)
            if number:
                taken[name].append(seconds)
    return [{"what": name, "seconds": round(statistics.median(found), 4)} for name, found in taken.items()]


def main() -> None:
    """See the module."""
    args = arguments(__doc__)
    if args.tiny:
        found = times(Path(sys.executable), [sys.executable, "-m", "ulimi"], args.rounds)
        finish(args, [*sizes(ROOT / "src"), *found], ())
        return
    os.environ.pop("PYTHONPATH", None)  # or the fresh environment would hold more than is installed in it
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        scripts = Path(folder) / "bin"
        subprocess.run([scripts / "python", "-m", "pip", "install", "--quiet", str(ROOT)], check=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([scripts / "python", "-c", where], capture_output=True, text=True, check=True).stdout
        found = times(scripts / "python", [str(scripts / "ulimi")], args.rounds)
        # After the runs: what they compiled belongs to the environment.
        rows = [*sizes(Path(packages.strip())), *found]
    finish(args, rows, ("numpy", "onnxruntime", "tokenizers"))


if __name__ == "__main__":
    main()
