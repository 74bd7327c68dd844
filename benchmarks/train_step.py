"""A training step on a CPU, side by side: ulimi, ulimi without its C file, fastai's AWD-LSTM, and plain `nn.LSTM`s.

"bf16" are the same with products in bfloat16 (autocast).

    python benchmarks/train_step.py --threads 1 --out step.json

Whole steps (forward, loss, AR and TAR, backward, clip, SGD) on windows of 70 random ids, state carried, in one process
that goes round the contenders, medians. The limit is the best product of the layers' size, (1000, H) x (H, 4H), that
any of PyTorch's libraries makes on this machine, of bfloat16 for those in bf16; a step's share of it counts 6
operations a parameter and token. Peak memory is that of a process that does three steps, above what it held with the
model made.

Mogrifier: ulimi's with three rounds of rank 64, whose operations are not counted.

With --keep-memory, the C library keeps freed memory for all of them, as it does in `ulimi train`.

Plain: the same sizes by `nn.LSTM` and `F.cross_entropy`, without any dropout, AR or TAR.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulimi import cpu
from ulimi.cuda import product_precision
from ulimi.loss import regularisation, training_loss
from ulimi.model import AWDLSTM, detach_state
from ulimi.start import describe_device

T = 70
ALPHA, BETA, MAX_NORM, LR = 2.0, 1.0, 0.25, 1.0
LAYERS = 3


class Shape(NamedTuple):
    """V, E, H, B."""

    vocab: int
    embedding: int
    hidden: int
    batch: int


SHAPES = {
    "cpu-32": Shape(5_000, 256, 640, 32),
    "cpu-64": Shape(5_000, 256, 640, 64),
    "ptb-20": Shape(10_000, 400, 1150, 20),
    "ptb-80": Shape(10_000, 400, 1150, 80),
}
HALF = ", bf16"
CPU = torch.device("cpu")

Step = Callable[[Tensor, Tensor], None]


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Move the weights."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def ulimi_step(shape: Shape, with_c: bool = True, precision: str = "fp32", mogrifier_rounds: int = 0) -> Step:
    """Make ulimi's step, as in `ulimi.train`."""
    model = AWDLSTM(
        vocab_size=shape.vocab, embedding_size=shape.embedding, hidden_size=shape.hidden, num_layers=LAYERS,
        embedding_dropout=0.1, input_dropout=0.4, hidden_dropout=0.25, output_dropout=0.4, weight_dropout=0.5,
        mogrifier_rounds=mogrifier_rounds, mogrifier_rank=64,
    ).train()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rng = torch.Generator().manual_seed(0)
    state = model.initial_state(shape.batch)

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> None:
        nonlocal state
        os.environ["ULIMI_NATIVE"] = str(int(with_c))
        cpu.kernels.cache_clear()
        optimizer.zero_grad(set_to_none=True)
        with product_precision(CPU, precision):
            out = model.features(inputs_BT, state, rng)
            nats = training_loss(
                out.dropped.flatten(0, 1), model.lm_head.weight, model.lm_head.bias, targets_BT.flatten(),
                "cross_entropy", 1.5,
            )  # fmt: skip
        ar, tar = regularisation(out.raw, out.dropped, ALPHA, BETA)
        finish(model, optimizer, nats + ar + tar)
        state = detach_state(out.state)

    return step


def fastai_step(shape: Shape, precision: str = "fp32") -> Step:
    """Make the step of fastai's network, loss and regulariser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from fastai.losses import CrossEntropyLossFlat
        from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
        from fastai.text.models.core import get_language_model
    sizes = {"emb_sz": shape.embedding, "n_hid": shape.hidden, "n_layers": LAYERS}
    drops = {"embed_p": 0.1, "input_p": 0.4, "hidden_p": 0.25, "output_p": 0.4, "weight_p": 0.5}
    model = get_language_model(AWD_LSTM, shape.vocab, {**awd_lstm_lm_config, **sizes, **drops}, drop_mult=1.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    criterion = CrossEntropyLossFlat()

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> None:
        optimizer.zero_grad()
        with product_precision(CPU, precision):
            logits, raw, dropped = model(inputs_BT)
            loss = criterion(logits, targets_BT)
        # As fastai.callback.rnn.RNNRegularizer.
        loss = loss + ALPHA * dropped.float().pow(2).mean() + BETA * (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()
        finish(model, optimizer, loss)

    return step


class Plain(nn.Module):
    """The same sizes without what makes an AWD-LSTM."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.embedding)
        self.decoder = nn.Linear(shape.embedding, shape.vocab)
        self.decoder.weight = self.embedding.weight
        self.middle = nn.LSTM(shape.embedding, shape.hidden, LAYERS - 1, batch_first=True)
        self.last = nn.LSTM(shape.hidden, shape.embedding, batch_first=True)


def plain_step(shape: Shape) -> Step:
    """Make the step of stacked `nn.LSTM`s."""
    model = Plain(shape).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    states = [None, None]

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> None:
        optimizer.zero_grad()
        x, first = model.middle(model.embedding(inputs_BT), states[0])
        x, second = model.last(x, states[1])
        finish(model, optimizer, F.cross_entropy(model.decoder(x).flatten(0, 1), targets_BT.flatten()))
        states[:] = [tuple(s.detach() for s in state) for state in (first, second)]

    return step


MAKE: dict[str, Callable[[Shape], Step]] = {
    "ulimi": ulimi_step,
    "ulimi" + HALF: partial(ulimi_step, precision="bf16"),
    "ulimi, no C": partial(ulimi_step, with_c=False),
    "ulimi, Mogrifier": partial(ulimi_step, mogrifier_rounds=3),
    "ulimi, Mogrifier" + HALF: partial(ulimi_step, precision="bf16", mogrifier_rounds=3),
    "fastai": fastai_step,
    "fastai" + HALF: partial(fastai_step, precision="bf16"),
    "plain": plain_step,
}


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call: of one thread, the processor's time, of which other programs take no part."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def draw(shape: Shape, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(shape.vocab, (shape.batch, T + 1), generator=rng)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def best_product(shape: Shape, half: bool) -> Callable[[], float]:
    """Make a measurement: GFLOP/s of the layers' product, by whichever library is faster."""
    rows, h = min(shape.batch * T, 1000), shape.hidden  # above 32 MB, getting the memory takes a third of the time
    a, b = torch.randn(rows, h), torch.randn(4 * h, h).t()
    packed = cpu.right_factor(b, rows, half)
    if half:
        a, b = a.bfloat16(), b.bfloat16()
    ways = (lambda: torch.mm(a, b), lambda: packed(a))
    return lambda: max(2e-9 * rows * h * 4 * h / seconds_of(way) for way in ways)


def parameters(shape: Shape) -> int:
    """Count what a token is multiplied by: layers and decoder."""
    widths = [shape.embedding, *[shape.hidden] * (LAYERS - 1), shape.embedding]
    return shape.vocab * shape.embedding + sum(4 * o * (i + o) for i, o in itertools.pairwise(widths))


def measure(shape: Shape, contenders: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Time steps, going round the contenders."""
    rng = torch.Generator().manual_seed(0)
    steps = {name: MAKE[name](shape) for name in contenders}
    limits = {half: best_product(shape, half) for half in {name.endswith(HALF) for name in contenders}}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    best = dict.fromkeys(limits, 0.0)
    for number in range(rounds + 1):
        for name, step in steps.items():
            window = draw(shape, rng)
            seconds = seconds_of(lambda: step(*window))  # noqa: B023 - called at once
            if number:  # the first warms up
                times[name].append(seconds)
        best = {half: max(best[half], limit()) for half, limit in limits.items()}
    result = {}
    for name in contenders:
        rate = shape.batch * T / statistics.median(times[name])
        gflops, limit = 6e-9 * parameters(shape) * rate, best[name.endswith(HALF)]
        result[name] = {"tokens_per_s": rate, "gflops": gflops, "share_of_limit": gflops / limit, "limit_gflops": limit}
    return result


def peak_memory(shape: Shape, name: str) -> float:
    """MB of this process at its peak above what it holds once the model is made."""
    small = Shape(16, 16, 16, 2)
    MAKE[name](small)(*draw(small, torch.Generator()))  # loads code, which is no memory of the step's
    step = MAKE[name](shape)
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        step(*draw(shape, rng))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return (peak - before) / 1e6


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=MAKE, default=list(MAKE))
    parser.add_argument("--keep-memory", action="store_true", help="set the C library as `ulimi train` sets it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.keep_memory and not cpu.keep_freed_memory():
        parser.error("--keep-memory needs glibc")
    if args.memory_of:
        print(peak_memory(SHAPES[args.shapes[0]], args.memory_of))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(
        f"{'shape':8} {'':22} {'tokens/s':>9} {'of limit':>8} {'peak MB':>8} {'GFLOP/s':>11}   ({args.threads} threads)"
    )
    for name in args.shapes:
        results[name] = measure(SHAPES[name], args.contenders, args.rounds)
        for contender, row in results[name].items():
            command = [sys.executable, __file__, "--threads", str(args.threads), "--shapes", name]
            command += ["--keep-memory"] * args.keep_memory
            done = subprocess.run([*command, "--memory-of", contender], capture_output=True, text=True, check=True)
            row["peak_mb"] = float(done.stdout)
            rate, share, limit = row["tokens_per_s"], row["share_of_limit"], row["limit_gflops"]
            print(
                f"{name:8} {contender:22} {rate:9,.0f} {share:8.0%} {row['peak_mb']:8,.0f} {limit:11,.0f}", flush=True
            )
    if args.out:
        machine = describe_device(CPU)
        rows = [
            {"shape": name, "contender": contender, **row}
            for name, found in results.items()
            for contender, row in found.items()
        ]
        packages = {name: version(name) for name in ("torch", "fastai")}
        result = {"machine": machine, "versions": packages, "threads": args.threads, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
