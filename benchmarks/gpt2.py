"""GPT-2 of transformers for quality.py: from random weights, a step of its training, and how it reads a text."""

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from ulimi.cuda import product_precision
from ulimi.data import IGNORED, Ids
from ulimi.errors import UlimiError

Window = tuple[NDArray[np.int64], NDArray[np.int64]]
"""inputs and targets, of one length"""

CONTEXT = 256
SIZE = {"n_embd": 248, "n_layer": 6, "n_head": 4}
"""with 4,000 tokens 5,503,616 parameters; the networks of `quality.SIZES` have 5,494,688"""
ROWS = 9
"""windows a step: 2,304 tokens; ours has 32 x 70 = 2,240"""
DROPOUT = 0.1
WARMUP = 0.05
"""share of the training"""
SEED = 141


def classes() -> tuple[Any, Any]:
    """Import the configuration and the model of transformers, which is no dependency of ulimi."""
    # A torchvision of another build than torch's cannot be imported, and text needs none.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UlimiError("gpt2 needs transformers: pip install 'ulimi[bench]'") from None
    disable_progress_bar()
    return GPT2Config, GPT2LMHeadModel


class GPT2Training:
    """A new model and its optimizer."""

    def __init__(self, vocab_size: int, lr: float, precision: str) -> None:
        config_class, model_class = classes()
        torch.manual_seed(SEED)
        config = config_class(
            vocab_size=vocab_size, n_positions=CONTEXT, resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=DROPOUT,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **SIZE,
        )  # fmt: skip
        self.model = model_class(config)
        self.lr, self.precision, self.rng = lr, precision, np.random.default_rng(SEED)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def step(self, ids: Ids, share: float) -> None:
        """Learn from random windows of a stream, (N,); `share` of the training is over."""
        self.model.train()
        starts = self.rng.integers(len(ids) - CONTEXT, size=(ROWS, 1))
        windows = torch.from_numpy(ids[starts + np.arange(CONTEXT + 1)].astype(np.int64))
        with product_precision(torch.device("cpu"), self.precision):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (share + 1e-3) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        self.optimizer.step()


def windows_of(ids: Ids | list[int], eos_id: int) -> Iterator[Window]:
    """Cut a text, (N,), that stands after an <eos>: each id is a target once, and sees 128 others or all."""
    targets = np.asarray(ids).astype(np.int64)
    inputs = np.concatenate([[eos_id], targets[:-1]])
    half = CONTEXT // 2
    for start in range(0, max(len(targets) - half, 1), half):
        counted = targets[start : start + CONTEXT].copy()
        if start:
            counted[:half] = IGNORED
        yield inputs[start : start + CONTEXT], counted


def total_nats(model: Any, windows: Iterable[Window]) -> float:
    """Sum the nats of all targets."""
    ordered = sorted(windows, key=lambda window: len(window[0]))
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        for first in range(0, len(ordered), ROWS):
            batch = ordered[first : first + ROWS]
            inputs, targets = (np.full((len(batch), len(batch[-1][0])), fill) for fill in (0, IGNORED))
            for row, (row_inputs, row_targets) in enumerate(batch):
                # What stands behind a row is neither seen by it nor counted.
                inputs[row, : len(row_inputs)], targets[row, : len(row_targets)] = row_inputs, row_targets
            logits = model(input_ids=torch.from_numpy(inputs), use_cache=False).logits
            nats += cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
    return nats


def load(folder: Path) -> Any:
    """Load what `save_pretrained` left."""
    return classes()[1].from_pretrained(folder)
