"""The model that ships: opened by its name, used without PyTorch, and what its folder must and must not hold.

What its use is like is asked of a small stand-in too, which is released here.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from conftest import TINY, refusal
from test_run import WITHOUT_HEAVY, python
from ulimi import run as run_module
from ulimi.cli import DEFAULT_MODEL
from ulimi.data import encode_file
from ulimi.engine import OnnxEngine, load_engine
from ulimi.recipe import load_recipe
from ulimi.release import COPIED, MAX_BYTES, READ_BY_PEOPLE, release
from ulimi.run import CARD, MODELS, ONNX, SOURCE_CARD, WEIGHTS, Run, open_run, shipped_models
from ulimi.score import score_stream

ROOT = Path(__file__).parent.parent
REAL = MODELS / DEFAULT_MODEL


@pytest.fixture(scope="session")
def stand_in(tiny_run, tmp_path_factory):
    """A folder of shipped models with one small model, of the default's name."""
    models = tmp_path_factory.mktemp("models")
    (models / "card.md").write_text("# a small model\n")
    release(tiny_run, models / DEFAULT_MODEL, models / "card.md")
    return models


@pytest.fixture
def small(stand_in, monkeypatch, tmp_path):
    """Let the stand-in ship, and stand in an empty folder."""
    monkeypatch.setattr(run_module, "MODELS", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in / DEFAULT_MODEL


@pytest.fixture(params=["stand-in", "real"])
def models(request, stand_in):
    """The folder of shipped models: one of a small model, and the real one."""
    if request.param == "stand-in":
        return stand_in
    real()
    return MODELS


def real() -> Run:
    return Run(REAL, json.loads((REAL / "meta.json").read_bytes()))


# The name


def test_a_name_opens_a_shipped_model_and_a_run_folder_of_that_name_wins(small, tiny_run):
    assert shipped_models() == ["isizulu"]
    assert open_run(Path("isizulu")).dir == open_run("isizulu").dir == small
    Path("isizulu").mkdir()
    (Path("isizulu") / "train.txt").write_text("Abantu bafunda.\n")  # a corpus of that name is no run
    assert open_run(Path("isizulu")).dir == small
    shutil.copytree(tiny_run.dir, "isizulu", dirs_exist_ok=True)
    assert open_run(Path("isizulu")).dir == open_run("isizulu").dir == Path("isizulu")


def test_a_path_never_means_a_shipped_model(small, tmp_path):
    for path in (tmp_path / "isizulu", Path("runs/isizulu")):
        assert "no run folder" in refusal(lambda path=path: open_run(path))


def test_an_unknown_name_is_told_what_ships(small, monkeypatch, tmp_path):
    message = refusal(lambda: open_run(Path("isizula")))
    assert message.endswith("shipped with ulimi: isizulu; did you mean 'isizulu'?")
    monkeypatch.setattr(run_module, "MODELS", tmp_path / "none")
    assert shipped_models() == []
    assert "shipped" not in refusal(lambda: open_run(Path("isizulu")))


# Its use


def test_every_command_works_with_it_by_default_where_there_is_no_pytorch(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Abantu bafunda incwadi.\nInja ihamba ekhaya.\n")
    result = python(f"""{WITHOUT_HEAVY}
import io
from pathlib import Path
import ulimi.run
ulimi.run.MODELS = Path({str(models)!r})
from ulimi.cli import main
for line in (
    "generate Namhlanje --seed 1 --max-tokens 8", "suggest Ngiyabonga", "score text.txt", "score", "evaluate text.txt",
    "evaluate text.txt --stateless", "evaluate text.txt --keystrokes", "evaluate text.txt --distribution",
    "judge --num 1 --phenomenon relative", "info", "info isizulu --json", "generate -m isizulu --seed 1 --max-tokens 8",
):
    print("#", line, flush=True)
    sys.argv = ["ulimi", *line.split()]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Umfundi ufunda.\\n"))
    try:
        main()
    except SystemExit as end:
        assert not end.code, (line, end.code)
""")
    assert result.returncode == 0, result.stderr
    outputs = {
        part.partition("\n")[0]: part.partition("\n")[2] for part in result.stdout.removeprefix("# ").split("\n# ")
    }
    assert len(outputs) == 12
    assert outputs["generate Namhlanje --seed 1 --max-tokens 8"].startswith("Namhlanje")
    assert len(outputs["suggest Ngiyabonga"].splitlines()) >= 1
    assert "Umfundi ufunda." in outputs["score"]
    assert "text.txt" in outputs["evaluate text.txt --keystrokes"]
    assert "relative" in outputs["judge --num 1 --phenomenon relative"]
    assert str(models / "isizulu" / CARD) in outputs["info"]
    assert all(outputs.values())


def test_figures_come_from_the_graph_quietly_where_there_are_no_weights(small, ulimi, tiny_run):
    (Path("text.txt")).write_text("Abantu bafunda incwadi.\n")
    figures = []
    for options in (["--json"], ["-m", "isizulu", "--json"], ["-m", str(tiny_run.dir), "--engine", "onnx", "--json"]):
        result = ulimi("evaluate", "text.txt", *options)
        assert (result.code, result.err) == (0, "")
        figures += result.json
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize(("line", "what"), [
    ("export isizulu", "ulimi export"), ("release isizulu --out new --card text.txt", "ulimi release"),
])  # fmt: skip
def test_what_would_round_its_weights_again_is_refused_in_one_line(small, ulimi, line, what):
    Path("text.txt").write_text("Abantu bafunda incwadi.\n" * 30)
    code, out, err = ulimi(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"ulimi: error: {what}: the shipped model isizulu has no float weights")
    assert WEIGHTS in err
    assert not Path("new").exists()


@pytest.mark.parametrize("line", [
    "evaluate text.txt --cache", "evaluate text.txt --dynamic --stats-from text.txt",
    "evaluate text.txt --engine torch", "generate --engine torch --seed 1 --max-tokens 8",
    "suggest Ngi --engine torch", "judge --num 1 --engine torch",
    "score text.txt --engine torch",
])  # fmt: skip
def test_its_weights_are_read_from_its_graph_where_floats_are_needed(small, works, line):
    before = sorted(path.name for path in small.iterdir())
    Path("text.txt").write_text("Abantu bafunda incwadi.\n" * 30)
    assert works(*line.split()).out
    assert sorted(path.name for path in small.iterdir()) == before


def test_adapting_it_wants_a_text_to_know_gradients_from(small, ulimi):
    Path("text.txt").write_text("Abantu bafunda incwadi.\n" * 30)
    code, out, err = ulimi("evaluate", "text.txt", "--dynamic")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--dynamic: the training text of the shipped model isizulu is not here" in err
    assert "--stats-from" in err


def test_where_there_is_no_pytorch_it_is_said_what_brings_it(models):
    for option in ("--engine torch", "--device cuda"):
        result = python(f"""{WITHOUT_HEAVY}
from importlib import util
find_spec = util.find_spec
util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
from pathlib import Path
import ulimi.run
ulimi.run.MODELS = Path({str(models)!r})
from ulimi.cli import main
sys.argv = "ulimi generate --seed 1 {option}".split()
main()
""")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            f"ulimi: error: {option} needs PyTorch and what comes with it: "
            "pip install 'ulimi[train]', or '.[train]' in a checkout\n"
        )


def test_a_text_of_ones_own_finetunes_it(small, works, corpus_dir):
    settings = {"max_epochs": 2, "lr": 5e-3}
    overrides = (*(f"optim.{key}={value}" for key, value in settings.items()), "data.batch_size=4")
    out = works("train", corpus_dir, "--out", "new", "--init-from", "isizulu", *overrides).out
    assert "the model is in new" in out
    new, old = (load_engine(open_run(Path(name)), kind="onnx") for name in ("new", "isizulu"))
    run = open_run(Path("new"))
    assert run.has_weights
    # The settings are not those that suited its own text, but its sizes are.
    assert run.recipe["optim"] == {**load_recipe("finetune").model_dump(mode="json")["optim"], **settings}
    assert run.recipe["model"]["hidden_size"] == 24
    # What the shipped model's licence asks for goes with what was made of it, and with what is made of that.
    assert (run.dir / SOURCE_CARD).read_text() == (small / CARD).read_text()
    assert f"see {SOURCE_CARD}" in (run.dir / "README.md").read_text()
    assert f"{Path('new') / SOURCE_CARD}" in works("info", "new").out
    Path("card.md").write_text("# mine\n")
    works("release", "new", "--out", "given", "--card", "card.md")
    assert (Path("given") / SOURCE_CARD).read_text() == (small / CARD).read_text()
    works("train", corpus_dir, "--out", "next", "--init-from", "new", "optim.max_epochs=1")
    assert (Path("next") / SOURCE_CARD).read_text() == (small / CARD).read_text()
    assert run.tokenizer.to_str() == open_run(Path("isizulu")).tokenizer.to_str()
    text = encode_file(corpus_dir / "valid.txt", run.tokenizer)
    assert score_stream(new, text.ids, run.tokenizer.eos_id) < score_stream(old, text.ids, run.tokenizer.eos_id)


@pytest.fixture
def released(monkeypatch, works, tmp_path, corpus_dir):
    """Train by some settings, and leave what a release has; gives its path."""
    monkeypatch.chdir(tmp_path)
    Path("card.md").write_text("# another small model\n")

    def make(*settings):
        works("train", corpus_dir, "--out", "source", *TINY, *settings)
        works("release", "source", "--out", "given", "--card", "card.md")
        return Path("given")

    return make


def test_finetuning_a_release_keeps_what_its_logits_mean_and_its_kind_of_tokenizer(released, works, corpus_dir):
    source = released("loss.kind=entmax", "loss.alpha=1.3", "tokenizer.kind=unigram")
    common = ("train", corpus_dir, "--init-from", source, "optim.max_epochs=1")
    for out, options in (("same", []), ("new", ["--new-tokenizer"])):
        assert "loss.kind" not in works(*common, "--out", out, *options).err
        run = open_run(Path(out))
        assert run.alpha == 1.3
        assert run.recipe["tokenizer"] == open_run(source).recipe["tokenizer"]
        assert run.tokenizer.kind == "unigram"
    err = works(*common, "--out", "softmax", "loss.kind=cross_entropy").err
    assert "given was trained with another loss.kind" in err
    assert open_run(Path("softmax")).alpha == 1


def test_a_card_goes_with_the_weights_through_another_release(released, works, corpus_dir):
    source = released()
    Path("card.md").write_bytes(b"# mine \xc3\xa9\n")
    works("train", corpus_dir, "--out", "tuned", "--init-from", source, "optim.max_epochs=1")
    works("release", "tuned", "--out", "tuned-given", "--card", "card.md")
    works("train", corpus_dir, "--out", "again", "--init-from", "tuned-given", "optim.max_epochs=1")
    assert (Path("again") / SOURCE_CARD).read_bytes() == b"# mine \xc3\xa9\n\n# another small model\n"
    # What was cut off at once leaves its card, which is nothing to a training from nothing.
    shutil.rmtree(Path("again") / "last")
    for name in ("model.safetensors", "model.onnx", "metrics.jsonl", "README.md", "curve.png"):
        (Path("again") / name).unlink()
    works("train", corpus_dir, "--out", "again", *TINY)
    assert not (Path("again") / SOURCE_CARD).exists()


def test_what_cannot_be_trained_on_from_leaves_nothing_behind(small, refused, corpus_dir):
    text = corpus_dir / "train.txt"
    err = refused("train", text, "--out", "new", "--init-from", "isizulu", "model.num_layers=5")
    assert "the shipped model isizulu: its network has other sizes: model.num_layers is 2 there, 5 here" in err
    assert not Path("new").exists()


def test_ngram_takes_the_tokenizer_of_a_shipped_model(small, works, corpus_dir):
    works("ngram", corpus_dir, "--out", "n", "--order", "2", "--tokenizer-from", "isizulu")
    assert open_run(Path("n")).tokenizer.to_str() == open_run(Path("isizulu")).tokenizer.to_str()


# Its folder


def test_the_folder_holds_what_using_needs_and_no_more(models):
    folder = models / DEFAULT_MODEL
    assert {path.name for path in folder.iterdir()} == {*COPIED, "meta.json", CARD}
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES
    meta = json.loads((folder / "meta.json").read_bytes())
    assert OnnxEngine(folder / ONNX).weights_sha256 == meta["weights_sha256"]
    assert hashlib.sha256((folder / ONNX).read_bytes()).hexdigest() == meta["graph_sha256"]
    assert len(meta["weights_sha256"]) == 64
    assert meta["onnx"]["kind"] == "int8"


def test_no_file_names_a_place(models):
    folder = models / DEFAULT_MODEL
    for name in READ_BY_PEOPLE:
        assert not re.findall(r"(?<![\w:/.])/\w[\w.-]*/[\w.-]+", (folder / name).read_text("utf-8")), name
    # In the graph random bytes may look like a short path.
    assert not re.findall(rb"(?<![\w:/.])/(?:[\w.-]{2,}/){2,}[\w.-]{2,}", (folder / ONNX).read_bytes())


def attribution(name):
    """Give it from a file, whatever its lines and quotation marks are."""
    words = re.sub(r"\s+", " ", re.sub(r"(?m)^> ?", "", (ROOT / name).read_text("utf-8")))
    return words[words.index("Trained on: Vuk'uzenzele") : words.index("CC BY 2.5 ZA.") + len("CC BY 2.5 ZA.")]


def test_the_licence_and_the_card_say_the_same_attribution():
    said = attribution("LICENSE-MODEL")
    for source in (
        "Thapelo Sindane", "State of the Nation", "SADiLaR-II", "CatchWord", "Wikipedia contributors",
        "NCHLT Text Corpora", "released under CC BY-SA 4.0",
    ):  # fmt: skip
        assert source in said
    assert attribution("scripts/isizulu-card.md") == said


def test_the_shipped_card_is_complete():
    card = real().dir / CARD
    assert attribution(card) == attribution("LICENSE-MODEL")
    text = card.read_text("utf-8")
    assert text.startswith("---\nlicense: cc-by-sa-4.0\n")
    assert "@@" not in text
    assert text == (ROOT / "scripts" / "isizulu-card.md").read_text("utf-8")


def test_the_shipped_model_says_of_isizulu_what_a_model_must():
    engine = load_engine(real())
    from ulimi.suggest import Suggester

    words = [found.word for found in Suggester(engine, real().tokenizer).search("Ngiyabonga kakh", 3).words]
    assert "kakhulu" in words
