"""Models that go on learning while they read: neural cache and dynamic evaluation.

- Neural cache: Grave, Joulin & Usunier 2016, "Improving Neural Language Models with a Continuous Cache"
  (arXiv 1612.04426). Nothing is trained: recent hidden states vote for the tokens that followed them.
- Dynamic evaluation: Krause, Kahembwe, Murray & Renals 2017, "Dynamic Evaluation of Neural Sequence Models"
  (arXiv 1709.07432), the RMS rule with decay back to the trained weights. Each segment is scored before it is learned
  from, so the score is honest; static and dynamic figures belong in different columns. Where paper and program differ,
  this follows the program (benkrause/dynamic-evaluation): see `_Updater`.

Both read one stream. Settings are tuned on validation text only. Legend: as in `ulimi.model`, W cache window.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ulimi.data import Ids, encode_file, make_streams
from ulimi.engine import (
    EVALUATION_WINDOW,
    choose_device,
    load_engine,
    load_model,
    mixed_nats,
    read_tensors,
    write_tensors,
)
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM, State, detach_state
from ulimi.run import MIXTURE, NGRAM, Run
from ulimi.score import stream_nll

Stats = dict[str, Tensor]
"""parameter name -> mean square of its gradients"""


@dataclass(frozen=True)
class Cache:
    """Settings of the neural cache; the defaults were tuned on isiZulu validation text (docs/experiments.md)."""

    theta: float = 2.0
    """flatness of the match between hidden states"""
    lambda_: float = 0.1
    """share of the cache in the mixture"""
    window: int = 2000
    """states remembered, in tokens"""

    def __post_init__(self) -> None:
        _check("--cache-theta", self.theta, 0 <= self.theta < math.inf, "a number from 0 on")
        _check("--cache-lambda", self.lambda_, 0 <= self.lambda_ < 1, "a number from 0 to below 1")
        _check("--cache-window", self.window, self.window >= 1, "a whole number from 1 on")


@dataclass(frozen=True)
class Dynamic:
    """Settings of dynamic evaluation; the defaults were tuned on isiZulu validation text (docs/experiments.md)."""

    lr: float = 7e-5
    decay: float = 0.01
    """pull back to the trained weights, a step [lamb]"""
    epsilon: float = 2e-5
    """added to the root of the mean square"""
    window: int = 10
    """tokens scored, then learned from, at once [bptt]"""

    def __post_init__(self) -> None:
        _check("--dynamic-lr", self.lr, 0 <= self.lr < math.inf, "a number from 0 on")
        _check("--dynamic-decay", self.decay, 0 <= self.decay <= 1, "a number from 0 to 1")
        _check("--dynamic-epsilon", self.epsilon, 0 < self.epsilon < math.inf, "a number above 0")
        _check("--dynamic-window", self.window, self.window >= 1, "a whole number from 1 on")


def _check(option: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise UlimiError(f"{option} {value}: allowed is {allowed}")


def adaptive_nll(
    model: AWDLSTM,
    ids: Ids,
    eos_id: int,
    *,
    cache: Cache | None = None,
    dynamic: Dynamic | None = None,
    stats: Stats | None = None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float64]:
    """Give the nats of each token of a text, (N,), read as one stream by a network that adapts while it reads.

    Args:
        model: the network; its weights and mode are as before when this returns, and after an error.
        ids: (N,).
        eos_id: what stands before the first token.
        cache: mix in a neural cache.
        dynamic: learn from each segment after it was scored.
        stats: of `gradient_stats`; needed by `dynamic`.
        on_tokens: told how many tokens are done.
    """
    if dynamic is not None and stats is None:
        raise ValueError("dynamic evaluation needs gradient statistics")
    window = dynamic.window if dynamic is not None else EVALUATION_WINDOW
    device = model.lm_head.bias.device
    memory = None if cache is None else _Memory(cache)
    state: State = model.initial_state(1)
    nats_N, before = np.empty(len(ids)), eos_id
    with restored(model), without_dropout(model), torch.set_grad_enabled(dynamic is not None):
        updater = None if dynamic is None or stats is None else _Updater(model, dynamic, stats)
        for start in range(0, len(ids), window):
            targets_1T = torch.from_numpy(np.asarray(ids[start : start + window], dtype=np.int64))[None].to(device)
            inputs_1T = torch.cat([torch.tensor([[before]], device=device), targets_1T[:, :-1]], dim=1)
            out = model(inputs_1T, state)
            nll_T = own_T = F.cross_entropy(out.logits[0], targets_1T[0], reduction="none")
            if memory is not None:
                own_T = memory.nll(out.raw[0].detach(), out.logits[0].detach(), targets_1T[0])
            nats_N[start : start + window] = own_T.detach().cpu().numpy()
            if updater is not None:
                updater.step(nll_T.mean())
            state, before = detach_state(out.state), int(targets_1T[0, -1])
            on_tokens(start + targets_1T.size(1))
    return nats_N


class _Memory:
    """The last W (hidden state, next token) pairs of one stream."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._keys_WE: Tensor | None = None
        self._next_W: Tensor | None = None

    def nll(self, raw_TE: Tensor, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """Nats of each target under the mixture, (T,); the window is remembered afterwards.

        State t, from which target t is predicted, is matched with the states before it; each of those votes for the
        token that it was followed by. Before there is any, the vocabulary alone speaks.
        """
        cache = self._cache
        old = 0 if self._keys_WE is None else self._keys_WE.size(0)
        keys_NE = raw_TE if self._keys_WE is None else torch.cat([self._keys_WE, raw_TE])
        next_N = targets_T if self._next_W is None else torch.cat([self._next_W, targets_T])
        own_T1 = torch.arange(old, old + raw_TE.size(0), device=raw_TE.device)[:, None]
        position_1N = torch.arange(keys_NE.size(0), device=raw_TE.device)[None]
        visible_TN = (position_1N < own_T1) & (position_1N >= own_T1 - cache.window)
        scores_TN = (cache.theta * raw_TE @ keys_NE.T).masked_fill(~visible_TN, -torch.inf)
        hit_TN = visible_TN & (next_N[None] == targets_T[:, None])
        log_p_cache = torch.logsumexp(scores_TN.masked_fill(~hit_TN, -torch.inf), 1) - torch.logsumexp(scores_TN, 1)
        log_p_vocab = torch.log_softmax(logits_TV, 1).gather(1, targets_T[:, None])[:, 0]
        empty_T = ~visible_TN.any(1)
        log_p_cache = torch.where(empty_T, -torch.inf, log_p_cache)
        log_p_vocab = torch.where(empty_T, log_p_vocab, log_p_vocab + math.log1p(-cache.lambda_))
        log_lambda = math.log(cache.lambda_) if cache.lambda_ > 0 else -math.inf
        self._keys_WE, self._next_W = keys_NE[-cache.window :], next_N[-cache.window :]
        return -torch.logaddexp(log_p_vocab, log_lambda + log_p_cache)


class _Updater:
    """One step of the RMS rule: down the scaled gradient, and back towards the trained weights.

    The gradient is that of the segment's mean loss. A weight whose gradients were large in training moves less, and is
    pulled back more: decay is scaled by its RMS over the mean RMS, at most to 1.

    That mean is taken as in the authors' program, over parameter tensors of each one's mean: a bias counts as much as
    an embedding. The paper's formula reads as a mean over all weights alike, which is one constant factor in `decay`.
    The program's present units are meant; settings published with its `--oldhyper` are converted as it does: lr and
    epsilon over the root of the number of batches in the statistics, decay over the number of parameter tensors.
    """

    def __init__(self, model: AWDLSTM, settings: Dynamic, stats: Stats) -> None:
        self._parameters = list(model.parameters())
        named = dict(model.named_parameters())
        if set(named) != set(stats) or any(stats[n].shape != p.shape for n, p in named.items()):
            raise UlimiError("the gradient statistics are of another network than this one")
        device = model.lm_head.bias.device
        rms = [stats[n].to(device).sqrt() for n in named]
        mean = sum(r.mean(dtype=torch.float64).item() for r in rms) / len(rms)
        self._start = [p.detach().clone() for p in self._parameters]
        self._rate = [settings.lr / (r + settings.epsilon) for r in rms]
        self._decay = [(settings.decay * r / mean).clamp(max=1.0) for r in rms]

    def step(self, nll: Tensor) -> None:
        gradients = torch.autograd.grad(nll, self._parameters)
        with torch.no_grad():
            weights = [p.detach() for p in self._parameters]
            torch._foreach_lerp_(weights, self._start, self._decay)
            torch._foreach_addcmul_(weights, self._rate, gradients, -1)


@contextmanager
def restored(model: AWDLSTM) -> Iterator[None]:
    """Put the model's weights back as they were when the block ends, whichever way it ends."""
    own = [p.detach().clone() for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), own, strict=True):
                parameter.copy_(weight)


@contextmanager
def without_dropout(model: AWDLSTM) -> Iterator[None]:
    """Turn dropout off, yet let gradients be taken, until the block ends, whichever way it ends."""
    was_training = model.training
    model.eval()
    for layer in model.layers:
        layer.lstm.train()  # has no dropout of its own; MIOpen gives no gradients in evaluation mode
    try:
        yield
    finally:
        model.train(was_training)


def gradient_stats(
    model: AWDLSTM,
    ids: Ids,
    *,
    batch_size: int = 20,
    bptt: int = 70,
    max_batches: int = 200,
    on_batches: Callable[[int], None] = lambda done: None,
) -> Stats:
    """Mean square of the gradients over batches of the training text, dropout off.

    Args:
        model: the network, with its best weights.
        ids: of the training text, (N,).
        batch_size: B. The magnitude of the statistics depends on B x bptt, and lr and epsilon on the statistics.
        bptt: T.
        max_batches: the first so many windows of the streams, which begin all over the text.
        on_batches: told how many batches are done.

    Returns:
        Parameter name -> a tensor of its shape.
    """
    device = model.lm_head.bias.device
    streams_BS = make_streams(ids, min(batch_size, max(1, len(ids) // (bptt + 1))))
    bptt = min(bptt, streams_BS.shape[1] - 1)
    chosen = range(0, streams_BS.shape[1] - bptt, bptt)[:max_batches]
    squares = [torch.zeros_like(p) for p in model.parameters()]
    state: State | None = None
    with without_dropout(model):
        for done, start in enumerate(chosen, 1):
            chunk = torch.from_numpy(streams_BS[:, start : start + bptt + 1].astype(np.int64)).to(device)
            out = model(chunk[:, :-1], state)
            nll = F.cross_entropy(out.logits.flatten(0, 1), chunk[:, 1:].flatten())
            gradients = torch.autograd.grad(nll, list(model.parameters()))
            torch._foreach_addcmul_(squares, gradients, gradients, 1 / len(chosen))
            state = detach_state(out.state)
            on_batches(done)
    return {name: square for (name, _), square in zip(model.named_parameters(), squares, strict=True)}


def run_stats(
    run: Run, model: AWDLSTM, train_path: Path | None = None, on_batches: Callable[[int], None] = lambda done: None
) -> Stats:
    """Give a run's gradient statistics; those of its own training text are kept in its folder once they are known.

    Args:
        run: whose best weights `model` holds.
        model: the network.
        train_path: its training text; None means the path that the run remembers.
        on_batches: told how many batches are done.

    Raises:
        UlimiError: the training text is not where the run remembers it.
    """
    # Weights that were trained on since have other statistics: the file's name carries the weights' hash.
    kept = run.dir / f"gradient_stats.{run.weights_sha256[:16]}.safetensors"
    if train_path is None and kept.is_file():
        return read_tensors(kept)
    text_path = train_path or run.text_path("train")
    if text_path is None:
        raise UlimiError(
            f"--dynamic: the training text of {run.name} is not here; name it, or a text like it, with --stats-from"
        )
    text = encode_file(text_path, run.tokenizer)
    stats = gradient_stats(model, text.ids, on_batches=on_batches)
    if run.origin is None and asdict(text.stats).items() <= run.meta["data"]["train"].items():
        # Another text's statistics are not the run's own; and one in a folder that cannot be written to can be judged.
        with suppress(OSError):
            write_tensors(stats, kept)
    return stats


def load_adaptive(
    run: Run,
    device: str = "auto",
    *,
    cache: Cache | None = None,
    dynamic: Dynamic | None = None,
    stats_from: Path | None = None,
    on_batches: Callable[[int], None] = lambda done: None,
) -> Callable[[Ids, Callable[[int], None]], float]:
    """Make what scores texts with a network that adapts, or with a mixture whose networks do, each by itself.

    The weights of a mixture stay what they are, and so do its n-gram models.

    Args:
        run: the network or the mixture.
        device: of `ulimi.engine.choose_device`, for networks.
        cache: of `adaptive_nll`.
        dynamic: likewise.
        stats_from: the networks' training text, one for all of them, see `run_stats`.
        on_batches: told how many batches of a network's gradient statistics are done.

    Returns:
        Of the ids of a text, (N,), read as one stream, and what is told how many tokens are done, the total nats.

    Raises:
        UlimiError: there is no network, a network is sparse, or as of `run_stats`.
    """
    for network in run.networks("--cache" if dynamic is None else "--dynamic"):
        if network.alpha != 1:
            raise UlimiError(f"{network.dir} is a sparse model (entmax): --cache and --dynamic are for softmax models")
    weights = run.config["weights"] if run.kind == MIXTURE else [1.0]
    eos_id = run.tokenizer.eos_id
    readers: list[Callable[..., NDArray[Any]]] = []
    for member in run.members() or [run]:
        if member.kind == NGRAM:
            readers.append(partial(stream_nll, load_engine(member), eos_id=eos_id))
            continue
        model = load_model(member, choose_device(device))
        stats = None if dynamic is None else run_stats(member, model, stats_from, on_batches)
        readers.append(partial(adaptive_nll, model, eos_id=eos_id, cache=cache, dynamic=dynamic, stats=stats))

    def nats(ids: Ids, on_tokens: Callable[[int], None]) -> float:
        nats_MN = np.stack([read(ids, on_tokens=on_tokens) for read in readers])
        return float(mixed_nats(nats_MN, np.array(weights)).sum())

    return nats
