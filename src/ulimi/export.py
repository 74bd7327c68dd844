"""From weights to model.onnx: the network without PyTorch, int8, with its state as inputs and outputs.

The graph is written node by node: an LSTM language model in evaluation mode is a look-up, an LSTM operator a layer, a
matrix product and a sum (of Mogrifier layers: `ulimi.mogrifier_graph`). Tracing PyTorch takes 30 seconds and a page of
warnings for the same.

Inputs: ids (T, B), and h0, c0, h1, … each (1, B, H). Outputs: logits (T, B, V), and h0_out, c0_out, …
Time comes first, because ONNX Runtime's LSTM knows no other layout.

Source of the operator's gate order and shapes: the ONNX specification, operator LSTM.
"""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from ulimi.data import EncodedText, Ids
from ulimi.engine import FIXED_SCALES, OnnxEngine, TorchEngine, load_model
from ulimi.errors import UlimiError
from ulimi.files import atomic_path
from ulimi.model import AWDLSTM
from ulimi.mogrifier_graph import IR_VERSION, OPSET, as_array, build_mogrifier_graph
from ulimi.run import ONNX, Run
from ulimi.score import score_stream

MAX_DIFFERENCE = 1e-4
"""between the nats of PyTorch and of the fp32 graph"""

MAX_INT8_COST = 0.01
"""bits per character on validation text that int8 may cost; above it, model.onnx stays fp32"""

TIED = "tied"
"""in a graph's metadata: embedding and decoder are one matrix"""


def export_onnx(run: Run, valid_text: EncodedText, *, exact_nats: float | None = None) -> dict[str, Any]:
    """Write a run's model.onnx and check it against PyTorch.

    Args:
        run: with weights.
        valid_text: on which the cost of int8 is measured, as one stream.
        exact_nats: what the weights themselves cost there, if it is known.

    Returns:
        What goes into meta.json: `fp32_max_difference` (nats a token), `fp32_bits_per_char`, `int8_bits_per_char`,
        `int8_cost_bits_per_char`, `kind` ("int8" or "fp32"), `num_bytes`.

    Raises:
        UlimiError: the graph computes something else than the network; none is written.
    """
    model = load_model(run)
    bits = 1 / math.log(2) / valid_text.stats.num_chars
    eos_id = run.tokenizer.eos_id
    with tempfile.TemporaryDirectory() as scratch:
        fp32 = Path(scratch) / "fp32.onnx"
        onnx.save(build_graph(model, run.weights_sha256), fp32)
        difference = max_difference(model, OnnxEngine(fp32))
        if difference > MAX_DIFFERENCE:
            raise UlimiError(
                f"no {ONNX}: ONNX Runtime differs from the network by {difference:.1e} nats a token, "
                f"more than {MAX_DIFFERENCE:g}; the weights themselves are not concerned"
            )
        with atomic_path(run.dir / ONNX) as out:
            if model.mogrifier_rounds:
                onnx.save(build_mogrifier_graph(model, run.weights_sha256, some_ids(valid_text.ids)), out)
            else:
                write_int8(fp32, out)
            if exact_nats is None:
                exact_nats = score_stream(TorchEngine(model, run.alpha), valid_text.ids, eos_id)
            exact = exact_nats * bits
            rounded = score_stream(OnnxEngine(out, run.alpha), valid_text.ids, eos_id) * bits
            small_enough = rounded - exact <= MAX_INT8_COST
            if not small_enough:
                shutil.copyfile(fp32, out)
            num_bytes = out.stat().st_size
    return {
        "kind": "int8" if small_enough else "fp32",
        "num_bytes": num_bytes,
        "fp32_max_difference": difference,
        "fp32_bits_per_char": exact,
        "int8_bits_per_char": rounded,
        "int8_cost_bits_per_char": rounded - exact,
    }


def some_ids(ids: Ids, num_rows: int = 16, num_steps: int = 128) -> NDArray[np.int64]:
    """Give pieces from all over a text, (B, T), as many and as long as it has."""
    num_steps = min(num_steps, len(ids))
    starts = np.linspace(0, len(ids) - num_steps, num_rows).astype(int)
    return np.stack([ids[start : start + num_steps] for start in starts]).astype(np.int64)


def describe_export(result: dict[str, Any]) -> str:
    """Say what `export_onnx` found in one line."""
    return (
        f"{result['kind']}, {result['num_bytes'] / 1e6:.1f} MB; int8 costs {result['int8_cost_bits_per_char']:+.4f} "
        f"bits per character on validation, fp32 differs by {result['fp32_max_difference']:.1e} nats a token"
    )


def build_graph(model: AWDLSTM, weights_sha256: str) -> onnx.ModelProto:
    """Write the network, as it is in evaluation mode, as an ONNX graph in fp32.

    Args:
        model: the network.
        weights_sha256: of model.safetensors; kept in the file, so that a graph of other weights is noticed.
    """
    if model.mogrifier_rounds:
        return build_mogrifier_graph(model, weights_sha256)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, values: NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["time", "batch"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["time", "batch", model.vocab_size])]
    directions = weight("directions", np.array([1], dtype=np.int64))
    x = node("Gather", [weight("embedding", as_array(model.model.embed_tokens.weight)), "ids"], ["x"])
    for i, layer in enumerate(model.layers):
        lstm = layer.lstm
        w, r = (_gates(matrix)[None] for matrix in (lstm.weight_ih_l0, lstm.weight_hh_l0))
        b = np.concatenate([_gates(lstm.bias_ih_l0), _gates(lstm.bias_hh_l0)])[None]
        y = node(
            "LSTM",
            [x, weight(f"w{i}", w), weight(f"r{i}", r), weight(f"b{i}", b), "", f"h{i}", f"c{i}"],
            [f"y{i}", f"h{i}_out", f"c{i}_out"],
            hidden_size=lstm.hidden_size,
        )
        x = node("Squeeze", [y, directions], [f"x{i}"])
        shape: list[str | int | None] = [1, "batch", lstm.hidden_size]
        inputs += [helper.make_tensor_value_info(f"{part}{i}", TensorProto.FLOAT, shape) for part in "hc"]
        outputs += [helper.make_tensor_value_info(f"{part}{i}_out", TensorProto.FLOAT, shape) for part in "hc"]
    scores = node("MatMul", [x, weight("decoder", as_array(model.lm_head.weight).T)], ["scores"])
    node("Add", [scores, weight("bias", as_array(model.lm_head.bias))], ["logits"])

    graph = helper.make_graph(nodes, "awd_lstm", inputs, outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    # The second entry is what ONNX Runtime's own preparation leaves; without it quantising warns that there was none.
    props = {"weights_sha256": weights_sha256, "onnx.quant.pre_process": "onnxruntime.quant"}
    helper.set_model_props(proto, props | ({TIED: "1"} if model.tie_weights else {}))
    onnx.checker.check_model(proto)
    return proto


def write_int8(fp32: Path, out: Path) -> None:
    """Turn a file of `build_graph` into int8."""
    quantize_dynamic(fp32, out, weight_type=QuantType.QInt8, op_types_to_quantize=["LSTM", "MatMul", "Gather"])
    onnx.save(fix_scales(onnx.load(out)), out)


def fix_scales(quantized: onnx.ModelProto) -> onnx.ModelProto:
    """Give each layer two more units, which always say 1 and -1, and the embedding its two ends, in every row.

    int8 finds a scale from the least and the largest of all activations that it is given. An LSTM's output lies
    between -1 and 1: with these ends among them every scale is a constant. What a row gives then depends on no other
    row, nor on how its text is cut into windows, to the last bit, for sums of whole numbers have no order. The weights
    from the new units are 0, and their gates keep the cells that a state begins with (`ulimi.engine.ENDS_C`).

    Args:
        quantized: what `quantize_dynamic` made of `build_graph`'s. It is changed, and given back.
    """
    weights = {weight.name: weight for weight in quantized.graph.initializer}

    def put(name: str, values: NDArray[Any]) -> None:
        _put(weights[name], values)

    def pad_gates(name: str) -> None:
        """Two columns of 0 for each gate, and rows of 0 for the new inputs; int8 is symmetric, its 0 is 0."""
        assert not numpy_helper.to_array(weights[name.replace("quantized", "zero_point")]).any()
        gates = np.split(numpy_helper.to_array(weights[name]), 4, axis=2)
        put(name, np.concatenate([np.pad(gate, ((0, 0), (0, 2), (0, 2))) for gate in gates], axis=2))

    embedding = numpy_helper.to_array(weights["embedding_quantized"])
    both = np.broadcast_to(np.array([embedding.min(), embedding.max()]), (len(embedding), 2))
    put("embedding_quantized", np.concatenate([embedding, both], axis=1))
    layers = [node for node in quantized.graph.node if node.op_type == "DynamicQuantizeLSTM"]
    for i, layer in enumerate(layers):
        pad_gates(f"w{i}_quantized")
        pad_gates(f"r{i}_quantized")
        # Their input gate is shut, their output and forget gates are open.
        biases = np.split(numpy_helper.to_array(weights[f"b{i}"]), 8, axis=1)
        ends = (-100, 100, 100, 0, 0, 0, 0, 0)  # i, o, f, g, of the inputs and of the recurrence
        wider = [np.pad(b, ((0, 0), (0, 2)), constant_values=end) for b, end in zip(biases, ends, strict=True)]
        put(f"b{i}", np.concatenate(wider, axis=1))
        for attribute in layer.attribute:
            if attribute.name == "hidden_size":
                attribute.i += 2
    put("decoder_quantized", np.pad(numpy_helper.to_array(weights["decoder_quantized"]), ((0, 2), (0, 0))))
    for value in (*quantized.graph.input, *quantized.graph.output):
        if value.name[0] in "hc":
            value.type.tensor_type.shape.dim[2].dim_value += 2
    del quantized.graph.value_info[:]
    quantized.metadata_props.add(key=FIXED_SCALES, value="1")
    if any(prop.key == TIED for prop in quantized.metadata_props):
        _share_embedding(quantized)
    return quantized


def max_difference(model: AWDLSTM, engine: OnnxEngine) -> float:
    """Largest difference of two engines' nats on random ids, with the state carried over two windows."""
    torch_engine = TorchEngine(model)
    ids_BT = np.random.default_rng(0).integers(model.vocab_size, size=(3, 65))
    mine, theirs = torch_engine.initial_state(3), engine.initial_state(3)
    largest = 0.0
    for window in (slice(0, 40), slice(40, 64)):
        inputs_BT, targets_BT = ids_BT[:, window], ids_BT[:, window.start + 1 : window.stop + 1]
        a_BT, mine = torch_engine.nll(inputs_BT, targets_BT, mine)
        b_BT, theirs = engine.nll(inputs_BT, targets_BT, theirs)
        largest = max(largest, float(np.abs(a_BT - b_BT).max()))
    return largest


def _put(weight: onnx.TensorProto, values: NDArray[Any]) -> None:
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), weight.name))


def _share_embedding(quantized: onnx.ModelProto) -> None:
    """Let a tied network look its ids up in the decoder's matrix, (E + 2, V), so that the file holds it once.

    The two ends are rows of it, too. The last layer, of which the decoder reads 1 and -1 there, gives every logit the
    same from them, which is taken out of the bias again.
    """
    graph = quantized.graph
    weights = {weight.name: weight for weight in graph.initializer}
    table, bias = (numpy_helper.to_array(weights[name]).copy() for name in ("decoder_quantized", "bias"))
    table[-2:] = [[127], [-127]]  # int8 is symmetric here: the largest weight is one of these
    bias -= 2 * 127 * numpy_helper.to_array(weights["decoder_scale"])
    _put(weights["decoder_quantized"], table)
    _put(weights["bias"], bias)
    for name in ("embedding_quantized", "embedding_scale", "embedding_zero_point"):
        graph.initializer.remove(weights[name])
    look_up, to_float = graph.node[:2]
    assert (look_up.op_type, to_float.op_type) == ("Gather", "DequantizeLinear")
    quantized_x = look_up.output[0]
    columns = helper.make_node("Gather", ["decoder_quantized", "ids"], ["columns"], axis=1)
    look_up.CopyFrom(helper.make_node("Transpose", ["columns"], [quantized_x], perm=[1, 2, 0]))
    to_float.input[1:] = ["decoder_scale", "decoder_zero_point"]
    graph.node.insert(0, columns)


def _gates(values: torch.Tensor | torch.nn.Module) -> NDArray[Any]:
    """Reorder gates along the first axis: PyTorch has i, f, g, o, ONNX i, o, f, g."""
    i, f, g, o = np.split(as_array(values), 4)
    return np.concatenate([i, o, f, g])
