"""Data-parallel training: several processes of one machine, each with its share of the streams, one model.

All processes take their own streams through the same windows. Before each step the mean of their gradients goes round
(all-reduce), so that all take the same step and their weights never differ. A share of the streams has as many tokens
in each window as any other: the mean of the shares' means is the mean of all, and but for rounding and the dropout
masks N processes do what one does.

PyTorch's DistributedDataParallel sends gradients while others are still computed, which a core that computes has no
time for. Here they go as one block, by the same library (gloo). What one process alone decides, because it depends on
the clock or on the user, the first one tells the others.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulimi.errors import UlimiError
from ulimi.files import atomic_path

PATIENCE = timedelta(hours=24)
"""with the slowest process, which may have a teacher to read; one that has ended is noticed with what it was to send"""

SECONDS_TO_END = 5.0
"""that a failing process may need to be gone"""

FAILED = "failed "
"""a file of this name and a rank says why that process failed"""

INTERFACE = "GLOO_SOCKET_IFNAME"
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""what gloo is to talk through; elsewhere it finds out for itself"""


class Group:
    """The processes of one training. One alone is a group, too, in which nothing is sent.

    Args:
        rank: number of this process, from 0 on.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._block = torch.empty(0)

    def rows(self, num_rows: int) -> slice:
        """Give this process's share of a batch that divides by their number."""
        share = num_rows // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Put the mean over all processes in the place of each gradient; give that of a loss, too.

        Args:
            parameters: all have a gradient, of float32.
            loss: a number.
        """
        if self.size == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        sizes = [gradient.numel() for gradient in gradients]
        if self._block.numel() != sum(sizes) + 1:
            self._block = torch.empty(sum(sizes) + 1)
        torch.cat([*[gradient.flatten() for gradient in gradients], loss.reshape(1)], out=self._block)
        dist.all_reduce(self._block)
        *means, mean_loss = torch.split(self._block.div_(self.size), [*sizes, 1])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return mean_loss[0].clone()

    def total(self, number: Tensor) -> Tensor:
        """Add a number of each process up."""
        if self.size > 1:
            dist.all_reduce(number)
        return number

    def agree(self, *answers: bool) -> list[bool]:
        """Give the first process's answers."""
        if self.size == 1:
            return list(answers)
        told = torch.tensor(answers, dtype=torch.uint8)
        dist.broadcast(told, 0)
        return [bool(answer) for answer in told]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Give the tensors of all processes, of one shape, to the first; to the others nothing."""
        if self.size == 1:
            return [tensor]
        received = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), received)
        return received or []


@contextmanager
def started(size: int, work: Callable[..., None], *arguments: Any) -> Iterator[Group]:
    """Run `work(group, *arguments)` in `size - 1` further processes, of which this one is the first, until the end.

    Each is a fresh Python, which imports the program's main module: one that trains outside of
    `if __name__ == "__main__"` would start again there. They have as many threads each as this one.

    Raises:
        UlimiError: one of them was killed, or ended without a word; or this program has such a group already.
        RuntimeError: one of them failed; the text is its traceback.
    """
    if dist.is_initialized():
        raise UlimiError("processes: this program has a process group of its own already; allowed: 1")
    spawn = multiprocessing.get_context("spawn")
    helpers: list[SpawnProcess] = []
    with tempfile.TemporaryDirectory(prefix="ulimi-") as folder:
        try:
            with _signals_ignored():
                for rank in range(1, size):
                    place = (rank, size, folder, torch.get_num_threads())
                    helper = spawn.Process(target=_help, args=(*place, work, arguments), daemon=True)
                    helper.start()
                    helpers.append(helper)
            _join(0, size, folder, helpers)
            yield Group(0, size)
        except RuntimeError as error:
            raise _explained(error, helpers, Path(folder)) from None
        finally:
            for helper in helpers:
                helper.kill()
                helper.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _help(
    rank: int, size: int, folder: str, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Be one of the further processes."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        torch.set_num_threads(threads)
        _join(rank, size, folder, [])
        work(Group(rank, size), *arguments)
    except Exception:
        with atomic_path(Path(folder) / f"{FAILED}{rank}") as unfinished:
            unfinished.write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
    # At once: at Python's own end its threads, gloo's and the one above have been seen to stumble over one another.
    os._exit(0)


def _end_with_the_first() -> None:
    """Leave no process behind whose first one was killed; whatever it does at the moment, and whatever it ignores."""
    first = multiprocessing.parent_process()
    assert first is not None
    multiprocessing.connection.wait([first.sentinel])
    os._exit(1)


def _join(rank: int, size: int, folder: str, helpers: list[SpawnProcess]) -> None:
    """Become a member of the group when all are there."""
    store = dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[attr-defined]
    store.set(f"there {rank}", "")
    # One that ends before it is there would be waited for in vain.
    while helpers and not store.check([f"there {other}" for other in range(size)]):
        if ended := _ended(helpers, seconds=0.1):
            error = UlimiError(
                f"a process of the training ended with status {ended[0].exitcode} before it began; a program that "
                'trains with several does so inside of `if __name__ == "__main__":`'
            )
            raise _explained(error, helpers, Path(folder))
    # What a machine's own name leads to, or a variable of its user, is no matter of a training's that never leaves it.
    before = os.environ.get(INTERFACE)
    if sys.platform in LOOPBACK:
        os.environ[INTERFACE] = LOOPBACK[sys.platform]
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    finally:
        os.environ.pop(INTERFACE, None)
        if before is not None:
            os.environ[INTERFACE] = before


def _ended(helpers: list[SpawnProcess], seconds: float) -> list[SpawnProcess]:
    """Give the processes that have ended, as soon as there is one, or none after some seconds."""
    ready = multiprocessing.connection.wait([helper.sentinel for helper in helpers], seconds)
    ended = [helper for helper in helpers if helper.sentinel in ready]
    for helper in ended:
        helper.join()  # before that it may have no exit code
    return ended


def _explained(error: Exception, helpers: list[SpawnProcess], folder: Path) -> Exception:
    """Say why a process has ended, if one has: of that the others hear only that it has hung up."""
    lowest = min((helper.exitcode or 0 for helper in _ended(helpers, SECONDS_TO_END)), default=0)
    if lowest < 0:
        return UlimiError(
            f"a process of the training was ended by {signal.Signals(-lowest).name}, perhaps for want of memory; "
            "what was saved before is intact: --resume goes on from there, and fewer --processes need less"
        )
    # Those that only heard of it failed later.
    failures = sorted(folder.glob(f"{FAILED}*"), key=lambda path: path.stat().st_mtime_ns)
    if failures:
        return RuntimeError(f"a process of the training failed:\n{failures[0].read_text(encoding='utf-8')}")
    return error  # it is this process's own


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Let what is started here ignore what stops a program: the first process hears it, and decides for all."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
