"""The recipe: every setting of a training run, typed and frozen.

Defaults < recipe file (TOML) < ``section.key=value`` on the command line. An unknown key, a value of
the wrong type and a value out of range are each one `UlimiError`. The docstring under a field is its
documentation; the predecessors' flag stands in brackets. A run folder holds its recipe complete, so
that a later change of a default changes no run that exists.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulimi.errors import UlimiError, nearest

Settings = dict[str, dict[str, Any]]
"""What a TOML file holds: section -> key -> value."""

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

OPTIM_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 30.0, "weight_decay": 1.2e-6, "max_grad_norm": 0.25, "max_epochs": 500},
    "nt-asgd": {"lr": 30.0, "weight_decay": 1.2e-6, "max_grad_norm": 0.25, "max_epochs": 500},
    "adamw": {
        "lr": 5e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "max_epochs": 20, "final_lr_ratio": 1.0,
        "average_share": 0.2, "beta1": 0.0,
    },
}  # fmt: skip
"""Each optimizer has its own scale of learning rate: 30 makes AdamW diverge, 5e-3 makes SGD stand still."""


SIZES = ("embedding_size", "hidden_size", "num_layers", "tie_weights", "mogrifier_rounds", "mogrifier_rank")
"""of [model]; the rest of it are dropouts"""
OF_WEIGHTS: dict[str, tuple[str, ...]] = {"model": SIZES, "loss": ("kind", "alpha")}
"""section -> keys: what weights that are there fit, and what their logits mean"""
OF_TOKENIZER: dict[str, tuple[str, ...]] = {"tokenizer": ("kind", "vocab_size", "min_frequency")}
"""likewise of a tokenizer that is there"""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )


class TokenizerRecipe(_Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "unigram", "word", "char"] = "bpe"
    """byte-level BPE, byte-level unigram, whole words (closed vocabularies), characters"""
    vocab_size: int = Field(4000, ge=0)
    """number of tokens, <eos> included; 0 = every word or character of the training text (word and char only)"""
    min_frequency: int = Field(1, ge=1)
    """a word, character or merge that occurs less often is left out"""


class DataRecipe(_Section):
    """How tokens become batches."""

    batch_size: int = Field(32, ge=1)
    """parallel streams B [batch_size]"""
    bptt: int = Field(70, ge=2)
    """base length of a window, in tokens [bptt]"""
    variable_length: bool = True
    """draw each window's length (sec. 4.1); false: always bptt"""
    eval_batch_size: int = Field(10, ge=1)
    """streams of the validation after each epoch; final scores always use one"""


class ModelRecipe(_Section):
    """The AWD-LSTM; these are the keyword arguments of `ulimi.model.AWDLSTM`."""

    embedding_size: int = Field(256, ge=1, le=100_000_000)
    """E; a tied last layer is as wide: then it is best not far below H, unless there are many tokens [emsize]"""
    hidden_size: int = Field(512, ge=1, le=100_000_000)
    """H, of every layer but a tied last one [nhid]"""
    num_layers: int = Field(2, ge=1, le=1000)
    """[nlayers]"""
    tie_weights: bool = False
    """decoder matrix = embedding matrix (sec. 4.5): pays with the tens of thousands of a word vocabulary [tied]"""
    embedding_dropout: Probability = 0.05
    """on whole word types (sec. 4.3) [dropoute]"""
    input_dropout: Probability = 0.2
    """locked, after the embedding [dropouti]"""
    hidden_dropout: Probability = 0.15
    """locked, between layers [dropouth]"""
    output_dropout: Probability = 0.2
    """locked, after the last layer [dropout]"""
    weight_dropout: Probability = 0.2
    """DropConnect on the recurrent matrices (sec. 2) [wdrop]"""
    mogrifier_rounds: int = Field(0, ge=0, le=100)
    """rounds in which input and state scale one another before each step (Melis et al. 2020); 0: a plain LSTM"""
    mogrifier_rank: int = Field(32, ge=1, le=100_000_000)
    """of the matrices of these rounds; without rounds it says nothing"""


class LossRecipe(_Section):
    """What the gradient follows."""

    kind: Literal["cross_entropy", "entmax"] = "cross_entropy"
    """cross_entropy: softmax, no token is impossible; entmax: most tokens get exactly 0 (Martins et al. 2020)"""
    alpha: float = Field(1.5, gt=1, le=2)
    """entmax: 2 is sparsemax, the sparsest; towards 1 it becomes softmax; cross_entropy has no use for it"""
    teacher_share: float = Field(0.5, ge=0, le=1)
    """with --teacher: of its probabilities in what is learnt; the text has the rest (Hinton et al. 2015)"""
    ar_alpha: float = Field(2.0, ge=0)
    """activation regularisation of the dropped output (sec. 4.6); never in a reported figure [alpha]"""
    tar_beta: float = Field(1.0, ge=0)
    """temporal activation regularisation of the raw output (sec. 4.6); never in a reported figure [beta]"""


class OptimRecipe(_Section):
    """How weights move, and when to stop."""

    kind: Literal["sgd", "nt-asgd", "adamw"] = "adamw"
    """plain SGD; SGD, then its average by the non-monotonic trigger (sec. 3); AdamW after a warm-up"""
    lr: float = Field(gt=0, le=1e9)
    """learning rate of a window of bptt tokens; by default 30 for sgd and nt-asgd, 5e-3 for adamw [lr]"""
    rescale_lr: bool = True
    """lr x (length of the window) / bptt (sec. 4.1)"""
    weight_decay: float = Field(ge=0, le=1e6)
    """sgd, nt-asgd: L2 in the gradient, 1.2e-6; adamw: decoupled, 0.01 [wdecay]"""
    max_grad_norm: float = Field(gt=0)
    """clip the global gradient norm at this; 0.25, adamw 1.0 [clip]"""
    max_epochs: int = Field(ge=1)
    """[epochs]"""
    patience: int = Field(0, ge=0)
    """stop after this many epochs without a better validation loss; 0 = never"""
    nonmono_interval: int = Field(5, ge=1)
    """n of the non-monotonic trigger, in epochs [nonmono]"""
    average_share: float = Field(0.0, ge=0, le=1)
    """sgd, adamw: keep the mean of the weights over about this last share of the steps; 0, sgd's default: no mean"""
    average_at_start: bool = False
    """nt-asgd as finetuning: average from the first step, and let the trigger end the run"""
    dropout_warmup_epochs: int = Field(0, ge=0)
    """let all dropouts grow in even steps from none in the first epoch to their full size after this many; 0: full"""
    lr_drops: tuple[Annotated[int, Field(ge=1)], ...] = Field((), strict=False)
    """divide lr by 10 at the end of these epochs, counted from 1 [when]"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """adamw: how much of the gradients' running mean (the momentum) stays at each step; 0, the default: no momentum"""
    beta2: float = Field(0.999, ge=0, lt=1)
    """adamw: likewise of their squares"""
    warmup_steps: int = Field(200, ge=0)
    """adamw: steps of linear warm-up"""
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    """adamw: lr at the end, as a share of lr, to which it falls by a cosine; 1, the default, is a constant rate"""
    seed: int = Field(141, ge=0, lt=2**63)
    """of initialisation, dropouts and window lengths [seed]"""


class Recipe(_Section):
    """Everything that decides what a training run does, apart from the text."""

    tokenizer: TokenizerRecipe
    data: DataRecipe
    model: ModelRecipe
    loss: LossRecipe
    optim: OptimRecipe

    @property
    def alpha(self) -> float:
        """What turns logits into probabilities: 1 is softmax, above it entmax."""
        return self.loss.alpha if self.loss.kind == "entmax" else 1.0

    def to_toml(self) -> str:
        """Write all settings as TOML that `load_recipe` reads back to an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _recipe_dir().iterdir() if p.name.endswith(".toml"))


def load_recipe(name_or_path: str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe: defaults, then the file (a shipped recipe's name, or a path), then `overrides`.

    Args:
        name_or_path: a name of `recipe_names()`, the path of a TOML file, or None for the defaults alone.
        overrides: settings such as ``model.hidden_size=640``; values are TOML, bare words are strings.

    Raises:
        UlimiError: no such recipe, bad TOML, an unknown key, a wrong type, a value out of range.
    """
    settings = {} if name_or_path is None else _read_settings(name_or_path)
    return build_recipe(settings, overrides, source=name_or_path or "defaults")


def build_recipe(settings: Mapping[str, Any], overrides: Iterable[str] = (), *, source: str = "recipe") -> Recipe:
    """Complete `settings` with the defaults, apply `overrides`, and check all of it.

    An override of `optim.kind` brings that optimizer's own rates with it.
    """
    merged: Settings = {section: {} for section in Recipe.model_fields}
    for section, values in settings.items():
        _known_section(section, source)
        if not isinstance(values, Mapping):
            raise UlimiError(f"{source}: {section} is a section, [{section}], not a value")
        merged[section].update(values)
    default_kind = OptimRecipe.model_fields["kind"].default
    base_kind = merged["optim"].get("kind", default_kind)
    given: Settings = {section: {} for section in Recipe.model_fields}
    for override in overrides:
        section, key, value = _parse_override(override)
        given[section][key] = value
    kind = given["optim"].get("kind", base_kind)
    if kind != base_kind:
        # The base's rates are those of another optimizer, on another scale.
        for key in (*OPTIM_DEFAULTS["adamw"], "average_at_start"):
            merged["optim"].pop(key, None)
    for section, values in given.items():
        merged[section].update(values)
    merged["optim"] = {**OPTIM_DEFAULTS.get(str(kind), {}), **merged["optim"]}
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise UlimiError(f"{source}: {_describe(error)}") from None
    _check_together(recipe, source)
    return recipe


def kept_settings(
    settings: Mapping[str, Any], keys: Mapping[str, Iterable[str]], *, source: str = "recipe"
) -> list[str]:
    """Give some settings of a recipe as overrides, for another recipe that is to train on from what it made.

    Args:
        settings: of the one that made it.
        keys: section -> keys, as `OF_WEIGHTS`.
        source: where `settings` stand.
    """
    recipe = build_recipe(settings, source=source).model_dump(mode="json")
    return [f"{section}.{key}={json.dumps(recipe[section][key])}" for section, names in keys.items() for key in names]


def recipe_headline(name: str) -> str:
    """Give the first comment line of a shipped recipe: what it is for."""
    text: str = (_recipe_dir() / f"{name}.toml").read_text(encoding="utf-8")
    return text.splitlines()[0].lstrip("# ")


def explain(recipe: Recipe) -> str:
    """Write all settings as TOML, each under its documentation."""
    lines: list[str] = []
    for section, values in recipe.model_dump(mode="json").items():
        model = getattr(recipe, section)
        lines += [f"[{section}]  # {(type(model).__doc__ or '').strip()}"]
        for key, value in values.items():
            lines += [f"# {type(model).model_fields[key].description}", tomli_w.dumps({key: value}).rstrip()]
        lines.append("")
    return "\n".join(lines).rstrip()


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Name the settings (``section.key``) in which two recipes differ."""
    before, after = old.model_dump(), new.model_dump()
    return [f"{s}.{k}" for s, values in before.items() for k, v in values.items() if after[s][k] != v]


def _recipe_dir() -> Any:
    return resources.files("ulimi") / "recipes"


def _read_settings(name_or_path: str) -> Mapping[str, Any]:
    path = Path(name_or_path)
    shipped = _recipe_dir() / f"{name_or_path}.toml"
    # A name is looked up in the package first: a file of the same name must be given as ./NAME.
    if "/" not in name_or_path and shipped.is_file():
        content = shipped.read_bytes()
    elif path.is_file():
        content = path.read_bytes()
    else:
        hint = nearest(name_or_path, recipe_names())
        raise UlimiError(f"no recipe {name_or_path!r}: neither a file nor one of {', '.join(recipe_names())}{hint}")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows begin a file with a byte order mark
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise UlimiError(f"{name_or_path}: not valid TOML: {error}") from None


def _known_section(section: str, source: str) -> None:
    if section not in Recipe.model_fields:
        known = ", ".join(Recipe.model_fields)
        raise UlimiError(
            f"{source}: unknown section {section!r}; known: {known}{nearest(section, Recipe.model_fields)}"
        )


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise UlimiError(f"{override!r} is not a setting; write section.key=value, such as model.hidden_size=640")
    _known_section(section, override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return section, key, value


def _describe(error: ValidationError) -> str:
    """Say the first thing that is wrong in one line."""
    first = error.errors()[0]
    section, *rest = (str(part) for part in first["loc"])
    name = ".".join([section, *rest])
    if first["type"] == "extra_forbidden":
        fields = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        return f"unknown key {name!r}{nearest(rest[0], fields) or '; known: ' + ', '.join(fields)}"
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} = {first['input']!r}: {reason}"


def _check_together(recipe: Recipe, source: str) -> None:
    tokenizer = recipe.tokenizer
    if tokenizer.kind in ("bpe", "unigram") and tokenizer.vocab_size < 300:
        raise UlimiError(
            f"{source}: tokenizer.vocab_size = {tokenizer.vocab_size}: a {tokenizer.kind} vocabulary holds 256 bytes "
            "and <eos>, so at least 300 tokens are needed"
        )
    if recipe.optim.average_at_start and recipe.optim.kind != "nt-asgd":
        raise UlimiError(f"{source}: optim.average_at_start needs optim.kind = 'nt-asgd', not {recipe.optim.kind!r}")
    if recipe.optim.average_share and recipe.optim.kind == "nt-asgd":
        raise UlimiError(
            f"{source}: optim.average_share = {recipe.optim.average_share} is for sgd and adamw; nt-asgd averages from "
            "its trigger on"
        )
