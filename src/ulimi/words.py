"""From generated tokens to words: whole ones, with their probabilities, up to where the text ends.

A word is a run of tokens up to the next token that begins with white space, or up to a line's end; the white space in
front belongs to it. Its probability is the product of its tokens' probabilities. That the word ends there is not part
of it: the next token tells that.

Light floor: this module knows tokens and text, not the network.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError, nearest
from ulimi.tokenizer import Tokenizer

ENDS = ("never", "paragraph", "sentence")
"""where a text may end by itself: nowhere, at a line's end, at a sentence's or a line's end"""

SENTENCE_END = re.compile(r"""[.!?…]["'”’»)\]]*$""")
WORD_PART = re.compile(r"[\w'’]*$")
"""the part of a word that stands at the end of a text: hyphens part words"""

TAIL_TOKENS = 64
"""of which a rule reads the text: no banned word is longer"""


@dataclass(frozen=True)
class Word:
    """A stretch of text whose tokens belong together."""

    text: str
    """with the white space in front of it, as it stands in the running text"""
    logprob: float
    """nats, summed over its tokens"""
    num_tokens: int


@dataclass(frozen=True)
class Ending:
    """Where a text ends. All counts are of what is written, without the prompt; 0 is no limit.

    Raises:
        UlimiError: values that are not allowed, or not together.
    """

    max_tokens: int = 100
    at: str = "never"
    """one of `ENDS`"""
    stops: tuple[str, ...] = ()
    """strings before which it ends"""
    max_words: int = 0
    max_chars: int = 0
    """a word that would pass it is left out"""
    min_tokens: int = 0
    """before a minimum is reached, it ends neither with its paragraph nor with a sentence"""
    min_words: int = 0
    min_chars: int = 0

    def __post_init__(self) -> None:
        if self.at not in ENDS:
            raise UlimiError(f"a text ends {self.at!r}: allowed: {', '.join(ENDS)}{nearest(self.at, ENDS)}")
        if "" in self.stops:
            raise UlimiError("an empty stop string would end every text at once")
        if self.max_tokens < 1:
            raise UlimiError(f"max_tokens must be 1 or more; got {self.max_tokens}")
        for unit in ("tokens", "words", "chars"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if min(least, most) < 0:
                raise UlimiError(f"min_{unit} and max_{unit} must be 0 (no limit) or more; got {least} and {most}")
            if most and least > most:
                raise UlimiError(f"min_{unit} is {least} and max_{unit} is {most}: no text is both")
            if least and self.at == "never":
                raise UlimiError(
                    f"min_{unit} is {least}, but the text ends nowhere by itself: choose paragraph or sentence"
                )


class WordWriter:
    """Collect the tokens of one text and give its words as they become certain.

    Text is held back while it could still grow into a stop string. Once the text has ended, `stopped` is true. All
    words together are exactly the text.

    Args:
        tokenizer: of the model.
        ending: where the text ends.
        after: the text that this one goes on from; kind "word" puts a space between two words.
        typed: what the first tokens spell that was typed already: it is not counted.
    """

    def __init__(self, tokenizer: Tokenizer, ending: Ending | None = None, after: str = "", typed: str = "") -> None:
        self._tokenizer = tokenizer
        self._ending = ending or Ending()
        self._held_chars = max((len(stop) for stop in self._ending.stops), default=1) - 1
        self._stream = tokenizer.stream(words=False)
        self._joins_word = not tokenizer.is_lossless and bool(after) and not after[-1].isspace()
        self._words: list[Word] = []
        self._open = Word("", 0.0, 0)
        self._num_tokens = 0
        self._num_words = 0  # closed ones that are more than white space
        self._num_chars = -len(typed)  # of closed ones
        self.stopped = False

    def push(self, token: int, logprob: float) -> Iterator[Word]:
        """Take one token; yield the words that are now complete and certain."""
        if self.stopped:
            return
        text = self._decode(token)
        is_eos = token == self._tokenizer.eos_id
        word_ends = self.unfinished and (text[:1].isspace() or is_eos)
        if (word_ends and self.ends_with_this_word) or (is_eos and self._ending.at != "never" and self.long_enough):
            self.stopped = True
        else:
            if word_ends:
                self._close()
            self._num_tokens += 1
            self._open = Word(self._open.text + text, self._open.logprob + logprob, self._open.num_tokens + 1)
            if self._ending.max_chars and self._num_chars + len(self._open.text) > self._ending.max_chars:
                self._open, self.stopped = Word("", 0.0, 0), True
        if is_eos or self.stopped:
            self._close()
        self._look_for_stop()
        while self._words and (self.stopped or self._certain()):
            yield self._words.pop(0)

    def fork(self) -> "WordWriter":
        """Start another writer from here: each goes on by itself."""
        twin = copy(self)
        twin._stream, twin._words = self._stream.fork(), list(self._words)
        return twin

    @property
    def unfinished(self) -> bool:
        """Whether the last word could still go on."""
        return self._open.num_tokens > 0

    @property
    def long_enough(self) -> bool:
        """Whether the text may end, should its last word do so."""
        ending = self._ending
        return (
            self._num_tokens >= ending.min_tokens
            and self._num_words + self._is_word >= ending.min_words
            and self._num_chars + len(self._open.text) >= ending.min_chars
        )

    @property
    def ends_with_this_word(self) -> bool:
        """Whether the text ends if its last word does."""
        if self._ending.max_words and self._num_words + self._is_word >= self._ending.max_words:
            return True
        ends_sentence = self._ending.at == "sentence" and SENTENCE_END.search(self._open.text) is not None
        return ends_sentence and self.long_enough

    @property
    def _is_word(self) -> bool:
        return bool(self._open.text.strip())

    def flush(self, *, cut_off: bool = False) -> Iterator[Word]:
        """Yield what is left when no more tokens come.

        Args:
            cut_off: the last word was not finished; it is left out, but not where it is all that there is.
        """
        if not self.stopped:
            rest = self._stream.flush()
            self._open = Word(self._open.text + rest, self._open.logprob, self._open.num_tokens)
            if cut_off and self.unfinished and (self._num_words > 0 or self._words):
                self._open = Word("", 0.0, 0)
            self._look_for_stop()
        self._close()
        words, self._words = self._words, []
        yield from words

    def _decode(self, token: int) -> str:
        text = self._stream.push(token)
        if self._joins_word and token != self._tokenizer.eos_id:
            text = " " + text
        self._joins_word = False
        return text

    def _close(self) -> None:
        if self._open.text or self._open.num_tokens:
            self._words.append(self._open)
            self._num_chars += len(self._open.text)
            self._num_words += self._is_word
        self._open = Word("", 0.0, 0)

    def _certain(self) -> bool:
        """Tell whether the first word can no longer be reached by a stop string that is still growing."""
        after = sum(len(word.text) for word in self._words[1:]) + len(self._open.text)
        return after >= self._held_chars

    def _look_for_stop(self) -> None:
        pending = [*self._words, self._open]
        text = "".join(word.text for word in pending)
        places = [place for stop in self._ending.stops if (place := text.find(stop)) >= 0]
        if not places:
            return
        self.stopped = True
        self._words, self._open = [], Word("", 0.0, 0)
        left = min(places)
        for word in pending:
            if left <= 0:
                break
            self._words.append(Word(word.text[:left], word.logprob, word.num_tokens))
            left -= len(word.text)


def group_words(tokenizer: Tokenizer, tokens: Iterable[tuple[int, float]]) -> list[Word]:
    """Group the (id, logprob) pairs of a finished text into its words."""
    writer = WordWriter(tokenizer)
    words = [word for token, logprob in tokens for word in writer.push(token, logprob)]
    return [*words, *writer.flush()]


def begins_word(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Tell of each token, (V,), whether a `Word` before it is over: it begins with white space or ends the line."""
    if not tokenizer.is_lossless:
        return np.ones(tokenizer.vocab_size, dtype=bool)
    firsts = [tokenizer.token_bytes(id).decode("utf-8", "replace")[:1] for id in range(tokenizer.vocab_size)]
    return np.array([first.isspace() for first in firsts])


def ends_word(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Tell of each token, (V,), whether a word before it is over: it begins with neither letter, mark nor digit."""
    if not tokenizer.is_lossless:
        return np.ones(tokenizer.vocab_size, dtype=bool)
    # A byte above 0x7f alone is part of a letter, as far as anyone can tell.
    firsts = [tokenizer.token_bytes(id).decode("utf-8", "replace")[:1] for id in range(tokenizer.vocab_size)]
    return np.array([not (first == "\ufffd" or WORD_PART.fullmatch(first)) for first in firsts])


class BannedWords:
    """A rule (`ulimi.sampling.Rule`): no word is one of these, however it is spelled in tokens or capitals.

    A longer word that begins like a banned one may come; the banned one cannot end. Words are parted by all that is
    neither letter, mark, digit nor apostrophe; a banned word with a hyphen is compared with hyphens.

    Args:
        tokenizer: of the model.
        words: without white space.
        ends_word_V: of `ends_word`.

    Raises:
        UlimiError: one is empty or holds white space.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], ends_word_V: NDArray[np.bool_]) -> None:
        check_single_words(words, "a banned word")
        self._tokenizer = tokenizer
        self._words = {word.casefold() for word in words}
        self._ends_word_V = ends_word_V

    def __call__(self, ids: Sequence[int], logits_V: NDArray[np.float64]) -> None:
        """Rule out what would end a banned word that stands at the end."""
        if not self._tokenizer.is_lossless:
            # Each token is a word.
            banned = [
                id for id in range(len(logits_V)) if self._tokenizer.token_bytes(id).decode().casefold() in self._words
            ]
            logits_V[banned] = -np.inf
            return
        text = self._tokenizer.decode(ids[-TAIL_TOKENS:]).casefold()
        match = re.search(r"[\w'’-]*$", text)
        assert match is not None
        whole, _, part = match[0], *match[0].rpartition("-")[1:]
        if whole in self._words or part in self._words:
            logits_V[self._ends_word_V] = -np.inf


def check_single_words(words: Iterable[str], what: str) -> None:
    """Refuse what is no word: nothing, or several."""
    wrong = next((word for word in words if word.split() != [word]), None)
    if wrong is not None:
        raise UlimiError(f"{what} must be one word without white space; got {wrong!r}")
