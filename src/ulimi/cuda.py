"""The training step on an NVIDIA GPU: one layer on cuDNN as it wants its weights, and the step as a CUDA graph.

What a small recurrent network costs on a large GPU is not arithmetic. A window of 70 steps through three layers is some
thousand kernels of a few microseconds, which Python cannot launch as fast as they run: hence the graphs. cuDNN wants
the weights of a layer in one block, which a dropped matrix is never part of: hence `lstm`, which writes the block
itself, in the type that the products are computed in and at a size that the matrix units like.

Legend: B streams, T time steps, I input, H hidden. It knows torch and its own arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""what training may compute products in; weights and gradients stay float32, on a GPU activations and state, too"""

LSTM_MODE = 2
"""cuDNN's number for an LSTM, as PyTorch passes it on"""

Step = Callable[[Tensor, Tensor, list[tuple[Tensor, Tensor]]], tuple[Tensor, list[tuple[Tensor, Tensor]]]]
"""(inputs (B, T), targets (B, T), state) -> (loss, new state); leaves gradients in the parameters"""


def has_cudnn(device: torch.device) -> bool:
    """Tell whether this is a device for this module: AMD's are called cuda, too, and have no cuDNN."""
    return device.type == "cuda" and torch.version.hip is None


def lstm(
    x_BTI: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    mask_hh: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Do what a batch-first `nn.LSTM` of one layer does, on cuDNN, with weights that lie anywhere.

    Inside `torch.autocast` the products are computed in its type; state, outputs and gradients stay float32. Sizes are
    padded to multiples of 8 inside, which the matrix units want; padded units are zero for ever.

    Args:
        x_BTI: inputs, (B, T, I).
        state: (h, c), each (1, B, H), or None for zeros.
        weight_ih: (4H, I), gates in PyTorch's order i, f, g, o; as the others.
        weight_hh: (4H, H), undropped.
        bias_ih: (4H,).
        bias_hh: (4H,).
        mask_hh: DropConnect on `weight_hh`.

    Returns:
        (B, T, H), and the last state.
    """
    if state is None:
        h = c = x_BTI.new_zeros(1, x_BTI.size(0), weight_hh.size(1))
    else:
        h, c = state
    dropped_hh = weight_hh if mask_hh is None else weight_hh * mask_hh
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_BTI.dtype
    with torch.autocast("cuda", enabled=False):
        y_BTH, h, c = _Layer.apply(x_BTI, h, c, weight_ih, dropped_hh, bias_ih, bias_hh, dtype)  # type: ignore[no-untyped-call]
    return y_BTH, (h, c)


class _Layer(torch.autograd.Function):
    """The calls of cuDNN, around which `nn.LSTM` has no room for a dropped matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        h_1BH: Tensor,
        c_1BH: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, input_size = x_BTI.shape
        hidden_size = w_hh.size(1)
        I, H = _padded(input_size), _padded(hidden_size)  # noqa: E741
        buffer, views = _weight_buffer(w_ih, w_hh, b_ih, b_hh, I, H, dtype)
        x_TBI = x_BTI.new_zeros(T, B, I, dtype=dtype)
        x_TBI[..., :input_size] = x_BTI.transpose(0, 1)
        h, c = (F.pad(state, (0, H - hidden_size)).to(dtype).contiguous() for state in (h_1BH, c_1BH))
        y_TBH, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(
            x_TBI, views, 4, buffer, h, c, LSTM_MODE, H, 0, 1, False, 0.0, True, False, [], None
        )
        ctx.save_for_backward(x_TBI, h, c, y_TBH, reserve, buffer, *views)
        ctx.sizes = (input_size, hidden_size, H)
        return (
            y_TBH[..., :hidden_size].transpose(0, 1).to(x_BTI.dtype, copy=True, memory_format=torch.contiguous_format),
            h_n[..., :hidden_size].to(h_1BH.dtype, copy=True, memory_format=torch.contiguous_format),
            c_n[..., :hidden_size].to(c_1BH.dtype, copy=True, memory_format=torch.contiguous_format),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTH: Tensor, dh_1BH: Tensor, dc_1BH: Tensor) -> tuple[Tensor | None, ...]:
        x_TBI, h, c, y_TBH, reserve, buffer, *views = ctx.saved_tensors
        input_size, hidden_size, H = ctx.sizes
        dtype, wide = x_TBI.dtype, dy_BTH.dtype
        scale = _gradient_scale((dy_BTH, dh_1BH, dc_1BH)) if dtype == torch.float16 else None
        if scale is not None:
            dy_BTH, dh_1BH, dc_1BH = dy_BTH * scale, dh_1BH * scale, dc_1BH * scale

        def unscaled(gradient: Tensor) -> Tensor:
            return gradient.to(wide) if scale is None else gradient.to(wide).div_(scale)

        dy_TBH = torch.zeros_like(y_TBH)
        dy_TBH[..., :hidden_size] = dy_BTH.transpose(0, 1)
        dh, dc = (F.pad(grad, (0, H - hidden_size)).to(dtype).contiguous() for grad in (dh_1BH, dc_1BH))
        need_x, need_h, need_c = ctx.needs_input_grad[:3]
        dx_TBI, dh_0, dc_0, weights = torch.ops.aten._cudnn_rnn_backward(
            x_TBI, views, 4, buffer, h, c, y_TBH, dy_TBH, dh, dc,
            LSTM_MODE, H, 0, 1, False, 0.0, True, False, [], None, reserve, [need_x, need_h, need_c, True],
        )  # fmt: skip
        dw_ih, dw_hh, db_ih, db_hh = weights
        return (
            unscaled(dx_TBI[..., :input_size].transpose(0, 1)) if need_x else None,
            unscaled(dh_0[..., :hidden_size]) if need_h else None,
            unscaled(dc_0[..., :hidden_size]) if need_c else None,
            unscaled(dw_ih.view(4, H, -1)[:, :hidden_size, :input_size].flatten(0, 1)),
            unscaled(dw_hh.view(4, H, H)[:, :hidden_size, :hidden_size].flatten(0, 1)),
            unscaled(db_ih.view(4, H)[:, :hidden_size].flatten()),
            unscaled(db_hh.view(4, H)[:, :hidden_size].flatten()),
            None,
        )


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _gradient_scale(gradients: Sequence[Tensor]) -> Tensor:
    """Give what gradients are multiplied by so that the largest is about 1: small ones would vanish in float16."""
    largest = torch.stack([gradient.abs().amax() for gradient in gradients]).amax()
    # A power of two changes no digit; no gradient at all keeps the scale 1.
    return torch.where(largest > 0, torch.exp2(-torch.ceil(torch.log2(largest))), torch.ones_like(largest))


def _weight_buffer(
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, input_size: int, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Lay weights out as cuDNN wants them; give the block, and its four parts."""
    total, places = _layout(input_size, hidden_size, dtype, w_ih.device)
    padded = w_ih.size(1) != input_size or w_hh.size(1) != hidden_size
    buffer = (torch.zeros if padded else torch.empty)(total, dtype=dtype, device=w_ih.device)
    views = [buffer[start : start + size] for start, size in places]
    H = w_hh.size(1)
    views[0].view(4, hidden_size, input_size)[:, :H, : w_ih.size(1)] = w_ih.view(4, H, -1)
    views[1].view(4, hidden_size, hidden_size)[:, :H, :H] = w_hh.view(4, H, H)
    for view, bias in zip(views[2:], (b_ih, b_hh), strict=True):
        view.view(4, hidden_size)[:, :H] = bias.view(4, H)
    shapes = _shapes(input_size, hidden_size)
    return buffer, [view.view(shape) for view, shape in zip(views, shapes, strict=True)]


def _shapes(input_size: int, hidden_size: int) -> list[tuple[int, ...]]:
    """Of a layer's four parts: both matrices, both biases."""
    gates = 4 * hidden_size
    return [(gates, input_size), (gates, hidden_size), (gates,), (gates,)]


@lru_cache
def _layout(
    input_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, list[tuple[int, int]]]:
    """Ask cuDNN for the size of a layer's block, and where each part lies in it: (start, size)."""
    parts = [torch.zeros(shape, dtype=dtype, device=device) for shape in _shapes(input_size, hidden_size)]
    buffer = torch.ops.aten._cudnn_rnn_flatten_weight(
        parts, 4, input_size, LSTM_MODE, hidden_size, 0, 1, False, False
    )  # moves the parts into the block
    start = buffer.data_ptr()
    return buffer.numel(), [((part.data_ptr() - start) // part.element_size(), part.numel()) for part in parts]


@contextmanager
def product_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Compute products inside the block in one of `PRECISIONS`, on this device."""
    if precision in ("bf16", "fp16"):
        # Without a cache of cast weights: a graph would go on with those of the step that it was recorded in.
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.autocast(device.type, dtype, cache_enabled=False):
            yield
        return
    if device.type != "cuda":
        yield
        return
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


class GraphedStep:
    """A training step as CUDA graphs, one for each length of window; the first of a length runs without one.

    A graph is recorded when a length comes for the second time. All share one pool of memory. The state lives in this
    object's own tensors, which it also returns: read them before the next call.

    Args:
        step: forward and backward pass, and whatever else needs no look at a value; it must make new gradients, not
            add to old ones.
        parameters: those that get gradients.
        rng: generator that `step` draws from.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], rng: torch.Generator) -> None:
        self._step = step
        self._parameters = parameters
        self._rng = rng
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._pool: Any = None
        self._state: list[tuple[Tensor, Tensor]] | None = None
        self._gradients: list[Tensor] = []

    def __call__(
        self, inputs_BT: Tensor, targets_BT: Tensor, state: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Do the step for these windows, (B, T), on the device."""
        with torch.cuda.device(inputs_BT.device):  # a graph records a stream of the current one alone
            return self._do(inputs_BT, targets_BT, state)

    def _do(
        self, inputs_BT: Tensor, targets_BT: Tensor, state: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        shape = tuple(inputs_BT.shape)
        if shape not in self._seen:
            # Libraries set themselves up, which no graph may record.
            self._seen.add(shape)
            return self._step(inputs_BT, targets_BT, state)
        if self._state is None:
            self._state = [(h.clone(), c.clone()) for h, c in state]
            self._gradients = [torch.empty_like(p) for p in self._parameters]
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        elif state is not self._state:
            self._load_state(self._state, state)
        if shape not in self._graphs:
            self._graphs[shape] = self._record(inputs_BT, targets_BT)
        graph, own_inputs, own_targets, loss = self._graphs[shape]
        own_inputs.copy_(inputs_BT)
        own_targets.copy_(targets_BT)
        graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss, self._state

    def _record(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        assert self._state is not None
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._rng)
        inputs_BT, targets_BT = inputs_BT.clone(), targets_BT.clone()
        for parameter in self._parameters:
            parameter.grad = None
        # torch.cuda.graph would do, but it empties the cache of memory each time.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                loss, state = self._step(inputs_BT, targets_BT, self._state)
                torch._foreach_copy_(self._gradients, [p.grad for p in self._parameters if p.grad is not None])
                self._load_state(self._state, state)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, inputs_BT, targets_BT, loss

    @staticmethod
    def _load_state(own: list[tuple[Tensor, Tensor]], new: list[tuple[Tensor, Tensor]]) -> None:
        for own_layer, new_layer in zip(own, new, strict=True):
            for mine, given in zip(own_layer, new_layer, strict=True):
                mine.copy_(given)
