"""The n-gram model: it is modified Kneser-Ney, an engine like the others, and a run that every command takes."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import commands_that_look_inside, refusal, synthetic_lines
from reference import KneserNey
from test_run import WITHOUT_HEAVY, python
from ulimi.baseline import TokenizerSettings, make_ngram_run
from ulimi.engine import load_engine
from ulimi.generate import Sampling, generate, score_prompt
from ulimi.info import model_card, summary
from ulimi.ngram import MAX_ORDER, NONE, NgramEngine, count_ngrams, discounts, read_ngrams, write_ngrams
from ulimi.run import NGRAMS, open_run
from ulimi.score import score_lines, score_stream

V = 6
EOS = V - 1
NEVER = 4
"""a word that no text below has"""


def skewed_lines(num, seed, longest=6):
    """Lines of words 0 to 3, of 0 to `longest` words, the first ones the commoner, with some order in them."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num):
        line = []
        for _ in range(rng.randint(0, longest)):
            follower = (line[-1] + 1) % 4 if line else 0
            line.append(follower if rng.random() < 0.5 else rng.choices(range(4), weights=(8, 4, 2, 1))[0])
        lines.append(line)
    return lines


CORPORA = {
    "one empty line": [[]],
    "one word": [[0]],
    "lines of 0 and 1": [[], [0], [], [1], [0]],
    "short": [[0, 1], [0]],
    "repetitive": [[0, 0, 0, 0, 0, 0]] * 3,
    "small": skewed_lines(12, seed=1),
    "larger": skewed_lines(60, seed=2),
    "long lines": skewed_lines(4, seed=3, longest=40),
}


def as_ids(lines):
    return np.array([id for line in lines for id in [*line, EOS]], dtype=np.uint16)


def make_engine(lines, order):
    return NgramEngine(count_ngrams(as_ids(lines), V, order))


def make_truth(lines, order):
    return KneserNey([[str(w) for w in line] for line in lines], [*map(str, range(EOS)), "</s>"], order)


def probabilities(engine, ids):
    """What the engine says after these ids, from the zero state."""
    logits_1V, _ = engine.prime(ids, engine.initial_state(1))
    return np.exp(logits_1V[0].astype(np.float64))


def close(ours, truth, tolerance=2e-6):
    np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=1e-12)


@pytest.fixture(scope="module")
def engine():
    return make_engine(CORPORA["larger"], 4)


# It is modified Kneser-Ney


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", CORPORA)
def test_every_probability_is_that_of_the_equations(name, order):
    engine, truth = make_engine(CORPORA[name], order), make_truth(CORPORA[name], order)
    assert engine.fallback_orders == truth.fallback_orders
    length = min(order, 3)  # one more than the context of the shorter orders
    contexts = [ids for n in range(1, length + 1) for ids in itertools.product(range(EOS), repeat=n)]
    rng = random.Random(0)
    contexts += [tuple(rng.choices(range(EOS), weights=(8, 4, 2, 2, 1), k=order + 1)) for _ in range(20)]
    contexts += [tuple(line[:end]) for line in CORPORA[name][:5] for end in range(1, len(line) + 1)]
    for context in contexts:
        for begin in ([], [EOS], [0, 1, EOS]):
            words = (*["<s>"] * bool(begin), *map(str, context))
            expected = [float(truth.probability(w, words)) for w in truth.words]
            close(probabilities(engine, [*begin, *context]), expected)
    for begin in ([EOS], [0, EOS], [EOS, EOS]):  # an empty line's <s> is no context of the next
        close(probabilities(engine, begin), [float(truth.probability(w, ("<s>",))) for w in truth.words])


def test_every_order_with_discounts_of_its_own():
    """Six tokens are too few for that at order 1; here are thirty, of Zipf's sort, and beginnings that come twice."""
    rng = random.Random(2)
    lines = [rng.choices(range(29), weights=[1 / n for n in range(1, 30)], k=rng.randint(0, 9)) for _ in range(60)]
    lines += [line[:5] for line in lines[:15]]
    ids = np.array([id for line in lines for id in [*line, 30]])
    engine = NgramEngine(count_ngrams(ids, 31, 3))
    truth = KneserNey([[str(w) for w in line] for line in lines], [*map(str, range(30)), "</s>"], 3)
    assert engine.fallback_orders == truth.fallback_orders == []
    np.testing.assert_allclose([d[1:] for d in engine.discounts], [[float(x) for x in d] for d in truth.discounts])
    contexts = [line[: rng.randint(0, len(line))] for line in lines[:30]] + [[29], [0, 29], [29, 0], []]
    for context in contexts:
        expected = [float(truth.probability(w, ("<s>", *map(str, context)))) for w in truth.words]
        close(probabilities(engine, [30, *context]), expected)


def test_before_anything_is_read_there_is_no_context():
    engine, truth = make_engine(CORPORA["small"], 3), make_truth(CORPORA["small"], 3)
    # The longer contexts of a word that never occurs are none, so what is left is what no context gives.
    close(probabilities(engine, [NEVER]), [float(truth.probability(w, ())) for w in truth.words])


def test_a_tiny_model_by_hand():
    """Lines "a b" and "a". Bigrams: <s>a twice, ab, b</s>, a</s> once. Words stand after 1, 1, 2 others: a, b, </s>."""
    a, b, eos = 0, 1, 2
    engine = NgramEngine(count_ngrams(np.array([a, b, eos, a, eos]), 3, 2))
    assert engine.fallback_orders == [1, 2]
    assert engine.num_ngrams == [3, 4]
    one = [0.5 / 4 + 0.5 / 3, 0.5 / 4 + 0.5 / 3, 1 / 4 + 0.5 / 3]  # discounts 0.5, 0.5, 1 of 4
    close(probabilities(engine, [a]), [0.5 * one[0], 0.25 + 0.5 * one[1], 0.25 + 0.5 * one[2]])
    close(probabilities(engine, [b]), [0.5 * one[0], 0.5 * one[1], 0.5 + 0.5 * one[2]])
    close(probabilities(engine, [eos]), [0.5 + 0.5 * one[0], 0.5 * one[1], 0.5 * one[2]])  # discount 1 of 2


def test_discounts_by_hand():
    # n1 = 4, n2 = 2, n3 = 1, n4 = 1: y = 4 / 8; 1 - 2 y 2 / 4, 2 - 3 y 1 / 2, 3 - 4 y 1 / 1; the 7 is beyond them.
    assert discounts(np.array([1, 2, 1, 3, 1, 0, 4, 1, 7, 2], dtype=np.uint32)) == (0.0, 0.5, 1.25, 1.0)
    # n4 = 0 is no obstacle.
    assert discounts(np.array([1, 1, 1, 1, 2, 2, 3])) == (0.0, 0.5, 1.25, 3.0)


@pytest.mark.parametrize("counts", [
    [],
    [0, 0],
    [2, 2, 3, 4],  # no 1
    [1, 1, 3, 4],  # no 2
    [1, 2, 4],  # no 3
    [1] * 4 + [2] * 2 + [3] * 8,  # 2 - 3 / 2 * 8 / 2 is below 0
    [1] * 2 + [2] * 2 + [3] * 4 + [4],  # 2 - 3 / 3 * 4 / 2 is 0: what follows twice would leave nothing to the others
    [1] * 4 + [2] * 2 + [3] + [4] * 4,  # 3 - 4 / 2 * 4 is below 0
])  # fmt: skip
def test_discounts_that_are_not_defined(counts):
    assert discounts(np.array(counts, dtype=np.uint32)) is None


def test_what_begins_a_line_keeps_its_own_counts():
    """After <s>, 0 came three times and 1 once; by continuations they would be equal."""
    engine = make_engine([[0, 1], [0, 2], [0, 3], [1, 2]], 3)
    after_bos = probabilities(engine, [EOS])
    assert after_bos[0] > 2 * after_bos[1]


@pytest.mark.parametrize("order", [1, 3, 5])
def test_every_distribution_sums_to_one(order):
    engine = make_engine(CORPORA["larger"], order)
    state, rng = engine.initial_state(7), np.random.default_rng(0)
    for _ in range(50):
        logits_BV, state = engine.step(rng.integers(V, size=7), state)
        assert logits_BV.shape == (7, V)
        assert logits_BV.dtype == np.float32
        np.testing.assert_allclose(np.exp(logits_BV.astype(np.float64)).sum(axis=1), 1, rtol=0, atol=1e-6)


def test_ids_beyond_16_bits():
    big = 70_000
    rng = np.random.default_rng(0)
    ids = np.append(rng.integers(65_000, big, size=500), big - 1).astype(np.uint32)
    levels = count_ngrams(ids, big, 3)
    assert NgramEngine(levels).vocab_size == big
    engine = NgramEngine(levels)
    nll, _ = engine.nll(
        np.array([ids[:-1]], dtype=np.int64), np.array([ids[1:]], dtype=np.int64), engine.initial_state(1)
    )
    logits, _ = engine.prime(ids[:10].astype(np.int64).tolist(), engine.initial_state(1))
    assert -logits[0, ids[10]] == pytest.approx(nll[0, 9], rel=1e-6)
    assert nll.mean() < 3  # it has seen this text, and log(V) is 11


# It is an engine


@pytest.mark.parametrize("order", [1, 2, 4])
def test_steps_windows_and_primes_agree(order):
    engine = make_engine(CORPORA["larger"], order)
    ids_BT = np.random.default_rng(1).integers(V, size=(3, 20))
    state, steps = engine.initial_state(3), []
    for t in range(19):
        logits_BV, state = engine.step(ids_BT[:, t], state)
        steps.append(-logits_BV[np.arange(3), ids_BT[:, t + 1]])
    window, last = engine.nll(ids_BT[:, :-1], ids_BT[:, 1:], engine.initial_state(3))
    assert window.dtype == np.float32
    np.testing.assert_allclose(window, np.stack(steps, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(last, state)
    halves, carried = [], engine.initial_state(3)
    for part in (slice(0, 7), slice(7, 8), slice(8, 19)):
        nll, carried = engine.nll(ids_BT[:, part], ids_BT[:, part.start + 1 : part.stop + 1], carried)
        halves.append(nll)
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), window)
    for row in range(3):
        logits_1V, primed = engine.prime(ids_BT[row, :19].tolist(), engine.initial_state(1))
        np.testing.assert_array_equal(logits_1V, engine.step(ids_BT[:, 18], engine.nll(
            ids_BT[:, :18], ids_BT[:, :18], engine.initial_state(3))[1])[0][row : row + 1])  # fmt: skip
        np.testing.assert_array_equal(primed, state[row : row + 1])
    logits_BTV, after = engine.logits(ids_BT[:, :-1], engine.initial_state(3))
    assert logits_BTV.dtype == np.float32
    np.testing.assert_allclose(-np.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=2)[..., 0], window, rtol=1e-6)
    np.testing.assert_array_equal(after, state)
    with pytest.raises(ValueError, match="no ids"):
        engine.prime([], engine.initial_state(1))


def test_targets_need_not_be_the_inputs_that_follow(engine):
    inputs_BT = np.array([[EOS, 0, 1, 2]])
    for word in range(V):
        nll, _ = engine.nll(inputs_BT, np.full((1, 4), word), engine.initial_state(1))
        truth = make_truth(CORPORA["larger"], 4)
        said = "</s>" if word == EOS else str(word)
        expected = [float(truth.probability(said, ("<s>", "0", "1", "2")[: t + 1])) for t in range(4)]
        close(np.exp(-nll[0].astype(np.float64)), expected)


def test_a_state_is_a_value(engine):
    _, state = engine.nll(np.array([[EOS, 0, 1]]), np.array([[0, 1, 2]]), engine.initial_state(1))
    before = state.copy()
    first, _ = engine.step(np.array([2]), state)
    engine.prime([1, 1, EOS, 3], state)
    engine.nll(np.array([[3, 3]]), np.array([[3, 3]]), state)
    three = engine.repeat_state(state, 3)
    three[:] = NONE
    engine.select_state(state, [0])[:] = NONE
    np.testing.assert_array_equal(state, before)
    np.testing.assert_array_equal(engine.step(np.array([2]), state)[0], first)


def test_states_are_repeated_and_selected(engine):
    _, state = engine.nll(
        np.array([[EOS, 0], [EOS, 1], [0, 2]]), np.zeros((3, 2), dtype=np.int64), engine.initial_state(3)
    )
    assert len({tuple(row) for row in state.tolist()}) == 3
    chosen = engine.select_state(state, [2, 0])
    np.testing.assert_array_equal(chosen, state[[2, 0]])
    np.testing.assert_array_equal(engine.join_states([chosen, state[1:2]]), state[[2, 0, 1]])
    assert "needs a network" in refusal(lambda: engine.output(state))
    repeated = engine.repeat_state(chosen[1:], 4)
    logits_BV, _ = engine.step(np.array([1, 1, 1, 1]), repeated)
    np.testing.assert_array_equal(logits_BV, np.repeat(engine.step(np.array([1] * 3), state)[0][:1], 4, axis=0))


def test_an_unseen_context_leaves_the_shorter_one(engine):
    np.testing.assert_array_equal(probabilities(engine, [NEVER, 0, 1]), probabilities(engine, [0, 1]))
    np.testing.assert_array_equal(probabilities(engine, [0, 1, NEVER]), probabilities(engine, [NEVER]))


def test_counting_is_repeatable_and_leaves_its_input_alone():
    ids = as_ids(CORPORA["larger"])
    before = ids.copy()
    ids.flags.writeable = False  # as a memory-mapped text is
    first, second = count_ngrams(ids, V, 4), count_ngrams(ids, V, 4)
    np.testing.assert_array_equal(ids, before)
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_generating_draws_from_the_distribution(engine):
    steps = list(generate(engine, [EOS, 0], sampling=Sampling(), max_tokens=12, num=4, seed=3, stop_ids=[EOS]))
    assert {step.row for step in steps} == {0, 1, 2, 3}
    for row in range(4):
        mine = [step for step in steps if step.row == row]
        scored = score_prompt(engine, [EOS, 0, *(step.id for step in mine)])[1:]
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in scored], rel=1e-6)


# The file


def test_written_and_read_is_the_same(tmp_path):
    for order in (1, 4):
        levels = count_ngrams(as_ids(CORPORA["larger"]), V, order)
        paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
        for path in paths:
            write_ngrams(levels, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        again = read_ngrams(paths[0])
        assert len(again) == order
        for context in ([EOS, 0, 1], [2], [NEVER, EOS]):
            np.testing.assert_array_equal(
                probabilities(NgramEngine(again), context), probabilities(NgramEngine(levels), context)
            )
    assert sorted(tmp_path.iterdir()) == paths


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "n.npz"
    write_ngrams(count_ngrams(as_ids(CORPORA["larger"]), V, 3), path)
    good = path.read_bytes()
    with np.load(path) as arrays:
        content = dict(arrays)
    damages = [good[: len(good) // 2], b"", b"no zip at all", good[:100] + bytes(50) + good[150:]]
    for damage in damages:
        path.write_bytes(damage)
        said = refusal(lambda: read_ngrams(path))
        assert said.startswith(f"{path}: cannot be read: ")
        assert "pickle" not in said
    for name, changed in (("words_2", content["words_2"][:-1]), ("num_successors_3", content["counts_3"])):
        np.savez(path, **{**content, name: changed})
        assert refusal(lambda: read_ngrams(path)).startswith(f"{path}: cannot be read: ")
    np.savez(path, **{**content, "counts_2": np.array([{}], dtype=object)})  # a pickle
    assert refusal(lambda: read_ngrams(path)).startswith(f"{path}: cannot be read: ")
    np.savez(path)
    assert refusal(lambda: read_ngrams(path)).startswith(f"{path}: cannot be read: ")
    path.unlink()
    assert str(path) in refusal(lambda: read_ngrams(path))


# The run and the command line


@pytest.fixture(scope="module")
def ngram_dir(tmp_path_factory, corpus_dir):
    """An n-gram run of the shared corpus; no test may write into its folder."""
    run_dir = tmp_path_factory.mktemp("ngram") / "run"
    make_ngram_run(corpus_dir, run_dir, order=4, settings=TokenizerSettings(vocab_size=320))
    return run_dir


@pytest.fixture
def works(works):
    """Give the output alone."""
    return lambda *args: works(*args).out


def test_lines_alone_are_the_stream(ngram_dir, corpus_dir):
    run = open_run(ngram_dir)
    engine, tokenizer = load_engine(run), run.tokenizer
    lines = [*(corpus_dir / "valid.txt").read_text().splitlines(), "", "Xq", ""]
    alone = [score for _, score in score_lines(engine, tokenizer, lines)]
    ids = np.array(tokenizer.encode("".join(line + "\n" for line in lines)))
    assert sum(score.nats for score in alone) == pytest.approx(score_stream(engine, ids, tokenizer.eos_id), rel=1e-6)
    (one,) = [score for _, score in score_lines(engine, tokenizer, [lines[3]])]
    assert one.nats == alone[3].nats
    again, _ = score_lines(engine, tokenizer, ["Xq", "Abantu bafunda."])
    assert again[1].nats == alone[-2].nats


def test_the_score_is_that_of_the_equations_on_text(ngram_dir, corpus_dir):
    run = open_run(ngram_dir)
    tokenizer = run.tokenizer

    def encode(part):
        lines = (corpus_dir / f"{part}.txt").read_text().splitlines()
        return [[str(id) for id in ids[:-1]] for ids in tokenizer.encode_lines(lines)]

    truth = KneserNey(encode("train")[:40], [*map(str, range(tokenizer.eos_id)), "</s>"], 3)
    ids = [id for line in encode("train")[:40] for id in [*map(int, line), tokenizer.eos_id]]
    engine = NgramEngine(count_ngrams(np.array(ids), tokenizer.vocab_size, 3))
    for line in encode("valid")[:2]:
        sentence = ["<s>", *line, "</s>"]
        expected = sum(-math.log(truth.probability(sentence[t], tuple(sentence[:t]))) for t in range(1, len(sentence)))
        numbers = np.array([*map(int, line), tokenizer.eos_id])
        assert score_stream(engine, numbers, tokenizer.eos_id) == pytest.approx(expected, rel=1e-6)


def test_ngram_makes_a_run_that_every_command_takes(works, tmp_path, corpus_dir):
    run_dir, valid = tmp_path / "run", corpus_dir / "valid.txt"
    out = works("ngram", corpus_dir, "--out", run_dir, "--order", 5, "--kind", "bpe", "--vocab-size", 320)
    assert out.startswith("validation: ")
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "README.md", "config.json", "meta.json", "ngram.npz", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((run_dir / "config.json").read_text()) == {
        "model_type": "ngram", "bos_token_id": 319, "eos_token_id": 319, "ngram": {"vocab_size": 320, "order": 5},
    }  # fmt: skip

    stream = json.loads(works("evaluate", valid, "-m", run_dir, "--json"))
    stateless = json.loads(works("evaluate", valid, "-m", run_dir, "--json", "--stateless"))
    rows = [json.loads(line) for line in works("score", valid, "-m", run_dir, "--json").splitlines()]
    assert stream["nats"] == pytest.approx(stateless["nats"], rel=1e-6)
    assert sum(row["nats"] for row in rows) == pytest.approx(stateless["nats"])
    assert json.loads((run_dir / "meta.json").read_text())["scores"]["valid"]["nats"] == stream["nats"]
    assert stream["bits_per_char"] < 2.5  # 28 words: far below a uniform guess

    text = works("generate", "Abantu", "-m", run_dir, "--seed", 1, "--max-tokens", 12, "--probabilities")
    assert text.startswith("Abantu")
    assert works("generate", "-m", run_dir, "--seed", 1) == works("generate", "-m", run_dir, "--seed", 1)

    facts = dict(summary(open_run(run_dir)))
    num_ngrams = sum(open_run(run_dir).meta["num_ngrams"])
    assert facts["model"].startswith(f"modified Kneser-Ney of order 5, {num_ngrams:,} n-grams")
    assert facts["tokenizer"] == "bpe, 320 tokens"
    assert "network" not in facts
    assert facts["score, valid"] in out
    assert all(value in works("info", run_dir) for value in facts.values())
    assert json.loads(works("info", run_dir, "--json"))["config"] == {"vocab_size": 320, "order": 5}
    card = (run_dir / "README.md").read_text()
    assert card == model_card(open_run(run_dir))
    assert "Kneser-Ney" in card
    assert "AWD" not in card
    assert "curve.png" not in card


def test_it_needs_nothing_heavy(tmp_path, corpus_dir):
    run_dir = tmp_path / "run"
    main = f"{WITHOUT_HEAVY}\nfrom ulimi.cli import main\nmain()"
    for args in (
        ["ngram", corpus_dir, "--out", run_dir, "--vocab-size", 320],
        ["evaluate", corpus_dir / "valid.txt", "-m", run_dir, "--stateless"],
        ["generate", "Abantu", "-m", run_dir, "--max-tokens", 5, "--seed", 1],
        ["info", run_dir],
    ):
        result = python(main, *args)
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_a_network_lends_its_tokenizer(works, tmp_path, corpus_dir, tiny_run):
    works("ngram", corpus_dir, "-o", tmp_path / "run", "--tokenizer-from", tiny_run.dir)
    run = open_run(tmp_path / "run")
    assert run.tokenizer.to_str() == tiny_run.tokenizer.to_str()
    assert run.meta["tokenizer_from"] == str(tiny_run.dir.resolve())
    assert run.config == {"vocab_size": 320, "order": 6}
    assert run.meta["data"] == tiny_run.meta["data"]


@pytest.mark.parametrize(("kind", "size"), [("word", 58), ("char", None), ("unigram", 300)])
def test_the_other_tokenizers(works, tmp_path, corpus_dir, kind, size):
    args = ("--vocab-size", 300) if kind == "unigram" else ()
    works("ngram", corpus_dir, "-o", tmp_path / "run", "--kind", kind, *args)
    run = open_run(tmp_path / "run")
    assert run.tokenizer.kind == kind
    assert kind != "word" or run.tokenizer.vocab_size > 28


def test_one_file_is_split(works, tmp_path):
    path, run_dir = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("\n".join(synthetic_lines(100, seed=2)) + "\n")
    works("ngram", path, "-o", run_dir, "--vocab-size", 300)
    assert (run_dir / "corpus" / "valid.txt").is_file()
    assert open_run(run_dir).text_path("valid") == (run_dir / "corpus" / "valid.txt").resolve()


def test_a_text_that_is_too_small_is_noted(ulimi, tmp_path, corpus_dir):
    small = tmp_path / "small"
    small.mkdir()
    for part in ("train", "valid"):
        (small / f"{part}.txt").write_text("Abantu bafunda.\n")
    code, _, err = ulimi("ngram", small, "-o", tmp_path / "run", "--order", 2, "--kind", "char")
    assert code == 0
    assert "order 1, 2: the text is too small or too regular" in err
    assert "too small for its own discounts at order 1, 2" in dict(summary(open_run(tmp_path / "run")))["model"]


@pytest.mark.parametrize(("args", "said"), [
    (["--order", 0], f"--order 0: allowed: 1 to {MAX_ORDER}"),
    (["--order", 21], f"--order 21: allowed: 1 to {MAX_ORDER}"),
    (["--kind", "bp"], "tokenizer kind is 'bp'; allowed: bpe, unigram, word, char; did you mean 'bpe'?"),
    (["--vocab-size", 0], "vocab_size is 0"),
    (["--vocab-size", 10], "vocab_size is 10"),
    (["--min-frequency", 0], "min_frequency is 0"),
    (["--tokenizer-from", "none"], "no run folder 'none'"),
    (["--tokenizer-from", "none", "--vocab-size", "10"], "--vocab-size: --tokenizer-from takes the tokenizer of none"),
    (["--tokenizer-from", "none", "--min-frequency", "1"], "--min-frequency: --tokenizer-from takes"),
])  # fmt: skip
def test_ngram_refuses_in_one_line(refused, tmp_path, monkeypatch, corpus_dir, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("ngram", corpus_dir, "--out", "run", *args)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_is_left_alone(refused, works, tmp_path, corpus_dir, ngram_dir, tiny_run):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    for out, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "holds other things (letter.txt)"),
        (tiny_run.dir, "holds other things"),
        (ngram_dir, "already holds an n-gram model"),
    ):
        assert said in refused("ngram", corpus_dir, "--out", out)
    # What was cut off before its n-grams were written is made anew.
    run_dir = Path(shutil.copytree(ngram_dir, tmp_path / "run"))
    (run_dir / NGRAMS).unlink()
    assert f"{run_dir / NGRAMS}: cannot be read" in refused("score", corpus_dir / "valid.txt", "-m", run_dir)
    works("ngram", corpus_dir, "--out", run_dir, "--order", 4, "--vocab-size", 320)
    assert (run_dir / NGRAMS).read_bytes() == (ngram_dir / NGRAMS).read_bytes()


def test_what_looks_inside_a_network_refuses(refused, tmp_path, corpus_dir, ngram_dir):
    valid, m = corpus_dir / "valid.txt", ("-m", ngram_dir)
    said = f"{ngram_dir} holds an n-gram model; this needs a network"
    for command in (
        *commands_that_look_inside(ngram_dir, corpus_dir, tmp_path / "new"),
        ("evaluate", valid, *m, "--cache"),
        ("evaluate", valid, *m, "--dynamic"),
        ("evaluate", valid, *m, "--engine", "onnx"),
        ("score", valid, *m, "--engine", "torch"),
        ("generate", *m, "--engine", "torch", "--seed", 1),
    ):
        assert said in refused(*command)
    assert "nothing to resume" in refused("train", corpus_dir, "--out", ngram_dir, "--resume")
    assert "holds other things" in refused("train", corpus_dir, "--out", ngram_dir)
    assert "--device cuda" in refused("generate", *m, "--device", "cuda", "--seed", 1)
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path, ngram_dir, corpus_dir):
    run_dir = Path(shutil.copytree(ngram_dir, tmp_path / "run"))
    make_ngram_run(corpus_dir, tmp_path / "other", order=1, settings=TokenizerSettings(vocab_size=300))
    shutil.copy(tmp_path / "other" / "tokenizer.json", run_dir)
    assert "do not belong together" in refused("generate", "-m", run_dir, "--seed", 1)
