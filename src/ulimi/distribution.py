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
        logits_BV: finite, or -inf for a token that is ruled out; not all of a row.
        alpha: 1 (softmax) to 2 (sparsemax).
    """
    x_BV = np.asarray(logits_BV, dtype=np.float64)
    with np.errstate(over="ignore"):  # further away than a float64 reaches is -inf, which is right
        shifted_BV = x_BV - x_BV.max(axis=-1, keepdims=True)
    if alpha == 1:
        log_probs_BV: NDArray[np.float64] = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=-1, keepdims=True))
        return log_probs_BV
    return _log_entmax((alpha - 1) * shifted_BV, 1 / (alpha - 1))


def _log_entmax(scaled_BV: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Find each row's threshold t, for which the sum of [x - t]+ ^ power is 1.

    The sum falls with t and is convex, and -1 is not above the threshold, since the best x is 0: from there Newton's
    method comes nearer with each step and never passes it.
    """
    log_probs_BV = np.full_like(scaled_BV, -np.inf)
    # Whoever is more than 1 below the best has no probability.
    columns = np.flatnonzero((scaled_BV > -1).any(axis=0))
    scaled_BK = scaled_BV[:, columns]
    threshold_B1 = np.full((len(scaled_BK), 1), -1.0)
    for _ in range(ITERATIONS):
        above_BK = np.maximum(scaled_BK - threshold_B1, 0)
        slope_BK = above_BK ** (power - 1) if power > 1 else (above_BK > 0).astype(np.float64)
        excess_B1 = (slope_BK * above_BK).sum(axis=-1, keepdims=True) - 1
        step_B1 = excess_B1 / (power * slope_BK.sum(axis=-1, keepdims=True))
        threshold_B1 += step_B1
        if (step_B1 < 1e-15).all():
            break
    with np.errstate(divide="ignore"):
        log_probs_BK = power * np.log(np.maximum(scaled_BK - threshold_B1, 0))
    # What rounding left of the sum's distance from 1.
    log_probs_BK -= np.log(np.exp(log_probs_BK).sum(axis=-1, keepdims=True))
    log_probs_BV[:, columns] = log_probs_BK
    return log_probs_BV


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
