"""Distillation: a network learns another's probabilities beside the text.

    q = (1 - w) one-hot(next token) + w p_teacher(. | context)        loss = cross entropy of the pupil against q

Hinton, Vinyals & Dean (2015), "Distilling the knowledge in a neural network", at temperature 1; for sequences Kim &
Rush (2016), word-level. The text names one next token at each place, the teacher says something of all of them; on
little text a pupil may come out better than teachers of its own size (Furlanello et al. 2018, "Born-again neural
networks"; Timiryasov & Tastet 2023, "Baby Llama").

The teacher's state goes through the training streams as the pupil's does, and it has no dropout: it would say the same
in each epoch. So it reads them once, before. Of each place the `KEPT` most probable tokens are kept, and `DRAWN` of the
others stand for all the rest, each for an equal part: they are drawn by their probabilities, so that what is learnt is
in expectation the teacher's whole distribution. To leave the rest out teaches a sharper one, and less (Anshumann et al.
2025, "Sparse logit sampling"; docs/experiments.md).

Legend: B streams, S tokens of a stream, T time steps, N = B T predictions, V vocabulary, K tokens kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulimi.data import Ids
from ulimi.distribution import log_probs
from ulimi.engine import Engine, EngineState, load_engine
from ulimi.run import Run

KEPT = 16
"""tokens of which a teacher's probability is kept; 6 bytes each"""

DRAWN = 16
"""further ones, for the rest; as many bytes"""

READING_WINDOW = 64
"""tokens that a teacher reads at once: what it says of them all is in memory for a moment, B x 64 x V numbers"""


@dataclass(frozen=True)
class Lessons:
    """What a teacher says after each token of the streams, on the pupil's device; a token may come more than once."""

    ids: Tensor
    """(B, S, K), int32"""
    probs: Tensor
    """(B, S, K), float16; the K of a place add up to 1"""

    def window(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Give a window's ids, (N, K) int64, and probabilities, (N, K) float32."""
        part = slice(start, start + length)
        return self.ids[:, part].flatten(0, 1).long(), self.probs[:, part].flatten(0, 1).float()


class Teacher:
    """One model or several, of whatever kind; nothing of them changes.

    Args:
        engines: of one vocabulary.
        shares: of each in the mean of their probabilities; they add up to 1.
    """

    def __init__(self, engines: Sequence[Engine], shares: Sequence[float]) -> None:
        self.engines = list(engines)
        self.shares = list(shares)

    def read(
        self, tokens_BT: NDArray[np.int64], states: list[EngineState], device: torch.device
    ) -> tuple[Tensor, list[EngineState]]:
        """Read a window: give the probabilities after each token, (B, T, V) on `device`, and the new states."""
        probs_BTV: Tensor | None = None
        new_states = []
        for engine, share, state in zip(self.engines, self.shares, states, strict=True):
            logits_BTV, new_state = engine.logits(tokens_BT, state)
            new_states.append(new_state)
            if engine.alpha == 1:
                part_BTV = torch.softmax(torch.tensor(logits_BTV, device=device), dim=2).mul_(share)
            else:
                part_BTV = torch.tensor(np.exp(log_probs(logits_BTV, engine.alpha)), device=device).float().mul_(share)
            probs_BTV = part_BTV if probs_BTV is None else probs_BTV.add_(part_BTV)
        assert probs_BTV is not None
        return probs_BTV, new_states

    def read_streams(
        self, streams_BS: Ids, rng: torch.Generator, on_tokens: Callable[[int], None] = lambda done: None
    ) -> Lessons:
        """Read all streams from their beginning.

        Args:
            streams_BS: (B, S).
            rng: draws the tokens that stand for the rest; what comes out is on its device.
            on_tokens: told how many tokens are done.
        """
        num_streams, length = streams_BS.shape
        shape, device = (num_streams, length, min(KEPT, self.engines[0].vocab_size) + DRAWN), rng.device
        lessons = Lessons(
            torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, dtype=torch.float16, device=device)
        )
        states = [engine.initial_state(num_streams) for engine in self.engines]
        for start in range(0, length, READING_WINDOW):
            part = slice(start, start + READING_WINDOW)
            probs_BTV, states = self.read(streams_BS[:, part].astype(np.int64), states, device)
            lessons.ids[:, part], lessons.probs[:, part] = _abridge(probs_BTV, rng)
            on_tokens(num_streams * min(start + READING_WINDOW, length))
        return lessons


def _abridge(probs_BTV: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give the ids, (B, T, K), and parts, (B, T, K), that stand for distributions; `probs_BTV` is written over."""
    num_tokens = probs_BTV.size(2)
    top = probs_BTV.topk(min(KEPT, num_tokens), dim=2)
    rest_BTV = probs_BTV.scatter_(2, top.indices, 0.0).cumsum_(dim=2)
    total_BT1 = rest_BTV[..., -1:].clone()
    # Systematic sampling: equal steps from one random start, so that no draw repeats what another stands for.
    start_BT1 = torch.rand(total_BT1.shape, generator=rng, device=rng.device)
    steps_D = torch.arange(DRAWN, device=rng.device)
    drawn_BTD = torch.searchsorted(rest_BTV, (start_BT1 + steps_D) * (total_BT1 / DRAWN), right=True)
    ids_BTK = torch.cat([top.indices, drawn_BTD.clamp_(max=num_tokens - 1)], dim=2)
    return ids_BTK, torch.cat([top.values, (total_BT1 / DRAWN).expand_as(drawn_BTD)], dim=2)


def _parts(run: Run) -> list[tuple[Run, float]]:
    """Give the models of a teacher and the share of each: itself alone, or the members of a mixture."""
    members = run.members()
    return list(zip(members, run.config["weights"], strict=True)) if members else [(run, 1.0)]


def load_teacher(run: Run, device: torch.device) -> Teacher:
    """Load the model of a run, or those of a mixture: on the CPU by its int8 graph, where there is one; it is faster.

    Raises:
        UlimiError: as of `ulimi.engine.load_engine`.
    """
    on_cpu = device.type == "cpu"
    parts = _parts(run)
    return Teacher(
        [load_engine(part, "cpu" if on_cpu else "auto", exact=not on_cpu) for part, _ in parts],
        [share for _, share in parts],
    )


def describe_teacher(run: Run) -> dict[str, Any]:
    """Give what meta.json says of a teacher: where it is, and the hashes of its weights, graphs and counts.

    All of them, whichever the engine takes: without the others it may be another one.

    Raises:
        UlimiError: the model is not there, or not yet.
    """
    return {"path": str(run.dir.resolve()), "sha256": run.model_sha256}
