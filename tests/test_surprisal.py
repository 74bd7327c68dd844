"""What each word of a text costs."""

import math

import numpy as np
import pytest

from conftest import TINY, refusal, synthetic_lines
from ulimi.corpus import open_corpus
from ulimi.engine import load_engine
from ulimi.recipe import load_recipe
from ulimi.run import Run, open_run
from ulimi.score import score_lines
from ulimi.surprisal import score_words
from ulimi.train import train

KINDS = ("bpe", "unigram", "char", "word")
ODD = (
    "",
    " ",
    "   ",
    " Abantu",
    "Abantu ",
    "a   b  ",
    "caf\u00e9 cafe\u0301",
    "a\u00a0b\u3000c",
    "\u65e5\u672c \u8a9e",
    "1 2024,5",
    "\t-x",
)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, corpus_dir) -> Run:
    run_dir = tmp_path_factory.mktemp("runs") / request.param
    recipe = load_recipe(None, (*TINY, f"tokenizer.kind={request.param}"))
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, recipe)
    return open_run(run_dir)


@pytest.fixture(scope="module")
def engine(run):
    return load_engine(run, kind="torch")


def by_hand(engine, run, line):
    """The definition, token by token: bits of each word, and of the line's end."""
    tokenizer = run.tokenizer
    ids = tokenizer.encode_lines([line])[0]
    begins = [
        not tokenizer.is_lossless or tokenizer.token_bytes(id).decode(errors="replace")[0].isspace()
        for id in range(tokenizer.vocab_size)
    ]
    state, before, probs = engine.initial_state(1), tokenizer.eos_id, []
    for id in ids:
        logits_1V, state = engine.step(np.array([before]), state)
        probs_V = np.exp(logits_1V[0].astype(float) - logits_1V[0].max())
        probs.append(probs_V / probs_V.sum())
        before = id
    starts = [place for place, id in enumerate(ids) if place == 0 or begins[id]]
    costs = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        p = math.prod(float(probs[place][ids[place]]) for place in range(start, end))
        if start:
            p /= float(probs[start][begins].sum())
        if end < len(ids):
            p *= float(probs[end][begins].sum())
        text = b"".join(tokenizer.token_bytes(id) for id in ids[start:end])
        costs.append((text, -math.log2(p)))
    return costs


def test_a_words_surprisal_is_what_its_definition_says(run, engine):
    for line, (_, scored) in zip(
        lines := synthetic_lines(6, seed=4), score_words(engine, run.tokenizer, lines), strict=True
    ):
        expected = by_hand(engine, run, line)
        assert [word.text.strip() for word in scored.words] == line.split()
        bits = [*(word.nats / math.log(2) for word in scored.words), scored.end_nats / math.log(2)]
        assert bits == pytest.approx([cost for _, cost in expected], rel=1e-4)
        assert min(bits) >= 0
        # Not the tokens' own cost: here and there what tells that a word ends weighs something.
        assert sum(word.num_tokens for word in scored.words) + 1 == len(run.tokenizer.encode_lines([line])[0])


def test_all_words_and_the_end_are_the_lines_score(run, engine):
    lines = [*synthetic_lines(5, seed=9), *ODD, " ".join(synthetic_lines(60, seed=2))]
    sums = []
    for line, scored in score_words(engine, run.tokenizer, lines):
        sums.append(sum(word.nats for word in scored.words) + scored.end_nats)
        if run.tokenizer.is_lossless:
            text = "".join(word.text for word in scored.words)
            assert text + " " * (len(run.tokenizer.normalize(line)) - len(text)) == run.tokenizer.normalize(line)
            assert all(word.text.strip() for word in scored.words)
        # Odd white space parts words, too.
        assert [word.text.strip() for word in scored.words] == run.tokenizer.normalize(line).split()
        assert sum(word.num_tokens for word in scored.words) + scored.end_tokens == len(run.tokenizer.encode(line)) + 1
    assert sums == pytest.approx([s.nats for _, s in score_lines(engine, run.tokenizer, lines)], rel=1e-5, abs=1e-4)


def test_an_ngram_model_has_them_too(corpus_dir, tmp_path, works):
    works("ngram", corpus_dir, "--out", tmp_path / "ngram")
    run = open_run(tmp_path / "ngram")
    engine = load_engine(run)
    lines = synthetic_lines(3, seed=4)
    for (line, scored), (_, score) in zip(
        score_words(engine, run.tokenizer, lines), score_lines(engine, run.tokenizer, lines), strict=True
    ):
        assert sum(word.nats for word in scored.words) + scored.end_nats == pytest.approx(score.nats, rel=1e-6)
        assert len(scored.words) == len(line.split())


def test_the_command_prints_a_row_a_word(tiny_run, tmp_path, works):
    path = tmp_path / "text.txt"
    path.write_text("Abantu bafunda.\n\nIzingane\n", encoding="utf-8")
    rows = [row.split("\t") for row in works("score", "--words", path, "-m", tiny_run.dir).out.splitlines()]
    assert rows[0] == ["line", "bits", "tokens", "word"]
    assert [(row[0], row[3]) for row in rows[1:]] == [
        ("1", "Abantu"), ("1", "bafunda."), ("1", "<eos>"), ("2", "<eos>"), ("3", "Izingane"), ("3", "<eos>"),
    ]  # fmt: skip
    told = works("score", "--words", "--json", "-m", tiny_run.dir, stdin=path.read_bytes()).json
    assert [line["text"] for line in told] == ["Abantu bafunda.", "", "Izingane"]
    assert [word["text"] for word in told[0]["words"]] == ["Abantu", " bafunda."]
    assert f"{told[0]['words'][1]['bits']:.4f}" == rows[2][1]
    assert told[0]["words"][1]["num_tokens"] == int(rows[2][2])
    assert f"{told[1]['end_bits']:.4f}" == rows[4][1]
    assert [line["end_tokens"] for line in told] == [1, 1, 1]
    (row,) = works("score", "--words", "-m", tiny_run.dir, stdin=b"  \n").out.splitlines()[1:]
    assert int(row.split("\t")[2]) == len(open_run(tiny_run.dir).tokenizer.encode("  ")) + 1
    whole = works("score", "--json", path, "-m", tiny_run.dir).json
    for line, score in zip(told, whole, strict=True):
        bits = sum(word["bits"] for word in line["words"]) + line["end_bits"]
        assert bits * math.log(2) == pytest.approx(score["nats"], rel=1e-5)
    (tmp_path / "none.txt").write_text("", encoding="utf-8")
    assert works("score", "--words", tmp_path / "none.txt", "-m", tiny_run.dir).out == "line\tbits\ttokens\tword\n"


@pytest.mark.parametrize("run", ["word"], indirect=True)
def test_a_word_that_is_not_known_is_shown_as_it_was_written(run, ulimi, tmp_path):
    (tmp_path / "text.txt").write_text("abantu kwamashu\n", encoding="utf-8")
    result = ulimi("score", "--words", tmp_path / "text.txt", "-m", run.dir)
    assert result.code == 0
    assert [row.split("\t")[3] for row in result.out.splitlines()[1:]] == ["abantu", "kwamashu", "<eos>"]
    assert "1" in result.err


def test_what_cannot_be_is_refused(tiny_run, tmp_path, corpus_dir, refused):
    said = refused("score", "--words", "--marginal", "-m", tiny_run.dir)
    assert "--words and --marginal are two ways to score; choose one" in said
    run_dir = tmp_path / "sparse"
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, (*TINY, "loss.kind=entmax")))
    sparse = open_run(run_dir)
    said = refusal(lambda: list(score_words(load_engine(sparse), sparse.tokenizer, ["Abantu"])))
    assert said == "words: a sparse model (entmax) rules some out; allowed: models of cross entropy"
    assert said in refused("score", "--words", corpus_dir / "valid.txt", "-m", run_dir)
    assert "nowhere.txt" in refused("score", "--words", tmp_path / "nowhere.txt", "-m", tiny_run.dir)
