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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from ulimi.errors import UlimiError

PATIENCE = timedelta(hours=24)
"""with the slowest process, which may have a teacher to read; one that has died is noticed at once"""

SECONDS_TO_END = 5.0
"""that a failing process may need to be gone"""


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

    def average_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
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
        UlimiError: one of them was killed.
    """
    with tempfile.TemporaryDirectory(prefix="ulimi-") as scratch:
        store_path = str(Path(scratch) / "store")
        with _signals_ignored():
            helpers = start_processes(
                _help, (size, store_path, torch.get_num_threads(), work, arguments), nprocs=size - 1, join=False,
                daemon=True, start_method="spawn",
            )  # type: ignore[no-untyped-call]  # fmt: skip
        assert helpers is not None
        try:
            _join(0, size, store_path, helpers)
            yield Group(0, size)
        except (RuntimeError, ProcessException) as error:
            raise _explained(error, helpers) from None
        finally:
            for process in helpers.processes:
                process.kill()
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _help(
    index: int, size: int, store_path: str, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Be one of the further processes."""
    torch.set_num_threads(threads)
    _join(index + 1, size, store_path, None)
    try:
        work(Group(index + 1, size), *arguments)
    except RuntimeError:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.is_alive():
            raise
    finally:
        dist.destroy_process_group()


def _join(rank: int, size: int, store_path: str, helpers: ProcessContext | None) -> None:
    """Become a member of the group when all are there."""
    # What a machine's own name leads to is no matter of a training's that never leaves it.
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    store = dist.FileStore(store_path, size)  # type: ignore[attr-defined]
    store.set(f"there {rank}", "")
    # One that dies before it is there would be waited for in vain.
    while helpers is not None and not store.check([f"there {other}" for other in range(size)]):
        helpers.join(timeout=0.1, grace_period=0.1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _explained(error: Exception, helpers: ProcessContext) -> Exception:
    """Say why a process has ended, if one has: of that the others hear only that it has hung up."""
    ending = multiprocessing.connection.wait([process.sentinel for process in helpers.processes], SECONDS_TO_END)
    for process in helpers.processes:
        if process.sentinel in ending:
            process.join()  # before that it may have no exit code
    exit_codes = [process.exitcode or 0 for process in helpers.processes]
    if min(exit_codes) < 0:
        return UlimiError(
            f"a process of the training was ended by {signal.Signals(-min(exit_codes)).name}, perhaps for want of "
            "memory; what was saved before is intact: --resume goes on from there, and fewer --processes need less"
        )
    try:
        helpers.join(timeout=0)
    except ProcessException as of_helper:
        error = of_helper
    return error if isinstance(error, RuntimeError) else RuntimeError(str(error))


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
