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
from numpy.typing import NDArray

from ulimi.distribution import log_probs
from ulimi.engine import Engine, load_engine
from ulimi.errors import UlimiError
from ulimi.generate import Start, Step, contrastive_search, generate, score_prompt
from ulimi.sampling import NoRepeatNgram, Sampling

INF = math.inf
GREEDY = Sampling(temperature=0)
FakeState = tuple[tuple[int, ...], ...]  # what each row has seen


class TableEngine:
    """Logits from `table[id before the last, last id]`; `fed` lists the ids of each call.

    The output of the last layer is, in its place, a vector of its own for each pair of ids.
    """

    batch_invariant = True

    def __init__(self, table_VVV: NDArray[np.float32], alpha: float = 1.0) -> None:
        self.table_VVV = table_VVV
        self.alpha = alpha
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

    def logits(self, inputs_BT: NDArray[np.int64], state: FakeState) -> tuple[NDArray[np.float32], FakeState]:
        steps = []
        for ids_B in inputs_BT.T:
            next_BV, state = self.step(ids_B, state)
            steps.append(next_BV)
        return np.stack(steps, axis=1), state

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: FakeState
    ) -> tuple[NDArray[np.float32], FakeState]:
        logits_BTV, state = self.logits(inputs_BT, state)
        log_probs_BTV = log_probs(logits_BTV, self.alpha)
        return -np.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0].astype(np.float32), state

    def repeat_state(self, state: FakeState, n: int) -> FakeState:
        assert len(state) == 1
        return state * n

    def select_state(self, state: FakeState, rows: Sequence[int]) -> FakeState:
        return tuple(state[row] for row in rows)

    def join_states(self, states: Sequence[FakeState]) -> FakeState:
        return tuple(seen for state in states for seen in state)

    def output(self, state: FakeState) -> NDArray[np.float32]:
        return np.stack([self.output_after(seen) for seen in state])

    def logits_after(self, seen: Sequence[int]) -> NDArray[np.float32]:
        return self.table_VVV[seen[-2] if len(seen) > 1 else 0, seen[-1]]

    def output_after(self, seen: Sequence[int]) -> NDArray[np.float32]:
        return np.random.default_rng(seen[-2:]).normal(size=5).astype(np.float32)


def make_engine(vocab_size: int = 7, seed: int = 0, alpha: float = 1.0) -> TableEngine:
    rng = np.random.default_rng(seed)
    return TableEngine(rng.normal(scale=1.5, size=(vocab_size,) * 3).astype(np.float32), alpha)


def texts_of(steps: list[Step]) -> dict[int, list[int]]:
    texts: dict[int, list[int]] = {}
    for step in steps:
        texts.setdefault(step.row, []).append(step.id)
    return texts


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


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


# Starts


STARTS = ((1,), (2, 0), (2, 3), (0, 1, 3))
"""what a text begins with: none is the beginning of another"""


def make_starts(engine: TableEngine, prompt: list[int]) -> list[Start]:
    steps = {ids: score_prompt(engine, [*prompt, *ids])[len(prompt) - 1 :] for ids in STARTS}
    return [
        Start(ids, math.fsum(step.logprob for step in steps[ids]), ((*prompt, *ids[:-1]),))
        for ids in STARTS
        if all(step.logprob > -INF for step in steps[ids])
    ]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_texts_that_begin_with_starts_come_as_often_as_the_model_says(alpha):
    engine, prompt, num = make_engine(4, seed=8, alpha=alpha), [0, 2], 6000
    starts = make_starts(engine, prompt)
    assert len(starts) > 1
    given = math.fsum(math.exp(start.logprob) for start in starts)
    joint = {
        (*start.ids, *rest): math.fsum(step.logprob for step in score_prompt(engine, [*prompt, *start.ids, *rest])[1:])
        for start in starts
        for rest in itertools.product(range(4), repeat=2)
    }
    assert math.fsum(map(math.exp, joint.values())) == pytest.approx(given)
    steps = list(generate(engine, prompt, sampling=Sampling(alpha=alpha), max_tokens=3, num=num, seed=5, starts=starts))
    texts = texts_of(steps)
    logprobs = {row: math.fsum(step.logprob for step in steps if step.row == row) for row in range(40)}
    for row, logprob in logprobs.items():
        assert logprob == pytest.approx(joint[tuple(texts[row])] - math.log(given))
    counts = Counter(tuple(text) for text in texts.values())
    expected = {text: num * math.exp(logprob) / given for text, logprob in joint.items()}
    assert all(expected[text] > 0 for text in counts)
    chi_square = sum((counts[text] - mean) ** 2 / mean for text, mean in expected.items() if mean > 0)
    assert chi_square < 110  # 0.9997 of a chi-square with 63 degrees of freedom


def test_greedy_takes_the_most_probable_start_and_top_k_the_best_ones():
    engine, prompt = make_engine(4, seed=2), [0, 2]
    starts = make_starts(engine, prompt)
    best, second, *_ = sorted(starts, key=lambda start: -start.logprob)
    text = texts_of(list(generate(engine, prompt, sampling=GREEDY, max_tokens=2, starts=starts)))[0]
    assert text[: len(best.ids)] == list(best.ids)
    assert text[-1] == engine.logits_after([*prompt, *best.ids]).argmax()
    steps = generate(engine, prompt, sampling=Sampling(top_k=2), max_tokens=1, num=50, starts=starts)
    assert {tuple(ids) for ids in texts_of(list(steps)).values()} == {best.ids, second.ids}


def test_a_start_counts_as_one_token_and_its_probability_comes_last():
    engine, prompt = make_engine(4), [0]
    (start,) = [start for start in make_starts(engine, prompt) if len(start.ids) == 3]
    for limit in (1, 2, 4):
        steps = list(generate(engine, prompt, sampling=Sampling(), max_tokens=limit, starts=[start]))
        assert len(steps) == 2 + limit
        assert [step.id for step in steps[:3]] == list(start.ids)
        assert [step.logprob for step in steps[:3]] == [0.0, 0.0, 0.0]  # it is certain: it was typed


def test_with_starts_too_a_row_is_the_same_for_any_number_of_rows():
    def rows(num: int) -> dict[int, list[Step]]:
        engine = make_engine(4, seed=1)
        options = {
            "sampling": Sampling(top_p=0.9),
            "max_tokens": 9,
            "stop_ids": {3},
            "starts": make_starts(engine, [2]),
        }
        steps = list(generate(engine, [2], num=num, seed=8, **options))
        return {row: [step for step in steps if step.row == row] for row in range(num)}

    many = rows(12)
    assert len({len(row) for row in many.values()}) > 3
    for num in (1, 5):
        assert rows(num) == {row: many[row] for row in range(num)}


def test_a_row_may_end_inside_its_start():
    engine = make_engine(4)
    options = {"sampling": Sampling(), "max_tokens": 3, "num": 30, "starts": make_starts(engine, [2])}
    stopped = texts_of(list(generate(engine, [2], should_stop=lambda row, ids: ids[-1] == 2, **options)))
    free = texts_of(list(generate(engine, [2], **options)))
    assert stopped == {row: text[: text.index(2) + 1] if 2 in text else text for row, text in free.items()}


# Rules


def test_rules_see_prompt_and_text_of_each_row():
    seen: list[tuple[int, list[int]]] = []

    def rules(row: int):
        def rule(ids, logits_V):
            seen.append((row, list(ids)))
            logits_V[row] = -INF

        return [rule]

    prompt = [5, 6]
    steps = list(generate(make_engine(), prompt, sampling=Sampling(), max_tokens=4, num=3, rules=rules))
    texts = texts_of(steps)
    assert all(row not in text for row, text in texts.items())
    assert sorted(seen) == sorted((row, prompt + texts[row][:n]) for row in range(3) for n in range(4))


def test_the_logprobs_are_the_models_own_whatever_the_rules():
    engine = make_engine()
    steps = list(generate(engine, [3], sampling=Sampling(), max_tokens=6, rules=[NoRepeatNgram(1)]))
    assert sorted([3, *(step.id for step in steps)]) == list(range(7))
    assert score_prompt(engine, [3, *(step.id for step in steps)]) == steps


def test_rules_that_leave_nothing_are_said():
    with pytest.raises(UlimiError, match="the rules leave no token"):
        list(generate(make_engine(4), [3], sampling=Sampling(), max_tokens=7, rules=[NoRepeatNgram(1)]))


# Contrastive search


def slow_contrastive(engine, prompt, *, penalty, top_k, max_tokens, stop_ids=(), rules=(), start=None):
    """Find the text from the formula, everything computed anew at each step."""

    def output(ids):
        vector = engine.output_after(ids).astype(float)
        return vector / math.sqrt(math.fsum(x * x for x in vector))

    text = list(start.ids) if start else []
    if text and text[-1] in stop_ids:
        return text
    while len(text) < max_tokens + max(0, len(start.ids) - 1 if start else 0):
        ids = [*prompt, *text]
        logits_V = engine.logits_after(ids).astype(float)
        for rule in rules:
            rule(ids, logits_V)
        probs = np.exp(log_probs(logits_V[None], engine.alpha))[0].tolist()
        candidates = [t for t in sorted(range(len(probs)), key=lambda t: (-probs[t], t))[:top_k] if probs[t] > 0]
        worth = {}
        for token in candidates:
            likeness = max(float(output([*ids, token]) @ output(ids[:n])) for n in range(1, len(ids) + 1))
            worth[token] = (1 - penalty) * probs[token] - penalty * likeness
        text.append(max(candidates, key=worth.get))
        if text[-1] in stop_ids:
            break
    return text


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("options", [
    {}, {"rules": [NoRepeatNgram(2)]}, {"stop_ids": {4}}, {"top_k": 1}, {"top_k": 7}, {"penalty": 1.0},
], ids=repr)  # fmt: skip
def test_contrastive_search_is_that_of_the_formula(alpha, options):
    for seed in range(5):
        engine = make_engine(seed=seed, alpha=alpha)
        options = {"penalty": 0.6, "top_k": 4, "max_tokens": 8, **options}
        steps = list(contrastive_search(engine, [0, 2, 5], **options))
        assert [step.id for step in steps] == slow_contrastive(engine, [0, 2, 5], **options)
        assert [step.logprob for step in steps] == pytest.approx(
            [step.logprob for step in score_prompt(engine, [0, 2, 5, *(step.id for step in steps)])[2:]]
        )


def test_contrastive_search_begins_with_the_best_start():
    for seed, limit in itertools.product(range(5), (1, 5)):
        engine = make_engine(4, seed=seed)
        starts = make_starts(engine, [2])
        best = max(starts, key=lambda start: start.logprob)
        options = {"penalty": 0.4, "top_k": 3, "max_tokens": limit, "stop_ids": {0}}
        steps = list(contrastive_search(engine, [2], starts=starts, **options))
        expected = slow_contrastive(engine, [2], start=best, **options)
        # A stop id inside the start ends the text there.
        if 0 in expected:
            expected = expected[: expected.index(0) + 1]
        assert [step.id for step in steps] == expected


def test_without_a_penalty_contrastive_search_is_greedy():
    greedy = list(generate(make_engine(), [0, 2], sampling=GREEDY, max_tokens=12))
    found = list(contrastive_search(make_engine(), [0, 2], penalty=0, top_k=5, max_tokens=12))
    assert [step.id for step in found] == [step.id for step in greedy]
    assert [step.logprob for step in found] == pytest.approx([step.logprob for step in greedy])


def test_contrastive_search_ends_where_it_is_told():
    free = [step.id for step in contrastive_search(make_engine(), [1], penalty=0.5, top_k=4, max_tokens=6)]
    stopped = contrastive_search(
        make_engine(), [1], penalty=0.5, top_k=4, max_tokens=6, should_stop=lambda row, ids: row == 0 and len(ids) == 3
    )
    assert [step.id for step in stopped] == free[:3]


@pytest.mark.parametrize(("change", "message"), [
    ({"penalty": -0.1}, "the contrastive penalty must be 0 to 1; got -0.1"),
    ({"penalty": math.nan}, "the contrastive penalty must be 0 to 1; got nan"),
    ({"top_k": 0}, "top_k must be 1 or more; got 0"),
    ({"max_tokens": 0}, "max_tokens must be 1 or more; got 0"),
    ({"prompt_ids": []}, "prompt_ids is empty"),
    ({"prompt_ids": [7]}, "prompt_ids holds 7"),
    ({"stop_ids": [-1]}, "stop_ids holds -1"),
])  # fmt: skip
def test_contrastive_search_refuses_a_wrong_argument_at_the_call(change, message):
    options = {"prompt_ids": [0], "penalty": 0.5, "top_k": 4, "max_tokens": 3} | change
    with pytest.raises(UlimiError, match=message):
        contrastive_search(make_engine(), **options)
