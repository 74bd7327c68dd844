"""Scores: the figures by their definitions, and every token of a text counted once, whatever the window or batch."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import reference
from ulimi.corpus import count_stats, read_lines
from ulimi.data import encode_file
from ulimi.distribution import log_probs
from ulimi.engine import TorchEngine, load_engine
from ulimi.model import AWDLSTM
from ulimi.score import Score, score_distribution, score_lines, score_stream

LINES = [
    "Abantwana bafunda isikole.",
    "",
    "Ukudla",
    "UThandi uthe: « sawubona » 👋🏾 — é e\u0301",
    "inja  ikati\tumlimi ",
    "Abantu bahamba kakhulu namhlanje futhi bayadla ekhaya edolobheni.",
    "Abantwana bafunda isikole.",
]


class UniformEngine:
    """Every id is as likely as any other; its state is how many ids each stream has read."""

    batch_invariant = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.windows: list[tuple[int, ...]] = []
        self.inputs: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.states: list[int] = []

    def initial_state(self, batch_size: int) -> tuple[int, int]:
        return batch_size, 0

    def nll(self, inputs_BT, targets_BT, state):
        assert inputs_BT.shape == targets_BT.shape
        assert inputs_BT.dtype == targets_BT.dtype == np.int64
        batch_size, num_read = state
        assert inputs_BT.shape[0] == batch_size
        self.windows.append(inputs_BT.shape)
        self.inputs.append(inputs_BT)
        self.targets.append(targets_BT)
        self.states.append(num_read)
        nll_BT = np.full(targets_BT.shape, math.log(self.vocab_size), dtype=np.float32)
        return nll_BT, (batch_size, num_read + inputs_BT.shape[1])


@pytest.fixture(scope="module")
def tokenizer(tiny_run):
    return tiny_run.tokenizer


@pytest.fixture(scope="module")
def engine(tokenizer):
    """A network of random weights that are large enough to make each id matter for those far behind it."""
    model = AWDLSTM(vocab_size=tokenizer.vocab_size, embedding_size=6, hidden_size=9, num_layers=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return TorchEngine(model)


@pytest.fixture
def text_ids(tokenizer):
    """All of `LINES` as one stream, over and over."""
    ids = [token for line_ids in tokenizer.encode_lines(LINES * 6) for token in line_ids]
    assert len(ids) > 600
    return np.array(ids, dtype=np.uint16)


def one_at_a_time(engine, ids, before) -> float:
    """Total nats, by single steps from a zero state, summed in float64."""
    state, nats = engine.initial_state(1), 0.0
    for token in ids:
        logits, state = engine.step(np.array([before]), state)
        nats -= reference.log_softmax(logits[0].astype(np.float64))[token]
        before = int(token)
    return nats


# --- Figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [LINES, LINES[:1], [""], ["é"]])
def test_figures_are_those_of_the_definitions(lines):
    nats, num_tokens = 123.25, 57
    score = Score.of(nats, num_tokens, count_stats(lines))
    counts = reference.text_counts(lines)
    assert (score.num_lines, score.num_words, score.num_chars, score.num_bytes) == counts
    assert score.bits_per_char == pytest.approx(reference.bits_per_char(nats, counts.num_chars), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(reference.bits_per_byte(nats, counts.num_bytes), rel=1e-12)
    assert score.perplexity == pytest.approx(reference.token_perplexity(nats, num_tokens), rel=1e-12)
    words = reference.word_perplexity(nats, counts.num_words, counts.num_lines)
    assert score.word_perplexity == pytest.approx(words, rel=1e-12)


def test_figures_by_hand():
    # "aé b" and its line end: 5 characters, 6 bytes, 2 words, 1 line; 3 tokens of 2 bits each.
    score = Score.of(6 * math.log(2), 3, count_stats(["aé b"]))
    assert score.bits_per_char == pytest.approx(6 / 5)
    assert score.bits_per_byte == pytest.approx(1.0)
    assert score.perplexity == pytest.approx(4.0)
    assert score.word_perplexity == pytest.approx(4.0)


def test_adding_adds_what_was_counted_and_not_the_figures():
    one = Score.of(100.0, 20, count_stats(LINES[:2]))
    two = Score.of(7.0, 3, count_stats(LINES[2:]))
    assert one + two == Score.of(107.0, 23, count_stats(LINES))
    assert (one + two).perplexity == pytest.approx(math.exp(107 / 23))


def test_as_dict_has_the_promised_keys_and_values():
    score = Score.of(50.0, 20, count_stats(LINES))
    keys = (
        "nats num_tokens num_words num_lines num_chars num_bytes perplexity word_perplexity bits_per_char bits_per_byte"
    )
    assert score.as_dict() == {key: getattr(score, key) for key in keys.split()}
    assert list(score.as_dict()) == keys.split()


def test_a_perplexity_too_large_for_a_float_is_infinite_and_null_in_json():
    score = Score(nats=5000.0, num_tokens=1, num_words=1, num_lines=1, num_chars=2, num_bytes=2)
    assert score.perplexity == score.word_perplexity == math.inf
    assert math.isfinite(score.bits_per_char)
    row = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert row["perplexity"] is row["word_perplexity"] is None
    assert row["bits_per_char"] == score.bits_per_char


# --- One stream --------------------------------------------------------------------------------------


def test_a_uniform_model_costs_log_v_a_token(tokenizer, text_ids):
    engine = UniformEngine(tokenizer.vocab_size)
    stats = count_stats(LINES * 6)
    score = Score.of(score_stream(engine, text_ids, tokenizer.eos_id), len(text_ids), stats)
    bits = len(text_ids) * math.log2(tokenizer.vocab_size)
    assert score.bits_per_char == pytest.approx(bits / stats.num_chars, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(bits / stats.num_bytes, rel=1e-6)
    assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


@pytest.mark.parametrize("window", [1, 7, 256, 10_000])
def test_every_token_is_a_target_once_and_stands_after_the_one_before_it(tokenizer, text_ids, monkeypatch, window):
    monkeypatch.setattr("ulimi.score.EVALUATION_WINDOW", window)
    engine = UniformEngine(tokenizer.vocab_size)
    score_stream(engine, text_ids, tokenizer.eos_id)
    targets = np.concatenate(engine.targets, axis=1)[0]
    inputs = np.concatenate(engine.inputs, axis=1)[0]
    assert targets.tolist() == text_ids.tolist()
    assert inputs.tolist() == [tokenizer.eos_id, *text_ids[:-1].tolist()]
    assert max(width for _, width in engine.windows) == min(window, len(text_ids))
    assert engine.states == list(range(0, len(text_ids), window))  # the state is carried


@pytest.mark.parametrize("window", [1, 7, 256, 10_000])
def test_a_streams_score_is_the_sum_of_single_steps_whatever_the_window(
    engine, tokenizer, text_ids, monkeypatch, window
):
    monkeypatch.setattr("ulimi.score.EVALUATION_WINDOW", window)
    truth = one_at_a_time(engine, text_ids, tokenizer.eos_id)
    assert score_stream(engine, text_ids, tokenizer.eos_id) == pytest.approx(truth, rel=1e-6)


def test_the_first_token_is_counted_too(engine, tokenizer):
    truth = one_at_a_time(engine, [5], tokenizer.eos_id)
    assert score_stream(engine, np.array([5]), tokenizer.eos_id) == pytest.approx(truth, rel=1e-6)
    assert truth > 0


def test_progress_counts_all_tokens(engine, tokenizer, text_ids):
    done: list[int] = []
    score_stream(engine, text_ids, tokenizer.eos_id, done.append)
    assert done == [*range(256, len(text_ids), 256), len(text_ids)]


def test_a_trained_run_scores_as_its_training_reported(tiny_run, corpus_dir):
    text = encode_file(corpus_dir / "valid.txt", tiny_run.tokenizer)
    nats = score_stream(load_engine(tiny_run, "cpu", kind="torch"), text.ids, tiny_run.tokenizer.eos_id)
    score = Score.of(nats, len(text.ids), text.stats)
    assert score.as_dict() == pytest.approx(tiny_run.meta["scores"]["valid"])
    assert score.perplexity < tiny_run.tokenizer.vocab_size
    assert score.num_chars == len((corpus_dir / "valid.txt").read_text(encoding="utf-8"))
    assert count_stats(read_lines(corpus_dir / "valid.txt")) == text.stats


# --- Line by line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines_at_once", [1, 2, 3, 256])
def test_each_line_scores_as_if_it_were_alone(engine, tokenizer, lines_at_once):
    results = list(score_lines(engine, tokenizer, LINES, lines_at_once=lines_at_once))
    assert [line for line, _ in results] == LINES
    for line, score in results:
        ids = [*tokenizer.encode(line), tokenizer.eos_id]
        assert score.num_tokens == len(ids)
        assert score.nats == pytest.approx(one_at_a_time(engine, ids, tokenizer.eos_id), rel=1e-5)
        assert (score.num_lines, score.num_words, score.num_chars, score.num_bytes) == reference.text_counts([line])


@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("window", [1, 5, 256])
def test_a_lines_score_depends_on_no_window_and_no_batch(engine, tokenizer, monkeypatch, rows, window):
    truth = [score.nats for _, score in score_lines(engine, tokenizer, LINES)]
    monkeypatch.setattr("ulimi.score.EVALUATION_WINDOW", window)
    monkeypatch.setattr("ulimi.score.ROWS_AT_ONCE", rows)
    assert [score.nats for _, score in score_lines(engine, tokenizer, LINES)] == pytest.approx(truth, rel=1e-5)


def test_a_lines_score_depends_on_no_neighbour(engine, tokenizer):
    (_, alone) = next(score_lines(engine, tokenizer, ["Ukudla"]))
    for neighbours in ([""] * 3, ["Abantu bahamba kakhulu " * 40] * 40, ["Ukudla", "Ukudlana"]):
        *_, (line, score) = score_lines(engine, tokenizer, [*neighbours, "Ukudla"])
        assert line == "Ukudla"
        assert score.nats == pytest.approx(alone.nats, rel=1e-5)


def test_lines_of_a_uniform_model_cost_what_their_tokens_cost(tokenizer):
    for line, score in score_lines(UniformEngine(tokenizer.vocab_size), tokenizer, LINES):
        num_tokens = len(tokenizer.encode(line)) + 1
        assert score.nats == pytest.approx(num_tokens * math.log(tokenizer.vocab_size), rel=1e-6)


def test_an_empty_line_is_one_eos(engine, tokenizer):
    results = list(score_lines(engine, tokenizer, ["", ""]))
    eos_id = tokenizer.eos_id
    for line, score in results:
        assert line == ""
        assert (score.num_tokens, score.num_words, score.num_chars, score.num_bytes) == (1, 0, 1, 1)
        assert score.nats == pytest.approx(one_at_a_time(engine, [eos_id], eos_id), rel=1e-5)
    assert list(score_lines(engine, tokenizer, [])) == []


def test_a_very_long_line_is_one_line(engine, tokenizer):
    long = "ukudla " * 2000
    ids = np.array([*tokenizer.encode(long), tokenizer.eos_id])
    assert len(ids) > 2000
    results = list(score_lines(engine, tokenizer, ["Inja", long, "Ikati"]))
    assert [line for line, _ in results] == ["Inja", long, "Ikati"]
    assert results[1][1].num_tokens == len(ids)
    assert results[1][1].nats == pytest.approx(score_stream(engine, ids, tokenizer.eos_id), rel=1e-5)


def test_the_network_sees_no_more_than_a_fixed_number_of_tokens_at_once(tokenizer):
    engine = UniformEngine(tokenizer.vocab_size)
    lines = ["ukudla " * 500, *["Inja ikati"] * 99]
    assert len(list(score_lines(engine, tokenizer, lines))) == 100
    assert max(rows for rows, _ in engine.windows) == 32
    assert max(width for _, width in engine.windows) == 256


@pytest.mark.parametrize("lines_at_once", [1, 4])
def test_lines_are_taken_as_they_are_needed(tokenizer, lines_at_once):
    num_taken = 0

    def endless():
        nonlocal num_taken
        for line in itertools.cycle(LINES):
            num_taken += 1
            yield line

    scores = score_lines(UniformEngine(tokenizer.vocab_size), tokenizer, endless(), lines_at_once=lines_at_once)
    assert num_taken == 0
    for num_given, (line, _) in enumerate(itertools.islice(scores, 20)):
        assert line == LINES[num_given % len(LINES)]
        assert num_taken - num_given <= lines_at_once


def test_short_lines_are_not_padded_to_the_length_of_long_ones(tokenizer):
    # 32 long lines among 32 short ones: sorted by length, each batch is of one kind.
    engine = UniformEngine(tokenizer.vocab_size)
    lines = ["Inja", "Abantu bahamba kakhulu namhlanje futhi bayadla ekhaya"] * 32
    list(score_lines(engine, tokenizer, lines))
    longest = len(tokenizer.encode(lines[1])) + 1
    shortest = len(tokenizer.encode(lines[0])) + 1
    assert engine.windows == [(32, shortest), (32, longest)]


# Distributions


class FixedEngine(UniformEngine):
    """Logits that depend on how many ids were read, and on nothing else."""

    def __init__(self, logits_NV: np.ndarray, alpha: float) -> None:
        super().__init__(logits_NV.shape[1])
        self.alpha = alpha
        self.logits_NV = logits_NV

    def logits(self, inputs_BT, state):
        batch_size, num_read = state
        self.inputs.append(inputs_BT)
        length = inputs_BT.shape[1]
        return self.logits_NV[None, num_read : num_read + length], (batch_size, num_read + length)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_distribution_scores_are_those_of_their_definitions(alpha):
    rng = np.random.default_rng(0)
    ids = rng.integers(6, size=600)  # more than two windows
    logits_NV = rng.normal(scale=1.5, size=(600, 6))
    engine = FixedEngine(logits_NV, alpha)
    score = score_distribution(engine, ids, 5, epsilon=1e-3)

    nats = sparsemax = js = support = impossible = 0.0
    for row, target in zip(logits_NV, ids, strict=True):
        p = np.exp(log_probs(row[None], alpha))[0]
        one_hot = np.eye(6)[target]
        mixed = (p + one_hot) / 2
        nats -= math.log((p[target] + 1e-3) / (1 + 6e-3))
        sparsemax += p[target] + (1 - (p**2).sum()) / 2
        js += sum(q * math.log(q / m) for d in (p, one_hot) for q, m in zip(d, mixed, strict=True) if q > 0) / 2
        support += (p > 0).sum()
        impossible += p[target] == 0
    means = score.as_dict()
    assert means["num_tokens"] == 600
    assert means["epsilon_perplexity"] == pytest.approx(math.exp(nats / 600))
    assert means["sparsemax_score"] == pytest.approx(sparsemax / 600)
    assert means["js_divergence"] == pytest.approx(js / 600)
    assert means["support"] == pytest.approx(support / 600)
    assert means["impossible"] == impossible / 600
    assert (means["impossible"] > 0) == (alpha > 1)
    # Every token is read once, after the one before it; the first after an <eos>.
    assert np.concatenate(engine.inputs, axis=1)[0].tolist() == [5, *ids[:-1].tolist()]


def test_a_sure_model_has_the_extreme_scores():
    ids = np.array([0, 1, 2])
    right, wrong = np.full((3, 3), -1e9), np.full((3, 3), -1e9)
    for n in range(3):
        right[n, n] = wrong[n, (n + 1) % 3] = 0.0
    best, worst = (score_distribution(FixedEngine(x, 1.0), ids, 2, epsilon=0.0).as_dict() for x in (right, wrong))
    assert (best["epsilon_perplexity"], best["sparsemax_score"], best["js_divergence"]) == (1, 1, pytest.approx(0))
    assert (worst["epsilon_perplexity"], worst["sparsemax_score"]) == (None, 0)
    assert worst["js_divergence"] == pytest.approx(math.log(2))


def test_without_epsilon_the_softmax_models_perplexity_comes_out(works, refused, tiny_run, corpus_dir):
    path = corpus_dir / "valid.txt"
    (row,) = works("evaluate", path, "-m", tiny_run.dir, "--distribution", "--epsilon", "0", "--json").json
    (plain,) = works("evaluate", path, "-m", tiny_run.dir, "--json").json
    assert row["epsilon_perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert (row["support"], row["impossible"]) == (320, 0)
    one, _, both = works("evaluate", path, path, "-m", tiny_run.dir, "--distribution", "--json").json
    assert (both["file"], both["num_tokens"]) == ("all", 2 * one["num_tokens"])
    assert [both[key] for key in list(one)[3:]] == pytest.approx([one[key] for key in list(one)[3:]])
    assert both["epsilon"] == one["epsilon"]
    assert works("evaluate", path, "-m", tiny_run.dir, "--distribution").out.split()[:4] == [
        "file",
        "tokens",
        "epsilon",
        "eps-ppl",
    ]
    assert "--epsilon goes with --distribution" in refused("evaluate", path, "-m", tiny_run.dir, "--epsilon", "0.1")
    assert "--distribution reads one stream" in refused(
        "evaluate", path, "-m", tiny_run.dir, "--distribution", "--cache"
    )
