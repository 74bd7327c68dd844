"""The Mogrifier LSTM of Melis, Kočiský & Blunsom 2020, "Mogrifier LSTM" (arXiv 1909.01792): one layer's passes.

Before each step the input x and the state h of the step before scale one another, in turn, round by round (eq. 1, 2):

    x = 2 sigmoid(Q1 h) * x,   h = 2 sigmoid(R2 x) * h,   x = 2 sigmoid(Q3 h) * x,   ...

and an ordinary LSTM step reads what comes out. Each matrix is a product of two of low rank, as in the paper's models.
So the input's products can no longer be made for all steps at once, and no cuDNN kernel knows this layer: `reference`
goes step by step through PyTorch's operators, on any device and in any precision. On a CPU `lstm` does the same in
float32 or bfloat16 with the passes of `ulimi.cpu`, and its gradients by hand: all that can wait for the end of the
window is one product then.

Shape letters: as in `ulimi.cpu`, K rank; M the width of what a round scales, S that of what it looks at (I and H, or
H and I).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulimi.cpu import (
    drop,
    incoming_gradients,
    kernels,
    make_room,
    product,
    right_factor,
    rounded,
    transpose,
    weight_gradients,
)

Round = tuple[Tensor, Tensor]
"""its matrices, (K, S) and (M, K)"""


def reference(
    x_BTI: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih_GI: Tensor,
    weight_hh_GH: Tensor,
    bias_G: Tensor,
    rounds: Sequence[Round],
    on_low: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a layer step by step.

    Args:
        x_BTI: inputs, (B, T, I).
        state: (h, c), each (1, B, H).
        weight_ih_GI: in the form that `nn.LSTM` gives it.
        weight_hh_GH: likewise; dropped already, if at all.
        bias_G: the sum of both biases.
        rounds: the first of which scales x.
        on_low: told of each round, at each step, its number and what its first matrix gives, (B, K).

    Returns:
        (B, T, H), and the last state.
    """
    h_BH, c_BH = state[0][0], state[1][0]
    outputs = []
    if torch.is_autocast_enabled(x_BTI.device.type):
        # Once, where autocast would do it at each step.
        dtype = torch.get_autocast_dtype(x_BTI.device.type)
        weight_ih_GI, weight_hh_GH, bias_G = (w.to(dtype) for w in (weight_ih_GI, weight_hh_GH, bias_G))
        rounds = [(down_KS.to(dtype), up_MK.to(dtype)) for down_KS, up_MK in rounds]
    for x_BI in x_BTI.unbind(1):
        for r, (down_KS, up_MK) in enumerate(rounds):
            scales_x = r % 2 == 0
            low_BK = F.linear(h_BH if scales_x else x_BI, down_KS)
            if on_low is not None:
                on_low(r, low_BK)
            scale_BM = 2 * torch.sigmoid(F.linear(low_BK, up_MK))
            if scales_x:
                x_BI = x_BI * scale_BM
            else:
                h_BH = h_BH * scale_BM
        gates_BG = F.linear(x_BI, weight_ih_GI, bias_G) + F.linear(h_BH, weight_hh_GH)
        i_BH, f_BH, g_BH, o_BH = gates_BG.chunk(4, dim=1)
        c_BH = f_BH.sigmoid() * c_BH + i_BH.sigmoid() * g_BH.tanh()
        h_BH = o_BH.sigmoid() * c_BH.tanh()
        outputs.append(h_BH)
    return torch.stack(outputs, dim=1), (h_BH[None], c_BH[None])


def lstm(
    x_BTI: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih_GI: Tensor,
    weight_hh_GH: Tensor,
    bias_G: Tensor,
    rounds: Sequence[Round],
    mask_GH: Tensor | None = None,
    half: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Do what `reference` does, in float32 on a CPU; gradients reach all that it reads, once.

    Args:
        x_BTI: as of `reference`, and so the others.
        state: likewise.
        weight_ih_GI: likewise.
        weight_hh_GH: the recurrent matrix, undropped.
        bias_G: as of `reference`.
        rounds: likewise.
        mask_GH: DropConnect on `weight_hh_GH`: zeros, and one other number. It gets no gradient.
        half: round what is multiplied to bfloat16, see `ulimi.cpu.product`; the rounds of a step are float32 even so.

    Returns:
        (B, T, H), the memory of which has time first; and the last state.
    """
    flat = [matrix for matrices in rounds for matrix in matrices]
    out_TBH, h_BH, c_BH = _Mogrifier.apply(  # type: ignore[no-untyped-call]
        x_BTI.transpose(0, 1), state[0][0], state[1][0], weight_ih_GI, weight_hh_GH, bias_G, mask_GH, half, *flat
    )
    return out_TBH.transpose(0, 1), (h_BH[None], c_BH[None])


class _Mogrifier(torch.autograd.Function):
    """Memory: the LSTM's gates of all steps, which become their own gradients, outputs, cells, and the sigmoids.

    On the way backward, of each round, also what it made and the slope of its sigmoids.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weight_ih_GI: Tensor, weight_hh_GH: Tensor, bias_G: Tensor,
        mask_GH: Tensor | None, half: bool, *flat: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x_TBI = x_TBI.contiguous()
        T, B, _ = x_TBI.shape
        hidden_SBH, cell_SBH = make_room(x_TBI, h_BH, c_BH)
        gates_TBG = x_TBI.new_empty(T, B, weight_hh_GH.size(0))
        sigmoids = [x_TBI.new_empty(T, B, up_MK.size(0)) for up_MK in flat[1::2]]
        kept_GH, ctx.scale = (None, None) if mask_GH is None else (mask_GH != 0, mask_GH.amax())
        times_ih = right_factor(weight_ih_GI.t(), B, half)
        times_hh = right_factor(drop(weight_hh_GH, kept_GH, ctx.scale).t(), B, half)
        # So small that rounding, or a call of oneDNN, would take longer than the product.
        rounds = [
            (down_KS.t().contiguous(), up_MK.t().contiguous(), sigmoids_TBM.unbind())
            for down_KS, up_MK, sigmoids_TBM in zip(flat[::2], flat[1::2], sigmoids, strict=True)
        ]
        forward = kernels().forward
        hidden, cell = hidden_SBH.unbind(), cell_SBH.unbind()
        for t, (x_BI, gates_BG) in enumerate(zip(x_TBI.unbind(), gates_TBG.unbind(), strict=True)):
            now_BH = hidden[t]
            for r, (down, up, sigmoid) in enumerate(rounds):
                s_BM = torch.sigmoid(torch.mm(torch.mm(x_BI if r % 2 else now_BH, down), up), out=sigmoid[t])
                if r % 2:
                    now_BH = (now_BH * s_BM).mul_(2)
                else:
                    x_BI = (x_BI * s_BM).mul_(2)
            torch.add(times_ih(x_BI), bias_G, out=gates_BG)
            forward(gates_BG, times_hh(now_BH), cell[t], cell[t + 1], hidden[t + 1])
        ctx.gates_TBG, ctx.half = gates_TBG, half
        ctx.save_for_backward(x_TBI, hidden_SBH, cell_SBH, weight_ih_GI, weight_hh_GH, kept_GH, *sigmoids, *flat)
        ctx.set_materialize_grads(False)
        # The last state is a copy: it stays for the next window, and would keep all of this one.
        return hidden_SBH[1:], hidden_SBH[-1].clone(), cell_SBH[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TBH: Tensor | None, grad_h_BH: Tensor | None, grad_c_BH: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TBI, hidden_SBH, cell_SBH, weight_ih_GI, weight_hh_GH, kept_GH, *saved = ctx.saved_tensors
        gates_TBG, ctx.gates_TBG, half = ctx.gates_TBG, None, ctx.half
        if gates_TBG is None:
            raise RuntimeError("a Mogrifier layer goes backward once: its gates have become their gradients")
        num_rounds = len(saved) // 3
        sigmoids, flat = saved[:num_rounds], saved[num_rounds:]
        T, B, _ = x_TBI.shape
        grads, grad_h_BH, grad_c_BH = incoming_gradients(cell_SBH, grad_TBH, grad_h_BH, grad_c_BH)
        # x and h of all steps after each round; with y = 2 sigmoid(z) y', dz = dy y (1 - sigmoid(z)).
        x_NI, h_NH = x_TBI.flatten(0, 1), hidden_SBH[:-1].flatten(0, 1)
        looked_at: list[Tensor] = []
        slopes: list[Tensor] = []
        for r, s_TBM in enumerate(sigmoids):
            looked_at.append(x_NI if r % 2 else h_NH)
            result_NM = ((h_NH if r % 2 else x_NI) * s_TBM.flatten(0, 1)).mul_(2)
            slopes.append((1 - s_TBM).mul_(result_NM.view_as(s_TBM)))
            x_NI, h_NH = (x_NI, result_NM) if r % 2 else (result_NM, h_NH)
        grad_z, grad_u = slopes, [x_TBI.new_empty(T, B, len(down_KS)) for down_KS in flat[::2]]
        grad_x_TBI = torch.empty_like(x_TBI)
        times_ih = right_factor(weight_ih_GI, B, half)
        times_hh = right_factor(drop(weight_hh_GH, kept_GH, ctx.scale), B, half)
        backward = kernels().backward
        for t in reversed(range(T)):
            backward(gates_TBG[t], cell_SBH[t], cell_SBH[t + 1], grads[t], grad_h_BH, grad_c_BH)
            grad_x_BI, grad_h_BH = times_ih(gates_TBG[t]), times_hh(gates_TBG[t])
            for r in reversed(range(num_rounds)):
                grad_BM = grad_h_BH if r % 2 else grad_x_BI
                grad_z_BM = grad_z[r][t].mul_(grad_BM)
                grad_u_BK = torch.mm(grad_z_BM, flat[2 * r + 1], out=grad_u[r][t])
                grad_BM.mul_(sigmoids[r][t]).mul_(2)
                (grad_x_BI if r % 2 else grad_h_BH).addmm_(grad_u_BK, flat[2 * r])
            grad_x_TBI[t] = grad_x_BI
        del times_ih, times_hh

        grad_flat: list[Tensor] = []
        for down_KS, z, u, y_NS in zip(flat[::2], grad_z, grad_u, looked_at, strict=True):
            u_NK = product(y_NS, rounded(down_KS, half).t())
            grad_flat += [
                product(transpose(u.flatten(0, 1)), rounded(y_NS, half)),
                product(transpose(z.flatten(0, 1)), rounded(u_NK, half)),
            ]
        grad_ih_GI, grad_hh_GH = weight_gradients(gates_TBG, x_NI, h_NH, kept_GH, ctx.scale, half)
        grad_bias_G = gates_TBG.flatten(0, 1).sum(dim=0)
        return grad_x_TBI, grad_h_BH, grad_c_BH, grad_ih_GI, grad_hh_GH, grad_bias_G, None, None, *grad_flat
