"""How long is an epoch on a GPU? The training step with and without graphs, in each precision, on a corpus's own text.

    python benchmarks/gpu_step.py CORPUS [--recipe ptb] [--batch-sizes 20,80] [--steps 60] [--rows plain/fp32,…] \
        [--out FILE]

`plain` is the same code without what ulimi.cuda brings: nn.LSTM given its dropped matrix, whose weights cuDNN compacts
at each call, launched kernel by kernel. Times are medians over windows, each waited for; an epoch is its number of
windows times that, plus nothing for validation.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from ulimi import cuda
from ulimi.corpus import open_corpus
from ulimi.data import Windows
from ulimi.recipe import load_recipe
from ulimi.train import Silent, Trainer

ROWS = (
    "plain/fp32",
    "plain/tf32",
    "layer/fp32",
    "layer/bf16",
    "graphs/fp32",
    "graphs/tf32",
    "graphs/bf16",
    "graphs/fp16",
)
"""code and precision, see above; `layer` is ulimi.cuda without graphs"""


def plain_layer(x_BTI, state, weight_ih, weight_hh, bias_ih, bias_hh, mask_hh):
    """What `nn.LSTM` does with a dropped matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = [weight_ih, weight_hh * mask_hh, bias_ih, bias_hh]
        y_BTH, h, c = torch.lstm(x_BTI, state, weights, True, 1, 0.0, True, False, True)
    return y_BTH, (h, c)


def measure(trainer: Trainer, num_steps: int) -> dict[str, float]:
    """Time whole steps on windows of one length, after five that set up and record."""
    trainer.model.train()
    windows = Windows(trainer.streams_BS, bptt=trainer.recipe.data.bptt, variable_length=False, rng=trainer.window_rng)
    seconds, tokens = [], 0
    for i, (inputs, targets) in enumerate(windows):
        if i == num_steps + 5:
            break
        torch.cuda.synchronize()
        started = time.perf_counter()
        inputs_BT, targets_BT = (torch.from_numpy(a).to(trainer.device) for a in (inputs, targets))
        loss, trainer.state = trainer.take_gradients(inputs_BT, targets_BT, trainer.state)
        trainer.optimizer.param_groups[0]["lr"] = 1e-3
        trainer.optimizer.step()
        torch.cuda.synchronize()
        if i >= 5:
            seconds.append(time.perf_counter() - started)
            tokens = inputs.size
    step = statistics.median(seconds)
    return {
        "ms_a_window": 1e3 * step,
        "tokens_a_second": tokens / step,
        "epoch_seconds": (trainer.streams_BS.size - len(trainer.streams_BS)) / tokens * step,
        "peak_MiB": torch.cuda.max_memory_allocated() / 2**20,
        "loss": loss.item(),
    }


def profile(trainer: Trainer) -> str:
    """Name the kernels of one step and what each takes."""
    inputs, targets = (torch.from_numpy(a).cuda() for a in next(iter(Windows(
        trainer.streams_BS, bptt=trainer.recipe.data.bptt, variable_length=False, rng=trainer.window_rng
    ))))  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        trainer.take_gradients(inputs, targets, trainer.state)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:12]
    total = sum(e.self_device_time_total for e in found.key_averages())
    lines = [f"{e.self_device_time_total / 1e3:8.3f} ms {e.count:5} x {e.key[:90]}" for e in rows]
    return "\n".join([f"{total / 1e3:8.3f} ms in kernels", *lines])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--recipe", default="ptb")
    parser.add_argument("--batch-sizes", default="20,80")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if unknown := set(args.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))} among {', '.join(ROWS)}")
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    on_cudnn = cuda.lstm
    rows = []
    for batch_size in args.batch_sizes.split(","):
        for name, precision in (row.split("/") for row in args.rows.split(",")):
            torch.cuda.reset_peak_memory_stats()
            cuda.lstm = plain_layer if name == "plain" else on_cudnn
            recipe = load_recipe(args.recipe, [f"data.batch_size={batch_size}", *args.set])
            with tempfile.TemporaryDirectory() as scratch:
                parts = open_corpus(args.corpus, Path(scratch) / "parts")
                trainer = Trainer(
                    parts, Path(scratch) / "run", recipe, init_from=None, new_tokenizer=False, resume=False,
                    device="cuda", precision=precision, reporter=Silent(), cache_dir=None,
                )  # fmt: skip
                if name != "graphs":
                    trainer.take_gradients = trainer.gradients
                row = {
                    "batch_size": int(batch_size),
                    "code": name,
                    "precision": precision,
                    **measure(trainer, args.steps),
                }
            if args.profile and name == "layer":
                print(profile(trainer), flush=True)
            rows.append(row)
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuDNN": str(torch.backends.cudnn.version())},
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
