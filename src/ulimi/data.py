"""Token ids: text file -> memory-mapped ids -> parallel streams -> windows.

    train.txt --encode_file--> ids (N,) --make_streams--> (B, N // B) --Windows--> inputs (B, T), targets (B, T)

Ids lie in a file of their own, named by the hash of the text and of the tokenizer, and are mapped, not read: a corpus
larger than memory works, and a second run starts at once. Arrays are numpy's; nothing here knows torch.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.corpus import TextStats, count_stats, read_lines, unreadable
from ulimi.errors import UlimiError
from ulimi.files import atomic_path, write_json
from ulimi.tokenizer import Tokenizer

LINES_PER_BATCH = 10_000
"""lines handed to the tokenizer at once: enough for all cores, small beside any memory"""

Ids = NDArray[Any]
"""uint16 or uint32"""

IGNORED = -100
"""a target that pads the last row of a validation batch; cross entropy leaves it out"""


@dataclass(frozen=True)
class EncodedText:
    """A text as ids, one <eos> at the end of each line."""

    ids: Ids
    """(N,), memory-mapped"""
    stats: TextStats
    """of the original text"""
    num_unknown: int
    """how many of the ids are <unk>"""
    digest: str
    """hash of text and tokenizer"""


def default_cache_dir() -> Path:
    """Where encoded texts are kept: $ULIMI_CACHE, or ulimi/ in the user's cache folder."""
    if own := os.environ.get("ULIMI_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ulimi"


def encode_file(path: Path, tokenizer: Tokenizer, cache_dir: Path | None = None) -> EncodedText:
    """Encode a text file, or map what an earlier call made of the same text and tokenizer.

    Args:
        path: plain, .gz or .zst text.
        tokenizer: what encodes it.
        cache_dir: where the ids are kept; None means `default_cache_dir()`.

    Raises:
        UlimiError: the file cannot be read as text, is empty, or is a pipe; the cache cannot be written.
    """
    if str(path) == "-":
        raise UlimiError("-: the text is read more than once, so it cannot come from standard input; give a file")
    cache_dir = cache_dir or default_cache_dir()
    content = hashlib.sha256(f"ids-1 {tokenizer.kind} {path.suffix} {tokenizer.to_str()}".encode())
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder has an error of its own
            raise UlimiError(f"{path}: the text is read more than once, so it cannot be a pipe or device; give a file")
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise unreadable(path, error) from None
    digest = content.hexdigest()[:32]
    ids_path, info_path = cache_dir / f"{digest}.ids", cache_dir / f"{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        return _map(ids_path, info_path, digest)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UlimiError(
            f"the cache folder {cache_dir} cannot be made ({error.strerror}); the variable ULIMI_CACHE names another"
        ) from None
    if not os.access(cache_dir, os.W_OK):
        raise UlimiError(f"the cache folder {cache_dir} cannot be written to; the variable ULIMI_CACHE names another")
    _encode(path, tokenizer, ids_path, info_path)
    return _map(ids_path, info_path, digest)


def _map(ids_path: Path, info_path: Path, digest: str) -> EncodedText:
    info = json.loads(info_path.read_text(encoding="utf-8"))
    dtype, num_tokens, num_unknown = np.dtype(info["dtype"]), info["num_tokens"], info["num_unknown"]
    # A longer file would be mapped without a word, and be another text's.
    if ids_path.stat().st_size != num_tokens * dtype.itemsize:
        raise ValueError(f"{ids_path} does not hold {num_tokens} ids")
    ids = np.memmap(ids_path, dtype=dtype, mode="r", shape=(num_tokens,))
    return EncodedText(ids, TextStats(**info["stats"]), num_unknown, digest)


def _encode(path: Path, tokenizer: Tokenizer, ids_path: Path, info_path: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    stats, num_tokens, num_unknown = TextStats(0, 0, 0, 0), 0, 0
    with atomic_path(ids_path) as unfinished:
        with unfinished.open("wb") as file:
            for lines in _batches(read_lines(path), LINES_PER_BATCH):
                stats += count_stats(lines)
                for line_ids in tokenizer.encode_lines(lines):
                    file.write(np.array(line_ids, dtype=dtype).tobytes())
                    num_tokens += len(line_ids)
                    num_unknown += line_ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
        if num_tokens == 0:
            raise UlimiError(f"{path} is empty: at least one line of text is needed")
    info = {"dtype": dtype.name, "num_tokens": num_tokens, "num_unknown": num_unknown, "stats": asdict(stats)}
    write_json(info_path, info)


def _batches(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    lines = iter(lines)
    while batch := list(islice(lines, size)):
        yield batch


def make_streams(ids: Ids, batch_size: int) -> Ids:
    """Lay a text out as parallel streams: (N,) -> (B, N // B), a view; the last N mod B tokens are left out.

    Raises:
        UlimiError: fewer than three tokens a stream, too few for one window.
    """
    length = len(ids) // batch_size
    if length < 3:
        raise UlimiError(
            f"the training text has {len(ids)} tokens, too few for data.batch_size = {batch_size}: "
            f"at least {3 * batch_size} are needed"
        )
    return ids[: batch_size * length].reshape(batch_size, length)


class Windows:
    """One epoch of windows over streams, of random lengths (sec. 4.1), from any position on.

    Every token but a stream's first is a target exactly once. A window has at least two steps, since TAR compares
    neighbours, and at most bptt + 20, since one rare long window would set the peak of memory.

    Args:
        streams_BS: (B, S).
        bptt: base length.
        variable_length: draw each length; false gives bptt always, but at the end of the streams.
        rng: draws the lengths; its state and `position` are all that an exact resume needs.
        position: first token of the next window.
    """

    def __init__(
        self, streams_BS: Ids, *, bptt: int, variable_length: bool, rng: np.random.Generator, position: int = 0
    ) -> None:
        self._streams_BS = streams_BS
        self._bptt = bptt
        self._variable_length = variable_length
        self._rng = rng
        self.position = position

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (inputs, targets), each (B, T)."""
        last = self._streams_BS.shape[1] - 1
        while self.position < last:
            left = last - self.position
            drawn = window_length(self._rng, self._bptt) if self._variable_length else self._bptt
            length = min(drawn, left)
            if left - length == 1:
                # A rest of one token would be a window that TAR cannot take: lengthen or shorten this one.
                length += 1 if length <= 2 else -1
            start, self.position = self.position, self.position + length
            chunk = self._streams_BS[:, start : start + length + 1].astype(np.int64)
            yield chunk[:, :-1], chunk[:, 1:]


def window_length(rng: np.random.Generator, bptt: int) -> int:
    """Draw a window's length: around bptt, sometimes around half of it, so that windows start everywhere (sec. 4.1)."""
    base = bptt if rng.random() < 0.95 else bptt / 2
    return min(max(5, int(rng.normal(base, 5))), int(base) + 20)


def validation_rows(ids: Ids, batch_size: int, first_input: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a text into `batch_size` stretches for a validation that counts every token once.

    Args:
        ids: (N,).
        batch_size: B, lessened for a text shorter than that.
        first_input: the id before the text's first token, <eos>.

    Returns:
        Inputs and targets, each (B, ceil(N / B)); the padding of the last rows has the target `IGNORED`.
    """
    length = -(-len(ids) // min(batch_size, len(ids)))
    rows = -(-len(ids) // length)
    targets = np.full(rows * length, IGNORED, dtype=np.int64)
    targets[: len(ids)] = ids
    inputs = np.full(rows * length, first_input, dtype=np.int64)
    inputs[1 : len(ids)] = ids[:-1]
    return inputs.reshape(rows, length), targets.reshape(rows, length)
