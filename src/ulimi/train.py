"""The one training loop: epochs of windows, validation, best weights, exact resume.

Finetuning is the same loop from other weights (`init_from`). What a run prints is the caller's affair: the loop reports
to a `Reporter`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ulimi.corpus import Corpus, read_lines
from ulimi.cpu import keep_freed_memory
from ulimi.cuda import GraphedStep, Step, has_cudnn, product_precision
from ulimi.data import Ids, Windows, encode_file, make_streams, validation_rows
from ulimi.distill import Lessons, Teacher, describe_teacher, load_teacher
from ulimi.engine import EVALUATION_WINDOW, TorchEngine, choose_device, load_model, write_tensors
from ulimi.errors import UlimiError, install
from ulimi.export import describe_export, export_onnx
from ulimi.files import atomic_path, write_json, write_text
from ulimi.info import model_card
from ulimi.loss import regularisation, target_nats, training_loss
from ulimi.model import AWDLSTM, State, detach_state
from ulimi.optim import RunningAverage, learning_rate, make_optimizer, non_monotonic
from ulimi.parallel import Group, started
from ulimi.plot import plot_curve
from ulimi.provenance import describe_corpus, new_meta
from ulimi.recipe import Recipe, build_recipe
from ulimi.run import AWD_LSTM, CHECKPOINT, ONNX, SOURCE_CARD, WEIGHTS, Run, open_run
from ulimi.score import Score, score_stream
from ulimi.start import (
    RESUMABLE_CHANGES,
    adopt_weights,
    check_processes,
    choose_precision,
    claim_folder,
    describe_device,
    find_teacher,
    locked,
    place,
)
from ulimi.tokenizer import Tokenizer

CHECK_EVERY = 20
"""steps between two looks at the loss: each look makes a GPU wait"""

SECONDS_BETWEEN_NOTES = 30.0
"""while a teacher reads"""

SECONDS_BETWEEN_SAVES = 10.0
"""on a GPU an epoch may take a second, and writing all of it down as long: the end of an epoch waits for this"""


class Reporter(Protocol):
    """Whoever watches a run."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def step(self, progress: "Progress", total_tokens: int, loss: float, lr: float) -> None:
        """Called every `CHECK_EVERY` steps; `loss` is this epoch's mean so far."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called with each new row of metrics.jsonl."""


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, progress: "Progress", total_tokens: int, loss: float, lr: float) -> None:
        """Nothing."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The run was stopped from outside and its checkpoint is written."""


@dataclass
class Progress:
    """Where a run stands; all of it goes into the checkpoint."""

    epoch: int = 0
    """complete epochs"""
    position: int = 0
    """first token of the next window in each stream"""
    step: int = 0
    tokens: int = 0
    """predicted tokens of the whole run"""
    epoch_loss: float = 0.0
    """training loss so far, summed over tokens: nats where it is the cross entropy"""
    epoch_tokens: int = 0
    seconds: float = 0.0
    """of training and validation, over all sittings"""
    history: list[float] = field(default_factory=list)
    """validation losses, nats per token, oldest first"""
    best: float = math.inf
    best_epoch: int = 0
    finished: bool = False
    device: str = "cpu"
    """type of the device: its random state is of no use on another"""
    metrics_bytes: int = 0
    """length of metrics.jsonl, so that rows after the checkpoint are dropped"""
    data_digest: str = ""


def train(
    corpus: Corpus,
    run_dir: Path,
    recipe: Recipe,
    *,
    init_from: Run | None = None,
    new_tokenizer: bool = False,
    teacher: Run | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    processes: int = 1,
    checkpoint_minutes: float = 5.0,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a model, or go on training it, and leave it in a run folder.

    Args:
        corpus: train and validation text.
        run_dir: the run folder; without `resume` it must not hold a run.
        recipe: all settings.
        init_from: start from this run's best weights and tokenizer.
        new_tokenizer: with `init_from`: train a tokenizer on this corpus; known pieces keep their vectors.
        teacher: learn what this model, whatever its kind, finds probable, too; its tokenizer is kept. With `resume`:
            where the run's own teacher now is, if it was moved.
        resume: go on from the folder's checkpoint.
        device: "cpu", "cuda", or "auto".
        precision: of products, see `ulimi.cuda.PRECISIONS`; "auto": a resumed run's own; else bf16 where the
            device knows it, fp32 elsewhere.
        processes: that share the streams, on the CPU, see `ulimi.parallel`; each has as many threads as this one.
        checkpoint_minutes: time between two checkpoints inside an epoch.
        tensorboard: also write TensorBoard events, to run_dir/tensorboard.
        reporter: who is told.
        should_stop: asked after each step; true ends the run with a checkpoint and `Interrupted`.
        cache_dir: where encoded text is kept, see `ulimi.data.encode_file`.

    Returns:
        The scores of the best weights on the validation text, as in meta.json.

    Raises:
        UlimiError: anything wrong with the input, or a loss that is not finite.
        Interrupted: `should_stop` said so.
    """
    # Before anything is made there; the trainer asks again, when no other training can get in between.
    check_processes(processes, recipe, choose_device(device))
    claim_folder(run_dir, recipe, resume=resume, init_from=init_from)
    # The recipe of a run says what its tokenizer is.
    if init_from is not None and not new_tokenizer:
        source = build_recipe(init_from.recipe, source=f"{init_from.dir}/recipe.toml")
        recipe = recipe.model_copy(update={"tokenizer": source.tokenizer})
    elif teacher is not None and not resume:
        known = {"kind": teacher.tokenizer.kind, "vocab_size": teacher.tokenizer.vocab_size}
        recipe = recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update=known)})
    with locked(run_dir):
        trainer = Trainer(
            corpus, run_dir, recipe, init_from=init_from, new_tokenizer=new_tokenizer, teacher=teacher, resume=resume,
            device=device, precision=precision, processes=processes, reporter=reporter or Silent(), cache_dir=cache_dir,
        )  # fmt: skip
        if processes == 1 or trainer.finished():
            return trainer.run(checkpoint_minutes, tensorboard, should_stop)
        teacher_dir = None if teacher is None else teacher.dir
        with started(
            processes, _train_a_share, corpus, run_dir, recipe, teacher_dir, trainer.precision, cache_dir
        ) as group:
            trainer.join(group)
            return trainer.run(checkpoint_minutes, tensorboard, should_stop)


def _train_a_share(
    group: Group,
    corpus: Corpus,
    run_dir: Path,
    recipe: Recipe,
    teacher_dir: Path | None,
    precision: str,
    cache_dir: Path | None,
) -> None:
    """Do another process's share of a training, whose first checkpoint the first process has written."""
    keep_freed_memory()
    trainer = Trainer(
        corpus, run_dir, recipe, init_from=None, new_tokenizer=False,
        teacher=None if teacher_dir is None else open_run(teacher_dir), resume=True, device="cpu", precision=precision,
        processes=group.size, rank=group.rank, reporter=Silent(), cache_dir=cache_dir,
    )  # fmt: skip
    trainer.join(group)
    # The first process comes to the same end, and says so.
    with suppress(UlimiError, Interrupted):
        trainer.run(math.inf, tensorboard=False, should_stop=lambda: False)


class Trainer:
    """One run: its model, optimizer, average, random states and position.

    With several processes each has one, of which the first alone (`rank` 0) writes.
    """

    def __init__(
        self,
        corpus: Corpus,
        run_dir: Path,
        recipe: Recipe,
        *,
        init_from: Run | None,
        new_tokenizer: bool,
        resume: bool,
        device: str,
        reporter: Reporter,
        cache_dir: Path | None,
        precision: str = "auto",
        teacher: Run | None = None,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.run_dir = run_dir
        self.recipe = recipe
        self.reporter = reporter
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.rank = rank
        self.group = Group()
        old = claim_folder(run_dir, recipe, resume=resume, init_from=init_from)

        teacher = find_teacher(teacher, old, init_from, recipe)
        if old is not None:
            self.tokenizer = old.tokenizer
        elif init_from is not None and not new_tokenizer:
            self.tokenizer = init_from.tokenizer
        elif teacher is not None:
            self.tokenizer = teacher.tokenizer
        else:
            t = recipe.tokenizer
            reporter.note(f"training a {t.kind} tokenizer on {corpus.train_path}")
            self.tokenizer = Tokenizer.train(
                read_lines(corpus.train_path), kind=t.kind, vocab_size=t.vocab_size or None,
                min_frequency=t.min_frequency,
            )  # fmt: skip
        self.train_text = encode_file(corpus.train_path, self.tokenizer, cache_dir)
        self.valid_text = encode_file(corpus.valid_path, self.tokenizer, cache_dir)
        self.streams_BS = make_streams(self.train_text.ids, recipe.data.batch_size)

        # Each process draws its own masks.
        self.rng = torch.Generator(device=self.device).manual_seed(recipe.optim.seed + rank)
        self.window_rng = np.random.default_rng(recipe.optim.seed)
        self.config = {"vocab_size": self.tokenizer.vocab_size, **recipe.model.model_dump()}
        weights_rng = torch.Generator().manual_seed(recipe.optim.seed)
        self.model = AWDLSTM(**self.config, rng=weights_rng).to(self.device)
        if init_from is not None and old is None:
            adopt_weights(self.model, self.tokenizer, init_from, np.random.default_rng(recipe.optim.seed))
        self.optimizer = make_optimizer(self.model, recipe.optim)
        averages = recipe.optim.average_at_start or recipe.optim.average_share > 0
        self.average = self._new_average() if averages else None
        # Now: one that cannot be loaded must not leave a run behind.
        self.teacher = load_teacher(teacher, self.device) if teacher is not None else None
        self.lessons: Lessons | None = None
        self.taught: dict[int, tuple[Tensor, Tensor]] = {}
        """what the teacher says of the present window, for each length that has come"""
        self.state: State = self.model.initial_state(recipe.data.batch_size)
        self.dropout_share = 1.0
        self.take_gradients: Step = self.gradients
        # The entmax loss looks at values to know when it is done, which a graph cannot.
        if has_cudnn(self.device) and recipe.loss.kind == "cross_entropy":
            self.take_gradients = self._graphed_step()
        self.progress = Progress(data_digest=self._data_digest(), device=self.device.type)
        self.best: dict[str, Tensor] | None = None
        """best weights that are not written yet; the first process keeps them"""
        self.saved = time.perf_counter()
        self.meta = old.meta if old is not None else self._new_meta(corpus, init_from, processes)
        if teacher is not None:
            self.meta["teacher"] = describe_teacher(teacher)
        if old is not None:
            self._load_checkpoint()
            if precision == "auto":
                self.precision = choose_precision(old.meta.get("machine", {}).get("precision", "auto"), self.device)
            if rank == 0:
                write_text(run_dir / "recipe.toml", recipe.to_toml())
                before = old.meta.get("machine", {}).get("processes", 1)
                if processes != before and not self.finished():
                    reporter.note(f"begun with --processes {before}; {processes} will draw other dropout masks")
            if rank == 0 and not self.finished():
                # A finished run that goes on is no longer what its scores say.
                for key in ("training", "scores", "onnx"):
                    self.meta.pop(key, None)
                write_json(run_dir / "meta.json", self.meta)
        else:
            self._write_static_files(b"" if init_from is None else init_from.source_card())
            self.save_checkpoint()
        num = sum(p.numel() for p in self.model.parameters())
        reporter.note(
            f"{num / 1e6:.1f}M parameters, {self.tokenizer.vocab_size} {self.tokenizer.kind} tokens; "
            f"train {len(self.train_text.ids):,} tokens, valid {len(self.valid_text.ids):,}; "
            f"on {self.device}, {self.precision}" + f", {processes} processes" * (processes > 1)
        )

    def _new_average(self) -> RunningAverage:
        """Make one that has seen nothing: NT-ASGD's is the plain mean since its trigger."""
        return RunningAverage(self.model, self.recipe.optim.average_share or 1.0)

    def join(self, group: Group) -> None:
        """Be one of several processes from now on: take one's share of the streams, and of their states."""
        self.group = group
        rows = group.rows(len(self.streams_BS))
        self.streams_BS = self.streams_BS[rows]
        self.state = [(h[:, rows].contiguous(), c[:, rows].contiguous()) for h, c in self.state]
        group.total(torch.zeros(1))  # whoever is ready waits here, where no clock runs

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, checkpoint_minutes: float, tensorboard: bool, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Train until the recipe says that it is enough; then score the best weights on one stream."""
        if self.finished():
            num = self.progress.epoch
            self.reporter.note(
                f"finished, {num} epoch{'s' * (num != 1)} done; a larger {' or '.join(RESUMABLE_CHANGES)} lets it go on"
            )
        elif self.teacher is not None:
            self.lessons = self._hear(self.teacher, should_stop)
            self.teacher = None  # it may be large
        writer = _open_tensorboard(self.run_dir / "tensorboard") if tensorboard else None
        while not self.finished():
            self._epoch(checkpoint_minutes, should_stop)
            row = self._end_epoch()
            self.reporter.epoch(row)
            if writer is not None:
                for key, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(key, value, row["epoch"])
        if writer is not None:
            writer.close()
        return self._finish() if self.rank == 0 else {}

    def _hear(self, teacher: Teacher, should_stop: Callable[[], bool]) -> Lessons:
        """Let the teacher read the training streams; a stop there loses nothing but its time."""
        self.reporter.note("the teacher reads the training text")
        started = told = time.perf_counter()

        def on_tokens(done: int) -> None:
            nonlocal told
            if should_stop():
                raise Interrupted
            if time.perf_counter() - told > SECONDS_BETWEEN_NOTES:
                told = time.perf_counter()
                rate = done / (told - started)
                self.reporter.note(f"the teacher has read {done / self.streams_BS.size:.0%}  {rate:,.0f} tokens/s")

        # Of its own, so that a resumed run hears the same.
        rng = torch.Generator(device=self.device).manual_seed(self.recipe.optim.seed + self.rank)
        lessons = teacher.read_streams(self.streams_BS, rng, on_tokens)
        self.progress.seconds += time.perf_counter() - started
        return lessons

    def _lay_out(self, lessons: Lessons, start: int, length: int) -> None:
        """Put a window of the lessons where `gradients` looks for it: always the same memory, as a graph wants it."""
        new = lessons.window(start, length)
        if length not in self.taught:
            self.taught[length] = new
        for mine, given in zip(self.taught[length], new, strict=True):
            mine.copy_(given)

    def finished(self) -> bool:
        """Tell whether the recipe says that it is enough."""
        p, optim = self.progress, self.recipe.optim
        patience_over = optim.patience > 0 and p.epoch - p.best_epoch >= optim.patience
        return p.finished or p.epoch >= optim.max_epochs or (p.epoch > 0 and patience_over)

    def _graphed_step(self) -> GraphedStep:
        return GraphedStep(self.gradients, list(self.model.parameters()), self.rng)

    def _set_dropouts(self) -> None:
        """Give the dropouts the share that is theirs in this epoch (curriculum dropout).

        An evenly growing dropout is due to Morerio et al. 2017 (arXiv 1703.06229); of language models, O'Neill &
        Bollegala 2018 (arXiv 1811.00998).
        """
        epochs = self.recipe.optim.dropout_warmup_epochs
        share = min(1.0, self.progress.epoch / epochs) if epochs else 1.0
        if share == self.dropout_share:
            return
        self.dropout_share = share
        full = {name: value for name, value in self.config.items() if name.endswith("_dropout")}
        self.model.set_dropouts(**{name: p * share for name, p in full.items()})
        if isinstance(self.take_gradients, GraphedStep):
            # A graph keeps the dropouts that it was recorded with.
            self.take_gradients = self._graphed_step()

    def _epoch(self, checkpoint_minutes: float, should_stop: Callable[[], bool]) -> None:
        """Train on the windows from the present position to the end of the streams."""
        data, optim, p = self.recipe.data, self.recipe.optim, self.progress
        self._set_dropouts()
        tokens_per_epoch = data.batch_size * (self.streams_BS.shape[1] - 1)
        windows = Windows(
            self.streams_BS, bptt=data.bptt, variable_length=data.variable_length, rng=self.window_rng,
            position=p.position,
        )  # fmt: skip
        started, base_seconds = time.perf_counter(), p.seconds
        total_loss = torch.tensor(p.epoch_loss, dtype=torch.float64, device=self.device)
        self.model.train()
        for inputs, targets in windows:
            if self.lessons is not None:
                self._lay_out(self.lessons, p.position, inputs.shape[1])
            inputs_BT = torch.from_numpy(inputs).to(self.device)
            targets_BT = torch.from_numpy(targets).to(self.device)
            token_loss, self.state = self.take_gradients(inputs_BT, targets_BT, self.state)
            lr = learning_rate(
                optim, step=p.step, progress=p.tokens / (tokens_per_epoch * optim.max_epochs), epochs_done=p.epoch,
                window=inputs_BT.size(1), bptt=data.bptt,
            )  # fmt: skip
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            if self.average is not None:
                self.average.update()

            num_tokens = data.batch_size * targets_BT.size(1)
            total_loss += token_loss * num_tokens  # stays on the device: no wait at each step
            p.step += 1
            p.tokens += num_tokens
            p.epoch_tokens += num_tokens
            p.position = windows.position
            due = time.perf_counter() - self.saved > 60 * checkpoint_minutes
            stopping, due = self.group.agree(should_stop(), due)
            if stopping or due or p.step % CHECK_EVERY == 0:
                p.epoch_loss = total_loss.item()
                p.seconds = base_seconds + time.perf_counter() - started
                self._check_finite(p.epoch_loss, "training loss", lr)
                self.reporter.step(p, tokens_per_epoch, p.epoch_loss / p.epoch_tokens, lr)
            if stopping or due:
                self._check_weights(lr)
                self.save_checkpoint()
            if stopping:
                raise Interrupted
        p.epoch_loss = total_loss.item()
        p.seconds = base_seconds + time.perf_counter() - started
        self._check_finite(p.epoch_loss, "training loss", optim.lr)

    def gradients(self, inputs_BT: Tensor, targets_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Leave a window's clipped gradients in the parameters; give its loss, without AR and TAR, and the state."""
        loss, model = self.recipe.loss, self.model
        self.optimizer.zero_grad(set_to_none=True)
        taught = None
        if self.lessons is not None:
            ids_NK, probs_NK = self.taught[inputs_BT.size(1)]
            taught = ids_NK, probs_NK * loss.teacher_share
        with product_precision(self.device, self.precision):
            out = model.features(inputs_BT, state, self.rng)
        # float16 would lose the small gradients of the many improbable tokens.
        with product_precision(self.device, "bf16" if self.precision == "fp16" else self.precision):
            token_loss = training_loss(
                out.dropped.flatten(0, 1), model.lm_head.weight, model.lm_head.bias, targets_BT.flatten(), loss.kind,
                loss.alpha, taught,
            )  # fmt: skip
        ar, tar = regularisation(out.raw, out.dropped, loss.ar_alpha, loss.tar_beta)
        # Backward products keep the types of the forward ones, but whether fp32 means TF32 is asked again.
        with product_precision(self.device, "tf32" if self.precision == "tf32" else "fp32"):
            (token_loss + ar + tar).backward()  # type: ignore[no-untyped-call]
        mean_loss = self.group.average_gradients(model.parameters(), token_loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), self.recipe.optim.max_grad_norm)
        return mean_loss, detach_state(out.state)

    def _end_epoch(self) -> dict[str, Any]:
        """Validate the weights that would be saved, save them if they are the best, and look at the trigger."""
        p, optim = self.progress, self.recipe.optim
        started = time.perf_counter()
        averaging = self.average is not None
        if self.average is not None:
            with self.average.applied():
                valid = self._validate_and_keep()
        else:
            valid = self._validate_and_keep()
        fired = optim.kind == "nt-asgd" and non_monotonic(p.history, valid, optim.nonmono_interval)
        if fired and not averaging:
            self.average = self._new_average()
            self.reporter.note(f"epoch {p.epoch + 1}: validation no longer falls, averaging begins")
        elif fired and optim.average_at_start:
            p.finished = True
            self.reporter.note(f"epoch {p.epoch + 1}: the average no longer improves, finetuning ends")
        p.history.append(valid)
        stats = self.valid_text.stats
        p.seconds += time.perf_counter() - started
        row = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "tokens": p.tokens,
            "lr": learning_rate(
                optim, step=p.step, progress=p.tokens / (p.epoch_tokens * optim.max_epochs), epochs_done=p.epoch,
                window=self.recipe.data.bptt, bptt=self.recipe.data.bptt,
            ),
            "train_loss": p.epoch_loss / p.epoch_tokens,
            "valid_nll": valid,
            "valid_perplexity": math.exp(min(valid, 700.0)),
            "valid_bits_per_char": valid * len(self.valid_text.ids) / math.log(2) / stats.num_chars,
            "averaging": averaging,
            "best": p.best_epoch == p.epoch + 1,
            "seconds": p.seconds,
        }  # fmt: skip
        self._append_metrics(row)
        p.epoch += 1
        p.position, p.epoch_loss, p.epoch_tokens = 0, 0.0, 0
        self.state = self.model.initial_state(len(self.streams_BS))
        (due,) = self.group.agree(self.finished() or time.perf_counter() - self.saved >= SECONDS_BETWEEN_SAVES)
        if due:
            self.save_checkpoint()
        if due and self.rank == 0:
            with atomic_path(self.run_dir / "curve.png") as path:
                plot_curve(Run(self.run_dir, self.meta).metrics(), path)
        return row

    def _validate_and_keep(self) -> float:
        """Measure the model's present weights; keep them for the next save if none were better. Nats per token."""
        p = self.progress
        ids, eos_id = self.valid_text.ids, self.tokenizer.eos_id
        nats = validation_nats(
            self.model, ids, self.recipe.data.eval_batch_size, eos_id, alpha=self.recipe.alpha, group=self.group
        )
        valid = nats / len(ids)
        self._check_finite(valid, "validation loss", self.recipe.optim.lr)
        if valid < p.best:
            p.best, p.best_epoch = valid, p.epoch + 1
            if self.rank == 0:
                # A tied decoder matrix is one parameter, and is kept once.
                self.best = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return valid

    def _finish(self) -> dict[str, Any]:
        """Score the best weights on one stream and write what people read."""
        run = open_run(self.run_dir)
        engine = TorchEngine(load_model(run, self.device), run.alpha)
        nats = score_stream(engine, self.valid_text.ids, self.tokenizer.eos_id)
        score = Score.of(nats, len(self.valid_text.ids), self.valid_text.stats)
        self.meta["scores"] = {"valid": score.as_dict()}
        self.meta["training"] = {
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch,
            "seconds": round(self.progress.seconds, 1),
            "tokens": self.progress.tokens,
        }
        write_json(self.run_dir / "meta.json", self.meta)
        try:
            self.meta["onnx"] = export_onnx(run, self.valid_text, exact_nats=nats)
            self.reporter.note(f"{run.dir}/{ONNX}: {describe_export(self.meta['onnx'])}")
            write_json(self.run_dir / "meta.json", self.meta)
        except UlimiError as error:
            self.reporter.note(str(error))
        write_text(self.run_dir / "README.md", model_card(open_run(self.run_dir)))
        return score.as_dict()

    def _check_finite(self, value: float, what: str, lr: float) -> None:
        if not math.isfinite(value):
            raise UlimiError(
                f"the {what} is {value} in epoch {self.progress.epoch + 1}, step {self.progress.step}, at "
                f"lr {lr:g} with optim.kind = {self.recipe.optim.kind!r}: start again with a lower optim.lr and "
                f"another --out; the last good checkpoint in {self.run_dir} is as it was"
            )

    def _check_weights(self, lr: float) -> None:
        """Refuse to keep weights that the last step has ruined: its own loss was still that of the weights before."""
        largest = torch.stack([p.detach().abs().max() for p in self.model.parameters()]).max()
        self._check_finite(largest.item(), "largest weight", lr)

    # -- files --------------------------------------------------------------------------------------------------------

    def _data_digest(self) -> str:
        return f"{self.train_text.digest} {self.valid_text.digest}"

    def _new_meta(self, corpus: Corpus, init_from: Run | None, processes: int) -> dict[str, Any]:
        machine = {**describe_device(self.device), "precision": self.precision}
        if processes > 1:
            machine["processes"] = processes
        return {
            **new_meta(machine),
            "data": describe_corpus(corpus, self.train_text, self.valid_text),
            "init_from": None if init_from is None else place(init_from),
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _write_static_files(self, source_card: bytes) -> None:
        shutil.rmtree(self.run_dir / "last", ignore_errors=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "metrics.jsonl").unlink(missing_ok=True)
        # First, since a folder without it is taken for somebody else's.
        write_json(self.run_dir / "meta.json", self.meta)
        self.tokenizer.save(self.run_dir)
        write_text(self.run_dir / "recipe.toml", self.recipe.to_toml())
        eos = self.tokenizer.eos_id
        config = {
            "model_type": AWD_LSTM,
            "bos_token_id": eos,
            "eos_token_id": eos,
            "entmax_alpha": self.recipe.alpha,
            AWD_LSTM: self.config,
        }
        write_json(self.run_dir / "config.json", config)
        # One may be left of a training that was cut off at once.
        (self.run_dir / SOURCE_CARD).unlink(missing_ok=True)
        if source_card:
            with atomic_path(self.run_dir / SOURCE_CARD) as unfinished:
                unfinished.write_bytes(source_card)

    def _append_metrics(self, row: dict[str, Any]) -> None:
        if self.rank:
            return
        path = self.run_dir / "metrics.jsonl"
        with path.open("ab") as file:
            file.truncate(min(self.progress.metrics_bytes, file.tell()))
            file.seek(0, os.SEEK_END)
            file.write((json.dumps(row) + "\n").encode())
            self.progress.metrics_bytes = file.tell()

    def save_checkpoint(self) -> None:
        """Write the best weights, if they are new, and all that an exact resume needs: each one file, whole or not."""
        states = [[self.group.gather(part) for part in layer] for layer in self.state]
        rng_states = self.group.gather(self.rng.get_state())
        if self.rank:
            return
        if self.best is not None:
            write_tensors(self.best, self.run_dir / WEIGHTS, {"format": "pt"})
            self.best = None
        tensors: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        if self.average is not None:
            tensors |= {f"average.{n}": t for n, t in self.average.weights.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items() if value is not None}
        for i, (h, c) in enumerate(states):
            tensors |= {f"state.{i}.h": torch.cat(h, dim=1), f"state.{i}.c": torch.cat(c, dim=1)}
        tensors |= {_rng_key(rank): rng_state for rank, rng_state in enumerate(rng_states)}
        progress = {
            **asdict(self.progress),
            "num_iterates": self.average.num_iterates if self.average is not None else None,
            "window_rng": self.window_rng.bit_generator.state,
        }
        write_tensors(tensors, self.run_dir / CHECKPOINT, {"progress": json.dumps(progress)})
        self.saved = time.perf_counter()

    def _load_checkpoint(self) -> None:
        path = self.run_dir / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UlimiError(f"{path}: cannot be read: {error}") from None
        if progress["data_digest"] != self.progress.data_digest:
            raise UlimiError(
                f"the corpus is not the one that the run in {self.run_dir} was trained on; resume needs the same text"
            )
        if progress.get("device", self.device.type) != self.device.type:
            raise UlimiError(
                f"the run in {self.run_dir} was trained on {progress['device']} and can be resumed there alone: "
                f"--device {progress['device']}"
            )
        num_iterates, window_rng = progress.pop("num_iterates"), progress.pop("window_rng")
        try:
            self.progress = Progress(**progress)
        except TypeError as error:
            raise UlimiError(f"{path} was written by another ulimi, which alone can resume it: {error}") from None
        self.window_rng.bit_generator.state = window_rng
        # A run may go on with more processes than it had.
        if (key := _rng_key(self.rank)) in tensors:
            self.rng.set_state(tensors[key])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        if num_iterates is None and self.average is not None:
            raise UlimiError(f"{path} was written by another ulimi, which alone can resume it: it holds no average")
        if num_iterates is not None:
            self.average = self.average or self._new_average()
            self.average.num_iterates = num_iterates
            for name, tensor in self.average.weights.items():
                tensor.copy_(tensors[f"average.{name}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, slot = key.split(".", 2)
                slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.state = [
            (tensors[f"state.{i}.h"].to(self.device), tensors[f"state.{i}.c"].to(self.device))
            for i in range(len(self.state))
        ]


def _rng_key(rank: int) -> str:
    """Name the random state of a process in the checkpoint."""
    return f"rng.{rank}" if rank else "rng"


def validation_nats(
    model: AWDLSTM, ids: Ids, batch_size: int, eos_id: int, alpha: float = 1.0, group: Group | None = None
) -> float:
    """Total nats of a text, every token once, read in `batch_size` stretches that each start from a zero state.

    Those of a sparse model (alpha above 1) are smoothed, as in `ulimi.distribution.smoothed_nats`. The processes of a
    `group` share the stretches.
    """
    group = group or Group()
    device = model.lm_head.bias.device
    inputs_BN, targets_BN = (rows[group.rank :: group.size] for rows in validation_rows(ids, batch_size, eos_id))
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    state: State | None = None
    try:
        with torch.inference_mode():
            for start in range(0, inputs_BN.shape[1], EVALUATION_WINDOW):
                window = slice(start, start + EVALUATION_WINDOW)
                out = model(torch.from_numpy(inputs_BN[:, window]).to(device), state)
                targets = torch.from_numpy(targets_BN[:, window].copy()).to(device).flatten()
                total += target_nats(out.logits.flatten(0, 1), targets, alpha)
                state = out.state
    finally:
        model.train(was_training)
    return group.total(total).item()


def _open_tensorboard(log_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UlimiError(f"--tensorboard needs the tensorboard package: {install('all')}") from None
    return SummaryWriter(log_dir)
