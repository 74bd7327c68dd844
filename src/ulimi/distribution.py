"""From logits to probabilities: softmax, and entmax, which gives most tokens exactly nothing.

alpha-entmax (Peters, Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models") is softmax at alpha = 1 and
sparsemax at alpha = 2; a model that was trained with its loss (Martins, Marinho & Martins 2020, "Sparse Text
Generation") has it in softmax's place. A token without probability costs infinitely many nats, so the figures of a
sparse model are either smoothed by epsilon or bounded; the second paper's measures are here.

Shape letters: B rows, V vocabulary. Light floor: numpy alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-5
"""added to each probability of a sparse model where its nats are reported"""

ITERATIONS = 10_000
"""of Newton's method at most; ten do at alpha = 1.5, towards 1 it takes more"""


def log_probs(logits_BV: ArrayLike, alpha: float = 1.0) -> NDArray[np.float64]:
    """Give the log-probabilities (B, V), in nats and float64, of logits (B, V); -inf where there is no probability.

    Args:
        logits_BV: finite, or -inf for a token that is ruled out; not all of a row. A NaN makes its row NaN.
        alpha: 1 (softmax) to 2 (sparsemax).
    """
    x_BV = np.asarray(logits_BV, dtype=np.float64)
    shifted_BV = shifted(x_BV)
    if alpha == 1:
        log_probs_BV: NDArray[np.float64] = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=-1, keepdims=True))
        return log_probs_BV
    # Row by row: together, numpy would add up a row in another order for each batch that it is in.
    rows = [_log_entmax((alpha - 1) * row_V, 1 / (alpha - 1)) for row_V in shifted_BV.reshape(-1, x_BV.shape[-1])]
    return np.stack(rows).reshape(x_BV.shape)


def shifted(logits_BV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift each row so that its maximum is 0; no exponential of it then overflows."""
    with np.errstate(over="ignore"):  # further away than a float64 reaches is -inf, which is right
        shifted_BV: NDArray[np.float64] = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    return shifted_BV


class Softmax:
    """The softmax of one row of logits, (V,): what a draw from it and its result's log-probability both need.

    Args:
        logits_V: float64, as `log_probs` takes them.
    """

    def __init__(self, logits_V: NDArray[np.float64]) -> None:
        self.shifted_V = shifted(logits_V)
        self.mass_V: NDArray[np.float64] = np.exp(self.shifted_V)
        self.total: np.float64 = self.mass_V.sum()

    def log_prob(self, id: int) -> float:
        """Give one token's log-probability, as `log_probs` does."""
        return float(self.shifted_V[id] - np.log(self.total))


def _log_entmax(scaled_V: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Find the threshold t, for which the sum of [x - t]+ ^ power is 1, of numbers of which 0 is the largest.

    The sum falls with t and is convex, and it is not below 1 at t = -1: from there Newton's method comes nearer with
    each step and never passes.
    """
    if np.isnan(scaled_V).any():
        return np.full_like(scaled_V, np.nan)
    candidates = np.flatnonzero(scaled_V > -1)  # whoever is further below the best has no probability
    scaled_K = scaled_V[candidates]
    threshold = -1.0
    for _ in range(ITERATIONS):
        above_K = scaled_K[scaled_K > threshold] - threshold
        slope_K = above_K ** (power - 1)
        step = ((slope_K * above_K).sum() - 1) / (power * slope_K.sum())
        threshold += step
        if step < 1e-15:
            break
    log_probs_V = np.full_like(scaled_V, -np.inf)
    with np.errstate(divide="ignore"):
        log_probs_K = power * np.log(np.maximum(scaled_K - threshold, 0))
    # Rounding leaves the sum a little beside 1.
    log_probs_V[candidates] = log_probs_K - np.log(np.exp(log_probs_K).sum())
    return log_probs_V


def smoothed_nats(probs: ArrayLike, vocab_size: int, epsilon: float = EPSILON) -> NDArray[np.float64]:
    """Give -log((p + epsilon) / (1 + epsilon V)), whose mean's exponential is the epsilon-perplexity.

    Args:
        probs: of the targets, any shape.
        vocab_size: V.
        epsilon: above 0; 0 gives the nats themselves, infinite where p is 0.
    """
    p = np.asarray(probs, dtype=np.float64)
    with np.errstate(divide="ignore"):
        nats: NDArray[np.float64] = np.log1p(epsilon * vocab_size) - np.log(p + epsilon)
    return nats
