"""Beam search: the most probable texts that a beam of this width finds, with their log-probabilities.

Length penalty: a text's score is its log-probability / (tokens ** penalty), 0 for none, as in Hugging Face's.
Diverse groups: Vijayakumar et al. (2018), "Diverse Beam Search", Hamming diversity. Required words: the beam's places
are dealt out over the number of required tokens that a text has already (Post & Vilar 2018, "Fast Lexically
Constrained Decoding with Dynamic Beam Allocation").

Shape letters: V vocabulary. This module knows ids and logits, not strings.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulimi.distribution import log_probs
from ulimi.errors import UlimiError
from ulimi.generate import Start, checked_ids, checked_prompt, given_what_was_typed
from ulimi.sampling import Rule, best_ids, checked_logits

if TYPE_CHECKING:
    from ulimi.engine import Engine, EngineState


@dataclass(frozen=True)
class Beams:
    """How to search.

    Raises:
        UlimiError: a value is outside its range.
    """

    num: int
    """width of the beam, all groups together"""
    num_groups: int = 1
    """groups that each search apart, each kept from what those before it chose at the same step"""
    diversity: float = 0.0
    """nats that a token loses for each time that a group before has chosen it at this step"""
    length_penalty: float = 1.0
    """0: the most probable text wins, which is a short one; 1: the highest mean; more: longer ones"""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UlimiError(f"the number of beams must be 1 or more; got {self.num}")
        if self.num_groups < 1 or self.num % self.num_groups:
            raise UlimiError(
                f"the number of groups must divide that of beams; got {self.num_groups} groups of {self.num} beams"
            )
        if not 0 <= self.diversity < np.inf:
            raise UlimiError(f"diversity must be a finite number, 0 (none) or more; got {self.diversity!r}")
        if not -10 <= self.length_penalty <= 10:
            raise UlimiError(f"length_penalty must be -10 to 10; got {self.length_penalty!r}")


@dataclass(frozen=True)
class Required:
    """A word that the text must hold, as whole word."""

    inside: tuple[int, ...]
    """its tokens inside a line, at least one"""
    at_start: tuple[int, ...]
    """its tokens at the start of a line, at least one"""


@dataclass(frozen=True)
class Hypothesis:
    """A text and what it is worth."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """nats of each token under the model itself; and of the end, where that is no token of the text"""
    score: float
    """what it was ranked by: its log-probability after the rules, over its length to the power of the penalty"""


@dataclass(frozen=True)
class _Open:
    """A text that goes on."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    """log-probability after the rules"""
    place: int
    """row of the engine's batch"""
    num_typed: int = 0
    """tokens of its start but the last: they spell what was typed, and do not count"""
    met: frozenset[int] = frozenset()
    """required words that it has, and that are over"""

    @property
    def length(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.num_typed


def beam_search(
    engine: "Engine",
    prompt_ids: Sequence[int],
    beams: Beams,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[list[int]], bool] | None = None,
    ends_before: Callable[[list[int]], NDArray[np.bool_] | None] | None = None,
    rules: Callable[[list[int]], Sequence[Rule]] | Sequence[Rule] = (),
    required: Sequence[Required] = (),
    ends_word_V: NDArray[np.bool_] | None = None,
    line_ends: Collection[int] = (),
    starts: Sequence[Start] = (),
) -> list[Hypothesis]:
    """Find the best texts, best first.

    They are all that the beam has finished, which may be more than it is wide; of several groups as many as each is
    wide. A beam that is wide enough finds the best of all texts; the test enumerates them.

    Args:
        engine: the model.
        prompt_ids: at least one id.
        beams: how to search.
        max_tokens: the most tokens that a text may get, 1 or more; a start counts as one, however it is spelled.
        stop_ids: a text ends with the first of these, which belongs to it.
        should_stop: told a text's ids without the prompt; it ends if it says so.
        ends_before: told a text's ids, it gives the tokens, (V,), before any of which the text ends, without them; all
            of them together are one ending, whose probability is their sum. None: no such token.
        rules: for all texts, or a function of a text's ids that gives its own; they see prompt and text.
        required: words that each text must hold; one group only. A text that the limit cuts off inside the last of
            them, as far as anyone can tell, does not hold it.
        ends_word_V: tokens before which a word is over; needed with `required`.
        line_ends: tokens after which a line starts; needed with `required`.
        starts: as in `ulimi.generate.generate`; the search begins with all of them.

    Raises:
        UlimiError: an argument is outside its range, the logits are not finite, or no text was found that the rules
            allow and that holds the required words.
    """
    prompt = checked_prompt(prompt_ids, engine.vocab_size)
    if max_tokens < 1:
        raise UlimiError(f"max_tokens must be 1 or more; got {max_tokens}")
    if required and beams.num_groups > 1:
        raise UlimiError("required words go with one group of beams only")
    rules_of = rules if callable(rules) else lambda _: rules
    search = _Search(
        engine,
        prompt,
        beams,
        max_tokens,
        frozenset(checked_ids(stop_ids, engine.vocab_size, "stop_ids")),
        should_stop,
        ends_before,
        rules_of,
        required,
        ends_word_V,
        frozenset(line_ends),
    )
    search.begin(starts)
    while search.going():
        search.step()
    found = search.results()
    if not found:
        raise UlimiError(nothing_found(max_tokens, required=bool(required)))
    return found


def nothing_found(max_tokens: int, *, required: bool) -> str:
    """Say that a search found nothing, and what may help."""
    if required:
        return f"no text of {max_tokens} tokens with all required words was found; allow more tokens or beams"
    return "the rules leave no text: fewer banned words, or a larger no-repeat n-gram, leave some"


class _Search:
    """The beams of all groups, and what they have finished."""

    def __init__(
        self,
        engine: "Engine",
        prompt: list[int],
        beams: Beams,
        max_tokens: int,
        stops: frozenset[int],
        should_stop: Callable[[list[int]], bool] | None,
        ends_before: Callable[[list[int]], NDArray[np.bool_] | None] | None,
        rules_of: Callable[[list[int]], Sequence[Rule]],
        required: Sequence[Required],
        ends_word_V: NDArray[np.bool_] | None,
        line_ends: frozenset[int],
    ) -> None:
        self.engine, self.prompt, self.beams, self.max_tokens = engine, prompt, beams, max_tokens
        self.stops, self.should_stop, self.ends_before, self.rules_of = stops, should_stop, ends_before, rules_of
        self.required, self.ends_word_V, self.line_ends = required, ends_word_V, line_ends
        self.width = beams.num // beams.num_groups
        self.groups: list[list[_Open]] = []
        self.finished: list[list[Hypothesis]] = [[] for _ in range(beams.num_groups)]
        self.logits_BV: NDArray[np.float64] = np.empty((0, engine.vocab_size))
        self.state: EngineState = None

    def begin(self, starts: Sequence[Start]) -> None:
        """Read the prompt; all groups begin with the same texts."""
        if not starts:
            first_1V, self.state = self.engine.prime(self.prompt, self.engine.initial_state(1))
            self.logits_BV = checked_logits(first_1V)
            self.groups = [[_Open((), (), 0.0, 0)] for _ in range(self.beams.num_groups)]
            return
        best = sorted(given_what_was_typed(starts), key=lambda start: -start.logprob)[: self.beams.num]
        last_B = np.array([start.ids[-1] for start in best], dtype=np.int64)
        next_BV, self.state = self.engine.step(last_B, self.engine.join_states([start.state for start in best]))
        self.logits_BV = checked_logits(next_BV)
        texts = [
            _Open(start.ids, start.logprobs, start.logprob, place, len(start.ids) - 1, self._met(start.ids))
            for place, start in enumerate(best)
        ]
        self.groups = [
            self._choose([(text.total, text) for text in texts], group) for group in range(self.beams.num_groups)
        ]

    def going(self) -> bool:
        """Whether any group could still find something better."""
        return any(not self._done(group) for group in range(self.beams.num_groups))

    def step(self) -> None:
        """Let every text grow by a token."""
        scores = {text.ids: self._scores(text) for group in self.groups for text in group}
        chosen_V = np.zeros(self.engine.vocab_size)
        for index, group in enumerate(self.groups):
            if self._done(index):
                self.groups[index] = []
                continue
            grown: list[tuple[float, _Open]] = []
            for text in group:
                own_V, ruled_V = scores[text.ids]
                ruled_V = self._end(text, own_V, ruled_V, index)
                augmented_V = text.total + ruled_V - self.beams.diversity * chosen_V
                for token in self._candidates(text, augmented_V):
                    if np.isfinite(ruled_V[token]):
                        longer = self._grow(text, token, float(own_V[token]), float(ruled_V[token]))
                        grown.append((float(augmented_V[token]), longer))
            self.groups[index] = self._choose(grown, index)
            for text in self.groups[index]:
                chosen_V[text.ids[-1]] += 1
        self._read()

    def _scores(self, text: _Open) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-probabilities of the next token, (V,): the model's own, and what the rules leave of them."""
        own_1V = log_probs(self.logits_BV[text.place : text.place + 1], self.engine.alpha)
        own_V = own_1V[0]
        ruled_V = own_V.copy()
        for rule in self.rules_of(list(text.ids)):  # they may leave nothing: the other texts go on
            rule([*self.prompt, *text.ids], ruled_V)
        return own_V, ruled_V

    def _end(
        self, text: _Open, own_V: NDArray[np.float64], ruled_V: NDArray[np.float64], index: int
    ) -> NDArray[np.float64]:
        """Put the text away if it may end before the next token; give what may go on from it."""
        ends_V = None if self.ends_before is None or not text.ids else self.ends_before(list(text.ids))
        if ends_V is None or len(self._met_at_end(text)) < len(self.required):
            return ruled_V
        total = text.total + float(np.logaddexp.reduce(ruled_V[ends_V]))
        if np.isfinite(total):
            logprobs = (*text.logprobs, float(np.logaddexp.reduce(own_V[ends_V])))
            value = total / (text.length + 1) ** self.beams.length_penalty
            self.finished[index].append(Hypothesis(text.ids, logprobs, value))
        return np.where(ends_V, -np.inf, ruled_V)

    def results(self) -> list[Hypothesis]:
        """All that was finished, or cut off by the limit, best first; a text that several groups found comes once."""
        groups = [sorted(group, key=lambda hypothesis: -hypothesis.score) for group in self.finished]
        if len(groups) > 1:  # what a group holds beyond its width would crowd out those that are kept apart from it
            groups = [group[: self.width] for group in groups]
        found = {hypothesis.ids: hypothesis for group in groups for hypothesis in group}
        return sorted(found.values(), key=lambda hypothesis: -hypothesis.score)

    def _done(self, index: int) -> bool:
        group = self.groups[index]
        if not group:
            return True
        finished = sorted((hypothesis.score for hypothesis in self.finished[index]), reverse=True)
        if len(finished) < self.width:
            return False
        # A log-probability can only fall: this is the highest score that any of the texts can still reach.
        penalty = self.beams.length_penalty
        length = self.max_tokens if penalty > 0 else 1 + min(text.length for text in group)
        best: float = max(text.total for text in group) / length**penalty
        return finished[self.width - 1] >= best

    def _candidates(self, text: _Open, augmented_V: NDArray[np.float64]) -> list[int]:
        # As many again as the beam is wide, since some may end; and the next token of each required word.
        ids: list[int] = best_ids(augmented_V[None], min(2 * self.width, len(augmented_V)))[0].tolist()
        for word, required in enumerate(self.required):
            if word not in text.met:
                done, spelling = self._begun(text.ids, word)
                ids += [*spelling[done : done + 1], self._spelling(required, text.ids)[0]]
        return list(dict.fromkeys(ids))

    def _grow(self, text: _Open, token: int, own: float, ruled: float) -> _Open:
        ids = (*text.ids, token)
        met = text.met | self._over(text.ids, token) if self.required else text.met
        return replace(text, ids=ids, logprobs=(*text.logprobs, own), total=text.total + ruled, met=met)

    def _met(self, ids: tuple[int, ...]) -> frozenset[int]:
        """The required words of some tokens."""
        return frozenset().union(*(self._over(ids[:place], token) for place, token in enumerate(ids)))

    def _over(self, ids: tuple[int, ...], token: int) -> set[int]:
        """The required words that stand at the end of `ids`, and that `token` ends."""
        if not self.required:
            return set()
        assert self.ends_word_V is not None
        return self._spelled(ids) if self.ends_word_V[token] else set()

    def _spelled(self, ids: tuple[int, ...]) -> set[int]:
        """The required words that stand at the end."""
        begun = [self._begun(ids, word) for word in range(len(self.required))]
        return {word for word, (done, spelling) in enumerate(begun) if done == len(spelling)}

    def _begun(self, ids: tuple[int, ...], word: int) -> tuple[int, tuple[int, ...]]:
        """How many tokens of a required word stand at the end, and all its tokens, as they are spelled there."""
        required = self.required[word]
        for done in range(min(len(ids), max(len(required.inside), len(required.at_start))), 0, -1):
            spelling = self._spelling(required, ids[:-done])
            if ids[-done:] == spelling[:done]:
                return done, spelling
        return 0, self._spelling(required, ids)

    def _spelling(self, required: Required, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a required word after `ids`."""
        last = ids[-1] if ids else self.prompt[-1]
        return required.at_start if last in self.line_ends else required.inside

    def _choose(self, grown: list[tuple[float, _Open]], index: int) -> list[_Open]:
        """Put away what has ended, and keep the best of the rest."""
        going: list[tuple[float, _Open]] = []
        # The sort is stable: among equals the better text's, then the lower id, comes first.
        for score, text in sorted(grown, key=lambda entry: -entry[0])[: self._reach()]:
            token = text.ids[-1]
            ended = token in self.stops or (self.should_stop is not None and self.should_stop(list(text.ids)))
            if not ended and text.length < self.max_tokens:
                going.append((score, text))
            elif len(self._met_at_end(text) if ended else text.met) == len(self.required):
                value = text.total / text.length**self.beams.length_penalty
                self.finished[index].append(Hypothesis(text.ids, text.logprobs, value))
        if not self.required:
            return [text for _, text in going[: self.width]]
        banks: dict[int, list[_Open]] = {}
        for _, text in going:
            banks.setdefault(self._progress(text), []).append(text)
        # One from each bank in turn, those with most of the required tokens first.
        in_turn = itertools.zip_longest(*(banks[progress] for progress in sorted(banks, reverse=True)))
        return [text for turn in in_turn for text in turn if text is not None][: self.width]

    def _reach(self) -> int | None:
        """How many of the grown texts are looked at: with required words all, since they may be improbable."""
        return None if self.required else 2 * self.width

    def _met_at_end(self, text: _Open) -> frozenset[int]:
        """The required words of a text that ends here: a word that was just spelled is over."""
        return text.met | self._spelled(text.ids) if self.required else text.met

    def _progress(self, text: _Open) -> int:
        """Tokens of required words that a text has."""
        met = sum(len(self.required[word].inside) for word in text.met)
        return met + max(
            (self._begun(text.ids, w)[0] for w in range(len(self.required)) if w not in text.met), default=0
        )

    def _read(self) -> None:
        """Feed the last token of every text that goes on."""
        texts = [text for group in self.groups for text in group]
        if not texts:
            return
        state = self.engine.select_state(self.state, [text.place for text in texts])
        ids_B = np.array([text.ids[-1] for text in texts], dtype=np.int64)
        next_BV, self.state = self.engine.step(ids_B, state)
        self.logits_BV = checked_logits(next_BV)
        places = iter(range(len(texts)))
        self.groups = [[replace(text, place=next(places)) for text in group] for group in self.groups]
