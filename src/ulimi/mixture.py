"""Make the run of a mixture: models of one tokenizer whose probabilities are averaged, in one folder that stands alone.

A network and an n-gram model of the same text err in different places, so that both together are better than either;
and an n-gram model of somebody's own text, counted in seconds, bends a network that was trained on another one.

    p(w | context) = sum over members m of weight_m p_m(w | context)    (linear interpolation, Jelinek & Mercer 1980)

The weights are those that give a held-out text the most probability, found by expectation maximisation; the problem is
convex, so there is one best answer. Light floor: mixing needs no PyTorch.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.data import EncodedText, encode_file
from ulimi.engine import MixtureEngine, load_mixture, mixed_nats
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir, write_json, write_text
from ulimi.info import model_card
from ulimi.progress import counting
from ulimi.provenance import describe_machine, describe_text, new_meta
from ulimi.run import CARD, MEMBERS, MIXTURE, SOURCE_CARD, Run, are_shares
from ulimi.score import Score, stream_nll

TOLD = ("meta.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl", CARD, SOURCE_CARD)
"""what a member has beside its model, for `ulimi info`, and for whoever must know its licence"""

LEAST_WEIGHT = 0.001
"""whoever gets less adds nothing but its size and its time"""

TOLERANCE = 1e-8
"""nats a token that another round of expectation maximisation must gain"""
MAX_ROUNDS = 10_000


@dataclass(frozen=True)
class Mixed:
    """What became of a mixture."""

    weights: list[float]
    alone: list[Score]
    """each member's score of the text that the weights were tuned on; none where they were given"""
    together: Score | None
    """the mixture's"""
    num_unknown: int = 0
    """words of that text which are <unk> to a closed vocabulary"""


def tune_weights(nats_MN: NDArray[Any]) -> NDArray[np.float64]:
    """Give the weights, (M,), that lower the nats of a mixture the most.

    Args:
        nats_MN: of each token under each member, (M, N).
    """
    p_MN = np.exp(nats_MN.min(axis=0) - nats_MN.astype(np.float64))  # a factor a token changes no share
    weights_M = np.full(len(p_MN), 1 / len(p_MN))
    before = -math.inf
    for _ in range(MAX_ROUNDS):
        shares_MN = weights_M[:, None] * p_MN
        p_N = shares_MN.sum(axis=0)
        gained = float(np.log(p_N).mean())
        if gained - before < TOLERANCE:
            break
        before, weights_M = gained, (shares_MN / p_N).mean(axis=1)
    return weights_M


def make_mixture_run(
    runs: Sequence[Run], names: Sequence[str], out: Path, *,
    weights: Sequence[float] | None = None, tune_on: Path | None = None, device: str = "auto", kind: str = "auto",
) -> Mixed:  # fmt: skip
    """Copy runs into the folder of a mixture, which needs none of them afterwards.

    Args:
        runs: the members, two or more, of one tokenizer.
        names: what they were called; kept in meta.json.
        out: the folder to make; nothing may be there.
        weights: of each member.
        tune_on: or a text that no member was trained on, to find the weights by; it is read as one stream.
        device: for networks on PyTorch, as of `ulimi.engine.load_engine`.
        kind: likewise.

    Raises:
        UlimiError: anything wrong with what was given, or a member that adds nothing.
    """
    if (weights is None) == (tune_on is None):
        raise UlimiError("the weights of a mixture: give --tune FILE, a held-out text, or --weight for each model")
    _check_members(runs, names)
    if weights is not None:
        _check_weights(weights, len(runs))
    # Around all the rest: that something is there already is not to be learnt after minutes of reading.
    with atomic_dir(out) as unfinished:
        shares = list(weights or [1 / len(runs)] * len(runs))  # the same for all until they are tuned
        # Also where nothing is tuned: do they fit together?
        engine = load_mixture(runs, shares, device, kind=kind, exact=tune_on is not None)
        mixed, tuned_on = Mixed(shares, [], None), None
        if tune_on is not None:
            text = encode_file(tune_on, runs[0].tokenizer)
            mixed, tuned_on = _tune(engine, runs, names, tune_on, text), describe_text(tune_on, text)
        for number, run in enumerate(runs, start=1):
            member_dir = unfinished / MEMBERS / str(number)
            member_dir.mkdir(parents=True)
            told = [run.dir / name for name in TOLD]
            for path in [*run.model_files(), *filter(Path.is_file, told)]:
                shutil.copyfile(path, member_dir / path.name)
        runs[0].tokenizer.save(unfinished)
        eos = runs[0].tokenizer.eos_id
        write_json(unfinished / "config.json", {
            "model_type": MIXTURE, "bos_token_id": eos, "eos_token_id": eos,
            MIXTURE: {"vocab_size": runs[0].tokenizer.vocab_size, "weights": mixed.weights},
        })  # fmt: skip
        meta = {**new_meta(describe_machine()), "members": list(names), "tuned_on": tuned_on}
        if mixed.together is not None:
            meta["scores"] = {"tuned": mixed.together.as_dict()}
        write_json(unfinished / "meta.json", meta)
        write_text(unfinished / "README.md", model_card(Run(unfinished, meta), out))
    return mixed


def _check_members(runs: Sequence[Run], names: Sequence[str]) -> None:
    if len(runs) < 2:
        raise UlimiError(f"a mixture needs two models or more; given: {', '.join(names) or 'none'}")
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        if run.kind == MIXTURE:
            raise UlimiError(f"{name} is a mixture itself; give its members: {run.dir / MEMBERS}/1 and so on")
        if run.dir.resolve() in [other.dir.resolve() for other in runs[:place]]:
            raise UlimiError(f"{name} is given twice; once has the same effect")
        if run.tokenizer.to_str() != runs[0].tokenizer.to_str():
            raise UlimiError(
                f"{name} has another tokenizer than {names[0]}; models of one mixture need the same one: "
                f"`ulimi ngram --tokenizer-from {names[0]}` and `ulimi train --init-from {names[0]}` keep it"
            )


def _check_weights(weights: Sequence[float], num: int) -> None:
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != num:
        raise UlimiError(f"--weight {given}: {num} models need {num} weights, in their order")
    if not are_shares(weights):
        raise UlimiError(f"--weight {given}: allowed: numbers between 0 and 1 that add up to 1")


def _tune(engine: MixtureEngine, runs: Sequence[Run], names: Sequence[str], path: Path, text: EncodedText) -> Mixed:
    for run, name in zip(runs, names, strict=True):
        if asdict(text.stats).items() <= run.meta.get("data", {}).get("train", {}).items():
            raise UlimiError(
                f"--tune {path}: is the training text of {name}, which would get all the weight; give a held-out text"
            )
    nats: list[NDArray[np.float32]] = []
    for member, name in zip(engine.members, names, strict=True):
        with counting(f"reading {path} with {name}, tokens") as on_tokens:
            nats.append(stream_nll(member, text.ids, runs[0].tokenizer.eos_id, on_tokens))
    nats_MN = np.stack(nats)
    weights_M = tune_weights(nats_MN)
    together, *alone = (
        Score.of(float(each.sum(dtype=np.float64)), len(text.ids), text.stats)
        for each in (mixed_nats(nats_MN, weights_M), *nats_MN)
    )
    if weights_M.min() < LEAST_WEIGHT:
        least = names[int(weights_M.argmin())]
        raise UlimiError(
            f"--tune {path}: {least} adds nothing there, its weight would be {weights_M.min():.4f}; leave it out"
        )
    return Mixed(weights_M.tolist(), alone, together, text.num_unknown)
