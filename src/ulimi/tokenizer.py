r"""Turn text into token ids and back, exactly.

One vocabulary of four kinds, all with "<eos>" as the last id, which ends each line:

    bpe      byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2); isiZulu words are split only inside
    unigram  unigram language model (Kudo 2018) over the same bytes and the same split
    word     the words between whitespace, "<unk>" for the rest; what Penn Treebank results are stated in
    char     Unicode code points, UTF-8 bytes for those not seen in training

All but "word" are lossless: `decode(encode(text)) == nfc(text)` for every text, "<eos>" written out
included, where nfc is the backend's own NFC. Its Unicode tables are older than Python's, so the two
may order recently assigned combining marks differently.

"\n" is the only line end; "\r" and U+2028 are ordinary characters. This module belongs to the light
floor: it knows nothing of models, datasets or PyTorch.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from ulimi.errors import UlimiError, nearest
from ulimi.files import write_json, write_text

KINDS = ("bpe", "unigram", "word", "char")
EOS = "<eos>"
UNK = "<unk>"

# Keeps a word and the space before it together, and an isiZulu word whole (" eNingizimu"), so that
# only the vocabulary decides where inside a word the pieces begin.
PATTERN = r" ?\p{L}[\p{L}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
# str.split() also splits at U+001C..U+001F, which \s does not match.
WHITESPACE = r"[\s\x1c-\x1f\u0085]+"

NUM_BYTES = 256
# Asked for the 256 bytes alone, the unigram trainer keeps all pieces instead; so it needs one more.
_MIN_VOCAB_SIZE = {"bpe": 257, "unigram": 258, "word": 3, "char": 257}
_MIN_VOCAB_MEANS = {
    "bpe": "256 bytes",
    "unigram": "256 bytes, a piece",
    "word": f"a word, {UNK}",
    "char": "256 bytes",
}
# Where a piece of PATTERN surely begins, whatever stands further away or is written after it.
_SURE_CUT = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-z])(?=[!-@])|(?<=[!-@])(?=[A-Za-z])")
_TAIL_CHARS = 256
_MAX_SIZE = 10_000_000  # the trainers set memory aside for so many tokens at once, and abort where there is none
_MODELS = {"bpe": "BPE", "unigram": "Unigram", "word": "WordLevel", "char": "BPE"}
_BATCH_LINES = 4096  # a backend's Encoding is many times the size of its ids; hold few at once
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(NUM_BYTES)}
_NFC = normalizers.NFC()


def _byte_alphabet() -> dict[str, int]:
    """Map the 256 stand-in characters of byte-level tokenizers (GPT-2) to the bytes they mean."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(NUM_BYTES + i): byte for i, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


class Tokenizer:
    """A trained vocabulary: text to ids, ids to text.

    Args:
        backend: a `tokenizers.Tokenizer` of the layout that `train` builds.
        kind: one of `KINDS`.

    Raises:
        UlimiError: the kind is unknown, or the backend is not laid out as that kind is.
    """

    def __init__(self, backend: tokenizers.Tokenizer, kind: str) -> None:
        _check_kind(kind)
        model = type(backend.model).__name__
        if model != _MODELS[kind]:
            raise UlimiError(f"the tokenizer's model is {model}; kind {kind!r} is made of {_MODELS[kind]}")
        self.kind = kind
        self.backend = backend
        # Not part of the JSON, hence set here: an "<eos>" that a user writes is text, not the token.
        self.backend.encode_special_tokens = True
        # What transformers is to put before a text; here it would make equal tokenizers unequal.
        self.backend.post_processor = None
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = self.vocab_size - 1
        if backend.token_to_id(EOS) != self.eos_id:
            raise UlimiError(f"{EOS} has id {backend.token_to_id(EOS)}; it must be the last, {self.eos_id}")
        self.unk_id: int | None = backend.token_to_id(UNK) if kind == "word" else None
        if kind == "word" and self.unk_id is None:
            raise UlimiError(f"the vocabulary has no {UNK}; kind 'word' needs it")
        self._bytes = [*(self._read_token(id) for id in range(self.eos_id)), b"\n"]

    @property
    def is_lossless(self) -> bool:
        """Whether `decode(encode(text))` gives back every text (in NFC)."""
        return self.kind != "word"

    @classmethod
    def train(
        cls, lines: Iterable[str], *, kind: str = "bpe", vocab_size: int | None = None, min_frequency: int = 1
    ) -> "Tokenizer":
        """Learn a vocabulary from text; the same lines give the same tokenizer.

        Args:
            lines: lines without their line ends; read once.
            kind: one of `KINDS`.
            vocab_size: tokens at most, "<eos>" included (and "<unk>"; and the 256 bytes); needed for
                "bpe" and "unigram", otherwise None means every word or character.
            min_frequency: occurrences that a word, a character or a merge needs to enter; not for "unigram".

        Raises:
            UlimiError: a setting is not allowed, the text is empty, or a line holds a line end.
        """
        _check_kind(kind)
        _check_sizes(kind, vocab_size, min_frequency)
        lines = _checked_training_lines(lines)
        match kind:
            case "bpe":
                assert vocab_size is not None
                backend = _train_bpe(lines, vocab_size - 1, min_frequency)
            case "unigram":
                assert vocab_size is not None
                backend = _train_unigram(lines, vocab_size - 1)
            case "word":
                backend = _train_word(lines, vocab_size, min_frequency)
            case _:
                backend = _train_char(lines, vocab_size, min_frequency)
        backend.add_special_tokens([EOS])
        return cls(backend, kind)

    @classmethod
    def from_str(cls, json_text: str, kind: str) -> "Tokenizer":
        """Rebuild a tokenizer from `to_str`'s JSON; raises UlimiError if it is no such JSON."""
        try:
            backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the bindings raise bare Exception
            raise UlimiError(f"not the JSON of a tokenizer: {error}") from error
        return cls(backend, kind)

    def to_str(self) -> str:
        """Give the JSON of tokenizer.json; equal tokenizers give equal text, so it can be hashed."""
        return self.backend.to_str(pretty=True)

    @classmethod
    def load(cls, run_dir: Path) -> "Tokenizer":
        """Read tokenizer.json and tokenizer_config.json; raises UlimiError if one is missing or unusable."""
        json_path, config_path = run_dir / "tokenizer.json", run_dir / "tokenizer_config.json"
        json_text, config_text = _read_text(json_path), _read_text(config_path)
        try:
            config = json.loads(config_text)
        except json.JSONDecodeError as error:
            raise UlimiError(f"{config_path} is not JSON: {error}") from error
        kind = config.get("kind") if isinstance(config, dict) else None
        if not isinstance(kind, str):
            raise UlimiError(f'{config_path} names no "kind"; allowed: {", ".join(KINDS)}')
        try:
            return cls.from_str(json_text, kind)
        except UlimiError as error:
            raise UlimiError(f"{json_path} cannot be used: {error}") from error

    @property
    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says."""
        config: dict[str, Any] = {
            "kind": self.kind,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # what transformers writes for "no limit"
            "split_special_tokens": True,  # the counterpart of encode_special_tokens above
        }
        if self.unk_id is not None:
            config["unk_token"] = UNK
        return config

    def save(self, run_dir: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers also loads, each whole or not at all."""
        write_text(run_dir / "tokenizer.json", self.to_str())
        write_json(run_dir / "tokenizer_config.json", self.config)

    def normalize(self, text: str) -> str:
        """Give a text as the model reads it: in NFC.

        Raises:
            UlimiError: the text holds a lone surrogate.
        """
        _check_unicode(text)
        normal: str = _NFC.normalize_str(text)
        return normal

    def encode(self, text: str) -> list[int]:
        r"""Give the ids of a text; each "\n" becomes `eos_id`, and nothing is added at the end.

        Raises:
            UlimiError: the text holds a lone surrogate.
        """
        # A newline inside a line would become the byte's own token, which no training text contains.
        return [id for ids in self.encode_lines(text.split("\n")) for id in ids][:-1]

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        """Give each line's ids and `eos_id` after them; lines are encoded in parallel.

        Raises:
            UlimiError: a line holds a line end or a lone surrogate.
        """
        ids_of_lines: list[list[int]] = []
        for start in range(0, len(lines), _BATCH_LINES):
            batch = list(lines[start : start + _BATCH_LINES])
            for line in batch:
                _check_line(line)
            encodings = self.backend.encode_batch_fast(batch, add_special_tokens=False)
            ids_of_lines.extend([*encoding.ids, self.eos_id] for encoding in encodings)
        return ids_of_lines

    def last_piece(self, line: str) -> str | None:
        """Give the end of a line, in NFC, that what is written after it could still change.

        Tokens do not reach from piece to piece, so those before it are certain. It is a word with the space before it,
        a group of digits, punctuation, or all white space at the end (the next word takes its last space); in kind
        "word" a word, in kind "char" nothing.

        Returns:
            None where it does not begin in the last 256 characters of a longer line.

        Raises:
            UlimiError: the line holds a line end or a lone surrogate.
        """
        _check_line(line)
        line = self.normalize(line)
        if self.kind == "char":
            return ""
        if self.kind == "word":
            words = line.split()
            return words[-1] if words and line.endswith(words[-1]) else ""
        if len(line) > _TAIL_CHARS:
            sure = _SURE_CUT.search(line, len(line) - _TAIL_CHARS)
            if sure is None:
                return None
            line = line[sure.start() :]
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(line)
        return line[pieces[-1][1][0] :] if pieces else ""

    def decode(self, ids: Iterable[int]) -> str:
        r"""Give the text of some ids; `eos_id` becomes "\n", bytes that are no UTF-8 become U+FFFD.

        Raises:
            UlimiError: an id is outside the vocabulary.
        """
        parts = [self.token_bytes(id) for id in ids]
        if self.is_lossless:
            return b"".join(parts).decode("utf-8", "replace")
        return b" ".join(parts).replace(b" \n", b"\n").replace(b"\n ", b"\n").decode("utf-8")

    def piece(self, id: int) -> str:
        r"""Show one token in printable form: stray bytes as \xe2, unprintable characters as \u{a0}."""
        part = self.token_bytes(id)
        if id == self.eos_id:
            return EOS
        # In kind "char" the byte of "a" is another token than "a".
        if self.kind == "char" and self.backend.id_to_token(id) in _BYTE_TOKENS:
            return f"\\x{part[0]:02x}"
        text = part.decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)

    def token_bytes(self, id: int) -> bytes:
        r"""Give the bytes that a token stands for in running text; b"\n" for `eos_id`.

        Words ("word") come without the space that `decode` puts between them. Raises UlimiError for
        an id outside the vocabulary.
        """
        if not 0 <= id < self.vocab_size:
            raise UlimiError(f"token id is {id}; allowed: 0 to {self.eos_id}")
        return self._bytes[id]

    def stream(self, words: bool = True) -> "DecodeStream":
        """Start to decode ids as they come, in whole words, or in whole characters."""
        return DecodeStream(self, words=words)

    def _read_token(self, id: int) -> bytes:
        token = self.backend.id_to_token(id)
        if token is None:
            raise UlimiError(f"the vocabulary has no token for id {id}; ids must run from 0 to {self.eos_id}")
        if self.kind == "word":
            return token.encode()
        if self.kind == "char":
            return _BYTE_TOKENS.get(token) or token.encode()
        try:
            return bytes(_BYTE_ALPHABET[character] for character in token)
        except KeyError:
            raise UlimiError(f"token {token!r} is not byte-level; kind {self.kind!r} needs byte-level tokens") from None


class DecodeStream:
    r"""Decode ids as they come; what `push` and `flush` return adds up to `decode` of all ids.

    Text comes out once it can no longer change: never part of a character. With `words`, text is
    also held back from the last whitespace on, since the word after it may go on; a "\n" ends its
    word and comes out at once. In kind "word" each token is a whole word, so none waits.
    """

    def __init__(self, tokenizer: Tokenizer, *, words: bool = True) -> None:
        self._tokenizer = tokenizer
        self._words = words and tokenizer.is_lossless
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[str] = []
        self._after_word = False

    def push(self, id: int) -> str:
        """Take one more id and give the text that is now certain, possibly none."""
        part = self._tokenizer.token_bytes(id)
        if not self._tokenizer.is_lossless:
            is_word = id != self._tokenizer.eos_id
            separator = " " if is_word and self._after_word else ""
            self._after_word = is_word
            return separator + part.decode("utf-8")
        text = self._decoder.decode(part)
        if not self._words:
            return text
        spaces = [i for i, character in enumerate(text) if character.isspace()]
        if not spaces:
            self._held.append(text)
            return ""
        cut = spaces[-1] + (text[spaces[-1]] == "\n")
        certain = "".join(self._held) + text[:cut]
        self._held = [text[cut:]]
        return certain

    def fork(self) -> "DecodeStream":
        """Start another stream from here: each goes on by itself."""
        twin = DecodeStream(self._tokenizer)
        twin._words, twin._held, twin._after_word = self._words, list(self._held), self._after_word
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def flush(self) -> str:
        """Give what is held back; a character that never became complete is U+FFFD."""
        rest = "".join(self._held) + self._decoder.decode(b"", final=True)
        self._held = []
        self._decoder.reset()
        return rest


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UlimiError(f"tokenizer kind is {kind!r}; allowed: {', '.join(KINDS)}{nearest(kind, KINDS)}")


def _check_sizes(kind: str, vocab_size: int | None, min_frequency: int) -> None:
    needed = f"at least {_MIN_VOCAB_SIZE[kind]} ({_MIN_VOCAB_MEANS[kind]} and {EOS})"
    if vocab_size is None:
        if kind in ("bpe", "unigram"):
            raise UlimiError(f"vocab_size is not given; kind {kind!r} needs {needed}")
    elif vocab_size < _MIN_VOCAB_SIZE[kind]:
        raise UlimiError(f"vocab_size is {vocab_size}; kind {kind!r} needs {needed}")
    elif vocab_size > _MAX_SIZE:
        raise UlimiError(f"vocab_size is {vocab_size}; allowed: at most {_MAX_SIZE:,}")
    if not 1 <= min_frequency <= _MAX_SIZE:
        raise UlimiError(f"min_frequency is {min_frequency}; allowed: 1 to {_MAX_SIZE:,}")
    if kind == "unigram" and min_frequency != 1:
        raise UlimiError(f"min_frequency is {min_frequency}; kind 'unigram' has none, leave it at 1")


def _check_line(line: str) -> None:
    if "\n" in line:
        raise UlimiError(f"a line holds a line end: {line[:40]!r}; lines are given without theirs")
    _check_unicode(line)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UlimiError(f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}; it is no Unicode") from None


def _checked_training_lines(lines: Iterable[str]) -> Iterator[str]:
    is_empty = True
    for line in lines:
        _check_line(line)
        is_empty = is_empty and not line.strip()
        yield line
    if is_empty:
        raise UlimiError("the training text is empty; a tokenizer needs at least one word")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UlimiError(f"{path} does not exist; a tokenizer is tokenizer.json and tokenizer_config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UlimiError(f"{path} cannot be read: {error}") from error


def _byte_level(model: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = _NFC
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _train_bpe(lines: Iterator[str], vocab_size: int, min_frequency: int) -> tokenizers.Tokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=list(_BYTE_ALPHABET),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return backend


def _train_unigram(lines: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train, then settle what the trainer leaves to thread and hash order, so that runs agree.

    In all that was tried, runs agree on the pieces, but not on the last bits of their scores, and
    the bytes that the text lacks get scores up to 0.0256 above the lowest in an arbitrary order. So
    scores are rounded (which also lets them survive JSON exactly), those bytes share the lowest,
    and ties are ordered.
    """
    backend = _byte_level(models.Unigram())
    alphabet = list(_BYTE_ALPHABET)
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    scores = {piece: round(score, 6) for piece, score in json.loads(backend.to_str())["model"]["vocab"]}
    lowest = min(scores.values())
    for byte in alphabet:
        if scores.get(byte, lowest) <= lowest + 0.0256:
            scores[byte] = lowest
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    assert len(pieces) <= vocab_size, "the trainer left out bytes of its initial alphabet"
    return _byte_level(models.Unigram(pieces))


def _by_frequency(tokens: Iterable[str], counts: Counter[str]) -> list[str]:
    return sorted(tokens, key=lambda token: (-counts[token], token))


def _train_word(lines: Iterator[str], vocab_size: int | None, min_frequency: int) -> tokenizers.Tokenizer:
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(_NFC.normalize_str(line).split())
    frequent = [word for word, count in counts.items() if count >= min_frequency and word not in (UNK, EOS)]
    words = _by_frequency(frequent, counts)[: None if vocab_size is None else vocab_size - 2]
    if not words:
        raise UlimiError(f"min_frequency is {min_frequency}; no word but {UNK} and {EOS} is that frequent in the text")
    # <unk> takes its place by how often training will see it: for itself and for each word left out.
    counts[UNK] = counts.total() - sum(counts[word] for word in words)
    vocab = {word: id for id, word in enumerate(_by_frequency([*words, UNK], counts))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.normalizer = _NFC
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WHITESPACE), "removed")
    return backend


def _train_char(lines: Iterator[str], vocab_size: int | None, min_frequency: int) -> tokenizers.Tokenizer:
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(_NFC.normalize_str(line))
    frequent = _by_frequency((char for char, count in counts.items() if count >= min_frequency), counts)
    characters = frequent[: None if vocab_size is None else vocab_size - 1 - NUM_BYTES]
    vocab = {token: id for id, token in enumerate([*characters, *_BYTE_TOKENS])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.normalizer = _NFC
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend
