"""Distillation: a network learns another's probabilities beside the text.

    q = (1 - w) one-hot(next token) + w p_teacher(. | context)        loss = cross entropy of the pupil against q

Hinton, Vinyals & Dean (2015), "Distilling the knowledge in a neural network", at temperature 1; for sequences Kim &
Rush (2016), word-level. The text names one next token at each place, the teacher says something of all of them; on
little text a pupil may come out better than teachers of its own size (Furlanello et al. 2018, "Born-again neural
networks"; Timiryasov & Tastet 2023, "Baby Llama").

The teacher's state goes through the training streams as the pupil's does, and it has no dropout: it would say the same
in each epoch. So it reads them once, before, and of each place the `KEPT` most probable tokens are kept. What the
others had goes to the token of the text.

Legend: B streams, S tokens of a stream, T time steps, N = B T predictions, V vocabulary, K tokens kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ulimi.cpu import product
from ulimi.data import Ids
from ulimi.engine import load_model
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM, State
from ulimi.run import AWD_LSTM, Run

KEPT = 32
"""tokens of which a teacher's probability is kept; 6 bytes each"""

READING_WINDOW = 64
"""tokens that a teacher reads at once: what it says of them all is in memory for a moment, B x 64 x V numbers"""


@dataclass(frozen=True)
class Lessons:
    """What a teacher says after each token of the streams: its most probable tokens, on the pupil's device."""

    ids: Tensor
    """(B, S, K), int32"""
    probs: Tensor
    """(B, S, K), float16"""

    def window(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Give a window's ids, (N, K) int64, and probabilities, (N, K) float32."""
        part = slice(start, start + length)
        return self.ids[:, part].flatten(0, 1).long(), self.probs[:, part].flatten(0, 1).float()


class Teacher:
    """One network or several, frozen.

    Args:
        networks: in evaluation mode they predict, whatever dropouts they were trained with.
        shares: of each in the mean of their probabilities; they add up to 1.
    """

    def __init__(self, networks: Sequence[AWDLSTM], shares: Sequence[float]) -> None:
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.shares = list(shares)

    def read(self, tokens_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read a window: give the probabilities after each token, (N, V) float32, and the state of all networks."""
        probs_NV: Tensor | None = None
        new_state: State = []
        for network, share in zip(self.networks, self.shares, strict=True):
            own_state = None if state is None else state[len(new_state) : len(new_state) + len(network.layers)]
            # Not under no_grad: with gradients on, and none of its own to keep, a layer takes its fast way.
            out = network.features(tokens_BT, own_state)
            new_state += out.state
            hidden_NE, head = out.dropped.flatten(0, 1), network.lm_head
            if hidden_NE.is_cuda:
                logits_NV = F.linear(hidden_NE, head.weight, head.bias).float()
            else:
                logits_NV = product(hidden_NE.float(), head.weight.t(), head.bias)
            part_NV = torch.softmax(logits_NV, dim=1).mul_(share)
            probs_NV = part_NV if probs_NV is None else probs_NV.add_(part_NV)
        assert probs_NV is not None
        return probs_NV, new_state

    def read_streams(self, streams_BS: Ids, on_tokens: Callable[[int], None] = lambda done: None) -> Lessons:
        """Read all streams from their beginning.

        Args:
            streams_BS: (B, S).
            on_tokens: told how many tokens are done.
        """
        device = self.networks[0].lm_head.bias.device
        num_streams, length = streams_BS.shape
        num_kept = min(KEPT, self.networks[0].vocab_size)
        ids_BSK = torch.empty(num_streams, length, num_kept, dtype=torch.int32, device=device)
        probs_BSK = torch.empty(num_streams, length, num_kept, dtype=torch.float16, device=device)
        state: State | None = None
        for start in range(0, length, READING_WINDOW):
            part = slice(start, start + READING_WINDOW)
            tokens_BT = torch.from_numpy(streams_BS[:, part].astype(np.int64)).to(device)
            probs_NV, state = self.read(tokens_BT, state)
            top = probs_NV.topk(num_kept, dim=1)
            ids_BSK[:, part] = top.indices.view(*tokens_BT.shape, -1).int()
            probs_BSK[:, part] = top.values.view(*tokens_BT.shape, -1)
            on_tokens(num_streams * min(start + READING_WINDOW, length))
        return Lessons(ids_BSK, probs_BSK)


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
