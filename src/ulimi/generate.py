"""Write on from a prompt: sampling, one random stream a row, rows that stop; and contrastive search.

How the next token is chosen is `ulimi.sampling`'s affair; beam search is `ulimi.beam`'s.

Shape letters: B rows of the batch, V vocabulary, K candidates, E width of the last layer's output.

This module knows ids and logits. It must not know strings, tokenizers, or which engine computes.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulimi.distribution import Softmax, log_probs
from ulimi.errors import UlimiError
from ulimi.sampling import Rule, Sampling, apply_rules, best_ids, checked_logits, draw, sample

if TYPE_CHECKING:
    from ulimi.engine import Engine, EngineState


@dataclass(frozen=True)
class Step:
    """One token of one row, with its log-probability in nats."""

    row: int
    id: int
    logprob: float  # under the model itself: of the unfiltered logits, at temperature 1


@dataclass(frozen=True)
class Start:
    """A way to begin a text: the tokens that spell what was typed of a word, and perhaps more of it."""

    ids: tuple[int, ...]
    """at least one"""
    logprob: float
    """nats of all together, under the model"""
    state: "EngineState"
    """of one stream, after the prompt and all ids but the last"""

    @property
    def logprobs(self) -> tuple[float, ...]:
        """All nats at the last token: those before it only spell what was typed."""
        return (*(0.0 for _ in self.ids[1:]), self.logprob)


def generate(
    engine: "Engine",
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    max_tokens: int,
    num: int = 1,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[int, list[int]], bool] | None = None,
    rules: Callable[[int], Sequence[Rule]] | Sequence[Rule] = (),
    starts: Sequence[Start] = (),
) -> Iterator[Step]:
    """Yield the tokens of `num` continuations of one prompt, step by step, all rows in one batch.

    Row r draws from `default_rng([seed, r])`: given equal logits, it is the same text for any `num`. The
    arguments are checked at the call, before the first token is asked for.

    Args:
        engine: the model.
        prompt_ids: at least one id; all are fed to the model, each once. What starts a line is the caller's to add.
        sampling: how the next token is chosen.
        max_tokens: the most tokens that a row may get, 1 or more; a start counts as one, however it is spelled.
        num: the number of rows, 1 or more.
        seed: 0 or more.
        stop_ids: a row ends with the first of these; it is yielded too.
        should_stop: called after each other token with the row and a copy of the row's ids so far, without the
            prompt; the row ends if it says so.
        rules: for all rows, or a function that gives each row's own; they see prompt and text.
        starts: where there are any, a row begins with one of them, chosen by `sampling` from their probabilities;
            all together are certain, since they are what was typed.

    Raises:
        UlimiError: an argument is outside its range, or, while iterating, the logits are not finite or the rules
            leave none.
    """
    prompt = checked_prompt(prompt_ids, engine.vocab_size)
    for name, value, least in (("max_tokens", max_tokens, 1), ("num", num, 1), ("seed", seed, 0)):
        if value < least:
            raise UlimiError(f"{name} must be {least} or more; got {value}")
    stops = frozenset(checked_ids(stop_ids, engine.vocab_size, "stop_ids"))
    rules_of = rules if callable(rules) else lambda _: rules
    # A generator runs nothing until it is asked, so the loop is a function of its own.
    return _generate(engine, prompt, sampling, max_tokens, num, seed, stops, should_stop, rules_of, starts)


def score_prompt(engine: "Engine", ids: Sequence[int]) -> list[Step]:
    """Score the given `ids[1:]`, each after all that stand before it; `ids[0]` is only context.

    Nothing is sampled: every `row` is 0. `logprob` is -inf for a token that the model rules out. One id gives an
    empty list.

    Raises:
        UlimiError: `ids` is empty or holds what is not an id of this model, or the logits are not finite.
    """
    given = checked_ids(ids, engine.vocab_size, "ids")
    if not given:
        raise UlimiError("ids is empty; scoring needs at least one id to start from")
    state = engine.initial_state(1)
    steps: list[Step] = []
    for context, target in itertools.pairwise(given):
        logits_1V, state = engine.step(np.array([context], dtype=np.int64), state)
        logprob = log_probs(checked_logits(logits_1V), engine.alpha)[0, target]
        steps.append(Step(row=0, id=target, logprob=float(logprob)))
    return steps


def contrastive_search(
    engine: "Engine",
    prompt_ids: Sequence[int],
    *,
    penalty: float,
    top_k: int,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[int, list[int]], bool] | None = None,
    rules: Sequence[Rule] = (),
    starts: Sequence[Start] = (),
) -> Iterator[Step]:
    """Yield the tokens of the one text that contrastive search finds (Su et al. 2022, "A Contrastive Framework").

    The next token is that of the `top_k` most probable ones with the highest (1 - penalty) p - penalty s, where s is
    the largest cosine between the model's output after that token and its outputs after each token before. The
    paper's outputs are a Transformer's; here they are the last layer's.

    Args:
        engine: the model.
        prompt_ids: as in `generate`.
        penalty: 0 (greedy) to 1.
        top_k: 1 or more; each token costs as many steps.
        max_tokens: as in `generate`.
        stop_ids: as in `generate`.
        should_stop: as in `generate`; the row is 0.
        rules: see `ulimi.sampling`.
        starts: as in `generate`; the most probable is taken.

    Raises:
        UlimiError: an argument is outside its range, or the engine has no outputs to compare.
    """
    if not 0 <= penalty <= 1:
        raise UlimiError(f"the contrastive penalty must be 0 to 1; got {penalty!r}")
    if top_k < 1 or max_tokens < 1:
        name, value = ("top_k", top_k) if top_k < 1 else ("max_tokens", max_tokens)
        raise UlimiError(f"{name} must be 1 or more; got {value}")
    given = checked_prompt(prompt_ids, engine.vocab_size)
    stops = frozenset(checked_ids(stop_ids, engine.vocab_size, "stop_ids"))
    start = max(given_what_was_typed(starts), key=lambda start: start.logprob) if starts else None
    return _contrastive(engine, given, penalty, top_k, max_tokens, stops, should_stop, rules, start)


def _generate(
    engine: "Engine",
    prompt: list[int],
    sampling: Sampling,
    max_tokens: int,
    num: int,
    seed: int,
    stops: frozenset[int],
    should_stop: Callable[[int, list[int]], bool] | None,
    rules_of: Callable[[int], Sequence[Rule]],
    starts: Sequence[Start],
) -> Iterator[Step]:
    rngs = [np.random.default_rng([seed, row]) for row in range(num)]
    texts: list[list[int]] = [[] for _ in range(num)]
    limits = [max_tokens] * num
    live = list(range(num))  # live[b] is the row that stands at place b of the batch

    def goes_on(row: int) -> bool:
        ids = texts[row]
        ended = ids[-1] in stops or (should_stop is not None and should_stop(row, list(ids)))
        return not ended and len(ids) < limits[row]

    if starts:
        going: list[Start] = []
        starts = given_what_was_typed(starts)
        for row, start in enumerate(_choose_starts(starts, sampling, rngs)):
            limits[row] += len(start.ids) - 1
            for token, logprob in zip(start.ids, start.logprobs, strict=True):
                texts[row].append(token)
                yield Step(row, token, logprob)
                if not goes_on(row):
                    live.remove(row)
                    break
            else:
                going.append(start)
        if not live:
            return
        last_B = np.array([start.ids[-1] for start in going], dtype=np.int64)
        logits_BV, state = engine.step(last_B, engine.join_states([start.state for start in going]))
    else:
        first_1V, state = engine.prime(prompt, engine.initial_state(1))
        logits_BV = first_1V.repeat(num, axis=0)
        state = engine.repeat_state(state, num)

    while True:
        ids_B = np.empty(len(live), dtype=np.int64)
        logprobs: list[float] = []
        for place, row in enumerate(live):
            logits_1V = checked_logits(logits_BV[place : place + 1])
            softmax = Softmax(logits_1V[0]) if engine.alpha == 1 else None
            if rules := rules_of(row):
                ruled_1V = apply_rules(logits_1V, rules, [[*prompt, *texts[row]]])
                token = draw(ruled_1V[0], sampling, rngs[row])
            else:
                token = draw(logits_1V[0], sampling, rngs[row], softmax)
            ids_B[place] = token
            logprobs.append(softmax.log_prob(token) if softmax else float(log_probs(logits_1V, engine.alpha)[0, token]))

        places: list[int] = []  # in the batch, of the rows that go on
        for place, (row, token) in enumerate(zip(live, ids_B.tolist(), strict=True)):
            texts[row].append(token)
            yield Step(row, token, logprobs[place])
            if goes_on(row):
                places.append(place)

        # The last tokens are not fed: nobody reads the logits after them.
        if not places:
            return
        if len(places) < len(live):
            state = engine.select_state(state, places)
            live = [live[place] for place in places]
        logits_BV, state = engine.step(ids_B[places], state)


def _choose_starts(starts: Sequence[Start], sampling: Sampling, rngs: Sequence[np.random.Generator]) -> Iterator[Start]:
    """Draw each row's start from their probabilities."""
    logprobs_K = np.array([start.logprob for start in starts])
    # They are log-probabilities already: entmax is for logits.
    chosen = sample(logprobs_K[None].repeat(len(rngs), axis=0), replace(sampling, alpha=1.0), rngs)
    for index in chosen.tolist():
        yield starts[index]


def given_what_was_typed(starts: Sequence[Start]) -> list[Start]:
    """Divide the probabilities of some starts by that of all together, which is certain, since it was typed."""
    given = float(np.logaddexp.reduce([start.logprob for start in starts]))
    return [replace(start, logprob=start.logprob - given) for start in starts]


def _contrastive(
    engine: "Engine",
    prompt: list[int],
    penalty: float,
    top_k: int,
    max_tokens: int,
    stops: frozenset[int],
    should_stop: Callable[[int, list[int]], bool] | None,
    rules: Sequence[Rule],
    start: Start | None,
) -> Iterator[Step]:
    # The outputs after each token of the prompt take part, so it is read token by token.
    text: list[int] = []
    outputs: list[NDArray[np.float64]] = []

    def ended() -> bool:
        return text[-1] in stops or (should_stop is not None and should_stop(0, list(text)))

    state = engine.initial_state(1)
    begun = [] if start is None else list(start.ids)
    for token in [*prompt, *begun]:
        logits_1V, state = engine.step(np.array([token], dtype=np.int64), state)
        outputs.append(_unit(engine.output(state)))
    max_tokens += max(0, len(begun) - 1)
    for token, logprob in zip(begun, () if start is None else start.logprobs, strict=True):
        text.append(token)
        yield Step(0, token, logprob)
        if ended():
            return
    while len(text) < max_tokens:
        checked_1V = checked_logits(logits_1V)
        ruled_1V = apply_rules(checked_1V, rules, [[*prompt, *text]])
        candidates_K = best_ids(ruled_1V, min(top_k, engine.vocab_size))[0]
        probs_K = np.exp(log_probs(ruled_1V, engine.alpha)[0, candidates_K])
        candidates_K, probs_K = candidates_K[probs_K > 0], probs_K[probs_K > 0]
        next_KV, states = engine.step(candidates_K, engine.repeat_state(state, len(candidates_K)))
        outputs_KE = _unit(engine.output(states))
        likeness_K = (outputs_KE @ np.concatenate(outputs).T).max(axis=1)
        scores_K = (1 - penalty) * probs_K - penalty * likeness_K
        place = int(scores_K.argmax())
        token = int(candidates_K[place])
        text.append(token)
        yield Step(0, token, float(log_probs(checked_1V, engine.alpha)[0, token]))
        if ended():
            return
        outputs.append(outputs_KE[place : place + 1])
        state, logits_1V = engine.select_state(states, [place]), next_KV[place : place + 1]


def _unit(output_BE: NDArray[np.float32]) -> NDArray[np.float64]:
    """Divide by the length, (B, E); nothing stays nothing."""
    x_BE = output_BE.astype(np.float64)
    unit_BE: NDArray[np.float64] = x_BE / np.maximum(np.linalg.norm(x_BE, axis=1, keepdims=True), 1e-12)
    return unit_BE


def checked_prompt(prompt_ids: Collection[int], vocab_size: int) -> list[int]:
    """Refuse a prompt that holds what is no id of the model, or nothing."""
    prompt = checked_ids(prompt_ids, vocab_size, "prompt_ids")
    if not prompt:
        raise UlimiError("prompt_ids is empty; generation needs at least one id to start from")
    return prompt


def checked_ids(ids: Collection[int], vocab_size: int, name: str) -> list[int]:
    """Refuse what is no id of the model; `name` is what the error calls them."""
    # A negative id would silently index from the end of the embedding.
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise UlimiError(f"{name} holds {wrong}; this model's ids are 0 to {vocab_size - 1}")
    return [int(token) for token in ids]
