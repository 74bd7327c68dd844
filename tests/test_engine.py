"""The engine on PyTorch: its calls agree with each other and with the equations, and a state is a value."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from ulimi.engine import OnnxEngine, TorchEngine, choose_device, load_engine, load_model, write_tensors
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.run import open_run
from ulimi.tokenizer import Tokenizer

V = 19
IDS = [3, 7, 7, 0, 18, 5, 11, 3, 7, 2, 9, 9, 14]
CONFIG = {
    "vocab_size": V,
    "embedding_size": 5,
    "hidden_size": 8,
    "num_layers": 3,
    "tie_weights": True,
    "embedding_dropout": 0.2,
    "input_dropout": 0.2,
    "hidden_dropout": 0.2,
    "output_dropout": 0.2,
    "weight_dropout": 0.2,
}


def make_model(**changes) -> AWDLSTM:
    """A network of random weights that are large enough to make each id matter, in training mode."""
    model = AWDLSTM(**{**CONFIG, **changes})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return model.train()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def engine(model):
    return TorchEngine(model)


@pytest.fixture
def truth(model):
    """By the equations: log p of every next token after each of `IDS`, (T, V)."""
    params = {
        "embedding": model.model.embed_tokens.weight,
        "layers": [tuple(layer.lstm.parameters()) for layer in model.layers],
        "decoder_bias": model.lm_head.bias,
    }
    return reference.log_softmax(reference.awd_lstm_forward([IDS], params).logits[0])


def close(ours, truth, tolerance=1e-5):
    np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=tolerance)


def log_softmax(logits):
    return reference.log_softmax(logits.astype(np.float64))


def flat(state) -> list[np.ndarray]:
    return [tensor.numpy().copy() for layer_state in state for tensor in layer_state]


def some_state(engine, batch_size):
    """A state that is not zero, and differs from stream to stream."""
    state = engine.initial_state(batch_size)
    return engine.step(np.arange(1, batch_size + 1), state)[1]


def test_steps_follow_the_equations(engine, truth):
    state = engine.initial_state(1)
    for t, token in enumerate(IDS):
        logits, state = engine.step(np.array([token]), state)
        assert logits.shape == (1, V)
        assert logits.dtype == np.float32
        close(log_softmax(logits[0]), truth[t])


@pytest.mark.parametrize("window", [1, 4, len(IDS), 256])
def test_prime_is_repeated_steps(engine, truth, monkeypatch, window):
    monkeypatch.setattr("ulimi.engine.EVALUATION_WINDOW", window)
    logits, state = engine.prime(IDS, engine.initial_state(1))
    assert logits.shape == (1, V)
    assert logits.dtype == np.float32
    close(log_softmax(logits[0]), truth[-1])
    stepped = engine.initial_state(1)
    for token in IDS:
        _, stepped = engine.step(np.array([token]), stepped)
    for ours, theirs in zip(flat(state), flat(stepped), strict=True):
        close(ours, theirs)


def test_prime_goes_on_from_the_state_it_is_given(engine):
    _, state = engine.prime(IDS[:5], engine.initial_state(1))
    logits, _ = engine.prime(IDS[5:], state)
    close(logits, engine.prime(IDS, engine.initial_state(1))[0])


def test_prime_needs_an_id(engine):
    with pytest.raises(ValueError, match="no ids"):
        engine.prime([], engine.initial_state(1))


@pytest.mark.parametrize("cut", [1, 5, len(IDS) - 2])
def test_nll_is_minus_log_p_of_each_target_over_two_windows(engine, truth, cut):
    inputs_1T, targets_1T = np.array([IDS[:-1]]), np.array([IDS[1:]])
    first, state = engine.nll(inputs_1T[:, :cut], targets_1T[:, :cut], engine.initial_state(1))
    second, _ = engine.nll(inputs_1T[:, cut:], targets_1T[:, cut:], state)
    assert first.dtype == np.float32
    assert first.shape == (1, cut)
    expected = [-truth[t, IDS[t + 1]] for t in range(len(IDS) - 1)]
    close(np.concatenate([first, second], axis=1)[0], expected)


def test_nll_of_several_streams_keeps_them_apart(engine):
    inputs_BT = np.array([IDS[:4], IDS[4:8], IDS[8:12]])
    targets_BT = np.array([IDS[1:5], IDS[5:9], IDS[9:13]])
    together, _ = engine.nll(inputs_BT, targets_BT, engine.initial_state(3))
    assert together.shape == (3, 4)
    for row in range(3):
        alone, _ = engine.nll(inputs_BT[row : row + 1], targets_BT[row : row + 1], engine.initial_state(1))
        close(together[row], alone[0])


def test_repeat_state_makes_equal_streams(engine):
    state = some_state(engine, 1)
    alone, _ = engine.step(np.array([6]), state)
    logits, _ = engine.step(np.array([6, 2, 6]), engine.repeat_state(state, 3))
    close(logits[0], alone[0])
    close(logits[2], alone[0])
    assert np.abs(logits[1] - alone[0]).max() > 0.01


def test_select_state_keeps_rows_in_order(engine):
    state = some_state(engine, 4)
    every, _ = engine.step(np.array([5, 5, 5, 5]), state)
    rows = [3, 0, 0]
    some, _ = engine.step(np.array([5, 5, 5]), engine.select_state(state, rows))
    close(some, every[rows])
    assert np.abs(every[3] - every[0]).max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_call_changes_the_state_it_was_given(engine, batch_size):
    state = some_state(engine, batch_size)
    before = flat(state)
    ids_B = np.full(batch_size, 4)
    calls = [
        lambda: engine.step(ids_B, state),
        lambda: engine.nll(np.tile(IDS[:-1], (batch_size, 1)), np.tile(IDS[1:], (batch_size, 1)), state),
        lambda: engine.select_state(state, [0]),
    ]
    if batch_size == 1:
        calls += [lambda: engine.prime(IDS, state), lambda: engine.repeat_state(state, 3)]
    for call in calls:
        call()
        for now, then in zip(flat(state), before, strict=True):
            assert np.array_equal(now, then)


def test_repeated_and_selected_states_are_copies(engine):
    state = some_state(engine, 1)
    before = flat(state)
    with torch.inference_mode():
        for copy in (engine.repeat_state(state, 1), engine.select_state(state, [0])):
            for h, c in copy:
                h.zero_()
                c.zero_()
    for now, then in zip(flat(state), before, strict=True):
        assert np.array_equal(now, then)


def test_dropout_is_off_and_no_graph_is_kept(engine):
    state = engine.initial_state(1)
    (one, after), (two, _) = engine.prime(IDS, state), engine.prime(IDS, state)
    assert np.array_equal(one, two)
    assert all(not tensor.requires_grad for layer_state in after for tensor in layer_state)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_leaves_pytorchs_settings_as_they_were(engine, monkeypatch, enabled):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    engine.step(np.array([1]), engine.initial_state(1))
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(IndexError):
        engine.step(np.array([V]), engine.initial_state(1))
    assert torch.backends.mkldnn.enabled == enabled


# --- From a run folder -------------------------------------------------------------------------------


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder of a network, and a configuration that may be another's."""

    def make(model, **config):
        (tmp_path / "meta.json").write_text(json.dumps({"format": 1}))
        (tmp_path / "config.json").write_text(json.dumps({"awd_lstm": {**CONFIG, **config}}))
        write_tensors(dict(model.named_parameters()), tmp_path / "model.safetensors")
        return open_run(tmp_path)

    return make


@pytest.mark.parametrize("tie_weights", [True, False])
def test_load_model_gives_back_what_was_saved(make_run, tie_weights):
    model = make_model(tie_weights=tie_weights)
    loaded = load_model(make_run(model, tie_weights=tie_weights))
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie_weights
    own = dict(model.named_parameters())
    assert own.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, own[name]), name
    assert [layer.weight_dropout for layer in loaded.layers] == [CONFIG["weight_dropout"]] * 3
    tokens = torch.tensor([IDS])
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_trained_run_loads(tiny_run):
    engine = load_engine(tiny_run, "cpu", kind="torch")
    assert engine.vocab_size == tiny_run.tokenizer.vocab_size == 320
    logits, _ = engine.step(np.array([tiny_run.tokenizer.eos_id]), engine.initial_state(1))
    assert logits.shape == (1, 320)
    weights = load_file(tiny_run.weights_path)
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": [
            tuple(
                weights[f"model.layers.{i}.lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            for i in range(2)
        ],
        "decoder_bias": weights["lm_head.bias"],
    }
    close(logits, reference.awd_lstm_forward([[tiny_run.tokenizer.eos_id]], params).logits[0])


def test_weights_that_are_cut_off_are_one_error(make_run, model):
    run = make_run(model)
    content = run.weights_path.read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        run.weights_path.write_bytes(content[:size])
        with pytest.raises(UlimiError, match=r"model\.safetensors: cannot be read"):
            load_model(run)


def test_weights_that_are_not_there_are_one_error(make_run, model):
    run = make_run(model)
    run.weights_path.unlink()
    with pytest.raises(UlimiError, match=r"no model\.safetensors yet"):
        load_model(run)


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": V + 1},
        {"embedding_size": 6},
        {"hidden_size": 9},
        {"num_layers": 2},
        {"num_layers": 4},
        {"tie_weights": False},
        {"num_heads": 4},
        {"vocab_size": "many"},
    ],
)
def test_a_configuration_of_another_network_is_one_error(make_run, model, config):
    with pytest.raises(UlimiError, match=r"model\.safetensors does not fit .*config\.json: .+") as caught:
        load_model(make_run(model, **config))
    assert "\n" not in str(caught.value)


def test_an_untied_network_is_not_read_as_a_tied_one(make_run):
    # With one width for all layers every shape fits; only the second matrix tells.
    model = make_model(hidden_size=5, tie_weights=False)
    with pytest.raises(UlimiError, match=r"does not fit .*lm_head\.weight"):
        load_model(make_run(model, hidden_size=5, tie_weights=True))


@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "lm_head.bias", "model.layers.1.lstm.weight_hh_l0"])
def test_a_missing_tensor_is_one_error(make_run, model, missing):
    run = make_run(model)
    weights = load_file(run.weights_path)
    del weights[missing]
    save_file(weights, run.weights_path)
    with pytest.raises(UlimiError, match="does not fit"):
        load_model(run)


def test_a_setting_that_is_missing_is_one_error(make_run, model):
    run = make_run(model)
    (run.dir / "config.json").write_text(json.dumps({"awd_lstm": {"vocab_size": V}}))
    with pytest.raises(UlimiError, match="does not fit"):
        load_model(run)


@pytest.mark.parametrize("kind", ["torch", "onnx", "auto"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_tokenizer_of_another_network_is_one_error(tiny_run, tmp_path, kind, alone):
    run_dir = Path(shutil.copytree(tiny_run.dir, tmp_path / "run"))
    Tokenizer.train(["Abantu bafunda"], kind="char").save(run_dir)
    if alone and kind != "torch":
        (run_dir / "model.safetensors").unlink()
    with pytest.raises(UlimiError, match=r"tokenizer\.json has \d+ tokens, the network .* 320; they do not") as caught:
        load_engine(open_run(run_dir), kind=kind)
    assert "\n" not in str(caught.value)
    if not alone:
        with pytest.raises(UlimiError, match=r"tokenizer\.json has"):
            load_model(open_run(run_dir))


def test_onnx_computes_on_no_other_device(tiny_run):
    for device in ("cuda", "cuda:1", "nonsense"):
        with pytest.raises(UlimiError, match=f"--device {device}: --engine onnx computes on the CPU"):
            load_engine(tiny_run, device, kind="onnx")
    assert isinstance(load_engine(tiny_run, "cpu", kind="onnx"), OnnxEngine)


def test_a_damaged_graph_is_left_aside_where_pytorch_can_do(tiny_run, tmp_path, monkeypatch):
    run_dir = Path(shutil.copytree(tiny_run.dir, tmp_path / "run"))
    graph = run_dir / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    assert isinstance(load_engine(open_run(run_dir)), TorchEngine)
    damaged = pytest.raises(UlimiError, match=r"model\.onnx: cannot be read")
    with damaged:
        load_engine(open_run(run_dir), kind="onnx")
    with monkeypatch.context() as patch, damaged:
        patch.setitem(sys.modules, "torch", None)
        load_engine(open_run(run_dir))
    (run_dir / "model.safetensors").unlink()
    with damaged:
        load_engine(open_run(run_dir))


def test_without_pytorch_the_error_says_what_to_install(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UlimiError, match=r"ulimi\[train\]"):
        load_engine(tiny_run, kind="torch")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "mps", "meta"])
def test_a_device_that_cannot_be_used_is_one_error(name):
    with pytest.raises(UlimiError, match=f"--device {name}: .*; allowed: auto, cpu, cuda"):
        choose_device(name)


def test_a_device_beyond_the_last_is_one_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name).index for name in ("auto", "cuda", "cuda:0", "cuda:1")] == [None, None, 0, 1]
    for name in ("cuda:2", "cuda:9"):
        with pytest.raises(UlimiError, match=f"--device {name}: no such CUDA device, 2 in all; .*N below 2$"):
            choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_one_error():
    with pytest.raises(UlimiError, match="--device cuda:1: no CUDA device is there"):
        choose_device("cuda:1")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
