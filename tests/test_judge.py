"""Judging by minimal pairs: the arithmetic with models that are known, runs, Hugging Face models, the command."""

import math
import random
import sys

import pytest
import torch

from ulimi.engine import load_engine
from ulimi.errors import UlimiError
from ulimi.grammar import Pair, pairs, phenomena
from ulimi.judge import Row, hf_scorer, judge, read_pairs, run_scorer, write_pairs
from ulimi.score import score_lines

torch.set_num_threads(1)

TWO = [Pair("a", "good one", "bad one"), Pair("a", "good two", "bad two"), Pair("b", "good three", "bad three")]


@pytest.fixture(scope="module")
def shipped() -> list[Pair]:
    return [pair for name in phenomena() for pair in pairs(name)]


def knowing(asked):
    good = {pair.good for pair in asked}
    return lambda sentences: [1.0 if sentence in good else 2.0 for sentence in sentences]


# Arithmetic


def test_who_knows_the_truth_is_right_and_who_inverts_it_is_wrong(shipped):
    truth = knowing(shipped)
    right = judge(truth, shipped)
    assert {row.accuracy for row in right.rows} == {1.0}
    assert right.mean == 1.0
    wrong = judge(lambda sentences: [-nats for nats in truth(sentences)], shipped)
    assert {row.accuracy for row in wrong.rows} == {0.0}
    assert wrong.mean == 0.0


def test_who_knows_nothing_is_right_half_the_time(shipped):
    assert {row.accuracy for row in judge(lambda sentences: [7.0] * len(sentences), shipped).rows} == {0.5}


def test_who_likes_short_sentences_is_right_half_the_time(shipped):
    assert {row.accuracy for row in judge(lambda sentences: [len(s) * 2.5 for s in sentences], shipped).rows} == {0.5}


@pytest.mark.parametrize("seed", range(5))
def test_who_likes_letters_is_right_half_the_time(shipped, seed):
    """A unigram of characters, whatever its weights: the pairs are balanced, so no such preference can win."""
    rng = random.Random(seed)
    # Whole numbers: their sums do not depend on the order.
    weights = {
        letter: rng.randrange(1, 1000) for letter in sorted({c for p in shipped for c in (p.good + p.bad).lower()})
    }
    scorer = lambda sentences: [float(sum(weights[c] for c in s.lower())) for s in sentences]  # noqa: E731
    assert {row.accuracy for row in judge(scorer, shipped).rows} == {0.5}


def test_accuracy_is_of_the_pairs_and_the_mean_of_the_phenomena():
    nats = {"good one": 1.0, "bad one": 2.0, "good two": 3.0, "bad two": 3.0, "good three": 9.0, "bad three": 8.0}
    judgement = judge(lambda sentences: [nats[s] for s in sentences], TWO)
    assert [(row.phenomenon, row.num, row.correct, row.accuracy) for row in judgement.rows] == [
        ("a", 2, 1.5, 0.75), ("b", 1, 0.0, 0.0),
    ]  # fmt: skip
    assert judgement.mean == 0.375
    assert [(verdict.credit, verdict.good_nats, verdict.bad_nats) for verdict in judgement.verdicts] == [
        (1.0, 1.0, 2.0), (0.5, 3.0, 3.0), (0.0, 9.0, 8.0),
    ]  # fmt: skip


COUPLES = [
    Pair("a", "Umfana uyahamba.", "Umfana bayahamba."), Pair("a", "Abafana bayahamba.", "Abafana uyahamba."),
    Pair("a", "Inja iyahamba.", "Inja liyahamba."), Pair("a", "Ikati liyahamba.", "Ikati iyahamba."),
]  # fmt: skip


def test_a_couple_is_judged_by_its_two_pairs_together():
    """The model likes ba- by 4 nats, li- by 1; in the first couple it also knows a little, in the second nothing."""
    nats = [10.0, 7.0, 6.0, 11.0, 9.0, 8.0, 8.0, 9.0]
    by_sentence = dict(zip([s for pair in COUPLES for s in (pair.good, pair.bad)], nats, strict=True))
    judgement = judge(lambda sentences: [by_sentence[s] for s in sentences], COUPLES)
    (row,) = judgement.rows
    assert [verdict.credit for verdict in judgement.verdicts] == [0.0, 1.0, 0.0, 1.0]
    assert (row.accuracy, row.num_couples, row.correct_couples, row.couple_accuracy) == (0.5, 2, 1.5, 0.75)
    assert judgement.couple_mean == 0.75


def test_pairs_without_their_mirror_image_are_no_couples():
    for asked in (COUPLES[:1], [COUPLES[0], COUPLES[2]], TWO):
        judgement = judge(lambda sentences: [1.0] * len(sentences), asked)
        assert judgement.couple_mean is None
        assert [row.couple_accuracy for row in judgement.rows] == [None] * len(judgement.rows)


def test_every_shipped_pair_is_half_of_a_couple_and_no_context_no_knowledge(shipped):
    judgement = judge(lambda sentences: [float(len(s)) for s in sentences], shipped)
    assert {(row.num_couples, row.couple_accuracy) for row in judgement.rows} == {(100, 0.5)}
    assert judge(knowing(shipped), shipped).couple_mean == 1.0


def test_a_sentence_that_cannot_be_is_worse_than_any(shipped):
    judgement = judge(lambda sentences: [math.inf if s.startswith("bad") else 5.0 for s in sentences], TWO)
    assert judgement.mean == 1.0
    assert judge(lambda sentences: [math.inf] * len(sentences), TWO).mean == 0.5


def test_each_sentence_is_scored_once():
    asked = []
    judge(lambda sentences: asked.append(list(sentences)) or [0.0] * len(sentences), [*TWO, Pair("c", "good one", "x")])
    assert asked == [["good one", "bad one", "good two", "bad two", "good three", "bad three", "x"]]


@pytest.mark.parametrize(("correct", "num", "low", "high"), [
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1.0),
    (0, 10, 0.0, 0.2775),
    (150, 200, 0.6857, 0.8049),
])  # fmt: skip
def test_the_interval_is_wilsons(correct, num, low, high):
    """It holds the proportions p whose expectation lies within 1.96 of its own standard deviations."""
    row = Row("x", num, correct)
    assert row.interval == pytest.approx((low, high), abs=5e-5)
    for p in row.interval:
        if 1e-9 < p < 1 - 1e-9:
            assert abs(row.accuracy - p) / math.sqrt(p * (1 - p) / num) == pytest.approx(1.95996, abs=1e-4)


def test_no_pairs_and_no_number_are_refused():
    with pytest.raises(UlimiError, match="no pairs to judge"):
        judge(lambda sentences: [], [])
    with pytest.raises(UlimiError, match="score of 'good one' is not a number"):
        judge(lambda sentences: [math.nan] * len(sentences), TWO)


# Files of pairs


def test_pairs_are_read_as_they_are_written(tmp_path, shipped):
    write_pairs(tmp_path / "pairs.tsv", shipped)
    assert read_pairs(tmp_path / "pairs.tsv") == shipped
    assert (tmp_path / "pairs.tsv").read_text().startswith("phenomenon\tgood\tbad\n")


def test_ones_own_pairs_need_no_header_and_may_have_empty_lines(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_bytes("\ufeffx\tLungile.\t Lulungile. \r\n\r\ny\tA\tB\r\n".encode())
    assert read_pairs(path) == [Pair("x", "Lungile.", "Lulungile."), Pair("y", "A", "B")]


@pytest.mark.parametrize(("text", "message"), [
    ("x\ta\n", "line 1: 2 columns; allowed: phenomenon, good, bad, tabs between"),
    ("x\ta\tb\n\nx\ta\tb\tc\n", "line 3: 4 columns"),
    ("x\t\tb\n", "line 1: "),
    ("x\ta\ta\n", "line 1: the good and the bad sentence are the same, 'a'"),
    ("phenomenon\tgood\tbad\n", "no pairs"),
    ("", "no pairs"),
])  # fmt: skip
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, text, message):
    path = tmp_path / "own.tsv"
    path.write_text(text)
    with pytest.raises(UlimiError, match=message) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)


# Models


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_run_scores_each_sentence_as_a_line(tiny_run, kind):
    engine = load_engine(tiny_run, "cpu", kind=kind)
    sentences = ["Abantu bafunda.", "Inja uyafunda kakhulu.", "Abantu bafunda."]
    expected = [score.nats for _, score in score_lines(engine, tiny_run.tokenizer, sentences)]
    assert list(run_scorer(engine, tiny_run.tokenizer)(sentences)) == expected
    ids = tiny_run.tokenizer.encode_lines(sentences)[1]
    step, state, nats = tiny_run.tokenizer.eos_id, engine.initial_state(1), 0.0
    for token in ids:
        logits, state = engine.prime([step], state)
        nats -= float(torch.log_softmax(torch.tensor(logits[0]).double(), -1)[token])
        step = token
    assert ids[-1] == tiny_run.tokenizer.eos_id
    assert expected[1] == pytest.approx(nats, rel=1e-4)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory, tiny_run, transformers):
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=tiny_run.tokenizer.vocab_size, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_run.tokenizer.save(folder)
    return folder


def test_a_hugging_face_model_scores_a_sentence_after_its_bos(hf_dir, tiny_run, transformers):
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).double().eval()
    sentences = [pair.good for pair in pairs("subject-present", 40)] + ["A"]
    scores = hf_scorer(hf_dir)(sentences)
    for sentence, score in zip(sentences, scores, strict=True):
        ids = [tiny_run.tokenizer.eos_id, *tiny_run.tokenizer.encode(sentence)]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        expected = -sum(float(logprobs[place, token]) for place, token in enumerate(ids[1:]))
        assert score == pytest.approx(expected, rel=1e-4)


def test_a_hugging_face_model_is_judged_by_the_command(hf_dir, works):
    result = works("judge", "--hf", hf_dir, "--num", "10", "--json")
    assert [row["phenomenon"] for row in result.json] == [*phenomena(), "mean"]


def test_a_folder_that_holds_no_model_is_refused(hf_dir, tmp_path):
    with pytest.raises(UlimiError, match=r"no config.json there"):
        hf_scorer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UlimiError, match="no causal language model with its tokenizer") as caught:
        hf_scorer(tmp_path)
    assert "\n" not in str(caught.value)


def test_where_transformers_is_missing_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UlimiError, match="--hf needs transformers: pip install torch transformers"):
        hf_scorer(tmp_path)


# The command


def test_judge_prints_a_row_a_phenomenon_and_the_mean(works, tiny_run):
    result = works("judge", "-m", tiny_run.dir, "--num", "10")
    header, *rows, mean = (line.split("\t") for line in result.out.splitlines())
    assert [cell.strip() for cell in header] == ["phenomenon", "pairs", "accuracy", "low", "high", "couples"]
    assert [row[0].strip() for row in rows] == phenomena()
    assert {row[1] for row in rows} == {"10"}
    accuracies = [float(row[2]) for row in rows]
    assert all(float(row[3]) <= float(row[2]) <= float(row[4]) for row in rows)
    assert mean[0].strip() == "mean"
    assert int(mean[1]) == 10 * len(rows)
    assert float(mean[2]) == pytest.approx(sum(accuracies) / len(accuracies), abs=6e-4)
    assert "chance is 50 %" in result.err


def test_judge_prints_json(works, tiny_run):
    *rows, mean = works("judge", "-m", tiny_run.dir, "--num", "10", "--json").json
    assert [row["phenomenon"] for row in rows] == phenomena()
    assert {tuple(row) for row in rows} == {("phenomenon", "num", "accuracy", "low", "high", "couples")}
    for key in ("accuracy", "couples"):
        assert mean[key] == pytest.approx(sum(row[key] for row in rows) / len(rows))
    assert set(mean) == {"phenomenon", "accuracy", "couples"}


def test_judge_asks_for_the_phenomena_that_are_named(works, tiny_run):
    named = ["--phenomenon", "relative", "--phenomenon", "adjective", "--phenomenon", "relative"]
    rows = works("judge", "-m", tiny_run.dir, *named, "--num", "30", "--seed", "5", "--json").json
    assert [row["phenomenon"] for row in rows] == ["relative", "adjective", "mean"]
    scorer = run_scorer(load_engine(tiny_run, "cpu", kind="torch"), tiny_run.tokenizer)
    expected = judge(scorer, [*pairs("relative", 30, 5), *pairs("adjective", 30, 5)])
    assert [row["accuracy"] for row in rows[:2]] == [row.accuracy for row in expected.rows]


def test_judge_shows_what_is_judged_wrongly(works, tiny_run):
    args = ["judge", "-m", tiny_run.dir, "--phenomenon", "relative", "--num", "40"]
    lines = works(*args, "--show").out.splitlines()
    shown = [line.split("\t") for line in lines if "\t*" in line]
    accuracy = float(lines[-1].split("\t")[2])
    assert len(shown) == round(40 * (1 - accuracy)) > 0
    for _, good_nats, bad_nats, good, bad in shown:
        assert float(good_nats) >= float(bad_nats)
        assert Pair("relative", good, bad.removeprefix("*")) in pairs("relative", 40)
    records = [row for row in works(*args, "--show", "--json").json if "good" in row]
    assert [record["good"] for record in records] == [row[3] for row in shown]
    assert all(record["good_nats"] >= record["bad_nats"] for record in records)


def test_judge_writes_pairs_without_a_model_and_judges_ones_own(works, tiny_run, tmp_path):
    path = tmp_path / "pairs.tsv"
    assert works("judge", "--write", path, "--num", "4").out == ""
    assert read_pairs(path) == [pair for name in phenomena() for pair in pairs(name, 4)]
    own = works("judge", "-m", tiny_run.dir, "--pairs", path, "--phenomenon", "numeral", "--json").json
    assert own == works("judge", "-m", tiny_run.dir, "--num", "4", "--phenomenon", "numeral", "--json").json


def test_judge_refuses_what_it_cannot_do(refused, tiny_run, tmp_path):
    assert "phenomenon is 'adjectiv'; allowed: subject-present, " in refused(
        "judge", "-m", tiny_run.dir, "--phenomenon", "adjectiv"
    )
    assert "one model" in refused("judge", "-m", tiny_run.dir, "--hf", tmp_path)
    assert "--num" in refused("judge", "-m", tiny_run.dir, "--num", "0")
    for option in ("--num", "--seed"):
        assert f"{option} 4 chooses among ulimi's own" in refused("judge", "--pairs", "pairs.tsv", option, "4")
    assert "no such" in refused("judge", "-m", tiny_run.dir, "--pairs", tmp_path / "none.tsv").lower()
    own = tmp_path / "own.tsv"
    own.write_text("x\ta\tb\n")
    assert f"--phenomenon relative: {own} has x" in refused(
        "judge", "-m", tiny_run.dir, "--pairs", own, "--phenomenon", "relative"
    )
    assert str(tmp_path / "norun") in refused("judge", "-m", tmp_path / "norun")
