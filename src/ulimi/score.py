"""From nats to figures that can be compared, and the two ways to score a text.

Every token of the text is predicted and counted once, the <eos> at each line's end included, the first token of all
after an <eos> that is not counted. Bits per character divide by the code points of the original text, with one newline
a line; bits per token that are called so are the commonest error in the field.

Light floor: the network is whatever `Engine` is given.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.corpus import TextStats, count_stats
from ulimi.data import Ids
from ulimi.distribution import EPSILON, log_probs, smoothed_nats
from ulimi.engine import EVALUATION_WINDOW, Engine
from ulimi.tokenizer import Tokenizer

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Score:
    """What a text cost, and how much text it was."""

    nats: float
    num_tokens: int
    num_words: int
    """white-space words, without the ends of lines"""
    num_lines: int
    num_chars: int
    """code points of the original text, one newline a line"""
    num_bytes: int
    """of its UTF-8, likewise"""

    @classmethod
    def of(cls, nats: float, num_tokens: int, stats: TextStats) -> "Score":
        """Join the nats of a text with its counts."""
        return cls(nats, num_tokens, stats.num_words, stats.num_lines, stats.num_chars, stats.num_bytes)

    @property
    def perplexity(self) -> float:
        """Per token of the model's own tokenizer: comparable between models that share it, and only those."""
        return _exp(self.nats / self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(nats / number of words, each line's end counted as one)."""
        return _exp(self.nats / (self.num_words + self.num_lines))

    @property
    def bits_per_char(self) -> float:
        """Nats / ln 2 / characters."""
        return self.nats / math.log(2) / self.num_chars

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.num_bytes

    def __add__(self, other: "Score") -> "Score":
        """The score of two texts together."""
        mine, theirs = asdict(self), asdict(other)
        return Score(**{key: mine[key] + theirs[key] for key in mine})

    def as_dict(self) -> dict[str, Any]:
        """The keys of `--json`; a perplexity too large for a float is None, since JSON has no infinity."""
        return {
            "nats": self.nats,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
            "num_lines": self.num_lines,
            "num_chars": self.num_chars,
            "num_bytes": self.num_bytes,
            "perplexity": _finite(self.perplexity),
            "word_perplexity": _finite(self.word_perplexity),
            "bits_per_char": self.bits_per_char,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True)
class DistributionScore:
    """How well a model's distributions fit a text, by measures that a sparse one can be given too.

    Martins, Marinho & Martins (2020), "Sparse Text Generation", section 4. All are sums over tokens but `epsilon`.
    """

    epsilon: float
    num_tokens: int
    smoothed_nats: float
    """of (p + epsilon) / (1 + epsilon V)"""
    sparsemax: float
    """p + (1 - the sum of all squared probabilities) / 2: 1 is certain and right, 0 certain and wrong"""
    js: float
    """nats of Jensen-Shannon divergence between the distribution and the token: 0 to ln 2"""
    support: float
    """tokens that are not impossible"""
    num_impossible: int
    """tokens of the text that were"""

    def __add__(self, other: "DistributionScore") -> "DistributionScore":
        """The score of two texts together, by the same epsilon."""
        mine, theirs = asdict(self), asdict(other)
        return DistributionScore(**{key: mine[key] + theirs[key] for key in mine} | {"epsilon": self.epsilon})

    def as_dict(self) -> dict[str, Any]:
        """The keys of `--json`: means over tokens."""
        n = self.num_tokens
        return {
            "epsilon": self.epsilon,
            "num_tokens": n,
            "epsilon_perplexity": _finite(_exp(self.smoothed_nats / n)),
            "sparsemax_score": self.sparsemax / n,
            "js_divergence": self.js / n,
            "support": self.support / n,
            "impossible": self.num_impossible / n,
        }


def score_distribution(
    engine: Engine, ids: Ids, eos_id: int, epsilon: float = EPSILON,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> DistributionScore:  # fmt: skip
    """Measure a model's distributions on a text read as one stream.

    Args:
        engine: the network.
        ids: (N,).
        eos_id: what stands before the first token.
        epsilon: of the smoothed nats; 0 gives the nats themselves, infinite where the model rules a token out.
        on_tokens: told how many tokens are done.
    """
    state = engine.initial_state(1)
    nats = sparsemax = js = support = 0.0
    num_impossible = 0
    for inputs_1T, targets_1T, done in windows(ids, eos_id):
        logits_1TV, state = engine.logits(inputs_1T, state)
        targets_T = targets_1T[0]
        probs_TV = np.exp(log_probs(logits_1TV[0], engine.alpha))
        p_T = probs_TV[np.arange(len(targets_T)), targets_T]
        nats += float(smoothed_nats(p_T, probs_TV.shape[1], epsilon).sum())
        sparsemax += float((p_T + (1 - np.square(probs_TV).sum(axis=1)) / 2).sum())
        # Between a distribution and a single token all but that token's own probability falls out.
        with np.errstate(divide="ignore", invalid="ignore"):
            own_T = np.where(p_T > 0, p_T * np.log(p_T), 0.0)
        js += float((math.log(2) + (own_T - (1 + p_T) * np.log1p(p_T)) / 2).sum())
        support += float(np.count_nonzero(probs_TV))
        num_impossible += int((p_T == 0).sum())
        on_tokens(done)
    return DistributionScore(epsilon, len(ids), nats, sparsemax, js, support, num_impossible)


def score_stream(engine: Engine, ids: Ids, eos_id: int, on_tokens: Callable[[int], None] = lambda done: None) -> float:
    """Total nats of a text read as one stream; the arguments are those of `stream_nll`."""
    return sum(float(nll_T.sum(dtype=np.float64)) for nll_T in _windows_nll(engine, ids, eos_id, on_tokens))


def stream_nll(
    engine: Engine, ids: Ids, eos_id: int, on_tokens: Callable[[int], None] = lambda done: None
) -> NDArray[np.float32]:
    """Give the nats of each token of a text read as one stream, (N,).

    Args:
        engine: the network; its state is carried from the first token to the last.
        ids: (N,).
        eos_id: what stands before the first token.
        on_tokens: told how many tokens are done.
    """
    return np.concatenate(list(_windows_nll(engine, ids, eos_id, on_tokens)))


def _windows_nll(
    engine: Engine, ids: Ids, eos_id: int, on_tokens: Callable[[int], None]
) -> Iterator[NDArray[np.float32]]:
    """Give what `stream_nll` does window by window, (T,)."""
    state = engine.initial_state(1)
    for inputs_1T, targets_1T, done in windows(ids, eos_id):
        nll_1T, state = engine.nll(inputs_1T, targets_1T, state)
        yield nll_1T[0]
        on_tokens(done)


def windows(ids: Ids, eos_id: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """Cut a stream, (N,), into windows: inputs (1, T), targets (1, T), and how many tokens are done after it."""
    before = eos_id
    for start in range(0, len(ids), EVALUATION_WINDOW):
        targets_1T = np.asarray(ids[start : start + EVALUATION_WINDOW], dtype=np.int64)[None]
        yield np.concatenate([[[before]], targets_1T[:, :-1]], axis=1), targets_1T, start + targets_1T.shape[1]
        before = int(targets_1T[0, -1])


def score_lines(
    engine: Engine,
    tokenizer: Tokenizer,
    lines: Iterable[str],
    *,
    lines_at_once: int = 256,
    score_rows: Callable[[list[list[int]]], list[float]] | None = None,
) -> Iterator[tuple[str, Score]]:
    """Score each line by itself, from a zero state and an <eos>: a stream of (line, score), in order.

    Memory is constant; a line's score does not depend on the lines around it.

    Args:
        engine: the network.
        tokenizer: its tokenizer.
        lines: without their line ends.
        lines_at_once: lines held together, and sorted by length so that little is padded.
        score_rows: gives the nats of some lines' ids in another way, as `ulimi.marginal.Marginal.score_rows` does.
    """
    score_rows = score_rows or partial(_score_rows, engine, tokenizer.eos_id)
    rows_at_once = ROWS_AT_ONCE if engine.batch_invariant else 1
    lines = iter(lines)
    while batch := list(islice(lines, lines_at_once)):
        ids = tokenizer.encode_lines(batch)
        nats = [0.0] * len(batch)
        by_length = sorted(range(len(batch)), key=lambda i: len(ids[i]))
        for start in range(0, len(batch), rows_at_once):
            rows = by_length[start : start + rows_at_once]
            for row, row_nats in zip(rows, score_rows([ids[i] for i in rows]), strict=True):
                nats[row] = row_nats
        for line, line_ids, line_nats in zip(batch, ids, nats, strict=True):
            yield line, Score.of(line_nats, len(line_ids), count_stats([line]))


def _score_rows(engine: Engine, eos_id: int, rows: list[list[int]]) -> list[float]:
    longest = max(map(len, rows))
    # Pads stand after a row's own tokens and are not counted, so they change nothing; any id will do.
    targets_BN = np.full((len(rows), longest), eos_id, dtype=np.int64)
    counted_BN: NDArray[np.bool_] = np.zeros((len(rows), longest), dtype=bool)
    for row, ids in enumerate(rows):
        targets_BN[row, : len(ids)] = ids
        counted_BN[row, : len(ids)] = True
    inputs_BN = np.concatenate([np.full((len(rows), 1), eos_id, dtype=np.int64), targets_BN[:, :-1]], axis=1)
    state = engine.initial_state(len(rows))
    nats = np.zeros(len(rows))
    for start in range(0, longest, EVALUATION_WINDOW):
        window = slice(start, start + EVALUATION_WINDOW)
        nll_BT, state = engine.nll(inputs_BN[:, window], targets_BN[:, window], state)
        nats += np.where(counted_BN[:, window], nll_BT, 0.0).sum(axis=1, dtype=np.float64)
    return nats.tolist()


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
