"""Judge a model by minimal pairs: is the correct sentence more probable than the same one with a wrong marker?

The measure of BLiMP (Warstadt et al. 2020): the share of pairs whose correct sentence has the higher total probability;
a tie counts one half, and chance is one half. Sentences of a pair differ in one marker, so no correction for length.

Where a pair is followed by its mirror image, as the shipped ones are, a couple of pairs is judged too: are its two
correct sentences together more probable than the two wrong ones? Liking or disliking a marker whatever the context, a
long one for instance, cancels out there, and what is left is whether the model knows where it belongs.

Light floor: a model is any function from sentences to nats; transformers and torch are imported when one of theirs is
asked for.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulimi.corpus import read_lines
from ulimi.engine import Engine
from ulimi.errors import UlimiError
from ulimi.files import write_text
from ulimi.grammar import Pair
from ulimi.marginal import Marginal
from ulimi.score import score_lines
from ulimi.tokenizer import Tokenizer

Scorer = Callable[[Sequence[str]], Sequence[float]]
"""sentences -> the nats that each costs"""

Z_95 = 1.959963984540054
SENTENCES_AT_ONCE = 16
HEADER = ("phenomenon", "good", "bad")


@dataclass(frozen=True)
class Verdict:
    """What a model thinks of one pair."""

    pair: Pair
    good_nats: float
    bad_nats: float

    @property
    def credit(self) -> float:
        """1 where the good sentence is the more probable, 0 where the bad one is, one half for a tie."""
        return _credit(self.good_nats, self.bad_nats)


@dataclass(frozen=True)
class Row:
    """One phenomenon's accuracy."""

    phenomenon: str
    num: int
    correct: float
    """pairs, a tie being one half"""
    num_couples: int = 0
    correct_couples: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of the pairs."""
        return self.correct / self.num

    @property
    def couple_accuracy(self) -> float | None:
        """Share of the couples; None where there are none."""
        return self.correct_couples / self.num_couples if self.num_couples else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927), as if pairs were independent."""
        n, p, zz = self.num, self.accuracy, Z_95**2
        middle = (p + zz / (2 * n)) / (1 + zz / n)
        half = Z_95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_dict(self) -> dict[str, Any]:
        """The keys of `--json`."""
        low, high = self.interval
        return {
            "phenomenon": self.phenomenon,
            "num": self.num,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "couples": self.couple_accuracy,
        }


@dataclass(frozen=True)
class Judgement:
    """All verdicts, and their summary a phenomenon."""

    verdicts: list[Verdict]

    @property
    def rows(self) -> list[Row]:
        """A row a phenomenon, in the order in which they first came."""
        by_name: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts:
            by_name.setdefault(verdict.pair.phenomenon, []).append(verdict)
        return [_row(name, verdicts) for name, verdicts in by_name.items()]

    @property
    def mean(self) -> float:
        """The macro mean: each phenomenon counts alike, whatever its number of pairs."""
        rows = self.rows
        return sum(row.accuracy for row in rows) / len(rows)

    @property
    def couple_mean(self) -> float | None:
        """The same of couples, over the phenomena that have some."""
        known = [row.couple_accuracy for row in self.rows if row.couple_accuracy is not None]
        return sum(known) / len(known) if known else None


def _row(phenomenon: str, verdicts: list[Verdict]) -> Row:
    couples = [
        _credit(first.good_nats + second.good_nats, first.bad_nats + second.bad_nats)
        for first, second in zip(verdicts[::2], verdicts[1::2], strict=False)
        if first.pair.mirrors(second.pair)
    ]
    return Row(phenomenon, len(verdicts), sum(v.credit for v in verdicts), len(couples), sum(couples))


def _credit(good_nats: float, bad_nats: float) -> float:
    return 0.5 if good_nats == bad_nats else float(good_nats < bad_nats)


def judge(score: Scorer, pairs: Sequence[Pair]) -> Judgement:
    """Score each sentence once, and compare.

    Args:
        score: nats of each sentence given, in order; lower is more probable.
        pairs: at least one.

    Raises:
        UlimiError: there are no pairs, or a score is not a number.
    """
    if not pairs:
        raise UlimiError("there are no pairs to judge; at least one is needed")
    sentences = list(dict.fromkeys(sentence for pair in pairs for sentence in (pair.good, pair.bad)))
    nats = dict(zip(sentences, score(sentences), strict=True))
    for sentence, cost in nats.items():
        if math.isnan(cost):
            raise UlimiError(f"the model's score of {sentence!r} is not a number")
    return Judgement([Verdict(pair, nats[pair.good], nats[pair.bad]) for pair in pairs])


def run_scorer(engine: Engine, tokenizer: Tokenizer, marginal: bool = False) -> Scorer:
    """Score with a run: each sentence as a line by itself, its <eos> included; see `ulimi.marginal`."""
    rows = Marginal(engine, tokenizer).score_rows if marginal else None

    def score(sentences: Sequence[str]) -> list[float]:
        return [line_score.nats for _, line_score in score_lines(engine, tokenizer, sentences, score_rows=rows)]

    return score


def hf_scorer(model_dir: Path) -> Scorer:
    """Score with a Hugging Face causal language model that lies in a folder; nothing is fetched.

    A sentence is scored after the tokenizer's bos token, or after its eos token where it has no bos, so that each of
    its own tokens counts; nothing is added at its end.

    Raises:
        UlimiError: transformers is missing, or the folder does not hold such a model with its tokenizer.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
        import torch
    except ImportError as error:
        raise UlimiError(f"--hf needs {error.name}: pip install torch transformers") from error
    if not (model_dir / "config.json").is_file():
        raise UlimiError(f"--hf {model_dir}: no config.json there; a folder of a Hugging Face model is needed")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # what a damaged file raises depends on the file
        reason = str(error).strip().split("\n")[0]
        raise UlimiError(f"--hf {model_dir}: no causal language model with its tokenizer: {reason}") from error
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UlimiError(
            f"--hf {model_dir}: its tokenizer names neither a bos nor an eos token for a text to start after"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UlimiError(f"--hf {model_dir}: the tokenizer has {len(tokenizer)} tokens, more than the model")
    model = model.float().eval()

    @torch.inference_mode()
    def score(sentences: Sequence[str]) -> list[float]:
        ids = [[start_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in sentences]
        nats = [0.0] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for first in range(0, len(ids), SENTENCES_AT_ONCE):
            rows = by_length[first : first + SENTENCES_AT_ONCE]
            longest = max(len(ids[row]) for row in rows)
            # Pads stand after a row's own tokens, where a causal model cannot see them from.
            ids_BT = torch.tensor([ids[row] + [start_id] * (longest - len(ids[row])) for row in rows])
            real_BT = torch.tensor([[1] * len(ids[row]) + [0] * (longest - len(ids[row])) for row in rows])
            logits_BTV = model(input_ids=ids_BT, attention_mask=real_BT).logits[:, :-1]
            nll_BT = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
            ).view(len(rows), -1)
            for row, cost in zip(rows, (nll_BT.double() * real_BT[:, 1:]).sum(dim=1).tolist(), strict=True):
                nats[row] = cost
        return nats

    return score


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from a file of three columns with tabs between: phenomenon, good, bad; a header is left out.

    Raises:
        UlimiError: the file cannot be read, or a line has not three columns, or its sentences are the same.
    """
    found: list[Pair] = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = tuple(column.strip() for column in line.split("\t"))
        if not line.strip() or (number == 1 and columns == HEADER):
            continue
        if len(columns) != 3 or not all(columns):
            raise UlimiError(
                f"{path}, line {number}: {len(columns)} columns; allowed: phenomenon, good, bad, tabs between"
            )
        if columns[1] == columns[2]:
            raise UlimiError(f"{path}, line {number}: the good and the bad sentence are the same, {columns[1]!r}")
        found.append(Pair(*columns))
    if not found:
        raise UlimiError(f"{path}: no pairs; a line is phenomenon, good, bad, with tabs between")
    return found


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as `read_pairs` reads them."""
    rows = [HEADER, *((pair.phenomenon, pair.good, pair.bad) for pair in pairs)]
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))
