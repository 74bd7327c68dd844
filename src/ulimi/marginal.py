r"""Marginal likelihood: what a text costs, whichever way its words are cut into tokens.

A tokenizer cuts a word one way, and the usual score is that of this way alone. The model gives the others something,
too: " aba|ntu" is as much the word " abantu" as " abantu" is, and a word's probability is the sum over all of them
(Cao & Rimell 2021, "You should evaluate your language model on marginal likelihood over tokenisations"). Summed over a
whole text they are too many; summed within each word, after words that are cut the usual way, they are few:

    q(word | before) = sum over ways s of p(s, next begins a word | before) / p(next begins a word | before)

That is a distribution over words. A token that begins one (with a space, a digit, ASCII punctuation, or after a line's
end) tells where the one before ends, so that no sequence of tokens belongs to two words, and the sum over all of them
is 1 or less. With the usual way alone the denominators fall out, and the product over a text is its usual score; hence
the marginal one is never more. Only of words that end with a letter are other ways looked at: there a piece of the text
ends for certain, which no later character makes the tokenizer cut otherwise.

Ways that the model holds for less than `LEAST_SHARE` of the usual one are left out, which makes a text cost more only.

Light floor: the network is whatever `Engine` is given.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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

WAYS_AT_ONCE = 128
"""ways, of whatever words, that are followed together"""


class _Place(NamedTuple):
    """Where a token stands, and what the model says before it."""

    id: int
    before: NDArray[np.float32]
    """log-probabilities, (V,)"""
    state: EngineState
    """of a batch"""
    row: int
    """in it"""


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
        self._words: list[_Word] = []
        self._waiting: list[tuple[_Place, _Way]] = []
        """ways that leave the usual one, each with the place where it does"""
        self._nats: list[float] = []

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
        self._nats = [0.0] * len(rows)
        read: list[list[_Place]] = [[] for _ in rows]
        """of each row the word that is being read"""
        state = self._engine.initial_state(len(rows))
        inputs_B = np.full(len(rows), self._eos_id)
        for step in range(max(map(len, rows))):
            logits_BV, state = self._engine.step(inputs_B, state)
            logp_BV = log_probs(logits_BV, 1.0)
            for row, ids in enumerate(rows):
                if step >= len(ids):
                    continue
                inputs_B[row] = id = int(ids[step])
                if self._begins_V[id]:
                    self._end_word(row, read[row], logp_BV[row])
                    read[row] = []
                read[row].append(_Place(id, logp_BV[row], state, row))
                self._nats[row] -= float(logp_BV[row, id])
                if id == self._eos_id:
                    read[row] = []  # a word of its own; whatever comes next begins another
            if len(self._waiting) >= WAYS_AT_ONCE:
                self._follow()
            on_steps(step + 1)
        self._follow()
        return self._nats

    def _end_word(self, row: int, places: Sequence[_Place], after_V: NDArray[np.float32]) -> None:
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
            (place, way)
            for place, at, logp in zip(places, ends, logps, strict=False)
            for way in self._steps(word, len(self._words), int(at), float(logp), place.before)
            if way.id != place.id
        ]
        if ways:
            self._waiting += ways
            self._words.append(word)

    def _steps(self, word: _Word, number: int, at: int, logp: float, logp_V: NDArray[np.float32]) -> Iterator[_Way]:
        """Give what may come next in a word whose first `at` bytes are read, with log p `logp`."""
        for end in range(at + 1, min(len(word.text), at + self._longest) + 1):
            id = self._ids.get(word.text[at:end])
            # Inside a word nothing may stand that begins one.
            if id is not None and (at == 0 or not self._begins_V[id]):
                new_logp = logp + float(logp_V[id])
                if new_logp > word.least[end]:
                    yield _Way(number, id, end, new_logp)

    def _follow(self) -> None:
        """Follow all ways that wait to their words' ends, and count them."""
        others = [0.0] * len(self._words)
        """of each word: the other ways' probability, as a multiple of the usual one's"""
        ways = [way for _, way in self._waiting]
        # Those of one step stand beside each other.
        groups = [list(group) for _, group in groupby((place for place, _ in self._waiting), lambda p: id(p.state))]
        states = [self._engine.select_state(group[0].state, [place.row for place in group]) for group in groups]
        self._waiting = []
        state = self._engine.join_states(states) if states else None
        while ways:
            logits_BV, state = self._engine.step(np.array([way.id for way in ways]), state)
            logp_BV = log_probs(logits_BV, 1.0)
            rows: list[int] = []
            further: list[_Way] = []
            for row, way in enumerate(ways):
                word = self._words[way.word]
                if way.end == len(word.text):
                    others[way.word] += math.exp(way.logp + self._log_begins(logp_BV[row]) - word.usual)
                    continue
                steps = list(self._steps(word, way.word, way.end, way.logp, logp_BV[row]))
                rows += [row] * len(steps)
                further += steps
            ways = further
            state = self._engine.select_state(state, rows) if rows else None
        for word, share in zip(self._words, others, strict=True):
            self._nats[word.row] -= math.log1p(share)
        self._words = []

    def _log_begins(self, logp_V: NDArray[np.float32]) -> float:
        """Give log p(next begins a word)."""
        return math.log(np.exp(logp_V[self._begins_V], dtype=np.float64).sum())


def _begins_word(part: bytes) -> bool:
    """Tell whether a token is a word's first, whatever stands before it: no letter, nor what may be part of one."""
    return part[0] < 128 and not chr(part[0]).isalpha()
