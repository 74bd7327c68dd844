"""Releasing a run, and the script that makes the model that ships."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY, refusal, synthetic_lines
from ulimi.engine import load_engine
from ulimi.files import write_json
from ulimi.recipe import load_recipe
from ulimi.release import PLACE, release
from ulimi.run import CARD, WEIGHTS, open_run
from ulimi.score import score_lines

SCRIPT = Path(__file__).parent.parent / "scripts" / "isizulu-model.sh"
TINY_NETWORK = [setting for setting in TINY if not setting.startswith("tokenizer.")]
CORPORA = ("isizulu_open", "nchlt_lower_zul", "isixhosa_open", "siswati", "isindebele")


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.md"
    path.write_text("# Imodeli\n\nCC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/\n")
    return path


def change_meta(run_dir, **entries):
    path = run_dir / "meta.json"
    meta = json.loads(path.read_bytes())
    for name, value in entries.items():
        *parents, last = name.split("__")
        place = meta
        for parent in parents:
            place = place[parent]
        place[last] = value
    write_json(path, meta)


# Releasing


def test_a_release_computes_what_the_run_computes(tiny_run, tmp_path, card):
    num_bytes = release(tiny_run, tmp_path / "new" / "given", card)
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "new" / "given").iterdir())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["given"]
    given = open_run(tmp_path / "new" / "given")
    assert not given.has_weights
    lines = synthetic_lines(5, seed=3)
    theirs = [s.nats for _, s in score_lines(load_engine(given), given.tokenizer, lines)]
    assert theirs == [s.nats for _, s in score_lines(load_engine(tiny_run, kind="onnx"), tiny_run.tokenizer, lines)]
    assert given.recipe == tiny_run.recipe
    assert given.metrics() == tiny_run.metrics()
    assert (given.dir / CARD).read_bytes() == card.read_bytes()
    assert given.meta["weights_sha256"] == tiny_run.weights_sha256


def test_places_become_names_and_nothing_else_changes(run_dir, tmp_path, card):
    change_meta(run_dir, init_from="/home/someone/runs/first", machine__system="Linux-6.1-of-someone")
    release(open_run(run_dir), tmp_path / "given", card)
    before, after = (json.loads((folder / "meta.json").read_bytes()) for folder in (run_dir, tmp_path / "given"))
    assert Path(before["data"]["train"]["path"]).is_absolute()
    assert after["data"]["train"]["path"] == "train.txt"
    assert after["init_from"] == "first"
    assert after["machine"]["system"] == "Linux"
    assert set(after) - set(before) == {"weights_sha256", "graph_sha256"}
    assert {key: after[key] for key in ("scores", "training", "onnx")} == {
        key: before[key] for key in ("scores", "training", "onnx")
    }


def test_a_text_beside_the_user_is_not_taken_for_the_one_of_a_release(tiny_run, tmp_path, card, monkeypatch):
    release(tiny_run, tmp_path / "given", card)
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("another text\n")
    assert open_run(Path("given")).text_path("train") is None


@pytest.mark.parametrize(("entries", "said"), [
    ({"training": None}, "its training is not finished"),
    ({"onnx": {}}, "not described in meta.json; int8 is needed"),
    ({"onnx__kind": "fp32"}, "model.onnx is fp32; int8 is needed"),
    ({"onnx__num_bytes": 5}, "not the file that meta.json describes"),
    ({"onnx__fp32_max_difference": 2e-4}, "differs from the weights by 0.0002 nats a token"),
    ({"onnx__fp32_max_difference": None}, "differs from the weights by None"),
    ({"onnx__int8_cost_bits_per_char": 0.011}, "int8 costs 0.011 bits per character; allowed: 0.0001 and 0.01"),
    ({"onnx__int8_cost_bits_per_char": float("nan")}, "int8 costs nan"),
    ({"note": "it lies in /home/someone/x"}, "meta.json names a place on this machine, '/home/someone/x'"),
])  # fmt: skip
def test_what_was_not_checked_is_not_released(run_dir, tmp_path, card, entries, said):
    change_meta(run_dir, **entries)
    assert said in refusal(lambda: release(open_run(run_dir), tmp_path / "given", card))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.md", "run"]


def test_a_graph_of_other_weights_is_not_released(run_dir, tmp_path, card):
    weights = (run_dir / WEIGHTS).read_bytes()
    (run_dir / WEIGHTS).write_bytes(weights[:-4] + bytes(4))
    assert "of other weights" in refusal(lambda: release(open_run(run_dir), tmp_path / "given", card))
    (run_dir / "model.onnx").unlink()
    assert "`ulimi export" in refusal(lambda: release(open_run(run_dir), tmp_path / "given", card))


def test_a_card_with_gaps_a_large_folder_and_one_that_is_there_are_refused(tiny_run, tmp_path, card):
    def said(**options):
        return refusal(lambda: release(tiny_run, tmp_path / "given", card, **options))

    assert re.search(r"a release would have 0\.0 MB; allowed: 0\.0", said(max_bytes=1000))
    assert not (tmp_path / "given").exists()
    card.write_text("# Imodeli\n@@\nkWh\n@@\n")
    assert "gaps (@@) in line 2, 4" in said()
    card.write_text(" \n")
    assert "nothing in it" in said()
    card.write_text("see /home/someone/notes\n")
    assert f"{CARD} names a place" in said()
    card.unlink()
    assert "cannot be read" in said()
    (tmp_path / "given").mkdir()
    assert "is there already" in said()


@pytest.mark.parametrize(("text", "found"), [
    ('"path": "/home/x/train.txt"', "/home/x/train.txt"), ("in /tmp/run", "/tmp/run"), (r"C:\Users\x", r"C:\Users"),
    ("https://creativecommons.org/licenses/by-sa/4.0/", None), ("and/or/both", None), ("valid / test", None),
    ("C:/Users/x", "C:/Users"), ("file:///home/x", "file:///home"), ("see ~/notes", "~/notes"), ("~x/y", "~x/y"),
    (r"\\server\x", r"\\server\x"), ("a ~ b/c", None), ("~~no~~/x", None), ("ab://x/y", None),
    ("runs/mine/x", None), ("1/2/3 of it", None), ("kWh/h/core", None),
])  # fmt: skip
def test_a_place_is_told_from_what_looks_like_one(text, found):
    match = PLACE.search(text)
    assert (match.group() if match else None) == found


# The script


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(CORPORA):
        lines = synthetic_lines(100, seed=10 + seed)
        (folder / name).mkdir()
        # No line end after the last line: it must not run into the next text.
        (folder / name / "train.txt").write_text(f"Lena {name} iqala.\n" + "\n".join(lines[:60]))
        if name == "isizulu_open":
            (folder / name / "valid.txt").write_text("\n".join(lines[60:80]) + "\n")
            (folder / name / "test.txt").write_text("\n".join(lines[80:]) + "\n")
    return folder


def run_script(*args, **env):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "THREADS": "1", **env},
    )  # fmt: skip


def test_the_script_makes_the_model_from_its_corpora(corpora, card, tmp_path):
    """The true commands, very small: a release that was finetuned from what was pretrained, both with a teacher."""
    quick = " ".join([*TINY_NETWORK, "optim.max_epochs=1"])
    out = tmp_path / "out"
    done = run_script(
        corpora, out, ULIMI=f"{sys.executable} -m ulimi", CARD=str(card),
        TEACHER=f"tokenizer.vocab_size=320 {quick}", PRETRAIN=quick, FINETUNE=quick,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mixed = (out / "mix" / "train.txt").read_text().splitlines()
    assert len(mixed) == 6 * 61
    assert [line.split()[1] for line in mixed if line.startswith("Lena ")] == [
        "isizulu_open", "nchlt_lower_zul", "isixhosa_open", "isizulu_open", "siswati", "isindebele",
    ]  # fmt: skip
    for part in ("valid.txt", "test.txt"):
        original = (corpora / "isizulu_open" / part).read_bytes()
        assert (out / "mix" / part).read_bytes() == (out / "clean" / part).read_bytes() == original
    teacher, pretrained, finetuned, given = (
        open_run(out / name) for name in ("teacher", "pretrain", "finetune", "isizulu")
    )
    hashes = [hashlib.sha256((teacher.dir / name).read_bytes()).hexdigest() for name in (WEIGHTS, "model.onnx")]
    for run in (pretrained, finetuned):
        assert run.meta["teacher"] == {"path": str(teacher.dir.resolve()), "sha256": hashes}
    assert given.meta["teacher"]["path"] == "teacher"
    assert finetuned.meta["init_from"] == str(pretrained.dir.resolve())
    assert finetuned.tokenizer.to_str() == pretrained.tokenizer.to_str() == teacher.tokenizer.to_str()
    assert given.meta["weights_sha256"] == finetuned.weights_sha256
    assert teacher.recipe["model"]["weight_dropout"] == 0.45
    assert (pretrained.recipe["optim"]["lr"], finetuned.recipe["optim"]["lr"]) == (4e-3, 1e-3)
    assert (pretrained.recipe["model"]["weight_dropout"], finetuned.recipe["data"]["eval_batch_size"]) == (0.3, 80)


FAKE = """#!/usr/bin/env bash
# Say what was asked, make what the command makes; stop as if interrupted where STOP_AT says.
echo "$@" >> "$LOG"
arguments="$*"
out=${arguments#*--out }
out=${out%% *}
mkdir -p "$out"
case $1 in
  corpus) touch "$out/train.txt" ;;
  train)
    mkdir -p "$out/last"
    touch "$out/last/checkpoint.safetensors"
    [ "$(basename "$out")" != "$STOP_AT" ] || exit 130
    touch "$out/README.md" ;;
esac
"""


def test_the_script_goes_on_where_it_was_stopped(corpora, card, tmp_path):
    fake, log, out = tmp_path / "fake", tmp_path / "log", tmp_path / "out"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def asked(stop_at=""):
        log.write_text("")
        done = run_script(
            corpora, out, ULIMI=str(fake), LOG=str(log), STOP_AT=stop_at, CARD=str(card), FINETUNE="optim.lr=2e-3"
        )
        return done.returncode, log.read_text().replace(str(out), "OUT").splitlines()

    clean = f"corpus clean {corpora}/isizulu_open --out OUT/clean.part --report OUT/clean.part/changes.tsv"
    zeroth = "train OUT/mix --out OUT/teacher --threads 1"
    first = "train OUT/mix --out OUT/pretrain --threads 1"
    second = "train OUT/clean --out OUT/finetune --threads 1"
    start = "--recipe isizulu-finetune --init-from OUT/pretrain --teacher OUT/teacher optim.lr=2e-3"
    last = f"release OUT/finetune --out OUT/isizulu --card {card}"
    (out / "clean.part").mkdir(parents=True)  # of a cleaning that was killed
    (out / "clean.part" / "half").touch()
    assert asked("teacher") == (130, [clean, f"{zeroth} --recipe isizulu-gpu optim.max_epochs=30"])
    assert not (out / "clean" / "half").exists()
    assert asked("pretrain") == (
        130,
        [f"{zeroth} --resume", f"{first} --recipe isizulu-pretrain --teacher OUT/teacher"],
    )
    assert asked("finetune") == (130, [f"{first} --resume", f"{second} {start}"])
    assert asked() == (0, [f"{second} --resume", last])
    assert asked() == (0, [])


def test_the_script_names_what_is_missing(corpora, tmp_path):
    for args in ((), ("", tmp_path / "out"), (corpora,)):
        done = run_script(*args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "usage:" in done.stderr
    (tmp_path / "isizulu_open").mkdir()
    done = run_script(tmp_path, tmp_path / "out")
    assert (done.returncode, done.stderr) == (2, f"isizulu-model: {tmp_path}/isizulu_open/valid.txt is missing\n")
    assert not (tmp_path / "out").exists()


def test_the_script_leaves_what_was_begun_without_a_teacher(corpora, tmp_path):
    out = tmp_path / "out"
    (out / "pretrain").mkdir(parents=True)
    done = run_script(corpora, out)
    expected = f"isizulu-model: {out}/pretrain was trained without a teacher; give another folder than {out}\n"
    assert (done.returncode, done.stderr) == (2, expected)
    assert [path.name for path in out.iterdir()] == ["pretrain"]


def test_the_two_recipes_describe_one_network():
    sizes = [load_recipe(f"isizulu-{part}").model_dump() for part in ("pretrain", "finetune")]
    for recipe in sizes:
        for name in [name for name in recipe["model"] if name.endswith("dropout")]:
            del recipe["model"][name]
    assert sizes[0]["model"] == sizes[1]["model"]
    assert sizes[0]["tokenizer"] == sizes[1]["tokenizer"]
