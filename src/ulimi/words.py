"""From generated tokens to words: whole ones, with their probabilities, up to where the text ends.

A word is a run of tokens up to the next token that begins with white space, or up to a line's end; the white space in
front belongs to it. Its probability is the product of its tokens' probabilities. That the word ends there is not part
of it: the next token tells that.

Light floor: this module knows tokens and text, not the network.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError, nearest
from ulimi.tokenizer import Tokenizer

ENDS = ("never", "paragraph", "sentence")
"""where a text may end by itself: nowhere, at a line's end, at a sentence's or a line's end"""

PROBABILITY_STEPS = (0.5, 0.1, 0.01, 0.001, 0.0)
"""a word that is at least so probable, and not more than the step before, is shown in the same colour everywhere"""

SENTENCE_END = re.compile(r"""[.!?…]["'”’»)\]]*$""")
APOSTROPHES = "'’"
"""they belong to a word, but not at its edges"""


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

    A word that the prompt has begun counts if anything is written in it.

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
        typed: what the first tokens spell that was typed already: it is not counted, and neither it nor a stop string
            in it ends the text.
        may_end: whether a text may end so; if not, a last word that a limit or a stop string leaves there is left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, ending: Ending | None = None, after: str = "", typed: str = "",
        may_end: Callable[[str], bool] = lambda text: True,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._may_end = may_end
        self._given = after  # what stands before all words that are not yet given away, as far back as it matters
        self._ending = ending or Ending()
        self._held_chars = max((len(stop) for stop in self._ending.stops), default=1) - 1
        self._stream = tokenizer.stream(words=False)
        self._joins_word = not tokenizer.is_lossless and bool(after) and not after[-1].isspace()
        self._words: list[Word] = []
        self._open = Word("", 0.0, 0)
        self._typed = typed
        self._num_tokens = 0
        self._num_words = 0  # closed ones that are more than white space
        self._num_chars = -len(typed)  # of closed ones
        self._num_typed = len(typed)  # characters of it in the words that are not yet given away
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
            self._open = Word(self._open.text + text, self._open.logprob + logprob, self._open.num_tokens + 1)
            # Of the tokens that spell what was typed, only the last may hold more.
            self._num_tokens += self._num_written >= 0
            if self._ending.max_chars and self._num_written > self._ending.max_chars:
                self._open, self.stopped = Word("", 0.0, 0), True
        if is_eos or self.stopped:
            self._close()
        self._look_for_stop()
        while self._words and (self.stopped or self._certain()):
            word = self._words.pop(0)
            self._given = word.text
            self._num_typed = max(0, self._num_typed - len(word.text))
            yield word

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
            and self._num_written >= ending.min_chars
        )

    @property
    def ends_with_this_word(self) -> bool:
        """Whether the text ends if its last word does."""
        if self._ending.max_words and self._num_words + self._is_word >= self._ending.max_words:
            return True
        ends_sentence = self._ending.at == "sentence" and SENTENCE_END.search(self._open.text) is not None
        return ends_sentence and self._num_written > 0 and self.long_enough

    @property
    def _is_word(self) -> bool:
        return bool(self._open.text[max(0, -self._num_chars) :].strip())

    @property
    def _num_written(self) -> int:
        """Characters; below 0 while what was typed is not yet spelled."""
        return self._num_chars + len(self._open.text)

    def flush(self, *, cut_off: bool = False) -> Iterator[Word]:
        """Yield what is left when no more tokens come; also what was typed, where the words that held it were left out.

        Args:
            cut_off: the last word was not finished; it is left out, but not where it is all that there is.
        """
        if not self.stopped:
            rest = self._stream.flush()
            self._open = Word(self._open.text + rest, self._open.logprob, self._open.num_tokens)
            is_alone = self._num_words == 0 and not self._words
            if cut_off and self.unfinished and not (is_alone and self._may_end(self._given + self._open.text)):
                self._open = Word("", 0.0, 0)
            self._look_for_stop()
        self._close()
        words, self._words = self._words, []
        yield from words
        num_left = self._num_typed - sum(len(word.text) for word in words)
        if num_left > 0:
            yield Word(self._typed[-num_left:], 0.0, 0)  # it is certain

    def _decode(self, token: int) -> str:
        text = self._stream.push(token)
        if token == self._tokenizer.unk_id and self._num_written < 0:
            text = self._typed  # what a closed vocabulary does not know stays as it was typed
        if self._joins_word and token != self._tokenizer.eos_id:
            text = " " + text
        self._joins_word = False
        return text

    def _close(self) -> None:
        if self._open.text or self._open.num_tokens:
            self._words.append(self._open)
            self._num_words += self._is_word  # which looks at the characters before it
            self._num_chars += len(self._open.text)
        self._open = Word("", 0.0, 0)

    def _certain(self) -> bool:
        """Tell whether the first word can no longer be reached by a stop string that is still growing."""
        after = sum(len(word.text) for word in self._words[1:]) + len(self._open.text)
        return after >= self._held_chars

    def _look_for_stop(self) -> None:
        pending = [*self._words, self._open]
        text = "".join(word.text for word in pending)
        places = [place for stop in self._ending.stops if (place := text.find(stop, self._num_typed)) >= 0]
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
        if self._words and not self._may_end(self._given + "".join(word.text for word in self._words)):
            self._words.pop()


def group_words(tokenizer: Tokenizer, tokens: Iterable[tuple[int, float]]) -> list[Word]:
    """Group the (id, logprob) pairs of a finished text into its words."""
    writer = WordWriter(tokenizer)
    words = [word for token, logprob in tokens for word in writer.push(token, logprob)]
    return [*words, *writer.flush()]


def begins_word(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Tell of each token, (V,), whether a `Word` before it is over: it begins with white space or ends the line."""
    if not tokenizer.is_lossless:
        return np.ones(tokenizer.vocab_size, dtype=bool)
    return np.array([first.isspace() for first in _first_characters(tokenizer)])


def ends_word(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Tell of each token, (V,), whether a word before it is surely over, see `words_in`."""
    if not tokenizer.is_lossless:
        return np.ones(tokenizer.vocab_size, dtype=bool)
    # A byte above 0x7f alone is part of a letter, as far as anyone can tell.
    return np.array([not (first == "\ufffd" or in_word(first)) for first in _first_characters(tokenizer)])


def _first_characters(tokenizer: Tokenizer) -> list[str]:
    """Give each token's first character, U+FFFD where it begins inside one."""
    return [tokenizer.token_bytes(id).decode("utf-8", "replace")[:1] for id in range(tokenizer.vocab_size)]


def words_in(text: str) -> set[str]:
    """Give the words of a text: they are parted by all that is neither letter, mark, digit nor apostrophe.

    Apostrophes at a word's edges are quotation marks and do not belong to it. Of words that hyphens join, each is one,
    and so are those beside each other together.
    """
    words: set[str] = set()
    for run in "".join(c if c == "-" or in_word(c) else " " for c in text).split():
        parts = run.split("-")
        words |= {"-".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return {stripped for word in words if (stripped := word.strip(APOSTROPHES)).strip("-")}


class BannedWords:
    """A rule (`ulimi.sampling.Rule`): no word, in the sense of `words_in`, is one of these, in whatever capitals.

    A longer word that begins like a banned one may come; the banned one cannot end.

    Args:
        tokenizer: of the model.
        words: see `check_words`.

    Raises:
        UlimiError: one is no word.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        check_words(words, "a banned word")
        self._tokenizer = tokenizer
        self._words = {self._folded(word).strip(APOSTROPHES) for word in words}
        # Each token is a byte at least; twice as many leave room for other capitals, and for what stands before.
        self._num_tail = 2 + 2 * max((len(word.encode()) for word in self._words), default=0)
        texts = [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in range(tokenizer.vocab_size)]
        if tokenizer.is_lossless:
            self._ruled_out_V = np.array([not _surely_goes_on(text) for text in texts])
        else:
            # Each token is a word between white space.
            self._ruled_out_V = np.array([not self._words.isdisjoint(words_in(self._folded(text))) for text in texts])

    def __call__(self, ids: Sequence[int], logits_V: NDArray[np.float64]) -> None:
        """Rule out what would end a banned word that stands at the end."""
        if not self._tokenizer.is_lossless or self.ends(self._tokenizer.decode(ids[-self._num_tail :])):
            logits_V[self._ruled_out_V] = -np.inf

    def ends(self, text: str) -> bool:
        """Tell whether one of them stands at the end of a text."""
        text = self._folded(text)
        start = len(text)
        while start and (text[start - 1] == "-" or in_word(text[start - 1])):
            start -= 1
        parts = text[start:].split("-")
        return any("-".join(parts[i:]).strip(APOSTROPHES) in self._words for i in range(len(parts)))

    def _folded(self, text: str) -> str:
        return self._tokenizer.normalize(text).casefold()


def check_words(words: Iterable[str], what: str) -> None:
    """Refuse what is no word in the sense of `words_in`: nothing, several, punctuation."""
    wrong = next((word for word in words if word.strip(APOSTROPHES) not in words_in(word)), None)
    if wrong is not None:
        raise UlimiError(f"{what} must be one word, of letters, digits, hyphens and apostrophes; got {wrong!r}")


def in_word(character: str) -> bool:
    """Tell whether a character can stand in a word without hyphens: a letter, mark, digit or apostrophe."""
    return character in APOSTROPHES or unicodedata.category(character)[0] in "LMN"


def _surely_goes_on(text: str) -> bool:
    """Whether a token goes on with a word before it: apostrophes alone may still do so."""
    rest = text.lstrip(APOSTROPHES)
    return in_word(rest[0]) if rest else bool(text)
