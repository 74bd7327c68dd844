"""A network's weights read back from its graph, where the float ones stayed behind: model.onnx, int8, of a release.

What trains on, adapts or teaches wants floats. Each number of the graph times its scale is a weight again, off by half
a step of int8 at most; the network that comes out computes nearly what the graph does (of which the activations are
rounded, too). This undoes `ulimi.export.build_graph`, `ulimi.export.fix_scales` and `ulimi.mogrifier_graph`.
"""

from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from ulimi.engine import FIXED_SCALES
from ulimi.errors import UlimiError

Matrix = NDArray[np.float32]


def read_graph_weights(path: Path, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
    """Give the weights that a graph was made of, as near as its numbers tell.

    Args:
        path: a model.onnx, as `ulimi.export` writes it, int8 or fp32.
        rng: for training: draws each weight evenly from all that int8 rounds to its number. Weights in the middle of
            their steps would all go back there when they are rounded again, and what little they had learnt with them.

    Returns:
        The tensors of model.safetensors, float32. In int8 the first matrix of a Mogrifier's round comes back divided by
        what brought it to the range of its scale, the second multiplied by the same: their product is what it was.

    Raises:
        UlimiError: it cannot be read, or is another graph than ours.
    """
    try:
        graph = _Graph(onnx.load(path), rng)
    except (OSError, DecodeError) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None
    try:
        return {name: torch.from_numpy(np.array(array)) for name, array in graph.weights().items()}
    except (LookupError, ValueError):
        raise UlimiError(
            f"{path}: is not a graph as this ulimi writes it, so that its weights cannot be told"
        ) from None


class _Graph:
    def __init__(self, proto: onnx.ModelProto, rng: np.random.Generator | None) -> None:
        self._rng = rng
        self._arrays = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
        # The two units that keep the scales, see `ulimi.export.fix_scales`.
        self._num_ends = 2 if any(prop.key == FIXED_SCALES for prop in proto.metadata_props) else 0

    def weights(self) -> dict[str, Matrix]:
        decoder_VH = self._without_ends(self._matrix("decoder")).T
        bias_V = self._arrays["bias"]
        if self._has("embedding"):
            embedding_VE = self._without_ends(self._matrix("embedding").T).T
        else:
            embedding_VE = decoder_VH
            # What the two ends add to each logit had been taken out of the bias.
            bias_V = bias_V + 2 * 127 * self._arrays["decoder_scale"] * bool(self._num_ends)
        weights = {"model.embed_tokens.weight": embedding_VE, "lm_head.bias": bias_V}
        if not np.array_equal(embedding_VE, decoder_VH):
            weights["lm_head.weight"] = decoder_VH
        for i in takewhile(lambda i: self._has(f"w{i}"), count()):
            layer = f"model.layers.{i}"
            # An operator LSTM has its matrices in a third dimension, one a direction.
            tensors = self._lstm(i) if self._matrix(f"w{i}").ndim == 3 else self._mogrifier(i)
            for name, array in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), tensors, strict=True):
                weights[f"{layer}.lstm.{name}_l0"] = array
            for r in takewhile(lambda r, i=i: self._has(f"d{i}_{r}"), count()):  # type: ignore[misc]
                for k, name in enumerate("du"):
                    weights[f"{layer}.rounds.{r}.{k}.weight"] = self._matrix(f"{name}{i}_{r}").T
        return weights

    def _lstm(self, i: int) -> tuple[Matrix, ...]:
        """(4H, I), (4H, H), (4H,), (4H,), with PyTorch's order of gates."""
        n = self._num_ends
        w, r, b = (self._matrix(f"{name}{i}")[0] for name in "wrb")
        if f"w{i}_quantized" in self._arrays:  # it has them turned
            w, r = w.T, r.T
        width = r.shape[1]
        # A layer's input ends with the two columns of the embedding, or with the two units of the layer before.
        w, r = (self._without_ends(matrix.T).T for matrix in (w, r))
        parts = [gate[: width - n] for array in (w, r, *np.split(b, 2)) for gate in np.split(array, 4)]
        # ONNX has i, o, f, g.
        return tuple(np.concatenate([parts[k + j] for j in (0, 2, 3, 1)]) for k in range(0, 16, 4))

    def _mogrifier(self, i: int) -> tuple[Matrix, ...]:
        bias = self._arrays[f"b{i}"]  # the sum of both
        return self._matrix(f"w{i}").T, self._matrix(f"r{i}").T, bias, np.zeros_like(bias)

    def _has(self, name: str) -> bool:
        return name in self._arrays or f"{name}_quantized" in self._arrays

    def _without_ends(self, matrix: Matrix) -> Matrix:
        return matrix[: len(matrix) - self._num_ends]

    def _matrix(self, name: str) -> Matrix:
        """Give a matrix as floats, whichever of the three ways the graph has it."""
        if f"{name}_quantized" in self._arrays:
            whole, scale, zero = (self._arrays[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
            exact: Matrix = (self._spread(whole) - zero.astype(np.float32)) * scale
            return exact
        array: Matrix = self._arrays[name]
        if array.dtype != np.int8:
            return array
        scaled: Matrix = self._spread(array) * self._arrays[f"{name}_scale"]
        return scaled

    def _spread(self, whole: NDArray[Any]) -> Matrix:
        if self._rng is None:
            return whole.astype(np.float32)
        return whole.astype(np.float32) + self._rng.random(whole.shape, dtype=np.float32) - np.float32(0.5)
