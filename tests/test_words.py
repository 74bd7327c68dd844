"""From tokens to words: nothing lost, nothing shown that a stop string takes back."""

import codecs
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulimi.tokenizer import KINDS, Tokenizer
from ulimi.words import Ending, Word, WordWriter, group_words

LINES = [
    "Ngiya eNingizimu Afrika ngoMsombuluko, 2026.",
    "Abantwana bayafunda; bayafunda isiZulu esikoleni 😀.",
    "UThandi  uthi: “Sawubona mhlaba!”",
] * 3
SIZES = {"bpe": 340, "unigram": 340, "word": None, "char": None}
TOKENIZERS = {kind: Tokenizer.train(LINES, kind=kind, vocab_size=SIZES[kind]) for kind in KINDS}
# What is written as ids of a text is words; what is drawn freely is mostly broken UTF-8.
texts = st.text(st.sampled_from("aeNgiy .\n😀 \u3000é"), max_size=20) | st.sampled_from([*LINES, "\n".join(LINES)])
stop_lists = st.lists(st.text(st.sampled_from("aeNi \n.😀\ufffd"), min_size=1, max_size=3), max_size=3)


@st.composite
def tokens(draw):
    tokenizer = TOKENIZERS[draw(st.sampled_from(KINDS))]
    if draw(st.booleans()):
        return tokenizer, tokenizer.encode(draw(texts))
    drawn = st.integers(0, tokenizer.vocab_size - 1) | st.just(tokenizer.eos_id)
    return tokenizer, draw(st.lists(drawn, max_size=25))


def write(tokenizer, ids, stops=(), after=""):
    """Push all ids, each with a log-probability of its own; give the writer and what each call gave."""
    writer = WordWriter(tokenizer, Ending(stops=tuple(stops)), after)
    parts = [list(writer.push(token, -float(2**place))) for place, token in enumerate(ids)]
    return writer, [*parts, list(writer.flush())]


def joined(words):
    return "".join(word.text for word in words)


def texts_so_far(tokenizer, ids):
    """Decode the first 1, 2, ... ids without what is no whole character yet, and at last all."""
    for num in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:num])
        if tokenizer.is_lossless:
            raw = b"".join(tokenizer.token_bytes(token) for token in ids[:num])
            text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw)
        yield text
    yield tokenizer.decode(ids)


# Nothing is lost


@given(tokens())
@settings(max_examples=300, deadline=None)
def test_the_words_together_are_the_text(case):
    tokenizer, ids = case
    _, parts = write(tokenizer, ids)
    words = [word for part in parts for word in part]
    assert joined(words) == tokenizer.decode(ids)
    assert sum(word.num_tokens for word in words) == len(ids)
    # Powers of two: no other way of sharing the tokens out has the same sums.
    assert sum(word.logprob for word in words) == -float(2 ** len(ids) - 1)
    places = iter(range(len(ids)))
    for word in words:
        assert word.logprob == -sum(float(2 ** next(places)) for _ in range(word.num_tokens))


@given(tokens())
@settings(max_examples=100, deadline=None)
def test_grouping_a_finished_text_is_writing_it(case):
    tokenizer, ids = case
    _, parts = write(tokenizer, ids)
    pairs = [(token, -float(2**place)) for place, token in enumerate(ids)]
    assert group_words(tokenizer, pairs) == [word for part in parts for word in part]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_whole_and_carry_the_space_before_them(kind):
    tokenizer = TOKENIZERS[kind]
    _, parts = write(tokenizer, tokenizer.encode("Ngiya esikoleni 2026.\nUThandi uthi:\n\nAfrika"))
    words = [word.text for part in parts for word in part]
    assert words == ["Ngiya", " esikoleni", " 2026.", "\n", "UThandi", " uthi:", "\n", "\n", "Afrika"]


def test_the_probability_of_a_word_is_the_product_of_its_tokens():
    tokenizer = TOKENIZERS["char"]
    ids = tokenizer.encode("ab cd\n")
    words = group_words(tokenizer, [(token, math.log(0.5)) for token in ids])
    assert [(word.text, word.num_tokens) for word in words] == [("ab", 2), (" cd", 3), ("\n", 1)]
    assert [math.exp(word.logprob) for word in words] == pytest.approx([0.25, 0.125, 0.5])


def test_a_word_comes_as_soon_as_the_next_begins():
    tokenizer = TOKENIZERS["char"]
    _, parts = write(tokenizer, tokenizer.encode("ab cd\nN"))
    assert [joined(part) for part in parts] == ["", "", "ab", "", "", " cd\n", "", "N"]


@pytest.mark.parametrize(("after", "expected"), [
    ("", "Ngiya eNingizimu"),
    ("UThandi uthi:", " Ngiya eNingizimu"),
    ("UThandi uthi:\n", "Ngiya eNingizimu"),
])  # fmt: skip
def test_words_of_a_closed_vocabulary_do_not_stick_to_the_text_before(after, expected):
    tokenizer = TOKENIZERS["word"]
    ids = tokenizer.encode("Ngiya eNingizimu")
    _, parts = write(tokenizer, ids, after=after)
    assert joined(word for part in parts for word in part) == expected
    assert after + expected == tokenizer.decode([*tokenizer.encode(after), *ids])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_other_kinds_know_their_spaces_whatever_stands_before(kind):
    tokenizer = TOKENIZERS[kind]
    _, parts = write(tokenizer, tokenizer.encode("zimu Afrika"), after="Ningi")
    assert joined(word for part in parts for word in part) == "zimu Afrika"


# Incomplete UTF-8


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_character_comes_when_its_last_byte_does(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("漢𝄞")[3:]  # not in the training text: bytes
    assert [tokenizer.token_bytes(token) for token in ids] == [b"\xf0", b"\x9d", b"\x84", b"\x9e"]
    space = tokenizer.encode(" ")
    _, parts = write(tokenizer, [*ids, *space])
    assert [joined(part) for part in parts] == ["", "", "", "", "𝄞", " "]
    _, parts = write(tokenizer, [*ids[:3], *space])
    assert joined(word for part in parts for word in part) == "\ufffd "
    _, parts = write(tokenizer, ids[:3])
    assert [joined(part) for part in parts] == ["", "", "", "\ufffd"]
    _, parts = write(tokenizer, [*ids[:2], tokenizer.eos_id, *ids[2:]])
    assert joined(word for part in parts for word in part) == tokenizer.decode([*ids[:2], tokenizer.eos_id, *ids[2:]])


def test_half_a_character_after_a_stop_string_is_not_shown():
    """A token may hold the end of one character and the beginning of the next."""
    tokenizer = Tokenizer.train(["bé bè bê bë bü bà"] * 9, kind="bpe", vocab_size=262)
    token = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token).endswith(b"b\xc3"))
    writer, parts = write(tokenizer, [token], stops=["b"])
    assert writer.stopped
    assert joined(word for part in parts for word in part).strip() == ""


# Stop strings


@given(tokens(), stop_lists)
@settings(max_examples=600, deadline=None)
def test_a_text_ends_before_the_stop_string_that_is_first_complete(case, stops):
    tokenizer, ids = case
    writer, parts = write(tokenizer, ids, stops)
    expected, stopped = tokenizer.decode(ids), False
    for text in texts_so_far(tokenizer, ids):
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            expected, stopped = text[: min(places)], True
            break
    words = [word for part in parts for word in part]
    assert joined(words) == expected
    assert writer.stopped is stopped
    assert all(word.num_tokens for word in words)
    if not stopped:
        assert sum(word.num_tokens for word in words) == len(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
@pytest.mark.parametrize(("stop", "expected"), [
    ("isiZulu", "Abantwana bayafunda "),
    ("funda is", "Abantwana baya"),  # over a word border
    ("da isiZulu\nU", "Abantwana bayafun"),  # over a line's end
    ("\n", "Abantwana bayafunda isiZulu"),
    (" ", "Abantwana"),
    ("A", ""),
    ("uthi", "Abantwana bayafunda isiZulu\nUThandi "),
    ("thix", "Abantwana bayafunda isiZulu\nUThandi uthi"),  # begins, and never ends
])  # fmt: skip
def test_a_stop_string_may_cross_tokens_words_and_lines(kind, stop, expected):
    tokenizer = TOKENIZERS[kind]
    writer, parts = write(tokenizer, tokenizer.encode("Abantwana bayafunda isiZulu\nUThandi uthi"), [stop])
    assert joined(word for part in parts for word in part) == expected
    assert writer.stopped is (stop != "thix")


def test_of_two_stop_strings_the_earlier_in_the_text_counts():
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer.encode("Abantwana bayafunda isiZulu")
    for stops in (["Zulu", "funda"], ["funda", "Zulu"]):
        assert joined(word for part in write(tokenizer, ids, stops)[1] for word in part) == "Abantwana baya"


def test_only_what_could_still_become_a_stop_string_is_held_back():
    tokenizer = TOKENIZERS["char"]
    ids = tokenizer.encode("a b c d")
    _, parts = write(tokenizer, ids, [" d"])
    assert [joined(part) for part in parts] == ["", "a", "", " b", "", " c", "", ""]
    _, parts = write(tokenizer, ids, ["xxxxx"])
    assert [joined(part) for part in parts] == ["", "", "", "", "a", "", " b", " c d"]


def test_after_a_stop_nothing_more_is_taken():
    tokenizer = TOKENIZERS["char"]
    writer = WordWriter(tokenizer, Ending(stops=(" b",)))
    words = [word for token in tokenizer.encode("a b c") for word in writer.push(token, -1.0)]
    assert writer.stopped
    assert [*words, *writer.flush()] == [Word("a", -1.0, 1)]
    assert list(writer.push(tokenizer.encode("a")[0], -1.0)) == []
    assert list(writer.flush()) == []
