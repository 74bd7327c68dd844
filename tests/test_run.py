"""The run folder, what is said and drawn of it, and which module may know which."""

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import ulimi
from conftest import refusal
from ulimi import provenance
from ulimi.files import atomic_path, write_json, write_text
from ulimi.info import BARS, curve, model_card, score_text, summary
from ulimi.plot import plot_curve
from ulimi.progress import TrainingProgress, counting
from ulimi.run import FORMAT, WEIGHTS, open_run
from ulimi.score import Score
from ulimi.train import Progress

LAYERS = [
    {"errors"},
    {"files", "grammar", "fetch"},
    {"tokenizer", "corpus"},
    {"run", "clean"},
    {"data", "distribution", "ngram"},
    {"engine", "provenance"},
    {"sampling", "words", "score", "marginal", "info", "progress"},
    {"surprisal", "generate", "spelling", "baseline", "mixture", "judge"},
    {"beam", "suggest"},
    {"writer", "keystrokes"},
    {"study", "serve", "web_folder"},
    {"report"},
    {"recipe", "cpu", "cuda", "plot", "graph_weights"},
    {"mogrifier"},
    {"model", "loss"},
    {"mogrifier_graph"},
    {"optim", "adapt", "export", "distill", "parallel", "start"},
    {"train", "release"},
    {"hub_folder"},
    {"cli"},
    {"__main__"},
]
"""a module may import those of the layers above its own"""

TRAINING_FLOOR = {
    "recipe",
    "cpu",
    "cuda",
    "mogrifier",
    "mogrifier_graph",
    "graph_weights",
    "model",
    "loss",
    "distill",
    "report",
    "optim",
    "parallel",
    "start",
    "train",
    "adapt",
    "plot",
    "export",
    "release",
    "hub_folder",
}
LIGHT_FLOOR = set().union(*LAYERS) - TRAINING_FLOOR
HEAVY = {"torch", "safetensors", "tomli_w", "matplotlib", "tensorboard", "onnx"}

WITHOUT_HEAVY = f"import sys\nsys.modules.update(dict.fromkeys({sorted(HEAVY)}))\n"
"""let an import of these fail, as where only the light floor is installed"""


# The folder


def test_a_run_is_opened(tiny_run):
    run = open_run(tiny_run.dir)
    assert run.config["hidden_size"] == 24
    assert run.tokenizer.vocab_size == run.config["vocab_size"] == 320
    assert run.recipe["optim"]["max_epochs"] == 2
    assert run.weights_path == tiny_run.dir / "model.safetensors"
    assert [row["epoch"] for row in run.metrics()] == [1, 2]


def test_what_is_no_run_is_refused(tmp_path):
    assert "no run folder" in refusal(lambda: open_run(tmp_path / "none"))
    assert "ulimi train CORPUS --out" in refusal(lambda: open_run(tmp_path / "none"))
    assert "holds no meta.json" in refusal(lambda: open_run(tmp_path))
    (tmp_path / "file").write_text("")
    assert "no run folder" in refusal(lambda: open_run(tmp_path / "file"))


@pytest.mark.parametrize(("meta", "said"), [
    ({"format": FORMAT + 1, "ulimi": "9.9"}, f"has run format {FORMAT + 1}, this ulimi reads up to {FORMAT}"),
    ({"format": FORMAT + 1, "ulimi": "9.9"}, "made by ulimi 9.9"),
    ({}, "no format version"),
    ({"format": "1"}, "no format version"),
    ([], "not a JSON object"),
])  # fmt: skip
def test_a_format_that_is_not_ours_is_refused(tmp_path, meta, said):
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert said in refusal(lambda: open_run(tmp_path))


@pytest.mark.parametrize(("name", "read"), [
    ("meta.json", lambda run: open_run(run.dir)),
    ("config.json", lambda run: run.config),
    ("recipe.toml", lambda run: run.recipe),
    ("tokenizer.json", lambda run: run.tokenizer),
    ("tokenizer_config.json", lambda run: run.tokenizer),
    ("model.safetensors", lambda run: run.weights_path.stat()),
])  # fmt: skip
def test_a_file_that_is_missing_or_damaged_is_named(run_dir, name, read):
    good = (run_dir / name).read_bytes()
    damages = [good[: len(good) // 2], b"", b"\xff\x00\xff"] if name not in ("recipe.toml", WEIGHTS) else [b"\xff\x00"]
    for damage in damages if name != WEIGHTS else []:
        run = open_run(run_dir)
        (run_dir / name).write_bytes(damage)
        assert name in refusal(lambda run=run: read(run))
        (run_dir / name).write_bytes(good)
    run = open_run(run_dir)
    (run_dir / name).unlink()
    (run_dir / "model.onnx").unlink()  # which holds the weights, too
    assert name in refusal(lambda: read(run))


def test_a_config_of_another_network_is_refused(run_dir):
    write_json(run_dir / "config.json", {"model_type": "gpt2"})
    assert "config.json: describes no AWD-LSTM" in refusal(lambda: open_run(run_dir).config)


def test_metrics_leave_out_a_row_that_is_being_written(run_dir):
    run = open_run(run_dir)
    rows = run.metrics()
    path = run_dir / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good + '{"epoch": 3, "val')
    assert run.metrics() == rows
    path.write_text("no JSON\n" + good)
    assert "metrics.jsonl: cannot be read" in refusal(run.metrics)
    path.unlink()
    assert run.metrics() == []


def test_a_folder_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path, Path("..")):
        assert "this is a folder" in refusal(lambda path=path: write_text(path, "text"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "now", "then"), [("average_share", 0.2, 0.0), ("beta1", 0.0, 0.9)])
def test_a_run_from_before_a_setting_was_trained_as_was_usual_then(run_dir, key, now, then):
    recipe = (run_dir / "recipe.toml").read_text()
    assert f"{key} = {now}\n" in recipe
    assert open_run(run_dir).recipe["optim"][key] == now
    (run_dir / "recipe.toml").write_text(recipe.replace(f"{key} = {now}\n", ""))
    assert open_run(run_dir).recipe["optim"][key] == then


def test_an_atomic_write_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def fail_halfway():
        with atomic_path(path) as unfinished:
            unfinished.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    write_text(path, "isiZulu “ō”\n")
    assert path.read_bytes() == "isiZulu “ō”\n".encode()


def test_an_atomic_write_changes_what_a_link_leads_to_and_leaves_pipes_alone(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        assert "this is a device or a pipe" in refusal(lambda path=path: write_text(path, "text"))
        assert not path.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]


def test_an_atomic_write_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if is_folder else os.pread(descriptor, 9, 0))
        fsync(descriptor)

    def noted_replace(path, target):
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_text(tmp_path / "x", "whole")
    assert done == [b"whole", "rename", "folder"]


def test_an_atomic_write_works_where_a_folder_cannot_be_synced(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ulimi.files.os.open", refuse)
    write_text(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole"


def test_an_atomic_write_that_does_not_reach_the_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ulimi.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "x", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_atomic_write_into_a_folder_that_is_a_file_fails_cleanly(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        write_text(tmp_path / "file" / "x", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# What is said of it


def test_the_summary_says_what_a_run_is(tiny_run):
    facts = dict(summary(tiny_run))
    assert facts["run"] == str(tiny_run.dir)
    assert "embedding 16, 2 layers of 24, tied" in facts["network"]
    assert facts["tokenizer"] == "bpe, 320 tokens"
    assert "160 lines" in facts["trained on"]
    assert "20 lines" in facts["validated on"]
    assert facts["training"].startswith("2 epochs in ")
    assert facts["state"] == "finished"
    assert "started from" not in facts
    score = tiny_run.meta["scores"]["valid"]
    assert facts["score, valid"] == score_text(score)
    assert f"{score['bits_per_char']:.4f} bits per character" in facts["score, valid"]
    assert f"word perplexity {score['word_perplexity']:.1f}" in facts["score, valid"]


def test_the_summary_of_a_run_that_has_not_ended_says_so(run_dir):
    meta = open_run(run_dir).meta
    del meta["training"]
    meta["scores"] = {}
    meta["init_from"] = "/other/run"
    write_json(run_dir / "meta.json", meta)
    (run_dir / "metrics.jsonl").unlink()
    facts = dict(summary(open_run(run_dir)))
    assert "--resume" in facts["state"]
    assert facts["started from"] == "/other/run"
    assert not {"training", "curve", "score, valid"} & facts.keys()


@pytest.mark.parametrize("spoilt", [{"machine": None}, {"data": []}, {"created": None, "data": {"train": 5}}])
def test_the_summary_of_a_damaged_meta_file_is_one_line(run_dir, spoilt):
    write_json(run_dir / "meta.json", {**open_run(run_dir).meta, **spoilt})
    assert "meta.json: an entry is not of the kind" in refusal(lambda: summary(open_run(run_dir)))


def test_the_model_card_holds_the_summary_and_the_recipe(tiny_run):
    card = model_card(tiny_run)
    assert card == (tiny_run.dir / "README.md").read_text()
    assert card.startswith("---\n")
    assert "hidden_size = 24" in card
    assert all(f"| {name} | {value} |" in card for name, value in summary(tiny_run))


def test_a_curve_falls_where_its_values_fall():
    bars = curve([3.0, 2.0, 1.5, 1.0]).split()[1]
    assert [BARS.index(bar) for bar in bars] == [7, 4, 2, 0]
    assert curve([3.0, 2.0]).startswith("3.000 █▁ 2.000")
    assert curve([1.0, 1.0]).split()[1] == "▁▁"
    assert len(curve([float(i) for i in range(500)]).split()[1]) <= 40
    assert len(curve([1.0]).split()[1]) == 1


def test_the_curve_is_drawn_as_a_png(tmp_path, tiny_run):
    rows = tiny_run.metrics()
    before = plt.get_fignums()
    for name, drawn in (
        ("all", [rows[0], {**rows[1], "averaging": True}]),
        ("one", rows[:1]),
        ("none", []),
    ):
        path = tmp_path / f".{name}.tmp"  # the name says nothing of the format
        plot_curve(drawn, path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 3000
    assert plt.get_fignums() == before  # closed: a long run must not keep a figure an epoch
    assert (tiny_run.dir / "curve.png").read_bytes().startswith(b"\x89PNG")


# What is said while it runs


ROW = {"epoch": 3, "seconds": 90.0, "lr": 0.001, "train_loss": 4.25, "valid_nll": 4.5, "valid_perplexity": 90.0,
       "valid_bits_per_char": 1.75, "averaging": True, "best": True}  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_said_on_standard_error_only(capsys, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("ulimi.progress.SECONDS_BETWEEN_LINES", -1)
    with TrainingProgress(9) as progress:
        progress.note("a note with [brackets] of /any/kind")
        for tokens in (100, 200):
            where = Progress(epoch=2, tokens=tokens, epoch_tokens=tokens)
            progress.step(where, 400, 4.25, 0.001)
        progress.epoch(ROW)
    out, err = capsys.readouterr()
    assert out == ""
    assert "a note with [brackets] of /any/kind\n" in err
    assert "epoch   3" in err
    assert "1.7500 bits/char  averaged  best" in err
    if terminal:
        assert "\x1b[" in err
    else:
        assert "epoch 3/9  50%" in err
        assert "tokens/s  loss 4.250  lr 0.001" in err
        assert "\x1b[" not in err


def test_lines_come_only_now_and_then(capsys):
    with TrainingProgress(9) as progress:
        for tokens in range(1, 50):
            progress.step(Progress(tokens=tokens, epoch_tokens=tokens), 100, 4.0, 0.1)
    assert capsys.readouterr().err == ""


def test_counting_is_silent_where_there_is_no_terminal(capsys):
    with counting("reading") as on_tokens:
        on_tokens(5)
    assert capsys.readouterr() == ("", "")


# Which module may know which


def imports_of(name):
    """Give (module, whether at module level) of each import of ours that runs; type checkers' imports do not run."""
    tree = ast.parse((Path(ulimi.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    found = set()

    def visit(node, top):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            top = False
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found.add((node.module, top))
            if node.module == "ulimi":
                found.update((f"ulimi.{alias.name}", top) for alias in node.names)
        if isinstance(node, ast.Import):
            found.update((alias.name, top) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, top)

    visit(tree, True)
    return found


def test_the_layers_name_every_module():
    modules = {path.stem for path in Path(ulimi.__file__).parent.glob("*.py")} - {"__init__"}
    assert set().union(*LAYERS) == modules


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_imports_go_up_the_layers(name):
    own = next(number for number, layer in enumerate(LAYERS) if name in layer)
    above = set().union(*LAYERS[:own])
    ours = {module.removeprefix("ulimi.") for module, _ in imports_of(name) if module.startswith("ulimi.")}
    # The engine looks up the network and its weights when it is made, not before.
    allowed = above | ({"model", "graph_weights"} if name == "engine" else set())
    assert ours <= allowed


@pytest.mark.parametrize("name", sorted(LIGHT_FLOOR))
def test_the_light_floor_does_not_import_the_training_floor_when_it_is_imported(name):
    at_once = {module for module, top in imports_of(name) if top}
    assert not {f"ulimi.{module}" for module in TRAINING_FLOOR} & at_once
    # typer itself may bring pydantic, so that only the source can tell.
    assert not {module for module in at_once if module.split(".")[0] in {*HEAVY, "pydantic"}}


def python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_light_floor_works_where_nothing_heavy_is_installed(tiny_run):
    modules = sorted(LIGHT_FLOOR - {"__main__"})
    code = f"""{WITHOUT_HEAVY}
import importlib
for name in {modules}:
    importlib.import_module("ulimi." + name)
from pathlib import Path
from ulimi.info import summary
from ulimi.run import open_run
run = open_run(Path(sys.argv[1]))
print(dict(summary(run))["tokenizer"], run.tokenizer.decode(run.tokenizer.encode("Abantu bafunda")))
"""
    result = python(code, tiny_run.dir)
    assert result.stderr == ""
    assert result.stdout == "bpe, 320 tokens Abantu bafunda\n"


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["info"]])
def test_commands_that_need_no_network_import_none(tiny_run, args):
    args = [*args, str(tiny_run.dir)] if args == ["info"] else args
    code = f"""
import sys
from ulimi.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
print("heavy:", sorted({HEAVY} & set(sys.modules)))
"""
    result = python(code, *args)
    assert result.stderr == ""
    assert result.stdout.endswith("heavy: []\n")
    assert len(result.stdout) > 200


@pytest.mark.parametrize("args", [["train", "x.txt", "--out", "y"], ["recipe"], ["evaluate", "x.txt", "--cache"]])
def test_where_nothing_heavy_is_installed_commands_say_what_to_install(tiny_run, args):
    args = [*args, *(["-m", tiny_run.dir] if args[0] == "evaluate" else [])]
    result = python(f"{WITHOUT_HEAVY}\nfrom ulimi.cli import main\nmain()", *args)
    assert result.returncode == 2
    asked = "--cache" if "--cache" in args else "this command"
    advice = "pip install 'ulimi[train]', or '.[train]' in a checkout"
    assert result.stderr == f"ulimi: error: {asked} needs torch: {advice}\n"


def test_a_score_without_bounds_is_still_said():
    score = Score(1e9, 10, 1, 1, 10, 10).as_dict()
    assert score["perplexity"] is None
    assert "perplexity per token beyond all bounds" in score_text(score)


def test_info_says_that_a_model_is_sparse(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    assert "entmax" not in dict(summary(open_run(run_dir)))["network"]
    write_json(run_dir / "config.json", {**config, "entmax_alpha": 1.5})
    assert dict(summary(open_run(run_dir)))["network"].endswith(", output 1.5-entmax")
    write_json(run_dir / "config.json", {**config, "entmax_alpha": 3})
    assert "entmax_alpha is 3; allowed: 1 (softmax) to 2" in refusal(lambda: open_run(run_dir).alpha)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC"] * 2, "AMD EPYC (family 25, model 17)"),
        (["model\t\t: 17", "cpu family\t: 25", "model name\t: A: B", "model\t\t: 9"], "A: B (family 25, model 17)"),
        (["model name\t: ARMv7 Processor rev 4 (v7l)", "Hardware\t: BCM2835"], "ARMv7 Processor rev 4 (v7l)"),
        (["processor\t: 0", "BogoMIPS\t: 100.00", "flags"], None),
        (["model name\t:", "cpu family\t: 6", "model\t: 1"], ""),
    ],
)
def test_a_processor_is_named_with_its_numbers(lines, name):
    assert provenance._processor(lines) == name
