"""From a finished run to a folder that can be given away: what using the model needs, and a card that says what it is.

The float weights stay behind: the int8 graph is a quarter of their size and runs without PyTorch. Their hash is kept,
so that the run behind a release can be told. Names of local folders stay behind, too.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ulimi.engine import load_engine
from ulimi.errors import UlimiError
from ulimi.export import MAX_DIFFERENCE, MAX_INT8_COST
from ulimi.files import atomic_dir, write_json
from ulimi.run import CARD, ONNX, SOURCE_CARD, Run

MAX_BYTES = 12_000_000
"""of the whole folder: it travels with each copy of the package"""

COPIED = (ONNX, "config.json", "tokenizer.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl")
READ_BY_PEOPLE = ("config.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl", "meta.json", CARD)
"""what is searched for places; a vocabulary may hold any string"""

GAP = "@@"
"""stands in a card where something has still to be filled in"""

PLACE = re.compile(
    r"(?<![\w:/.])/(?:[\w.-]+/)+[\w.-]*|\b[A-Za-z]:[\\/]\w+|\bfile:/+[\w.-]+|(?<![\w~])~\w*/[\w.-]+|\\\\\w+\\\w+"
)
"""an absolute path; a web address has a colon before its slashes"""


def release(run: Run, out: Path, card_path: Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Write the folder of a model that is to be given away, whole or not at all.

    Args:
        run: finished, with its weights and the int8 graph of them.
        out: the folder to make.
        card_path: Markdown that says what the model is, what it was made of, and what may be done with it.
        max_bytes: what the folder may hold.

    Returns:
        Its bytes.

    Raises:
        UlimiError: the run is not finished, its graph is missing, of other weights, not int8 or not checked, the folder
            is there or would be too large, the card has gaps, or a file names a place on this machine.
    """
    run.need_weights("ulimi release")
    with atomic_dir(out) as unfinished:
        _check_graph(run)
        card = _read_card(card_path)
        for name in COPIED:
            shutil.copyfile(run.dir / name, unfinished / name)
        # What it started from says under which licence the weights may be given on.
        if (run.dir / SOURCE_CARD).is_file():
            shutil.copyfile(run.dir / SOURCE_CARD, unfinished / SOURCE_CARD)
        write_json(unfinished / "meta.json", _meta(run))
        (unfinished / CARD).write_text(card, encoding="utf-8", newline="\n")
        refuse_places(unfinished, READ_BY_PEOPLE)
        num_bytes = sum(path.stat().st_size for path in unfinished.iterdir())
        if num_bytes > max_bytes:
            raise UlimiError(
                f"{run.dir}: a release would have {num_bytes / 1e6:.1f} MB; allowed: {max_bytes / 1e6:.1f}"
            )
    return num_bytes


def refuse_places(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that is to be given away if one of these files names an absolute path."""
    for name in names:
        if found := PLACE.search((folder / name).read_text(encoding="utf-8")):
            raise UlimiError(f"{name} names a place on this machine, {found.group()!r}; it must not be given away")


def _check_graph(run: Run) -> None:
    """Refuse what was not finished, or whose graph was not found to be that of its weights."""
    run.need_finished()
    load_engine(run, kind="onnx")  # is it there, of these weights, and of this tokenizer?
    found = run.meta.get("onnx", {})
    difference, cost = found.get("fp32_max_difference"), found.get("int8_cost_bits_per_char")
    if found.get("kind") != "int8":
        raise UlimiError(f"{run.dir}: {ONNX} is {found.get('kind', 'not described in meta.json')}; int8 is needed")
    if found.get("num_bytes") != (run.dir / ONNX).stat().st_size:
        raise UlimiError(f"{run.dir}: {ONNX} is not the file that meta.json describes; `ulimi export` writes both")
    # Not a number is neither below nor above a limit.
    if not (difference is not None and difference <= MAX_DIFFERENCE and cost is not None and cost <= MAX_INT8_COST):
        raise UlimiError(
            f"{run.dir}: {ONNX} differs from the weights by {difference} nats a token, int8 costs {cost} bits per "
            f"character; allowed: {MAX_DIFFERENCE:g} and {MAX_INT8_COST:g}"
        )


def _read_card(path: Path) -> str:
    """Read a model card, and refuse one that is not complete."""
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UlimiError(f"--card {path}: cannot be read: {error}") from None
    if not card.strip() or GAP in card:
        gaps = [number for number, line in enumerate(card.splitlines(), start=1) if GAP in line]
        where = f"gaps ({GAP}) in line {', '.join(map(str, gaps))}" if gaps else "nothing in it"
        raise UlimiError(f"--card {path}: {where}; a card must be complete")
    return card


def _meta(run: Run) -> dict[str, Any]:
    """Give meta.json without places, with the hashes of the weights and of the graph."""
    graph_sha256 = hashlib.sha256((run.dir / ONNX).read_bytes()).hexdigest()
    return {**public_meta(run), "weights_sha256": run.weights_sha256, "graph_sha256": graph_sha256}


def public_meta(run: Run) -> dict[str, Any]:
    """Give meta.json as it can be given away: without places, and without what tells of a machine's owner."""
    meta: dict[str, Any] = _without_places(run.meta)
    if "system" in meta.get("machine", {}):
        meta["machine"]["system"] = meta["machine"]["system"].split("-")[0]
    return meta


def _without_places(value: Any) -> Any:
    """Leave the last name of each absolute path."""
    if isinstance(value, dict):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_places(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
