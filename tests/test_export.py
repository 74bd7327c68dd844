"""model.onnx is the network: the same numbers without PyTorch, int8 at a price that is measured."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from ulimi import export
from ulimi.data import encode_file
from ulimi.engine import OnnxEngine, TorchEngine, load_engine, load_model
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.run import open_run
from ulimi.score import score_lines


@pytest.fixture
def model():
    return AWDLSTM(
        vocab_size=31, embedding_size=6, hidden_size=10, num_layers=3, tie_weights=False, weight_dropout=0.5,
        rng=torch.Generator().manual_seed(3),
    ).eval()  # fmt: skip


@pytest.fixture
def onnx_engine(model, tmp_path):
    onnx.save(export.build_graph(model, "abc"), tmp_path / "model.onnx")
    return OnnxEngine(tmp_path / "model.onnx")


def test_the_graph_computes_what_the_network_computes_with_the_state_carried(model, onnx_engine):
    assert export.max_difference(model, onnx_engine) < 2e-6


def test_max_difference_notices_one_wrong_weight(model, onnx_engine):
    with torch.no_grad():
        model.layers[1].lstm.weight_hh_l0[0, 0] += 0.5
    assert export.max_difference(model, onnx_engine) > 1e-5


def test_steps_priming_and_windows_agree_with_pytorch(model, onnx_engine):
    torch_engine = TorchEngine(model)
    ids = [3, 1, 4, 1, 5]
    mine, my_state = torch_engine.prime(ids, torch_engine.initial_state(1))
    theirs, state = onnx_engine.prime(ids, onnx_engine.initial_state(1))
    np.testing.assert_allclose(theirs, mine, atol=1e-5)
    assert theirs.shape == (1, onnx_engine.vocab_size) == (1, 31)

    my_state = torch_engine.select_state(torch_engine.repeat_state(my_state, 3), [2, 0])
    state = onnx_engine.select_state(onnx_engine.repeat_state(state, 3), [2, 0])
    before = [array.copy() for array in state]
    for ids_B in (np.array([7, 8]), np.array([9, 2])):
        mine, my_state = torch_engine.step(ids_B, my_state)
        theirs, new_state = onnx_engine.step(ids_B, state)
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
        for array, was in zip(state, before, strict=True):
            np.testing.assert_array_equal(array, was)  # a state that was given is not written to
        state = new_state
        before = [array.copy() for array in state]


def test_nll_is_that_of_the_logits_also_where_they_are_large(onnx_engine):
    inputs_BT = np.array([[1, 2, 3], [4, 5, 6]])
    targets_BT = np.array([[2, 3, 4], [5, 6, 7]])
    nll_BT, _ = onnx_engine.nll(inputs_BT, targets_BT, onnx_engine.initial_state(2))
    state = onnx_engine.initial_state(2)
    for t in range(3):
        logits_BV, state = onnx_engine.step(inputs_BT[:, t], state)
        log_p_BV = torch.log_softmax(torch.from_numpy(logits_BV), dim=1).numpy()
        np.testing.assert_allclose(nll_BT[:, t], -log_p_BV[np.arange(2), targets_BT[:, t]], atol=1e-5)


def test_training_leaves_a_graph_of_its_weights_and_says_what_int8_costs(tiny_run):
    run = open_run(tiny_run.dir)
    facts = run.meta["onnx"]
    assert facts["kind"] == "int8"
    assert 0 <= facts["fp32_max_difference"] <= export.MAX_DIFFERENCE
    assert abs(facts["int8_cost_bits_per_char"]) <= export.MAX_INT8_COST
    assert facts["fp32_bits_per_char"] == pytest.approx(run.meta["scores"]["valid"]["bits_per_char"], abs=1e-6)
    graph = onnx.load(run.dir / "model.onnx")
    assert {node.op_type for node in graph.graph.node} >= {"DynamicQuantizeLSTM"}
    assert OnnxEngine(run.dir / "model.onnx").weights_sha256 == run.weights_sha256


def some_windows(engine, num_rows, num_steps):
    ids = np.random.default_rng(num_rows).integers(engine.vocab_size, size=(num_rows, num_steps + 1))
    return ids[:, :-1], ids[:, 1:]


def test_a_row_in_int8_is_its_own_to_the_last_bit_in_any_batch_and_window(tiny_run):
    engine = OnnxEngine(tiny_run.dir / "model.onnx")
    assert engine.batch_invariant
    inputs_BT, targets_BT = some_windows(engine, 37, 60)
    together_BTV, end = engine.logits(inputs_BT, engine.initial_state(37))
    nll_BT, _ = engine.nll(inputs_BT, targets_BT, engine.initial_state(37))
    for row in (0, 5, 36):
        state = engine.initial_state(1)
        for t, token in enumerate(inputs_BT[row]):
            logits_1V, state = engine.step(np.array([token]), state)
            np.testing.assert_array_equal(logits_1V[0], together_BTV[row, t])
        for mine, theirs in zip(state, engine.select_state(end, [row]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        alone_1T, _ = engine.nll(inputs_BT[[row]], targets_BT[[row]], engine.initial_state(1))
        np.testing.assert_array_equal(nll_BT[row], alone_1T[0])


def test_streams_that_begin_and_streams_that_go_on_share_a_batch(tiny_run):
    engine = OnnxEngine(tiny_run.dir / "model.onnx")
    _, later = engine.prime([3, 1, 4, 1, 5, 9, 2, 6], engine.initial_state(1))
    fresh = engine.initial_state(1)
    together, _ = engine.step(np.array([7, 7]), engine.join_states([fresh, later]))
    for row, state in enumerate((fresh, later)):
        np.testing.assert_array_equal(engine.step(np.array([7]), state)[0][0], together[row])


def test_the_units_that_keep_the_scales_keep_their_cells_and_are_no_output(tiny_run):
    engine = OnnxEngine(tiny_run.dir / "model.onnx")
    state = engine.initial_state(1)
    for _ in range(20):
        _, state = engine.prime([3, 1, 4] * 256, state)
    for h, c in zip(state[::2], state[1::2], strict=True):
        assert h[0, 0, -2:].tolist() == [1, -1]
        assert c[0, 0, -2:].tolist() == [20, -20]
    assert engine.output(state).shape == (1, 16)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_is_near_the_network_and_holds_a_tied_matrix_once(tmp_path, tied):
    model = AWDLSTM(
        vocab_size=60, embedding_size=20, hidden_size=24, num_layers=2, tie_weights=tied,
        rng=torch.Generator().manual_seed(3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)  # logits of some size
        model.lm_head.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(4))
    onnx.save(export.build_graph(model, "0"), tmp_path / "fp32.onnx")
    export.write_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    inputs_BT, _ = some_windows(engine := OnnxEngine(tmp_path / "int8.onnx"), 4, 30)
    exact_BTV, _ = TorchEngine(model).logits(inputs_BT, model.initial_state(4))
    logits_BTV, _ = engine.logits(inputs_BT, engine.initial_state(4))
    # The logits themselves, not only their softmax: the ends add nothing to them.
    assert abs(logits_BTV - exact_BTV).max() < 0.05 * abs(exact_BTV).max()
    graph = onnx.load(tmp_path / "int8.onnx").graph
    matrices = [weight.name for weight in graph.initializer if 60 in weight.dims and len(weight.dims) == 2]
    assert len(matrices) == (1 if tied else 2)


def test_a_graph_without_constant_scales_still_runs_each_row_by_itself(tiny_run, corpus_dir, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.dir, copy)
    run = open_run(copy)
    monkeypatch.setattr(export, "fix_scales", lambda quantized: quantized)  # as it was before there were any
    export.export_onnx(run, encode_file(corpus_dir / "valid.txt", run.tokenizer))
    engine = OnnxEngine(copy / "model.onnx")
    assert not engine.batch_invariant
    inputs_BT, targets_BT = some_windows(engine, 3, 20)
    nll_BT, _ = engine.nll(inputs_BT, targets_BT, engine.initial_state(3))
    logits_BV, _ = engine.step(inputs_BT[:, 0], engine.initial_state(3))
    for row in range(3):
        alone_1T, _ = engine.nll(inputs_BT[[row]], targets_BT[[row]], engine.initial_state(1))
        np.testing.assert_array_equal(nll_BT[row], alone_1T[0])
        np.testing.assert_array_equal(engine.step(inputs_BT[[row], 0], engine.initial_state(1))[0][0], logits_BV[row])


def test_int8_that_costs_too_much_is_not_taken(tiny_run, corpus_dir, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.dir, copy)
    run = open_run(copy)
    monkeypatch.setattr(export, "MAX_INT8_COST", -1.0)
    result = export.export_onnx(run, encode_file(corpus_dir / "valid.txt", run.tokenizer))
    assert result["kind"] == "fp32"
    assert {node.op_type for node in onnx.load(copy / "model.onnx").graph.node} >= {"LSTM"}
    assert export.max_difference(load_model(run), OnnxEngine(copy / "model.onnx")) < 1e-5


def test_a_graph_that_differs_is_not_written(tiny_run, corpus_dir, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.dir, copy)
    before = (copy / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "max_difference", lambda model, engine: 1.0)
    run = open_run(copy)
    text = encode_file(corpus_dir / "valid.txt", run.tokenizer)
    with pytest.raises(UlimiError, match="differs"):
        export.export_onnx(run, text)
    assert (copy / "model.onnx").read_bytes() == before


def test_the_engine_is_chosen_by_what_is_there(tiny_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.dir, copy)
    assert isinstance(load_engine(open_run(copy)), OnnxEngine)
    assert isinstance(load_engine(open_run(copy), kind="torch"), TorchEngine)

    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    assert isinstance(load_engine(open_run(copy)), OnnxEngine)  # the graph alone is enough

    (copy / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    assert isinstance(load_engine(open_run(copy)), TorchEngine)  # the graph is of other weights
    with pytest.raises(UlimiError, match=r"other weights .* `ulimi export .*` writes it anew") as caught:
        load_engine(open_run(copy), kind="onnx")
    assert "\n" not in str(caught.value)

    (copy / "model.onnx").write_bytes(b"not a graph")
    assert isinstance(load_engine(open_run(copy)), TorchEngine)
    with pytest.raises(UlimiError, match=r"model\.onnx: cannot be read"):
        load_engine(open_run(copy), kind="onnx")
    (copy / "model.onnx").unlink()
    with pytest.raises(UlimiError, match="ulimi export"):
        load_engine(open_run(copy), kind="onnx")
    with pytest.raises(UlimiError, match="allowed: auto, onnx, torch"):
        load_engine(open_run(copy), kind="jax")


def test_generating_scoring_and_evaluating_need_no_training_extra(tiny_run, corpus_dir):
    program = f"""
import builtins, sys
blocked = {{"torch", "safetensors", "tomli_w", "matplotlib", "onnx"}}  # typer itself may need pydantic
for name in blocked:
    sys.modules[name] = None  # importing it raises ImportError, and find_spec finds nothing
from ulimi.cli import main
for arguments in (
    ["generate", "Ngi\\n", "-m", {str(tiny_run.dir)!r}, "--seed", "1", "--max-tokens", "5", "--json"],
    ["score", "-m", {str(tiny_run.dir)!r}, {str(corpus_dir / "valid.txt")!r}],
    ["evaluate", {str(corpus_dir / "valid.txt")!r}, "-m", {str(tiny_run.dir)!r}, "--json"],
    ["info", {str(tiny_run.dir)!r}],
):
    sys.argv = ["ulimi", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout.splitlines()[0])["num_tokens"] <= 5


def test_a_lines_score_does_not_depend_on_its_neighbours_in_int8_either(tiny_run, corpus_dir):
    engine = OnnxEngine(tiny_run.dir / "model.onnx")
    lines = (corpus_dir / "test.txt").read_text().splitlines()
    together = [score.nats for _, score in score_lines(engine, tiny_run.tokenizer, lines)]
    alone = [next(score_lines(engine, tiny_run.tokenizer, [line]))[1].nats for line in lines]
    assert together == alone
