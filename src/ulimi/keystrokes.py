"""How many keystrokes suggestions spare: a person who types a text, and takes the right suggestion as soon as it shows.

The rules, so that figures can be compared:

- Each character is a keystroke, a code point in NFC, and so is the end of each line.
- Before each character of a word, the first included, `num` suggestions are looked at; what a word is, `ulimi.suggest`
  says. If the right one is among them, taking it is one keystroke: it types the rest of the word, and the space after
  it if one follows. (A keyboard that always adds the space takes it back when punctuation is typed next.)
- The person never takes a wrong one, never overlooks the right one, and corrects nothing. Looking costs nothing.
- Each line is typed by itself: the suggester sees what stands before on that line.

The share spared is 1 - keystrokes / characters, line ends counted in both.

Light floor: suggestions come from whatever is given.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ulimi.suggest import JOINERS, Suggestion, is_word_character


class Suggests(Protocol):
    """What suggests words: `ulimi.suggest.Suggester`, or anything else."""

    def suggest(self, text: str, num: int = 5) -> list[Suggestion]:
        """Give at most `num` words that the end of a text may become."""


@dataclass(frozen=True)
class Keystrokes:
    """What typing a text cost."""

    num_keystrokes: int = 0
    num_chars: int = 0
    """code points, one newline a line: the keystrokes without suggestions"""
    num_words: int = 0
    num_taken: int = 0
    """words that were taken from the suggestions"""
    num_lines: int = 0

    @property
    def spared(self) -> float:
        """The share of keystrokes that suggestions spared; 0 for no text."""
        return 1 - self.num_keystrokes / self.num_chars if self.num_chars else 0.0

    def __add__(self, other: "Keystrokes") -> "Keystrokes":
        """What two texts cost together."""
        mine, theirs = asdict(self), asdict(other)
        return Keystrokes(**{key: mine[key] + theirs[key] for key in mine})

    def as_dict(self) -> dict[str, Any]:
        """The keys of `--json`."""
        return {**asdict(self), "spared": self.spared}


def count_keystrokes(
    suggester: Suggests, lines: Iterable[str], num: int = 3, on_lines: Callable[[int], None] = lambda done: None
) -> Keystrokes:
    """Type some lines and count.

    Args:
        suggester: gives the suggestions.
        lines: without their line ends.
        num: suggestions looked at at a time.
        on_lines: told how many lines are done.
    """
    total = Keystrokes()
    for line in lines:
        total += _type_line(suggester, unicodedata.normalize("NFC", line), num)
        on_lines(total.num_lines)
    return total


def _type_line(suggester: Suggests, line: str, num: int) -> Keystrokes:
    keystrokes = done = num_words = num_taken = 0
    for start, end in word_spans(line):
        num_words += 1
        keystrokes += start - done
        done = start
        after = end + (line[end : end + 1] == " ")
        # Taking what one key types too spares nothing.
        while done < end and after - done > 1:
            keystrokes += 1
            if any(suggestion.word == line[start:end] for suggestion in suggester.suggest(line[:done], num)):
                num_taken += 1
                done = after
            else:
                done += 1
    keystrokes += len(line) - done + 1
    return Keystrokes(keystrokes, len(line) + 1, num_words, num_taken, 1)


def word_spans(line: str) -> Iterator[tuple[int, int]]:
    """Yield where each word of a line begins and ends."""
    place = 0
    while place < len(line):
        start = place
        while place < len(line) and is_word_character(line[place]):
            place += 1
        run = line[start:place]
        word = run.strip(JOINERS)
        if word:
            start += run.index(word)
            yield start, start + len(word)
        place += not run
