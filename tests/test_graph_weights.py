"""Weights read back from a graph are those that it was made of, as near as int8 tells."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from conftest import refusal
from ulimi import export
from ulimi.engine import OnnxEngine, TorchEngine, load_engine, load_model
from ulimi.graph_weights import read_graph_weights
from ulimi.model import AWDLSTM
from ulimi.run import ONNX, WEIGHTS, open_run

SIZES = {"vocab_size": 60, "embedding_size": 12, "hidden_size": 24, "num_layers": 2}
ROUNDS = {"mogrifier_rounds": 3, "mogrifier_rank": 4}
KINDS = pytest.mark.parametrize("more", [{}, ROUNDS], ids=["lstm", "mogrifier"])
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make(tied, more):
    config = {**SIZES, "tie_weights": tied, **more}
    model = AWDLSTM(**config, rng=torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)  # logits of some size
        model.lm_head.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(4))
    return model, config


def write(model, path, *, int8):
    if int8 and not model.mogrifier_rounds:
        onnx.save(export.build_graph(model, "abc"), path.with_name("fp32.onnx"))
        export.write_int8(path.with_name("fp32.onnx"), path)
    else:
        text = np.random.default_rng(1).integers(60, size=(8, 30)) if int8 else None
        onnx.save(export.build_mogrifier_graph(model, "abc", text) if int8 else export.build_graph(model, "abc"), path)


def comparable(weights):
    """What a network computes with: of a Mogrifier the sum of the biases, and of each round the product."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith("bias_ih_l0"):
            found[name] = tensor + weights[name.replace("_ih_", "_hh_")]
        elif ".rounds." in name:
            if name.endswith("0.weight"):
                found[name] = weights[name.replace("0.weight", "1.weight")] @ tensor
        elif not name.endswith("bias_hh_l0"):
            found[name] = tensor
    return found


@KINDS
@TIES
def test_of_float_graphs_they_are_the_weights(tmp_path, tied, more):
    model, _ = make(tied, more)
    write(model, tmp_path / ONNX, int8=False)
    weights, own = read_graph_weights(tmp_path / ONNX), dict(model.named_parameters())
    assert weights.keys() == own.keys()
    assert {name: (t.shape, t.dtype) for name, t in weights.items()} == {n: (t.shape, t.dtype) for n, t in own.items()}
    # A Mogrifier's two biases stand there as their sum.
    assert all(torch.equal(weights[name], own[name]) for name in own if not more or "bias_" not in name)
    theirs = comparable(own)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in comparable(weights).items())


@KINDS
@TIES
def test_of_int8_graphs_they_are_within_half_a_step(tmp_path, tied, more):
    model, _ = make(tied, more)
    write(model, tmp_path / ONNX, int8=True)
    own = comparable(dict(model.named_parameters()))
    for name, tensor in comparable(read_graph_weights(tmp_path / ONNX)).items():
        step = own[name].abs().max() / 127
        # An untied embedding goes by 255 steps from its least to its largest. Of a round two matrices were rounded.
        allowed = 1e-5 if "bias" in name else step * (2 if ".rounds." in name else 0.51)
        assert (tensor - own[name]).abs().max() <= allowed, name
        assert tensor.shape == own[name].shape


@KINDS
@TIES
def test_the_network_of_them_computes_what_the_graph_computes(tmp_path, tied, more):
    """It is off by the rounding of activations alone; of plain LSTMs, which have one scale a matrix, that is less."""
    model, config = make(tied, more)
    write(model, tmp_path / ONNX, int8=True)
    again = AWDLSTM(**config).eval()
    weights = read_graph_weights(tmp_path / ONNX)
    again.load_state_dict(weights | ({"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}))
    ids_BT = np.random.default_rng(0).integers(60, size=(8, 41))
    nll = {}
    for name, engine in {
        "graph": OnnxEngine(tmp_path / ONNX),
        "again": TorchEngine(again),
        "first": TorchEngine(model),
    }.items():
        nll[name], _ = engine.nll(ids_BT[:, :-1], ids_BT[:, 1:], engine.initial_state(8))
    off = np.abs(nll["again"] - nll["graph"]).mean()
    assert off < 0.005
    assert more or off < np.abs(nll["first"] - nll["graph"]).mean()


@KINDS
def test_for_training_they_are_spread_over_what_int8_rounds_to_them(tmp_path, more):
    model, _ = make(False, more)
    write(model, tmp_path / ONNX, int8=True)
    middle, spread, again = (
        read_graph_weights(tmp_path / ONNX, rng) for rng in (None, np.random.default_rng(1), np.random.default_rng(1))
    )
    assert middle.keys() == spread.keys()
    for name, tensor in spread.items():
        assert torch.equal(tensor, again[name])
        if "bias" in name:
            assert torch.equal(tensor, middle[name])
            continue
        off = tensor - middle[name]
        # Of a Mogrifier each output has a step of its own, of the embedding each token.
        steps = middle[name].abs().amax(dim=1, keepdim=True) if more else middle[name].abs().max()
        assert (off.abs() <= 0.51 * steps / 127 * (1 if more or "embed" not in name else 1.01)).all(), name
        assert 0.2 * steps.mean() / 127 < off.std() < 0.4 * steps.mean() / 127
        assert off.mean().abs() < 0.1 * steps.mean() / 127


@pytest.fixture
def released(tmp_path, tiny_run):
    """The tiny run as a release has it: without float weights."""
    folder = tmp_path / "released"
    shutil.copytree(tiny_run.dir, folder)
    (folder / WEIGHTS).unlink()
    shutil.rmtree(folder / "last")
    return open_run(folder)


def test_what_little_is_learnt_from_a_release_is_not_rounded_away(tmp_path):
    """A step of a tenth of int8's: rounded again, the weights have gone that far on the whole, and not back."""
    model, config = make(False, {})
    write(model, tmp_path / ONNX, int8=True)
    moved = {}
    for kind, rng in (("middle", None), ("spread", np.random.default_rng(1))):
        network = AWDLSTM(**config).eval()
        network.load_state_dict(read_graph_weights(tmp_path / ONNX, rng))
        before = network.layers[1].lstm.weight_hh_l0.detach().clone()
        with torch.no_grad():
            largest = before.abs() > 0.9 * before.abs().max()  # the step stays what it is
            network.layers[1].lstm.weight_hh_l0 += 0.1 * before.abs().max() / 127 * ~largest
        write(network, tmp_path / "next.onnx", int8=True)
        after = read_graph_weights(tmp_path / "next.onnx")["model.layers.1.lstm.weight_hh_l0"]
        middle = read_graph_weights(tmp_path / ONNX)["model.layers.1.lstm.weight_hh_l0"]
        moved[kind] = ((after - middle)[~largest].mean() / (before.abs().max() / 127)).item()
    assert abs(moved["middle"]) < 0.02
    assert 0.07 < moved["spread"] < 0.13


def test_a_release_runs_on_pytorch(released, tiny_run):
    ids_BT = np.random.default_rng(0).integers(320, size=(3, 30))
    nll = []
    for run in (released, tiny_run):
        engine = load_engine(run, "cpu", kind="torch")
        nll.append(engine.nll(ids_BT[:, :-1], ids_BT[:, 1:], engine.initial_state(3))[0])
    np.testing.assert_allclose(nll[0], nll[1], atol=0.05)
    assert not np.array_equal(nll[0], nll[1])
    weights = load_file(tiny_run.weights_path)
    assert load_model(released).lm_head.bias.tolist() == pytest.approx(weights["lm_head.bias"].tolist(), abs=1e-5)


@pytest.mark.parametrize("changed", [
    {"num_layers": 3}, {"num_layers": 1}, {"tie_weights": False}, {"hidden_size": 9}, {"num_layers": "x"},
    {"mogrifier_rounds": 1},
])  # fmt: skip
def test_a_graph_of_another_network_is_refused(released, changed):
    path = released.dir / "config.json"
    config = json.loads(path.read_text())
    config["awd_lstm"] |= changed
    path.write_text(json.dumps(config))
    assert f"{ONNX} does not fit" in refusal(lambda: load_model(open_run(released.dir)))


@pytest.mark.parametrize("claimed", [0, 1, 2, 4, -1])
def test_a_graph_of_other_rounds_is_refused(released, claimed):
    model, config = make(True, ROUNDS)
    write(model, released.dir / ONNX, int8=True)
    (released.dir / "config.json").write_text(json.dumps({"awd_lstm": {**config, "mogrifier_rounds": claimed}}))
    assert f"{ONNX} does not fit" in refusal(lambda: load_model(open_run(released.dir)))


def test_a_graph_of_another_making_is_refused(released):
    graph = onnx.load(released.dir / ONNX)
    for weight in graph.graph.initializer:
        weight.name = f"another_{weight.name}"
    onnx.save(graph, released.dir / ONNX)
    assert f"{ONNX}: is not a graph as this ulimi writes it" in refusal(lambda: load_model(released))


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_graph_that_is_cut_off_is_refused(released, size):
    path = released.dir / ONNX
    path.write_bytes(path.read_bytes()[:size])
    assert ONNX in refusal(lambda: load_model(released))
