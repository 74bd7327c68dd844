"""Generation against brute force, exact distributions, and an engine that records what it is fed.

The engine is a table, no network: the logits depend on the last id and on the one before it, which only the
state knows. A row that is handed the state of another therefore gives other tokens.
"""

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ulimi.engine import Engine, load_engine
from ulimi.errors import UlimiError
from ulimi.generate import Step, generate, score_prompt
from ulimi.sampling import Sampling, filter_logits, log_softmax, sample

INF = math.inf
GREEDY = Sampling(temperature=0)
FakeState = tuple[tuple[int, ...], ...]  # what each row has seen


class TableEngine:
    """Logits from `table[id before the last, last id]`; `fed` lists the ids of each call."""

    alpha = 1.0
    batch_invariant = True

    def __init__(self, table_VVV: NDArray[np.float32]) -> None:
        self.table_VVV = table_VVV
        self.vocab_size = len(table_VVV)
        self.fed: list[list[int]] = []

    def initial_state(self, batch_size: int) -> FakeState:
        return ((),) * batch_size

    def step(self, ids_B: NDArray[np.int64], state: FakeState) -> tuple[NDArray[np.float32], FakeState]:
        assert ids_B.shape == (len(state),)
        assert ids_B.dtype == np.int64
        self.fed.append(ids_B.tolist())
        state = tuple((*seen, token) for seen, token in zip(state, ids_B.tolist(), strict=True))
        return np.stack([self.logits_after(seen) for seen in state]), state

    def prime(self, ids: Sequence[int], state: FakeState) -> tuple[NDArray[np.float32], FakeState]:
        assert len(state) == 1
        assert len(ids) > 0
        self.fed.append(list(ids))
        state = ((*state[0], *ids),)
        return self.logits_after(state[0])[None], state

    def repeat_state(self, state: FakeState, n: int) -> FakeState:
        assert len(state) == 1
        return state * n

    def select_state(self, state: FakeState, rows: Sequence[int]) -> FakeState:
        return tuple(state[row] for row in rows)

    def logits_after(self, seen: Sequence[int]) -> NDArray[np.float32]:
        return self.table_VVV[seen[-2] if len(seen) > 1 else 0, seen[-1]]


def make_engine(vocab_size: int = 7, seed: int = 0) -> TableEngine:
    rng = np.random.default_rng(seed)
    return TableEngine(rng.normal(scale=1.5, size=(vocab_size,) * 3).astype(np.float32))


def texts_of(steps: list[Step]) -> dict[int, list[int]]:
    texts: dict[int, list[int]] = {}
    for step in steps:
        texts.setdefault(step.row, []).append(step.id)
    return texts


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def brute_force(logits: list[float], sampling: Sampling) -> tuple[set[int], float]:
    """Find the ids that the filters keep, trying every subset for top-p, and how near to p any subset comes."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return set(order[:1]), INF
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    if sampling.top_p == 1:
        return set(order), INF
    probs = dict(zip(order, softmax([logits[token] / sampling.temperature for token in order]), strict=True))
    subsets = [c for size in range(1, len(order) + 1) for c in itertools.combinations(order, size)]
    masses = [math.fsum(probs[token] for token in subset) for subset in subsets]
    smallest = min(len(subset) for subset, mass in zip(subsets, masses, strict=True) if mass >= sampling.top_p)
    return set(order[:smallest]), min(abs(mass - sampling.top_p) for mass in masses)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 8),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
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
    Sampling(temperature=1e308, top_k=10**9, top_p=5e-324)


# Filters


@settings(max_examples=300, deadline=None)
@given(logits_batches(), SAMPLINGS)
def test_the_filters_keep_what_brute_force_keeps_and_scale_it(logits_BV, sampling):
    filtered_BV = filter_logits(logits_BV, sampling)
    assert filtered_BV.shape == logits_BV.shape
    for row, filtered in zip(logits_BV.tolist(), filtered_BV.tolist(), strict=True):
        kept, margin = brute_force(row, sampling)
        assume(margin > 1e-9)  # rounding decides on the very edge, which has a test of its own
        kept = {token for token in kept if row[token] > -INF}
        assert {token for token, x in enumerate(filtered) if x > -INF} == kept
        for token in kept:
            assert filtered[token] == pytest.approx((row[token] - max(row)) / (sampling.temperature or 1.0))


@settings(max_examples=100, deadline=None)
@given(logits_batches(), SAMPLINGS)
def test_a_row_is_filtered_alike_alone_and_in_a_batch(logits_BV, sampling):
    alone = [filter_logits(row[None], sampling) for row in logits_BV]
    np.testing.assert_array_equal(filter_logits(logits_BV, sampling), np.concatenate(alone))


def test_the_filters_leave_their_input_alone():
    logits_BV = np.array([[1.0, 2.0, 3.0]])
    filter_logits(logits_BV, Sampling(temperature=0.5, top_k=2, top_p=0.5))
    log_softmax(logits_BV)
    assert logits_BV.tolist() == [[1.0, 2.0, 3.0]]


def test_the_default_sampling_changes_no_probability():
    logits_BV = make_engine().table_VVV[0]
    np.testing.assert_array_equal(log_softmax(filter_logits(logits_BV, Sampling())), log_softmax(logits_BV))


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


def test_the_nucleus_keeps_the_ids_of_its_tokens():
    probs_BV = np.array([[0.05, 0.5, 0.15, 0.3], [0.3, 0.15, 0.5, 0.05]])
    filtered_BV = filter_logits(np.log(probs_BV), Sampling(top_p=0.7))
    expected_BV = [[0, 0.5 / 0.8, 0, 0.3 / 0.8], [0.3 / 0.8, 0, 0.5 / 0.8, 0]]
    np.testing.assert_allclose(np.exp(log_softmax(filtered_BV)), expected_BV)


def test_a_nucleus_that_reaches_p_exactly_takes_no_more():
    assert np.isfinite(filter_logits([[0, 0, 0, 0]], Sampling(top_p=0.5))).tolist() == [[True, True, False, False]]


def test_top_p_measures_what_temperature_and_top_k_left():
    logits_BV = np.log([[0.4, 0.3, 0.2, 0.1]])
    # 0.4 / (0.4 + 0.3) = 0.57 reaches p only after top-k has taken the rest away.
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5))).sum() == 2
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5, top_k=2))).sum() == 1
    # Squared, 0.16 / 0.30 reaches p alone.
    assert np.isfinite(filter_logits(logits_BV, Sampling(top_p=0.5, temperature=0.5))).sum() == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e308])
def test_an_extreme_temperature_neither_overflows_nor_empties_a_row(temperature):
    logits_BV = np.array([[-3e38, 1.0, 3e38, 2.0]], dtype=np.float32)
    filtered_BV = filter_logits(logits_BV, Sampling(temperature=temperature, top_k=2, top_p=0.9))
    assert filtered_BV.max() == 0.0
    assert not np.isnan(filtered_BV).any()


def test_log_softmax_is_normalised_and_survives_large_logits():
    logits_BV = np.array([[1e30, 1e30, -INF], [-700.0, 700.0, 699.0], [0.0, 1.0, 2.0]])
    log_probs_BV = log_softmax(logits_BV)
    assert log_probs_BV.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_probs_BV), [softmax(row) for row in logits_BV.tolist()], atol=1e-15)


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [-INF, -INF, -INF], [0.0, INF, 1.0], [math.nan] * 3])
@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=2, top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error(row, sampling):
    logits_BV = np.array([[1.0, 2.0, 3.0], row])
    rngs = [np.random.default_rng(0)] * 2
    for call in (lambda: sample(logits_BV, sampling, rngs), lambda: log_softmax(logits_BV)):
        with pytest.raises(UlimiError, match="not finite"):
            call()


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2), Sampling(top_k=3), Sampling(top_p=0.65)],
    ids=repr,
)
def test_sampled_frequencies_match_the_exact_probabilities(sampling):
    logits = np.log([0.08, 0.35, 0.02, 0.25, 0.1, 0.2])
    kept, _ = brute_force(logits.tolist(), sampling)
    weights = [math.exp(x / sampling.temperature) if token in kept else 0.0 for token, x in enumerate(logits)]
    num_draws = 20_000
    expected = num_draws * np.array(weights) / math.fsum(weights)
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


def test_a_removed_token_never_comes_out_even_at_the_ends_of_the_draw():
    class Ends(np.random.Generator):
        def __init__(self, value: float) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def random(self, *_args, **_kwargs):
            return self.value

    logits_BV = np.array([[-INF, 0.0, -INF, 0.0, -INF]] * 2)
    assert sample(logits_BV, Sampling(), [Ends(0.0), Ends(1 - 2**-53)]).tolist() == [1, 3]


def test_greedy_takes_the_lowest_id_among_equals():
    assert sample([[1, 3, 3], [2, 0, 2]], GREEDY, []).tolist() == [1, 0]


# Generation


def test_every_prompt_id_is_fed_once_and_then_every_token_but_the_last():
    engine = make_engine()
    prompt = [0, 3, 5, 5, 2]
    steps = list(generate(engine, prompt, sampling=Sampling(), max_tokens=4, num=1))
    assert len(steps) == 4
    assert engine.fed == [prompt, *([step.id] for step in steps[:-1])]


def test_the_prompt_is_fed_once_for_all_rows():
    engine = make_engine()
    steps = list(generate(engine, [0, 4], sampling=Sampling(), max_tokens=3, num=5))
    assert [step.row for step in steps] == [0, 1, 2, 3, 4] * 3
    assert engine.fed == [[0, 4], [step.id for step in steps[:5]], [step.id for step in steps[5:10]]]


def test_greedy_follows_the_argmax():
    engine = make_engine()
    steps = list(generate(engine, [0, 2], sampling=GREEDY, max_tokens=10))
    seen = [0, 2]
    for step in steps:
        assert step.id == engine.logits_after(seen).argmax()
        seen.append(step.id)


def test_generated_texts_have_their_exact_joint_probability():
    engine = make_engine(vocab_size=3, seed=5)
    num, prompt = 6000, [0, 1]
    texts = texts_of(list(generate(engine, prompt, sampling=Sampling(), max_tokens=2, num=num)))
    counts = Counter(tuple(text) for text in texts.values())
    chi_square = 0.0
    for first, second in itertools.product(range(3), repeat=2):
        prob = softmax(engine.logits_after(prompt).tolist())[first]
        prob *= softmax(engine.logits_after([*prompt, first]).tolist())[second]
        chi_square += (counts[first, second] - num * prob) ** 2 / (num * prob)
    assert chi_square < 26.1  # 0.999 with 8 degrees of freedom


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=4, top_p=0.9)], ids=repr)
def test_a_row_is_the_same_for_any_number_of_rows(sampling):
    def rows(num: int) -> dict[int, list[Step]]:
        steps = generate(make_engine(), [0, 1], sampling=sampling, max_tokens=12, num=num, seed=9, stop_ids=[6])
        return {
            row: list(group) for row, group in itertools.groupby(sorted(steps, key=lambda s: s.row), lambda s: s.row)
        }

    many = rows(8)
    for num in (1, 3):
        assert rows(num) == {row: many[row] for row in range(num)}
    assert len({tuple(step.id for step in row) for row in many.values()}) > 5  # short rows may agree by chance


def test_a_row_of_the_int8_engine_is_the_same_for_any_number_of_rows(tiny_run):
    engine = load_engine(tiny_run, kind="onnx")
    prompt = tiny_run.tokenizer.encode("Abantu")

    def first_row(num: int) -> list[Step]:
        steps = generate(engine, prompt, sampling=Sampling(), max_tokens=60, num=num, seed=3)
        return [step for step in steps if step.row == 0]

    assert first_row(1) == first_row(3)


def test_the_seed_decides_the_text():
    def text(seed: int) -> list[int]:
        return [s.id for s in generate(make_engine(), [0], sampling=Sampling(), max_tokens=20, seed=seed)]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_row_ends_with_its_stop_id_and_the_others_go_on_unchanged():
    stop = 6
    options = {"sampling": Sampling(), "max_tokens": 15, "num": 10}
    engine = make_engine()
    stopped = texts_of(list(generate(engine, [0, 1], stop_ids={stop}, **options)))
    free = texts_of(list(generate(make_engine(), [0, 1], **options)))
    for row, text in free.items():
        assert stopped[row] == text[: text.index(stop) + 1 if stop in text else len(text)]
    assert len({len(text) for text in stopped.values()}) > 3  # the test is about rows that end apart
    # Fed: the prompt, and from each row all but its last token.
    assert engine.fed[0] == [0, 1]
    assert sum(map(len, engine.fed[1:])) == sum(len(text) - 1 for text in stopped.values())


def test_should_stop_sees_the_row_and_its_own_ids_and_ends_it_alone():
    calls: list[tuple[int, list[int]]] = []

    def should_stop(row: int, ids: list[int]) -> bool:
        calls.append((row, list(ids)))
        ids.clear()  # a copy: what the caller does to it changes nothing
        return len(calls[-1][1]) > row

    options = {"sampling": Sampling(), "max_tokens": 6, "num": 4}
    steps = list(generate(make_engine(), [0, 1], should_stop=should_stop, **options))
    free = texts_of(list(generate(make_engine(), [0, 1], **options)))
    assert texts_of(steps) == {row: free[row][: row + 1] for row in range(4)}
    assert sorted(calls) == sorted((row, free[row][:end]) for row in range(4) for end in range(1, row + 2))


def test_should_stop_is_not_asked_about_a_stop_id():
    options = {"sampling": GREEDY, "max_tokens": 1, "stop_ids": range(7)}
    list(generate(make_engine(), [0], should_stop=lambda row, ids: pytest.fail("asked"), **options))


def test_the_logprobs_are_those_of_the_model_whatever_the_sampling():
    engine = make_engine()
    prompt, sampling = [0, 1], Sampling(temperature=0.7, top_k=5, top_p=0.8)
    seen = {row: list(prompt) for row in range(4)}
    for step in generate(engine, prompt, sampling=sampling, max_tokens=8, num=4):
        logits = engine.logits_after(seen[step.row]).tolist()
        assert step.logprob == pytest.approx(math.log(softmax(logits)[step.id]))
        seen[step.row].append(step.id)


def test_the_logprobs_of_all_texts_of_a_length_sum_to_one():
    engine = make_engine(vocab_size=4)
    texts = itertools.product(range(4), repeat=3)
    totals = [sum(step.logprob for step in score_prompt(engine, [0, *text])) for text in texts]
    assert math.fsum(map(math.exp, totals)) == pytest.approx(1.0)


def test_a_generated_text_scores_as_it_was_generated():
    steps = list(generate(make_engine(), [3], sampling=Sampling(), max_tokens=10))
    engine = make_engine()
    ids = [3, *(step.id for step in steps)]
    assert score_prompt(engine, ids) == steps
    assert engine.fed == [[token] for token in ids[:-1]]


def test_one_id_alone_has_nothing_to_score():
    assert score_prompt(make_engine(), [2]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [0, 7]}, "prompt_ids holds 7; this model's ids are 0 to 6"),
        ({"prompt_ids": [-1]}, "prompt_ids holds -1"),
        ({"stop_ids": [99]}, "stop_ids holds 99"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more; got 0"),
        ({"num": 0}, "num must be 1 or more; got 0"),
        ({"seed": -3}, "seed must be 0 or more; got -3"),
    ],
)
def test_a_wrong_argument_is_refused_at_the_call_before_anything_is_fed(change, message):
    engine = make_engine()
    options = {"prompt_ids": [0], "sampling": Sampling(), "max_tokens": 3} | change
    with pytest.raises(UlimiError, match=message):
        generate(engine, **options)
    assert engine.fed == []


@pytest.mark.parametrize("ids", [[], [7], [0, -1]])
def test_ids_that_cannot_be_scored_are_refused(ids):
    with pytest.raises(UlimiError, match="ids"):
        score_prompt(make_engine(), ids)


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY], ids=repr)
def test_a_diverged_model_is_an_error_and_never_a_token(sampling):
    engine = make_engine()
    engine.table_VVV[:] = np.nan
    with pytest.raises(UlimiError, match="not finite"):
        next(generate(engine, [0], sampling=sampling, max_tokens=1))
    with pytest.raises(UlimiError, match="not finite"):
        score_prompt(engine, [0, 1])


def test_the_fake_engine_keeps_the_protocol():
    engine: Engine = make_engine()
    assert engine.vocab_size == 7


def test_generation_loads_without_torch():
    code = "import sys, ulimi.generate; assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
