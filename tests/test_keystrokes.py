"""Keystrokes against hands that count: what a person types is written out here, key by key."""

import unicodedata

import pytest

from ulimi.keystrokes import Keystrokes, count_keystrokes, word_spans
from ulimi.suggest import Suggestion


class Fake:
    """Suggests what a function says, and remembers what it was asked."""

    def __init__(self, words=lambda text: []) -> None:
        self._words = words
        self.asked: list[str] = []

    def suggest(self, text: str, num: int = 5) -> list[Suggestion]:
        self.asked.append(text)
        return [Suggestion(word, 0.1) for word in self._words(text)[:num]]


def perfect(line: str) -> Fake:
    """Knows the line."""
    ends = dict(word_spans(line))
    return Fake(lambda text: [line[start:end] for start, end in ends.items() if start <= len(text) < end])


@pytest.mark.parametrize(("line", "keys"), [
    ("kahle kakhulu", ["kahle_", "kakhulu", "end"]),
    ("Yebo, ng'ombe.", ["Yebo", ",", " ", "ng'ombe", ".", "end"]),
    ("e-Goli  'inja' ku", ["e-Goli_", " ", "'", "inja", "'", " ", "ku", "end"]),
    ("a b", ["a_", "b", "end"]),
    ("", ["end"]),
    (" - ", [" ", "-", " ", "end"]),
    ("ngo-2024: 10%", ["ngo-2024", ":", " ", "10", "%", "end"]),
])  # fmt: skip
def test_with_every_word_suggested_at_once(line, keys):
    cost = count_keystrokes(perfect(line), [line])
    assert cost.num_keystrokes == len(keys)
    assert cost.num_chars == len(line) + 1


def test_a_useless_one_spares_nothing_and_is_asked_before_each_letter():
    useless = Fake(lambda text: ["izulu", "kahl"])
    cost = count_keystrokes(useless, ["kahle, ku", "ab a"])
    assert cost == Keystrokes(num_keystrokes=15, num_chars=15, num_words=4, num_taken=0, num_lines=2)
    assert cost.spared == 0
    # Where one key is left anyway, taking a word would spare none.
    assert useless.asked == ["", "k", "ka", "kah", "kahle, ", "", "a"]


def test_a_word_is_taken_as_soon_as_it_shows():
    shows = Fake(lambda text: ["izulu", "kakade", "kakhulu"] if text.endswith("kak") else [])
    cost = count_keystrokes(shows, ["kahle kakhulu nje"])
    # k a h l e _ k a k [kakhulu_] n j e end
    assert cost == Keystrokes(num_keystrokes=14, num_chars=18, num_words=3, num_taken=1, num_lines=1)
    assert cost.spared == pytest.approx(4 / 18)
    assert count_keystrokes(shows, ["kahle kakhulu nje"], 2).num_taken == 0


def test_a_word_that_is_only_a_part_is_not_taken():
    assert count_keystrokes(Fake(lambda text: ["e", "Goli", "e-"]), ["e-Goli"]).num_keystrokes == 7
    assert count_keystrokes(Fake(lambda text: ["e-Goli"]), ["e-Goli"]).num_keystrokes == 2


def test_each_line_is_typed_by_itself_and_counted_in_nfc():
    fake, done = Fake(), []
    cost = count_keystrokes(fake, [unicodedata.normalize("NFD", "café"), "iya"], on_lines=done.append)
    assert (cost.num_chars, cost.num_lines) == (9, 2)
    assert fake.asked == ["", "c", "ca", "", "i"]
    assert done == [1, 2]
    assert count_keystrokes(fake, []).spared == 0


def test_two_texts_cost_what_they_cost_together():
    a, b = (count_keystrokes(perfect(line), [line]) for line in ("kahle kakhulu", "e-Goli"))
    assert (a + b).as_dict() == {
        "num_keystrokes": 5, "num_chars": 21, "num_words": 3, "num_taken": 3, "num_lines": 2, "spared": 1 - 5 / 21,
    }  # fmt: skip


@pytest.mark.parametrize(("line", "words"), [
    ("Hhayi, 'ng’ombe' -e-Goli- (KwaZulu-Natal).", ["Hhayi", "ng’ombe", "e-Goli", "KwaZulu-Natal"]),
    ("R50 000 10%", ["R50", "000", "10"]),
    ("--- ’ .", []),
    ("m\u0300a_b", ["m\u0300a", "b"]),
])  # fmt: skip
def test_the_words_of_a_line(line, words):
    assert [line[start:end] for start, end in word_spans(line)] == words
