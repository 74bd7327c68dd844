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


def run_quality(*arguments, folder):
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quality.py", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip


def test_contenders_train_on_one_text_and_come_into_one_table(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    lines = (ROOT / "samples" / "isizulu.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for part, some in {"train": lines[:300], "valid": lines[300:320], "test": lines[320:330]}.items():
        (corpus / f"{part}.txt").write_text("".join(some), encoding="utf-8")
    names = ["ours", "ngram", "bzip2", *(["gpt2"] if importlib.util.find_spec("transformers") else [])]
    command = [corpus, "--minutes", "0.01", "--out", out]
    done = run_quality(*command, "--only", *names, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    for result in results.values():
        assert result["scores"].keys() == {"valid"}
        assert 1 < min(result["scores"]["valid"].values()) <= max(result["scores"]["valid"].values()) < 6
    for name in {"ours", "gpt2"} & set(names):
        # In so short a time it has hardly learned anything: log2 of the vocabulary, times tokens a character.
        assert results[name]["curve"][-1][1] == pytest.approx(results[name]["scores"]["valid"]["stream"], rel=0.02)
        assert results[name]["training_minutes"] == results[name]["curve"][-1][0] > 0
        assert results[name]["parameters"] == pytest.approx(5.5e6, rel=0.01)
    last = json.loads((out / "runs" / "ours" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["averaging"]  # the recipe's way

    again = run_quality(*command, "--test", "--only", "ours", "ngram", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    ours = json.loads((out / "ours.json").read_text())
    assert ours["scores"].pop("test").keys() == {"lines", "stream"}
    assert ours == results["ours"]  # not trained again

    assert run_quality("--out", out, "--report", folder=tmp_path).returncode == 0
    table = (out / "quality.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2 : 2 + len(names)]] == sorted(
        names, key=["ours", "gpt2", "ngram", "bzip2"].index
    )
    assert f"{ours['scores']['valid']['stream']:.3f}" in table
    assert (out / "quality.png").stat().st_size > 10_000

    other = run_quality(corpus, "--minutes", "7", "--out", out, "--only", "ngram", folder=tmp_path)
    assert other.returncode == 2
    assert "give another --out" in other.stderr
    assert "Traceback" not in other.stderr


def test_the_clock_stands_still_while_something_is_validated(monkeypatch):
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # importing it sets them, for good
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    watch = load("quality").Watch(2)
    times = iter([100.0, 130.0, 190.0, 500.0, 530.0])
    watch.now = lambda: next(times)
    watch.go()
    assert watch.lap() == 30
    assert watch.lap() == 90
    watch.epoch({"valid_bits_per_char": 2.5})
    assert watch.lap() == 120
    assert watch.curve == [(1.5, 2.5)]


@pytest.mark.parametrize("length", [1, 128, 129, 256, 257, 384, 385, 1000])
def test_gpt2_reads_each_token_once_and_after_enough_others(length):
    gpt2 = load("gpt2")
    ids = np.arange(length) + 10
    seen = []
    for inputs, targets in gpt2.windows_of(ids, 5):
        assert len(inputs) == len(targets) <= 256
        for place in np.flatnonzero(targets != -100):
            token = targets[place]
            before = [5, *ids][: token - 9]
            assert inputs[: place + 1].tolist() == before[-place - 1 :]
            assert place + 1 >= min(len(before), 129)
            seen.append(token)
    assert seen == ids.tolist()


def test_gpt2s_nats_are_those_of_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # before transformers looks for it
    pytest.importorskip("transformers")
    import torch

    gpt2 = load("gpt2")
    model = gpt2.GPT2Training(50, 1e-3, "fp32").model.eval()
    rng = np.random.default_rng(1)
    texts = [rng.integers(50, size=length) for length in (3, 40, 1, 200, 7, 9, 12, 30, 2, 5, 90)]
    expected = 0.0
    for ids in texts:
        tokens = torch.tensor([[49, *ids]])
        with torch.no_grad():
            expected += model(input_ids=tokens, labels=tokens).loss.item() * len(ids)
    nats = gpt2.total_nats(model, (window for ids in texts for window in gpt2.windows_of(ids, 49)))
    assert nats == pytest.approx(expected, rel=1e-5)


def test_the_pages_tables_are_those_of_the_files():
    report = load("report")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page) == page


def test_the_picture_can_be_drawn(tmp_path):
    report = load("report")
    report.draw(report.read("generation"), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_the_files_name_no_place():
    report = load("report")
    for name in report.TABLES:
        assert "/" not in (report.RESULTS / f"{name}.json").read_text(encoding="utf-8"), name
