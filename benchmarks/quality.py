"""How good each kind of model becomes on a text in a given time: ours, its predecessors, GPT-2, n-grams, compressors.

    python benchmarks/quality.py CORPUS --minutes 30 --out FOLDER [--only NAME ...] [--test]
    python benchmarks/quality.py --out FOLDER --report

CORPUS has train.txt, valid.txt and test.txt. Each contender leaves FOLDER/NAME.json and is skipped where that is there,
so contenders can run side by side, each on its own core, with --only. FOLDER/quality.md and quality.png are made of
those that are there, at the end and by --report. --test adds the figures of the test text, also to contenders that
are done already.

All read the same tokens: a byte-level BPE of 4,000 that ulimi trains on the training text. The clock runs during
training steps alone, neither while they are calibrated nor while anything is validated or written; with one thread it
is that thread's processor time, in which other programs take no part, with more it is the time of day.

One rule for all networks: the weights that count are those with the lowest validation nats among the curve's points,
and those points are what the plot shows. Ours has one after each epoch, in ten stretches of the text; GPT-2 one after
each twelfth of its time, the text as one stream. Ours makes as many whole epochs as fit, or miss it by a tenth of one,
at a speed measured beforehand (a tenth of the time, a minute at most); so its minutes, which the table shows, differ
from those allowed. GPT-2's rate falls by a cosine that follows the clock itself.

    ours, ours-bf16   the recipe isizulu-cpu but for its sizes, which are OURS: 5.5M parameters; products of matrices
                      in bfloat16
    plain-lstm        as many parameters in a plain, tied network of three layers (SIZES), the same optimizer, without
                      dropouts, weight drop, AR and TAR
    predecessor       that network, AWD-LSTM's own optimizer: NT-ASGD at 30, clipped at 0.25, windows of 70, no AR,
                      TAR and weight decay, more dropout. Its average begins after six epochs at the earliest
    gpt2, gpt2-bf16   transformers, random weights, as many parameters, context 256, random windows of one stream,
                      dropout 0.1, AdamW (--gpt2-lr, betas 0.9 and 0.95, matrices decay by 0.1), clipped at 1, 5 % of
                      the time warm-up
    ngram             interpolated modified Kneser-Ney, order 6
    zlib, bzip2, xz   Python's own, at their best levels: bytes that the text adds to the compressed training text

Figures are bits per character of the original text: every token and each line's end is predicted once. "Lines" starts
anew at each line, after <eos>; "stream" reads on. GPT-2 reads on with a window that moves by 128 tokens, so that each
token but the first ones has at least 128 before it. Compressors know no lines.
"""

from common import versions  # isort: skip

import argparse
import bz2
import functools
import hashlib
import json
import lzma
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gpt2
from report import markdown
from ulimi.baseline import TokenizerSettings, make_ngram_run
from ulimi.corpus import Corpus, open_corpus, read_lines
from ulimi.data import EncodedText, encode_file
from ulimi.engine import load_engine
from ulimi.errors import UlimiError
from ulimi.files import write_json, write_text
from ulimi.provenance import describe_machine
from ulimi.recipe import load_recipe
from ulimi.run import open_run
from ulimi.score import score_lines, score_stream
from ulimi.tokenizer import Tokenizer
from ulimi.train import Interrupted, Silent, Trainer

Result = dict[str, Any]

OURS = ["model.embedding_size=192", "model.hidden_size=448", "model.mogrifier_rank=40"]
SIZES = [
    "model.embedding_size=256", "model.hidden_size=512", "model.num_layers=3", "model.tie_weights=true",
    "model.mogrifier_rounds=0",
]  # fmt: skip
NO_DROPOUT = [f"model.{kind}_dropout=0.0" for kind in ("embedding", "input", "hidden", "output", "weight")]
NO_AR_TAR = ["loss.ar_alpha=0.0", "loss.tar_beta=0.0"]
PREDECESSOR = [
    "optim.kind=nt-asgd", "optim.lr=30.0", "optim.max_grad_norm=0.25", "optim.weight_decay=0.0",
    "data.variable_length=false", "model.embedding_dropout=0.1", "model.input_dropout=0.4",
    "model.hidden_dropout=0.25", "model.output_dropout=0.4", "model.weight_dropout=0.5",
]  # fmt: skip
ORDER = 6
NUM_POINTS = 12
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


@dataclass
class Job:
    """What all contenders are given."""

    corpus: Corpus
    out: Path
    minutes: float
    threads: int
    gpt2_lr: float

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that ulimi's runs train for themselves, too."""
        return Tokenizer.train(read_lines(self.corpus.train_path), kind="bpe", vocab_size=4000)

    def text(self, part: str) -> EncodedText:
        """Give a part's ids."""
        return encode_file(self.path(part), self.tokenizer, self.out / "cache")

    def path(self, part: str) -> Path:
        """Find a part's file."""
        path: Path | None = getattr(self.corpus, f"{part}_path")
        if path is None:
            raise UlimiError(f"the corpus has no {part}.txt")
        return path

    def shared(self) -> Result:
        """What must be equal in all results of a table."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()
        sizes = {part: len(self.text(part).ids) for part in ("train", "valid")}
        return {"minutes": self.minutes, "threads": self.threads, "tokenizer": digest, "num_tokens": sizes}


@dataclass
class Watch(Silent):
    """A clock of training steps, and the curve; as ulimi's reporter it stands still between epochs."""

    threads: int
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(minutes, bits per character)"""

    def __post_init__(self) -> None:
        self.now = time.process_time if self.threads == 1 else time.perf_counter
        self.go()

    def go(self) -> None:
        """Let it run from here."""
        self.since = self.now()

    def lap(self) -> float:
        """Take the time of the step that ends here; give all seconds so far."""
        now = self.now()
        self.seconds, self.since = self.seconds + now - self.since, now
        return self.seconds

    def point(self, bits: float) -> None:
        """Note a validation, whose own time is not counted."""
        self.curve.append((self.seconds / 60, bits))
        print(f"  {self.seconds / 60:6.2f} min  {bits:.4f}", flush=True)
        self.go()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called by ulimi after an epoch's validation."""
        self.point(row["valid_bits_per_char"])

    def result(self, tokens: int, num_parameters: int, **settings: Any) -> Result:
        """Say how the training went."""
        return {
            "parameters": num_parameters,
            "training_minutes": self.seconds / 60,
            "tokens": tokens,
            "tokens_per_s": tokens / self.seconds,
            "best_minute": min(self.curve, key=lambda point: point[1])[0],
            "curve": self.curve,
            "settings": settings,
        }


def train_lstm(job: Job, run_dir: Path, overrides: list[str], precision: str) -> Result:
    """Train by ulimi's own loop."""

    def begin(folder: Path, *more: str) -> tuple[Trainer, Watch]:
        recipe, watch = load_recipe("isizulu-cpu", [*overrides, *more]), Watch(job.threads)
        trainer = Trainer(
            job.corpus, folder, recipe, init_from=None, new_tokenizer=False, resume=False, device="cpu",
            precision=precision, reporter=watch, cache_dir=job.out / "cache",
        )  # fmt: skip
        watch.go()
        return trainer, watch

    seconds = 60 * job.minutes
    with tempfile.TemporaryDirectory() as folder, suppress(Interrupted):
        trainer, watch = begin(Path(folder) / "run")
        steps: list[tuple[float, int]] = []

        def enough() -> bool:
            steps.append((watch.lap(), trainer.progress.tokens))
            return watch.seconds > min(60.0, seconds / 10)

        trainer.run(math.inf, False, enough)
    # The first third warms up.
    (before, tokens_before), (after, tokens) = steps[len(steps) // 3] if len(steps) > 1 else (0.0, 0), steps[-1]
    rate = (tokens - tokens_before) / (after - before)
    streams, length = trainer.streams_BS.shape
    epochs = max(1, math.floor(seconds * rate / (streams * (length - 1)) + 0.1))
    print(f"  {rate:,.0f} tokens/s: {epochs} epochs", flush=True)

    trainer, watch = begin(run_dir, f"optim.max_epochs={epochs}")
    trainer.run(math.inf, False, lambda: watch.lap() < 0)
    num = sum(p.numel() for p in trainer.model.parameters())
    return watch.result(
        trainer.progress.tokens, num, calibrated_tokens_per_s=rate, epochs=epochs, precision=precision,
        overrides=overrides,
    )  # fmt: skip


def train_gpt2(job: Job, run_dir: Path, precision: str) -> Result:
    """Train GPT-2 until the time is over."""
    ids, valid, seconds = job.text("train").ids, job.text("valid"), 60 * job.minutes
    training = gpt2.GPT2Training(job.tokenizer.vocab_size, job.gpt2_lr, precision)
    best, num_steps, watch = math.inf, 0, Watch(job.threads)
    while watch.seconds < seconds:
        training.step(ids, watch.seconds / seconds)
        num_steps += 1
        if watch.lap() >= min(1.0, (len(watch.curve) + 1) / NUM_POINTS) * seconds:
            nats = gpt2.total_nats(training.model, gpt2.windows_of(valid.ids, job.tokenizer.eos_id))
            if nats < best:
                best = nats
                training.model.save_pretrained(run_dir)
            watch.point(nats / math.log(2) / valid.stats.num_chars)
    num = sum(p.numel() for p in training.model.parameters())
    settings = {**gpt2.SIZE, "context": gpt2.CONTEXT, "rows": gpt2.ROWS, "lr": job.gpt2_lr, "precision": precision}
    return watch.result(num_steps * gpt2.ROWS * gpt2.CONTEXT, num, **settings, steps=num_steps)


def train_ngram(job: Job, run_dir: Path) -> Result:
    """Count."""
    settings = TokenizerSettings(kind="bpe", vocab_size=4000)
    make_ngram_run(job.corpus.train_path.parent, run_dir, order=ORDER, settings=settings, cache_dir=job.out / "cache")
    meta = open_run(run_dir).meta
    minutes = meta["training"]["seconds"] / 60
    return {"parameters": sum(meta["num_ngrams"]), "training_minutes": minutes, "settings": {"order": ORDER}}


CONTENDERS: dict[str, Callable[[Job, Path], Result]] = {
    "ours": functools.partial(train_lstm, overrides=OURS, precision="fp32"),
    "ours-bf16": functools.partial(train_lstm, overrides=OURS, precision="bf16"),
    "plain-lstm": functools.partial(train_lstm, overrides=SIZES + NO_DROPOUT + NO_AR_TAR, precision="fp32"),
    "predecessor": functools.partial(train_lstm, overrides=SIZES + PREDECESSOR + NO_AR_TAR, precision="fp32"),
    "gpt2": functools.partial(train_gpt2, precision="fp32"),
    "gpt2-bf16": functools.partial(train_gpt2, precision="bf16"),
    "ngram": train_ngram,
    **dict.fromkeys(COMPRESSORS, lambda job, run_dir: {}),
}


def score(job: Job, name: str, run_dir: Path, part: str) -> dict[str, float]:
    """Give the bits per character of a part by the best weights: lines alone, and one stream."""
    text, lines, eos = job.text(part), list(read_lines(job.path(part))), job.tokenizer.eos_id
    if name in COMPRESSORS:
        known, new = ("".join(f"{line}\n" for line in read_lines(job.path(p))).encode() for p in ("train", part))
        compress = COMPRESSORS[name]
        return {"stream": 8 * (len(compress(known + new)) - len(compress(known))) / text.stats.num_chars}
    if name.startswith("gpt2"):
        model = gpt2.load(run_dir)
        alone = (window for ids in job.tokenizer.encode_lines(lines) for window in gpt2.windows_of(ids, eos))
        ways = {"lines": alone, "stream": gpt2.windows_of(text.ids, eos)}
        nats = {way: gpt2.total_nats(model, windows) for way, windows in ways.items()}
    else:
        engine = load_engine(open_run(run_dir), kind="auto" if name == "ngram" else "torch")
        nats = {"lines": sum(line_score.nats for _, line_score in score_lines(engine, job.tokenizer, lines))}
        nats["stream"] = score_stream(engine, text.ids, eos)
    return {way: value / math.log(2) / text.stats.num_chars for way, value in nats.items()}


def run(job: Job, name: str, parts: list[str]) -> None:
    """Train a contender and score it, as far as its file does not have it."""
    path, run_dir = job.out / f"{name}.json", job.out / "runs" / name
    print(name, flush=True)
    if path.is_file():
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        if any(result[key] != value for key, value in job.shared().items()):
            raise UlimiError(f"{path} is of another corpus or other --minutes or --threads; give another --out")
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # of a training that was cut off
        machine = describe_machine(job.threads)
        started = time.perf_counter()
        result = {"contender": name, **job.shared(), "machine": machine, **CONTENDERS[name](job, run_dir)}
        result |= {"wall_minutes": (time.perf_counter() - started) / 60, "versions": versions("torch", "transformers")}
        result["scores"] = {}
        write_json(path, result)
    for part in parts:
        if part not in result["scores"]:
            result["scores"][part] = score(job, name, run_dir, part)
            write_json(path, result)
    print(f"  {result['scores']}", flush=True)


def report(out: Path) -> None:
    """Write the table and the plot of the results that are there."""
    found = [out / f"{name}.json" for name in CONTENDERS if (out / f"{name}.json").is_file()]
    results: list[Result] = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    if not results:
        raise UlimiError(f"{out}: no results yet")
    for key in ("minutes", "threads", "tokenizer", "num_tokens"):
        if any(result[key] != results[0][key] for result in results):
            raise UlimiError(f"{out}: its results differ in {key}")
    parts = [part for part in ("valid", "test") if any(part in result["scores"] for result in results)]

    def cell(result: Result, key: str, form: str) -> str:
        return format(result[key], form) if key in result else "–"

    columns = {"parameters": ",", "training_minutes": ".2f", "tokens_per_s": ",.0f", "best_minute": ".1f"}
    head = ["bits per character", "parameters", "minutes", "tokens/s", "best after"]
    head += [f"{part}, {way}" for part in parts for way in ("lines", "stream")]
    rows = [
        [result["contender"], *(cell(result, key, form) for key, form in columns.items())]
        + [cell(result["scores"].get(part, {}), way, ".3f") for part in parts for way in ("lines", "stream")]
        for result in results
    ]
    first = results[0]
    note = (
        f"{first['machine']['cpu']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, {first['minutes']:g} "
        f"minutes of training; {first['num_tokens']['train']:,} tokens of training text. Of the n-gram model, "
        "parameters are its n-grams."
    )
    write_text(out / "quality.md", f"{markdown(head, rows)}\n\n{note}\n")
    draw(results, out / "quality.png")


def draw(results: list[Result], path: Path) -> None:
    """Draw validation over training time; the n-gram model, done in seconds, is a level."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        if "curve" in result:
            minutes, bits = zip(*result["curve"], strict=True)
            axis.plot(minutes, bits, marker=".", label=f"{result['contender']}, best {min(bits):.3f}")
        elif result["contender"] == "ngram":
            bits = result["scores"]["valid"]["stream"]
            axis.axhline(bits, linestyle="--", color="black", label=f"ngram {bits:.3f}")
    axis.set(xlabel="minutes of training", ylabel="validation bits per character", xlim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time of each network")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpt2-lr", type=float, default=1e-3)
    parser.add_argument("--test", action="store_true", help="score the test text, too")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="train nothing, write the table and the plot")
    args = parser.parse_args()
    try:
        if args.report:
            report(args.out)
            return
        if args.corpus is None or args.minutes <= 0 or args.threads < 1:
            raise UlimiError("a corpus, a time and a number of threads are needed")
        if any(name.startswith("gpt2") for name in args.only):
            gpt2.classes()  # before the others have trained for hours
        torch.set_num_threads(args.threads)
        corpus = open_corpus(args.corpus, args.out / "corpus")
        job = Job(corpus, args.out, args.minutes, args.threads, args.gpt2_lr)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            run(job, name, ["valid", "test"] if args.test else ["valid"])
        report(args.out)
    except UlimiError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
