"""From generated tokens to words: whole ones, with their probabilities, up to a stop string.

A word is a run of tokens up to the next token that begins with white space, or up to a line's end; the white space in
front belongs to it. Its probability is the product of its tokens' probabilities. That the word ends there is not part
of it: the next token tells that.

Light floor: this module knows tokens and text, not the network.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ulimi.tokenizer import Tokenizer


@dataclass(frozen=True)
class Word:
    """A stretch of text whose tokens belong together."""

    text: str
    """with the white space in front of it, as it stands in the running text"""
    logprob: float
    """nats, summed over its tokens"""
    num_tokens: int


class WordWriter:
    """Collect the tokens of one text and give its words as they become certain.

    Text is held back while it could still grow into a stop string. Once one is found, the text ends before it and
    `stopped` is true. All words together are exactly the text.

    Args:
        tokenizer: of the model.
        stops: strings at which the text ends; they are not part of it.
        after: the text that this one goes on from; kind "word" puts a space between two words.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), after: str = "") -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._held_chars = max((len(stop) for stop in stops), default=1) - 1
        self._stream = tokenizer.stream(words=False)
        self._joins_word = not tokenizer.is_lossless and bool(after) and not after[-1].isspace()
        self._words: list[Word] = []
        self._open = Word("", 0.0, 0)
        self.stopped = False

    def push(self, token: int, logprob: float) -> Iterator[Word]:
        """Take one token; yield the words that are now complete and certain."""
        if self.stopped:
            return
        text = self._decode(token)
        if self._open.num_tokens and (text[:1].isspace() or token == self._tokenizer.eos_id):
            self._close()
        self._open = Word(self._open.text + text, self._open.logprob + logprob, self._open.num_tokens + 1)
        if token == self._tokenizer.eos_id:
            self._close()
        self._look_for_stop()
        while not self.stopped and self._words and self._certain():
            yield self._words.pop(0)

    @property
    def unfinished(self) -> bool:
        """Whether the last word could still go on."""
        return self._open.num_tokens > 0

    def flush(self) -> Iterator[Word]:
        """Yield what is left when no more tokens come."""
        if not self.stopped:
            rest = self._stream.flush()
            self._open = Word(self._open.text + rest, self._open.logprob, self._open.num_tokens)
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
        self._open = Word("", 0.0, 0)

    def _certain(self) -> bool:
        """Tell whether the first word can no longer be reached by a stop string that is still growing."""
        after = sum(len(word.text) for word in self._words[1:]) + len(self._open.text)
        return after >= self._held_chars

    def _look_for_stop(self) -> None:
        pending = [*self._words, self._open]
        text = "".join(word.text for word in pending)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
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
