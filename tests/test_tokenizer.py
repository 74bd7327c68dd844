import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ulimi.errors import UlimiError
from ulimi.tokenizer import KINDS, Tokenizer

LOSSLESS = ("bpe", "unigram", "char")
VOCAB_SIZES = {"bpe": 330, "unigram": 330, "word": None, "char": None}
LINES = [
    "Ngiya eNingizimu Afrika ngoMsombuluko, 2026.",
    "",
    "Abantwana bayafunda; bayafunda isiZulu esikoleni.",
    "Ngiya ekhaya, ngiyabonga kakhulu bangani bami.",
    "UThandi uthi: “Sawubona mhlaba!”",
] * 3
TOKENIZERS = {kind: Tokenizer.train(LINES, kind=kind, vocab_size=VOCAB_SIZES[kind]) for kind in KINDS}

# What tokenizers lose: decomposed and stacked marks, special tokens and byte tokens written out,
# SentencePiece's space, all kinds of space and line end, joiners, NUL, and every byte of UTF-8.
TRAPS = [
    "",
    "\n",
    "\n\na\n",
    "  two  spaces  ",
    "\ttab\r\n\r",
    "e\u0301 e\u0323\u0301 \u0301",
    "<eos>a <unk> <0x41> <s>",
    "▁ a▁b",
    "\x00\x1c\x85\u2028\u2029\u00a0\u3000",
    "😀👩‍👩‍👧 \u200b\u200d\ufeff\ue000\U0010ffff\ufffd",
    "".join(map(chr, range(256))),
    "Ā ÿ Ġ Ċ ŀ",
]
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\nagN'-éĠ▁😀")) | st.sampled_from(TRAPS)


def nfc(text):
    return TOKENIZERS["bpe"].backend.normalizer.normalize_str(text)


def words_of(text):
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=texts)
@settings(max_examples=1000, deadline=None)
@example(text="\n".join(TRAPS))
def test_every_text_survives_a_lossless_kind(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == nfc(text)
    assert ids.count(tokenizer.eos_id) == text.count("\n")
    # The file alone, read by another library, must say the same.
    for line in text.split("\n"):
        assert tokenizer.backend.decode(tokenizer.encode(line)) == nfc(line)


@pytest.mark.parametrize("text", TRAPS)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_traps_survive_also_after_loading(kind, text, tmp_path):
    TOKENIZERS[kind].save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == nfc(text)


def test_text_is_composed_before_it_is_encoded():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.encode("ne\u0301") == tokenizer.encode("né")
    for kind in KINDS:
        composed, decomposed = (Tokenizer.train([text], kind=kind, vocab_size=300) for text in ("né", "ne\u0301"))
        assert composed.to_str() == decomposed.to_str()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_and_running_text_agree(kind):
    tokenizer = TOKENIZERS[kind]
    eos = tokenizer.eos_id
    a, blank, b = tokenizer.encode_lines(["Ngiya ekhaya", "", "  isiZulu<eos>"])
    assert a == [*tokenizer.encode("Ngiya ekhaya"), eos]
    assert blank == [eos]
    assert tokenizer.encode("Ngiya ekhaya\n\n  isiZulu<eos>") == a + blank + b[:-1]
    assert b.count(eos) == 1
    assert tokenizer.encode_lines([]) == []


def test_more_lines_than_one_batch_keep_their_order():
    tokenizer = TOKENIZERS["char"]
    lines = [str(i) for i in range(10_000)]
    assert "".join(tokenizer.decode(ids) for ids in tokenizer.encode_lines(lines)) == "".join(f"{s}\n" for s in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_eos_is_the_last_id(kind):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == tokenizer.backend.token_to_id("<eos>")
    assert tokenizer.vocab_size <= (VOCAB_SIZES[kind] or 10**6)
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"\n"
    assert tokenizer.piece(tokenizer.eos_id) == "<eos>"
    assert (tokenizer.unk_id is not None) == (kind == "word") == (not tokenizer.is_lossless)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.to_str() == tokenizer.to_str() == Tokenizer.from_str(tokenizer.to_str(), kind).to_str()
    assert (loaded.kind, loaded.vocab_size, loaded.unk_id) == (kind, tokenizer.vocab_size, tokenizer.unk_id)
    assert loaded.encode_lines(LINES) == tokenizer.encode_lines(LINES)

    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == config["bos_token"] == "<eos>"
    assert config.get("unk_token") == ("<unk>" if kind == "word" else None)
    assert config["clean_up_tokenization_spaces"] is False
    assert config["split_special_tokens"] is True


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    TOKENIZERS["bpe"].save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_text = Path.write_text

    def fill_the_disk(path, text, **kwargs):
        write_text(path, text[:5], **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        TOKENIZERS["char"].save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_again_gives_the_same_json_in_another_process():
    # Another process, since the trainers' hash seeds are drawn once per process.
    code = (
        "import hashlib, sys; from ulimi.tokenizer import Tokenizer;"
        "lines = sys.stdin.buffer.read().decode().split('\\n');"
        "json = ''.join(Tokenizer.train(lines, kind=k, vocab_size=v).to_str() for k, v in {sizes}.items());"
        "sys.stdout.write(hashlib.sha256(json.encode()).hexdigest())"
    ).replace("{sizes}", repr(VOCAB_SIZES))
    text = "\n".join(LINES).encode()
    runs = [subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, check=True) for _ in "12"]
    here = hashlib.sha256("".join(TOKENIZERS[kind].to_str() for kind in VOCAB_SIZES).encode()).hexdigest()
    assert [run.stdout.decode() for run in runs] == [here, here]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_byte_is_a_token_and_words_are_never_joined(kind):
    tokenizer = TOKENIZERS[kind]
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.eos_id)]
    assert {bytes([byte]) for byte in range(256)} < set(tokens)
    assert len(set(tokens)) == len(tokens)
    assert not any(b" " in token[1:] for token in tokens)
    assert any(len(token) > 3 for token in tokens)


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 257), ("bpe", 270), ("unigram", 258), ("unigram", 270)])
def test_vocab_size_is_what_was_asked_for(kind, vocab_size):
    assert Tokenizer.train(LINES, kind=kind, vocab_size=vocab_size).vocab_size == vocab_size


def test_a_frequent_isizulu_word_is_one_token_with_its_space():
    tokenizer = Tokenizer.train(["Ngiya eNingizimu, eNingizimu"] * 5, vocab_size=400)
    pieces = [tokenizer.piece(id) for id in tokenizer.encode("Ngiya eNingizimu, eNingizimu")]
    assert pieces == ["Ngiya", " eNingizimu", ",", " eNingizimu"]


def test_bpe_takes_the_best_merges_down_to_min_frequency():
    tokenizer = Tokenizer.train(["aa aa aa", "bc"], vocab_size=300, min_frequency=2)
    assert [tokenizer.piece(id) for id in range(256, tokenizer.eos_id)] == ["aa", " aa"]


def test_words_are_ordered_by_frequency_then_name():
    tokenizer = Tokenizer.train(["d c a c <unk>", "a  b\u2028<eos> <eos>"], kind="word")
    assert [tokenizer.piece(id) for id in range(tokenizer.vocab_size)] == ["<unk>", "a", "c", "b", "d", "<eos>"]
    assert tokenizer.encode("a <unk> zzz <eos> a\x1cb") == [1, 0, 0, 0, 1, 3]
    assert tokenizer.decode([1, 0, 5, 5, 2]) == "a <unk>\n\nc"


def test_words_without_unk_in_the_text_have_it_after_them():
    tokenizer = Tokenizer.train(["b a a"], kind="word")
    assert [tokenizer.piece(id) for id in range(tokenizer.vocab_size)] == ["a", "b", "<unk>", "<eos>"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"vocab_size": 4}, ["a", "<unk>", "b", "<eos>"]), ({"min_frequency": 3}, ["<unk>", "a", "<eos>"])],
)
def test_words_can_be_capped(settings, words):
    tokenizer = Tokenizer.train(["a a a a b b c c d"], kind="word", **settings)
    assert sorted(tokenizer.piece(id) for id in range(tokenizer.vocab_size)) == sorted(words)
    assert [tokenizer.piece(id) for id in range(tokenizer.vocab_size)] == words


def test_word_split_is_that_of_python():
    tokenizer = TOKENIZERS["word"]
    spaces = [chr(i) for i in range(0x110000) if chr(i).isspace() and chr(i) != "\n"]
    others = [chr(i) for i in range(0x3100) if not chr(i).isspace()]
    assert len(tokenizer.encode("x".join(["", *spaces, ""]))) == len(spaces) + 1
    assert len(tokenizer.encode("".join(others))) == 1


def test_a_character_is_one_token_and_an_unseen_one_its_bytes():
    tokenizer = Tokenizer.train(["aabé"], kind="char")
    assert tokenizer.vocab_size == 3 + 256 + 1
    assert [tokenizer.token_bytes(id) for id in tokenizer.encode("béaz😀")] == [
        *(b"b", "é".encode(), b"a", b"z"),
        *(b"\xf0", b"\x9f", b"\x98", b"\x80"),
    ]
    assert Tokenizer.train(["aabé"], kind="char", min_frequency=2).vocab_size == 1 + 256 + 1
    assert Tokenizer.train(["aabé"], kind="char", vocab_size=259).vocab_size == 2 + 256 + 1
    assert Tokenizer.train(["aabé"], kind="char", vocab_size=257).vocab_size == 256 + 1


def test_pieces_are_printable():
    for tokenizer in TOKENIZERS.values():
        pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        assert all(piece.isprintable() for piece in pieces)
        assert len(set(pieces)) == tokenizer.vocab_size
    char = TOKENIZERS["char"]
    assert "".join(map(char.piece, char.encode("a\x00q😀"))) == r"a\x00\x71\xf0\x9f\x98\x80"
    seen = Tokenizer.train(["a\u2028\xa0"], kind="char")
    assert "".join(map(seen.piece, seen.encode("\u2028\xa0"))) == r"\u{2028}\u{a0}"
    assert [TOKENIZERS["word"].piece(id) for id in TOKENIZERS["word"].encode("bami.\n")] == ["bami.", "<eos>"]


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_stream_adds_up_to_decode(kind, words, data):
    tokenizer = TOKENIZERS[kind]
    any_ids = st.lists(st.integers(0, tokenizer.eos_id) | st.just(tokenizer.eos_id), max_size=30)
    ids = data.draw(any_ids | texts.map(tokenizer.encode))
    stream = tokenizer.stream(words=words)
    parts = [stream.push(id) for id in ids]
    # What came out must stand, whatever follows.
    certain = "".join(parts)
    assert tokenizer.decode([*ids, *tokenizer.encode("é")]).startswith(certain)
    assert certain + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_stream_gives_whole_words(kind):
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream()
    text = "Ngiya e-Goli\t😀, né\nekhaya"
    parts = [part for part in map(stream.push, tokenizer.encode(text)) if part]
    assert parts == ["Ngiya", " e-Goli", "\t😀,", " né\n"]
    assert stream.flush() == "ekhaya"


def test_stream_gives_whole_characters():
    tokenizer = TOKENIZERS["char"]
    stream = tokenizer.stream(words=False)
    assert [stream.push(id) for id in tokenizer.encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    assert [stream.push(id) for id in tokenizer.encode("😀")[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_stream_of_words_waits_for_none():
    tokenizer = TOKENIZERS["word"]
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in tokenizer.encode("Ngiya ekhaya,\n\nbami.")]
    assert parts == ["Ngiya", " ekhaya,", "\n", "\n", "bami."]


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (LINES, {"kind": "uni-gram", "vocab_size": 300}, r"kind is 'uni-gram'; .*did you mean 'unigram'\?"),
        (LINES, {}, "vocab_size is not given; .*at least 257"),
        (LINES, {"kind": "unigram", "vocab_size": 257}, "vocab_size is 257; .*at least 258"),
        (LINES, {"kind": "char", "vocab_size": 256}, "vocab_size is 256; .*at least 257"),
        (LINES, {"kind": "word", "vocab_size": 2}, "vocab_size is 2; .*at least 3"),
        (LINES, {"vocab_size": 10**10}, "vocab_size is 10000000000; allowed: at most 10,000,000"),
        (LINES, {"kind": "word", "min_frequency": 10**22}, "min_frequency is 1.*; allowed: 1 to 10,000,000"),
        (LINES, {"kind": "word", "min_frequency": 0}, "min_frequency is 0"),
        (LINES, {"kind": "word", "min_frequency": 99}, "min_frequency is 99"),
        (LINES, {"kind": "unigram", "vocab_size": 300, "min_frequency": 2}, "min_frequency is 2"),
        *(([" ", ""], {"kind": kind, "vocab_size": 300}, "text is empty") for kind in KINDS),
        *(([], {"kind": kind, "vocab_size": 300}, "text is empty") for kind in KINDS),
        *((["a\n"], {"kind": kind, "vocab_size": 300}, r"line end: 'a\\n'") for kind in KINDS),
        *((["a\udc80"], {"kind": kind, "vocab_size": 300}, r"U\+DC80") for kind in KINDS),
    ],
)
def test_training_says_what_is_wrong(lines, settings, message):
    with pytest.raises(UlimiError, match=message) as caught:
        Tokenizer.train(lines, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_says_what_is_wrong(kind):
    tokenizer = TOKENIZERS[kind]
    with pytest.raises(UlimiError, match="line end"):
        tokenizer.encode_lines(["a", "b\nc"])
    with pytest.raises(UlimiError, match=r"U\+DC80"):
        tokenizer.encode("\udc80")
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(UlimiError, match=f"token id is {id}; allowed: 0 to {tokenizer.eos_id}"):
            tokenizer.decode([id])


def test_loading_says_what_is_wrong(tmp_path):
    def broken(name, text):
        TOKENIZERS["bpe"].save(tmp_path)
        if text is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(UlimiError) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or "tokenizer.json" in str(caught.value)
        return str(caught.value)

    assert "does not exist" in broken("tokenizer.json", None)
    assert "does not exist" in broken("tokenizer_config.json", None)
    assert "cannot be used" in broken("tokenizer.json", b'{"model"')
    assert "cannot be read" in broken("tokenizer.json", b"\xff")
    assert "is not JSON" in broken("tokenizer_config.json", b"{")
    assert 'names no "kind"' in broken("tokenizer_config.json", b"[]")
    assert "did you mean 'bpe'" in broken("tokenizer_config.json", b'{"kind": "bpee"}')
    assert "is made of WordLevel" in broken("tokenizer_config.json", b'{"kind": "word"}')
    # The layout of another project: the end of line is not the last token.
    moved = TOKENIZERS["bpe"].to_str().replace('"<eos>"', '"<pad>"').encode()
    assert "must be the last" in broken("tokenizer.json", moved)


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    with pytest.raises(UlimiError, match="not byte-level"):
        Tokenizer.from_str(TOKENIZERS["char"].to_str().replace('"“"', '"▁"'), "bpe")
