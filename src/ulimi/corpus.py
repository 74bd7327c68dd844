"""Text in: the lines of a file, what they count, and the train, valid and test parts of a corpus.

Everything streams. What stays in memory is the longest line and, while a corpus is opened, some 20
bytes for each word of the held-out parts (valid and test): a training text may be larger than memory.
This module knows no tokenizer and no model.
"""

import gzip
import hashlib
import io
import itertools
import json
import re
import stat
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Goes up when the same file would be split differently; splits on disk are then made anew.
SPLIT_VERSION = 1
# Lines with text that a file needs to be split: with fewer, valid or test could stay empty.
MIN_LINES = 20

SEQUENCE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.3

_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
_SPLIT_NAMES = ("train.txt", "valid.txt", "test.txt")
_BLOCKS_PER_GROUP = 20
_MAX_BLOCK_LINES = 100

_UTF8_BOM = b"\xef\xbb\xbf"
# None of these can start UTF-8 text, so no good file is refused for its first bytes.
_FOREIGN_STARTS = {
    b"\xff\xfe": "UTF-16 text, not UTF-8; save the file as UTF-8",
    b"\xfe\xff": "UTF-16 text, not UTF-8; save the file as UTF-8",
    b"\x1f\x8b": "gzip data, not text; decompress it, or give a file whose name ends in .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data, not text; decompress it, or give a file whose name ends in .zst",
}
_NOT_WORDS = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True)
class TextStats:
    """Count a text as it stands in its file, so that results under any tokenizer compare.

    Args:
        num_lines: lines, empty ones included.
        num_words: whitespace-separated words.
        num_chars: Unicode code points, one newline a line included.
        num_bytes: bytes of UTF-8, one newline a line included.
    """

    num_lines: int = 0
    num_words: int = 0
    num_chars: int = 0
    num_bytes: int = 0

    def __add__(self, other: "TextStats") -> "TextStats":
        return TextStats(
            self.num_lines + other.num_lines,
            self.num_words + other.num_words,
            self.num_chars + other.num_chars,
            self.num_bytes + other.num_bytes,
        )


def count_stats(lines: Iterable[str]) -> TextStats:
    """Count lines that come without their line ends, as from `read_lines`."""
    num_lines = num_words = num_chars = num_bytes = 0
    for line in lines:
        num_lines += 1
        num_words += len(line.split())
        num_chars += len(line) + 1
        num_bytes += len(line.encode()) + 1
    return TextStats(num_lines, num_words, num_chars, num_bytes)


def read_lines(path: Path | str | BinaryIO) -> Iterator[str]:
    r"""Stream the lines of a text file (plain, .gz or .zst; "-" is standard input), without their line ends.

    Only "\n" and "\r\n" end a line: any other separator that Unicode knows stays inside it, so that
    line numbers agree with `wc -l`, with editors and with other toolkits. A byte order mark at the
    start is dropped. The file is opened when the first line is asked for. A stream that is given
    is read as plain text and left open.

    Raises:
        UlimiError: the file is missing, unreadable, cut off or damaged, or is not UTF-8 text; the
            message names the file, and the line where there is one.
    """
    if isinstance(path, (str, Path)) and str(path) != "-":
        path = Path(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error
        with file:
            yield from _decode(_decompress(file, path.suffix.lower()), str(path))
    else:
        if isinstance(path, (str, Path)) and sys.stdin is None:
            raise UlimiError("-: standard input is closed")
        stream = sys.stdin.buffer if isinstance(path, (str, Path)) else path
        name = getattr(stream, "name", None)
        # Standard input may also have a number for its name, where it was opened from a descriptor.
        yield from _decode(stream, name if isinstance(name, str) and name != "<stdin>" else "standard input")


def _decompress(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        return cast(BinaryIO, zstd.ZstdFile(file))
    return file


def _decode(stream: BinaryIO, name: str) -> Iterator[str]:
    # Lines are cut as bytes: text mode would also end one at a lone "\r", and `str.splitlines` at "\x0b" and others.
    num_lines = 0
    try:
        for num_lines, raw in enumerate(stream, start=1):
            if num_lines == 1:
                for start, what in _FOREIGN_STARTS.items():
                    if raw.startswith(start):
                        raise UlimiError(f"{name}, line 1: this is {what}")
                raw = raw.removeprefix(_UTF8_BOM)
                if not raw:
                    continue
            if raw.endswith(b"\n"):
                raw = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
            if b"\0" in raw:
                raise UlimiError(
                    f"{name}, line {num_lines}: a NUL byte; this is a binary file or UTF-16, save it as UTF-8 text"
                )
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                column = len(raw[: error.start].decode()) + 1
                raise UlimiError(
                    f"{name}, line {num_lines}: not UTF-8 (byte {raw[error.start]:#04x} at column {column}); "
                    "save the file as UTF-8"
                ) from error
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise UlimiError(
            f"{name}, line {num_lines + 1}: cannot be decompressed from here on ({error}); "
            "the file may be damaged or cut off, or its name ends in .gz or .zst by mistake"
        ) from error
    except OSError as error:
        raise unreadable(name, error) from error


def unreadable(name: Path | str, error: OSError) -> UlimiError:
    """Say in one line why a text cannot be read."""
    match error:
        case FileNotFoundError():
            return UlimiError(f"{name}: there is no such file")
        case IsADirectoryError():
            return UlimiError(f"{name}: this is a folder; give a text file (plain, .gz or .zst)")
        case PermissionError():
            return UlimiError(f"{name}: you have no permission to read it")
        case _:
            return UlimiError(f"{name}: cannot be read ({error.strerror or error})")


def sequence_hashes(line: str) -> NDArray[np.uint64]:
    """Hash the 8-word sequences of a line, or a shorter line as a whole, to find text that stands twice.

    Letters are lower-cased and whatever is neither letter, digit nor space is dropped. The hashes are
    the same in every process, so which lines a split loses does not depend on the run.

    Returns:
        (max(1, num_words - 7),) hashes; none for a line without words.
    """
    words = _NOT_WORDS.sub("", line.lower()).split()
    if not words:
        return np.empty(0, np.uint64)
    # A short line never meets a part of a longer one: the sequences differ in their number of spaces.
    sequences = (
        " ".join(words[start : start + SEQUENCE_WORDS]) for start in range(max(1, len(words) - SEQUENCE_WORDS + 1))
    )
    digests = b"".join(hashlib.blake2b(sequence.encode(), digest_size=8).digest() for sequence in sequences)
    return np.frombuffer(digests, np.uint64)


class NearDuplicates:
    """Find what held-out text and training text share, with only the held-out side in memory.

    Two lines are near-duplicates when at least 30 % of the 8-word sequences of the line asked about
    stand on the other side; lines shorter than 8 words when they are equal without case and
    punctuation. All methods take `sequence_hashes` of a line.
    """

    def __init__(self, held_out: Iterable[str]) -> None:
        hashes = array("Q")
        for line in held_out:
            hashes.frombytes(sequence_hashes(line).tobytes())
        self._sorted = np.asarray(hashes, np.uint64)
        self._sorted.sort()  # in place: a sorted copy would double the memory
        self._in_train = np.zeros(len(hashes), bool)

    def _positions(self, hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return the positions of those hashes that are held out, the first position of equal ones."""
        left = np.searchsorted(self._sorted, hashes, side="left")
        right = np.searchsorted(self._sorted, hashes, side="right")
        return left[right > left]

    def in_held_out(self, train_line: NDArray[np.uint64]) -> bool:
        """Say whether a training line is nearly the same as something held out."""
        return _is_large_share(len(self._positions(train_line)), len(train_line))

    def add_train(self, train_line: NDArray[np.uint64]) -> None:
        """Note what a training line shares with the held-out text, for `in_train`."""
        self._in_train[self._positions(train_line)] = True

    def in_train(self, held_out_line: NDArray[np.uint64]) -> bool:
        """Say whether a held-out line is nearly the same as something in the training lines added so far."""
        return _is_large_share(int(self._in_train[self._positions(held_out_line)].sum()), len(held_out_line))


def _is_large_share(num_shared: int, num_sequences: int) -> bool:
    return num_sequences > 0 and num_shared / num_sequences >= NEAR_DUPLICATE_SHARE


@dataclass(frozen=True)
class Corpus:
    """Text files to train, choose and judge a model with.

    Args:
        train_path: the training text.
        valid_path: the text that steers training.
        test_path: the text of the final result, where there is one.
        report: counts of lines, always with these keys. `train_lines`, `valid_lines`, `test_lines`: of
            each part, empty lines included; `near_duplicates`: held-out lines that stand, exactly or
            nearly, in the training text; `valid_test_duplicates`: test lines that stand so in valid;
            `near_duplicates_removed`: lines left out of the training text when a file was split, for
            they nearly repeat held-out ones.
    """

    train_path: Path
    valid_path: Path
    test_path: Path | None
    report: dict[str, int]


def open_corpus(path: Path, work_dir: Path) -> Corpus:
    """Open a folder with train.txt, valid.txt, test.txt (each may also be .txt.gz / .txt.zst), or split one text file.

    The parts of a folder are used as they are, for a published split must stay exact; test is
    optional. What they share is counted in the report.

    A file is split 90/5/5 by position: it is cut into blocks of consecutive lines, 1 % of the file
    and at most 100 lines with text each, and of every 20 blocks one goes to valid, one to test and
    18 to train. So neighbours stay together and every stretch of the file is in every part. Which
    two of the 20 varies from group to group, by a hash of the group's number, lest the parts fall in
    step with a period of the text. Empty lines go with the line before them. Training lines that
    nearly repeat a held-out line are left out.

    Args:
        path: a folder, or a text file (plain, .gz or .zst).
        work_dir: where the parts of a file that is split are written, with a split.json that lets the
            next call re-use them; unused for a folder.

    Raises:
        UlimiError: something is missing, ambiguous, empty, too small or unreadable, or `work_dir` holds
            files of these names that no split has made.
    """
    if str(path) == "-":
        raise UlimiError("-: a corpus is read more than once, so it cannot come from standard input; give a file")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UlimiError(f"{path}: there is no such file or folder") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        return _open_folder(path)
    if not stat.S_ISREG(mode):
        raise UlimiError(f"{path}: a corpus is read more than once, so it cannot be a pipe or device; give a file")
    return _open_file(path, work_dir)


def _open_folder(folder: Path) -> Corpus:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    found: dict[str, Path] = {}
    for part in ("train", "valid", "test"):
        candidates = [part + suffix for suffix in _SUFFIXES if part + suffix in names]
        if len(candidates) > 1:
            raise UlimiError(f"{folder}: {' and '.join(candidates)} are both there; keep one of them")
        if candidates:
            found[part] = folder / candidates[0]
    missing = [f"{part}.txt" for part in ("train", "valid") if part not in found]
    if missing:
        there = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UlimiError(
            f"{folder}: {' and '.join(missing)} missing; the folder holds {there or 'nothing'}; expected are "
            "train.txt, valid.txt and, optionally, test.txt (each may also be .txt.gz or .txt.zst)"
        )
    train_path, valid_path, test_path = found["train"], found["valid"], found.get("test")

    held_out, report = _read_held_out(valid_path, test_path)
    for line in _nonempty(train_path):
        report["train_lines"] += 1
        held_out.add_train(sequence_hashes(line))
    report["near_duplicates"] = _count_in_train(held_out, valid_path, test_path)
    return Corpus(train_path, valid_path, test_path, report)


def _nonempty(path: Path) -> Iterator[str]:
    """Read the lines of a part of a corpus, and refuse it in the end if none of them has text."""
    has_text = False
    for line in read_lines(path):
        has_text = has_text or not _is_blank(line)
        yield line
    if not has_text:
        optional = ", or be left out" if path.name.startswith("test") else ""
        raise UlimiError(f"{path} is empty: it must hold at least one line with text{optional}")


def _is_blank(line: str) -> bool:
    return not line or line.isspace()


def _read_held_out(valid_path: Path, test_path: Path | None) -> tuple[NearDuplicates, dict[str, int]]:
    """Index the held-out parts, and begin the report with all that is known without the training text."""
    report = {
        "train_lines": 0,
        "valid_lines": sum(1 for _ in _nonempty(valid_path)),
        "test_lines": 0,
        "near_duplicates": 0,
        "near_duplicates_removed": 0,
        "valid_test_duplicates": 0,
    }
    valid = NearDuplicates(read_lines(valid_path))
    if test_path is None:
        return valid, report
    for line in _nonempty(test_path):
        report["test_lines"] += 1
        report["valid_test_duplicates"] += valid.in_held_out(sequence_hashes(line))
    return NearDuplicates(itertools.chain(read_lines(valid_path), read_lines(test_path))), report


def _count_in_train(held_out: NearDuplicates, *paths: Path | None) -> int:
    return sum(
        held_out.in_train(sequence_hashes(line)) for path in paths if path is not None for line in read_lines(path)
    )


def _open_file(path: Path, work_dir: Path) -> Corpus:
    if path.resolve().parent == work_dir.resolve() and path.resolve().name in _SPLIT_NAMES:
        raise UlimiError(f"{path}: its own split would overwrite it; give another folder than {work_dir}, or rename it")
    source = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = _read_manifest(work_dir)
    if manifest is None:
        strangers = [name for name in (*_SPLIT_NAMES, "split.json") if (work_dir / name).exists()]
        if strangers:
            raise UlimiError(
                f"{work_dir}: {', '.join(strangers)} would be overwritten, which no split has made; "
                f"move it away, or give another folder for the split of {path}"
            )
    # The parts count by content: where a run was killed or a part was edited, the split is made anew.
    if manifest is None or any(
        manifest[key] != now
        for key, now in (("version", SPLIT_VERSION), ("source", source), ("files", _sha256_of_parts(work_dir)))
    ):
        manifest = _split(path, source, work_dir)
    train_path, valid_path, test_path = (work_dir / name for name in _SPLIT_NAMES)
    return Corpus(train_path, valid_path, test_path, manifest["report"])


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _sha256_of_parts(folder: Path) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in _SPLIT_NAMES if (folder / name).exists()}


def _read_manifest(work_dir: Path) -> dict[str, Any] | None:
    """Return what the last split noted in `work_dir`, or nothing where there is no such note of ours."""
    path = work_dir / "split.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    ours = isinstance(manifest, dict) and manifest.keys() >= {"version", "source", "files", "report"}
    return manifest if ours else None


def _split(path: Path, source: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    """Write train.txt, valid.txt, test.txt and split.json to `work_dir`, and return the last one's content."""
    num_texts = sum(not _is_blank(line) for line in read_lines(path))
    if num_texts < MIN_LINES:
        raise UlimiError(f"{path}: {num_texts} lines with text; at least {MIN_LINES} are needed to split a file")
    block_size = min(max(num_texts // 100, 1), _MAX_BLOCK_LINES)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".split-", dir=work_dir) as temp_name:
            temp_dir = Path(temp_name)
            report = _write_parts(path, block_size, temp_dir)
            manifest = {
                "version": SPLIT_VERSION,
                "source": source,
                "files": _sha256_of_parts(temp_dir),
                "report": report,
            }
            (temp_dir / "split.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            # split.json goes first: killed in between, the folder is known as ours and its parts as stale.
            for name in ("split.json", *_SPLIT_NAMES):
                (temp_dir / name).replace(work_dir / name)
    except OSError as error:
        raise UlimiError(f"{work_dir}: the split of {path} cannot be written ({error.strerror or error})") from error
    return manifest


def _write_parts(path: Path, block_size: int, out_dir: Path) -> dict[str, int]:
    train_path, valid_path, test_path = (out_dir / name for name in _SPLIT_NAMES)
    with _create(valid_path) as valid_file, _create(test_path) as test_file:
        files = {"valid": valid_file, "test": test_file}
        for part, line in _assign(read_lines(path), block_size):
            if part != "train":
                files[part].write(line + "\n")

    held_out, report = _read_held_out(valid_path, test_path)
    has_text = False
    with _create(train_path) as train_file:
        for part, line in _assign(read_lines(path), block_size):
            if part != "train":
                continue
            hashes = sequence_hashes(line)
            if held_out.in_held_out(hashes):
                report["near_duplicates_removed"] += 1
                continue
            held_out.add_train(hashes)
            has_text = has_text or not _is_blank(line)
            report["train_lines"] += 1
            train_file.write(line + "\n")
    if not has_text:
        raise UlimiError(
            f"{path}: nothing is left to train on, for all {report['near_duplicates_removed']} training lines "
            "nearly repeat held-out ones; give a text that repeats itself less"
        )
    report["near_duplicates"] = _count_in_train(held_out, valid_path, test_path)
    return report


def _create(path: Path) -> io.TextIOWrapper:
    return path.open("w", encoding="utf-8", newline="\n")


def _assign(lines: Iterable[str], block_size: int) -> Iterator[tuple[str, str]]:
    """Give every line its part: "train", "valid" or "test"."""
    num_texts = 0
    part = _part_of_block(0)
    for line in lines:
        # Blocks count lines with text alone: where every other line is empty, a part could else be all empty.
        if not _is_blank(line):
            if num_texts % block_size == 0:
                part = _part_of_block(num_texts // block_size)
            num_texts += 1
        yield part, line


def _part_of_block(block: int) -> str:
    group, slot = divmod(block, _BLOCKS_PER_GROUP)
    digest = hashlib.blake2b(group.to_bytes(8, "little"), digest_size=8).digest()
    number, valid_slot = divmod(int.from_bytes(digest, "little"), _BLOCKS_PER_GROUP)
    test_slot = (valid_slot + 1 + number % (_BLOCKS_PER_GROUP - 1)) % _BLOCKS_PER_GROUP
    return {valid_slot: "valid", test_slot: "test"}.get(slot, "train")
