"""Clean text that is to be trained on: what PDF files, page furniture and other languages left in it.

Rules are small functions from a line to what is left of it; `RULES` holds them in the order in which they are applied.
What a rule cannot see in one line (which words a language has, whether it writes short words) it takes from the text
itself, counted before: `Statistics`. Cleaning goes over the text again until a round changes nothing, so cleaned text
comes out of another cleaning as it is. Nothing is looked up and nothing is learnt elsewhere.

The rules are made for isiZulu and its sisters, which write long words. Each would rather leave a fault than take good
text.

Light floor; the text streams: in memory are its vocabulary and a hash for each long line.
"""

import hashlib
import heapq
import itertools
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ulimi.corpus import read_lines
from ulimi.errors import UlimiError, nearest
from ulimi.files import atomic_path

MIN_DUPLICATE_CHARS = 40
"""a shorter line that stands twice is text as people write it: "Siyabonga." """

_VOWELS = "aeiou"
_LETTERS = r"[^\W\d_]+"
_BEFORE = r"(?<![\w'’-])"
_AFTER = r"(?![\w'’-])"
_FREE_WORD = re.compile(rf"{_BEFORE}{_LETTERS}{_AFTER}")
_TIGHT = re.compile(rf"{_BEFORE}({_LETTERS})-({_LETTERS}|\d)")
_OPEN = re.compile(rf"{_BEFORE}({_LETTERS})(- | -)({_LETTERS}|\d)(?:(?<=\d)|{_AFTER})")
_BROKEN = re.compile(rf"{_BEFORE}({_LETTERS})-({_LETTERS}){_AFTER}")
_APART = re.compile(rf"{_BEFORE}({_LETTERS}) (?=({_LETTERS}){_AFTER})")


@dataclass
class Statistics:
    """What is counted over all lines of the text before they are cleaned."""

    words: Counter[str] = field(default_factory=Counter)
    """lower-cased words that stand free, without a hyphen or an apostrophe"""
    hyphenated: Counter[tuple[str, str]] = field(default_factory=Counter)
    """the two sides of a hyphen without spaces, lower-cased"""
    apart: Counter[tuple[str, str]] = field(default_factory=Counter)
    """neighbours that one space parts and that make a word, lower-cased; the second does not begin with a capital"""
    prefixes: Counter[str] = field(default_factory=Counter)
    """what stands before a hyphen and a capital or digit: "i" of "i-HIV", "nge" of "nge-2010" """
    num_lines: int = 0
    num_english: int = 0
    num_words: int = 0
    num_short: int = 0
    """words of one to three letters"""

    def add(self, line: str) -> None:
        """Count one line."""
        words = _FREE_WORD.findall(line)
        self.words.update(word.lower() for word in words)
        self.num_words += len(words)
        self.num_short += sum(len(word) <= 3 for word in words)
        for match in _TIGHT.finditer(line):
            left, right = match.groups()
            self.hyphenated[left.lower(), right.lower()] += 1
            if not right[0].islower():
                self.prefixes[left.lower()] += 1
        self.num_lines += bool(words)
        self.num_english += _seems_english(line)

    def add_apart(self, line: str) -> None:
        """Count the neighbours in one line, after all words are counted; there are too many neighbours for memory."""
        for match in _APART.finditer(line):
            left, right = match.groups()
            if right[0].islower() and (left + right).lower() in self.words:
                self.apart[left.lower(), right.lower()] += 1


# Characters

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb]")
_SPACE_LIKE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ue000-\uf8ff"
    "\U000f0000-\U000ffffd\U00100000-\U0010fffd]"
)


def characters(line: str) -> str:
    """Take out what has no shape of its own, put spaces for control and private-use characters, compose (NFC)."""
    return unicodedata.normalize("NFC", _SPACE_LIKE.sub(" ", _INVISIBLE.sub("", line)))


def replaced(line: str) -> str:
    """Remove a line with replacement characters: which letters stood there is lost."""
    return "" if "\ufffd" in line else line


def spaces(line: str) -> str:
    """Make runs of spaces one, and none at the ends; nor a carriage return, which would end the line."""
    return re.sub(" {2,}", " ", line).strip(" \r")


# Furniture of pages

_PAGE_BRACKET = re.compile(r"\[\s*(?:i?khasi|page)\s+\d[^\]]*\]", re.IGNORECASE)
_PAGE_HEAD = re.compile(
    r"^(?:\(c\) (?:\S+ ){1,5}?)?(?:ikhasi|page) \d+(?: \(c\) (?:\S+ ){0,4}?(?:Ltd|Inc)\b\.?|$)|"
    r"^\(c\) (?:\S+ ){1,5}?(?:ikhasi|page) \d+\b",
    re.IGNORECASE,
)


_REFERENCE = re.compile(r"↑|^(?:Retrieved|Accessed)(?: on)? [A-Z][a-z]+ \d{1,2}, \d{4}\.?$")


def index(line: str) -> str:
    """Take out page marks ("[ikhasi 3 umugqa 7]", "Page 3 (c) … Ltd") and remove an encyclopaedia's references."""
    if _REFERENCE.search(line):
        return ""
    if _PAGE_BRACKET.search(line):
        line = _PAGE_BRACKET.sub(" ", line).strip(" ")
    return _PAGE_HEAD.sub("", line).lstrip(" ") if _PAGE_HEAD.search(line) else line


_LEADERS = re.compile(r"\.{5} *\d|^[-_=*]{4}")


def tables(line: str) -> str:
    """Remove lines of few letters, with leaders to a page number, and those in which half the words are numbers."""
    if sum(map(str.isalpha, line)) < 0.5 * len("".join(line.split())) or _LEADERS.search(line):
        return ""
    words = line.split()
    numbers = sum(any(map(str.isdigit, word)) and sum(map(str.isalpha, word)) <= 1 for word in words)
    return "" if numbers >= max(3, 0.5 * len(words)) else line


_SPACED = re.compile(r"(?<!\S)(?:[^\W\d_] ){5}[^\W\d_](?!\S)")


def spaced(line: str) -> str:
    """Remove a line in which letters stand apart ("N j e n g o b a"): where its words end is lost."""
    return "" if _SPACED.search(line) else line


def capitals(line: str) -> str:
    """Remove a line that is all in capitals: a heading, or a passage set like one."""
    return "" if line.isupper() else line


# A title and a name, or an office, in capitals, and perhaps an office in brackets, up to a colon.
_SPEAKER = re.compile(
    r"^(?:\[isikhulumi\?\]|(?:"
    r"(?:MR|MRS|MS|MISS|DR|DKT|PROF|REV|ADV|HON|MNU|MNUMZ|MNUMZANE|NKK|NKKZ|NKZ|NKSZ|NKOSIKAZI|NKOSAZAN[AE]|I?NKOSI|"
    r"U?MNTWANA|U?MFUNDISI|PRINCE|PRINCESS|THE|AN HON|Mnu|Mnumz|Dr|Dkt|Nkk|Nksz)\.?(?: [A-Z]+\.?){1,6}|"
    r"(?:ISIKHULUMI|U?SIHLALO|U?MPHATHISIHLALO|U?MNGCINISIHLALO|U?SOMLOMO|U?NDUNANKULU|U?NGQONGQOSHE)"
    r"(?: [A-Z]+\.?){0,6}"
    r") ?:)(?: ?\([^()]{3,90}\) ?:)? *"
)


def speakers(line: str) -> str:
    """Take the speaker, in capitals up to a colon, off the start of a line of minutes."""
    return _SPEAKER.sub("", line)


# Other languages

_ENGLISH = frozenset(
    """
    the of and to in is are was were for with that this on at from as it an or not have has had which will would but
    their its his they you your who whom what when where why how there than also these those other if our us them
    him her she all any each every some such only more most much many very must may might can can't could should
    shall do does did been being about after before because between through under over out off up down then now new
    first two three people know think say said see look like make made get got go going come good well take let
    thank my me here just own same both few while during without within until against number days year years
    """.split()  # noqa: SIM905
)
"""common English words, none of which is a word in the Nguni languages ("into", "no", "so", "be" and "we" are)"""


def _plain_words(line: str) -> list[str]:
    stripped = (word.strip(".,;:!?…\"'“”‘’()[]").replace("’", "'") for word in line.split())
    return [word for word in stripped if word.replace("'", "").isalpha()]


def _seems_english(line: str) -> bool:
    words = [word.lower() for word in _plain_words(line)]
    num_english = sum(word in _ENGLISH for word in words)
    num_others = sum(word[-1] in "aiou" and len(word) >= 4 and word not in _ENGLISH for word in words)
    return len(words) >= 3 and num_english >= max(2, 0.2 * len(words)) and num_others <= 0.15 * len(words)


def _has_own_word(line: str, statistics: Statistics) -> bool:
    """Tell whether a word of the text's own language stands in a line: one that it repeats, or one with its prefix."""
    return any(
        word[-1] in _VOWELS and len(word) >= 4 and word not in _ENGLISH and statistics.words[word] >= 5
        for word in (word.lower() for word in _plain_words(line))
    ) or any(statistics.prefixes[left.lower()] >= 2 for left, _ in _TIGHT.findall(line))


def foreign(line: str, statistics: Statistics) -> str:
    """Remove an English line, and, in a text of long words, a line of short ones (Sesotho, Tshivenda, Afrikaans).

    A line in which both languages stand stays. English lines stay where they are half of the text or more.
    """
    if _seems_english(line) and statistics.num_english < 0.5 * statistics.num_lines:
        return line if _has_own_word(line, statistics) else ""
    words = [word for word in _plain_words(line) if len(word) > 1]
    num_short = sum(len(word) <= 3 and word.islower() for word in words)
    if len(words) >= 8 and num_short >= 0.5 * len(words) and statistics.num_short < 0.25 * statistics.num_words:
        return ""
    return line


# Broken words

_DEMONSTRATIVE = re.compile(r".*l(?:a|e|o|aba|awa|ama|esi|ezi|eti|eli|olu|obu|okhu|oku|owo|eyo|elo|eso|ezo|abo|awo)")
"""isiZulu writes "lo msebenzi" and "lomsebenzi"; both are meant"""


def hyphens(line: str, statistics: Statistics) -> str:
    """Join words that a line's end had parted: "okunempi- lo", "khu -la", "fane-lekile".

    The joined word must stand elsewhere in the text, more often than with this hyphen and than one of the two pieces.
    Where the hyphen belongs ("i -HIV"), the space alone goes.
    """
    line = _OPEN.sub(lambda match: _join_open(match, statistics), line)
    return _BROKEN.sub(lambda match: _join_tight(match, statistics), line)


def _join_open(match: re.Match[str], statistics: Statistics) -> str:
    left, _, right = match.groups()
    pair = left.lower(), right.lower()
    joined = statistics.words["".join(pair)]
    enough = 1 if right[0].islower() else 3  # "base- Ningizimu" too, where the text writes "baseNingizimu"
    if joined >= max(enough, statistics.hyphenated[pair] + 1) and _has_fragment(pair, joined, statistics):
        return left + right
    if statistics.hyphenated[pair] >= 2 or (not right[0].islower() and statistics.prefixes[left.lower()] >= 2):
        return f"{left}-{right}"
    return match.group()


def _join_tight(match: re.Match[str], statistics: Statistics) -> str:
    left, right = match.groups()
    pair = left.lower(), right.lower()
    joined = statistics.words["".join(pair)]
    belongs = (
        not (right.islower() or (left + right).isupper())
        or statistics.prefixes[pair[0]] >= 2
        or pair[1] in ("ke", "nje")
        or (pair[0][-1] in _VOWELS and pair[1][0] in _VOWELS)
    )
    if not belongs and joined >= 2 * statistics.hyphenated[pair] and _has_fragment(pair, joined, statistics):
        return left + right
    return match.group()


def _has_fragment(pair: tuple[str, str], joined: int, statistics: Statistics) -> bool:
    return joined > min(statistics.words[pair[0]], statistics.words[pair[1]])


def parted(line: str, statistics: Statistics) -> str:
    """Join words in which a space was left: "uku hamba", "ezinda weni".

    The pieces must be neighbours 10 times as often as chance would have it. The joined word must stand elsewhere 3
    times as often as so parted, 3 times at least, and more often than one of the pieces. Where it stands elsewhere
    fewer times, one piece must stand nowhere else, the other must be no common word, and one must be short. The second
    piece may not begin with a capital. Demonstratives stay, for both spellings are right.
    """
    pieces, end = [], 0
    start = 0
    while match := _APART.search(line, start):
        start = match.end()
        if _is_parted(match[1], match[2], statistics):
            pieces.append(line[end : match.end() - 1])
            end = match.end()
            start = match.end(2)  # What three pieces make together is asked in the next round.
    return "".join(pieces) + line[end:]


def _is_parted(left: str, right: str, statistics: Statistics) -> bool:
    pair = left.lower(), right.lower()
    joined, together = statistics.words["".join(pair)], statistics.apart[pair]
    if not together:
        return False
    rare, common = sorted(statistics.words[piece] for piece in pair)
    if joined >= 3:
        is_word = joined >= 3 * together and joined > rare
    else:
        is_word = joined >= together == rare and common <= 100 and min(len(left), len(right)) <= 5
    return (
        is_word
        and together * statistics.num_words >= 10 * rare * common
        and right.islower()
        and not left[1:].isupper()
        and not _DEMONSTRATIVE.fullmatch(pair[0])
    )


# Repetition


class Duplicates:
    """Remove a long line that has stood before, letter by letter."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, line: str) -> str:
        """Give the line, or nothing where it has come before."""
        if len(line) < MIN_DUPLICATE_CHARS:
            return line
        digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
        if digest in self._seen:
            return ""
        self._seen.add(digest)
        return line


RULES: Mapping[str, str] = {
    "characters": "invisible, control and private-use characters; NFC",
    "spaces": "repeated spaces, spaces at a line's ends",
    "replaced": "lines with replacement characters",
    "index": "page marks, reference arrows",
    "tables": "lines of few letters, dot leaders, numbers",
    "spaced": "lines of l e t t e r s that stand apart",
    "capitals": "lines all in capitals",
    "speakers": "SPEAKERS' NAMES: at a line's start",
    "foreign": "English lines, lines of short words",
    "hyphens": "words broken at a hyphen",
    "parted": "words broken at a space",
    "duplicates": "long lines that have stood before",
}
"""the rules in the order in which a line passes them, and what each takes away"""


def _functions(rules: Sequence[str], statistics: Statistics) -> list[tuple[str, Callable[[str], str]]]:
    known: dict[str, Callable[[str], str]] = {
        "characters": characters,
        "spaces": spaces,
        "replaced": replaced,
        "index": index,
        "tables": tables,
        "spaced": spaced,
        "capitals": capitals,
        "speakers": speakers,
        "foreign": lambda line: foreign(line, statistics),
        "hyphens": lambda line: hyphens(line, statistics),
        "parted": lambda line: parted(line, statistics),
        "duplicates": Duplicates(),
    }
    return [(name, known[name]) for name in RULES if name in rules]


def choose_rules(keep: Sequence[str] = (), only: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the rules to apply: all but those whose finds are kept, or only some; in their order.

    Raises:
        UlimiError: a name that is no rule, or both at once.
    """
    for name in (*keep, *only):
        if name not in RULES:
            raise UlimiError(f"{name}: no such rule{nearest(name, RULES)}; there are {', '.join(RULES)}")
    if keep and only:
        raise UlimiError("--keep and --only are given both; use one of them")
    return tuple(name for name in RULES if (name in only if only else name not in keep))


@dataclass(frozen=True)
class Change:
    """What one rule did to one line.

    Args:
        file: the position of the file among those given.
        number: of the line in its file, from 1.
        rule: its name.
        before: the line as the rule met it.
        after: what it made of it; None if the line is removed.
    """

    file: int
    number: int
    rule: str
    before: str
    after: str | None


@dataclass
class Count:
    """What a rule did to all lines."""

    changed: int = 0
    removed: int = 0
    chars: int = 0
    """code points that went, the ends of removed lines included"""


def clean_line(line: str, functions: Iterable[tuple[str, Callable[[str], str]]]) -> Iterator[tuple[str, str | None]]:
    """Pass a line through rules; yield the name of each that changed it and what came out, None for a removed line.

    Empty lines part paragraphs and stay; a line of which a rule leaves nothing goes.
    """
    for name, function in functions:
        if not line.strip() and name not in ("characters", "spaces"):
            return
        after = function(line)
        if after == line:
            continue
        if line.strip() and not after.strip():
            yield name, None
            return
        yield name, after
        line = after


def clean_files(
    sources: Sequence[Path], targets: Sequence[Path], rules: Sequence[str], report_path: Path | None = None
) -> dict[str, Count]:
    """Clean text files, with statistics over all of them, and write one plain text file for each.

    The report has a row for each change (`Change`), tab-separated under a header: file, line, rule, action (changed or
    removed), before, after. Tabs and backslashes in a text stand there with a backslash. Applied in its order to the
    lines of the files, it gives what was written.

    Args:
        sources: plain, .gz or .zst.
        targets: as many.
        rules: names, as of `choose_rules`.
        report_path: where the report goes.

    Returns:
        For each rule its count, in the order of `RULES`.
    """
    with ExitStack() as files:
        text = _scratch(files)
        for file, source in enumerate(sources):
            for number, line in enumerate(read_lines(source), start=1):
                text.write(f"{file}\t{number}\t{line}\n")
        reports: list[TextIO] = []
        while True:
            cleaned, report = _scratch(files), _scratch(files)
            if not _clean_once(text, cleaned, report, rules):
                break
            reports.append(report)
            text.close()
            text = cleaned
        lines = _read_text(text)
        grouped = itertools.groupby(lines, key=lambda row: row[0])
        pending = next(grouped, None)
        for file, target in enumerate(targets):
            with atomic_path(target) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as out:
                if pending is not None and pending[0] == file:
                    out.writelines(f"{line}\n" for _, _, line in pending[1])
                    pending = next(grouped, None)
        changes = heapq.merge(*map(_read_report, reports), key=lambda change: (change.file, change.number))
        if report_path is None:
            return _count(changes, rules)
        with atomic_path(report_path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as out:
            out.write("file\tline\trule\taction\tbefore\tafter\n")
            return _count(_write_report(changes, sources, out), rules)


def _scratch(files: ExitStack) -> TextIO:
    return files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n"))


def _read_text(text: TextIO) -> Iterator[tuple[int, int, str]]:
    text.seek(0)
    for row in text:
        file, number, line = row[:-1].split("\t", 2)
        yield int(file), int(number), line


def _clean_once(text: TextIO, cleaned: TextIO, report: TextIO, rules: Sequence[str]) -> bool:
    """Go over the text once with statistics of it as it is; tell whether anything changed."""
    statistics = Statistics()
    for _, _, line in _read_text(text):
        statistics.add(spaces(characters(line)))
    if "parted" in rules:
        for _, _, line in _read_text(text):
            statistics.add_apart(spaces(characters(line)))
    functions = _functions(rules, statistics)
    any_change = False
    for file, number, line in _read_text(text):
        after: str | None = line
        before = line
        for rule, after in clean_line(line, functions):
            any_change = True
            report.write(_row(str(file), number, rule, before, after))
            before = after or ""
        if after is not None:
            cleaned.write(f"{file}\t{number}\t{after}\n")
    return any_change


_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\r": "\\r"})


def _row(name: str, number: int, rule: str, before: str, after: str | None) -> str:
    fields = (name, str(number), rule, "removed" if after is None else "changed", before, after or "")
    return "\t".join(field.translate(_ESCAPES) for field in fields) + "\n"


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"t": "\t", "r": "\r"}.get(match[1], match[1]), text)


def _read_report(report: TextIO) -> Iterator[Change]:
    report.seek(0)
    for row in report:
        file, number, rule, action, before, after = row[:-1].split("\t")
        yield Change(int(file), int(number), rule, _unescape(before), None if action == "removed" else _unescape(after))


def _write_report(changes: Iterable[Change], sources: Sequence[Path], out: TextIO) -> Iterator[Change]:
    for change in changes:
        out.write(_row(str(sources[change.file]), change.number, change.rule, change.before, change.after))
        yield change


def _count(changes: Iterable[Change], rules: Sequence[str]) -> dict[str, Count]:
    counts = {rule: Count() for rule in rules}
    for _, of_line in itertools.groupby(changes, key=lambda change: (change.file, change.number)):
        changed: set[str] = set()
        for change in of_line:
            count = counts[change.rule]
            if change.after is None:
                count.removed += 1
                count.chars += len(change.before) + 1
            else:
                count.changed += change.rule not in changed
                changed.add(change.rule)
                count.chars += len(change.before) - len(change.after)
    return counts


# Which files


@dataclass(frozen=True)
class Plan:
    """Which files are cleaned, and which are copied as they are."""

    cleaned: tuple[tuple[Path, Path], ...]
    copied: tuple[tuple[Path, Path], ...]


def plan_cleaning(paths: Sequence[Path], out: Path, report_path: Path | None = None, force: bool = False) -> Plan:
    """Say where the cleaned text of files, or of a corpus folder, goes; read and write nothing.

    Of a folder the train.txt is cleaned; its valid.txt and test.txt are copied as they are, for a number on text that
    was chosen by a program says nothing about the text.

    Raises:
        UlimiError: something is missing, two results have one name, a result is an input, or is there already and
            `force` is false.
    """
    cleaned: list[tuple[Path, Path]] = []
    copied: list[tuple[Path, Path]] = []
    into_folder = len(paths) > 1 or out.is_dir() or any(path.is_dir() for path in paths)
    for path in paths:
        if str(path) == "-":
            raise UlimiError("-: a text is read more than once to be cleaned, so it cannot be standard input")
        if path.is_dir():
            parts = {part: _part(path, part) for part in ("train", "valid", "test")}
            if parts["train"] is None:
                raise UlimiError(f"{path}: no train.txt in this folder (it may also be .txt.gz or .txt.zst)")
            cleaned.append((parts["train"], out / "train.txt"))
            copied.extend((part, out / part.name) for part in (parts["valid"], parts["test"]) if part is not None)
        elif not path.is_file():
            if path.exists():
                raise UlimiError(
                    f"{path}: a text is read more than once to be cleaned, so it cannot be a pipe or device"
                )
            raise UlimiError(f"{path}: there is no such file")
        else:
            name = path.name.removesuffix(".gz").removesuffix(".zst")
            cleaned.append((path, out / name if into_folder else out))
    if into_folder and out.exists() and not out.is_dir():
        raise UlimiError(f"{out}: this is a file; several results need a folder")
    results = [target for _, target in (*cleaned, *copied)] + ([report_path] if report_path else [])
    for result, times in Counter(result.resolve() for result in results).items():
        if times > 1:
            raise UlimiError(f"{result}: {times} results would have this name; clean them one after another")
    for result in results:
        if result.suffix.lower() in (".gz", ".zst") and result not in [target for _, target in copied]:
            raise UlimiError(f"{result}: cleaned text is written plain; give a name without {result.suffix}")
        if result.exists():
            if any(result.samefile(source) for source, _ in (*cleaned, *copied)):
                raise UlimiError(f"{result}: this is an input; write the cleaned text elsewhere")
            if result.is_dir():
                raise UlimiError(f"{result}: this is a folder; give a file")
            if not force:
                raise UlimiError(f"{result}: is there already; name another or use --force")
    return Plan(tuple(cleaned), tuple(copied))


def _part(folder: Path, part: str) -> Path | None:
    found = [path for suffix in ("", ".gz", ".zst") if (path := folder / f"{part}.txt{suffix}").is_file()]
    if len(found) > 1:
        raise UlimiError(f"{folder}: {' and '.join(path.name for path in found)} are both there; keep one of them")
    return found[0] if found else None


def run_plan(plan: Plan, rules: Sequence[str], report_path: Path | None = None) -> dict[str, Count]:
    """Clean and copy what `plan_cleaning` planned."""
    counts = clean_files(
        [source for source, _ in plan.cleaned], [target for _, target in plan.cleaned], rules, report_path
    )
    for source, target in plan.copied:
        with atomic_path(target) as unfinished:
            shutil.copyfile(source, unfinished)
    return counts
