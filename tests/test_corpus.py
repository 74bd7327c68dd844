"""Text in: what a line is, what is refused and in which words, and how a file is split."""

import errno
import gzip
import hashlib
import io
import os
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import refusal
from ulimi import corpus
from ulimi.corpus import NearDuplicates, TextStats, count_stats, open_corpus, read_lines, sequence_hashes, zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
    return path


def refusal_of(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    return refusal(lambda: list(read_lines(path)))


# What a line is


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"\n", [""]),
        (b"\xef\xbb\xbf\n", [""]),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"a\rb\r\nc\r", ["a\rb", "c\r"]),
        (b"a \t\r\r\nb\x0c\r\n", ["a \t\r", "b\x0c"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\n".encode(), ["a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"]),
        ("  ǃxóõ \t\n".encode(), ["  ǃxóõ \t"]),
    ],
)
def test_only_newlines_end_lines(tmp_path, suffix, content, lines):
    path = write(tmp_path / f"text.txt{suffix}", content)
    assert list(read_lines(path)) == lines
    assert list(read_lines(str(path))) == lines


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\0")), max_size=8), st.booleans())
def test_lines_agree_with_a_split_at_newlines(lines, ends):
    text = "\n".join(lines) + ("\n" if ends else "")
    expected = text.removeprefix("\ufeff").split("\n")
    expected = [line.removesuffix("\r") for line in expected[:-1]] + expected[-1:]
    if not expected[-1]:
        expected.pop()
    assert list(read_lines(io.BytesIO(text.encode()))) == expected


def test_compressed_members_and_frames_are_read_one_after_another(tmp_path):
    (tmp_path / "a.GZ").write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"") + gzip.compress(b"o\n"))
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    frames = [COMPRESS[".zst"](part) for part in (b"one\ntw", b"", b"o\n")]
    (tmp_path / "a.ZST").write_bytes(frames[0] + skippable + frames[1] + frames[2] + skippable)
    assert list(read_lines(tmp_path / "a.GZ")) == list(read_lines(tmp_path / "a.ZST")) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_larger_than_every_buffer(tmp_path, suffix):
    generator = random.Random(0)
    lines = [f"{number} {generator.random()}" for number in range(40_000)]
    path = write(tmp_path / f"text.txt{suffix}", "\n".join(lines).encode())
    assert list(read_lines(path)) == lines


@pytest.mark.parametrize("dash", ["-", Path("-")])
def test_dash_is_standard_input_and_stays_open(monkeypatch, dash):
    buffer = io.BytesIO(b"one\r\ntwo")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    assert list(read_lines(dash)) == ["one", "two"]
    assert not buffer.closed
    buffer.seek(0)
    buffer.write(b"\xff")
    buffer.seek(0)
    assert refusal(lambda: list(read_lines(dash))).startswith("standard input, line 1: not UTF-8 ")


def test_a_file_is_closed_when_reading_stops_early(tmp_path, monkeypatch):
    opened = []
    path_open = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: opened.append(path_open(*args, **kwargs)) or opened[-1])
    for suffix in COMPRESS:
        lines = read_lines(write(tmp_path / f"text.txt{suffix}", b"one\ntwo\n"))
        opened.clear()
        assert next(lines) == "one"
        assert not opened[0].closed
        lines.close()
        assert opened[0].closed


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_of_ten_megabytes(tmp_path, suffix):
    path = write(tmp_path / f"text.txt{suffix}", b"before\n" + b"ab" * 5_000_000 + b"\r\nafter")
    assert [(len(line), line[:6]) for line in read_lines(path)] == [(6, "before"), (10_000_000, "ababab"), (5, "after")]


def peak_memory(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reading_takes_constant_memory(tmp_path, suffix):
    text = random.Random(0).randbytes(5_000_000).hex(bytes_per_sep=500, sep="\n")
    path = write(tmp_path / f"text.txt{suffix}", text.encode())
    assert peak_memory(lambda: sum(1 for _ in read_lines(path))) < 1_000_000  # of 10 MB


# What is refused


def test_invalid_utf8_is_placed(tmp_path):
    path = tmp_path / "valid.txt"
    assert refusal_of(b"one\ntwo\nsixteen bytes ok\xff\n", path) == (
        f"{path}, line 3: not UTF-8 (byte 0xff at column 17); save the file as UTF-8"
    )
    # A column is a character, as in an editor, and a byte order mark is none.
    assert "line 1: not UTF-8 (byte 0xe9 at column 3)" in refusal_of("\ufeffšó".encode() + b"\xe9", path)
    assert "line 2: not UTF-8 (byte 0xed at column 1)" in refusal_of(b"\r\n\xed\xa0\x80", path)  # a surrogate


@pytest.mark.parametrize("suffix", COMPRESS)
def test_good_lines_come_before_a_refusal(tmp_path, suffix):
    lines = read_lines(write(tmp_path / f"a.txt{suffix}", b"one\ntwo\nthr\xffee\n"))
    assert [next(lines), next(lines)] == ["one", "two"]
    assert "line 3: not UTF-8" in refusal(lambda: next(lines))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"one\ntw\0o\n", "line 2: a NUL byte; this is a binary file or UTF-16, save it as UTF-8 text"),
        ("sawubona\n".encode("utf-16-le"), "line 1: a NUL byte"),
        (b"\xff\xfe" + "sawubona\n".encode("utf-16-le"), "line 1: this is UTF-16 text, not UTF-8; save the file"),
        (b"\xfe\xff" + "sawubona\n".encode("utf-16-be"), "line 1: this is UTF-16 text, not UTF-8; save the file"),
        (gzip.compress(b"one\n"), "line 1: this is gzip data, not text"),
        (COMPRESS[".zst"](b"one\n"), "line 1: this is Zstandard data, not text"),
    ],
)
def test_what_is_not_utf8_text_gets_a_hint(tmp_path, content, hint):
    path = tmp_path / "a.txt"
    assert refusal_of(content, path).startswith(f"{path}, {hint}")


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    assert refusal(lambda: list(read_lines(tmp_path / "no.txt"))) == f"{tmp_path / 'no.txt'}: there is no such file"
    assert refusal(lambda: list(read_lines(tmp_path))).startswith(f"{tmp_path}: this is a folder; give a text file")
    path = write(tmp_path / "a.txt", b"one\n")
    assert "a.txt/b.txt: cannot be read (Not a directory)" in refusal(lambda: list(read_lines(path / "b.txt")))

    def forbid(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", forbid)  # a mode of 0 would not stop root
    assert refusal(lambda: list(read_lines(path))) == f"{path}: you have no permission to read it"


def test_a_failing_disk_is_one_line():
    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    message = refusal(lambda: list(read_lines(io.BufferedReader(Failing()))))
    assert message == "standard input: cannot be read (Input/output error)"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_off_anywhere_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](b"".join(b"line %d\n" % number for number in range(50)))
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        assert "cannot be decompressed from here on" in refusal(lambda: list(read_lines(path)))
    path.write_bytes(whole)
    assert len(list(read_lines(path))) == 50


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_and_plain_text_under_a_compressed_name_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    data = bytearray(COMPRESS[suffix](random.Random(0).randbytes(500).hex().encode() * 3))
    data[len(data) // 2] ^= 0xFF
    for content in (bytes(data), b"plain text\n", COMPRESS[suffix](b"one\n") + b"garbage"):
        assert "cannot be decompressed from here on" in refusal_of(content, path)
    assert refusal_of(b"plain text\n", path).startswith(f"{path}, line 1: ")


# Counts


def test_stats_count_the_text_as_it_stands_in_the_file(tmp_path):
    lines = ["Ngiyabonga  kakhulu", "", "ǃxóõ\u00a0yebo"]
    stats = count_stats(lines)
    text = "".join(line + "\n" for line in lines)
    assert stats == TextStats(num_lines=3, num_words=4, num_chars=len(text), num_bytes=len(text.encode()))
    assert count_stats(read_lines(write(tmp_path / "a.txt", text.encode()))) == stats
    assert count_stats(lines[:1]) + count_stats(lines[1:]) == stats
    assert sum((count_stats([line]) for line in lines), TextStats()) == stats
    assert count_stats([]) == TextStats(0, 0, 0, 0)


# Near-duplicates


def words(*numbers: int) -> str:
    return " ".join(f"igama{number}" for number in numbers)


def test_hashes_are_the_same_in_every_process():
    expected = hashlib.blake2b(b"sawubona mhlaba 3", digest_size=8).digest()
    assert sequence_hashes(" «Sawubona,  mhla-ba!» _3_ ").tobytes() == expected
    assert expected.hex() == "192bf01674716331"
    assert [len(sequence_hashes(words(*range(n)))) for n in (0, 1, 7, 8, 9, 20)] == [0, 1, 1, 1, 2, 13]


def test_thirty_percent_of_the_sequences_make_a_near_duplicate():
    held_out = NearDuplicates([words(*range(40))])
    three_of_ten = words(*range(10), *range(100, 107))
    two_of_ten = words(*range(9), *range(100, 108))
    assert [len(sequence_hashes(line)) for line in (three_of_ten, two_of_ten)] == [10, 10]
    assert held_out.in_held_out(sequence_hashes(three_of_ten))
    assert not held_out.in_held_out(sequence_hashes(two_of_ten))


def test_short_lines_are_compared_whole():
    held_out = NearDuplicates(["Yebo, mama!", words(*range(20)), "", "..."])

    def found(line: str) -> bool:
        return held_out.in_held_out(sequence_hashes(line))

    assert found("yebo mama")
    assert not found("yebo")
    assert not found("yebo mama yebo")
    assert not found(words(*range(7)))
    assert not found("")
    assert not found(" … ")
    assert not NearDuplicates(["", "..."]).in_held_out(sequence_hashes("yebo mama"))


LINES = st.lists(st.lists(st.sampled_from("abc"), max_size=14).map(" ".join), max_size=6)


@settings(max_examples=60)
@given(LINES, LINES)
def test_near_duplicates_agree_with_sets_of_sequences(train, held_out):
    def sequences(line: str) -> list[tuple[str, ...]]:
        ws = line.split()
        return [tuple(ws[i : i + 8]) for i in range(len(ws) - 7)] if len(ws) >= 8 else [tuple(ws)] * bool(ws)

    def is_near(line: str, others: list[str]) -> bool:
        known = {sequence for other in others for sequence in sequences(other)}
        hits = [sequence in known for sequence in sequences(line)]
        return bool(hits) and 10 * sum(hits) >= 3 * len(hits)

    index = NearDuplicates(held_out)
    for line in train:
        assert index.in_held_out(sequence_hashes(line)) == is_near(line, held_out)
        index.add_train(sequence_hashes(line))
    assert [index.in_train(sequence_hashes(line)) for line in held_out] == [is_near(line, train) for line in held_out]


# A folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "zul"
    folder.mkdir()
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_used_as_it_is(tmp_path, folder):
    write(folder / "train.txt", "\n".join([words(*range(20)), "Yebo, baba.", "", words(*range(50, 60))]).encode())
    write(folder / "valid.txt.gz", "\n".join(["yebo baba", words(0, 1, 2), "", words(90, 91)]).encode())
    write(folder / "test.txt.zst", "\n".join([words(*range(5, 25)), words(90, 91), words(200)]).encode())
    write(folder / "README.md", b"\xff")
    before = files_in(tmp_path)
    opened = open_corpus(folder, tmp_path / "work")
    assert (opened.train_path, opened.valid_path, opened.test_path) == (
        folder / "train.txt",
        folder / "valid.txt.gz",
        folder / "test.txt.zst",
    )
    assert opened.report == {
        "train_lines": 4,
        "valid_lines": 4,
        "test_lines": 3,
        "near_duplicates": 2,
        "near_duplicates_removed": 0,
        "valid_test_duplicates": 1,
    }
    assert files_in(tmp_path) == before
    assert not (tmp_path / "work").exists()


def test_a_held_out_line_inside_a_longer_training_line_counts(tmp_path, folder):
    write(folder / "train.txt", words(*range(100)).encode())
    write(folder / "valid.txt", words(*range(40, 48)).encode())
    assert open_corpus(folder, tmp_path).report["near_duplicates"] == 1


def test_test_is_optional(tmp_path, folder):
    write(folder / "train.txt", b"one\n")
    write(folder / "valid.txt", b"two\n")
    opened = open_corpus(folder, tmp_path)
    assert opened.test_path is None
    assert (opened.report["test_lines"], opened.report["valid_test_duplicates"]) == (0, 0)


def test_a_folder_without_its_parts_says_what_is_there(tmp_path, folder):
    assert refusal(lambda: open_corpus(folder, tmp_path)) == (
        f"{folder}: train.txt and valid.txt missing; the folder holds nothing; expected are "
        "train.txt, valid.txt and, optionally, test.txt (each may also be .txt.gz or .txt.zst)"
    )
    write(folder / "train.txt.gz", b"one\n")
    write(folder / "dev.txt", b"one\n")
    assert "valid.txt missing; the folder holds dev.txt, train.txt.gz; expected" in refusal(
        lambda: open_corpus(folder, tmp_path)
    )
    for number in range(30):
        write(folder / f"a{number:02}", b"")
    assert "holds a00, a01, a02, a03, a04, a05, a06, a07, a08, a09 and 22 more; expected" in refusal(
        lambda: open_corpus(folder, tmp_path)
    )


def test_a_part_that_is_there_twice_is_refused(tmp_path, folder):
    for name in ("train.txt", "valid.txt", "valid.txt.gz"):
        write(folder / name, b"one\n")
    assert refusal(lambda: open_corpus(folder, tmp_path)).startswith(
        f"{folder}: valid.txt and valid.txt.gz are both there"
    )


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_an_empty_part_is_refused(tmp_path, folder, part, content):
    for name in ("train", "valid", "test"):
        write(folder / f"{name}.txt", content if name == part else b"one\n")
    message = refusal(lambda: open_corpus(folder, tmp_path))
    assert message.startswith(f"{folder / part}.txt is empty: it must hold at least one line with text")
    assert message.endswith("or be left out") == (part == "test")


def test_a_bad_part_is_placed(tmp_path, folder):
    write(folder / "train.txt", b"one\n\xff\n")
    write(folder / "valid.txt", b"one\n")
    assert refusal(lambda: open_corpus(folder, tmp_path)).startswith(f"{folder / 'train.txt'}, line 2: not UTF-8")


def test_what_is_no_corpus_is_refused(tmp_path):
    assert refusal(lambda: open_corpus(tmp_path / "no", tmp_path)) == (
        f"{tmp_path / 'no'}: there is no such file or folder"
    )
    assert "cannot come from standard input" in refusal(lambda: open_corpus(Path("-"), tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be a pipe" in refusal(lambda: open_corpus(tmp_path / "pipe", tmp_path))


# A file that is split


def numbered(num_lines: int) -> list[str]:
    return [f"umugqa {number}" for number in range(num_lines)]


def split(tmp_path: Path, lines: list[str], name: str = "text.txt") -> tuple[dict[str, list[str]], corpus.Corpus]:
    path = write(tmp_path / name, "".join(line + "\n" for line in lines).encode())
    opened = open_corpus(path, tmp_path / "work")
    paths = {"train": opened.train_path, "valid": opened.valid_path, "test": opened.test_path}
    for part, part_path in paths.items():
        assert part_path == tmp_path / "work" / f"{part}.txt"
    return {part: list(read_lines(part_path)) for part, part_path in paths.items()}, opened


def test_a_file_is_split_into_blocks_from_all_over(tmp_path):
    lines = numbered(20_000)
    parts, opened = split(tmp_path, lines)
    assert {part: len(part_lines) for part, part_lines in parts.items()} == {
        "train": 18_000,
        "valid": 1_000,
        "test": 1_000,
    }
    assert Counter(list(chain(*parts.values()))) == Counter(lines)
    assert opened.report == {
        "train_lines": 18_000,
        "valid_lines": 1_000,
        "test_lines": 1_000,
        "near_duplicates": 0,
        "near_duplicates_removed": 0,
        "valid_test_duplicates": 0,
    }
    for part_lines in parts.values():
        numbers = np.array([int(line.split()[1]) for line in part_lines])
        assert (np.diff(numbers) > 0).all()
        assert set(numbers // 2_000) == set(range(10))
        assert (np.diff(numbers.reshape(-1, 100)) == 1).all()


@pytest.mark.parametrize("num_lines", [20, 21, 39, 99, 199, 200, 201, 250, 1_999, 2_345])
def test_small_files_have_all_parts_too(tmp_path, num_lines):
    parts, _ = split(tmp_path, numbered(num_lines))
    for part in ("valid", "test"):
        assert 1 <= len(parts[part]) <= num_lines / 20 + 1 + num_lines // 100
    assert sum(map(len, parts.values())) == num_lines


def test_the_split_of_a_file_never_changes(tmp_path):
    parts, _ = split(tmp_path, numbered(60))
    assert {part: parts[part] for part in ("valid", "test")} == {
        "valid": ["umugqa 18", "umugqa 31", "umugqa 55"],
        "test": ["umugqa 19", "umugqa 33", "umugqa 56"],
    }, "raise SPLIT_VERSION"


def test_empty_lines_do_not_fill_a_part(tmp_path):
    lines = [line for text in numbered(30) for line in ("", text)]
    parts, _ = split(tmp_path, lines)
    assert all(any(part_lines) for part_lines in parts.values())
    assert sum(map(len, parts.values())) == 60
    assert sum(line == "" for line in list(chain(*parts.values()))) == 30


def test_parts_do_not_fall_in_step_with_the_text(tmp_path):
    parts, _ = split(tmp_path, [f"insimu{number % 4} {number}" for number in range(199)])
    for part in ("valid", "test"):
        assert len({line.split()[0] for line in parts[part]}) > 2


def test_training_lines_that_repeat_held_out_ones_are_removed(tmp_path):
    lines = [words(*range(100 * number, 100 * number + 17)) for number in range(200)]
    clean, _ = split(tmp_path, lines)
    valid, test = clean["valid"][0], clean["test"][0]
    at = {line: lines.index(line) for line in (valid, test)}
    free = [index for index, line in enumerate(lines) if line in clean["train"]]
    lines[free[0]] = valid
    lines[free[1]] = test.upper().replace(" ", ", ") + "!"
    lines[free[2]] = " ".join([*valid.split()[:10], *words(*range(-7, 0)).split()])  # 3 of 10 sequences
    lines[free[3]] = " ".join([*valid.split()[:9], *words(*range(-8, 0)).split()])  # 2 of 10
    lines[at[test]] = valid
    lines.insert(free[0] + 1, "")  # it stays, and moves no block
    assert at[valid] != at[test]

    parts, opened = split(tmp_path, lines)
    assert lines[free[0]] not in parts["train"]
    assert lines[free[2] + 1] not in parts["train"]
    assert lines[free[3] + 1] in parts["train"]
    assert "" in parts["train"]
    assert lines[free[1] + 1] in parts["train"]  # what it repeated is no longer there
    assert opened.report["near_duplicates_removed"] == 2
    assert opened.report["valid_test_duplicates"] == 1
    assert opened.report["train_lines"] == len(parts["train"]) == len(clean["train"]) - 2 + 1


def test_held_out_lines_that_stand_in_longer_training_lines_are_counted_after_a_split(tmp_path):
    lines = [words(*range(100 * number, 100 * number + 60)) for number in range(100)]
    clean, _ = split(tmp_path, lines)
    held_out, free = lines.index(clean["valid"][0]), lines.index(clean["train"][0])
    lines[held_out] = " ".join(lines[free].split()[:10])
    parts, opened = split(tmp_path, lines)
    assert parts["train"] == clean["train"]
    assert opened.report["near_duplicates"] == 1


def test_short_training_lines_are_removed_when_they_are_the_same(tmp_path):
    lines = numbered(100)
    clean, _ = split(tmp_path, lines)
    free = lines.index(clean["train"][0])
    lines[free] = clean["test"][0].upper() + "?"
    parts, opened = split(tmp_path, lines)
    assert parts["train"] == clean["train"][1:]
    assert opened.report["near_duplicates_removed"] == 1


@pytest.mark.parametrize("num_lines", [0, 1, 19])
def test_too_few_lines_to_split(tmp_path, num_lines):
    path = write(tmp_path / "a.txt", "\n \n".join(numbered(num_lines)).encode())
    message = refusal(lambda: open_corpus(path, tmp_path / "work"))
    assert message == f"{path}: {num_lines} lines with text; at least 20 are needed to split a file"
    assert not (tmp_path / "work").exists()


def test_nothing_left_to_train_on(tmp_path):
    path = write(tmp_path / "a.txt", b"Yebo.\n\n" * 40)
    message = refusal(lambda: open_corpus(path, tmp_path / "work"))
    assert message.startswith(f"{path}: nothing is left to train on, for all 36 training lines nearly repeat held-out")
    assert files_in(tmp_path / "work") == {}


def test_the_form_of_the_file_does_not_change_its_split(tmp_path):
    text = "".join(line + "\n" for line in numbered(100))
    contents = set()
    for name, content in (
        ("a.txt", text),
        ("b.txt.gz", text),
        ("c.zst", text),
        ("d", "\ufeff" + text.removesuffix("\n").replace("\n", "\r\n")),
    ):
        open_corpus(write(tmp_path / name, content.encode()), tmp_path / "work")
        contents.add(tuple((tmp_path / "work" / f"{part}.txt").read_bytes() for part in ("train", "valid", "test")))
    assert len(contents) == 1
    assert b"\r" not in b"".join(*contents)


def test_a_split_is_written_to_its_folder_alone_and_readable_like_any_file(tmp_path):
    split(tmp_path, numbered(50))
    assert set(files_in(tmp_path)) == {"text.txt", *(f"work/{name}" for name in WORK_FILES)}
    assert (tmp_path / "work/train.txt").stat().st_mode == (tmp_path / "text.txt").stat().st_mode


WORK_FILES = ("train.txt", "valid.txt", "test.txt", "split.json")


def inodes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_ino for name in WORK_FILES]


def test_a_split_is_used_again(tmp_path, monkeypatch):
    _, first = split(tmp_path, numbered(50))
    before = inodes(tmp_path / "work")
    monkeypatch.setattr(corpus, "_split", None)
    _, again = split(tmp_path, numbered(50))
    assert again == first
    assert inodes(tmp_path / "work") == before
    _, renamed = split(tmp_path, numbered(50), name="other.txt")
    assert renamed == first


@pytest.mark.parametrize("name", ["train.txt", "valid.txt", "test.txt"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_split_is_made_anew_where_a_part_is_missing_or_edited(tmp_path, name, harm):
    split(tmp_path, numbered(50))
    before = files_in(tmp_path)
    harm(tmp_path / "work" / name)
    split(tmp_path, numbered(50))
    assert files_in(tmp_path) == before


def test_a_split_is_made_anew_for_another_text_or_version(tmp_path, monkeypatch):
    split(tmp_path, numbered(50))
    same_size = [line.replace("um", "im") for line in numbered(50)]
    parts, _ = split(tmp_path, same_size)
    assert set(chain(*parts.values())) == set(same_size)
    before = inodes(tmp_path / "work")
    monkeypatch.setattr(corpus, "SPLIT_VERSION", corpus.SPLIT_VERSION + 1)
    split(tmp_path, same_size)
    assert inodes(tmp_path / "work") != before


@pytest.mark.parametrize("num_done", range(4))
@pytest.mark.parametrize("is_first", [True, False])
def test_a_split_that_was_interrupted_is_completed(tmp_path, monkeypatch, num_done, is_first):
    if not is_first:
        split(tmp_path, numbered(40))
    replaced = []
    path_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if len(replaced) == num_done:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced.append(target)
        return path_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    message = refusal(lambda: split(tmp_path, numbered(50)))
    assert message == (
        f"{tmp_path / 'work'}: the split of {tmp_path / 'text.txt'} cannot be written (No space left on device)"
    )
    assert len(files_in(tmp_path / "work")) == (num_done if is_first else 4)
    monkeypatch.undo()
    parts, _ = split(tmp_path, numbered(50))
    assert set(chain(*parts.values())) == set(numbered(50))


@pytest.mark.parametrize("manifest", [None, b"", b"[]", b'{"version": 3}'])
def test_files_that_no_split_has_made_are_not_overwritten(tmp_path, manifest):
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    write(work_dir / "train.txt", b"precious\n")
    if manifest is not None:
        write(work_dir / "split.json", manifest)
    before = files_in(work_dir)
    message = refusal(lambda: split(tmp_path, numbered(50)))
    assert message.startswith(f"{work_dir}: train.txt")
    assert "would be overwritten" in message
    assert files_in(work_dir) == before


def test_a_file_is_not_overwritten_by_its_own_split(tmp_path):
    split(tmp_path, numbered(50))
    work_dir = tmp_path / "work"
    before = files_in(work_dir)
    (tmp_path / "link.txt").symlink_to(work_dir / "train.txt")
    for path in (work_dir / "train.txt", tmp_path / "work" / ".." / "work" / "train.txt", tmp_path / "link.txt"):
        assert "its own split would overwrite it" in refusal(lambda path=path: open_corpus(path, work_dir))
    assert files_in(work_dir) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(numbered(50)).encode())
    assert refusal(lambda: open_corpus(path, path)).startswith(f"{path}: the split of {path} cannot be written (")
    (tmp_path / "work" / "split.json").mkdir(parents=True)
    assert "split.json: this is a folder" in refusal(lambda: open_corpus(path, tmp_path / "work"))


def test_splitting_takes_constant_memory(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(5_000):
            file.write(f"{number:04000}\n")
    assert peak_memory(lambda: open_corpus(path, tmp_path / "work")) < 2_000_000  # of 20 MB
