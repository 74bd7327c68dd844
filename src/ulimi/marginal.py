r"""Marginal likelihood: what a text costs, whichever way its words are cut into tokens.

A tokenizer cuts a word one way, and the usual score is that of this way alone. The model gives the others something,
too: " aba|ntu" is as much the word " abantu" as " abantu" is, and a word's probability is the sum over all of them
(Cao & Rimell 2021, "You should evaluate your language model on marginal likelihood over tokenisations"). Summed over a
whole text they are too many; summed within each word, after words that are cut the usual way, they are few:

    q(word | before) = sum over ways s of p(s, next begins a word | before) / p(next begins a word | before)

That is a distribution over words. A token that begins one (with a space, a digit, ASCII punctuation, or after a line's
end) tells where the one before ends, so that no sequence of tokens belongs to two words, and the sum over all of them
is 1 or less. With the usual way alone the denominators fall out, and the product over a text is its usual score; hence
the marginal one is never more, but for rounding. Only of words that end with a letter are other ways looked at: there a
piece of the text ends for certain, which no later character makes the tokenizer cut otherwise.

A way is left out where it falls behind the usual one by more than `LEAST_SHARE`, or is not among the `MOST_WAYS` best,
at any of its tokens, and all ways of a word of more than `LONGEST_WORD` bytes. That can only make a text cost more.

Light floor: the network is whatever `Engine` is given.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulimi.data import Ids
from ulimi.distribution import log_probs
from ulimi.engine import Engine, EngineState
from ulimi.errors import UlimiError
from ulimi.tokenizer import Tokenizer

LEAST_SHARE = 0.001
"""of the usual way's probability; what is below it is not followed"""

MOST_WAYS = 64
"""of one word, that are followed beside each other"""

LONGEST_WORD = 100
"""bytes; what is longer is in a script without spaces, or no text"""

WAYS_AT_ONCE = 128
"""ways, of whatever words, that wait to be followed together"""


class _Place(NamedTuple):
    """Where a token stands, and what the model says before it."""

    id: int
    before: NDArray[np.float64]
    """log-probabilities, (V,)"""
    state: EngineState
    """of all rows"""


class _Word(NamedTuple):
    """A word that has other ways than the usual one."""

    row: int
    text: bytes
    least: NDArray[np.float64]
    """log p that a way must have at each byte to be followed"""
    usual: float
    """log p(usual way, next begins a word)"""


class _Way(NamedTuple):
    """The beginning of another way."""

    word: int
    """number among the words that wait"""
    id: int
    """its last token"""
    end: int
    """bytes of the word up to there"""
    logp: float
    """log p up to there"""


@dataclass
class _Reading:
    """Some texts that are read beside each other."""

    nats: list[float]
    """of each, as far as it is read"""
    words: list[_Word] = field(default_factory=list)
    """those of which ways wait"""
    waiting: list[tuple[EngineState, _Way]] = field(default_factory=list)
    """ways that have left the usual one, each with the state, of all rows, where it does"""


class Marginal:
    """Scores texts by the marginal likelihood of their words.

    Args:
        engine: the model.
        tokenizer: its tokenizer.

    Raises:
        UlimiError: the tokenizer cuts words in one way only, or the model is sparse.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        if tokenizer.kind not in ("bpe", "unigram"):
            raise UlimiError(
                f"--marginal: a tokenizer of kind {tokenizer.kind!r} cuts each word in one way; allowed: bpe, unigram"
            )
        if engine.alpha != 1:
            raise UlimiError("--marginal: a sparse model (entmax) rules words out; allowed: models of cross entropy")
        self._engine = engine
        self._eos_id = tokenizer.eos_id
        self._bytes = [tokenizer.token_bytes(id) for id in range(tokenizer.eos_id)]
        self._ids = {part: id for id, part in enumerate(self._bytes)}
        self._longest = max(map(len, self._bytes))
        self._begins_V = np.array([*map(_begins_word, self._bytes), True])

    def score_stream(self, ids: Ids, on_tokens: Callable[[int], None] = lambda done: None) -> float:
        """Total nats of a text read as one stream.

        Args:
            ids: (N,), as the tokenizer gives them.
            on_tokens: told how many tokens are done.
        """
        return self.score_rows([ids], on_tokens)[0]

    def score_rows(
        self, rows: Sequence[Ids | list[int]], on_steps: Callable[[int], None] = lambda done: None
    ) -> list[float]:
        """Nats of some texts that are read beside each other, each from a zero state.

        Args:
            rows: of each text the ids, as the tokenizer gives them.
            on_steps: told how many tokens of each are done.
        """
        reading = _Reading([0.0] * len(rows))
        read: list[list[_Place]] = [[] for _ in rows]
        """of each row the word that is being read, unless it is too long"""
        num_bytes = [0] * len(rows)
        state = self._engine.initial_state(len(rows))
        inputs_B = np.full(len(rows), self._eos_id)
        for step in range(max(map(len, rows))):
            logits_BV, state = self._engine.step(inputs_B, state)
            logp_BV = log_probs(logits_BV, 1.0)
            for row, ids in enumerate(rows):
                if step >= len(ids):
                    continue
                inputs_B[row] = id = int(ids[step])
                reading.nats[row] -= float(logp_BV[row, id])
                if self._begins_V[id]:
                    self._end_word(reading, row, read[row], logp_BV[row])
                    read[row], num_bytes[row] = [], 0
                if id == self._eos_id:
                    continue  # a word of its own; whatever comes next begins another
                num_bytes[row] += len(self._bytes[id])
                if num_bytes[row] > LONGEST_WORD:
                    read[row] = []
                else:
                    # A copy: a view would keep the numbers of all rows.
                    read[row].append(_Place(id, logp_BV[row].copy(), state))
            if len(reading.waiting) >= WAYS_AT_ONCE:
                self._follow(reading)
            on_steps(step + 1)
        self._follow(reading)
        return reading.nats

    def _end_word(self, reading: _Reading, row: int, places: Sequence[_Place], after_V: NDArray[np.float64]) -> None:
        """Find where other ways leave the usual one of a word; `after_V` is what is probable after it."""
        text = b"".join(self._bytes[place.id] for place in places)
        if not text.decode(errors="replace")[-1:].isalpha():
            return
        ends = np.cumsum([0, *(len(self._bytes[place.id]) for place in places)])
        logps = np.cumsum([0.0, *(float(place.before[place.id]) for place in places)])
        # Within a token of the usual way as if each of its bytes took an equal part of its nats.
        least = np.interp(np.arange(len(text) + 1), ends, logps) + math.log(LEAST_SHARE)
        word = _Word(row, text, least, float(logps[-1]) + self._log_begins(after_V))
        ways = [
            (place.state, way)
            for place, at, logp in zip(places, ends, logps, strict=False)
            for way in self._steps(word, len(reading.words), int(at), float(logp), place.before)
            if way.id != place.id
        ]
        if ways:
            reading.waiting += ways
            reading.words.append(word)

    def _steps(self, word: _Word, number: int, at: int, logp: float, logp_V: NDArray[np.float64]) -> Iterator[_Way]:
        """Give what may come next in a word whose first `at` bytes are read, with log p `logp`."""
        for end in range(at + 1, min(len(word.text), at + self._longest) + 1):
            id = self._ids.get(word.text[at:end])
            # Inside a word nothing may stand that begins one.
            if id is not None and (at == 0 or not self._begins_V[id]):
                new_logp = logp + float(logp_V[id])
                if new_logp > word.least[end]:
                    yield _Way(number, id, end, new_logp)

    def _follow(self, reading: _Reading) -> None:
        """Follow all ways that wait to their words' ends, and count them."""
        # Of each word: log of all ways' probability, as a multiple of the usual one's, which is 1 of it.
        words = reading.words
        shares = [0.0] * len(words)
        ways = [way for _, way in reading.waiting]
        # Neighbours often have one state; it need not be taken apart for each.
        groups = [list(group) for _, group in groupby(reading.waiting, lambda waiting: id(waiting[0]))]
        states = [self._engine.select_state(group[0][0], [words[way.word].row for _, way in group]) for group in groups]
        state = self._engine.join_states(states) if states else None
        while ways:
            logits_BV, state = self._engine.step(np.array([way.id for way in ways]), state)
            logp_BV = log_probs(logits_BV, 1.0)
            further: list[tuple[int, _Way]] = []
            for row, way in enumerate(ways):
                word = words[way.word]
                if way.end == len(word.text):
                    share = way.logp + self._log_begins(logp_BV[row]) - word.usual
                    shares[way.word] = float(np.logaddexp(shares[way.word], share))
                else:
                    further += [(row, s) for s in self._steps(word, way.word, way.end, way.logp, logp_BV[row])]
            further = _best(further, words)
            ways = [way for _, way in further]
            state = self._engine.select_state(state, [row for row, _ in further]) if further else None
        for word, share in zip(words, shares, strict=True):
            reading.nats[word.row] -= share
        reading.words, reading.waiting = [], []

    def _log_begins(self, logp_V: NDArray[np.float64]) -> float:
        """Give log p(next begins a word)."""
        return math.log(max(np.exp(logp_V[self._begins_V]).sum(), 1e-300))


def _best(ways: list[tuple[int, _Way]], words: Sequence[_Word]) -> list[tuple[int, _Way]]:
    """Leave `MOST_WAYS` of each word, those that are ahead of what a way must have at its end; order is kept."""
    if len(ways) <= MOST_WAYS:
        return ways
    of_word: dict[int, list[int]] = {}
    for number, (_, way) in enumerate(ways):
        of_word.setdefault(way.word, []).append(number)
    kept: list[int] = []
    for number, members in of_word.items():
        least = words[number].least
        members.sort(key=lambda i: ways[i][1].logp - least[ways[i][1].end], reverse=True)
        kept += members[:MOST_WAYS]
    return [ways[i] for i in sorted(kept)]


def _begins_word(part: bytes) -> bool:
    """Tell whether a token is a word's first, whatever stands before it: no letter, nor what may be part of one."""
    return part[0] < 128 and not chr(part[0]).isalpha()
