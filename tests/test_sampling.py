"""Rules, filters and draws against brute force in plain Python, on small vocabularies."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from test_distribution import bisected
from test_generate import GREEDY, make_engine, softmax
from ulimi.distribution import Softmax, log_probs
from ulimi.errors import UlimiError
from ulimi.sampling import (
    NoRepeatNgram,
    RepetitionPenalty,
    Sampling,
    apply_rules,
    best_ids,
    checked_logits,
    draw,
    filter_logits,
    sample,
)

INF = math.inf


def nucleus(probs: dict[int, float], order: list[int], share: float) -> tuple[list[int], float]:
    """Find the fewest tokens, the first of `order`, that hold a share, and how near to it any number of them comes."""
    total = math.fsum(probs[token] for token in order)
    masses = [math.fsum(probs[token] for token in order[:size]) / total for size in range(1, len(order) + 1)]
    smallest = next(size for size, mass in enumerate(masses, start=1) if mass >= share or size == len(order))
    return order[:smallest], min(abs(mass - share) for mass in masses)


def brute_force(logits: list[float], sampling: Sampling) -> tuple[dict[int, float], float]:
    """Find the probabilities of the ids that the filters keep, and how near to the edge any filter came."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return {order[0]: 1.0}, INF
    scaled = [x / sampling.temperature for x in logits]
    all_probs = softmax(scaled) if sampling.alpha == 1 else bisected(scaled, sampling.alpha)
    probs = dict(enumerate(all_probs))
    margin = min((p for p in all_probs if p > 0), default=INF)
    kept = order[: sampling.top_k] if sampling.top_k else order
    kept = [token for token in kept if probs[token] > 0]
    if sampling.top_p < 1:
        kept, near = nucleus(probs, kept, sampling.top_p)
        margin = min(margin, near)
    if sampling.min_p > 0:
        shares = {token: probs[token] / probs[kept[0]] for token in kept}
        kept = [token for token in kept if shares[token] >= sampling.min_p]
        margin = min(margin, *(abs(share - sampling.min_p) for share in shares.values()))
    if sampling.typical < 1:
        total = math.fsum(probs[token] for token in kept)
        information = {token: -math.log(probs[token] / total) for token in kept}
        entropy = math.fsum(probs[token] / total * information[token] for token in kept)
        oddness = {token: abs(information[token] - entropy) for token in kept}
        for one, other in itertools.combinations(kept, 2):
            # What is as odd on the other side of the entropy, but for rounding, is on the edge.
            if probs[one] != probs[other]:
                margin = min(margin, abs(oddness[one] - oddness[other]))
        ranked = sorted(kept, key=lambda token: (oddness[token], kept.index(token)))
        few, near = nucleus(probs, ranked, sampling.typical)
        margin = min(margin, near)
        kept = few
    total = math.fsum(probs[token] for token in kept)
    return {token: probs[token] / total for token in kept}, margin


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5]),
    alpha=st.sampled_from([1.0, 1.0, 1.2, 1.5, 2.0]),
    top_k=st.integers(0, 8),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.999)),
    typical=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)
ONE_FILTER = st.one_of(
    st.builds(Sampling, min_p=st.floats(0.01, 0.999)),
    st.builds(Sampling, typical=st.floats(0.01, 0.999)),
    st.builds(Sampling, alpha=st.floats(1.05, 2)),
    st.builds(Sampling, top_p=st.floats(0.01, 0.999)),
)


@st.composite
def logits_batches(draw: st.DrawFn) -> NDArray[np.float32]:
    """Draw logits (B, V) with many ties and some ruled-out tokens."""
    num_rows, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    element = st.sampled_from([-INF, -2.0, -1.0, 0.0, 0.0, 0.5, 1.0, 3.0])
    row = st.lists(element, min_size=num_tokens, max_size=num_tokens).filter(lambda row: max(row) > -INF)
    return np.array(draw(st.lists(row, min_size=num_rows, max_size=num_rows)), dtype=np.float32)


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, INF, -INF, math.nan)),
        *(("top_k", value) for value in (-1, 2.0, math.nan)),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, INF, math.nan)),
        *(("typical", value) for value in (0.0, -0.5, 1.01, INF, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.01, INF, math.nan)),
        *(("alpha", value) for value in (0.0, 0.99, 2.01, INF, math.nan)),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_line_that_names_it(field, value):
    with pytest.raises(UlimiError) as error:
        Sampling(**{field: value})
    assert str(error.value).startswith(field)
    assert str(error.value).endswith(f"got {value!r}")
    assert "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_allowed():
    Sampling(temperature=0, top_k=0, top_p=1)
    Sampling(temperature=1e308, top_k=10**9, top_p=5e-324, alpha=1, min_p=0, typical=5e-324)
    Sampling(alpha=2, min_p=1, typical=1)


# Filters


@settings(max_examples=500, deadline=None)
@given(logits_batches(), st.one_of(SAMPLINGS, ONE_FILTER))
def test_the_filters_leave_the_distribution_that_brute_force_leaves(logits_BV, sampling):
    filtered_BV = filter_logits(logits_BV, sampling)
    assert filtered_BV.shape == logits_BV.shape
    assert filtered_BV.max(axis=-1).tolist() == [0.0] * len(logits_BV)
    for row, filtered in zip(logits_BV.tolist(), filtered_BV.tolist(), strict=True):
        probs, margin = brute_force(row, sampling)
        assume(margin > 1e-9)  # rounding decides on the very edge, which has tests of its own
        assert {token for token, x in enumerate(filtered) if x > -INF} == set(probs)
        for token, p in zip(probs, softmax([filtered[token] for token in probs]), strict=True):
            assert p == pytest.approx(probs[token], rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(logits_batches(), SAMPLINGS)
def test_a_row_is_filtered_alike_alone_and_in_a_batch(logits_BV, sampling):
    alone = [filter_logits(row[None], sampling) for row in logits_BV]
    np.testing.assert_array_equal(filter_logits(logits_BV, sampling), np.concatenate(alone))


def test_the_filters_leave_their_input_alone():
    logits_BV = np.array([[1.0, 2.0, 3.0]])
    filter_logits(logits_BV, Sampling(temperature=0.5, top_k=2, top_p=0.5))
    assert logits_BV.tolist() == [[1.0, 2.0, 3.0]]


def test_the_default_sampling_changes_no_probability():
    logits_BV = make_engine().table_VVV[0]
    np.testing.assert_array_equal(log_probs(filter_logits(logits_BV, Sampling())), log_probs(logits_BV))


def test_ties_at_the_border_of_top_k_keep_exactly_k_and_the_lowest_ids():
    filtered_BV = filter_logits([[1, 5, 1, 1, 5], [2, 2, 2, 2, 2], [0, 1, 2, 3, 4]], Sampling(top_k=3))
    assert [np.flatnonzero(row > -INF).tolist() for row in filtered_BV] == [[0, 1, 4], [0, 1, 2], [2, 3, 4]]


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=150), Sampling(top_p=0.4), Sampling(top_k=350, top_p=0.4)], ids=repr
)
def test_ties_keep_the_order_of_ids_in_a_vocabulary_too_large_for_an_insertion_sort(sampling):
    logits_BV = np.random.default_rng(2).integers(0, 2, size=(3, 500))
    for row, filtered in zip(logits_BV.tolist(), filter_logits(logits_BV, sampling), strict=True):
        order = sorted(range(500), key=lambda token: (-row[token], token))
        kept = np.flatnonzero(filtered > -INF)
        assert kept.tolist() == sorted(order[: len(kept)])
        assert 1 < len(kept) < 500


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("share", [1e-9, 0.3, 0.8, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(scale, share):
    logits = np.random.default_rng(3).normal(scale=scale, size=3000)
    probs = dict(enumerate(softmax(logits.tolist())))
    kept, margin = nucleus(probs, sorted(probs, key=probs.__getitem__, reverse=True), share)
    assert margin > 1e-12
    assert np.flatnonzero(filter_logits([logits], Sampling(top_p=share))[0] > -INF).tolist() == sorted(kept)


def test_the_nucleus_keeps_the_ids_of_its_tokens():
    probs_BV = np.array([[0.05, 0.5, 0.15, 0.3], [0.3, 0.15, 0.5, 0.05]])
    filtered_BV = filter_logits(np.log(probs_BV), Sampling(top_p=0.7))
    expected_BV = [[0, 0.5 / 0.8, 0, 0.3 / 0.8], [0.3 / 0.8, 0, 0.5 / 0.8, 0]]
    np.testing.assert_allclose(np.exp(log_probs(filtered_BV)), expected_BV)


def test_a_nucleus_that_reaches_p_exactly_takes_no_more():
    assert np.isfinite(filter_logits([[0, 0, 0, 0]], Sampling(top_p=0.5))).tolist() == [[True, True, False, False]]


def test_top_p_measures_what_temperature_and_top_k_left():
    logits_BV = np.log([[0.4, 0.3, 0.2, 0.1]])
    # 0.4 / (0.4 + 0.3) = 0.57 reaches p only after top-k has taken the rest away.
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5))).sum() == 2
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5, top_k=2))).sum() == 1
    # Squared, 0.16 / 0.30 reaches p alone.
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5, temperature=0.5))).sum() == 1


def kept_ids(probs: list[float], **options) -> list[int]:
    (filtered_V,) = filter_logits([[math.log(p) if p else -INF for p in probs]], Sampling(**options))
    return np.flatnonzero(filtered_V > -INF).tolist()


def test_min_p_keeps_what_is_near_enough_to_the_best():
    assert kept_ids([0.1, 0.5, 0.26, 0.14], min_p=0.5) == [1, 2]
    assert kept_ids([0.1, 0.5, 0.26, 0.14], min_p=0.27) == [1, 2, 3]
    assert kept_ids([0.25, 0.5, 0.25], min_p=1) == [1]
    assert kept_ids([0.25, 0.25, 0.25, 0.25], min_p=1) == [0, 1, 2, 3]
    # It measures the distance that the temperature leaves, and nothing that top-p took away comes back.
    assert kept_ids([0.1, 0.5, 0.26, 0.14], min_p=0.5, temperature=2) == [1, 2, 3]
    assert kept_ids([0.1, 0.5, 0.26, 0.14], min_p=0.1, top_p=0.6) == [1, 2]


def test_typical_leaves_out_what_is_too_probable():
    probs = [0.4, 0.15, 0.15, 0.15, 0.15]  # an entropy of 1.505 nats: 0.222 a token
    assert kept_ids(probs, typical=0.1) == [1]
    assert kept_ids(probs, typical=0.5) == [1, 2, 3, 4]
    assert kept_ids(probs, typical=0.7) == [0, 1, 2, 3, 4]
    assert kept_ids(probs, typical=0.01, top_k=1) == [0]


def test_entmax_comes_after_the_temperature_and_before_the_filters():
    logits = [2.0, 1.0, 0.0]
    for temperature in (0.5, 1.0, 3.0):
        filtered_BV = filter_logits([logits], Sampling(temperature=temperature, alpha=1.5))
        expected = bisected([x / temperature for x in logits], 1.5)
        np.testing.assert_allclose(np.exp(log_probs(filtered_BV)), [expected], atol=1e-12)
    # Softmax gives the second 0.27 of the best one's 0.73, sparsemax nothing: top-k keeps no token without probability.
    assert np.isfinite(filter_logits([[1.0, 0.0]], Sampling(alpha=2, top_k=2))).tolist() == [[True, False]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e308])
def test_an_extreme_temperature_neither_overflows_nor_empties_a_row(temperature):
    logits_BV = np.array([[-3e38, 1.0, 3e38, 2.0]], dtype=np.float32)
    filtered_BV = filter_logits(logits_BV, Sampling(temperature=temperature, top_k=2, top_p=0.9))
    assert filtered_BV.max() == 0.0
    assert not np.isnan(filtered_BV).any()


def test_log_probs_is_normalised_and_survives_large_logits():
    logits_BV = np.array([[1e30, 1e30, -INF], [-700.0, 700.0, 699.0], [0.0, 1.0, 2.0]])
    log_probs_BV = log_probs(logits_BV)
    assert log_probs_BV.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_probs_BV), [softmax(row) for row in logits_BV.tolist()], atol=1e-15)


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [-INF, -INF, -INF], [0.0, INF, 1.0], [math.nan] * 3])
@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=2, top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error(row, sampling):
    logits_BV = np.array([[1.0, 2.0, 3.0], row])
    rngs = [np.random.default_rng(0)] * 2
    for call in (lambda: sample(logits_BV, sampling, rngs), lambda: filter_logits(logits_BV, sampling)):
        with pytest.raises(UlimiError, match="not finite"):
            call()


# Rules


@given(logits_batches(), st.floats(1, 4), st.lists(st.integers(0, 5), max_size=5))
def test_the_repetition_penalty_multiplies_log_probabilities(logits_BV, penalty, ids):
    logits_BV = logits_BV.astype(np.float64)
    ids = [token % logits_BV.shape[1] for token in ids]
    ruled_BV = apply_rules(logits_BV, [RepetitionPenalty(penalty)], [ids] * len(logits_BV))
    for row, ruled in zip(logits_BV.tolist(), ruled_BV.tolist(), strict=True):
        total = math.log(math.fsum(math.exp(x) for x in row))
        for token, (x, y) in enumerate(zip(row, ruled, strict=True)):
            assert y - total == pytest.approx(penalty * (x - total) if token in ids else x - total, abs=1e-9)


def test_a_penalty_beyond_all_floats_rules_out():
    ruled_BV = apply_rules(np.zeros((1, 5)), [RepetitionPenalty(1.7e308)], [[1, 3]])
    assert np.flatnonzero(ruled_BV[0] > -INF).tolist() == [0, 2, 4]


@given(logits_batches(), st.floats(1, 4), st.floats(-50, 50))
def test_the_repetition_penalty_does_not_see_a_constant_added_to_the_logits(logits_BV, penalty, constant):
    logits_BV = logits_BV.astype(np.float64)
    texts = [[0, logits_BV.shape[1] - 1]] * len(logits_BV)
    rules = [RepetitionPenalty(penalty)]
    moved_BV = log_probs(apply_rules(logits_BV + constant, rules, texts))
    np.testing.assert_allclose(moved_BV, log_probs(apply_rules(logits_BV, rules, texts)), atol=1e-9)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_no_ngram_comes_twice(ids, n):
    def ngrams(text: list[int]) -> list[tuple[int, ...]]:
        return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]

    logits_V = np.zeros(4)
    NoRepeatNgram(n)(ids, logits_V)
    allowed = {
        token for token in range(4) if ngrams([*ids, token])[-1:] and ngrams([*ids, token])[-1] not in ngrams(ids)
    }
    if len(ids) < n - 1:
        allowed = set(range(4))
    assert set(np.flatnonzero(logits_V > -INF)) == allowed


@pytest.mark.parametrize("penalty", [0.0, 0.99, -1.0, INF, math.nan])
def test_a_penalty_out_of_range_is_refused(penalty):
    with pytest.raises(UlimiError, match=r"repetition_penalty must be .*; got"):
        RepetitionPenalty(penalty)


def test_an_ngram_of_nothing_is_refused():
    with pytest.raises(UlimiError, match="no_repeat_ngram must be 1 or more; got 0"):
        NoRepeatNgram(0)


def test_rules_are_asked_in_their_order_each_row_about_its_own_text():
    asked = []

    def first(ids, logits_V):
        asked.append(("first", list(ids), logits_V.tolist()))
        logits_V[0] = -INF

    def second(ids, logits_V):
        asked.append(("second", list(ids), logits_V.tolist()))
        logits_V[1] *= 2

    logits_BV = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    ruled_BV = apply_rules(logits_BV, [first, second], [[7], [8, 9]])
    assert asked == [
        ("first", [7], [1.0, 2.0, 3.0]), ("second", [7], [-INF, 2.0, 3.0]),
        ("first", [8, 9], [4.0, 5.0, 6.0]), ("second", [8, 9], [-INF, 5.0, 6.0]),
    ]  # fmt: skip
    assert ruled_BV.tolist() == [[-INF, 4.0, 3.0], [-INF, 10.0, 6.0]]
    assert logits_BV.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]  # a copy was ruled


def test_rules_that_leave_nothing_are_an_error():
    def nothing(ids, logits_V):
        logits_V[:] = -INF

    with pytest.raises(UlimiError, match="the rules leave no token"):
        apply_rules(np.zeros((1, 3)), [nothing], [[0]])


@given(logits_batches(), st.integers(1, 8))
def test_the_best_ids_are_those_of_a_stable_sort(logits_BV, num):
    expected = [sorted(range(len(row)), key=lambda token: (-row[token], token))[:num] for row in logits_BV]
    assert best_ids(logits_BV.astype(np.float64), num).tolist() == expected


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [
        *(Sampling(), Sampling(temperature=0.5), Sampling(temperature=2), Sampling(top_k=3), Sampling(top_p=0.65)),
        *(Sampling(alpha=1.5), Sampling(alpha=2, temperature=1.5), Sampling(min_p=0.25), Sampling(typical=0.6)),
        Sampling(temperature=1.5, alpha=1.2, top_k=5, top_p=0.95, min_p=0.1, typical=0.8),
    ],
    ids=repr,
)
def test_sampled_frequencies_match_the_exact_probabilities(sampling):
    logits = np.log([0.08, 0.35, 0.02, 0.25, 0.1, 0.2])
    probs, _ = brute_force(logits.tolist(), sampling)
    num_draws = 20_000
    expected = num_draws * np.array([probs.get(token, 0.0) for token in range(len(logits))])
    ids = sample(np.tile(logits, (num_draws, 1)), sampling, [np.random.default_rng(1)] * num_draws)
    counts = np.bincount(ids, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 0.999 of a chi-square with 5 degrees of freedom; fewer need less


def test_a_row_makes_one_draw_and_greedy_makes_none():
    logits_BV = make_engine().table_VVV[0, :2]
    for sampling, num_draws in ((Sampling(top_k=1), 1), (Sampling(top_p=0.5), 1), (GREEDY, 0)):
        rngs, others = ([np.random.default_rng(seed) for seed in (3, 4)] for _ in range(2))
        sample(logits_BV, sampling, rngs)
        for rng, other in zip(rngs, others, strict=True):
            other.random(num_draws)
            assert rng.random() == other.random()


@given(logits_batches(), st.one_of(SAMPLINGS, ONE_FILTER, st.just(Sampling())))
def test_who_has_the_softmax_already_draws_the_same_and_keeps_it(logits_BV, sampling):
    for logits_V in checked_logits(logits_BV):
        softmax = Softmax(logits_V)
        kept = softmax.shifted_V.copy(), softmax.mass_V.copy()
        ids = [draw(logits_V, sampling, np.random.default_rng(seed), softmax) for seed in range(3)]
        assert ids == [draw(logits_V, sampling, np.random.default_rng(seed)) for seed in range(3)]
        np.testing.assert_array_equal(kept, (softmax.shifted_V, softmax.mass_V))


@pytest.mark.parametrize("size", [2, 5, 900])
def test_the_nucleus_ends_among_equals_with_the_lowest_ids(size):
    logits = np.zeros((1, 1000))
    logits[0, ::2] = 1.0  # 500 of them, together e / (e + 1) of all
    share = size / 500 * math.e / (math.e + 1) if size < 500 else 0.95
    kept = np.flatnonzero(np.isfinite(filter_logits(logits, Sampling(top_p=share - 1e-9))[0]))
    if size < 500:
        assert kept.tolist() == list(range(0, 2 * size, 2))
    else:
        rest = math.ceil((share - 1e-9 - math.e / (math.e + 1)) * (math.e + 1) * 500)
        assert kept.tolist() == sorted([*range(0, 1000, 2), *range(1, 2 * rest, 2)])


def test_a_removed_token_never_comes_out_even_at_the_ends_of_the_draw():
    class Ends(np.random.Generator):
        def __init__(self, value: float) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def random(self, *_args, **_kwargs):
            return self.value

    for other in (0.0, -0.5, -1.0, -40.0):  # the product of the last draw and the total may round to the total
        logits_BV = np.array([[-INF, 0.0, -INF, other, -INF]] * 2)
        assert sample(logits_BV, Sampling(), [Ends(0.0), Ends(1 - 2**-53)]).tolist()[0] == 1
        assert sample(logits_BV, Sampling(), [Ends(0.0), Ends(1 - 2**-53)]).tolist()[1] in (1, 3)


def test_draws_from_a_large_vocabulary_are_those_of_one_long_sum():
    logits = np.random.default_rng(5).normal(scale=3, size=1000)
    logits[np.random.default_rng(6).random(1000) < 0.3] = -INF
    ids = sample(np.tile(logits, (500, 1)), Sampling(), [np.random.default_rng(7)] * 500)
    mass = np.cumsum(softmax(logits.tolist()))
    rng = np.random.default_rng(7)
    assert ids.tolist() == [int(np.flatnonzero(mass > rng.random())[0]) for _ in range(500)]


def test_greedy_takes_the_lowest_id_among_equals():
    assert sample([[1, 3, 3], [2, 0, 2]], GREEDY, []).tolist() == [1, 0]
