"""Beam search against the enumeration of all texts, and against a slow search written anew."""

import itertools
import math

import numpy as np
import pytest

from test_generate import TableEngine, make_engine
from ulimi.beam import Beams, Hypothesis, Required, beam_search
from ulimi.distribution import log_probs
from ulimi.errors import UlimiError
from ulimi.generate import Start, generate
from ulimi.sampling import NoRepeatNgram, RepetitionPenalty, Sampling

INF = math.inf
V = 4
PROMPT = [0, 2]
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]


def next_log_probs(engine: TableEngine, ids) -> np.ndarray:
    return log_probs(engine.logits_after([*PROMPT, *ids])[None], engine.alpha)[0]


def after_rules(own_V, ids, rules) -> np.ndarray:
    ruled_V = own_V.copy()
    for rule in rules(ids) if callable(rules) else rules:
        rule([*PROMPT, *ids], ruled_V)
    return ruled_V


def all_texts(
    engine, max_tokens, *, penalty=0.0, stops=(), should_stop=None, ends_before=None, rules=(), starts=()
) -> list[tuple[float, tuple[int, ...], list[float]]]:
    """Enumerate what a text may be, best first: (score, ids, log-probabilities)."""
    found = []

    def close(ids, logprobs, total, length):
        if total > -INF:
            found.append((total / length**penalty, tuple(ids), list(logprobs)))

    def grow(ids, logprobs, total, typed):
        length = len(ids) - typed
        if ids and (ids[-1] in stops or (should_stop and should_stop(list(ids))) or length == max_tokens):
            close(ids, logprobs, total, length)
            return
        own_V = next_log_probs(engine, ids)
        ruled_V = after_rules(own_V, ids, rules)
        ends_V = ends_before(list(ids)) if ends_before and ids else None
        if ends_V is not None:
            own, ruled = (math.fsum(math.exp(x) for x in x_V[ends_V]) for x_V in (own_V, ruled_V))
            if ruled:
                close(ids, [*logprobs, math.log(own)], total + math.log(ruled), length + 1)
        for token in range(engine.vocab_size):
            if (ends_V is None or not ends_V[token]) and ruled_V[token] > -INF:
                grow([*ids, token], [*logprobs, float(own_V[token])], total + float(ruled_V[token]), typed)

    if starts:
        given = math.log(math.fsum(math.exp(start.logprob) for start in starts))
        for start in starts:
            logprob = start.logprob - given
            grow(list(start.ids), [0.0] * (len(start.ids) - 1) + [logprob], logprob, len(start.ids) - 1)
    else:
        grow([], [], 0.0, 0)
    return sorted(found, key=lambda entry: -entry[0])


def same(ours: list[Hypothesis], truth) -> None:
    # Texts of the same transitions in another order are equal but for rounding.
    ours = sorted(ours, key=lambda hypothesis: (-round(hypothesis.score, 9), hypothesis.ids))
    truth = sorted(truth, key=lambda entry: (-round(entry[0], 9), entry[1]))
    assert [hypothesis.ids for hypothesis in ours] == [ids for _, ids, _ in truth]
    for hypothesis, (score, _, logprobs) in zip(ours, truth, strict=True):
        assert hypothesis.score == pytest.approx(score)
        assert hypothesis.logprobs == pytest.approx(logprobs)


def sums(ids: list[int]) -> bool:
    return sum(ids) >= 5


def two_endings(ids: list[int]):
    return np.array([True, False, True, False]) if sum(ids) % 2 else None


def long_enough(ids: list[int]):
    def rule(_ids, logits_V):
        if len(ids) < 2:
            logits_V[3] = -INF

    return [rule]


def some_starts(engine: TableEngine) -> list[Start]:
    """Of one, two and three tokens; they are not all that could be."""
    starts = []
    for ids in ((1,), (0, 3), (0, 1, 1), (3, 3)):
        logprob = math.fsum(next_log_probs(engine, ids[:place])[token] for place, token in enumerate(ids))
        if logprob > -INF:
            starts.append(Start(ids, logprob, ((*PROMPT, *ids[:-1]),)))
    return starts


CASES = {
    "plain": {},
    "stops": {"stops": {3}},
    "two stops": {"stops": {1, 3}},
    "should_stop": {"should_stop": sums, "stops": {0}},
    "ends_before": {"ends_before": two_endings},
    "ends_before and stops": {"ends_before": two_endings, "stops": {3}},
    "no bigram twice": {"rules": [NoRepeatNgram(2)], "stops": {3}},
    "penalty": {"rules": [RepetitionPenalty(1.7)], "stops": {3}},
    "long enough": {"rules": long_enough, "stops": {3}},
    "starts": {"starts": True, "stops": {3}},
    "starts, ends_before, rules": {"starts": True, "ends_before": two_endings, "rules": [RepetitionPenalty(1.3)]},
}


def case(name: str, engine: TableEngine):
    """Give the options for the enumeration, and for the search."""
    options = dict(CASES[name])
    if options.pop("starts", False):
        options["starts"] = some_starts(engine)
    search = dict(options)
    if "stops" in search:
        search["stop_ids"] = search.pop("stops")
    return options, search


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_wide_beam_is_the_enumeration_of_all_texts(name, penalty, alpha):
    engine = make_engine(V, seed=3, alpha=alpha)
    options, search = case(name, engine)
    truth = all_texts(engine, 4, penalty=penalty, **options)
    found = beam_search(engine, PROMPT, Beams(num=400, length_penalty=penalty), max_tokens=4, **search)
    same(found, truth)


def test_the_probabilities_of_all_texts_sum_to_one():
    """Whatever ends them: what is ended before is one ending, with the probability of all its tokens."""
    engine = make_engine(V, seed=5)
    for name in ("plain", "two stops", "ends_before", "starts"):
        found = beam_search(engine, PROMPT, Beams(num=400, length_penalty=0), max_tokens=4, **case(name, engine)[1])
        assert math.fsum(math.exp(hypothesis.score) for hypothesis in found) == pytest.approx(1.0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_stopping_early_loses_nothing_of_a_narrow_beam(name, width):
    for seed, penalty in itertools.product(range(6), PENALTIES):
        engine = make_engine(V, seed=seed)
        options, search = case(name, engine)
        truth = slow_search(engine, width, 5, penalty=penalty, **options)
        found = beam_search(engine, PROMPT, Beams(num=width, length_penalty=penalty), max_tokens=5, **search)
        same(found[:width], truth[:width])


def slow_search(
    engine, width, max_tokens, *, penalty=0.0, stops=(), should_stop=None, ends_before=None, rules=(), starts=()
):
    """Search as `beam_search` says, without state and never stopping early: (score, ids, log-probabilities)."""
    finished = []
    beam = [((), 0.0, [], 0)]

    def keep(candidates):
        kept = []
        for ids, total, logprobs, typed in sorted(candidates, key=lambda entry: -entry[1])[: 2 * width]:
            length = len(ids) - typed
            if ids[-1] in stops or (should_stop and should_stop(list(ids))) or length == max_tokens:
                finished.append((total / length**penalty, ids, logprobs))
            elif len(kept) < width:
                kept.append((ids, total, logprobs, typed))
        return kept

    if starts:
        given = math.log(math.fsum(math.exp(start.logprob) for start in starts))
        best = sorted(starts, key=lambda start: -start.logprob)[:width]
        beam = keep([
            (start.ids, start.logprob - given, [0.0] * typed + [start.logprob - given], typed)
            for start in best
            for typed in [len(start.ids) - 1]
        ])  # fmt: skip
    while beam:
        candidates = []
        for ids, total, logprobs, typed in beam:
            own_V = next_log_probs(engine, ids)
            ruled_V = after_rules(own_V, ids, rules)
            ends_V = ends_before(list(ids)) if ends_before and ids else None
            if ends_V is not None:
                own, ruled = (math.fsum(math.exp(x) for x in x_V[ends_V]) for x_V in (own_V, ruled_V))
                if ruled:
                    length = len(ids) - typed + 1
                    finished.append(((total + math.log(ruled)) / length**penalty, ids, [*logprobs, math.log(own)]))
            candidates += [
                ((*ids, token), total + ruled_V[token], [*logprobs, own_V[token]], typed)
                for token in range(V)
                if ruled_V[token] > -INF and (ends_V is None or not ends_V[token])
            ]
        beam = keep(candidates)
    return sorted(finished, key=lambda entry: -entry[0])


def test_the_score_is_the_log_probability_over_a_power_of_the_length():
    engine = make_engine(V)
    for penalty in PENALTIES:
        for found in beam_search(engine, PROMPT, Beams(num=5, length_penalty=penalty), max_tokens=6, stop_ids={3}):
            assert found.score == pytest.approx(math.fsum(found.logprobs) / len(found.ids) ** penalty)
            log_probabilities = [next_log_probs(engine, found.ids[:n])[token] for n, token in enumerate(found.ids)]
            assert found.logprobs == pytest.approx(log_probabilities)


@pytest.mark.parametrize("beams", [Beams(num=1), Beams(num=6), Beams(num=6, num_groups=3, diversity=0.4)], ids=repr)
def test_the_texts_are_distinct_best_first_and_as_many_as_the_beam_is_wide(beams):
    found = beam_search(make_engine(seed=9), PROMPT, beams, max_tokens=8, stop_ids={6})
    assert len(found) >= beams.num // beams.num_groups
    assert len({hypothesis.ids for hypothesis in found}) == len(found)
    assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)


def test_a_beam_of_one_is_greedy():
    engine = make_engine()
    greedy = list(generate(engine, PROMPT, sampling=Sampling(temperature=0), max_tokens=9))
    best, *_ = beam_search(engine, PROMPT, Beams(num=1), max_tokens=9)
    assert best.ids == tuple(step.id for step in greedy)
    assert best.logprobs == pytest.approx([step.logprob for step in greedy])


def test_a_longer_length_penalty_never_gives_a_shorter_best_text():
    for seed in range(8):
        lengths = []
        for penalty in PENALTIES:
            beams = Beams(num=300, length_penalty=penalty)
            best, *_ = beam_search(make_engine(V, seed), PROMPT, beams, max_tokens=5, stop_ids={3})
            lengths.append(len(best.ids))
        assert lengths == sorted(lengths)


def test_a_text_that_the_rules_leave_nothing_is_given_up_and_the_others_go_on():
    def no_way_on(ids, logits_V):
        if ids[-1] == 1:
            logits_V[:] = -INF

    engine = make_engine(V, seed=1)
    found = beam_search(engine, PROMPT, Beams(num=300, length_penalty=0), max_tokens=4, rules=[no_way_on])
    same(found, all_texts(engine, 4, rules=[no_way_on]))
    assert any(hypothesis.ids[-1] == 1 for hypothesis in found)
    assert all(1 not in hypothesis.ids[:-1] for hypothesis in found)

    def nothing(_ids, logits_V):
        logits_V[:] = -INF

    with pytest.raises(UlimiError, match="the rules leave no text"):
        beam_search(engine, PROMPT, Beams(num=3), max_tokens=4, rules=[nothing])


# Groups


def test_the_first_group_is_a_beam_of_its_own_width():
    engine = make_engine(seed=4)
    alone = beam_search(engine, PROMPT, Beams(num=2), max_tokens=7, stop_ids={6})
    groups = beam_search(engine, PROMPT, Beams(num=6, num_groups=3, diversity=1.5), max_tokens=7, stop_ids={6})
    assert set(alone[:2]) <= set(groups)
    assert 2 < len(groups) <= 6


@pytest.mark.parametrize("starts", [False, True])
def test_without_diversity_all_groups_find_the_same(starts):
    engine = make_engine(seed=4)
    options = {"max_tokens": 7, "stop_ids": {6}, "starts": some_starts(engine) if starts else ()}
    alone = beam_search(engine, PROMPT, Beams(num=2), **options)
    assert beam_search(engine, PROMPT, Beams(num=6, num_groups=3, diversity=0), **options) == alone[:2]


def test_great_diversity_begins_each_text_with_another_token():
    found = beam_search(make_engine(), PROMPT, Beams(num=7, num_groups=7, diversity=1e6), max_tokens=3)
    assert sorted(hypothesis.ids[0] for hypothesis in found) == list(range(7))
    for place in range(2):  # a text's last token is chosen by its score
        assert len({hypothesis.ids[place] for hypothesis in found}) == 7


def test_groups_are_those_of_a_slow_search():
    """Hamming diversity: at each step, a group's tokens cost the groups after it."""
    engine, diversity, max_tokens = make_engine(V, seed=8), 0.9, 4
    beams = [[((), 0.0)] for _ in range(3)]
    for step in range(max_tokens):
        chosen = np.zeros(V)
        last = step == max_tokens - 1
        for index, beam in enumerate(beams):
            grown = [
                ((*ids, token), total + next_log_probs(engine, ids)[token], diversity * chosen[token])
                for ids, total in beam
                for token in range(V)
            ]
            best = sorted(grown, key=lambda entry: entry[2] - entry[1])[: 4 if last else 2]
            beams[index] = [(ids, total) for ids, total, _ in best]
            for ids, *_ in [] if last else best:
                chosen[ids[-1]] += 1
    expected = {
        ids: pytest.approx(total / max_tokens)
        for beam in beams
        for ids, total in sorted(beam, key=lambda entry: -entry[1])[:2]
    }
    found = beam_search(engine, PROMPT, Beams(6, num_groups=3, diversity=diversity), max_tokens=max_tokens)
    assert {hypothesis.ids: hypothesis.score for hypothesis in found} == expected


# Required words: tokens 0 and 1 begin one, 2 and 3 go on in it, 4 is the line's end


BEGINS_V = np.array([True, True, False, False, True])
WORDS = [
    [Required((0, 2), (1, 2))],
    [Required((0,), (1,))],
    [Required((0, 2), (1, 2)), Required((0, 3), (1, 3))],  # that begin alike
    [Required((0,), (1,)), Required((0, 3), (1, 3))],  # of which one begins the other
    [Required((0, 3, 3), (1, 3, 3)), Required((1, 2), (0, 2))],
]
LINE = [0, 4]


def holds(ids: tuple[int, ...], word: Required, *, ended: bool) -> bool:
    """Whether the word is there as whole word; at the very end, if the text is `ended` there."""
    for place in range(len(ids)):
        before = ids[place - 1] if place else LINE[-1]
        spelling = word.at_start if before == 4 else word.inside
        end = place + len(spelling)
        if ids[place:end] == spelling and (BEGINS_V[ids[end]] if end < len(ids) else ended):
            return True
    return False


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("stops", [set(), {4}, {3}])
def test_a_wide_beam_finds_the_best_of_all_texts_with_the_required_words(words, stops):
    engine = make_engine(5, seed=6)
    texts = []
    for ids in itertools.product(range(5), repeat=5):
        end = next((place for place, token in enumerate(ids, start=1) if token in stops), 5)
        texts.append((ids[:end], bool(ids[end - 1] in stops)))
    truth = {}
    for ids, ended in texts:
        if all(holds(ids, word, ended=ended) for word in words):
            total = 0.0
            for place, token in enumerate(ids):
                logits = engine.logits_after([*LINE, *ids[:place]])
                total += log_probs(logits[None])[0, token]
            truth[ids] = total / len(ids)
    options = {"required": words, "ends_word_V": BEGINS_V, "line_ends": {4}, "stop_ids": stops}
    if not truth:
        with pytest.raises(UlimiError, match="all required words"):
            beam_search(engine, LINE, Beams(num=5000), max_tokens=5, **options)
        return
    found = beam_search(engine, LINE, Beams(num=5000), max_tokens=5, **options)
    assert {hypothesis.ids: pytest.approx(hypothesis.score) for hypothesis in found} == truth


@pytest.mark.parametrize("words", WORDS)
def test_a_narrow_beam_finds_texts_with_the_required_words_and_no_other(words):
    for seed in range(10):
        engine = make_engine(5, seed=seed)
        found = beam_search(
            engine, LINE, Beams(num=4), max_tokens=12, stop_ids={4}, required=words, ends_word_V=BEGINS_V, line_ends={4}
        )
        for hypothesis in found:
            ended = hypothesis.ids[-1] == 4
            assert all(holds(hypothesis.ids, word, ended=ended) for word in words)


def test_a_required_word_that_a_start_has_begun_counts():
    engine = make_engine(5, seed=2)
    word = Required((0, 2), (1, 2))
    starts = [Start((1, 2), -1.0, ((*LINE, 1),)), Start((1, 3), -0.1, ((*LINE, 1),))]
    found = beam_search(
        engine, LINE, Beams(num=300, length_penalty=0), max_tokens=2, required=[word], ends_word_V=BEGINS_V,
        line_ends={4}, starts=starts,
    )  # fmt: skip
    assert {hypothesis.ids for hypothesis in found} == {(1, 2, 0), (1, 2, 1), (1, 2, 4)}
    # It is over inside this one.
    whole = [Start((1, 2, 0), -1.0, ((*LINE, 1, 2),))]
    found = beam_search(
        engine, LINE, Beams(num=300), max_tokens=2, required=[word], ends_word_V=BEGINS_V, line_ends={4}, starts=whole
    )
    assert {hypothesis.ids for hypothesis in found} == {(1, 2, 0, token) for token in range(5)}


# Refusals


@pytest.mark.parametrize(("options", "said"), [
    ({"num": 0}, "the number of beams must be 1 or more; got 0"),
    ({"num": 4, "num_groups": 3}, "got 3 groups of 4 beams"),
    ({"num": 4, "num_groups": 0}, "got 0 groups of 4 beams"),
    ({"num": 4, "diversity": -0.1}, "diversity must be a finite number"),
    ({"num": 4, "diversity": math.nan}, "diversity must be a finite number"),
    ({"num": 4, "length_penalty": math.nan}, "length_penalty must be -10 to 10"),
    ({"num": 4, "length_penalty": 1000.0}, "length_penalty must be -10 to 10; got 1000.0"),
    ({"num": 4, "length_penalty": -11.0}, "length_penalty must be -10 to 10"),
])  # fmt: skip
def test_beams_out_of_range_are_refused(options, said):
    with pytest.raises(UlimiError, match=said):
        Beams(**options)


def test_a_wrong_argument_is_refused():
    word = Required((0,), (0,))
    for change, said in (
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [-1]}, "prompt_ids holds -1"),
        ({"stop_ids": [7]}, "stop_ids holds 7"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more; got 0"),
        ({"beams": Beams(4, num_groups=2), "required": [word]}, "one group"),
    ):
        options = {"prompt_ids": [0], "beams": Beams(2), "max_tokens": 3} | change
        with pytest.raises(UlimiError, match=said):
            beam_search(make_engine(), options.pop("prompt_ids"), options.pop("beams"), **options)
