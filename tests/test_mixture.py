"""A mixture: its probabilities are the average, its weights the best, its run stands alone and is like any other."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, commands_that_look_inside, synthetic_lines
from test_run import WITHOUT_HEAVY, python
from ulimi.adapt import Cache, Dynamic, adaptive_nll, run_stats
from ulimi.baseline import TokenizerSettings, make_ngram_run
from ulimi.corpus import open_corpus
from ulimi.data import encode_file
from ulimi.engine import MixtureEngine, load_engine, load_model, mixed_nats
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir
from ulimi.generate import Sampling, generate, score_prompt
from ulimi.info import model_card, summary
from ulimi.mixture import tune_weights
from ulimi.ngram import NgramEngine, count_ngrams
from ulimi.recipe import load_recipe
from ulimi.run import open_run
from ulimi.score import stream_nll
from ulimi.tokenizer import Tokenizer
from ulimi.train import train

V = 7
WEIGHTS = [0.5, 0.3, 0.2]
IDS = [0, 1, 2, 0, 3, 6, 1, 1, 2, 5, 6, 4]


def make_member(seed, order=3):
    """An n-gram model of random ids: exact, and unlike those of other seeds."""
    ids = np.random.default_rng(seed).integers(0, V, 200)
    return NgramEngine(count_ngrams(np.append(ids, V - 1), V, order))


@pytest.fixture(scope="module")
def members():
    return [make_member(seed) for seed in (1, 2, 3)]


@pytest.fixture
def engine(members):
    return MixtureEngine(members, WEIGHTS)


def averages(members, weights=WEIGHTS, ids=IDS):
    """What a mixture must say after each of the ids, (T, V): one member after the other, one step after the other."""
    average_TV = np.zeros((len(ids), V))
    for member, weight in zip(members, weights, strict=True):
        state = member.initial_state(1)
        for t, id in enumerate(ids):
            logits_1V, state = member.step(np.array([id]), state)
            average_TV[t] += weight * np.exp(logits_1V[0].astype(np.float64))
    return average_TV


def close(ours, truth):
    np.testing.assert_allclose(ours, truth, rtol=3e-6, atol=1e-9)


# The engine


def test_each_step_says_the_average(engine, members):
    state = engine.initial_state(1)
    for id, average_V in zip(IDS, averages(members), strict=True):
        logits_1V, state = engine.step(np.array([id]), state)
        assert logits_1V.shape == (1, V)
        assert logits_1V.dtype == np.float32
        close(np.exp(logits_1V[0]), average_V)
        assert np.exp(logits_1V.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)


def test_windows_and_primes_say_the_same(engine, members):
    average_TV = averages(members)
    close(np.exp(engine.prime(IDS, engine.initial_state(1))[0][0]), average_TV[-1])
    first_BTV, state = engine.logits(np.array([IDS[:5]]), engine.initial_state(1))
    second_BTV, _ = engine.logits(np.array([IDS[5:]]), state)
    close(np.exp(np.concatenate([first_BTV, second_BTV], axis=1)[0]), average_TV)


@pytest.mark.parametrize("cut", [1, 6])
def test_nats_are_those_of_the_average(engine, members, cut):
    inputs_1T, targets_1T = np.array([IDS[:-1]]), np.array([IDS[1:]])
    first, state = engine.nll(inputs_1T[:, :cut], targets_1T[:, :cut], engine.initial_state(1))
    second, _ = engine.nll(inputs_1T[:, cut:], targets_1T[:, cut:], state)
    assert first.dtype == np.float32
    own = averages(members)[np.arange(len(IDS) - 1), IDS[1:]]
    close(np.concatenate([first, second], axis=1)[0], -np.log(own))


def test_logits_need_not_be_normalised():
    class Shifted:
        """Two tokens of logits that differ by ln 3, both far from 0."""

        vocab_size, alpha, batch_invariant = 2, 1.0, True

        def __init__(self, shift):
            self.shift = shift

        def step(self, ids_B, state):
            return np.array([[self.shift, self.shift + np.log(3)]], dtype=np.float32), state

    both = MixtureEngine([Shifted(90.0), Shifted(-90.0)], [0.5, 0.5])
    close(np.exp(both.step(np.array([0]), [None, None])[0]), [[0.25, 0.75]])


def test_states_are_values_and_are_repeated_selected_and_joined(engine):
    _, state = engine.prime(IDS[:4], engine.initial_state(1))
    alone, _ = engine.step(np.array([1]), state)
    repeated = engine.repeat_state(state, 3)
    logits_3V, after = engine.step(np.array([1, 2, 3]), repeated)
    assert (logits_3V[0] == alone[0]).all()
    # The state that was read from is as it was.
    assert (engine.step(np.array([1]), state)[0] == alone).all()
    chosen, _ = engine.step(np.array([5, 5]), engine.select_state(after, [2, 0]))
    for row, old in enumerate((2, 0)):
        assert (chosen[row] == engine.step(np.array([5]), engine.select_state(after, [old]))[0][0]).all()
    joined = engine.join_states([engine.select_state(after, [2]), engine.select_state(after, [0])])
    assert (engine.step(np.array([5, 5]), joined)[0] == chosen).all()


def test_it_generates_and_has_no_layer_of_its_own(engine):
    steps = list(generate(engine, [V - 1, 0], sampling=Sampling(), max_tokens=12, num=2, seed=3, stop_ids=[V - 1]))
    for row in range(2):
        mine = [step for step in steps if step.row == row]
        scored = score_prompt(engine, [V - 1, 0, *(step.id for step in mine)])[1:]
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in scored], rel=1e-5)
    with pytest.raises(UlimiError, match="a mixture of models has no hidden layer"):
        engine.output(engine.initial_state(1))


def test_what_cannot_be_averaged_is_refused(members):
    other = NgramEngine(count_ngrams(np.array([0, 1, 2]), 3, 2))
    with pytest.raises(UlimiError, match="one vocabulary; these have 7, 3 tokens"):
        MixtureEngine([members[0], other], [0.5, 0.5])

    class Sparse(NgramEngine):
        alpha = 1.5

    sparse = Sparse(count_ngrams(np.array(IDS), V, 2))
    with pytest.raises(UlimiError, match="a sparse model"):
        MixtureEngine([members[0], sparse], [0.5, 0.5])


# The weights


def test_weights_of_members_that_are_nearly_equal_take_no_time():
    rng = np.random.default_rng(0)
    nats = rng.gamma(2, 2, 100_000) + rng.normal(0, 0.02, (2, 100_000))
    started = time.process_time()
    weights = tune_weights(nats)
    assert time.process_time() - started < 3
    assert mixed_nats(nats, weights).mean() <= mixed_nats(nats, np.array([0.5, 0.5])).mean() + 1e-7


@pytest.mark.parametrize("seed", range(4))
def test_two_weights_are_the_best_of_a_fine_grid(seed):
    nats = np.random.default_rng(seed).gamma(2, 2, (2, 300))
    weights = tune_weights(nats)
    assert weights.sum() == pytest.approx(1)
    totals = {w: mixed_nats(nats, np.array([w, 1 - w])).sum() for w in np.linspace(0.001, 0.999, 999)}
    best = min(totals, key=totals.get)
    assert weights[0] == pytest.approx(best, abs=0.0011)
    assert mixed_nats(nats, weights).sum() <= totals[best] + 1e-6


def test_many_weights_are_where_no_member_wants_more(members):
    """At the optimum the mean of p_m / p_mixture is 1 for whoever has weight, and at most 1 for whoever has none."""
    nats = np.random.default_rng(5).gamma(2, 2, (5, 500))
    nats[4] = nats[3] + 1  # never the better one
    weights = tune_weights(nats)
    ratios = np.exp(mixed_nats(nats, weights) - nats).mean(axis=1)
    np.testing.assert_allclose(ratios[:4], 1, atol=1e-4)
    assert weights[4] < 1e-4
    assert ratios[4] < 1


def test_equal_members_share_and_improbable_tokens_do_no_harm():
    nats = np.array([[3.0, 900.0, 2.0], [3.0, 900.0, 2.0]])
    np.testing.assert_allclose(tune_weights(nats), [0.5, 0.5])
    # float64 has no e^-900; what counts is who is the better one.
    one_sided = np.array([[3.0, 900.0], [5.0, 2000.0]])
    assert tune_weights(one_sided)[0] == pytest.approx(1, abs=1e-4)
    assert np.isfinite(mixed_nats(one_sided, np.array([0.5, 0.5]))).all()


# The run


@pytest.fixture(scope="module")
def ngram_dir(tmp_path_factory, corpus_dir, tiny_run):
    """Of so little text that it does not know all that the network does."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "text").mkdir()
    for part, num_lines in (("train", 6), ("valid", 20)):
        lines = (corpus_dir / f"{part}.txt").read_text().splitlines(keepends=True)
        (folder / "text" / f"{part}.txt").write_text("".join(lines[:num_lines]))
    make_ngram_run(folder / "text", folder / "ngram", order=3, settings=TokenizerSettings(tiny_run.dir))
    return folder / "ngram"


@pytest.fixture(scope="module")
def another_dir(tmp_path_factory, corpus_dir, tiny_run):
    """A second network of the same tokens, better than the first one."""
    run_dir = tmp_path_factory.mktemp("mixture") / "another"
    recipe = load_recipe(None, [*TINY, "optim.max_epochs=8", "optim.warmup_steps=5", "optim.lr=1e-2"])
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, recipe, init_from=tiny_run)
    return run_dir


@pytest.fixture(scope="module")
def mixed_dir(tmp_path_factory, corpus_dir, ngram_dir, another_dir):
    """Made of copies that are gone now."""
    folder = tmp_path_factory.mktemp("mixture")
    for source in (ngram_dir, another_dir):
        shutil.copytree(source, folder / source.name)
    code = "import sys; sys.argv = ['ulimi', *sys.argv[1:]]\nfrom ulimi.cli import main\nmain()"
    result = python(
        code, "mix", folder / "another", folder / "ngram", "-o", folder / "mixed", "--tune", corpus_dir / "valid.txt"
    )
    assert result.returncode == 0, result.stderr
    shutil.rmtree(folder / "another")
    shutil.rmtree(folder / "ngram")
    return folder / "mixed"


def bits(works, text, *args):
    return works("evaluate", text, *args, "--json").json[0]["bits_per_char"]


def test_a_mixture_is_better_than_its_members_and_says_so(works, tmp_path, corpus_dir, ngram_dir, another_dir):
    valid, out = corpus_dir / "valid.txt", tmp_path / "mixed"
    said = works("mix", another_dir, ngram_dir, "--out", out, "--tune", valid).out.splitlines()
    assert said[0].split() == ["model", "weight", "bits/char", "alone"]
    rows = [line.split() for line in said[1:3]]
    assert [row[0] for row in rows] == [str(another_dir), str(ngram_dir)]
    weights, alone = ([float(row[column]) for row in rows] for column in (1, 2))
    assert sum(weights) == pytest.approx(1, abs=2e-4)
    assert min(weights) > 0.02
    # What it says is what `evaluate` says of members and mixture.
    assert alone == pytest.approx([bits(works, valid, "-m", path) for path in (another_dir, ngram_dir)], abs=6e-5)
    together = bits(works, valid, "-m", out)
    assert together < min(alone) - 0.001
    assert said[3].startswith(f"together: {together:.4f} bits per character")
    assert said[4] == f"the model is in {out}; try: ulimi generate -m {out}"
    # On a text that it was not tuned on, too.
    test = corpus_dir / "test.txt"
    assert bits(works, test, "-m", out) < min(bits(works, test, "-m", path) for path in (another_dir, ngram_dir))


def test_weights_can_be_said(works, tmp_path, corpus_dir, tiny_run, ngram_dir):
    out = tmp_path / "mixed"
    said = works("mix", tiny_run.dir, ngram_dir, "-o", out, "--weight", 0.25, "--weight", 0.75).out
    assert said == f"the model is in {out}; try: ulimi generate -m {out}\n"
    run = open_run(out)
    assert run.config["weights"] == [0.25, 0.75]
    assert [member.kind for member in run.members()] == ["awd_lstm", "ngram"]
    engines = [load_engine(open_run(path), exact=True) for path in (tiny_run.dir, ngram_dir)]
    inputs_1T, targets_1T = np.array([[5, 9, 2, 40]]), np.array([[9, 2, 40, 11]])
    ours, own = (
        [e.nll(inputs_1T, targets_1T, e.initial_state(1))[0].astype(np.float64) for e in found]
        for found in ([load_engine(run, exact=True)], engines)
    )
    close(ours[0], -np.log(0.25 * np.exp(-own[0]) + 0.75 * np.exp(-own[1])))
    assert "weights tuned on" not in dict(summary(run))


def test_every_command_takes_it(works, mixed_dir, corpus_dir):
    valid, m = corpus_dir / "valid.txt", ("-m", mixed_dir)
    stream = works("evaluate", valid, *m, "--json").json[0]
    assert json.loads((mixed_dir / "meta.json").read_text())["scores"]["tuned"]["nats"] == pytest.approx(
        stream["nats"], rel=1e-6
    )
    stateless = works("evaluate", valid, *m, "--stateless", "--json").json[0]
    rows = works("score", valid, *m, "--json").json
    assert sum(row["nats"] for row in rows) == pytest.approx(stateless["nats"], rel=1e-6)
    spared = works("evaluate", valid, *m, "--keystrokes", "--max-lines", 3, "--json").json[0]
    assert 0 < spared["spared"] < 1
    distribution = works("evaluate", valid, *m, "--distribution", "--epsilon", 0, "--json").json[0]
    assert distribution["epsilon_perplexity"] == pytest.approx(stream["perplexity"], rel=1e-6)
    text = works("generate", "Abantu", *m, "--seed", 1, "--max-tokens", 12, "--probabilities").out
    assert text.startswith("Abantu")
    assert works("generate", *m, "--seed", 1).out == works("generate", *m, "--seed", 1).out
    assert works("generate", "Abantu", *m, "--beams", 3, "--max-tokens", 8).out.startswith("Abantu")
    words = dict(line.split("\t") for line in works("suggest", "Abantu bafun", *m).out.splitlines())
    assert "bafunda" in words


def test_a_text_does_not_depend_on_those_beside_it(works, mixed_dir):
    alone = works("generate", "Abantu", "-m", mixed_dir, "--seed", 3, "--max-tokens", 15, "--num", 1, "--json").json
    several = works("generate", "Abantu", "-m", mixed_dir, "--seed", 3, "--max-tokens", 15, "--num", 3, "--json").json
    assert alone[0]["text"] == several[0]["text"]


ADAPTING = pytest.mark.parametrize(
    ("args", "how"),
    [
        (["--cache", "--cache-lambda", 0.3], {"cache": Cache(lambda_=0.3)}),
        (["--dynamic", "--dynamic-lr", 1e-3], {"dynamic": Dynamic(lr=1e-3)}),
        (["--cache", "--dynamic", "--dynamic-lr", 1e-3], {"cache": Cache(), "dynamic": Dynamic(lr=1e-3)}),
    ],
)


@ADAPTING
def test_its_networks_can_adapt_while_they_read(works, mixed_dir, corpus_dir, args, how):
    test = corpus_dir / "test.txt"
    run = open_run(mixed_dir)
    network, ngram = run.members()
    text = encode_file(test, run.tokenizer)
    model, eos = load_model(network), run.tokenizer.eos_id
    stats = run_stats(network, model) if "dynamic" in how else None
    own_2N = np.stack(
        [
            adaptive_nll(model, text.ids, eos, **how, stats=stats),
            stream_nll(load_engine(ngram), text.ids, eos),
        ]
    )
    first, second = run.config["weights"]
    truth = -np.log(first * np.exp(-own_2N[0]) + second * np.exp(-own_2N[1])).sum()
    nats = works("evaluate", test, "-m", mixed_dir, *args, "--json").json[0]["nats"]
    assert nats == pytest.approx(truth, rel=1e-6)
    assert nats != pytest.approx(works("evaluate", test, "-m", mixed_dir, "--json").json[0]["nats"], rel=1e-3)


def test_without_learning_it_scores_as_it_does_without_adapting(works, mixed_dir, corpus_dir):
    text, m = corpus_dir / "valid.txt", ("-m", mixed_dir, "--json")
    standstill = ("--dynamic", "--dynamic-lr", 0, "--dynamic-decay", 0)
    nats = [works("evaluate", text, *m, *args).json[0]["nats"] for args in ((), standstill)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)


def test_a_member_without_float_weights_adapts_by_those_of_its_graph(works, tmp_path, corpus_dir, mixed_dir):
    folder = shutil.copytree(mixed_dir, tmp_path / "mixed")
    (folder / "members" / "1" / "model.safetensors").unlink()
    for option in ("--cache", "--dynamic"):
        args = ("evaluate", corpus_dir / "valid.txt", option, "--json", "-m")
        whole, rounded = (works(*args, path).json[0]["nats"] for path in (mixed_dir, folder))
        assert rounded == pytest.approx(whole, rel=0.005)
        assert rounded != whole


def test_there_must_be_a_network_to_adapt(works, refused, tmp_path, corpus_dir, ngram_dir):
    valid = corpus_dir / "valid.txt"
    make_ngram_run(corpus_dir, tmp_path / "other", order=2, settings=TokenizerSettings(ngram_dir))
    works("mix", ngram_dir, tmp_path / "other", "-o", tmp_path / "ngrams", "--weight", 0.5, "--weight", 0.5)
    for option in ("--cache", "--dynamic"):
        said = refused("evaluate", valid, "-m", tmp_path / "ngrams", option)
        assert f"{option}: {tmp_path / 'ngrams'} holds a mixture of models; this needs a network" in said


def test_its_folder_says_what_it_is(works, mixed_dir, corpus_dir):
    run = open_run(mixed_dir)
    assert sorted(path.name for path in mixed_dir.iterdir()) == [
        "README.md", "config.json", "members", "meta.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    facts = dict(summary(run))
    weights = run.config["weights"]
    assert "another: AWD-LSTM" in facts[f"member 1, {weights[0]:.4f}"]
    assert "ngram: modified Kneser-Ney of order 3" in facts[f"member 2, {weights[1]:.4f}"]
    assert str(corpus_dir / "valid.txt") in facts["weights tuned on"]
    assert "trained on" not in facts
    assert all(value in works("info", mixed_dir).out for value in facts.values())
    assert works("info", mixed_dir, "--json").json[0]["config"]["weights"] == weights
    card = (mixed_dir / "README.md").read_text()
    assert card == model_card(run)
    assert "whose probabilities are averaged" in card
    # All that decides how it computes: `study` knows models by it.
    assert {path.name for path in run.model_files()} == {
        "config.json", "tokenizer.json", "model.onnx", "model.safetensors", "ngram.npz",
    }  # fmt: skip


def test_it_needs_nothing_heavy(tmp_path, corpus_dir, another_dir, ngram_dir):
    out, valid = tmp_path / "mixed", corpus_dir / "valid.txt"
    main = f"{WITHOUT_HEAVY}\nfrom ulimi.cli import main\nmain()"
    for args in (
        ["mix", another_dir, ngram_dir, "-o", out, "--tune", valid],
        ["evaluate", valid, "-m", out, "--stateless"],
        ["suggest", "Abantu baf", "-m", out],
        ["info", out],
    ):
        result = python(main, *args)
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_the_engine_of_its_networks_can_be_chosen(works, refused, mixed_dir, corpus_dir):
    valid, m = corpus_dir / "valid.txt", ("-m", mixed_dir)
    exact, int8, weights = (bits(works, valid, *m, *args) for args in ((), ("--engine", "onnx"), ("--engine", "torch")))
    assert exact == weights
    assert int8 != weights
    assert int8 == pytest.approx(weights, abs=0.01)
    assert "--engine x: allowed: auto, onnx, torch" in refused("evaluate", valid, *m, "--engine", "x")


@pytest.mark.parametrize(("args", "said"), [
    ([], "the weights of a mixture: give --tune FILE, a held-out text, or --weight for each model"),
    (["--tune", "VALID", "--weight", "0.5", "--weight", "0.5"], "give --tune FILE, a held-out text, or --weight"),
    (["--weight", "1.0"], "--weight 1: 2 models need 2 weights, in their order"),
    (["--weight", "0.5", "--weight", "0.6"], "--weight 0.5, 0.6: allowed: numbers between 0 and 1 that add up to 1"),
    (["--weight", "0", "--weight", "1"], "--weight 0, 1: allowed: numbers between 0 and 1"),
    (["--weight", "-1", "--weight", "2"], "--weight -1, 2: allowed"),
    (["--weight", "nan", "--weight", "0.5"], "--weight nan, 0.5: allowed"),
    (["--tune", "TRAIN"], "is the training text of"),
    (["--tune", "none.txt"], "none.txt: there is no such file"),
    (["--tune", "VALID", "--device", "gpu"], "--device gpu"),
])  # fmt: skip
def test_mix_refuses_in_one_line(refused, tmp_path, monkeypatch, corpus_dir, tiny_run, ngram_dir, args, said):
    monkeypatch.chdir(tmp_path)
    named = {"VALID": corpus_dir / "valid.txt", "TRAIN": corpus_dir / "train.txt"}
    given = [named.get(arg, arg) for arg in args]
    assert said in refused("mix", tiny_run.dir, ngram_dir, "-o", "new/deep/out", *given)
    assert not list(tmp_path.iterdir())


def test_members_that_do_not_go_together_are_refused(
    refused, works, tmp_path, corpus_dir, tiny_run, ngram_dir, mixed_dir
):
    tune = ("--tune", corpus_dir / "valid.txt")
    works("ngram", corpus_dir, "-o", tmp_path / "chars", "--kind", "char")
    out = tmp_path / "out"
    for runs, said in (
        ([tiny_run.dir], f"a mixture needs two models or more; given: {tiny_run.dir}"),
        ([tiny_run.dir, tmp_path / "chars"], f"chars has another tokenizer than {tiny_run.dir}"),
        ([tiny_run.dir, tmp_path / "none"], "no run folder"),
        ([mixed_dir, ngram_dir], f"{mixed_dir} is a mixture itself; give its members: {mixed_dir}/members/1"),
        ([ngram_dir, tiny_run.dir, ngram_dir], f"{ngram_dir} is given twice"),
    ):
        assert said in refused("mix", *runs, "-o", out, *tune)
    copy = shutil.copytree(ngram_dir, tmp_path / "copy")
    assert "--engine onnx" in refused("mix", ngram_dir, copy, "-o", out, *tune, "--engine", "onnx")
    assert not out.exists()


def test_a_member_that_adds_nothing_is_named(refused, works, tmp_path, corpus_dir, tiny_run, ngram_dir):
    """A network of random weights beside a model that was made of the text itself."""
    small = tmp_path / "small"
    small.mkdir()
    lines = (corpus_dir / "valid.txt").read_text().splitlines(keepends=True)
    (small / "train.txt").write_text("".join(lines) * 3)
    (small / "valid.txt").write_text("".join(lines))
    works("ngram", small, "-o", tmp_path / "knows", "--tokenizer-from", tiny_run.dir, "--order", 8)
    said = refused("mix", tiny_run.dir, tmp_path / "knows", "-o", tmp_path / "out", "--tune", corpus_dir / "valid.txt")
    assert f"{tiny_run.dir} adds nothing there, its weight would be 0.000" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(refused, tmp_path, tiny_run, ngram_dir):
    (tmp_path / "out").mkdir()
    weights = ("--weight", 0.5, "--weight", 0.5)
    assert "is there already" in refused("mix", tiny_run.dir, ngram_dir, "-o", tmp_path / "out", *weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_member_that_is_damaged_leaves_nothing(refused, tmp_path, tiny_run, ngram_dir):
    damaged = Path(shutil.copytree(ngram_dir, tmp_path / "damaged"))
    rewrite(damaged, lambda meta: meta.pop("num_ngrams"), "meta.json")
    weights = ("--weight", 0.5, "--weight", 0.5)
    assert "no entry 'num_ngrams'" in refused("mix", tiny_run.dir, damaged, "-o", tmp_path / "out", *weights)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_folder_appears_when_it_is_full(tmp_path):
    (tmp_path / ".out.tmp").mkdir()  # somebody's own
    out = tmp_path / "a" / "out"
    with atomic_dir(out) as unfinished:
        (unfinished / "file").write_text("")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]

    def be_interrupted():
        with atomic_dir(tmp_path / "b" / "c" / "out") as unfinished:
            (unfinished / "file").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".out.tmp"}
    (tmp_path / "dangling").symlink_to("nowhere")
    for taken in (out, tmp_path / "dangling"):
        with pytest.raises(UlimiError, match="is there already"), atomic_dir(taken):
            pass


def test_what_looks_inside_a_network_refuses(refused, tmp_path, corpus_dir, mixed_dir):
    said = f"{mixed_dir} holds a mixture of models; this needs a network"
    for command in commands_that_look_inside(mixed_dir, corpus_dir, tmp_path / "new"):
        assert said in refused(*command)
    assert "no hidden layer" in refused("generate", "Abantu", "-m", mixed_dir, "--contrastive", 0.6)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: shutil.rmtree(folder / "members" / "2"), "no run folder"),
    (lambda folder: (folder / "members" / "2" / "ngram.npz").unlink(), "ngram.npz: cannot be read"),
    (lambda folder: rewrite(folder, lambda config: config.pop("mixture")), "no n-gram model and no mixture"),
    (lambda folder: rewrite(folder, lambda config: config["mixture"].pop("weights")), "weights is None"),
    (lambda folder: rewrite(folder, lambda config: config["mixture"].update(weights=[2, -1])), "weights is [2, -1]"),
    (lambda folder: rewrite(folder, lambda config: config["mixture"].update(weights=[])), "weights is []"),
    (lambda folder: rewrite(folder, lambda config: config["mixture"].update(weights=[0.9])), "weights is [0.9]"),
    (lambda folder: rewrite(folder, lambda config: config["mixture"].update(weights=[0.9, 0.9])), "add up to 1"),
    (lambda folder: Tokenizer.train(["ab"], kind="char").save(folder), "the mixture of members 320"),
])  # fmt: skip
def test_a_damaged_run_is_one_line(refused, tmp_path, corpus_dir, mixed_dir, spoil, said):
    folder = Path(shutil.copytree(mixed_dir, tmp_path / "run"))
    spoil(folder)
    assert said in refused("score", corpus_dir / "valid.txt", "-m", folder)


def rewrite(folder, change, name="config.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("names", [None, "ab", ["a"]])
def test_a_damaged_list_of_names_is_one_line(refused, tmp_path, mixed_dir, names):
    folder = Path(shutil.copytree(mixed_dir, tmp_path / "run"))
    rewrite(folder, lambda meta: meta.update(members=names), "meta.json")
    if names == "ab":
        assert "members is 'ab'" in refused("info", folder)
    else:
        assert f"members is {names}; needed: 2 names" in refused("info", folder)


def test_the_licence_of_a_member_is_passed_on(works, tmp_path):
    lines = synthetic_lines(60)
    for part, some in (("train", lines[:50]), ("valid", lines[50:])):
        (tmp_path / f"{part}.txt").write_text("\n".join(some) + "\n")
    works("ngram", tmp_path, "-o", tmp_path / "ngram", "--tokenizer-from", "isizulu")
    out = tmp_path / "mixed"
    works("mix", "isizulu", tmp_path / "ngram", "-o", out, "--tune", tmp_path / "valid.txt")
    card = out / "members" / "1" / "MODEL_CARD.md"
    assert "CC BY-SA 4.0" in card.read_text()
    assert ["licence,", "limits", str(card)] in [line.split() for line in works("info", out).out.splitlines()]
    assert str(card) in (out / "README.md").read_text()
    # A member is a run folder like any other.
    assert "11.0M parameters" in works("info", out / "members" / "1").out
    assert "recipe" in works("info", out / "members" / "1", "--json").json[0]


def test_words_that_a_closed_vocabulary_lacks_are_noted(ulimi, works, tmp_path, corpus_dir):
    other = tmp_path / "other.txt"
    other.write_text((corpus_dir / "valid.txt").read_text() + "Abantu abakwaziyo bafunda.\n")
    works("ngram", corpus_dir, "-o", tmp_path / "two", "--kind", "word", "--order", 3)
    # Of another text, or it would add nothing.
    (tmp_path / "text").mkdir()
    for part, seed in (("train", 5), ("valid", 6)):
        (tmp_path / "text" / f"{part}.txt").write_text("\n".join(synthetic_lines(100, seed)) + "\n")
    works("ngram", tmp_path / "text", "-o", tmp_path / "one", "--tokenizer-from", tmp_path / "two", "--order", 3)
    result = ulimi("mix", tmp_path / "two", tmp_path / "one", "-o", tmp_path / "mixed", "--tune", other)
    assert result.code == 0, result.err
    assert f"{other}: 1 words are <unk>" in result.err
