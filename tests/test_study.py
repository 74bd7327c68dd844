"""The study: prompts, metrics against arithmetic by hand, cells that are kept, and the command."""

import csv
import json
import math

import numpy as np
import pytest

from ulimi.errors import UlimiError
from ulimi.report import csv_table, markdown_table, page
from ulimi.study import METRICS, Attested, Figure, choose_strategies, cut_prompts, judge_texts, strategies

pytest.importorskip("sacrebleu")
pytest.importorskip("jiwer")


def record(written, rest, nats=2.0, num_tokens=4):
    words = [[f" {word}", 0.5] for word in written.split()]
    return {
        "prompt": "Namhlanje ",
        "rest": rest,
        "written": written,
        "words": words,
        "nats": nats,
        "num_tokens": num_tokens,
    }


def no_features(texts):
    return None


def test_texts_of_which_one_is_empty_are_judged():
    # In some resamples nothing is written at all: there sacrebleu gives a number of another type.
    texts = [record("", "inja yami"), record("kodwa uma", "kodwa uma")]
    chrf = judge_texts([texts], None, no_features)["chrf"]
    assert chrf is not None
    assert 0 < chrf.mean < 100


def test_prompts_are_spread_over_the_lines_that_are_long_enough():
    lines = ["too short", *(f"w{i} b c d e f g" for i in range(9))]
    found = cut_prompts(lines, 3, 2)
    assert found == [("w0 b", "c d e f g"), ("w4 b", "c d e f g"), ("w8 b", "c d e f g")]
    assert cut_prompts(lines, 99, 2) == [(f"w{i} b", "c d e f g") for i in range(9)]
    with pytest.raises(UlimiError, match="no line has 12 words"):
        cut_prompts(lines, 3, 7)


def test_strategies_have_names_of_their_own_and_are_chosen_by_their_beginning():
    known = strategies(1.0, 20)
    assert len({s.name for s in known}) == len(known)
    kinds = {s.name.split()[0] for s in known}
    assert {
        "greedy",
        "beam",
        "diverse",
        "contrastive",
        "temperature",
        "top-k",
        "top-p",
        "min-p",
        "typical",
        "entmax",
    } == kinds
    assert [s.name for s in choose_strategies(["greedy", "beam 4"], known)] == [
        "greedy",
        "beam 4",
        "beam 4, no repeated 3-gram",
    ]
    assert choose_strategies([], known) == known
    with pytest.raises(UlimiError, match=r"--strategy 'nucleus': allowed: greedy, beam"):
        choose_strategies(["nucleus"], known)
    assert not any(s.is_random for s in choose_strategies(["greedy", "beam", "contrastive"], known))
    # A sparse model's own alpha is where its sampling starts from; a lower one would write what it rules out.
    assert [s.name for s in choose_strategies(["entmax"], strategies(1.5, 20))] == ["entmax 2.0"]
    assert {s.writing.sampling.alpha for s in choose_strategies(["temperature"], strategies(1.5, 20))} == {1.5}


def test_metrics_by_hand():
    first = [
        record("abantu bahamba abantu bahamba abantu bahamba", "abantu bahamba", 3.0, 6),
        record("inja", "inja", 1.0, 2),
    ]
    second = [record("abantu", "abantu bahamba", 2.0, 1), record("ikati", "inja", 1.0, 1)]
    known = {"abantu", "inja"}
    figures = judge_texts([first, second], lambda word: word in known, no_features)
    assert list(figures) == list(METRICS)
    # Edits: insert " abantu bahamba" twice; none; delete " bahamba"; inja -> ikati.
    edits = 30 + 0 + 8 + 4
    assert figures["cer"].mean == pytest.approx(edits / (14 + 4 + 14 + 4))
    # The first text has 4 trigrams, 2 of them twice.
    assert figures["repetition"].mean == pytest.approx(2 / 4)
    assert figures["words"].mean == pytest.approx((6 + 1 + 1 + 1) / 4)
    assert figures["nats"].mean == pytest.approx(7 / 10)
    assert figures["attested"].mean == pytest.approx((3 + 1 + 1 + 0) / 9)
    # Pairs: 5 in the first text, 2 of them different; none in the second seed.
    assert figures["distinct_2"].mean == pytest.approx((2 / 5 + 0) / 2)
    assert figures["distinct_2"].half_width == pytest.approx(12.706 * np.std([0.4, 0.0], ddof=1) / math.sqrt(2))
    assert figures["mauve"] is None
    assert judge_texts([first], None, no_features)["attested"] is None
    assert judge_texts([[*first, record("inja", "inja", math.inf)]], None, no_features)["nats"] is None


def test_a_perfect_copy_scores_full_marks_and_nothing_scores_none():
    rest = "abantu bahamba namhlanje ekuseni kakhulu"
    copy = judge_texts([[record(rest, rest)] * 3], None, no_features)
    assert copy["bleu"].mean == pytest.approx(100)
    assert copy["chrf"].mean == pytest.approx(100)
    assert copy["cer"] == Figure(0.0, 0.0)
    nothing = judge_texts([[record("", rest, 0.0, 0)] * 3], None, no_features)
    assert nothing["cer"].mean == 1
    assert nothing["bleu"].mean == nothing["chrf"].mean == nothing["words"].mean == 0


def test_the_interval_covers_what_resampling_gives():
    rng = np.random.default_rng(1)
    texts = [record("a " * n, "b c d e f") for n in rng.integers(1, 20, size=200)]
    figure = judge_texts([texts], None, no_features)["words"]
    lengths = [len(text["written"].split()) for text in texts]
    assert figure.mean == pytest.approx(np.mean(lengths))
    assert figure.half_width == pytest.approx(1.96 * np.std(lengths) / math.sqrt(200), rel=0.15)


def test_mauve_tells_alike_from_different():
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    base = {f"Namhlanje r{i}": rng.normal(size=8) for i in range(60)} | {
        f"Namhlanje w{i}": rng.normal(size=8) for i in range(60)
    }
    texts = [record(f"w{i}", f"r{i}") for i in range(60)]

    def features(shift):
        return lambda names: np.stack([base[n] + shift * n.startswith("Namhlanje w") for n in names]).astype(np.float32)

    alike = judge_texts([texts], None, features(0.0))["mauve"].mean
    different = judge_texts([texts], None, features(9.0))["mauve"].mean
    assert alike > 0.6 > 0.1 > different
    assert judge_texts([texts[:10]], None, features(0.0))["mauve"] is None  # too few to cluster


def test_words_are_attested_without_punctuation_and_capitals(tmp_path):
    (tmp_path / "list.txt").write_text("Abantu, bahamba\n(namhlanje)\n", encoding="utf-8")
    known = Attested([tmp_path / "list.txt"])
    assert known.words == {"abantu", "bahamba", "namhlanje"}
    assert known("abantu")
    assert not known("inja")


ROW = {"model": "m<1>", "strategy": "greedy", "samples": [record("abantu <b>", "inja")], **dict.fromkeys(METRICS)}


def test_tables_and_page():
    row = {**ROW, "bleu": Figure(12.345, 1.5), "cer": Figure(0.5, None)}
    assert markdown_table([row]).splitlines() == [
        "| model | strategy | bleu | cer |", "|---|---|---:|---:|", "| m<1> | greedy | 12.35 ± 1.50 | 0.500 |",
    ]  # fmt: skip
    header, cells = csv.reader(csv_table([row]).splitlines())
    assert dict(zip(header, cells, strict=True)) == {
        "model": "m<1>", "strategy": "greedy",
        **{f"{n}{s}": "" for n in METRICS for s in ("", "_half_width")},
        "bleu": "12.345", "bleu_half_width": "1.5", "cer": "0.5",
    }  # fmt: skip
    scores = {
        "epsilon_perplexity": None,
        "sparsemax_score": 0.5,
        "js_divergence": 0.4,
        "support": 7.0,
        "impossible": 0.1,
    }
    written = page("t <x>", ["note"], {"m": scores}, [row])
    assert "m&lt;1&gt;" in written
    assert "&lt;b&gt;" in written
    assert "<b>" not in written
    assert "∞" in written


def test_the_command_writes_a_study_and_goes_on_with_it(works, refused, tiny_run, corpus_dir, tmp_path):
    args = ("study", corpus_dir / "test.txt", "-m", tiny_run.dir, "--out", tmp_path / "study", "--num-prompts", 4,
            "--prompt-words", 2, "--max-words", 6, "--seeds", 2)  # fmt: skip
    some = (*args, "--strategy", "greedy", "--strategy", "top-k 10", "--attested", corpus_dir / "train.txt")
    first = works(*some).out
    assert "| tiny | greedy |" in first
    # The text itself: 4 lines, nothing that it could be compared with.
    rests = [
        " ".join(line.split()[2:])
        for line in (corpus_dir / "test.txt").read_text().splitlines()
        if len(line.split()) >= 7
    ]
    (itself,) = [
        row for row in json.loads((tmp_path / "study" / "results.json").read_text())["rows"] if not row["model"]
    ]
    assert (itself["strategy"], itself["bleu"], itself["nats"]) == ("the text itself", None, None)
    assert {sample["rest"] for sample in itself["samples"]} <= set(rests)
    assert itself["words"]["mean"] == sum(len(s["written"].split()) for s in itself["samples"]) / 4
    assert {p.name for p in (tmp_path / "study").iterdir()} == {
        "index.html", "results.json", "study.json", "table.csv", "table.md", "texts",
    }  # fmt: skip
    names = {p.name for p in (tmp_path / "study" / "texts").iterdir()}
    assert names == {"tiny-greedy-1.json", "tiny-top-k_10-1.json", "tiny-top-k_10-2.json"}
    texts = json.loads((tmp_path / "study" / "texts" / "tiny-top-k_10-1.json").read_text())["texts"]
    assert len(texts) == 4
    assert all(len(text["written"].split()) <= 6 for text in texts)

    # What is there is taken as it is, where it was written in the same way; what is not is written.
    greedy = tmp_path / "study" / "texts" / "tiny-greedy-1.json"
    cell = json.loads(greedy.read_text())
    greedy.write_text(json.dumps({**cell, "texts": [record("mina", "mina")] * 4}))
    assert works(*some).out != first
    greedy.write_text(json.dumps({"how": {**cell["how"], "engine": "Other"}, "texts": [record("mina", "mina")] * 4}))
    assert works(*some).out == first
    greedy.unlink()
    assert works(*some).out == first

    said = refused("study", tmp_path / "none.txt", "-m", tiny_run.dir, "--out", tmp_path / "new")
    assert said.endswith("none.txt: No such file or directory")
    assert "another --out" in refused(*args, "--prompt-words", 3)
    assert "--strategy 'nix'" in refused(*args, "--strategy", "nix")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert "holds other things" in refused(*args[:5], tmp_path / "other", "--prompt-words", 2)
    assert "different names" in refused(*args, "-m", tiny_run.dir)


def test_an_ngram_model_has_no_contrastive_search_and_a_damaged_file_is_named(
    works, refused, tiny_run, corpus_dir, tmp_path
):
    works("ngram", corpus_dir, "--out", tmp_path / "ngram", "--order", 2, "--kind", "char")
    args = ("study", corpus_dir / "test.txt", "-m", tiny_run.dir, "-m", tmp_path / "ngram", "--out", tmp_path / "study",
            "--num-prompts", 2, "--prompt-words", 2, "--max-words", 3, "--strategy", "greedy",
            "--strategy", "contrastive 0.2")  # fmt: skip
    works(*args)
    rows = json.loads((tmp_path / "study" / "results.json").read_text())["rows"]
    found = [(row["model"], row["strategy"]) for row in rows[1:]]
    assert found == [("tiny", "greedy"), ("tiny", "contrastive 0.2, k 5"), ("ngram", "greedy")]
    for name in ("texts/tiny-greedy-1.json", "study.json"):
        (tmp_path / "study" / name).write_text("[")
        assert f"{name}: cannot be read" in refused(*args, notes=True)


def test_nats_are_not_measured_where_a_sparse_model_rules_out_what_was_written():
    texts = [record("a b", "c"), {**record("a b", "c"), "nats": None}]
    assert judge_texts([texts], None, no_features)["nats"] is None
    assert judge_texts([texts[:1]], None, no_features)["nats"] == Figure(0.5, None)
