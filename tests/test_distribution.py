"""Softmax and entmax in numpy against their authors' package, bisection from the definition, and closed forms."""

import math

import entmax as peer
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulimi.distribution import EPSILON, Softmax, log_probs, smoothed_nats

INF = math.inf
ALPHAS = [1.01, 1.1, 1.3, 1.5, 1.75, 1.9, 2.0]
logits_rows = st.lists(
    st.sampled_from([-INF, -30.0, -1.0, 0.0, 0.0, 0.25, 1.0, 1.5, 40.0]), min_size=1, max_size=7
).filter(lambda row: max(row) > -INF)


def bisected(row: list[float], alpha: float) -> list[float]:
    """Find entmax by its definition: p = [(alpha - 1) x - t]+ ^ (1 / (alpha - 1)), for the t where it sums to one."""
    scaled = [(alpha - 1) * (x - max(row)) for x in row]

    def probs(t: float) -> list[float]:
        return [max(x - t, 0.0) ** (1 / (alpha - 1)) if x > t else 0.0 for x in scaled]

    low, high = -1.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(probs(middle)) >= 1 else (low, middle)
    found = probs(low)
    return [p / math.fsum(found) for p in found]


@pytest.mark.parametrize("alpha", ALPHAS)
@settings(max_examples=60, deadline=None)
@given(row=logits_rows)
def test_entmax_is_that_of_the_definition(alpha, row):
    np.testing.assert_allclose(np.exp(log_probs([row], alpha)[0]), bisected(row, alpha), atol=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 2, 50, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_entmax_is_that_of_its_authors(num_tokens, scale):
    logits_BV = np.random.default_rng(num_tokens).normal(scale=scale, size=(5, num_tokens))
    x_BV = torch.from_numpy(logits_BV)
    np.testing.assert_allclose(np.exp(log_probs(logits_BV, 1.5)), peer.entmax15(x_BV, dim=-1), atol=1e-12)
    np.testing.assert_allclose(np.exp(log_probs(logits_BV, 2.0)), peer.sparsemax(x_BV, dim=-1), atol=1e-12)
    for alpha in ALPHAS:
        theirs = peer.entmax_bisect(x_BV, alpha=alpha, dim=-1, n_iter=100)
        np.testing.assert_allclose(np.exp(log_probs(logits_BV, alpha)), theirs, atol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
@settings(max_examples=60, deadline=None)
@given(row=logits_rows)
def test_what_every_distribution_keeps(alpha, row):
    log_probs_V = log_probs([row], alpha)[0]
    assert log_probs_V.dtype == np.float64
    assert math.fsum(np.exp(log_probs_V)) == pytest.approx(1.0, abs=1e-14)
    assert log_probs_V.max() == log_probs_V[int(np.argmax(row))]
    for x, y, p, q in zip(row, row[1:], log_probs_V, log_probs_V[1:], strict=False):
        assert (p >= q) if x >= y else (p <= q)
        assert x != y or p == q
    np.testing.assert_allclose(np.exp(log_probs([[x + 3.0 for x in row]], alpha)[0]), np.exp(log_probs_V), atol=1e-13)


def test_softmax_by_hand():
    np.testing.assert_allclose(log_probs([[0.0, math.log(3.0), -INF]])[0], [math.log(0.25), math.log(0.75), -INF])


def test_sparsemax_by_hand():
    # Of two tokens (x + 1 - y) / 2, until one has all.
    np.testing.assert_allclose(
        np.exp(log_probs([[0.5, 0.0], [1.0, 0.0], [7.0, 0.0]], 2.0)), [[0.75, 0.25], [1, 0], [1, 0]]
    )


def test_entmax_comes_from_softmax_and_goes_to_sparsemax():
    logits_BV = np.random.default_rng(0).normal(size=(3, 6))
    np.testing.assert_allclose(log_probs(logits_BV, 1.0001), log_probs(logits_BV, 1.0), atol=1e-3)
    sizes = [int(np.isfinite(log_probs(logits_BV * 3, alpha)).sum()) for alpha in [1.0, *ALPHAS]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 18
    assert sizes[-1] < 9


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_extremes(alpha):
    assert log_probs([[5.0]], alpha).tolist() == [[0.0]]
    assert log_probs([[-INF, -3.0, -INF]], alpha).tolist() == [[-INF, 0.0, -INF]]
    np.testing.assert_allclose(log_probs(np.zeros((1, 4000)), alpha), -math.log(4000), rtol=1e-9)
    for huge in (1e30, 1.7e308):
        assert np.exp(log_probs([[huge, -huge, huge]], alpha)).tolist() == [pytest.approx([0.5, 0.0, 0.5])]


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_a_row_is_the_same_alone_and_in_a_batch(alpha):
    logits_BV = np.random.default_rng(1).normal(scale=2, size=(7, 301))
    alone = [log_probs(row[None], alpha) for row in logits_BV]
    np.testing.assert_array_equal(log_probs(logits_BV, alpha), np.concatenate(alone))


def test_one_tokens_log_probability_is_that_among_all():
    for row in ([0.0, 3.0, -INF, 1.0], [1e30, 0.0, -1e30, 1e30], [-1.7e308, 1.7e308]):
        softmax = Softmax(np.array(row))
        for token, expected in enumerate(log_probs([row])[0]):
            assert softmax.log_prob(token) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_nan_makes_its_row_nan(alpha):
    assert np.isnan(log_probs([[0.0, math.nan, 1.0], [0.0, 0.0, 0.0]], alpha)).sum(axis=1).tolist() == [3, 0]


def test_the_input_is_left_alone():
    logits_BV = np.array([[1.0, 2.0, 3.0]])
    for alpha in (1.0, 1.5):
        log_probs(logits_BV, alpha)
    assert logits_BV.tolist() == [[1.0, 2.0, 3.0]]


def test_smoothed_nats():
    probs = np.array([[0.0, 0.25], [1.0, 1e-9]])
    for epsilon in (EPSILON, 0.1):
        expected = [[-math.log((p + epsilon) / (1 + epsilon * 40)) for p in row] for row in probs.tolist()]
        np.testing.assert_allclose(smoothed_nats(probs, 40, epsilon), expected)
    np.testing.assert_allclose(smoothed_nats(probs, 40), smoothed_nats(probs, 40, EPSILON))
    assert smoothed_nats(probs, 40, 0.0).tolist() == [[INF, -math.log(0.25)], [0.0, pytest.approx(-math.log(1e-9))]]


def test_smoothed_probabilities_sum_to_one():
    probs_V = np.exp(log_probs([[3.0, 1.0, 0.0, -4.0]], 1.5)[0])
    assert np.exp(-smoothed_nats(probs_V, 4, 0.01)).sum() == pytest.approx(1.0)
