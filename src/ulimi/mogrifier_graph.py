"""A network of Mogrifier layers as an ONNX graph, in fp32 or int8; inputs and outputs are those of `ulimi.export`.

No ONNX operator is such a layer: a Scan goes over the steps, and its body holds all layers. In int8 each product's left
factor is rounded by a scale that is known beforehand, since all that is multiplied is bounded: an LSTM's output lies
between -1 and 1, a round at most doubles what it scales (of more than two, what is beyond `LARGEST_SCALE` is cut off),
and what lies between the two matrices of a round is looked at beforehand, on some text. So what a row gives depends on
no other row, to the last bit, as in the graphs of `ulimi.export.fix_scales`.

Source of the operators' shapes: the ONNX specification, operators Scan and QuantizeLinear; ONNX Runtime's list of
contributed operators, MatMulIntegerToFloat.
"""

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ulimi import mogrifier
from ulimi.engine import CONSTANT_SCALES
from ulimi.model import AWDLSTM

OPSET = 17
IR_VERSION = 9
MICROSOFT = "com.microsoft"
"""operators of ONNX Runtime's own"""
LARGEST_SCALE = 4.0
"""of an int8 factor, as a multiple of what it was before the rounds"""
ROOM = 1.5
"""for what lies between two matrices, as a multiple of the largest that some text showed; beyond it is cut off"""


def build_mogrifier_graph(
    model: AWDLSTM, weights_sha256: str, int8_by: NDArray[np.int64] | None = None
) -> onnx.ModelProto:
    """Write the network, as it is in evaluation mode, as an ONNX graph.

    Args:
        model: with `mogrifier_rounds`.
        weights_sha256: of model.safetensors; kept in the file, so that a graph of other weights is noticed.
        int8_by: round weights, and what they are multiplied by, to int8; ids of some text of the model's kind, (B, T),
            that show how large the latter become.
    """
    return _Graph(None if int8_by is None else low_sizes(model, int8_by)).build(model, weights_sha256)


def low_sizes(model: AWDLSTM, ids_BT: NDArray[np.int64]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """Give the largest sizes, (K,), of what the first matrix of each layer's rounds gives on a text."""
    sizes: dict[tuple[int, int], torch.Tensor] = {}
    with torch.inference_mode():
        x_BTI = model.model.embed_tokens(torch.from_numpy(ids_BT))
        for i, (layer, state) in enumerate(zip(model.layers, model.initial_state(len(ids_BT)), strict=True)):

            def look(r: int, low_BK: torch.Tensor, i: int = i) -> None:
                largest_K = low_BK.abs().amax(dim=0)
                sizes[i, r] = torch.maximum(sizes[i, r], largest_K) if (i, r) in sizes else largest_K

            weight_ih, weight_hh, bias_ih, bias_hh = layer.lstm.all_weights[0]
            x_BTI, _ = mogrifier.reference(
                x_BTI, state, weight_ih, weight_hh, bias_ih + bias_hh, layer.round_matrices(), look
            )
    return {key: largest_K.numpy() for key, largest_K in sizes.items()}


class _Graph:
    def __init__(self, low_sizes: dict[tuple[int, int], NDArray[np.float32]] | None) -> None:
        self._int8 = low_sizes is not None
        self._low_sizes = low_sizes or {}
        self._weights: dict[str, onnx.TensorProto] = {}
        self._outer: list[onnx.NodeProto] = []
        self._body: list[onnx.NodeProto] = []
        self._nodes = self._outer
        self._num_names = 0

    def build(self, model: AWDLSTM, weights_sha256: str) -> onnx.ModelProto:
        shapes: dict[str, int] = {}
        for i, layer in enumerate(model.layers):
            shapes |= {f"{part}{i}": layer.lstm.hidden_size for part in "hc"}
        first = self._weight("first", np.array([0], dtype=np.int64))
        table = as_array(model.model.embed_tokens.weight)
        x = self._look_up(table, model.tie_weights)
        states = [self._node("Squeeze", [name, first]) for name in shapes]
        self._nodes = self._body
        y, bound = "x_t", float(np.abs(table).max())
        after: dict[str, str] = {}
        for i, layer in enumerate(model.layers):
            y, after[f"c{i}"] = self._layer(i, layer, y, bound)
            after[f"h{i}"] = y
            bound = 1.0
        # An output of a graph has a name of its own.
        body_outputs = [self._node("Identity", [after[name]]) for name in shapes] + [self._node("Identity", [y])]
        self._nodes = self._outer

        widths = [*shapes.values(), model.lm_head.in_features]
        body = helper.make_graph(
            self._body,
            "step",
            [_rows(f"{name}_t", size) for name, size in {**shapes, "x": table.shape[1]}.items()],
            [_rows(name, size) for name, size in zip(body_outputs, widths, strict=True)],
        )
        finals, read = [f"{name}_last" for name in shapes], "read"
        scan = helper.make_node("Scan", [*states, x], [*finals, read], body=body, num_scan_inputs=1)
        self._outer.append(scan)
        for name, final in zip(shapes, finals, strict=True):
            self._outer.append(helper.make_node("Unsqueeze", [final, first], [f"{name}_out"]))
        bias = self._weight("bias", as_array(model.lm_head.bias))
        scores = self._product(read, "decoder", as_array(model.lm_head.weight).T, 1.0, bias=bias)
        self._outer.append(helper.make_node("Identity", [scores], ["logits"]))

        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["time", "batch"])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["time", "batch", model.vocab_size])
        state: dict[str, list[str | int | None]] = {name: [1, "batch", size] for name, size in shapes.items()}
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in state.items()]
        outputs = [
            helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, shape) for name, shape in state.items()
        ]
        graph = helper.make_graph(
            self._outer, "mogrifier", [ids, *inputs], [logits, *outputs], list(self._weights.values())
        )
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(MICROSOFT, 1)] * self._int8
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        helper.set_model_props(
            proto, {"weights_sha256": weights_sha256, **({CONSTANT_SCALES: "1"} if self._int8 else {})}
        )
        onnx.checker.check_model(proto)
        return proto

    def _layer(self, i: int, layer: Any, x: str, bound: float) -> tuple[str, str]:
        """Write one step of a layer; give the names of its output and its cell. `bound` is that of the input."""
        lstm = layer.lstm
        h, bounds = f"h{i}_t", {True: bound, False: 1.0}
        most = {kind: LARGEST_SCALE * value for kind, value in bounds.items()}
        # In int8 the 2 of a round's 2 sigmoid(z) waits until what it scaled is multiplied: a node less.
        waiting = {True: 1.0, False: 1.0}
        for r, (down_KS, up_MK) in enumerate(layer.round_matrices()):
            scales_x = r % 2 == 0
            looked_at, scaled = (h, x) if scales_x else (x, h)
            # In int8 what lies between is brought to between -1 and 1, and brought back by the second matrix.
            down_SK, up_KM = as_array(down_KS).T, as_array(up_MK).T
            if self._int8:
                size_K = np.maximum(ROOM * self._low_sizes[i, r], np.float32(1e-6))
                down_SK, up_KM = down_SK / size_K, up_KM * size_K[:, None]
            low = self._product(looked_at, f"d{i}_{r}", down_SK, bounds[not scales_x], waiting[not scales_x])
            scale = self._node("Sigmoid", [self._product(low, f"u{i}_{r}", up_KM, 1.0)])
            if self._int8:
                waiting[scales_x] *= 2
            else:
                scale = self._node("Mul", [scale, self._weight("two", np.float32(2))])
            result = self._node("Mul", [scaled, scale])
            x, h = (result, h) if scales_x else (x, result)
            bounds[scales_x] = min(2 * bounds[scales_x], most[scales_x])
        bias = self._weight(f"b{i}", as_array(lstm.bias_ih_l0) + as_array(lstm.bias_hh_l0))
        of_x = self._product(x, f"w{i}", as_array(lstm.weight_ih_l0).T, bounds[True], waiting[True], bias)
        of_h = self._product(h, f"r{i}", as_array(lstm.weight_hh_l0).T, bounds[False], waiting[False])
        gates = self._node("Add", [of_x, of_h])
        parts = [f"{name}{i}_gate" for name in "ifgo"]
        self._nodes.append(helper.make_node("Split", [gates], parts, axis=1))
        i_gate, f_gate, o_gate = (self._node("Sigmoid", [parts[k]]) for k in (0, 1, 3))
        new = self._node("Mul", [i_gate, self._node("Tanh", [parts[2]])])
        cell = self._node("Add", [self._node("Mul", [f_gate, f"c{i}_t"]), new])
        return self._node("Mul", [o_gate, self._node("Tanh", [cell])]), cell

    def _product(
        self,
        left: str,
        name: str,
        matrix_SM: NDArray[np.float32],
        bound: float,
        times: float = 1.0,
        bias: str | None = None,
    ) -> str:
        """Multiply `times` what is on the left by a matrix; in int8 that is taken to lie between -bound and bound."""
        if not self._int8:
            assert times == 1
            product = self._node("MatMul", [left, self._weight(name, matrix_SM)])
            return product if bias is None else self._node("Add", [product, bias])
        scale_M = np.maximum(np.abs(matrix_SM).max(axis=0), 1e-12).astype(np.float32) / 127
        step = bound / 127
        middle = self._weight("middle", np.array(128, dtype=np.uint8))
        read = self._weight(f"{name}_read", np.float32(step / times))
        rounded = self._node("QuantizeLinear", [left, read, middle])
        matrix = self._weight(name, np.rint(matrix_SM / scale_M).astype(np.int8))
        scales = [self._weight(f"{name}_left", np.float32(step)), self._weight(f"{name}_scale", scale_M)]
        # Whole numbers are added up in it, whose sums have no order, and then made floats at once.
        inputs = [rounded, matrix, *scales, middle, "", *([] if bias is None else [bias])]
        return self._node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

    def _look_up(self, table_VE: NDArray[np.float32], tied: bool) -> str:
        if not self._int8:
            return self._node("Gather", [self._weight("embedding", table_VE), "ids"])
        # Of a tied network these are the decoder's numbers.
        scale_V = np.maximum(np.abs(table_VE).max(axis=1), 1e-12).astype(np.float32) / 127
        whole_EV = np.rint(table_VE / scale_V[:, None]).astype(np.int8).T
        if tied:
            columns = self._node("Gather", [self._weight("decoder", whole_EV), "ids"], axis=1)
            whole = self._node("Transpose", [columns], perm=[1, 2, 0])
        else:
            whole = self._node("Gather", [self._weight("embedding", whole_EV.T), "ids"])
        scale = self._node("Gather", [self._weight("embedding_scale", scale_V[:, None]), "ids"])
        return self._node("Mul", [self._node("Cast", [whole], to=TensorProto.FLOAT), scale])

    def _node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        self._num_names += 1
        output = f"{operator}_{self._num_names}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _weight(self, name: str, values: Any) -> str:
        self._weights[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name


def _rows(name: str, size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])


def as_array(values: torch.Tensor | torch.nn.Module) -> NDArray[np.float32]:
    """Give a network's weights, which PyTorch's types call tensors or modules, as float32."""
    assert isinstance(values, torch.Tensor)
    matrix: NDArray[np.float32] = values.detach().float().cpu().numpy()
    return matrix
