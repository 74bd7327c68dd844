"""What training minimises: cross entropy, or the alpha-entmax loss of sparse models, with AR and TAR.

The entmax loss is a Fenchel-Young loss (Blondel et al. 2020; Peters, Niculae & Martins 2019): its gradient is
p - target, as that of the cross entropy, with entmax in the place of softmax. The `entmax` package of its authors sorts
the logits to find the threshold, which takes 12 times as long as Newton's method does here (2,240 rows of 4,000 logits,
nearly all in the support, as in a first epoch: 849 ms, and 73 ms; one core). The tests compare both.

Shape letters: N predictions, E what the decoder reads, V vocabulary. It knows torch and its own arguments.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulimi.cpu import own_precision, product, rounded
from ulimi.data import IGNORED
from ulimi.distribution import EPSILON, ITERATIONS

LOGITS_AT_ONCE = 2**21
"""of a cross entropy: so many stay in a cache"""

PARTS = 4
"""of the decoder's gradient, one after another"""

ROWS_AT_ONCE = 64
"""their logits stay in the cache from one pass of Newton's method to the next"""


def training_loss(
    hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor, kind: str, alpha: float,
    taught: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Mean loss of some predictions, decoder included: logits = hidden weight' + bias.

    Args:
        hidden_NE: what the decoder reads, (N, E).
        weight_VE: of the decoder, (V, E).
        bias_V: of the decoder, (V,).
        targets_N: (N,).
        kind: "cross_entropy" (nats) or "entmax".
        alpha: of entmax, above 1, at most 2.
        taught: tokens, (N, K), and what of each prediction is to be theirs, (N, K) float32; the target gets the rest.
            For the cross entropy alone.
    """
    loss: Tensor
    if taught is not None:
        ids_NK, parts_NK = taught
        rest_N1 = (1 - parts_NK.sum(dim=1, keepdim=True)).clamp_(min=0)  # parts are rounded, perhaps upwards
        taught = torch.cat([ids_NK, targets_N[:, None]], dim=1), torch.cat([parts_NK, rest_N1], dim=1)
    half = own_precision()
    is_known = half is False or (half is True and hidden_NE.dtype == torch.float32)
    # On a GPU memory is no concern and each further kernel is.
    if kind == "cross_entropy" and not hidden_NE.is_cuda and is_known:
        wanted = taught or (targets_N[:, None], torch.ones_like(targets_N[:, None]))
        with torch.autocast("cpu", enabled=False):
            loss = _LinearCrossEntropy.apply(hidden_NE, weight_VE, bias_V, *wanted, half)  # type: ignore[no-untyped-call]
        return loss
    logits_NV = F.linear(hidden_NE, weight_VE, bias_V)
    if kind == "cross_entropy":
        if taught is None:
            return F.cross_entropy(logits_NV, targets_N)
        wanted_NV = torch.zeros_like(logits_NV, dtype=torch.float32).scatter_add_(1, *taught)
        return F.cross_entropy(logits_NV.float(), wanted_NV)
    if logits_NV.dtype in (torch.bfloat16, torch.float16):
        logits_NV = logits_NV.float()  # a threshold wants more digits
    loss = _EntmaxLoss.apply(logits_NV, targets_N, alpha)  # type: ignore[no-untyped-call]
    return loss


def regularisation(raw_BTE: Tensor, dropped_BTE: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Activation and temporal activation regularisation, AR and TAR (sec. 4.6).

    The paper writes a norm; every implementation, and so every published figure, takes the mean square.

    Args:
        raw_BTE: last layer's output before dropout, (B, T, E), T >= 2: TAR is about its steps.
        dropped_BTE: the same after dropout: AR is about its size.
        alpha: weight of AR.
        beta: weight of TAR.
    """
    return alpha * dropped_BTE.pow(2).mean(), beta * raw_BTE.diff(dim=1).pow(2).mean()


def target_nats(logits_NV: Tensor, targets_N: Tensor, alpha: float) -> Tensor:
    """Total nats of the targets that are not `IGNORED`; smoothed by `EPSILON` where alpha is above 1.

    Args:
        logits_NV: (N, V).
        targets_N: (N,).
        alpha: what turns logits into probabilities: 1 (softmax) to 2 (sparsemax).
    """
    if alpha == 1:
        return F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORED)
    counted = targets_N != IGNORED
    probs_M = entmax(logits_NV[counted], alpha).gather(1, targets_N[counted, None])[:, 0].double()
    return (math.log1p(EPSILON * logits_NV.size(1)) - torch.log(probs_M + EPSILON)).sum()


def entmax(logits_NV: Tensor, alpha: float) -> Tensor:
    """Give the alpha-entmax probabilities (N, V) of logits (N, V); no gradient goes through.

    Args:
        logits_NV: finite.
        alpha: above 1, at most 2.
    """
    with torch.no_grad():
        return torch.cat([_entmax_rows(rows_MV, alpha) for rows_MV in torch.split(logits_NV.detach(), ROWS_AT_ONCE)])


def _entmax_rows(logits_MV: Tensor, alpha: float) -> Tensor:
    """Newton's method from below the threshold, see `ulimi.distribution`."""
    power = 1 / (alpha - 1)
    scaled_MV = (logits_MV - logits_MV.amax(dim=1, keepdim=True)).mul_(alpha - 1)
    threshold_M1 = torch.full_like(scaled_MV[:, :1], -1.0)
    smallest_step = 4 * torch.finfo(scaled_MV.dtype).eps
    for _ in range(ITERATIONS):
        above_MV = (scaled_MV - threshold_M1).clamp_(min=0)
        slope_MV = _power(above_MV, power - 1)
        excess_M1 = (slope_MV * above_MV).sum(dim=1, keepdim=True) - 1
        step_M1 = excess_M1 / (power * slope_MV.sum(dim=1, keepdim=True))
        # Rounding may have passed the threshold by a hair: there is no way back up the slope.
        threshold_M1 += step_M1.clamp_(min=0)
        if not (step_M1 > smallest_step).any():  # so written, neither NaN nor the lack of any row goes on for ever
            break
    probs_MV = _power((scaled_MV - threshold_M1).clamp_(min=0), power)
    return probs_MV.div_(probs_MV.sum(dim=1, keepdim=True))


def _power(x: Tensor, power: float) -> Tensor:
    """Raise numbers that are not negative to a power; 0 to the 0 is 0 here."""
    if power == 0:
        return (x > 0).to(x.dtype)
    return x if power == 1 else x.pow(power)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of softmax(hidden weight' + bias), a few rows at once: all logits are never in memory.

    The gradient of the logits, softmax - target, is there as soon as they are, so it is taken on the way forward. A
    row's target is one token, or K that each have a part of it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, ids_NK: Tensor, parts_NK: Tensor, half: bool
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        num_rows = max(1, LOGITS_AT_ONCE // weight_VE.size(0))
        grad_hidden_NE = torch.empty_like(hidden_NE) if needs_hidden else None
        grad_weight_VE = torch.zeros_like(weight_VE) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        nats_N = hidden_NE.new_empty(len(ids_NK))
        parts_NK = parts_NK.to(hidden_NE.dtype)
        weight_VE, rounded_NE = rounded(weight_VE, half), rounded(hidden_NE, half)
        for start in range(0, len(ids_NK), num_rows):
            rows = slice(start, start + num_rows)
            ids_MK, parts_MK = ids_NK[rows], parts_NK[rows]
            logits_MV = product(hidden_NE[rows], weight_VE.t(), bias_V)
            top_M1 = logits_MV.amax(dim=1, keepdim=True)
            of_target_M1 = (logits_MV.gather(1, ids_MK) * parts_MK).sum(dim=1, keepdim=True)
            probs_MV = torch.softmax(logits_MV, dim=1, out=logits_MV)
            nats_N[rows] = (top_M1 - probs_MV.amax(dim=1, keepdim=True).log() - of_target_M1)[:, 0]
            grad_MV = probs_MV.scatter_add_(1, ids_MK, -parts_MK)
            if grad_hidden_NE is not None:
                grad_hidden_NE[rows] = product(grad_MV, weight_VE)
            if grad_weight_VE is not None:
                # In parts: the gradient has to be transposed.
                for part_VE, grad_MP in zip(grad_weight_VE.chunk(PARTS), grad_MV.chunk(PARTS, dim=1), strict=True):
                    part_VE += product(grad_MP.t(), rounded_NE[rows])
            if grad_bias_V is not None:
                grad_bias_V += grad_MV.sum(dim=0)
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE, grad_bias_V)
        ctx.num_rows = len(ids_NK)
        return nats_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_output / ctx.num_rows
        return *[None if grad is None else grad * scale for grad in ctx.saved_tensors], None, None, None


class _EntmaxLoss(torch.autograd.Function):
    """Mean over rows of (p - target) . logits + (1 - sum p^alpha) / (alpha (alpha - 1)), where p = entmax(logits)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, alpha: float) -> Tensor:
        residual_NV = entmax(logits_NV, alpha)
        entropy_N = (1 - residual_NV.pow(alpha).sum(dim=1)) / (alpha * (alpha - 1))
        residual_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] -= 1
        ctx.save_for_backward(residual_NV)
        loss: Tensor = ((residual_NV * logits_NV).sum(dim=1) + entropy_N).mean()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (residual_NV,) = ctx.saved_tensors
        return residual_NV * (grad_output / len(residual_NV)), None, None
