"""The run folder: the one thing that passes between commands.

    config.json            the network's sizes and dropouts, the n-gram model's order, or the mixture's weights
    recipe.toml            every setting of the training
    tokenizer.json, tokenizer_config.json
    model.safetensors      best weights (averaged ones, once averaging has begun)
    model.onnx             the same network for ONNX Runtime, int8
    last/checkpoint.safetensors   all that an exact resume needs
    metrics.jsonl          a row an epoch
    meta.json              format and package version, commit, machine, data, scores
    curve.png, README.md   for people: the curve, the model card
    corpus/                the splits, where one text file was given
    SOURCE_CARD.md         the card of the release that its training started from

The run of an n-gram model has ngram.npz, its counts, in place of recipe.toml, the weights, and what training leaves.
That of a mixture has members/1, members/2, …: a run folder each, with what the member needs in order to be used.

A model that ships with the package lies in models/NAME and is opened by its name. It is what `ulimi.release` makes of a
run: the graph without the weights, and MODEL_CARD.md.

Light floor: reading a run folder needs no torch.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ulimi.errors import UlimiError, nearest
from ulimi.fetch import HUB, fetch_run, name_on_hub
from ulimi.tokenizer import Tokenizer

FORMAT = 1
"""version of the layout above; a reader refuses a newer one"""

WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
NGRAMS = "ngram.npz"
CARD = "MODEL_CARD.md"
SOURCE_CARD = "SOURCE_CARD.md"
"""the card of a release whose weights others were trained on from: its licence holds for those, too"""
CHECKPOINT = Path("last") / "checkpoint.safetensors"

READ_BACK = "weights_read_back"
"""in meta.json: the float weights beside a graph are what its numbers tell of them, as in a release's hub folder"""

MEMBERS = Path("members")

AWD_LSTM, NGRAM, MIXTURE = "awd_lstm", "ngram", "mixture"
"""the model types of config.json"""

OPTIM_BEFORE = {"average_share": 0.0, "beta1": 0.9}
"""what runs were trained with when their recipes did not say it, where the default is another one by now"""

MODELS = Path(__file__).with_name("models")
"""a folder a model that ships with the package"""


@dataclass(frozen=True)
class Run:
    """A run folder that was found to be one."""

    dir: Path
    meta: dict[str, Any]
    origin: str | None = None
    """hf:USER/NAME, if it was fetched: the folder is the hub's cache then, where nothing is written"""

    @cached_property
    def whole_config(self) -> dict[str, Any]:
        """All of config.json."""
        return _read_json(self.dir / "config.json")

    @property
    def kind(self) -> str:
        """What kind of model it holds: `AWD_LSTM`, `NGRAM` or `MIXTURE`."""
        # A folder may hold a graph alone, and no config.json.
        model_type = self.whole_config.get("model_type") if (self.dir / "config.json").is_file() else AWD_LSTM
        return model_type if model_type in (NGRAM, MIXTURE) else AWD_LSTM

    def need_network(self, what: str) -> None:
        """Refuse another model, on behalf of an option or a command that looks inside a network."""
        if self.kind != AWD_LSTM:
            holds = {NGRAM: "an n-gram model", MIXTURE: "a mixture of models"}[self.kind]
            raise UlimiError(f"{what}: {self.dir} holds {holds}; this needs a network, as `ulimi train` makes it")

    @property
    def has_weights(self) -> bool:
        """Whether the float weights are there, and not their graph alone, or what was read back from it."""
        return (self.dir / WEIGHTS).is_file() and not self.meta.get(READ_BACK)

    def need_weights(self, what: str) -> None:
        """Refuse what is no network, and a graph without its float weights, on behalf of what would round them."""
        self.need_network(what)
        if not self.has_weights and (self.dir / ONNX).is_file():
            raise UlimiError(
                f"{what}: {self.name} has no float weights, only their graph ({ONNX}); take a run folder that "
                f"holds {WEIGHTS}: `ulimi train` makes one, and `make isizulu-model` the one behind the shipped model"
            )

    def need_finished(self) -> None:
        """Refuse a run whose training goes on, on behalf of what gives it away."""
        if not self.meta.get("training"):
            raise UlimiError(f"{self.dir}: its training is not finished; `ulimi train … --resume` goes on with it")

    @property
    def name(self) -> str:
        """What a message calls it."""
        return self.origin or (f"the shipped model {self.dir.name}" if self.is_shipped else str(self.dir))

    @property
    def title(self) -> str:
        """The name alone, without its place."""
        return self.dir.resolve().name if self.origin is None else self.origin.split("/")[1].split("@")[0]

    @property
    def export_advice(self) -> str:
        """Say who can write its graph."""
        who = "" if self.origin is None else ", where it was trained,"
        return f"`ulimi export {self.dir if self.origin is None else 'RUN'}`{who} writes it"

    @property
    def is_shipped(self) -> bool:
        """Whether it came with the package."""
        return self.dir.parent == MODELS

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments of the network; of an n-gram model, its order; of a mixture, its weights."""
        config = self.whole_config.get(self.kind)
        if not isinstance(config, dict):
            raise UlimiError(f"{self.dir}/config.json: describes no AWD-LSTM, no n-gram model and no mixture")
        return config

    @cached_property
    def alpha(self) -> float:
        """What turns the network's logits into probabilities: 1 is softmax, above it entmax."""
        alpha = self.whole_config.get("entmax_alpha", 1.0)
        if not isinstance(alpha, int | float) or not 1 <= alpha <= 2:
            raise UlimiError(
                f"{self.dir}/config.json: entmax_alpha is {alpha!r}; allowed: 1 (softmax) to 2 (sparsemax)"
            )
        return float(alpha)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the weights."""
        return Tokenizer.load(self.dir)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The settings, as the TOML holds them."""
        self.need_network("recipe.toml")
        path = self.dir / "recipe.toml"
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
            raise UlimiError(f"{path}: cannot be read: {error}") from None
        if isinstance(settings.get("optim"), dict):
            # Runs from before there were these settings were trained without what is their default now.
            for key, value in OPTIM_BEFORE.items():
                settings["optim"].setdefault(key, value)
        return settings

    @property
    def weights_path(self) -> Path:
        """The best weights: the float ones, or where those stayed behind, as of a release, their graph.

        `ulimi.engine.read_weights` reads either. An error if no epoch has ended yet.
        """
        self.need_network(WEIGHTS)
        if self.has_weights:
            return self.dir / WEIGHTS
        if (self.dir / ONNX).is_file():
            return self.dir / ONNX
        raise UlimiError(f"{self.dir}: no {WEIGHTS} yet; the first epoch of its training has not ended")

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the best weights' file: what was derived from other weights is stale."""
        return _sha256(self.weights_path)

    @cached_property
    def model_sha256(self) -> list[str]:
        """Hashes of its weights, graphs and counts, those of a mixture's members; an error where none is there."""
        if self.kind == NGRAM and not (self.dir / NGRAMS).is_file():
            raise UlimiError(f"{self.dir}: no {NGRAMS}, which holds the counts of an n-gram model")
        paths = [path for path in self.model_files() if path.name in (WEIGHTS, ONNX, NGRAMS)] or [self.weights_path]
        return [_sha256(path) for path in paths]

    def members(self) -> list["Run"]:
        """Open what a mixture is made of; of other models there is none."""
        if self.kind != MIXTURE:
            return []
        weights = self.config.get("weights")
        if not isinstance(weights, list) or not are_shares(weights):
            raise UlimiError(f"{self.dir}/config.json: weights is {weights!r}; allowed: some that add up to 1")
        return [open_run(self.dir / MEMBERS / str(number)) for number in range(1, len(weights) + 1)]

    def networks(self, what: str) -> list["Run"]:
        """Give the network itself, or those of a mixture; refuse what has none, on behalf of an option."""
        found = [member for member in self.members() or [self] if member.kind == AWD_LSTM]
        if not found:
            self.need_network(what)
        return found

    def model_files(self) -> list[Path]:
        """What decides how the model computes, as far as it is there."""
        names = (*[WEIGHTS] * self.has_weights, ONNX, NGRAMS, "config.json", "tokenizer.json")
        own = [self.dir / name for name in names if (self.dir / name).is_file()]
        return own + [path for member in self.members() for path in member.model_files()]

    def source_card(self) -> bytes:
        """Give the card of the release that its weights are, and of what they started from; of other weights none."""
        paths = [path for path in (self.dir / CARD, self.dir / SOURCE_CARD) if path.is_file()]
        return b"\n".join(path.read_bytes() for path in paths)

    def text_path(self, part: str) -> Path | None:
        """Find the text of a part ("train", "valid"): where the run remembers it, or in its own corpus/, or nowhere."""
        entry = self.meta.get("data", {}).get(part, {})
        # Of a release only the file's name is left: what bears it where somebody stands is another text.
        # And a stranger's run does not say which file is read here.
        places = [path for path in [Path(entry.get("path", ""))] if path.is_absolute() and self.origin is None]
        places.append(self.dir / "corpus" / f"{part}.txt")
        return next((place for place in places if place.is_file()), None)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one an epoch."""
        path = self.dir / "metrics.jsonl"
        if not path.is_file():
            return []
        # A last line without its end is being written at this moment, or was when the run was killed.
        lines = path.read_bytes().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise UlimiError(f"{path}: cannot be read: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def are_shares(weights: Sequence[Any]) -> bool:
    """Tell whether these can be the weights of a mixture: numbers between 0 and 1 that add up to 1."""
    return all(isinstance(w, float) and 0 < w < 1 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)


def shipped_models() -> list[str]:
    """List the models that come with the package."""
    return sorted(path.parent.name for path in MODELS.glob("*/meta.json"))


def open_run(path: Path | str) -> Run:
    """Open a run folder, a model that ships with the package, or one of Hugging Face's hub.

    Args:
        path: a run folder, the name of a shipped model, or hf:USER/NAME, see `ulimi.fetch`. Where a folder and a
            shipped model of one name are there, a run folder in the current directory wins; any other folder, one of
            texts for instance, does not.

    Raises:
        UlimiError: no such folder, not a run folder, or one of a newer format; it cannot be fetched.
    """
    shipped, path, origin = shipped_models(), Path(path), None
    if path.as_posix().startswith(HUB) and not path.is_dir():
        origin = path.as_posix()
        path = fetch_run(origin)
    if str(path) in shipped and not (path / "meta.json").is_file():
        path = MODELS / path
    if not path.is_dir():
        names = f"; shipped with ulimi: {', '.join(shipped)}{nearest(str(path), shipped)}" if shipped else ""
        name = name_on_hub(path)
        meant = f"; on the hub it would be {name}" if name is not None else ""
        raise UlimiError(f"no run folder {str(path)!r}; `ulimi train CORPUS --out {path}` makes one{names}{meant}")
    if not (path / "meta.json").is_file():
        raise UlimiError(f"{path} is not a run folder: it holds no meta.json")
    meta = _read_json(path / "meta.json")
    version = meta.get("format")
    if not isinstance(version, int):
        raise UlimiError(f"{path}/meta.json: no format version")
    if version > FORMAT:
        raise UlimiError(
            f"{path} has run format {version}, this ulimi reads up to {FORMAT}; it was made by ulimi "
            f"{meta.get('ulimi', '?')}: install that version or a newer one"
        )
    return Run(path, meta, origin)


def refuse_file(run_dir: Path) -> None:
    """Refuse to make a run where a file is."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UlimiError(f"--out {run_dir}: is a file; a run is a folder")


def refuse_foreign(run_dir: Path, ours: set[str], ours_with_meta: set[str]) -> None:
    """Refuse to make a run in a folder that holds something else.

    Args:
        run_dir: where the run is to be.
        ours: what may be there.
        ours_with_meta: what else may be there beside a meta.json: with it, a run was begun here and cut off.
    """
    if not run_dir.is_dir():
        return
    if (run_dir / "meta.json").is_file():
        ours = ours | ours_with_meta | {"meta.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    if foreign := sorted(path.name for path in run_dir.iterdir() if path.name not in ours):
        raise UlimiError(f"--out {run_dir}: the folder holds other things ({foreign[0]}); give a new folder")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UlimiError(f"{path}: cannot be read: not a JSON object")
    return value
