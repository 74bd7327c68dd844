"""Whole words while a person types: how the word begun may end, or which word comes next.

A word is what one tap accepts: letters, marks, digits, hyphens and apostrophes in a row, that begins and ends with a
letter, mark or digit ("kakhulu", "e-Goli", "ng'ombe", "ngo-2024"), capitals as the model writes them. It ends before
white space, a line's end, or any other character, so the comma of "kakhulu," is not part of it. Its probability is
that the text typed goes on with exactly this word, summed over its spellings in tokens:

    p(word) = sum over spellings of p(spelling) p(the next token ends the word) / p(what was typed)

Light floor: the network is whatever `Engine` is given.
"""

import heapq
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.engine import Engine, EngineState
from ulimi.errors import UlimiError
from ulimi.spelling import Cover, TokenIndex, log_probs, search_covers, split_prompt
from ulimi.tokenizer import Tokenizer
from ulimi.words import APOSTROPHES, in_word

JOINERS = "-\N{NON-BREAKING HYPHEN}" + APOSTROPHES
MAX_CONTEXTS = 4
MAX_KNOWN = 256
"""texts remembered after each context; of each the state and V log-probabilities"""
MIN_COVER_SHARE = 1e-3
MAX_WORDS = 1000
"""tokens looked at that end a word by themselves; in kind "word" all do"""


@dataclass(frozen=True)
class Suggestion:
    """A whole word."""

    word: str
    """with what was typed of it"""
    probability: float
    """given the text typed"""


@dataclass(frozen=True)
class Suggestions:
    """The words found, the most probable first, and how much was looked at."""

    words: list[Suggestion]
    covered: float
    """share of all ways to go on that are settled, as a word or as none; what lacks to 1 (and a thousandth, for ways to
    spell what was typed) is the most that a word's probability can be too low"""

    def as_dict(self, text: str) -> dict[str, Any]:
        """Give what is told of them in JSON, with the text that was typed."""
        return {"text": text, "suggestions": [asdict(word) for word in self.words], "covered": self.covered}


class Suggester:
    """Suggest words with a model; what was computed for the text before is kept, so that the next letter is quick.

    The search goes on from the most probable beginning of a word, until none is `min_ratio` times as probable as the
    last word to be suggested, or `max_steps` beginnings have been looked at. At 1, unless the steps run out, each
    spelling that is missing is less probable than each suggestion; `Suggestions.covered` bounds what all that are
    missing have together. What was asked before changes no figure, but for the last digits with int8, which rounds a
    step otherwise than several at once.

    Args:
        engine: the network.
        tokenizer: its tokenizer.
        max_steps: a step of the network each, but for those that are known from the last letters.
        min_ratio: 0 looks at everything, which for most models never ends without `max_steps`.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_steps: int = 32, min_ratio: float = 1.0) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._index = TokenIndex(tokenizer)
        self._vocabulary = _Vocabulary(tokenizer)
        self._max_steps = max_steps
        self._min_ratio = min_ratio
        self._contexts: OrderedDict[tuple[int, ...], _Context] = OrderedDict()

    def suggest(self, text: str, num: int = 5) -> list[Suggestion]:
        """Give the `num` most probable words that the end of a text may become.

        After white space, and at the start of a line, it is the next word; inside a word, a longer one that begins so.

        Args:
            text: all that was typed, in any Unicode normal form; earlier lines count.
            num: the most words to give.

        Returns:
            The most probable first; fewer, if no more were found.

        Raises:
            UlimiError: the text holds a lone surrogate, `num` is below 1, or the model's logits are not finite.
        """
        return self.search(text, num).words

    def search(self, text: str, num: int = 5) -> Suggestions:
        """Do what `suggest` does, and say how much of the probability was looked at."""
        if num < 1:
            raise UlimiError(f"num must be 1 or more; got {num}")
        context_ids, begun = split_prompt(self._tokenizer, text)
        search = _Search(self._vocabulary, self._read, word_begun(self._tokenizer.normalize(text)), self._max_steps)
        root = self._read_context(tuple(context_ids))
        if begun:
            found, log_total = search_covers(
                self._read_known, self._index, root, root.log_probs, begun,
                max_covers=self._max_steps if self._tokenizer.is_lossless else MAX_WORDS,
                min_share=MIN_COVER_SHARE, max_steps=self._max_steps,
            )  # fmt: skip
        else:
            found, log_total = [Cover((), 0.0, b"", root)], 0.0
        for cover in found:
            search.begin(cover, cover.logprob - log_total)
        return search.run(num, self._min_ratio)

    def _read(self, id: int, state: "_Known") -> "_Known":
        """Read a token after known ones, or remember it."""
        ids = (*state.ids, id)
        known = state.context.after.get(ids)
        if known is None:
            logits_1V, engine_state = self._engine.step(np.array([id], dtype=np.int64), state.state)
            known = _Known(state.context, ids, log_probs(self._engine, logits_1V)[0], engine_state)
            state.context.remember(known)
        return known

    def _read_known(self, id: int, state: "_Known") -> tuple[NDArray[np.float64], "_Known"]:
        known = self._read(id, state)
        return known.log_probs, known

    def _read_context(self, ids: tuple[int, ...]) -> "_Known":
        """Read a text, from the longest beginning of it that is known."""
        if ids in self._contexts:
            self._contexts.move_to_end(ids)
            return self._contexts[ids].after[()]
        num_known, state = 0, self._engine.initial_state(1)
        log_probs_V: NDArray[np.float64] | None = None
        for known_ids, context in self._contexts.items():
            start = end = len(known_ids)
            if ids[:start] != known_ids:
                continue
            while end < len(ids) and ids[start : end + 1] in context.after:
                end += 1
            if end > num_known:
                known = context.after[ids[start:end]]
                num_known, log_probs_V, state = end, known.log_probs, known.state
        if num_known < len(ids):
            logits_1V, state = self._engine.prime(ids[num_known:], state)
            log_probs_V = log_probs(self._engine, logits_1V)[0]
        assert log_probs_V is not None
        context = self._contexts[ids] = _Context()
        context.remember(_Known(context, (), log_probs_V, state))
        if len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context.after[()]


@dataclass
class _Context:
    """What is known of the texts that begin with some ids, by the ids after them."""

    after: "dict[tuple[int, ...], _Known]" = field(default_factory=dict)

    def remember(self, known: "_Known") -> None:
        """Keep what was read; when there is too much of it, the context alone and this."""
        if len(self.after) >= MAX_KNOWN:
            self.after = {(): self.after[()]}
        self.after[known.ids] = known


@dataclass(frozen=True)
class _Known:
    """A text that was read."""

    context: _Context
    ids: tuple[int, ...]
    """after the context"""
    log_probs: NDArray[np.float64]
    """of the next token, (V,)"""
    state: EngineState


@dataclass(frozen=True)
class _Scan:
    """What some bytes do to a word that they are added to."""

    num_bytes: int
    """of the characters that can be in a word, up to the first that cannot"""
    ends: bool
    """whether there is one that cannot"""
    pending: bytes = b""
    """the beginning of a character after them"""


class _Vocabulary:
    """What each token does to a word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = (tokenizer.eos_id, tokenizer.unk_id)
        self.bytes = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        scans = [_Scan(0, True) if id in special else _scan(part) for id, part in enumerate(self.bytes)]
        if not tokenizer.is_lossless:
            # White space follows each word of a closed vocabulary.
            scans = [_Scan(scan.num_bytes, True) for scan in scans]
        self.scans = scans
        self.whole = not tokenizer.is_lossless
        self.ends_N = _ids(id for id, scan in enumerate(scans) if scan.ends and not scan.num_bytes)
        self.goes_on_N = _ids(id for id, scan in enumerate(scans) if not scan.ends)
        self.ends_within_N = _ids(id for id, scan in enumerate(scans) if scan.ends and scan.num_bytes)
        inside = [id for id, part in enumerate(self.bytes) if id not in special and 0x80 <= part[0] < 0xC0]
        self.inside_character_N = _ids(inside)
        self.outside_character_N = np.setdiff1d(np.arange(tokenizer.vocab_size), self.inside_character_N)


class _Search:
    """One search, for the word that begins with `typed`."""

    def __init__(
        self, vocabulary: _Vocabulary, read: Callable[[int, _Known], _Known], typed: str, max_steps: int
    ) -> None:
        self._vocabulary = vocabulary
        self._read = read
        self._typed = typed
        self._max_steps = max_steps
        self._queue: list[tuple[float, int, bytes, bytes, _Known, int | None]] = []
        """-log-probability, a tie-breaker, what is spelt after `typed`, the beginning of a character, before, id"""
        self._num_queued = 0
        self._words: defaultdict[str, float] = defaultdict(float)
        self._settled = 0.0

    def begin(self, cover: Cover, logprob: float) -> None:
        """Take a way to spell what was typed; its surplus belongs to the word, or ends it."""
        scan = _scan(cover.surplus)
        if scan.ends or (self._vocabulary.whole and cover.ids):
            self._settle(cover.surplus[: scan.num_bytes], math.exp(logprob))
        else:
            last = cover.ids[-1] if cover.ids else None
            self._push(logprob, cover.surplus[: scan.num_bytes], scan.pending, cover.state, last)

    def run(self, num: int, min_ratio: float) -> Suggestions:
        """Look for words until the `num` best are found."""
        for _ in range(self._max_steps):
            if not self._queue or -self._queue[0][0] < _log(self._last_of_best(num) * min_ratio):
                break
            negative, _, spelt, pending, known, id = heapq.heappop(self._queue)
            if id is not None:
                known = self._read(id, known)
            if pending:
                self._go_on_inside_a_character(-negative, spelt, pending, known)
            else:
                self._go_on(-negative, spelt, known)
        best = heapq.nsmallest(num, self._words.items(), key=lambda item: (-item[1], item[0]))
        return Suggestions([Suggestion(word, p) for word, p in best], min(1.0, self._settled))

    def _go_on(self, logprob: float, spelt: bytes, known: _Known) -> None:
        vocabulary, log_probs_V = self._vocabulary, known.log_probs
        self._settle(spelt, math.exp(logprob) * float(np.exp(log_probs_V[vocabulary.ends_N]).sum()))
        for id in self._best(log_probs_V, vocabulary.ends_within_N, MAX_WORDS):
            part = vocabulary.bytes[id][: vocabulary.scans[id].num_bytes]
            self._settle(spelt + part, math.exp(logprob + log_probs_V[id]))
        # For more than these no steps would be left.
        for id in self._best(log_probs_V, vocabulary.goes_on_N, self._max_steps):
            scan = vocabulary.scans[id]
            part = vocabulary.bytes[id][: scan.num_bytes]
            self._push(logprob + float(log_probs_V[id]), spelt + part, scan.pending, known, id)

    def _go_on_inside_a_character(self, logprob: float, spelt: bytes, pending: bytes, known: _Known) -> None:
        vocabulary, log_probs_V = self._vocabulary, known.log_probs
        # A character that breaks off is U+FFFD, and none of a word.
        self._settle(spelt, math.exp(logprob) * float(np.exp(log_probs_V[vocabulary.outside_character_N]).sum()))
        for id in self._best(log_probs_V, vocabulary.inside_character_N, MAX_WORDS):
            bytes_ = pending + vocabulary.bytes[id]
            scan = _scan(bytes_)
            if scan.ends:
                self._settle(spelt + bytes_[: scan.num_bytes], math.exp(logprob + log_probs_V[id]))
            else:
                self._push(logprob + float(log_probs_V[id]), spelt + bytes_[: scan.num_bytes], scan.pending, known, id)

    def _best(self, log_probs_V: NDArray[np.float64], ids_N: NDArray[np.int64], num: int) -> list[int]:
        """Give the possible ones of some ids, the `num` most probable in no order."""
        if len(ids_N) > num:
            ids_N = ids_N[np.argpartition(-log_probs_V[ids_N], num)[:num]]
        return [id for id in ids_N.tolist() if log_probs_V[id] > -math.inf]

    def _push(self, logprob: float, spelt: bytes, pending: bytes, known: _Known, id: int | None) -> None:
        if spelt and not self._typed and spelt.decode()[0] in JOINERS:
            self._settled += math.exp(logprob)
            return
        self._num_queued += 1
        heapq.heappush(self._queue, (-logprob, self._num_queued, spelt, pending, known, id))

    def _settle(self, spelt: bytes, probability: float) -> None:
        """Count a word that has ended; what was typed is no suggestion."""
        self._settled += probability
        text = spelt.decode()
        if text and text[-1] not in JOINERS and (self._typed or text[0] not in JOINERS) and probability > 0:
            self._words[self._typed + text] += probability

    def _last_of_best(self, num: int) -> float:
        best = heapq.nlargest(num, self._words.values())
        return best[-1] if len(best) == num else 0.0


def is_word_character(character: str) -> bool:
    """Tell whether a character can stand in a word, at least inside."""
    return character in JOINERS or in_word(character)


def word_begun(text: str) -> str:
    """Give the word that a text ends in the middle of, as far as it is there; none after white space."""
    start = len(text)
    while start and is_word_character(text[start - 1]):
        start -= 1
    return text[start:].lstrip(JOINERS)


def _scan(part: bytes) -> _Scan:
    num_bytes = 0
    while num_bytes < len(part):
        first = part[num_bytes]
        length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        character = part[num_bytes : num_bytes + length]
        try:
            known = is_word_character(character.decode())
        except UnicodeDecodeError as error:
            if len(character) < length and error.reason == "unexpected end of data":
                return _Scan(num_bytes, False, character)
            return _Scan(num_bytes, True)
        if not known:
            return _Scan(num_bytes, True)
        num_bytes += length
    return _Scan(num_bytes, False)


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.array(list(ids), dtype=np.int64)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
