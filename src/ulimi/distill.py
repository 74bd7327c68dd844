"""Distillation: a network learns another's probabilities beside the text.

    q = (1 - w) one-hot(next token) + w p_teacher(. | context)        loss = cross entropy of the pupil against q

Hinton, Vinyals & Dean (2015), "Distilling the knowledge in a neural network", at temperature 1; for sequences Kim &
Rush (2016), word-level. The text names one next token at each place, the teacher says something of all of them; on
little text a pupil may come out better than teachers of its own size (Furlanello et al. 2018, "Born-again neural
networks"; Timiryasov & Tastet 2023, "Baby Llama").

Legend: B streams, T time steps, N = B T predictions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulimi.cpu import product
from ulimi.engine import load_model
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM, State
from ulimi.run import AWD_LSTM, Run


class Teacher:
    """One network or several, frozen, that read the training streams along with the pupil.

    Args:
        networks: in evaluation mode they predict, whatever dropouts they were trained with.
        shares: of each in the mean of their probabilities; they add up to 1.
    """

    def __init__(self, networks: Sequence[AWDLSTM], shares: Sequence[float]) -> None:
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.shares = list(shares)

    def initial_state(self, batch_size: int) -> State:
        """Zeros for `batch_size` streams: the layers of all networks, one after the other."""
        return [layer for network in self.networks for layer in network.initial_state(batch_size)]

    def read(self, tokens_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Read a window: give the probabilities after each token, (N, V) float32, and the new state."""
        probs_NV: Tensor | None = None
        new_state: State = []
        for network, share in zip(self.networks, self.shares, strict=True):
            # Not under no_grad: with gradients on, and none of its own to keep, a layer takes its fast way.
            out = network.features(tokens_BT, state[len(new_state) : len(new_state) + len(network.layers)])
            new_state += out.state
            hidden_NE, head = out.dropped.flatten(0, 1), network.lm_head
            decode = F.linear if hidden_NE.is_cuda else _decode
            part_NV = torch.softmax(decode(hidden_NE, head.weight, head.bias).float(), dim=1).mul_(share)
            probs_NV = part_NV if probs_NV is None else probs_NV.add_(part_NV)
        assert probs_NV is not None
        return probs_NV, new_state


def _decode(hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor) -> Tensor:
    return product(hidden_NE.to(weight_VE.dtype), weight_VE.t(), bias_V)


def teacher_networks(run: Run) -> list[tuple[Run, float]]:
    """Give the networks of a teacher and the share of each: itself alone, or what of a mixture are networks.

    Raises:
        UlimiError: there is none, or one without float weights, or a sparse one.
    """
    networks, weights = run.networks("--teacher"), [1.0]
    if members := run.members():
        weights = [w for member, w in zip(members, run.config["weights"], strict=True) if member.kind == AWD_LSTM]
    for network in networks:
        if network.alpha != 1:
            raise UlimiError(
                f"--teacher {run.dir}: {network.dir} is sparse ({network.alpha:g}-entmax); a teacher must leave no "
                "token without probability: loss.kind = cross_entropy"
            )
    return [(network, weight / sum(weights)) for network, weight in zip(networks, weights, strict=True)]


def load_teacher(run: Run, device: torch.device) -> Teacher:
    """Load the networks of a run, as `teacher_networks` gives them."""
    networks = teacher_networks(run)
    return Teacher([load_model(network, device) for network, _ in networks], [share for _, share in networks])


def describe_teacher(run: Run) -> dict[str, Any]:
    """Give what meta.json says of a teacher: where it is, and which weights."""
    networks = teacher_networks(run)
    return {"path": str(run.dir.resolve()), "weights_sha256": [network.weights_sha256 for network, _ in networks]}
