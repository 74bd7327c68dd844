"""What tests share: a small synthetic corpus, and one run that was trained on it."""

import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ulimi.start
import ulimi.train
from ulimi import cli
from ulimi.corpus import open_corpus
from ulimi.errors import UlimiError
from ulimi.recipe import load_recipe
from ulimi.run import Run, open_run
from ulimi.train import train

torch.set_num_threads(1)
# The epochs of tests are shorter than any wait, and each is to be found in its checkpoint.
ulimi.train.SECONDS_BETWEEN_SAVES = 0.0
# Whatever the machine, so that what is compared is computed alike.
ulimi.start.has_bfloat16 = lambda: False

WORDS = (
    "abantu", "abantwana", "umfundi", "uthisha", "izingane", "inja", "ikati", "umlimi", "amanzi", "ukudla", "incwadi",
    "isikole", "ekhaya", "edolobheni", "bafunda", "uyafunda", "bahamba", "uhamba", "uthanda", "bathanda", "uyathenga",
    "bayadla", "kakhulu", "namhlanje", "izolo", "futhi", "kodwa", "ngoba",
)  # fmt: skip

TINY = (
    "tokenizer.vocab_size=320",
    "data.batch_size=4",
    "data.bptt=10",
    "model.embedding_size=16",
    "model.hidden_size=24",
    "model.num_layers=2",
    "model.tie_weights=true",
    "optim.max_epochs=2",
)
"""a recipe whose epoch takes a fraction of a second"""


def synthetic_lines(num_lines: int, seed: int = 0) -> list[str]:
    """Lines that look a little like isiZulu; no two are the same."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 10))).capitalize() + "." for _ in range(num_lines)]


def refusal(call):
    """Call what must be refused; give what is said, in one line."""
    with pytest.raises(UlimiError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def commands_that_look_inside(run_dir: Path, corpus_dir: Path, out: Path) -> list[tuple[object, ...]]:
    """What every model that is no network must refuse, in one way."""
    valid, train = corpus_dir / "valid.txt", ("train", corpus_dir, "--out", out, "--init-from", run_dir)
    return [
        ("export", run_dir),
        ("release", run_dir, "--out", out, "--card", valid),
        train,
        (*train, "--new-tokenizer"),
        (*train, "--recipe", "demo"),
    ]


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Keep encoded texts, and what transformers copies, out of the user's own caches, in subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULIMI_CACHE", str(folder))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def transformers():
    """Hugging Face's library, without torchvision: of another build than torch, it cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        yield pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder with train.txt, valid.txt and test.txt."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = synthetic_lines(200)
    for name, part in (("train", lines[:160]), ("valid", lines[160:180]), ("test", lines[180:])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, corpus_dir) -> Run:
    """A trained run; no test may write into its folder."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, TINY))
    return open_run(run_dir)


@pytest.fixture
def run_dir(tmp_path, tiny_run):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_run.dir, tmp_path / "run"))


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def ulimi(monkeypatch, capsys):
    """Call the command line in this process; an exception other than SystemExit is a traceback, and fails the test."""

    def call(*args, stdin=None):
        monkeypatch.setattr(sys, "argv", ["ulimi", *map(str, args)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def works(ulimi):
    def call(*args, stdin=None):
        result = ulimi(*args, stdin=stdin)
        assert result.code == 0, result.err
        return result

    return call


@pytest.fixture
def refused(ulimi):
    """Call the command line; give its one line of error."""

    def call(*args, notes=False, stdin=None):
        result = ulimi(*args, stdin=stdin)
        assert result.code == 2, result
        *before, last = result.err.splitlines()
        assert last.startswith("ulimi: error: "), result.err
        assert notes or not before, result.err
        assert not [line for line in before if "error" in line or "Traceback" in line]
        return last

    return call
