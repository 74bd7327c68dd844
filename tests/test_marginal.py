"""Marginal likelihood beside the sum over all ways to cut each word, one by one."""

import itertools
import math

import numpy as np
import pytest

import ulimi.marginal
from conftest import synthetic_lines
from ulimi.errors import UlimiError
from ulimi.marginal import Marginal, _begins_word
from ulimi.score import score_lines, score_stream
from ulimi.tokenizer import Tokenizer


class Remembering:
    """An engine whose logits are arbitrary, and depend on all that it has read; a state is what each row has read."""

    alpha = 1.0
    batch_invariant = True

    def __init__(self, vocab_size, scale=2.0):
        self.vocab_size = vocab_size
        self.scale = scale
        self.largest_batch = 0

    def initial_state(self, batch_size):
        return [()] * batch_size

    def _logits(self, history):
        seed = hash(history) % 2**32  # of whole numbers: the same in each process
        return np.random.default_rng(seed).normal(size=self.vocab_size).astype(np.float32) * self.scale

    def step(self, ids_B, state):
        self.largest_batch = max(self.largest_batch, len(ids_B))
        state = [(*history, int(id)) for id, history in zip(ids_B, state, strict=True)]
        return np.stack([self._logits(history) for history in state]), state

    def nll(self, inputs_BT, targets_BT, state):
        out = np.empty(targets_BT.shape, dtype=np.float32)
        for t, ids_B in enumerate(inputs_BT.T):
            logits_BV, state = self.step(ids_B, state)
            out[:, t] = [-log_softmax(row)[id] for row, id in zip(logits_BV, targets_BT[:, t], strict=True)]
        return out, state

    def select_state(self, state, rows):
        return [state[row] for row in rows]

    def join_states(self, states):
        return [history for state in states for history in state]


class Forgetful(Remembering):
    """One that always says the same."""

    def __init__(self, probs_V):
        super().__init__(len(probs_V))
        self._same_V = np.log(np.array(probs_V, dtype=np.float32))

    def _logits(self, history):
        return self._same_V


def log_softmax(logits_V):
    return logits_V - np.logaddexp.reduce(logits_V.astype(np.float64))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return Tokenizer.train(synthetic_lines(200), kind=request.param, vocab_size=300)


def encode(tokenizer, lines):
    return np.array([id for ids in tokenizer.encode_lines(lines) for id in ids])


def every_way(tokenizer, text):
    """All sequences of tokens that spell some bytes."""
    ids = {tokenizer.token_bytes(id): id for id in range(tokenizer.eos_id)}
    if not text:
        return [[]]
    return [
        [ids[text[:end]], *rest]
        for end in range(1, len(text) + 1)
        if text[:end] in ids
        for rest in every_way(tokenizer, text[end:])
    ]


def by_hand(engine, tokenizer, lines, carry):
    """The definition, word by word and way by way."""
    eos = tokenizer.eos_id
    begins = [*(_begins_word(tokenizer.token_bytes(id)) for id in range(eos)), True]
    history, nats = (eos,), 0.0

    def log_begins(history):
        logp_V = log_softmax(engine._logits(history))
        return np.logaddexp.reduce(logp_V[begins])

    for line in lines:
        words = []
        for id in tokenizer.encode_lines([line])[0]:
            if not words or begins[id]:
                words.append([])
            words[-1].append(id)
        for word in words:
            text = b"".join(tokenizer.token_bytes(id) for id in word)
            ways = [word]
            if text.decode()[-1].isalpha():
                ways = [way for way in every_way(tokenizer, text) if not any(begins[id] for id in way[1:])]
                assert word in ways
            logps = []
            for way in ways:
                before = [history + tuple(way[:k]) for k in range(len(way))]
                logp = sum(log_softmax(engine._logits(b))[id] for b, id in zip(before, way, strict=True))
                logps.append(logp + (log_begins(history + tuple(way)) if word != [eos] else 0.0))
            first = len(history) == 1 or history[-1] == eos  # anything may come next
            nats -= np.logaddexp.reduce(logps) - (0.0 if first else log_begins(history))
            history = (eos,) if word == [eos] and not carry else history + tuple(word)
    return nats


@pytest.mark.parametrize("carry", [True, False], ids=["stream", "lines"])
def test_it_is_the_sum_over_all_ways(tokenizer, carry, monkeypatch):
    monkeypatch.setattr(ulimi.marginal, "LEAST_SHARE", 1e-300)
    lines = [
        "Umfundi uthanda incwadi.",
        "",
        "bafunda isikole, kodwa (inja) 2021",
        "Ngiya eU-KZN namhlanje!",
        "i-Café «ñandú» iti",
    ]
    engine = Remembering(tokenizer.vocab_size)
    marginal = Marginal(engine, tokenizer)
    if carry:
        nats = marginal.score_stream(encode(tokenizer, lines))
    else:
        nats = sum(marginal.score_rows(tokenizer.encode_lines(lines)))
    assert nats == pytest.approx(by_hand(engine, tokenizer, lines, carry), abs=1e-3)


def test_words_whose_last_piece_may_go_on_are_scored_as_ever(tokenizer):
    engine = Remembering(tokenizer.vocab_size)
    ids = encode(tokenizer, ["123 ... 45 ,;: (!) 6"])
    exact = score_stream(engine, ids, tokenizer.eos_id)
    assert Marginal(engine, tokenizer).score_stream(ids) == pytest.approx(exact, rel=1e-6)


def test_all_words_together_have_no_more_than_probability_1(monkeypatch):
    monkeypatch.setattr(ulimi.marginal, "LEAST_SHARE", 1e-300)
    tokenizer = Tokenizer.train(["ba ab ba bab aab abba"] * 5, kind="bpe", vocab_size=262)
    known = {tokenizer.token_bytes(id): id for id in range(tokenizer.eos_id)}
    merged = [part for part in known if len(part) > 1]
    assert merged
    probs = np.full(tokenizer.vocab_size, 1e-12)
    for part in (b"a", b"b", b" ", *merged):
        probs[known[part]] = 1 / (6 * len(part))
    probs[tokenizer.eos_id] = 1.0
    probs /= probs.sum()
    marginal = Marginal(Forgetful(probs), tokenizer)
    begins = marginal._begins_V
    end = -math.log(probs[tokenizer.eos_id])
    total = usual = 0.0
    for length in range(1, 9):
        for letters in itertools.product("ab", repeat=length):
            ids = encode(tokenizer, ["".join(letters)])
            # The first word of a line, and that a word begins after it: the line's end is one that may.
            nats = marginal.score_stream(ids) - end + math.log(1 / probs[begins].sum())
            total += math.exp(-nats)
            usual += probs[ids[:-1]].prod() * probs[begins].sum()
    starts_with_letter = probs[~begins].sum()
    assert usual < 0.95 * total
    assert 0.98 * starts_with_letter < total <= starts_with_letter


def test_of_a_word_that_is_too_long_the_usual_way_is_counted(tokenizer, monkeypatch):
    engine = Remembering(tokenizer.vocab_size)
    long = "abantu" * 17  # 102 bytes
    for word, is_long in ((long[:100], False), (long, True), (f"{long} {long}", True)):
        ids = encode(tokenizer, [word])
        exact = score_stream(engine, ids, tokenizer.eos_id)
        nats = Marginal(engine, tokenizer).score_stream(ids)
        assert nats == pytest.approx(exact, rel=1e-6) if is_long else nats < exact - 0.01
    # And what comes after it is read as ever.
    ids = encode(tokenizer, [f"{long} bafunda isikole kakhulu namhlanje ngoba umlimi uyathenga"])
    assert Marginal(engine, tokenizer).score_stream(ids) < score_stream(engine, ids, tokenizer.eos_id) - 0.01
    engine.largest_batch = 0
    Marginal(engine, tokenizer).score_stream(encode(tokenizer, ["abantwana" * 11]))
    assert engine.largest_batch == ulimi.marginal.MOST_WAYS
    monkeypatch.setattr(ulimi.marginal, "MOST_WAYS", 2)
    ids = encode(tokenizer, synthetic_lines(3))
    few = Marginal(engine, tokenizer).score_stream(ids)
    monkeypatch.setattr(ulimi.marginal, "MOST_WAYS", 10**6)
    assert Marginal(engine, tokenizer).score_stream(ids) < few < score_stream(engine, ids, tokenizer.eos_id)


def test_it_is_never_more_than_the_usual_way_and_less_the_more_ways_are_followed(tokenizer, monkeypatch):
    engine = Remembering(tokenizer.vocab_size)
    ids = encode(tokenizer, synthetic_lines(20, seed=3))
    nats = [score_stream(engine, ids, tokenizer.eos_id)]
    for share in (0.5, 0.01, 1e-6):
        monkeypatch.setattr(ulimi.marginal, "LEAST_SHARE", share)
        nats.append(Marginal(engine, tokenizer).score_stream(ids))
    assert nats == sorted(nats, reverse=True)
    assert len(set(nats)) == 4


def test_what_stands_beside_a_line_does_not_matter(tokenizer, monkeypatch):
    engine = Remembering(tokenizer.vocab_size)
    lines = [*synthetic_lines(40, seed=5), "", "a"]
    words = Marginal(engine, tokenizer)
    together = list(score_lines(engine, tokenizer, lines, score_rows=words.score_rows))
    assert [line for line, _ in together] == lines
    assert engine.largest_batch > 32  # ways beside each other
    usual = list(score_lines(engine, tokenizer, lines))
    for (line, score), (_, usual_score) in zip(together, usual, strict=True):
        alone = Marginal(engine, tokenizer).score_stream(encode(tokenizer, [line]))
        assert score.nats == pytest.approx(alone, rel=1e-6)
        assert score.nats <= usual_score.nats + 1e-4
    monkeypatch.setattr(ulimi.marginal, "WAYS_AT_ONCE", 3)
    few = score_lines(engine, tokenizer, lines, score_rows=words.score_rows)
    assert [score.nats for _, score in few] == pytest.approx([score.nats for _, score in together], rel=1e-6)


def test_it_tells_how_far_it_is(tokenizer):
    told = []
    ids = encode(tokenizer, synthetic_lines(3))
    Marginal(Remembering(tokenizer.vocab_size), tokenizer).score_stream(ids, told.append)
    assert told == list(range(1, len(ids) + 1))


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_tokenizer_that_cuts_one_way_is_refused(kind):
    tokenizer = Tokenizer.train(synthetic_lines(20), kind=kind)
    with pytest.raises(UlimiError, match=f"--marginal: a tokenizer of kind '{kind}' cuts each word in one way"):
        Marginal(Remembering(tokenizer.vocab_size), tokenizer)


def test_a_sparse_model_is_refused(tokenizer):
    engine = Remembering(tokenizer.vocab_size)
    engine.alpha = 1.5
    with pytest.raises(UlimiError, match="--marginal: a sparse model"):
        Marginal(engine, tokenizer)
