"""The Mogrifier LSTM: the equations, its passes on a CPU with their gradients, its graph, and a run of it."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import reference
from test_cpu import draw, library, rng, way  # noqa: F401 - fixtures
from ulimi import export, mogrifier
from ulimi.corpus import open_corpus
from ulimi.engine import OnnxEngine, TorchEngine, load_model
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.mogrifier_graph import build_mogrifier_graph
from ulimi.recipe import load_recipe
from ulimi.run import open_run
from ulimi.start import adopt_weights
from ulimi.train import train

MOGRIFIED = ["model.mogrifier_rounds=3", "model.mogrifier_rank=5"]
TINY = [
    "tokenizer.vocab_size=320", "data.batch_size=4", "data.bptt=12", "model.embedding_size=16", "model.hidden_size=24",
    "optim.max_epochs=2", *MOGRIFIED,
]  # fmt: skip
SHAPES = [(3, 7, 4, 6, 2), (1, 2, 3, 5, 1), (20, 3, 40, 64, 16)]
"""B, T, I, H, K"""


def make(shape, num_rounds, dtype=torch.float32):
    """What a layer reads: x, h, c, its weights, a mask, and the matrices of its rounds."""
    B, T, I, H, K = shape  # noqa: E741 - its name in the papers
    sizes = [(B, T, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H), (4 * H,)]
    sizes += [size for r in range(num_rounds) for size in ((K, (H, I)[r % 2]), ((I, H)[r % 2], K))]
    tensors = [draw(*size, seed=k, scale=size[-1] ** -0.5 if k > 2 else 1.0) for k, size in enumerate(sizes)]
    mask = (draw(4 * H, H, seed=99) > 0).to(dtype) * 2
    return [x.to(dtype).requires_grad_() for x in tensors], mask


def gates(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


def run_ours(inputs, mask, half=False):
    x, h, c, weight_ih, weight_hh, bias, *flat = inputs
    out, (h, c) = mogrifier.lstm(x, (h, c), weight_ih, weight_hh, bias, gates(flat), mask, half)
    return out, h, c


def run_reference(inputs, mask):
    x, h, c, weight_ih, weight_hh, bias, *flat = inputs
    dropped = weight_hh if mask is None else weight_hh * mask
    out, (h, c) = mogrifier.reference(x, (h, c), weight_ih, dropped, bias, gates(flat))
    return out, h, c


def with_gradients(outputs, inputs):
    """Everything that comes out, and the gradients of a sum of it in which nothing is alike."""
    loss = sum((y * draw(*y.shape, seed=50 + k).to(y.dtype)).sum() for k, y in enumerate(outputs))
    return [y.detach() for y in outputs], torch.autograd.grad(loss, inputs)


# --- The equations


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 6])
def test_step_by_step_it_is_the_papers_equations(num_rounds):
    inputs, mask = make((3, 4, 5, 6, 2), num_rounds, torch.double)
    out, last_h, last_c = run_reference(inputs, mask)
    x, h, c, weight_ih, weight_hh, bias, *flat = inputs
    h, c = h[0], c[0]
    for t in range(4):
        h, c = reference.mogrified_step(
            x[:, t], h, c, gates(flat), weight_ih, weight_hh * mask, bias, torch.zeros_like(bias)
        )
        np.testing.assert_allclose(reference.f64(out[:, t]), h, rtol=1e-12)
    np.testing.assert_allclose(reference.f64(last_h[0]), h, rtol=1e-12)
    np.testing.assert_allclose(reference.f64(last_c[0]), c, rtol=1e-12)


def test_without_rounds_it_is_an_lstm_and_rounds_change_it():
    inputs, _ = make((3, 4, 5, 6, 2), 2, torch.double)
    x, h, c, weight_ih, weight_hh, bias, *_ = inputs
    lstm = torch.nn.LSTM(5, 6, batch_first=True).double()
    zeros = torch.zeros_like(bias)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    lstm.load_state_dict(dict(zip(names, (weight_ih, weight_hh, bias, zeros), strict=True)))
    expected, _ = lstm(x, (h, c))
    torch.testing.assert_close(run_reference(inputs[:6], None)[0], expected)
    assert (run_reference(inputs, None)[0] - expected).abs().max() > 0.01


# --- The passes of a CPU


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_dropped", [True, False])
def test_outputs_and_gradients_are_those_of_the_reference_in_float64(way, library, shape, num_rounds, is_dropped):  # noqa: F811
    inputs, mask = make(shape, num_rounds)
    exact_inputs, exact_mask = make(shape, num_rounds, torch.double)
    if not is_dropped:
        mask = exact_mask = None
    outputs, grads = with_gradients(run_ours(inputs, mask), inputs)
    exact_outputs, exact_grads = with_gradients(run_reference(exact_inputs, exact_mask), exact_inputs)
    for got, exact in zip([*outputs, *grads], [*exact_outputs, *exact_grads], strict=True):
        assert (got - exact).norm() < 3e-6 * exact.norm()


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_when_only_one_of_its_outputs_is_used(way, used):  # noqa: F811
    inputs, mask = make((3, 5, 4, 6, 2), 3)
    exact_inputs, exact_mask = make((3, 5, 4, 6, 2), 3, torch.double)
    _, grads = with_gradients([run_ours(inputs, mask)[used]], inputs)
    _, exact_grads = with_gradients([run_reference(exact_inputs, exact_mask)[used]], exact_inputs)
    for got, exact in zip(grads, exact_grads, strict=True):
        assert (got - exact).norm() < 3e-6 * exact.norm()


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_in_bfloat16_what_is_multiplied_is_rounded(way, library, num_rounds):  # noqa: F811
    inputs, mask = make((20, 4, 40, 64, 16), num_rounds)
    results = []
    for half in (False, True):
        outputs, grads = with_gradients(run_ours(inputs, mask, half), inputs)
        results.append([*outputs, *grads])
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() < 0.03 * exact.norm()


def test_it_goes_backward_once():
    inputs, mask = make((2, 3, 4, 6, 2), 2)
    out, *_ = run_ours(inputs, mask)
    torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        torch.autograd.grad(out.sum(), inputs)


# --- The model


def make_model(**settings):
    sizes = {"vocab_size": 31, "embedding_size": 6, "hidden_size": 10, "num_layers": 3, "mogrifier_rank": 4}
    return AWDLSTM(**sizes | {"mogrifier_rounds": 3, "rng": rng(3)} | settings)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_float32_takes_the_passes_of_a_cpu_and_the_rest_pytorchs_operators(monkeypatch, precision):
    taken = []
    for name in ("lstm", "reference"):
        real = getattr(mogrifier, name)
        monkeypatch.setattr(mogrifier, name, lambda *a, name=name, real=real: taken.append(name) or real(*a))
    model, tokens = make_model(weight_dropout=0.5), torch.randint(31, (3, 7), generator=rng(1))
    with torch.autocast("cpu", precision, enabled=precision is not None):
        out = model(tokens, None, rng(2))
    assert set(taken) == {"reference" if precision == torch.float16 else "lstm"}
    assert {x.dtype for x in (out.raw, *out.state[0])} == {torch.float32}
    exact = model.double()(tokens, None, rng(2))
    assert set(taken) >= {"reference"}
    assert (out.logits - exact.logits).norm() < (1e-6 if precision is None else 0.03) * exact.logits.norm()


def test_other_settings_draw_the_same_weights_whether_there_are_rounds_or_not():
    plain = make_model(mogrifier_rounds=0).state_dict()
    mogrified = make_model().state_dict()
    assert all(torch.equal(mogrified[name], weight) for name, weight in plain.items())
    assert set(mogrified) - set(plain) == {
        f"model.layers.{i}.rounds.{r}.{k}.weight" for i in range(3) for r in range(3) for k in range(2)
    }
    first = mogrified["model.layers.1.rounds.0.0.weight"]
    assert first.shape == (4, 10)
    assert 0.2 < first.abs().max() <= 10**-0.5


# --- The graph


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_rounds", [1, 2, 5])
def test_the_graph_is_the_network(tmp_path, tied, num_rounds):
    model = make_model(tie_weights=tied, mogrifier_rounds=num_rounds).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.8, 0.8, generator=rng(5))  # so large that each has a say
    onnx.save(export.build_graph(model, "abc"), tmp_path / "model.onnx")
    engine = OnnxEngine(tmp_path / "model.onnx")
    assert engine.weights_sha256 == "abc"
    assert export.max_difference(model, engine) < 1e-5
    with torch.no_grad():
        model.layers[1].rounds[-1][1].weight[0, 0] += 0.5
    assert export.max_difference(model, engine) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_int8_is_near_and_a_rows_numbers_are_its_own(tmp_path, tied):
    model = make_model(vocab_size=60, embedding_size=20, hidden_size=24, tie_weights=tied).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)  # logits of some size
        for layer in model.layers:
            for weight in layer.lstm.parameters():
                weight.mul_(2)
            for matrix in layer.rounds.parameters():
                matrix.mul_(4)  # rounds that have a say
    onnx.save(
        build_mogrifier_graph(model, "0", np.random.default_rng(1).integers(60, size=(8, 30))), tmp_path / "int8.onnx"
    )
    engine = OnnxEngine(tmp_path / "int8.onnx")
    assert engine.batch_invariant
    ids_BT = np.random.default_rng(0).integers(60, size=(5, 40))
    exact_BTV, _ = TorchEngine(model).logits(ids_BT, model.initial_state(5))
    logits_BTV, state = engine.logits(ids_BT, engine.initial_state(5))
    assert np.linalg.norm(logits_BTV - exact_BTV) < 0.04 * np.linalg.norm(exact_BTV)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for layer in without.layers:
            for first, _ in layer.rounds:
                first.weight.zero_()
    otherwise_BTV, _ = TorchEngine(without).logits(ids_BT, model.initial_state(5))
    assert np.linalg.norm(otherwise_BTV - exact_BTV) > 0.2 * np.linalg.norm(exact_BTV)
    np.testing.assert_array_equal(engine.output(state), state[-2][0])
    for row in range(5):
        alone, own_state = engine.logits(ids_BT[[row], :13], engine.initial_state(1))
        np.testing.assert_array_equal(alone[0], logits_BTV[row, :13])
        for t in range(13, 40):
            step, own_state = engine.step(ids_BT[[row], t], own_state)
            np.testing.assert_array_equal(step[0], logits_BTV[row, t])
    matrices = [w.name for w in onnx.load(tmp_path / "int8.onnx").graph.initializer if sorted(w.dims)[1:] == [60]]
    assert len(matrices) == (1 if tied else 2) + 1  # and the scales of the embedding, (V, 1)


# --- A run


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_dir):
    run_dir = tmp_path_factory.mktemp("runs") / "mogrified"
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, TINY))
    return open_run(run_dir)


def test_a_run_learns_exports_and_says_what_it_is(run, corpus_dir, ulimi):
    first, last = run.metrics()
    assert last["valid_nll"] < first["valid_nll"]
    facts = run.meta["onnx"]
    assert facts["kind"] == "int8"
    assert abs(facts["int8_cost_bits_per_char"]) < 0.01
    assert facts["fp32_max_difference"] < 1e-4
    assert "Mogrifier of 3 rounds of rank 5" in ulimi("info", run.dir).out
    by_graph, by_weights = (
        ulimi("evaluate", corpus_dir / "valid.txt", "-m", run.dir, "--json", "--engine", engine).json[0]["nats"]
        for engine in ("onnx", "torch")
    )
    assert by_graph == pytest.approx(by_weights, rel=0.01)
    assert ulimi("generate", "Namhlanje", "-m", run.dir, "--max-tokens", "5", "--seed", "1").code == 0


def test_it_learns_while_it_reads(run, corpus_dir, ulimi):
    static = ulimi("evaluate", corpus_dir / "valid.txt", "-m", run.dir, "--json", "--engine", "torch").json[0]["nats"]
    adapting = ulimi("evaluate", corpus_dir / "valid.txt", "-m", run.dir, "--json", "--dynamic", "--dynamic-lr", "1e-3")
    assert adapting.json[0]["nats"] < static


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, corpus_dir):
    corpus, recipe = open_corpus(corpus_dir, tmp_path / "corpus"), load_recipe(None, TINY)
    train(
        corpus, tmp_path / "run", recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"max_epochs": 1})})
    )
    train(corpus, tmp_path / "run", recipe, resume=True)
    mine, theirs = (dict(load_model(r).named_parameters()) for r in (open_run(tmp_path / "run"), run))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_plain_network_may_start_one_that_computes_the_same_at_first_and_then_learns(tiny_run, tmp_path, corpus_dir):
    corpus = open_corpus(corpus_dir, tmp_path / "corpus")
    recipe = load_recipe(None, [*TINY, f"model.tie_weights={json.dumps(tiny_run.config['tie_weights'])}"])
    plain, grown = load_model(tiny_run), AWDLSTM(**tiny_run.config | recipe_rounds(recipe))
    adopt_weights(grown, tiny_run.tokenizer, tiny_run)
    tokens_BT = torch.randint(plain.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(grown.eval()(tokens_BT).logits, plain(tokens_BT).logits, atol=1e-5, rtol=0)
    train(corpus, tmp_path / "run", recipe, init_from=tiny_run)
    seconds = [up_MK for layer in load_model(open_run(tmp_path / "run")).layers for _, up_MK in layer.round_matrices()]
    assert len(seconds) == 2 * recipe.model.mogrifier_rounds
    assert all(up_MK.abs().max() > 1e-4 for up_MK in seconds)


def recipe_rounds(recipe):
    return {"mogrifier_rounds": recipe.model.mogrifier_rounds, "mogrifier_rank": recipe.model.mogrifier_rank}


@pytest.mark.parametrize("change", ["mogrifier_rounds=0", "mogrifier_rounds=2", "mogrifier_rank=6"])
def test_rounds_that_are_there_stay_as_they_are(run, tmp_path, corpus_dir, change):
    corpus = open_corpus(corpus_dir, tmp_path / "corpus")
    with pytest.raises(UlimiError, match=rf"other sizes: model\.{change.partition('=')[0]} is . there, . here"):
        train(corpus, tmp_path / "run", load_recipe(None, [*TINY, f"model.{change}"]), init_from=run)


def test_a_run_of_before_there_were_rounds_goes_on(tiny_run, tmp_path, corpus_dir, ulimi):
    old = Path(shutil.copytree(tiny_run.dir, tmp_path / "run"))
    config = json.loads((old / "config.json").read_text())
    for name in ("mogrifier_rounds", "mogrifier_rank"):
        del config["awd_lstm"][name]
    (old / "config.json").write_text(json.dumps(config))
    lines = (old / "recipe.toml").read_text().splitlines()
    (old / "recipe.toml").write_text("\n".join(line for line in lines if not line.startswith("mogrifier")))
    assert not load_model(open_run(old)).mogrifier_rounds
    assert "Mogrifier" not in ulimi("info", old).out
    assert ulimi("train", corpus_dir, "--out", old, "--resume", "optim.max_epochs=3").code == 0
    assert [row["epoch"] for row in open_run(old).metrics()] == [1, 2, 3]
