"""How the next token is chosen: rules that rule tokens out, filters on the distribution, one draw a row.

The order, the same everywhere:

    1  rules: a repetition penalty, then tokens that must not come
    2  temperature, then softmax, or alpha-entmax (Peters et al. 2019, "Sparse Sequence-to-Sequence Models")
    3  top-k (Fan et al. 2018, "Hierarchical Neural Story Generation")
    4  top-p, the nucleus (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration")
    5  min-p (Nguyen et al. 2024, "Turning Up the Heat")
    6  typical (Meister et al. 2023, "Locally Typical Sampling")

Each measures the distribution that those before it left.

Shape letters: B rows of the batch, V vocabulary, K candidates of a row, best first. This module knows ids and logits,
not strings. Among equal logits the lowest id comes first, everywhere: in greedy choice and in each filter.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulimi.distribution import Softmax, log_probs, shifted
from ulimi.errors import UlimiError

BLOCK = 64
"""tokens whose mass is summed up at once before the one that was drawn is looked for"""

Rule = Callable[[Sequence[int], NDArray[np.float64]], None]
"""Told a row's ids, the prompt's among them, and its logits (V,), some of which it lowers in place: to -inf where the
token must not come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults sample from the softmax of the logits.

    Raises:
        UlimiError: a value is outside its range.
    """

    temperature: float = 1.0  # divides the logits; 0 = greedy: the most probable token, whatever the filters
    alpha: float = 1.0  # of entmax: 1 = softmax, 2 = sparsemax; a sparse model's own is its `Engine.alpha`
    top_k: int = 0  # sample among the k most probable tokens; 0 = off
    top_p: float = 1.0  # sample in the smallest set of tokens that holds this much probability; 1 = off
    min_p: float = 0.0  # sample among the tokens at least this share as probable as the best; 0 = off
    typical: float = 1.0  # as top_p, those first whose information is nearest the entropy; 1 = off

    def __post_init__(self) -> None:
        # Each comparison is false for NaN.
        if not 0 <= self.temperature < math.inf:
            raise UlimiError(f"temperature must be a finite number, 0 (greedy) or more; got {self.temperature!r}")
        if not 1 <= self.alpha <= 2:
            raise UlimiError(f"alpha must be at least 1 (softmax) and at most 2 (sparsemax); got {self.alpha!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UlimiError(f"top_k must be a whole number, 0 (off) or more; got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise UlimiError(f"top_p must be above 0 and at most 1 (off); got {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            raise UlimiError(f"min_p must be at least 0 (off) and at most 1; got {self.min_p!r}")
        if not 0 < self.typical <= 1:
            raise UlimiError(f"typical must be above 0 and at most 1 (off); got {self.typical!r}")


UNFILTERED = Sampling()


class RepetitionPenalty:
    """Make tokens that the text has already less probable (Keskar et al. 2019, "CTRL").

    The penalty multiplies their log-probabilities (of softmax, for a sparse model too). The paper divides or multiplies
    the logits by their sign; but what zero is there means nothing, and the same model with a constant added to its
    logits would write another text.

    Args:
        penalty: above 1; 1 changes nothing.
    """

    def __init__(self, penalty: float) -> None:
        if not 1 <= penalty < math.inf:
            raise UlimiError(f"repetition_penalty must be a finite number, 1 (off) or more; got {penalty!r}")
        self._penalty = penalty

    def __call__(self, ids: Sequence[int], logits_V: NDArray[np.float64]) -> None:
        """Lower the logits of `ids`."""
        seen = np.unique(np.asarray(ids, dtype=np.int64))
        total = np.logaddexp.reduce(logits_V)
        with np.errstate(over="ignore"):  # what is too unlikely for a float is impossible
            logits_V[seen] = (logits_V[seen] - total) * self._penalty + total


class NoRepeatNgram:
    """Rule out each token that would repeat n tokens that the text has already (Paulus et al. 2017).

    Args:
        n: 1 or more.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise UlimiError(f"no_repeat_ngram must be 1 or more; got {n}")
        self._n = n

    def __call__(self, ids: Sequence[int], logits_V: NDArray[np.float64]) -> None:
        """Rule out what followed the last n - 1 ids before."""
        n, ids = self._n, list(ids)
        last = ids[len(ids) - n + 1 :]
        for start in range(len(ids) - n + 1):
            if ids[start : start + n - 1] == last:
                logits_V[ids[start + n - 1]] = -np.inf


def filter_logits(logits_BV: ArrayLike, sampling: Sampling) -> NDArray[np.float64]:
    """Give the logits (B, V) to sample from: steps 2 to 6 of the module's order.

    Removed tokens get -inf and the others keep their ids. Each row is shifted so that its maximum is 0, which
    changes no probability. A filter keeps the smallest set whose probability is at least what it asks for, hence
    never nothing. Temperature 0 keeps one token.

    Raises:
        UlimiError: a row has a NaN or +inf, or nothing but -inf.
    """
    x_BV = checked_logits(logits_BV)
    filtered_BV = np.full_like(x_BV, -np.inf)
    for x_V, filtered_V in zip(x_BV, filtered_BV, strict=True):
        ids_K, kept_K = _candidates(x_V, sampling)
        filtered_V[ids_K] = kept_K
    return filtered_BV


def sample(logits_BV: ArrayLike, sampling: Sampling, rngs: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """Choose one id a row, (B,), from the filtered logits, see `draw`.

    Raises:
        UlimiError: a row has a NaN or +inf, or nothing but -inf.
    """
    x_BV = checked_logits(logits_BV)
    if sampling.temperature == 0:  # no generators are needed
        best_B: NDArray[np.int64] = x_BV.argmax(axis=-1)
        return best_B
    return np.array([draw(x_V, sampling, rng) for x_V, rng in zip(x_BV, rngs, strict=True)], dtype=np.int64)


def draw(x_V: NDArray[np.float64], sampling: Sampling, rng: np.random.Generator, softmax: Softmax | None = None) -> int:
    """Choose an id from one row of `checked_logits`, (V,), after steps 2 to 6 of the module's order.

    It makes exactly one uniform draw, or none when greedy, so that a row's text does not depend on the batch that it
    is in. Who has the row's softmax spares it the same work.
    """
    if sampling.temperature == 0:
        return int(x_V.argmax())
    if sampling == UNFILTERED:
        return _place_of((softmax or Softmax(x_V)).mass_V, rng.random())
    ids_K, kept_K = _candidates(x_V, sampling, softmax)
    return int(ids_K[_place_of(np.exp(kept_K), rng.random())])


def _place_of(mass_K: NDArray[np.float64], share: float) -> int:
    """Invert the cumulative distribution: the first place up to which there is more than a share, 0 to 1, of all mass.

    It has a mass of its own: a removed id never comes out, also where rounding takes the share to the very end. A sum a
    block, and then one block, take a tenth of the time of summing up a vocabulary one by one.
    """
    blocks = np.add.reduceat(mass_K, np.arange(0, len(mass_K), BLOCK)).cumsum()
    enough = min(share * blocks[-1], np.nextafter(blocks[-1], 0))
    block = int(blocks.searchsorted(enough, side="right"))
    begin = block * BLOCK
    places = np.flatnonzero(mass_K[begin : begin + BLOCK])
    before = blocks[block - 1] if block else 0.0
    reached = before + mass_K[begin + places].cumsum()
    return begin + int(places[min(reached.searchsorted(enough, side="right"), len(places) - 1)])


def apply_rules(
    logits_BV: NDArray[np.float64], rules: Sequence[Rule], texts: Iterable[Sequence[int]]
) -> NDArray[np.float64]:
    """Step 1 of the module's order: give the logits (B, V) that the rules leave.

    Args:
        logits_BV: of `checked_logits`.
        rules: in the order in which they are asked.
        texts: each row's ids so far.

    Raises:
        UlimiError: the rules leave a row nothing.
    """
    if not rules:
        return logits_BV
    ruled_BV = logits_BV.copy()
    for ruled_V, ids in zip(ruled_BV, texts, strict=True):
        for rule in rules:
            rule(ids, ruled_V)
    if not np.isfinite(ruled_BV.max(axis=-1)).all():
        raise UlimiError("the rules leave no token: fewer banned words, or a larger no-repeat n-gram, leave some")
    return ruled_BV


def checked_logits(logits_BV: ArrayLike) -> NDArray[np.float64]:
    """Convert logits to float64, and refuse those that would make a choice meaningless.

    A single -inf is a token that the model rules out, and stays. The result is contiguous, because numpy adds up
    a row in another order, and rounds differently, when its elements lie apart.
    """
    x_BV = np.ascontiguousarray(logits_BV, dtype=np.float64)
    assert x_BV.ndim == 2, f"logits must be (B, V), got {x_BV.shape}"
    # The maximum of a row is NaN if any element is, and -inf if all are.
    if not np.isfinite(x_BV.max(axis=-1)).all():
        raise UlimiError(
            "the model's logits are not finite (NaN or infinity); its weights may have diverged in training"
        )
    return x_BV


def best_ids(x_BV: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """Give the ids of the `num` highest of each row, (B, K), best first, lowest id first among equals."""
    num_rows, num_tokens = x_BV.shape
    if num >= num_tokens:
        return np.argsort(-x_BV, axis=-1, kind="stable")
    # Partitioning first is about seven times as fast as sorting 8 rows of 8000 for the best 40.
    ids_BK = _among_best(x_BV, num).nonzero()[1].reshape(num_rows, num)  # in the order of ids, which the sort keeps
    order_BK = np.argsort(-np.take_along_axis(x_BV, ids_BK, axis=-1), axis=-1, kind="stable")
    best_BK: NDArray[np.int64] = np.take_along_axis(ids_BK, order_BK, axis=-1)
    return best_BK


def _among_best(x_BV: NDArray[np.float64], num: int) -> NDArray[np.bool_]:
    """Tell of each, (B, V), whether it is among the `num` highest of its row, at most V."""
    place = x_BV.shape[-1] - num
    border_B1 = np.partition(x_BV, place, axis=-1)[:, place, None]
    above_BV = x_BV > border_B1
    tied_BV = x_BV == border_B1
    num_ties_B1 = num - above_BV.sum(axis=-1, keepdims=True)
    among_BV: NDArray[np.bool_] = above_BV | (tied_BV & (tied_BV.cumsum(axis=-1) <= num_ties_B1))
    return among_BV


def _candidates(
    x_V: NDArray[np.float64], sampling: Sampling, softmax: Softmax | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give the ids that may come, (K,), in their order, and their logits, of which the largest is 0.

    Row by row: what is kept has another length in each, and a row of the size of a cache is quicker than all at once.
    """
    if sampling.temperature == 0:
        return np.array([x_V.argmax()]), np.zeros(1)
    kept_K = shifted(x_V) if softmax is None else softmax.shifted_V
    if sampling.temperature != 1:
        # After the shift, a tiny temperature sends all but the best tokens to -inf and never overflows upwards.
        with np.errstate(over="ignore"):
            kept_K = kept_K / sampling.temperature
    if sampling.alpha != 1:
        kept_K = shifted(log_probs(kept_K[None], sampling.alpha)[0])
    # The filters keep the order; ranking what the model gave, rather than its quotients, rounds nothing into ties.
    ids_K, x_K = np.arange(len(x_V)), x_V
    if 0 < sampling.top_k < len(x_V):
        best_K = _among_best(x_K[None], sampling.top_k)[0]
        ids_K, x_K, kept_K = ids_K[best_K], x_K[best_K], kept_K[best_K]
    if sampling.top_p < 1:
        mass_K = softmax.mass_V if softmax is not None and kept_K is softmax.shifted_V else np.exp(kept_K)
        places = _nucleus(x_K, mass_K, sampling.top_p)
        ids_K, x_K, kept_K = ids_K[places], x_K[places], kept_K[places]
    if sampling.min_p > 0:
        near_K = kept_K >= math.log(sampling.min_p)
        ids_K, x_K, kept_K = ids_K[near_K], x_K[near_K], kept_K[near_K]
    if sampling.typical < 1:
        places = _typical(x_K, kept_K, sampling.typical)
        ids_K, kept_K = ids_K[places], shifted(kept_K[places])  # the best may be the least typical of all
    return ids_K, kept_K


def _nucleus(x_K: NDArray[np.float64], mass_K: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Give the places of the fewest tokens, best first by `x_K`, that hold a share of all mass; in their order."""
    total = mass_K.sum()
    # All that have no more than this hold together less than what is left out: only the others need to be ranked.
    likely = np.flatnonzero(mass_K > 0.99 * (1 - share) * total / len(mass_K))
    mass_L = mass_K[likely]
    best_L = np.sort(mass_L)[::-1]
    num = min(_num_reaching(best_L, share * total), len(likely))
    places: NDArray[np.int64] = likely[mass_L >= best_L[num - 1]]
    if len(places) > num:  # some are as heavy as the last that is wanted
        places = likely[_among_best(x_K[likely][None], num)[0]]
    return places


def _typical(x_K: NDArray[np.float64], kept_K: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Give the places of the fewest tokens, those first whose information is nearest the entropy, with this share."""
    best_first = np.argsort(-x_K, kind="stable")
    log_probs_K = log_probs(kept_K[None])[0, best_first]
    information_K = np.where(np.isfinite(log_probs_K), -log_probs_K, 0.0)
    entropy = (np.exp(log_probs_K) * information_K).sum()
    oddness_K = np.where(np.isfinite(log_probs_K), np.abs(information_K - entropy), np.inf)
    ranked = best_first[np.argsort(oddness_K, kind="stable")]
    mass_K = np.exp(kept_K[ranked])
    return np.sort(ranked[: _num_reaching(mass_K, share * mass_K.sum())])


def _num_reaching(mass_K: NDArray[np.float64], enough: float) -> int:
    """Count the first ones that together have enough; at least one."""
    return int(mass_K.cumsum().searchsorted(enough)) + 1
