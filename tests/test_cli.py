"""The command line as people meet it: results, refusals in one line, and interruptions."""

import errno
import hashlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import TINY, synthetic_lines
from ulimi import __version__, cli
from ulimi.adapt import Cache, Dynamic
from ulimi.files import write_json
from ulimi.recipe import load_recipe, recipe_names
from ulimi.run import CHECKPOINT, FORMAT, WEIGHTS, open_run

QUICK = (*TINY, "optim.max_epochs=1")
SCORE_KEYS = {
    "nats", "num_tokens", "num_words", "num_lines", "num_chars", "num_bytes", "perplexity", "word_perplexity",
    "bits_per_char", "bits_per_byte",
}  # fmt: skip


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(synthetic_lines(100, seed=2)) + "\n")
    return path


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def command(*args):
    return [sys.executable, "-m", "ulimi", *map(str, args)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# train


def test_train_on_a_folder(works, tmp_path, corpus_dir):
    result = works("train", corpus_dir, *QUICK, "--out", tmp_path / "run", "--threads", "1")
    run = open_run(tmp_path / "run")
    score = run.meta["scores"]["valid"]
    assert f"validation, one stream: {score['bits_per_char']:.4f} bits per character" in result.out
    assert f"ulimi generate -m {tmp_path / 'run'}" in result.out
    assert "160 training, 20 validation, 20 test lines" in result.err
    assert "epoch   1" in result.err
    assert not (tmp_path / "run" / "corpus").exists()
    assert run.recipe["optim"]["max_epochs"] == 1


def test_train_on_one_file_splits_it(works, tmp_path, text_file):
    works("train", text_file, *QUICK, "-o", tmp_path / "run")
    parts = [tmp_path / "run" / "corpus" / f"{part}.txt" for part in ("train", "valid", "test")]
    lines = [line for part in parts for line in part.read_text().splitlines()]
    assert sorted(lines) == sorted(text_file.read_text().splitlines())
    data = open_run(tmp_path / "run").meta["data"]
    assert [data[part]["path"] for part in ("train", "valid")] == [str(path) for path in parts[:2]]


def test_a_recipe_file_and_settings(works, tmp_path, corpus_dir):
    (tmp_path / "my.toml").write_text("[tokenizer]\nkind = 'char'\nvocab_size = 0\n[data]\nbptt = 9\n")
    sizes = [setting for setting in QUICK if "vocab_size" not in setting]
    works("train", corpus_dir, *sizes, "data.bptt=11", "-o", tmp_path / "run", "--recipe", tmp_path / "my.toml")
    run = open_run(tmp_path / "run")
    assert run.tokenizer.kind == "char"
    assert run.recipe["data"]["bptt"] == 11


def test_finetuning_takes_the_settings_of_its_source(works, tmp_path, text_file, tiny_run):
    before = contents(tiny_run.dir)
    works("train", text_file, "optim.max_epochs=1", "-o", tmp_path / "run", "--init-from", tiny_run.dir)
    run = open_run(tmp_path / "run")
    assert run.recipe["model"] == tiny_run.recipe["model"]
    assert run.recipe["optim"] == {**tiny_run.recipe["optim"], "max_epochs": 1}
    assert run.meta["init_from"] == str(tiny_run.dir.resolve())
    assert contents(tiny_run.dir) == before


def test_finetuning_by_a_recipe_keeps_the_sizes_of_its_source(works, refused, tmp_path, corpus_dir, tiny_run):
    common = ("train", corpus_dir, "-o", tmp_path / "run", "--recipe", "demo")
    works(*common, "optim.max_epochs=1", "--init-from", tiny_run.dir)
    run, demo = open_run(tmp_path / "run"), load_recipe("demo")
    sizes = ("embedding_size", "hidden_size", "num_layers", "tie_weights", "mogrifier_rounds", "mogrifier_rank")
    assert {key: run.recipe["model"][key] for key in sizes} == {key: tiny_run.recipe["model"][key] for key in sizes}
    assert run.config["hidden_size"] != demo.model.hidden_size
    assert run.recipe["model"]["input_dropout"] == demo.model.input_dropout
    assert run.recipe["optim"] == {**demo.model_dump(mode="json")["optim"], "max_epochs": 1}
    assert run.recipe["tokenizer"] == tiny_run.recipe["tokenizer"]
    # It goes on with the recipe named, too, but not with another tokenizer.
    said = refused(*common, "--resume", "tokenizer.vocab_size=999")
    assert "tokenizer.vocab_size: differs from the run" in said
    works(*common, "optim.max_epochs=2", "--resume")
    assert len(open_run(tmp_path / "run").metrics()) == 2
    said = refused(*common[:2], "-o", tmp_path / "new", "--init-from", tiny_run.dir, "model.hidden_size=20")
    assert "other sizes" in said


def test_finetuning_of_nt_asgd_averages_from_the_start(works, tmp_path, corpus_dir):
    works("train", corpus_dir, *QUICK, "optim.kind=nt-asgd", "optim.lr=3", "-o", tmp_path / "source")
    works("train", corpus_dir, "-o", tmp_path / "run", "--init-from", tmp_path / "source")
    run = open_run(tmp_path / "run")
    assert run.recipe["optim"]["average_at_start"] is True
    assert run.metrics()[0]["averaging"] is True
    assert open_run(tmp_path / "source").recipe["optim"]["average_at_start"] is False


def test_finetuning_with_a_new_tokenizer(works, tmp_path, text_file, tiny_run):
    common = ("train", text_file, "optim.max_epochs=1", "--init-from", tiny_run.dir)
    works(*common, "-o", tmp_path / "new", "--new-tokenizer")
    works(*common, "-o", tmp_path / "same")
    tokenizers = [open_run(tmp_path / name).tokenizer.to_str() for name in ("new", "same")]
    assert tokenizers[0] != tiny_run.tokenizer.to_str()
    assert tokenizers[1] == tiny_run.tokenizer.to_str()


def test_resume_needs_no_setting_and_may_extend(works, run_dir, corpus_dir):
    rows = open_run(run_dir).metrics()
    works("train", corpus_dir, "--resume", "-o", run_dir)
    assert open_run(run_dir).metrics() == rows
    works("train", corpus_dir, "--resume", "-o", run_dir, "optim.max_epochs=3")
    assert [row["epoch"] for row in open_run(run_dir).metrics()] == [1, 2, 3]
    assert open_run(run_dir).recipe["optim"]["max_epochs"] == 3


# Refusals


@pytest.mark.parametrize(("settings", "said"), [
    (["optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'lr'?"),
    (["optimm.lr=1"], "did you mean 'optim'?"),
    (["optim.lr=fast"], "optim.lr = 'fast'"),
    (["optim.lr=-1"], "optim.lr = -1"),
    (["optim.lr"], "write section.key=value"),
    (["--recipe", "isizulu"], "no recipe 'isizulu'"),
    (["--recipe", "bad.toml"], "not valid TOML"),
    (["--new-tokenizer"], "goes with --init-from"),
    (["--init-from", "nowhere"], "no run folder 'nowhere'"),
    (["--resume"], "nothing to resume in new"),
    (["--device", "gpu"], "--device gpu: not a device"),
    (["--device", "cuda"], "no CUDA device is there"),
    (["--precision", "tf32"], "--precision tf32: allowed on cpu: auto, fp32, bf16"),
    (["--threads", "-1"], "--threads"),
    (["--threads", "100000"], "--threads"),
    (["--checkpoint-minutes", "-1"], "--checkpoint-minutes"),
    (["--no-such-option"], "--no-such-option"),
    (["data.batch_size=3000"], "too few for data.batch_size = 3000"),
])  # fmt: skip
def test_train_refuses_in_one_line_and_makes_no_run(refused, tmp_path, monkeypatch, corpus_dir, settings, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "bad.toml").write_text("[optim\n")
    late = settings[0].startswith(("data.", "--device", "--precision"))
    assert said in refused("train", corpus_dir, "--out", "new", "tokenizer.vocab_size=320", *settings, notes=late)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("content", "said"), [
    (None, "there is no such file or folder"),
    (b"", "0 lines with text"),
    (b"abc\n" * 5, "5 lines with text"),
    (b"abc \xff\n" * 50, "not UTF-8"),
    ({}, "train.txt and valid.txt missing"),
    ({"train.txt": b"a b c\n", "valid.txt": b""}, "valid.txt is empty"),
])  # fmt: skip
def test_a_corpus_that_cannot_be_used_is_refused(refused, tmp_path, content, said):
    path = tmp_path / "corpus"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for name, part in content.items():
            (path / name).write_bytes(part)
    assert said in refused("train", path, "--out", tmp_path / "new")
    assert not (tmp_path / "new" / "meta.json").exists()


def test_out_that_holds_a_run_is_left_alone_to_the_last_byte(refused, works, tmp_path, text_file, corpus_dir):
    run_dir = tmp_path / "run"
    works("train", text_file, *QUICK, "-o", run_dir)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(synthetic_lines(80, seed=8)) + "\n")
    before = contents(run_dir)
    for corpus in (text_file, other, corpus_dir):
        assert "already holds a run" in refused("train", corpus, *QUICK, "-o", run_dir)
        assert contents(run_dir) == before
        assert "would be overwritten" in refused("train", corpus, "-o", run_dir, "--init-from", run_dir)
        assert contents(run_dir) == before
    for corpus in (other, corpus_dir):
        said = refused("train", corpus, "optim.max_epochs=2", "-o", run_dir, "--resume", notes=True)
        assert "the corpus is not the one that the run" in said
        assert contents(run_dir) == before
    said = refused("train", text_file, "model.hidden_size=9", "-o", run_dir, "--resume")
    assert "model.hidden_size: differs from the run" in said
    said = refused("train", text_file, "-o", run_dir, "--resume", "--init-from", run_dir)
    assert "leave out --init-from" in said
    assert contents(run_dir) == before
    # The same text in another form is the same text.
    same = tmp_path / "same.txt"
    same.write_bytes(text_file.read_bytes().replace(b"\n", b"\r\n"))
    works("train", same, "-o", run_dir, "--resume", "optim.max_epochs=2")
    assert {k: v for k, v in contents(run_dir).items() if k.startswith("corpus/")} == {
        k: v for k, v in before.items() if k.startswith("corpus/")
    }


def test_a_folder_with_other_things_in_it_is_left_alone(refused, tmp_path, text_file):
    (tmp_path / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    assert "holds other things (thesis.tex)" in refused("train", text_file, "-o", tmp_path)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is a file" in refused("train", text_file, "-o", tmp_path / "thesis.tex")


@pytest.mark.parametrize("settings", [("optim.kind=sgd", "optim.lr=1e9"), ("optim.lr=1e4", "optim.warmup_steps=0")])
def test_a_loss_that_is_not_finite_is_one_line(refused, tmp_path, corpus_dir, settings):
    said = refused("train", corpus_dir, *TINY, *settings, "-o", tmp_path / "run", notes=True)
    assert "start again with a lower optim.lr" in said
    assert (tmp_path / "run" / CHECKPOINT).is_file()


@pytest.mark.parametrize(("args", "said"), [
    (["--temperature", "-1"], "temperature must be a finite number"),
    (["--temperature", "nan"], "temperature must be a finite number"),
    (["--top-p", "0"], "top_p must be above 0"),
    (["--top-p", "1.5"], "top_p must be above 0 and at most 1"),
    (["--top-k", "-1"], "top_k must be a whole number"),
    (["--stop", ""], "an empty stop string"),
    (["--num", "0"], "--num"),
    (["--max-tokens", "0"], "--max-tokens"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "x"], "--seed"),
    (["--device", "tpu"], "--device tpu"),
    (["Abantu \udcff"], "lone surrogate"),  # an argument that was not UTF-8
    (["--alpha", "0.5"], "alpha must be at least 1"),
    (["--alpha", "2.5"], "alpha must be at least 1 (softmax) and at most 2"),
    (["--min-p", "1.5"], "min_p must be at least 0"),
    (["--typical", "0"], "typical must be above 0"),
    (["--repetition-penalty", "0.5"], "repetition_penalty must be"),
    (["--no-repeat-ngram", "-1"], "--no-repeat-ngram"),
    (["--ban", ""], "a banned word must be one word"),
    (["--ban", "inja yami"], "got 'inja yami'"),
    (["--require", "inja"], "required words need beam search"),
    (["--end", "paragraf"], "did you mean 'paragraph'?"),
    (["--max-words", "-1"], "--max-words"),
    (["--min-words", "3"], "choose paragraph or sentence"),
    (["--min-tokens", "4", "--end", "sentence"], "min_tokens is 4 and max_tokens is 3"),
    (["--prompts", "missing.txt"], "missing.txt"),
    (["Abantu", "--prompts", "-"], "prompts are given twice"),
    (["--groups", "2"], "--groups goes with --beams"),
    (["--diversity", "1"], "--diversity goes with --beams"),
    (["--length-penalty", "1"], "--length-penalty goes with --beams"),
    (["--beams", "2"], "--seed is for sampling; --beams chooses without chance"),
    (["--contrastive", "0.5"], "--seed is for sampling; --contrastive chooses without chance"),
])  # fmt: skip
def test_generate_refuses_in_one_line(refused, tiny_run, args, said):
    assert said in refused("generate", "-m", tiny_run.dir, "--max-tokens", "3", "--seed", "1", *args)


@pytest.mark.parametrize(("args", "said"), [
    (["--beams", "0"], "the number of beams must be 1 or more"),
    (["--beams", "4", "--groups", "3"], "3 groups of 4 beams"),
    (["--beams", "4", "--groups", "0"], "0 groups of 4 beams"),
    (["--beams", "4", "--groups", "2", "--diversity", "-1"], "diversity must be"),
    (["--beams", "4", "--diversity", "1"], "--diversity keeps groups of beams apart"),
    (["--beams", "4", "--groups", "1", "--diversity", "1"], "--diversity keeps groups of beams apart"),
    (["--beams", "4", "--length-penalty", "nan"], "length_penalty must be"),
    (["--beams", "2", "--num", "3"], "a beam of 2 gives 1 to 2 texts; got 3"),
    (["--beams", "2", "--contrastive", "0.5"], "choose one"),
    (["--beams", "4", "--groups", "2", "--require", "inja"], "one group"),
    (["--beams", "4", "--require", "inja", "--ban", "Inja"], "is required and banned"),
    (["--beams", "4", "--require", "inja yami"], "a required word must be one word"),
    *(
        (["--beams", "2", option, value], f"{option} is for sampling")
        for option, value in (
            ("--temperature", "1"), ("--alpha", "1.5"), ("--top-p", "0.9"), ("--min-p", "0.1"), ("--typical", "0.9"),
            ("--top-k", "5"), ("--seed", "0"),
        )
    ),
    (["--contrastive", "-0.1"], "the contrastive penalty must be 0 to 1"),
    (["--contrastive", "0.5", "--temperature", "0"], "--temperature is for sampling"),
    (["--contrastive", "0.5", "--top-k", "-1"], "top_k must be a whole number"),
    (["--contrastive", "0.5", "--num", "2"], "contrastive search finds one text"),
])  # fmt: skip
def test_a_search_refuses_in_one_line(refused, tiny_run, args, said):
    assert said in refused("generate", "-m", tiny_run.dir, "--max-tokens", "3", *args)


@pytest.mark.parametrize(
    "args",
    [
        ["--beams", "4", "--num", "2", "--end", "sentence", "--length-penalty", "0.5"],
        ["--beams", "4", "--groups", "2", "--diversity", "1", "--no-repeat-ngram", "3"],
        ["--beams", "4", "--require", "inja"],
        ["--contrastive", "0.6", "--top-k", "4", "--ban", "inja"],
        ["--seed", "1", "--alpha", "1.5", "--min-p", "0.05", "--typical", "0.9", "--repetition-penalty", "1.2"],
    ],
)
def test_the_same_search_or_seed_gives_the_same_text(works, tiny_run, args):
    args = ["generate", "-m", tiny_run.dir, "Abantu ba", "--max-tokens", "12", *args]
    (row, *_) = rows = works(*args, "--json").json
    assert rows == works(*args, "--json").json
    assert row["text"].startswith("Abantu ba")
    shown = works(*args).out
    assert shown.rstrip("\n").split("\t")[-1].rstrip() == rows[-1]["text"].rstrip()


@pytest.mark.parametrize(("args", "said"), [
    (["missing.txt"], "missing.txt"),
    (["empty.txt"], "empty.txt is empty"),
    (["latin1.txt"], "not UTF-8"),
    (["."], "."),
    (["good.txt", "latin1.txt"], "latin1.txt, line 1: not UTF-8"),
    (["good.txt", "--stateless", "--cache"], "--stateless reads each line by itself"),
    (["good.txt", "--stateless", "--dynamic"], "--stateless reads each line by itself"),
    (["good.txt", "--marginal", "--dynamic"], "--marginal: leave out --cache, --dynamic, --keystrokes"),
    (["good.txt", "--marginal", "--distribution"], "--marginal: leave out --cache, --dynamic, --keystrokes"),
    (["good.txt", "--distribution", "--epsilon", "inf"], "--epsilon"),
    (["good.txt", "--cache", "--cache-lambda", "1"], "--cache-lambda 1.0"),
    (["good.txt", "--cache", "--cache-window", "0"], "--cache-window 0"),
    (["good.txt", "--cache", "--cache-window", "9" * 25], "'--cache-window'"),
    (["good.txt", "--keystrokes", "--max-lines", "9" * 25], "'--max-lines'"),
    (["good.txt", "--dynamic", "--dynamic-lr", "-1"], "--dynamic-lr -1.0"),
    (["good.txt", "--dynamic", "--stats-from", "missing.txt"], "missing.txt: there is no such file"),
    (["good.txt", "--device", "tpu"], "--device tpu"),
    ([], "Missing argument"),
])  # fmt: skip
def test_evaluate_refuses_in_one_line(refused, tmp_path, monkeypatch, tiny_run, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "good.txt").write_text("Abantu bafunda.\n")
    assert said in refused("evaluate", "-m", tiny_run.dir, *args)


@pytest.mark.parametrize("args", [["evaluate", "x.txt", "-m"], ["score", "x.txt", "-m"], ["generate", "-m"], ["info"]])
def test_every_command_says_what_is_wrong_with_a_run(refused, tmp_path, run_dir, args):
    assert "no run folder" in refused(*args, tmp_path / "none")
    assert "not a run folder" in refused(*args, tmp_path)
    meta = json.loads((run_dir / "meta.json").read_text())
    (run_dir / "meta.json").write_text(json.dumps({**meta, "format": FORMAT + 1, "ulimi": "9.9"}))
    assert f"has run format {FORMAT + 1}" in refused(*args, run_dir)


def test_other_mistakes_in_a_command(ulimi, refused, tmp_path):
    assert "No such command 'trian'" in refused("trian")
    assert "see ulimi train --help" in refused("train", tmp_path)
    assert "--out" in refused("train", tmp_path)
    assert "no recipe 'nothing'" in refused("recipe", "nothing")
    result = ulimi()
    assert result.code == 2
    assert "Usage: ulimi" in result.err
    assert "train" in result.err


def half(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [half, lambda content: b"\xff\x00\xfe", lambda content: b"{}", lambda content: None])
@pytest.mark.parametrize("name", [
    "meta.json", "config.json", "recipe.toml", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", WEIGHTS,
    str(CHECKPOINT),
])  # fmt: skip
def test_damage_to_a_run_is_never_a_traceback(ulimi, run_dir, tmp_path, corpus_dir, name, damage):
    path = run_dir / name
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    test_path = corpus_dir / "test.txt"
    codes = set()
    for args in (
        ["info", run_dir],
        ["evaluate", test_path, "-m", run_dir],
        ["train", corpus_dir, "--out", tmp_path / "next", "--init-from", run_dir, "optim.max_epochs=1"],
        ["train", corpus_dir, "--out", run_dir, "--resume", "optim.max_epochs=3"],
    ):
        result = ulimi(*args)
        codes.add(result.code)
        errors = [line for line in result.err.splitlines() if line.startswith("ulimi: error: ")]
        assert (result.code, len(errors)) in ((0, 0), (2, 1)), result.err
        assert not errors or errors == result.err.splitlines()[-1:]
    # Weights that are gone are read from their graph.
    assert 2 in codes or name in ("metrics.jsonl", "recipe.toml") or (name == WEIGHTS and content is None)


# evaluate and score


def test_evaluate_several_files(works, tiny_run, corpus_dir):
    files = [corpus_dir / "valid.txt", corpus_dir / "test.txt"]
    rows = works("evaluate", *files, "-m", tiny_run.dir, "--json").json
    assert [row["file"] for row in rows] == [*map(str, files), "all"]
    for row, path in zip(rows, files, strict=False):
        text = path.read_text()
        assert row.keys() == {"file", *SCORE_KEYS}
        assert row["num_chars"] == len(text)
        assert row["num_bytes"] == len(text.encode())
        assert row["num_words"] == len(text.split())
        assert row["num_lines"] == text.count("\n")
        assert row["num_tokens"] == len(tiny_run.tokenizer.encode(text))
        assert row["bits_per_char"] == pytest.approx(row["nats"] / math.log(2) / len(text))
        assert row["bits_per_byte"] == pytest.approx(row["nats"] / math.log(2) / len(text.encode()))
        assert row["perplexity"] == pytest.approx(math.exp(row["nats"] / row["num_tokens"]))
        assert row["word_perplexity"] == pytest.approx(math.exp(row["nats"] / (row["num_words"] + row["num_lines"])))
    for key in ("nats", "num_tokens", "num_words", "num_lines", "num_chars", "num_bytes"):
        assert rows[2][key] == pytest.approx(rows[0][key] + rows[1][key])
    assert rows[2]["bits_per_char"] == pytest.approx(rows[2]["nats"] / math.log(2) / rows[2]["num_chars"])
    assert rows[0]["bits_per_char"] == pytest.approx(tiny_run.meta["scores"]["valid"]["bits_per_char"])

    table = works("evaluate", *files, "-m", tiny_run.dir).out.splitlines()
    assert table[0].split() == ["file", "tokens", "chars", "nats", "ppl/token", "ppl/word", "bits/char", "bits/byte"]
    assert [line.split()[0] for line in table[1:]] == [*map(str, files), "all"]
    assert [line.split()[-2] for line in table[1:]] == [f"{row['bits_per_char']:.4f}" for row in rows]
    assert len(works("evaluate", files[0], "-m", tiny_run.dir).out.splitlines()) == 2  # one file needs no sum


@pytest.mark.parametrize("how", [[], ["--stateless"]], ids=["stream", "lines"])
def test_marginal_evaluation_costs_a_little_less(works, tiny_run, corpus_dir, how):
    rows = {}
    for marginal in ([], ["--marginal"]):
        args = ["evaluate", corpus_dir / "valid.txt", "-m", tiny_run.dir, "--json", *how, *marginal]
        (rows[bool(marginal)],) = works(*args).json
    assert rows[True].keys() == rows[False].keys() | {"marginal"}
    assert 0.9 * rows[False]["nats"] < rows[True]["nats"] < rows[False]["nats"]
    assert rows[True]["num_tokens"] == rows[False]["num_tokens"]


def test_marginal_scores_of_lines_and_pairs(works, refused, tiny_run, corpus_dir, tmp_path):
    path = corpus_dir / "valid.txt"
    usual, marginal = (works("score", path, "-m", tiny_run.dir, "--json", *more).json for more in ([], ["--marginal"]))
    assert [row["text"] for row in marginal] == [row["text"] for row in usual]
    assert all(row["nats"] <= other["nats"] + 1e-3 for row, other in zip(marginal, usual, strict=True))
    (whole,) = works("evaluate", path, "-m", tiny_run.dir, "--json", "--stateless", "--marginal").json
    assert sum(row["nats"] for row in marginal) == pytest.approx(whole["nats"], rel=1e-6)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"mine\t{marginal[0]['text']}\t{marginal[1]['text']}\n", encoding="utf-8")
    (row, _) = works("judge", "-m", tiny_run.dir, "--pairs", pairs, "--marginal", "--json").json
    assert row["accuracy"] == float(marginal[0]["nats"] < marginal[1]["nats"])
    assert "--marginal: needs a model of ulimi's" in refused("judge", "--hf", tmp_path, "--marginal")
    assert "--marginal: needs a model of ulimi's" in refused("judge", "--write", tmp_path / "new", "--marginal")
    assert not (tmp_path / "new").exists()


def test_stateless_evaluation_is_the_sum_of_the_lines(works, tiny_run, corpus_dir):
    path = corpus_dir / "test.txt"
    (row,) = works("evaluate", path, "-m", tiny_run.dir, "--json", "--stateless").json
    lines = works("score", path, "-m", tiny_run.dir, "--json").json
    assert row["nats"] == pytest.approx(sum(line["nats"] for line in lines))
    assert row["num_tokens"] == sum(line["num_tokens"] for line in lines)
    (stream,) = works("evaluate", path, "-m", tiny_run.dir, "--json").json
    assert stream["nats"] != pytest.approx(row["nats"], rel=1e-6)
    assert stream["num_tokens"] == row["num_tokens"]


def test_cache_and_dynamic_evaluation(works, run_dir, corpus_dir):
    before = (run_dir / WEIGHTS).read_bytes()
    path = corpus_dir / "test.txt"

    def nats(*options):
        (row,) = works("evaluate", path, "-m", run_dir, "--json", *options).json
        assert row.keys() == {"file", *SCORE_KEYS}
        return row["nats"]

    static = nats()
    assert nats("--cache", "--cache-lambda", "0") == pytest.approx(static, rel=1e-5)
    assert nats("--dynamic", "--dynamic-lr", "0", "--dynamic-decay", "0") == pytest.approx(static, rel=1e-5)
    rates = ("--dynamic-lr", "0.002", "--dynamic-decay", "0.02", "--dynamic-epsilon", "0.001")
    cache = ("--cache", "--cache-theta", "0.6")
    cached, dynamic, both = nats(*cache), nats("--dynamic", *rates), nats(*cache, "--dynamic", *rates)
    assert len({static, cached, dynamic, both}) == 4
    assert dynamic < static  # a model that has hardly learned anything learns while it reads
    assert cached < static
    assert nats() == static
    assert (run_dir / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(("switch", "option"), [("--dynamic", "--dynamic-lr"), ("--cache", "--cache-theta")])
@pytest.mark.parametrize("how", [[], ["--json"]])
def test_what_makes_no_numbers_of_probabilities_is_one_line(refused, run_dir, corpus_dir, switch, option, how):
    said = refused("evaluate", corpus_dir / "valid.txt", "-m", run_dir, switch, option, "1e300", *how)
    assert f"valid.txt: the model's probabilities are no numbers; too extreme may be {option} 1e+300" in said


def test_score_gives_a_row_a_line(works, ulimi, tmp_path, tiny_run):
    lines = ["Abantu bafunda.", "", "\t Izingane 😀", "Umfundi uyafunda kakhulu namhlanje."]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(lines) + "\n")
    rows = works("score", path, "-m", tiny_run.dir, "--json").json
    assert [row["text"] for row in rows] == lines
    assert all(row.keys() == {"text", *SCORE_KEYS} for row in rows)
    assert [row["num_chars"] for row in rows] == [len(line) + 1 for line in lines]
    # From standard input, and a line alone or among others: the same.
    assert works("score", "-m", tiny_run.dir, "--json", stdin=path.read_bytes()).json == rows
    (alone,) = works("score", "-", "-m", tiny_run.dir, "--json", stdin=lines[3].encode()).json
    assert alone["nats"] == pytest.approx(rows[3]["nats"], rel=1e-6)

    table = works("score", path, "-m", tiny_run.dir).out.splitlines()
    assert table[0].split("\t") == ["nats", "tokens", "chars", "bits_per_char", "text"]
    for line, row in zip(table[1:], rows, strict=True):
        nats, num_tokens, num_chars, bits, text = line.split("\t", 4)
        assert (nats, bits, text) == (f"{row['nats']:.4f}", f"{row['bits_per_char']:.4f}", row["text"])
        assert (int(num_tokens), int(num_chars)) == (row["num_tokens"], row["num_chars"])
    # No lines are a table of none; of a file that is not there is no table.
    assert works("score", "-m", tiny_run.dir, stdin=b"").out.splitlines() == table[:1]
    missing = ulimi("score", tmp_path / "none.txt", "-m", tiny_run.dir)
    assert (missing.code, missing.out) == (2, "")


def test_words_outside_a_closed_vocabulary_are_noted(works, tmp_path, corpus_dir):
    words = [setting for setting in QUICK if "vocab_size" not in setting]
    settings = (*words, "tokenizer.kind=word", "tokenizer.vocab_size=0")
    works("train", corpus_dir, *settings, "-o", tmp_path / "run")
    (tmp_path / "new.txt").write_text("Izingcingo zakho\nabantu\n")
    result = works("evaluate", tmp_path / "new.txt", "-m", tmp_path / "run")
    assert "2 words are <unk>" in result.err
    # "bahamba" may be begun only: "bahamba." is a word of this vocabulary too.
    text = works("generate", "abantu bahamba", "-m", tmp_path / "run", "--seed", "1", "--max-tokens", "8").out
    assert text.startswith(("abantu bahamba ", "abantu bahamba\n", "abantu bahamba. "))


# generate


def test_the_same_seed_gives_the_same_text(works, tiny_run):
    def text(seed, *args):
        return works("generate", "Abantu", "-m", tiny_run.dir, "--seed", seed, "--max-tokens", 20, *args).out

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1).startswith("Abantu")
    assert text(1, "--temperature", 0) == text(2, "--temperature", 0)
    assert text(1, "--top-k", 1) == text(1, "--temperature", 0)
    # Without a seed one is drawn, and named, so that the text can be had again.
    result = works("generate", "Abantu", "-m", tiny_run.dir, "--max-tokens", 20)
    (seed,) = re.fullmatch(r"seed (\d+)\n", result.err).groups()
    assert text(seed) == result.out


@pytest.mark.parametrize("prompt", [
    "", "   ", "Abantu", "Abantu ", "😀 ❤️", "umugqa\nowodwa\n", "\n", "\t", "日本", "<eos>", "e\u0301", "-", "a" * 3000,
])  # fmt: skip
def test_any_prompt_is_continued(works, tiny_run, prompt):
    args = ("-m", tiny_run.dir, "--seed", "3", "--max-tokens", "6")
    (row,) = works("generate", *args, "--json", "--", prompt).json
    kept = unicodedata.normalize("NFC", prompt)
    assert row["prompt"] == kept
    assert row["text"].startswith(kept)
    # A word that the limit cuts is left out; tokens that spell what was typed do not count.
    assert 1 <= row["num_tokens"] <= 6 + len(prompt.encode()[-64:])
    assert row["seed"] == 3
    assert works("generate", *args, "--", prompt).out == row["text"] + "\n"
    # In any normal form it is the same prompt.
    assert works("generate", *args, "--", unicodedata.normalize("NFD", prompt)).out == row["text"] + "\n"


def test_no_prompt_starts_a_new_text_and_several_are_continued_one_by_one(works, tiny_run):
    args = ("-m", tiny_run.dir, "--seed", "3", "--max-tokens", "6")
    new = works("generate", *args).out
    assert new == works("generate", *args, "").out
    one, two = works("generate", *args, "Abantu").out, works("generate", *args, "Izingane").out
    assert works("generate", *args, "Abantu", "Izingane").out == f"{one}\n{two}"


def test_several_texts_of_a_prompt(works, tiny_run):
    args = ("generate", "Abantu", "-m", tiny_run.dir, "--seed", "5", "--max-tokens", "12")
    rows = works(*args, "--num", "3", "--json").json
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert len({row["text"] for row in rows}) == 3
    assert all(row.keys() == {"prompt", "text", "seed", "index", "nats", "num_tokens"} for row in rows)
    (alone,) = works(*args, "--json").json
    assert alone["text"] == rows[0]["text"]
    assert alone["nats"] == pytest.approx(rows[0]["nats"], rel=1e-4)
    plain = works(*args, "--num", "3").out
    assert plain == "\n".join(row["text"] + "\n" for row in rows)


def test_probabilities_are_those_of_the_whole_text(works, tiny_run):
    args = ("generate", "Abantu bafunda ", "-m", tiny_run.dir, "--seed", "5", "--max-tokens", "15", "--probabilities")
    (row,) = works(*args, "--json").json
    assert "".join(word["text"] for word in row["words"]) == row["text"]
    assert all(0 < word["probability"] <= 1 for word in row["words"])
    prompt_words = row["words"][:2]
    assert [word["text"] for word in prompt_words] == ["Abantu", " bafunda"]
    # Two computations that share no code but the network: single steps, and windows of a line.
    (line,) = works("score", "-m", tiny_run.dir, "--json", "--engine", "onnx", stdin=b"Abantu bafunda\n").json
    (longer,) = works("generate", *args[1:], "--json", "--temperature", "0").json
    nats = -sum(math.log(word["probability"]) for word in prompt_words)
    with_end = works("generate", "Abantu bafunda\n", *args[2:], "--json").json[0]["words"]
    end = next(word for word in with_end if word["text"] == "\n")
    assert nats - math.log(end["probability"]) == pytest.approx(line["nats"], rel=1e-4)
    generated = -sum(math.log(word["probability"]) for word in longer["words"][2:])
    assert generated == pytest.approx(longer["nats"], rel=1e-6)

    shown = works(*args).out
    assert re.match(r"Abantu\[[0-9.e-]+\] bafunda\[[0-9.e-]+\]", shown)
    assert "\x1b" not in shown  # not a terminal


def test_a_text_stops_before_a_stop_string(works, tiny_run):
    args = ("-m", tiny_run.dir, "--seed", "7", "--max-tokens", "60")
    whole = works("generate", *args, "Abantu").out[len("Abantu") : -1]
    for start in (5, 17, 30):
        stop = whole[start : start + 4]
        cut = "Abantu" + whole[: whole.index(stop)]
        assert works("generate", *args, "Abantu", "--stop", stop).out == cut + "\n"
        (row,) = works("generate", *args, "Abantu", "--json", "--stop", "never there", "--stop", stop).json
        assert row["text"] == cut
    (row,) = works("generate", *args, "--stop", r"\n", "--json", "--max-tokens", "400").json
    assert "\n" not in row["text"]


# suggest and evaluate --keystrokes


def test_suggest_gives_words_and_probabilities(works, tiny_run):
    rows = [line.split("\t") for line in works("suggest", "Abantu bafunda kakhu", "-m", tiny_run.dir).out.splitlines()]
    assert rows[0][0] == "kakhulu"
    assert 1 < len(rows) <= 5
    assert all(re.fullmatch(r"0\.\d{4}", p) for _, p in rows)
    assert [p for _, p in rows] == sorted((p for _, p in rows), reverse=True)
    (found,) = works("suggest", "Abantu bafunda kakhu", "-m", tiny_run.dir, "--json", "--num", 1).json
    assert found["text"] == "Abantu bafunda kakhu"
    assert [word["word"] for word in found["suggestions"]] == ["kakhulu"]
    assert found["suggestions"][0]["probability"] == pytest.approx(float(rows[0][1]), abs=1e-4)
    assert 0 < found["covered"] <= 1


def test_suggest_reads_standard_input_line_by_line(works, tiny_run):
    typed = ["Abantu kakhu", "", "Abantu "]
    found = works("suggest", "-", "-m", tiny_run.dir, "--json", stdin="\n".join(typed).encode() + b"\n").json
    assert [row["text"] for row in found] == typed
    for text, row in zip(typed, found, strict=True):
        (alone,) = works("suggest", text, "-m", tiny_run.dir, "--json").json
        assert [word["word"] for word in alone["suggestions"]] == [word["word"] for word in row["suggestions"]]
    out = works("suggest", "-", "-m", tiny_run.dir, "--num", 2, stdin=b"kakhu\nA").out
    assert len(out.split("\n\n")) == 2


def test_evaluate_counts_keystrokes(works, tiny_run, corpus_dir):
    valid, test = corpus_dir / "valid.txt", corpus_dir / "test.txt"
    *files, together = works("evaluate", valid, test, "-m", tiny_run.dir, "--keystrokes", "--json").json
    for path, row in zip((valid, test), files, strict=True):
        assert row["file"] == str(path)
        assert row["num_chars"] == len(path.read_text(encoding="utf-8"))
        assert row["num_lines"] == 20
        assert 0.2 < row["spared"] < 0.8  # 28 words in all
    assert together["num_keystrokes"] == sum(row["num_keystrokes"] for row in files)
    (one,) = works(
        "evaluate", valid, "-m", tiny_run.dir, "--keystrokes", "--json", "--max-lines", 5, "--suggestions", 1
    ).json
    assert (one["num_lines"], one["suggestions"]) == (5, 1)
    (three,) = works("evaluate", valid, "-m", tiny_run.dir, "--keystrokes", "--json", "--max-lines", 5).json
    assert one["num_keystrokes"] > three["num_keystrokes"]
    header, row = works("evaluate", valid, "-m", tiny_run.dir, "--keystrokes", "--max-lines", 5).out.splitlines()
    assert header.split() == ["file", "chars", "keystrokes", "words", "taken", "spared"]
    assert row.split()[-1] == f"{three['spared']:.2%}"


def test_what_suggest_and_keystrokes_refuse(refused, tiny_run, corpus_dir, tmp_path):
    valid = corpus_dir / "valid.txt"
    assert "lone surrogate" in refused("suggest", "a \udcff", "-m", tiny_run.dir)
    assert "'--num'" in refused("suggest", "a", "-m", tiny_run.dir, "--num", 0)
    assert "no run folder" in refused("suggest", "a", "-m", tmp_path / "none")
    assert "--suggestions goes with --keystrokes" in refused("evaluate", valid, "-m", tiny_run.dir, "--suggestions", 2)
    assert "--max-lines goes with --keystrokes" in refused("evaluate", valid, "-m", tiny_run.dir, "--max-lines", 2)
    assert "leave out" in refused("evaluate", valid, "-m", tiny_run.dir, "--keystrokes", "--stateless")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "is empty" in refused("evaluate", empty, "-m", tiny_run.dir, "--keystrokes")
    assert "none.txt" in refused("evaluate", tmp_path / "none.txt", "-m", tiny_run.dir, "--keystrokes")


# info, recipe, help


def test_export_keeps_what_a_training_writes_meanwhile(works, monkeypatch, run_dir):
    def export(run, _text):
        write_json(run.dir / "meta.json", {**run.meta, "epochs": 99})
        return {"kind": "int8"}

    monkeypatch.setattr("ulimi.export.export_onnx", export)
    monkeypatch.setattr("ulimi.export.describe_export", str)
    works("export", run_dir)
    meta = open_run(run_dir).meta
    assert (meta["epochs"], meta["onnx"]) == (99, {"kind": "int8"})


def test_info(works, tiny_run):
    out = works("info", tiny_run.dir).out
    for part in ("AWD-LSTM", "bpe, 320 tokens", "2 epochs", "finished", "bits per character on validation"):
        assert part in out
    facts = works("info", tiny_run.dir, "--json").json[0]
    assert facts["config"]["hidden_size"] == 24
    assert facts["recipe"] == tiny_run.recipe
    assert facts["metrics"] == tiny_run.metrics()
    assert facts["scores"].keys() == {"valid"}


def test_recipe(works):
    listed = works("recipe").out.splitlines()
    assert [line.split()[0] for line in listed] == ["default", *recipe_names()]
    assert all(len(line.split()) > 3 for line in listed)
    shown = tomllib.loads(works("recipe", "isizulu-cpu", "optim.lr=0.125").out)
    assert shown["optim"]["lr"] == 0.125
    assert shown["model"]["hidden_size"] == 512
    assert tomllib.loads(works("recipe", "default").out)["data"]["bptt"] == 70


@pytest.mark.parametrize("name", ["train", "evaluate", "score", "generate", "info", "recipe"])
def test_help_goes_to_standard_output(works, name):
    result = works(name, "--help")
    assert result.out.startswith(f"Usage: ulimi {name}")
    assert result.err == ""
    assert f"\n  {name} " in works("-h").out


# Interruptions


def test_signals_become_a_wish_and_a_second_one_ends_us(request):
    # Whoever runs the tests in a shell's background has made Ctrl-C mean nothing to them.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with cli._stop_on_signals() as should_stop:
            assert not should_stop()
            os.kill(os.getpid(), number)
            assert should_stop()
    with cli._stop_on_signals() as should_stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_saves_and_resume_completes(works, tmp_path, corpus_dir):
    run_dir = tmp_path / "run"
    args = ["train", corpus_dir, *TINY, "optim.max_epochs=400", "--out", run_dir]
    with subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True, env=environment()) as process:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"stopped; everything is saved. Continue with: ulimi train {corpus_dir} --out {run_dir} --resume"
    )
    num_done = len(open_run(run_dir).metrics())
    assert num_done >= 1
    assert "--resume" in works("info", run_dir).out
    works("train", corpus_dir, "--out", run_dir, "--resume", f"optim.max_epochs={num_done + 1}")
    assert len(open_run(run_dir).metrics()) == num_done + 1
    assert "finished" in works("info", run_dir).out


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(works, tmp_path, run_dir, corpus_dir):
    before = contents(run_dir)
    limit = (run_dir / CHECKPOINT).stat().st_size - 1

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    args = ["train", corpus_dir, "--out", run_dir, "--resume", "optim.max_epochs=3"]
    result = subprocess.run(
        command(*args), capture_output=True, text=True, timeout=120, env=environment(), preexec_fn=fill_the_disk
    )
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ulimi: error: ")
    assert "File too large" in last
    assert "intact" in last
    assert "Traceback" not in result.stderr
    after = contents(run_dir)
    assert after[str(CHECKPOINT)] == before[str(CHECKPOINT)]
    assert not [name for name in after if name.endswith(".tmp")]
    works(*args)
    assert [row["epoch"] for row in open_run(run_dir).metrics()] == [1, 2, 3]


def test_a_full_disk_is_named(refused, tmp_path, monkeypatch, tiny_run, corpus_dir):
    def write(path, *_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    said = refused("judge", "--write", tmp_path / "pairs.tsv", "--num", 1)
    assert said == f"ulimi: error: {tmp_path}/pairs.tsv: No space left on device; what was saved before is intact"

    def copy(source, target, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", copy)
    said = refused("release", tiny_run.dir, "--out", tmp_path / "gift", "--card", corpus_dir / "valid.txt")
    assert re.search(rf"{tiny_run.dir}/\S+ -> {tmp_path}/\S+: No space left on device", said)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path, tiny_run):
    path = tmp_path / "long.txt"
    path.write_text("Abantu bafunda.\n" * 4000)  # more than a pipe holds
    with subprocess.Popen(
        command("score", path, "-m", tiny_run.dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout.readline() == b"nats\ttokens\tchars\tbits_per_char\ttext\n"
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=120)
    assert err == b""
    assert process.returncode == 1


def test_the_script_and_the_module_are_the_same_command(tiny_run):
    script = Path(sys.executable).with_name("ulimi")
    outputs = [
        subprocess.run([*program, "info", str(tiny_run.dir)], capture_output=True, timeout=60, env=environment())
        for program in ([sys.executable, "-m", "ulimi"], *([[str(script)]] if script.exists() else []))
    ]
    assert all(output.stdout == outputs[0].stdout and output.returncode == 0 for output in outputs)
    assert b"AWD-LSTM" in outputs[0].stdout


def test_what_is_written_is_utf8_whatever_python_takes_the_terminal_for(tiny_run):
    for encoding in ("cp1252", "ascii"):
        result = subprocess.run(
            command("generate", "ŋ😀", "-m", tiny_run.dir, "--seed", "1", "--max-tokens", "3"),
            capture_output=True, timeout=60, env={**environment(), "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode().startswith("ŋ😀")
    result = subprocess.run(
        [*command("evaluate"), b"\xff.txt", "-m", tiny_run.dir], capture_output=True, timeout=60,
        env={**environment(), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("shut", "words", "said"), [
    ("<&-", ("score",), "standard input is closed"),
    ("<&-", ("suggest", "-"), "standard input is closed"),
    (">&-", ("generate", "Inja", "--seed", "1"), "standard output is closed"),
    (">&-", ("score", os.devnull), "standard output is closed"),
])  # fmt: skip
def test_a_closed_stream_is_one_line(tiny_run, shut, words, said):
    line = shlex.join(command(*words, "-m", tiny_run.dir))
    result = subprocess.run(
        ["sh", "-c", f"{line} {shut}"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60, text=True,
        env=environment(),
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_what_is_written_can_be_read_back_by_a_pipe(tiny_run):
    """Bytes, not locale: a text with emoji survives a pipe under the C locale."""
    result = subprocess.run(
        command("generate", "😀", "-m", tiny_run.dir, "--seed", "1", "--max-tokens", "3"),
        capture_output=True, timeout=60, env={**environment(), "LC_ALL": "C"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().startswith("😀")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dynamic-lr", "0.1"], "--dynamic-lr goes with --dynamic"),
        (["--cache", "--dynamic-window", "5"], "--dynamic-window goes with --dynamic"),
        (["--cache-lambda", "0.1"], "--cache-lambda goes with --cache"),
        (["--stats-from", "x.txt"], "--stats-from goes with --dynamic"),
        (["--keystrokes", "--cache-theta", "1"], "--cache-theta goes with --cache"),
        (["--distribution", "--stats-from", "x.txt"], "--stats-from goes with --dynamic"),
    ],
)
def test_an_option_without_its_switch_is_refused(refused, tiny_run, corpus_dir, options, said):
    assert said in refused("evaluate", corpus_dir / "test.txt", "-m", tiny_run.dir, *options)


def test_the_help_gives_the_defaults_that_are_used(works):
    words = works("evaluate", "--help").out
    for value in (Cache.theta, Cache.lambda_, Cache.window, Dynamic.decay, Dynamic.window):
        assert f"({value})" in words
    for value in (Dynamic.lr, Dynamic.epsilon):
        assert any(float(number) == value for number in re.findall(r"\((\d+e-\d+)\)", words))


def test_the_version(works):
    assert works("--version").out == f"ulimi {__version__}\n"


def test_a_tokenizer_setting_without_a_new_tokenizer_is_refused(refused, tiny_run, corpus_dir, tmp_path):
    out = tmp_path / "run"
    said = refused("train", corpus_dir, "--out", out, "--init-from", tiny_run.dir, "tokenizer.kind=char")
    assert "need --new-tokenizer" in said
    assert not out.exists()


def test_a_machine_without_memory_is_one_line(refused, corpus_dir, tmp_path):
    said = refused("train", corpus_dir, "--out", tmp_path / "run", "model.hidden_size=10000000", notes=True)
    assert "out of memory: try a smaller" in said


def test_a_word_that_the_limit_cuts_is_left_out(works, tiny_run):
    args = ("generate", "-m", tiny_run.dir, "--seed", "3", "--json")
    (whole,) = works(*args, "--max-tokens", "40").json
    for limit in range(1, 12):
        (row,) = works(*args, "--max-tokens", str(limit)).json
        assert whole["text"].startswith(row["text"])
        rest = whole["text"][len(row["text"]) :]
        assert row["num_tokens"] == limit or rest[:1].isspace() or row["text"].endswith("\n")
