"""Suggestions against a walk through every continuation; keystrokes against hands that count."""

import codecs
import unicodedata
from collections import Counter

import numpy as np
import pytest

from ulimi.engine import load_engine
from ulimi.spelling import split_prompt
from ulimi.suggest import JOINERS, MIN_COVER_SHARE, Suggester, is_word_character, word_begun
from ulimi.tokenizer import Tokenizer

TEXTS = ["", "ab", "ab ", "ab a", "ab aba", "ab-", "ab-a", "b’", "ab. ", "(a", "ab  a", "\nb", "é", "a\u0301"]


class FewEngine:
    """A few tokens are possible; their logits depend on the last two."""

    alpha = 1.0
    batch_invariant = True

    def __init__(self, vocab_size: int, allowed: list[int], seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self._allowed = allowed
        self._table = np.random.default_rng(seed).normal(scale=2.5, size=(len(allowed) + 1,) * 2 + (len(allowed),))
        self.num_steps = 0

    def initial_state(self, batch_size):
        return (-1, -1)

    def step(self, ids_B, state):
        self.num_steps += 1
        state = (state[1], int(ids_B[0]))
        place = [self._allowed.index(id) if id in self._allowed else -1 for id in state]
        logits_1V = np.full((1, self.vocab_size), -np.inf, dtype=np.float32)
        logits_1V[0, self._allowed] = self._table[place[0], place[1]]
        return logits_1V, state

    def prime(self, ids, state):
        for id in ids:
            logits_1V, state = self.step(np.array([id]), state)
        return logits_1V, state


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["ab ab-ab. aba aba", "ab ab ab, ’ab (ab é"], vocab_size=266)


def few_engine(tokenizer: Tokenizer, seed: int = 0) -> FewEngine:
    pieces = [b" ab", b"ab", b"a", b"b", b" a", b" ", b".", b"-", b"\xe2", b"\x80", b"\x99", b"\xc3", b"\xa9", b"\xa1"]
    allowed = [id for id in range(tokenizer.eos_id) if tokenizer.token_bytes(id) in pieces]
    assert len(allowed) >= 11
    return FewEngine(tokenizer.vocab_size, [*allowed, tokenizer.eos_id], seed)


def by_walking(engine: FewEngine, tokenizer: Tokenizer, text: str, least: float) -> tuple[Counter, float]:
    """The probability of each next word, by reading every way to go on that is more probable than `least`.

    Also gives what the others have together.
    """
    context, begun = split_prompt(tokenizer, text)
    typed = tokenizer.normalize(text)
    start = len(typed)
    while start and (typed[start - 1] in JOINERS or unicodedata.category(typed[start - 1])[0] in "LMN"):
        start -= 1
    typed = typed[start:].lstrip(JOINERS)
    words, typed_mass, left = Counter(), 0.0, 0.0

    def walk(spelt: bytes, probability: float, id: int, state) -> None:
        nonlocal typed_mass, left
        if not (spelt.startswith(begun) or begun.startswith(spelt)):
            return
        if len(spelt) >= len(begun):
            rest = codecs.getincrementaldecoder("utf-8")("replace").decode(spelt[len(begun) :])
            end = next((i for i, c in enumerate(rest) if c == "\n" or not is_word_character(c)), None)
            if end is not None:
                words[typed + rest[:end]] += probability
                return
        if probability < least:
            left += probability
            return
        logits_1V, state = engine.step(np.array([id]), state)
        p_V = np.exp(logits_1V[0].astype(float) - logits_1V.max())
        p_V /= p_V.sum()
        for id in np.flatnonzero(p_V):
            walk(spelt + tokenizer.token_bytes(id), probability * p_V[id], int(id), state)

    *before, last = context
    walk(b"", 1.0, last, engine.prime(before, engine.initial_state(1))[1] if before else engine.initial_state(1))
    total = sum(words.values()) + left
    words = Counter({
        word: p / total for word, p in words.items()
        if len(word) > len(typed) and word[-1] not in JOINERS and word[0] not in JOINERS
    })  # fmt: skip
    return words, left / total


@pytest.mark.parametrize("text", TEXTS)
def test_the_probabilities_are_those_of_every_way_to_go_on(tokenizer, text):
    engine = few_engine(tokenizer)
    left, least = 1.0, 1e-5
    while left > 0.01:
        least /= 10
        expected, left = by_walking(engine, tokenizer, text, least)
    found = Suggester(engine, tokenizer, max_steps=3000, min_ratio=0).search(text, 1000)
    probabilities = {suggestion.word: suggestion.probability for suggestion in found.words}
    off = left + 1 - found.covered + MIN_COVER_SHARE
    assert off < 0.02
    assert expected
    for word in probabilities.keys() | expected.keys():
        assert abs(probabilities.get(word, 0.0) - expected[word]) <= off + 1e-9
    ranks = sorted(expected.values(), reverse=True)
    sure = next((i for i in range(len(ranks) - 1) if ranks[i] - ranks[i + 1] <= 2 * off), len(ranks))
    assert [s.word for s in found.words[:sure]] == [word for word, _ in expected.most_common(sure)]
    assert sum(probabilities.values()) <= found.covered + 1e-9


@pytest.mark.parametrize("text", ["", "Abantu ", "Abantu k", "Abantu kakhu", "Abantu b", "Ab", "Uyafunda ngoba i"])
def test_the_usual_search_gives_the_words_of_the_full_one(tiny_run, text):
    engine = load_engine(tiny_run, kind="torch")
    found = Suggester(engine, tiny_run.tokenizer).search(text, 3)
    full = Suggester(engine, tiny_run.tokenizer, max_steps=500, min_ratio=0.01).search(text, 1000)
    exact = {s.word: s.probability for s in full.words}
    for suggestion in found.words:
        assert suggestion.probability <= exact[suggestion.word] + 1e-6
        assert exact[suggestion.word] - suggestion.probability <= 1 - found.covered
    if len(found.words) == 3:
        missed = max(p for word, p in exact.items() if word not in {s.word for s in found.words})
        assert missed <= found.words[-1].probability + 1 - found.covered
    if found.covered > 0.5:
        assert found.words[0].word == full.words[0].word
    assert full.covered > found.covered


def test_a_learnt_word_is_suggested(tiny_run):
    suggester = Suggester(load_engine(tiny_run, kind="torch"), tiny_run.tokenizer)
    words = [s.word for s in suggester.suggest("Abantu bafunda kakhu")]
    assert words[0] == "kakhulu"


def test_what_is_remembered_changes_nothing_and_costs_no_step(tokenizer):
    engine = few_engine(tokenizer, seed=1)
    suggester = Suggester(engine, tokenizer)
    for text in ("a", "ab", "aba", "aba ", "aba a", "aba ab ", "aba", "aba ab", "b\nab"):
        fresh = Suggester(few_engine(tokenizer, seed=1), tokenizer).search(text)
        assert suggester.search(text) == fresh
        steps = engine.num_steps
        assert suggester.search(text) == fresh
        assert engine.num_steps == steps


def test_a_word_that_was_accepted_is_not_read_again(tokenizer):
    engine = few_engine(tokenizer)
    suggester = Suggester(engine, tokenizer, max_steps=50)
    suggester.suggest("ab ab ab ab a")
    assert any(s.word == "ab" for s in suggester.suggest("ab ab ab ab a"))
    before = engine.num_steps
    context, _ = split_prompt(tokenizer, "ab ab ab ab ab ")
    suggester._read_context(tuple(context))
    assert engine.num_steps - before == 0


def test_only_so_many_steps(tokenizer):
    for max_steps in (1, 3, 10):
        engine = few_engine(tokenizer)
        suggester = Suggester(engine, tokenizer, max_steps=max_steps, min_ratio=0)
        suggester.suggest("ab ")
        # The context, the ways to spell " ", the search.
        assert engine.num_steps <= 2 + max_steps + max_steps


@pytest.mark.parametrize("kind", ["unigram", "char", "word"])
def test_other_kinds_suggest_words_that_begin_as_typed(kind):
    lines = ["kakhulu kakade, kahle i-moto ng'ombe kakhulu. “inja” é"] * 3
    tokenizer = Tokenizer.train(lines, kind=kind, vocab_size=280 if kind == "unigram" else None)
    usual = [id for id in range(tokenizer.eos_id) if tokenizer.token_bytes(id) in lines[0].encode()]
    engine = FewEngine(tokenizer.vocab_size, [*usual, tokenizer.eos_id])
    suggester = Suggester(engine, tokenizer, max_steps=300)
    for text, begun in (("kahle kak", "kak"), ("kahle ", ""), ("kahle", "kahle"), ("", "")):
        found = suggester.search(text)
        words = [s.word for s in found.words]
        assert len(set(words)) == len(words)
        for word in words:
            assert word.startswith(begun)
            assert len(word) > len(begun)
            assert all(map(is_word_character, word))
            assert word[0] not in JOINERS
            assert word[-1] not in JOINERS
        assert words or (kind, text) == ("word", "kahle")
        assert sum(s.probability for s in found.words) <= found.covered + 1e-9 <= 1 + 1e-9
    if kind == "word":
        assert {s.word for s in suggester.suggest("kahle kak")} == {"kakhulu", "kakade"}  # "kakade," and "kakhulu." too
        assert suggester.suggest("kahle xy") == []


def test_every_normal_form_gives_the_same(tiny_run):
    suggester = Suggester(load_engine(tiny_run, kind="torch"), tiny_run.tokenizer)
    assert suggester.search("cafe\u0301") == suggester.search("café")
    assert all(s.word.startswith("café") for s in suggester.suggest("cafe\u0301"))


@pytest.mark.parametrize(("text", "word"), [
    ("Ngiya e-Go", "e-Go"), ("e-", "e-"), ("kahle ", ""), ("kahle.", ""), ("'inj", "inj"), ("ng’o", "ng’o"),
    ("(20", "20"), ("", ""), ("a\nb", "b"), ("m\u0300", "m\u0300"), ("--", ""),
])  # fmt: skip
def test_the_word_begun(text, word):
    assert word_begun(text) == word


def test_what_the_model_rules_out_has_no_suggestions(tokenizer):
    assert Suggester(few_engine(tokenizer), tokenizer).search("ab xyz").words == []


def test_what_is_remembered_has_a_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("ulimi.suggest.MAX_KNOWN", 5)
    suggester = Suggester(few_engine(tokenizer), tokenizer)
    for text in ("a", "ab", "b", "ab a", "ab b", "ab ab a", "ab ab b", "ab ab ab a", "a"):
        assert suggester.search(text) == Suggester(few_engine(tokenizer), tokenizer).search(text)
    assert len(suggester._contexts) <= 4
    assert all(len(context.after) <= 5 for context in suggester._contexts.values())
