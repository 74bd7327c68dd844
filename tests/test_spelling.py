"""Covers against sums over all token sequences, cuts against the tokens of every way to go on."""

import itertools
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_generate import TableEngine, make_engine
from ulimi.engine import load_engine
from ulimi.errors import UlimiError
from ulimi.generate import score_prompt
from ulimi.spelling import MAX_BEGUN_BYTES, TokenIndex, covers, split_prompt
from ulimi.tokenizer import Tokenizer

LINES = [
    "Ngiyabonga kakhulu, mama; ngiyabonga kakhulu nawe.", "Ngiya e-Goli nakwaZulu-Natal ngo-2024.",
    "Abantu bafunda café",
    "ng'ombe  ezimbili; 123456 \u00a0 “izinja” zikhonkotha!", "kakhulu kakhulu kakade kahle",
]  # fmt: skip


class Pieces:
    """What of a tokenizer an index needs, with these tokens and <eos> after them."""

    is_lossless = True
    unk_id = None

    def __init__(self, *tokens: bytes) -> None:
        self._tokens = [*tokens, b"\n"]
        self.vocab_size = len(self._tokens)
        self.eos_id = self.vocab_size - 1

    def token_bytes(self, id: int) -> bytes:
        return self._tokens[id]


def all_covers(tokenizer, begun: bytes, ids=(), spelt=b"") -> list[tuple[int, ...]]:
    """The token sequences that cover, by trying every token."""
    if len(spelt) >= len(begun) and spelt.startswith(begun):
        return [ids]
    if not begun.startswith(spelt):
        return []
    found = []
    for id in range(tokenizer.vocab_size):
        if id not in (tokenizer.eos_id, tokenizer.unk_id):
            found += all_covers(tokenizer, begun, (*ids, id), spelt + tokenizer.token_bytes(id))
    return found


def covers_after(engine, tokenizer, context, begun, **options):
    logits_1V, state = engine.prime(context, engine.initial_state(1))
    return covers(engine, TokenIndex(tokenizer), state, logits_1V, begun, **options)


@pytest.fixture(scope="module", params=["bpe", "unigram", "char", "word"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.train(
        LINES * 3, kind=request.param, vocab_size=300 if request.param in ("bpe", "unigram") else None
    )


# The index


def test_the_index_finds_what_a_look_at_every_token_finds(tokenizer):
    index = TokenIndex(tokenizer)
    usual = [id for id in range(tokenizer.vocab_size) if id not in (tokenizer.eos_id, tokenizer.unk_id)]
    for rest in (b" ", b" k", b"k", b"kakh", b" kakhulu", b"kakhulu,", b"\xc3", "é".encode(), b"qqqq", b"\xff"):
        reaching = {id for id in usual if tokenizer.token_bytes(id).startswith(rest)}
        within = {
            id for id in usual if rest.startswith(tokenizer.token_bytes(id)) and tokenizer.token_bytes(id) != rest
        }
        if tokenizer.kind == "word":
            reaching, within = reaching or {tokenizer.unk_id}, set()
        assert sorted(index.reaching(rest).tolist()) == sorted(reaching)
        assert sorted(id for id, _ in index.within(rest)) == sorted(within)
        assert all(length == len(tokenizer.token_bytes(id)) for id, length in index.within(rest))


# Covers


@pytest.mark.parametrize("begun", [b" ", b" k", b" kak", b"abant", b"-", b"5", "é".encode(), b"zzz"])
def test_covers_of_a_trained_model_are_those_of_brute_force(tiny_run, begun):
    engine, tokenizer = load_engine(tiny_run, kind="torch"), tiny_run.tokenizer
    context = [tokenizer.eos_id, *tokenizer.encode("Abantu")]
    found = covers_after(engine, tokenizer, context, begun, min_share=0, max_covers=10**6, max_steps=10**6)
    expected = {
        ids: sum(step.logprob for step in score_prompt(engine, [*context, *ids])[len(context) - 1 :])
        for ids in all_covers(tokenizer, begun)
    }
    assert {cover.ids for cover in found} == set(expected)
    assert len(found) == len(expected)
    for cover in found:
        assert cover.logprob == pytest.approx(expected[cover.ids], abs=1e-4)
        assert b"".join(map(tokenizer.token_bytes, cover.ids)) == begun + cover.surplus
    assert [cover.logprob for cover in found] == sorted((cover.logprob for cover in found), reverse=True)


def test_the_sum_over_covers_is_the_probability_that_the_text_begins_so():
    pieces = Pieces(b"a", b"b", b"ab", b"ba", b"aba", b"c")
    engine = make_engine(7, seed=3)
    for begun in (b"a", b"ab", b"aba", b"abab"):
        total = 0.0
        for ids in itertools.product(range(7), repeat=len(begun)):  # as many tokens always reach the end
            if b"".join(map(pieces.token_bytes, ids)).startswith(begun):
                total += math.exp(sum(step.logprob for step in score_prompt(engine, [6, *ids])))
        found = covers_after(engine, pieces, [6], begun, min_share=0)
        assert sum(math.exp(cover.logprob) for cover in found) == pytest.approx(total, rel=1e-6)


def test_a_cover_goes_on_as_if_all_ids_had_been_read(tiny_run):
    engine, tokenizer = load_engine(tiny_run, kind="torch"), tiny_run.tokenizer
    context = [tokenizer.eos_id, *tokenizer.encode("Abantu")]
    for begun in (b"", b" kak"):
        for cover in covers_after(engine, tokenizer, context, begun, max_covers=5):
            logits_1V, state = cover.read(engine)
            expected_1V, expected_state = engine.prime([*context, *cover.ids], engine.initial_state(1))
            np.testing.assert_allclose(logits_1V, expected_1V, atol=1e-4)
            for ours, theirs in zip(state, expected_state, strict=True):
                np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)


def test_nothing_begun_is_one_empty_cover():
    (cover,) = covers_after(make_engine(3), Pieces(b"a", b"b"), [2], b"")
    assert (cover.ids, cover.logprob, cover.surplus) == ((), 0.0, b"")


def test_a_share_bounds_what_is_missed(tiny_run):
    engine, tokenizer = load_engine(tiny_run, kind="torch"), tiny_run.tokenizer
    for begun in (b" kakhulu", b" abantwana", b" uyathenga", b" xyz"):

        def mass(min_share, begun=begun):
            found = covers_after(
                engine, tokenizer, [tokenizer.eos_id], begun, min_share=min_share, max_covers=10**6, max_steps=10**6
            )
            return sum(math.exp(cover.logprob) for cover in found)

        assert mass(1e-3) >= 0.99 * mass(0)


def test_what_the_model_rules_out_is_not_spelt():
    table = np.zeros((4, 4, 4), dtype=np.float32)
    table[..., 0] = -np.inf
    pieces = Pieces(b"a", b"aa", b"b")
    assert {cover.ids for cover in covers_after(TableEngine(table), pieces, [3], b"aab")} == {(1, 2)}
    assert covers_after(TableEngine(table), pieces, [3], b"ab") == []


def test_long_words_and_flat_models_end():
    letters = [bytes([letter]) for letter in b"abcdefgh"]
    pieces = Pieces(*letters, *(a + b for a in letters for b in letters))
    engine = TableEngine(np.zeros((pieces.vocab_size,) * 3, dtype=np.float32))
    begun = b"abcdefgh" * 5
    found = covers_after(engine, pieces, [pieces.eos_id], begun, max_steps=5)
    assert found
    assert len(engine.fed) <= 5 + len(begun) + 1
    assert all(b"".join(map(pieces.token_bytes, cover.ids)).startswith(begun) for cover in found)


def test_a_word_that_cannot_be_finished_ends_too():
    table = np.zeros((4, 4, 4), dtype=np.float32)
    table[..., 2] = -np.inf
    engine = TableEngine(table)
    assert covers_after(engine, Pieces(b"a", b"aa", b"b"), [3], b"a" * 15 + b"b", max_steps=20) == []
    assert len(engine.fed) <= 20 + 16 + 1


def test_the_best_covers_are_kept():
    pieces, engine = Pieces(b"a", b"b", b"ab", b"ba", b"aba", b"c"), make_engine(7)
    found = covers_after(engine, pieces, [6], b"abab", min_share=0)
    assert covers_after(engine, pieces, [6], b"abab", min_share=0, max_covers=2)[1].ids == found[1].ids
    assert len(found) > 2


def test_words_of_a_closed_vocabulary_that_begin_so():
    tokenizer = Tokenizer.train(["kakhulu kakade kahle inja"], kind="word")
    engine = make_engine(tokenizer.vocab_size)

    def words(begun):
        return {tokenizer.token_bytes(i) for cover in covers_after(engine, tokenizer, [5], begun) for i in cover.ids}

    assert words(b"kak") == {b"kakhulu", b"kakade"}
    assert words(b"inja") == {b"inja"}
    assert words(b"izulu") == {b"<unk>"}
    assert words(b"<unk") == {b"<unk>"}  # as text that is unknown


# The cut


@pytest.mark.parametrize(("text", "before", "begun"), [
    ("", "", ""),
    ("Ngiyabonga kakh", "Ngiyabonga", " kakh"),
    ("Ngiyabonga ", "Ngiyabonga", " "),
    ("Ngiyabonga  ", "Ngiyabonga", "  "),
    ("Ngiyabonga  kakh", "Ngiyabonga ", " kakh"),
    ("Ngiyabonga\t", "Ngiyabonga", "\t"),
    ("Ngiyabonga\n", "Ngiyabonga\n", ""),
    ("Ngiyabonga\n ", "Ngiyabonga\n", " "),
    ("kakh", "", "kakh"),
    ("ngiye e-", "ngiye e", "-"),
    ("kwa-Zu", "kwa-", "Zu"),
    ("ng'", "ng", "'"),
    ("ngo 12345", "ngo 123", "45"),
    ("Hhayi.", "Hhayi", "."),
    ("Hhayi. ”", "Hhayi.", " ”"),
    ("cafe\u0301", "", "café"),
    ("m\u0300", "", "m\u0300"),
])  # fmt: skip
def test_a_prompt_is_cut_before_the_piece_that_may_go_on(text, before, begun):
    tokenizer = Tokenizer.train(LINES * 3, vocab_size=300)
    assert split_prompt(tokenizer, text) == ([tokenizer.eos_id, *tokenizer.encode(before)], begun.encode())


def test_a_long_piece_is_cut_between_characters():
    tokenizer = Tokenizer.train(LINES * 3, vocab_size=300)
    for text in ("漢字仮名交文字列" * 4, "é" * 50, "a" + "é" * 50, "😀" * 20):
        ids, begun = split_prompt(tokenizer, text)
        assert MAX_BEGUN_BYTES <= len(begun) < MAX_BEGUN_BYTES + 4
        assert tokenizer.decode(ids[1:]) + begun.decode() == text


def test_other_kinds_cut_words_or_nothing():
    words, chars = (Tokenizer.train(LINES, kind=kind) for kind in ("word", "char"))
    assert split_prompt(words, "kahle kakh") == ([words.eos_id, *words.encode("kahle")], b"kakh")
    assert split_prompt(words, "kahle ") == ([words.eos_id, *words.encode("kahle")], b"")
    assert split_prompt(words, " ") == ([words.eos_id], b"")
    assert split_prompt(chars, "kahle kakh") == ([chars.eos_id, *chars.encode("kahle kakh")], b"")


TEXT = st.text(st.sampled_from("abké \u00a0\t\u0301\u0300\u001c\u0085-'“.1234Zu\n"), max_size=12)


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT)
def test_no_token_of_any_continuation_reaches_over_the_cut(prompt, more):
    tokenizer = _bpe()
    text = tokenizer.decode(tokenizer.encode(prompt + more))  # in NFC
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    for end in range(len(text) + 1):
        if unicodedata.normalize("NFC", text[:end]) + unicodedata.normalize("NFC", text[end:]) != text:
            continue
        context, begun = split_prompt(tokenizer, text[:end])
        assert ids[: len(context)] == context
        assert b"".join(map(tokenizer.token_bytes, ids[len(context) :])).startswith(begun)


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_every_normal_form_gives_the_same(text):
    tokenizer = _bpe()
    assert split_prompt(tokenizer, unicodedata.normalize("NFD", text)) == split_prompt(
        tokenizer, unicodedata.normalize("NFC", text)
    )


_MADE: list[Tokenizer] = []


def _bpe() -> Tokenizer:
    if not _MADE:
        _MADE.append(Tokenizer.train([*LINES * 3, "1234 'abk' ab-ab '. '. ék ék"], vocab_size=340))
    return _MADE[0]


@pytest.mark.parametrize("unit", ["umfundi ", "a-", "1", "a", " ", "1, ", "字", "\u0301", "é"])
def test_a_long_line_is_cut_as_a_short_one(unit):
    tokenizer = _bpe()
    text = unit * 2000 + "kakh" * (unit[-1] in " -")
    context, begun = split_prompt(tokenizer, text)
    assert (
        b"".join(map(tokenizer.token_bytes, context[1:])) + begun == tokenizer.decode(tokenizer.encode(text)).encode()
    )
    assert len(begun) < MAX_BEGUN_BYTES + 16
    if unit[-1] in " -" and unit != " ":
        assert begun == (b" kakh" if unit[-1] == " " else b"kakh")


def test_a_lone_surrogate_is_refused():
    for text in ("a \ud800", "\ud800\na"):
        with pytest.raises(UlimiError, match="lone surrogate"):
            split_prompt(_bpe(), text)
