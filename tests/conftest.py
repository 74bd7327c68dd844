"""What tests share: a small synthetic corpus, and one run that was trained on it."""

import random
from pathlib import Path

import pytest
import torch

from ulimi.corpus import open_corpus
from ulimi.recipe import load_recipe
from ulimi.run import Run, open_run
from ulimi.train import train

torch.set_num_threads(1)

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
    "optim.max_epochs=2",
)
"""a recipe whose epoch takes a fraction of a second"""


def synthetic_lines(num_lines: int, seed: int = 0) -> list[str]:
    """Lines that look a little like isiZulu; no two are the same."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 10))).capitalize() + "." for _ in range(num_lines)]


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Keep encoded texts out of the user's own cache, in subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULIMI_CACHE", str(folder))
        yield folder


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
