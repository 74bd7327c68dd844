"""From tokens to words: nothing lost, nothing shown that a stop string takes back."""

import codecs
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulimi.errors import UlimiError
from ulimi.tokenizer import KINDS, Tokenizer
from ulimi.words import BannedWords, Ending, Word, WordWriter, begins_word, ends_word, group_words, words_in

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


# Endings


@pytest.mark.parametrize(("options", "said"), [
    ({"at": "paragraf"}, "a text ends 'paragraf': allowed: never, paragraph, sentence; did you mean 'paragraph'"),
    ({"stops": ("a", "")}, "an empty stop string"),
    ({"max_tokens": 0}, "max_tokens must be 1 or more; got 0"),
    ({"max_words": -1}, "min_words and max_words must be 0"),
    ({"min_chars": -1, "at": "sentence"}, "min_chars and max_chars must be 0"),
    ({"min_words": 4, "max_words": 3, "at": "sentence"}, "min_words is 4 and max_words is 3: no text is both"),
    ({"min_tokens": 101, "at": "sentence"}, "min_tokens is 101 and max_tokens is 100: no text is both"),
    ({"min_words": 2}, "min_words is 2, but the text ends nowhere by itself"),
])  # fmt: skip
def test_endings_that_are_not_allowed_or_not_together(options, said):
    with pytest.raises(UlimiError, match=said):
        Ending(**options)


def written(kind, text, ending, typed=""):
    """Write the tokens of a text and give what was written, with what was typed."""
    writer = WordWriter(TOKENIZERS[kind], ending, typed=typed)
    words = [word for token in TOKENIZERS[kind].encode(text) for word in writer.push(token, -1.0)]
    return joined([*words, *writer.flush()])


NO_WORD_KIND = ["bpe", "unigram", "char"]
TEXT = "Ngiya! (eNingizimu.) Afrika… “uthi: 2026.”\nAbantu"


@pytest.mark.parametrize("kind", NO_WORD_KIND)
@pytest.mark.parametrize(("ending", "expected"), [
    (Ending(at="sentence"), "Ngiya!"),
    (Ending(at="sentence", min_words=2), "Ngiya! (eNingizimu.)"),
    (Ending(at="sentence", min_chars=21), "Ngiya! (eNingizimu.) Afrika…"),
    (Ending(at="sentence", min_words=4), "Ngiya! (eNingizimu.) Afrika… “uthi: 2026.”"),
    (Ending(at="paragraph"), "Ngiya! (eNingizimu.) Afrika… “uthi: 2026.”"),
    (Ending(), TEXT),
    (Ending(max_words=2), "Ngiya! (eNingizimu.)"),
    (Ending(max_words=5), "Ngiya! (eNingizimu.) Afrika… “uthi: 2026.”"),
    (Ending(max_words=6), TEXT),
    (Ending(max_chars=5), ""),
    (Ending(max_chars=6), "Ngiya!"),
    (Ending(max_chars=19), "Ngiya!"),
    (Ending(max_chars=20), "Ngiya! (eNingizimu.)"),
    (Ending(max_chars=6, at="sentence"), "Ngiya!"),
    (Ending(stops=("mu.",), max_words=2), "Ngiya! (eNingizi"),
    (Ending(stops=("Afrika",), max_words=2), "Ngiya! (eNingizimu.)"),
], ids=str)  # fmt: skip
def test_where_a_text_ends(kind, ending, expected):
    assert written(kind, TEXT, ending) == expected


@pytest.mark.parametrize("kind", NO_WORD_KIND)
@pytest.mark.parametrize(("typed", "ending", "expected"), [
    ("Ngiya!", Ending(at="sentence"), "Ngiya! (eNingizimu.)"),  # a sentence that was typed is none that was written
    ("Ngiya", Ending(at="sentence"), "Ngiya!"),
    ("Ngiya!", Ending(max_words=1), "Ngiya! (eNingizimu.)"),
    ("Ngi", Ending(max_words=1), "Ngiya!"),
    ("Ngiya! ", Ending(max_words=1), "Ngiya! (eNingizimu.)"),
    ("Ngiya!", Ending(max_words=3), "Ngiya! (eNingizimu.) Afrika… “uthi:"),
    ("Ngiya!", Ending(max_chars=13), "Ngiya!"),
    ("Ngiya!", Ending(max_chars=14), "Ngiya! (eNingizimu.)"),
    ("Ngiya!", Ending(min_words=2, at="sentence"), "Ngiya! (eNingizimu.) Afrika…"),
    ("Ngiya!", Ending(min_chars=15, at="sentence"), "Ngiya! (eNingizimu.) Afrika…"),
    ("Ngiya! ", Ending(stops=(" ",)), "Ngiya! (eNingizimu.)"),
    ("Ngiya!", Ending(stops=("giya",)), TEXT),
    ("Ngi", Ending(stops=("iya",)), TEXT),  # begins in what was typed
    ("Ng", Ending(stops=("iya",)), "Ng"),
    ("Ngiya!", Ending(stops=("frika",)), "Ngiya! (eNingizimu.) A"),  # long after what was typed
], ids=str)  # fmt: skip
def test_what_was_typed_is_not_counted(kind, typed, ending, expected):
    assert written(kind, TEXT, ending, typed) == expected


def test_tokens_that_only_spell_what_was_typed_are_not_counted():
    tokenizer = TOKENIZERS["char"]
    for typed, num in (("", 4), ("Ng", 5), ("Ngi", 6)):
        writer = WordWriter(tokenizer, Ending(at="paragraph", min_tokens=4), typed=typed)
        for place, token in enumerate(tokenizer.encode("Ngiyaya"), start=1):
            list(writer.push(token, 0.0))
            assert writer.long_enough is (place >= num)


def test_a_word_that_the_limit_cut_is_left_out_unless_it_is_all():
    tokenizer = TOKENIZERS["char"]
    for text, expected in (
        ("Ngiya eN", "Ngiya"),
        ("Ngi", "Ngi"),
        ("Ngiya ", "Ngiya"),
        ("Ngiya\n", "Ngiya\n"),
        ("a\nb", "a\n"),
    ):
        writer = WordWriter(tokenizer)
        words = [word for token in tokenizer.encode(text) for word in writer.push(token, -1.0)]
        assert joined([*words, *writer.flush(cut_off=True)]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_begins_word_is_where_the_writer_closes_one(kind):
    tokenizer = TOKENIZERS[kind]
    first, *_ = tokenizer.encode("Ngiya")
    begins_V = begins_word(tokenizer)
    for token in range(tokenizer.vocab_size):
        words = group_words(tokenizer, [(first, -1.0), (token, -1.0)])
        if not tokenizer.token_bytes(token).decode("utf-8", "replace").startswith("\ufffd"):
            assert begins_V[token] == (len(words) == 2)


@pytest.mark.parametrize("kind", NO_WORD_KIND)
def test_ends_word_is_what_words_in_parts(kind):
    tokenizer = TOKENIZERS[kind]
    for token, ends in enumerate(ends_word(tokenizer)):
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        if not text.startswith("\ufffd") and text[0] not in "'’":
            assert ends == ("inja" in words_in("inja" + text)), text


# Words, banned ones


@pytest.mark.parametrize(("text", "words"), [
    ("", set()),
    ("Inja, ikati: (2026)!", {"Inja", "ikati", "2026"}),
    ("kwa-Zulu-Natal", {"kwa", "Zulu", "Natal", "kwa-Zulu", "Zulu-Natal", "kwa-Zulu-Natal"}),
    ("'inja' n'ikati’", {"inja", "n'ikati"}),
    ("n\u0308a _inja_ 😀", {"n\u0308a", "inja"}),
    ("- ' '-'", set()),
    ("Inja\nikati\u00a0yami", {"Inja", "ikati", "yami"}),
])  # fmt: skip
def test_words_in(text, words):
    found = words_in(text)
    assert words <= found
    assert {word.strip("-'’") for word in found} == {word.strip("-'’") for word in words}


def ruled_out(tokenizer, banned, ids):
    logits_V = np.zeros(tokenizer.vocab_size)
    BannedWords(tokenizer, banned)(ids, logits_V)
    return set(np.flatnonzero(logits_V == -np.inf).tolist())


@pytest.mark.parametrize("kind", NO_WORD_KIND)
@pytest.mark.parametrize(("text", "is_there"), [
    ("Ngiya", True), ("uthi NGIYA", True), ("“ngiya", True), ("'ngiya", True), ("ngiya'", True), ("e-ngiya", True),
    ("\nngiya", True), ("(ngiya", True), ("é ngiya", True),
    ("engiya", False), ("ngiyaa", False), ("ngiya ", False), ("ngiy", False), ("n'ngiya", False), ("éngiya", False),
    ("2ngiya", False), ("", False), ("ngiya-", False),
])  # fmt: skip
def test_a_banned_word_cannot_end(kind, text, is_there):
    tokenizer = TOKENIZERS[kind]
    out = ruled_out(tokenizer, ["Ngiya"], [tokenizer.eos_id, *tokenizer.encode(text)])
    if not is_there:
        assert out == set()
        return
    assert tokenizer.eos_id in out
    for token in range(tokenizer.vocab_size):
        rest = tokenizer.token_bytes(token).decode("utf-8", "replace")
        if rest[0] == "\ufffd":  # could be a quotation mark
            assert token in out
        elif rest[0] not in "'’":
            assert (token in out) == (unicodedata.category(rest[0])[0] not in "LMN")


def test_a_banned_word_of_a_closed_vocabulary_may_stand_in_its_punctuation():
    tokenizer = Tokenizer.train(["inja inja. 'Inja' injana i-nja ikati-inja, yami"], kind="word")
    out = ruled_out(tokenizer, ["inja"], [tokenizer.eos_id])
    assert {tokenizer.token_bytes(id).decode() for id in out} == {"inja", "inja.", "'Inja'", "ikati-inja,"}


def test_a_banned_word_may_be_long_and_in_any_normal_form():
    tokenizer = TOKENIZERS["char"]
    word = "é" * 70
    for text in (word, word.upper(), "a " + word):
        assert ruled_out(tokenizer, [unicodedata.normalize("NFD", word)], tokenizer.encode(text))
    assert not ruled_out(tokenizer, [word], tokenizer.encode("é" + word))
    assert not ruled_out(tokenizer, [word], tokenizer.encode("é" * 500))


def test_a_banned_word_with_hyphens_is_compared_with_them():
    tokenizer = TOKENIZERS["bpe"]
    for text in ("e-Afrika", "le-e-Afrika", "“e-afrika"):
        assert ruled_out(tokenizer, ["e-Afrika"], tokenizer.encode(text))
    for text in ("Afrika", "e Afrika", "ke-Afrika"):
        assert not ruled_out(tokenizer, ["e-Afrika"], tokenizer.encode(text))


def test_a_token_of_an_apostrophe_and_more_ends_a_banned_word():
    tokenizer = Tokenizer.train(["'inja'. 'ikati'."] * 9, kind="bpe", vocab_size=275)
    texts = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    out = ruled_out(tokenizer, ["inja"], tokenizer.encode("inja"))
    assert texts[b"'."] in out
    assert texts[b"'"] not in out
