"""What moves the weights: optimizers, learning rates, the running average and its trigger.

NT-ASGD (sec. 3 of arXiv 1708.02182) is plain SGD and, once the trigger has fired, a running mean of the iterates. It is
not built on `torch.optim.ASGD`, which updates its step size after the step, so that a rescaled learning rate acts one
step late, and which leaves the first iterate out of the mean; here we differ from Merity's code.

The other optimizers may have an average from their first step on, over about a last share of the steps so far. At a
constant rate it stands for the rate's decay, and, unlike that, is as good at each moment as the run can be by then.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ulimi.recipe import OptimRecipe


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.Optimizer:
    """Make the optimizer over all of the model's parameters, tied ones once."""
    if recipe.kind == "adamw":
        # Fused: one pass over the memory instead of ten, a fifth of the time.
        return torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay,
            fused=True,
        )  # fmt: skip
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)


def learning_rate(
    recipe: OptimRecipe, *, step: int, progress: float, epochs_done: int, window: int, bptt: int
) -> float:
    """Give the learning rate of one step.

    Args:
        recipe: base rate, drops, warm-up, cosine.
        step: steps done before this one.
        progress: share of the whole run's tokens done, in [0, 1].
        epochs_done: complete epochs.
        window: length of this very window, in tokens; a short one must not move the weights as far (sec. 4.1).
        bptt: the base length.
    """
    lr = recipe.lr * 0.1 ** sum(epochs_done >= epoch for epoch in recipe.lr_drops)
    if recipe.kind == "adamw":
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        lr *= recipe.final_lr_ratio + (1 - recipe.final_lr_ratio) * cosine
        if step < recipe.warmup_steps:
            lr *= (step + 1) / recipe.warmup_steps
    return lr * window / bptt if recipe.rescale_lr else lr


def non_monotonic(history: Sequence[float], newest: float, n: int) -> bool:
    """Tell whether validation has stopped falling: worse than the best of all but the last `n` (algorithm 1).

    Args:
        history: earlier validation losses, oldest first, without `newest`.
        newest: the loss just measured.
        n: the non-monotone interval.
    """
    return len(history) > n and newest > min(history[:-n])


class RunningAverage:
    """A mean of the weights after each step since it began (Polyak & Juditsky 1992).

    Args:
        model: whose weights.
        share: of the steps so far that counts. 1 is the plain mean. Below it the k-th iterate has a weight about
            proportional to k^(2/share - 2), and the mean is as old as the plain one of the last `share` of all steps
            would be (the "power function" average of Karras et al. 2024, arXiv 2312.02696, sec. 3.1).
    """

    def __init__(self, model: nn.Module, share: float = 1.0) -> None:
        self.num_iterates = 0
        self._model, self._share = model, share
        self.weights: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the mean."""
        self.num_iterates += 1
        parameters = [p.detach() for p in self._model.parameters()]
        of_newest = 1 - (1 - 1 / self.num_iterates) ** (2 / self._share - 1)
        torch._foreach_lerp_(list(self.weights.values()), parameters, of_newest)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the mean inside the block, and its own weights again after it.

        Values are exchanged in place: cuDNN keeps the buffer, and the optimizer the parameters.
        """
        assert self.num_iterates, "a mean of no iterates"
        own = {n: p.detach().clone() for n, p in self._model.named_parameters()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
