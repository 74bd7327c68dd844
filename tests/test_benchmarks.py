"""The benchmarks run, in sizes at which nothing is measured; the page's tables are those of their files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["generation", "scoring", "install"])
def test_a_benchmark_runs_and_writes_what_the_page_is_made_of(name, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--tiny", "--rounds", "1", "--out", out]
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": source}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    figures = [value for row in result["rows"] for value in row.values() if isinstance(value, float)]
    assert len(figures) >= len(result["rows"])
    assert np.isfinite(figures).all()
    assert min(figures) > 0
    report = load("report")
    kept = report.read(name)
    assert kept.keys() == result.keys()
    assert report.TABLES[name](result).count("|") > 8
    if name != "install":
        ours = {row["contender"] for row in result["rows"] if row["contender"].startswith("ulimi")}
        assert ours == {row["contender"] for row in kept["rows"] if row["contender"].startswith("ulimi")}


def test_the_pages_tables_are_those_of_the_files():
    report = load("report")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page) == page


def test_the_picture_can_be_drawn(tmp_path):
    report = load("report")
    report.draw(report.read("generation"), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_the_files_name_no_place():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert "/" not in path.read_text(encoding="utf-8"), path.name
