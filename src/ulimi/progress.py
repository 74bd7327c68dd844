"""What a person sees while something runs: a live bar on a terminal, plain lines elsewhere. All on standard error."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from ulimi.train import Progress as RunProgress

SECONDS_BETWEEN_LINES = 30
"""where no bar can be drawn"""


class TrainingProgress:
    """`ulimi.train.Reporter` for people."""

    def __init__(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%  {task.fields[speed]}  loss {task.fields[loss]}  lr {task.fields[lr]}"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, epoch="1", speed="", loss="", lr="", left="", visible=False)
        self._last: tuple[float, int] | None = None
        self._last_line = time.perf_counter()

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, progress: "RunProgress", total_tokens: int, loss: float, lr: float) -> None:
        """Move the bar; the time left is that of the epoch, and of all epochs, should none end the run early."""
        now = time.perf_counter()
        speed = left = ""
        if self._last is not None:
            rate = (progress.tokens - self._last[1]) / (now - self._last[0])
            speed = f"{rate:,.0f} tokens/s"
            epoch_left = timedelta(seconds=round((total_tokens - progress.epoch_tokens) / rate))
            run_left = timedelta(seconds=round((total_tokens * self._max_epochs - progress.tokens) / rate))
            left = f"left {epoch_left}, in all {run_left}"
        self._last = (now, progress.tokens)
        epoch = f"{progress.epoch + 1}/{self._max_epochs}"
        loss_text, step_lr = f"{loss:.3f}", f"{lr:.3g}"
        if self._console.is_terminal:
            self._bar.update(
                self._task, total=total_tokens, completed=progress.epoch_tokens, epoch=epoch, speed=speed,
                loss=loss_text, lr=step_lr, visible=True,
            )  # fmt: skip
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = progress.epoch_tokens / total_tokens
            self.note(f"epoch {epoch} {share:4.0%}  {speed}  loss {loss_text}  lr {step_lr}  {left}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Print an epoch's figures."""
        self._last = None
        self._last_line = time.perf_counter()
        marks = ("  averaged" if row["averaging"] else "") + ("  best" if row["best"] else "")
        self.note(
            f"epoch {row['epoch']:>3}  {row['seconds'] / 60:6.1f} min  lr {row['lr']:.3g}  "
            f"train {row['train_loss']:.3f}  "
            f"valid {row['valid_nll']:.3f} nats/token, ppl {row['valid_perplexity']:.1f}, "
            f"{row['valid_bits_per_char']:.4f} bits/char{marks}"
        )


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Say what is being done: in one place on a terminal, a line each elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what: console.print(what, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda what: status.update(escape(what))


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Show a running count of something that takes a while, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    what = escape(what)
    with console.status(what) as status:
        yield lambda done: status.update(f"{what}: {done:,}")
