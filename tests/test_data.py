"""Ids, streams, windows, validation rows: every token counts once, whatever the sizes."""

import gzip
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reference
from ulimi.corpus import count_stats, zstd
from ulimi.data import (
    IGNORED,
    Windows,
    default_cache_dir,
    encode_file,
    make_streams,
    validation_rows,
    window_length,
)
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.tokenizer import Tokenizer
from ulimi.train import validation_nats

LINES = ["umfundi ufunda incwadi", "", "  uthisha   ufundisa", "ikati lidla é"]
quick = settings(max_examples=150, deadline=None)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(reference.f64(a), reference.f64(b), rtol=tolerance, atol=tolerance)


class CountingTokenizer:
    """Gives each word its number of letters as id, and notes how many lines each call had."""

    kind = "word"
    unk_id = 7

    def __init__(self, vocab_size=100, name="a"):
        self.vocab_size = vocab_size
        self.eos_id = vocab_size - 1
        self.name = name
        self.batches: list[int] = []

    def to_str(self):
        return self.name

    def encode_lines(self, lines):
        self.batches.append(len(lines))
        return [[*(len(word) for word in line.split()), self.eos_id] for line in lines]


@pytest.fixture
def text_path(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


# --- Text to ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_a_file_becomes_the_ids_of_its_lines(kind, text_path, cache):
    tokenizer = Tokenizer.train(LINES[:3] * 5, kind=kind, vocab_size=300)
    text = encode_file(text_path, tokenizer, cache)
    expected = [id for ids in tokenizer.encode_lines(LINES) for id in ids]
    assert text.ids.tolist() == expected
    assert expected.count(tokenizer.eos_id) == len(LINES)
    assert text.stats == count_stats(LINES)
    assert text.num_unknown == (3 if kind == "word" else 0)  # the last line's three words were not trained on


def test_stats_are_of_the_original_text(text_path, cache):
    stats = encode_file(text_path, CountingTokenizer(), cache).stats
    counts = reference.text_counts(LINES)
    assert stats.num_lines == 4
    assert stats.num_words == 3 + 0 + 2 + 3
    assert stats.num_chars == len(text_path.read_text(encoding="utf-8")) == counts.num_chars
    assert stats.num_bytes == text_path.stat().st_size == counts.num_bytes


def test_unknown_tokens_are_counted(text_path, cache):
    # The tokenizer's <unk> is 7: "umfundi", "incwadi" and "uthisha" have seven letters.
    assert encode_file(text_path, CountingTokenizer(), cache).num_unknown == 3


def test_a_cache_that_cannot_be_made_is_one_line_that_says_how_to_name_another(text_path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UlimiError, match=r"the cache folder .*file/cache cannot be made .*ULIMI_CACHE names another"):
        encode_file(text_path, CountingTokenizer(), tmp_path / "file" / "cache")


def test_a_second_call_encodes_nothing(text_path, cache):
    tokenizer = CountingTokenizer()
    first = encode_file(text_path, tokenizer, cache)
    assert tokenizer.batches == [4]
    second = encode_file(text_path, tokenizer, cache)
    assert tokenizer.batches == [4]
    assert second.ids.tolist() == first.ids.tolist()
    assert (second.stats, second.num_unknown, second.digest) == (first.stats, first.num_unknown, first.digest)
    renamed = text_path.rename(text_path.with_name("other.txt"))
    assert encode_file(renamed, tokenizer, cache).digest == first.digest
    assert tokenizer.batches == [4]


def test_another_tokenizer_or_another_text_is_encoded_anew(text_path, cache):
    first = encode_file(text_path, CountingTokenizer(), cache)
    other = CountingTokenizer(name="b")
    assert encode_file(text_path, other, cache).digest != first.digest
    assert other.batches == [4]
    other_kind = CountingTokenizer()
    other_kind.kind = "char"
    assert encode_file(text_path, other_kind, cache).digest != first.digest
    text_path.write_text("\n".join(LINES).replace("umfundi", "umfunde") + "\n", encoding="utf-8")
    again = CountingTokenizer()
    assert encode_file(text_path, again, cache).digest != first.digest
    assert again.batches == [4]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(100, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32), (100_000, np.uint32)]
)
def test_the_vocabulary_decides_how_wide_ids_are(text_path, cache, vocab_size, dtype):
    for _ in range(2):  # made, then mapped
        ids = encode_file(text_path, CountingTokenizer(vocab_size), cache).ids
        assert ids.dtype == dtype
        assert ids.tolist().count(vocab_size - 1) == 4, "the largest id must not wrap around"


def test_ids_are_mapped_and_read_only(text_path, cache):
    ids = encode_file(text_path, CountingTokenizer(), cache).ids
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd.compress)])
def test_compressed_text_has_the_same_ids(text_path, cache, suffix, compress):
    packed = text_path.with_name(f"text.txt{suffix}")
    packed.write_bytes(compress(text_path.read_bytes()))
    plain, unpacked = (encode_file(path, CountingTokenizer(), cache) for path in (text_path, packed))
    assert unpacked.ids.tolist() == plain.ids.tolist()
    assert unpacked.stats == plain.stats


def test_a_long_text_is_encoded_in_batches(text_path, cache, monkeypatch):
    whole = encode_file(text_path, CountingTokenizer(), cache)
    monkeypatch.setattr("ulimi.data.LINES_PER_BATCH", 3)
    tokenizer = CountingTokenizer()
    in_parts = encode_file(text_path, tokenizer, cache / "other")
    assert tokenizer.batches == [3, 1]
    assert in_parts.ids.tolist() == whole.ids.tolist()
    assert (in_parts.stats, in_parts.num_unknown) == (whole.stats, whole.num_unknown)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_an_empty_file_is_an_error(tmp_path, cache, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    for _ in range(2):  # a first failure leaves nothing that a second call would take for a text
        with pytest.raises(UlimiError, match=r"text\.txt.* is empty"):
            encode_file(path, CountingTokenizer(), cache)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_not_there_is_an_error(tmp_path, cache):
    with pytest.raises(UlimiError, match="no-such"):
        encode_file(tmp_path / "no-such.txt", CountingTokenizer(), cache)
    with pytest.raises(UlimiError, match=str(tmp_path)):
        encode_file(tmp_path, CountingTokenizer(), cache)


def test_text_that_fails_half_way_leaves_nothing(tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good\n" * 20_000 + b"\xff\xfe bad\n")
    for _ in range(2):
        with pytest.raises(UlimiError, match="line 20001"):
            encode_file(path, CountingTokenizer(), cache)
    assert list(cache.iterdir()) == []


def test_a_text_that_was_half_encoded_is_encoded_again(text_path, cache):
    first = encode_file(text_path, CountingTokenizer(), cache)
    for suffix in (".json", ".ids"):
        (cache / f"{first.digest}{suffix}").unlink()
        tokenizer = CountingTokenizer()
        assert encode_file(text_path, tokenizer, cache).ids.tolist() == first.ids.tolist()
        assert tokenizer.batches == [4]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".json", lambda content: b""),
        (".json", lambda content: content[: len(content) // 2]),
        (".json", lambda content: b"\xff\x00"),
        (".json", lambda content: b"[]"),
        (".json", lambda content: content.replace(b'"num_tokens"', b'"tokens"')),
        (".json", lambda content: content.replace(b'"num_lines"', b'"lines"')),
        (".json", lambda content: content.replace(b"uint16", b"uint99")),
        (".ids", lambda content: b""),
        (".ids", lambda content: content[:-1]),
        (".ids", lambda content: content + b"\0\0"),
    ],
)
def test_a_damaged_cache_entry_is_encoded_again(text_path, cache, suffix, damage):
    first = encode_file(text_path, CountingTokenizer(), cache)
    expected = first.ids.tolist()
    entry = cache / f"{first.digest}{suffix}"
    content = damage(entry.read_bytes())
    entry.unlink()  # the old file stays under the first mapping
    entry.write_bytes(content)
    for batches in ([4], []):  # once, and then the entry is good
        tokenizer = CountingTokenizer()
        again = encode_file(text_path, tokenizer, cache)
        assert tokenizer.batches == batches
        assert again.ids.tolist() == expected
        assert (again.stats, again.num_unknown) == (first.stats, first.num_unknown)


def test_what_can_be_read_only_once_is_an_error(tmp_path, cache):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader, writer = os.pipe()
    try:
        for path in (fifo, Path(f"/dev/fd/{reader}"), Path("/dev/null"), Path("-")):
            with pytest.raises(UlimiError, match=rf"^{re.escape(str(path))}: .*read more than once.*give a file$"):
                encode_file(path, CountingTokenizer(), cache)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_write_that_fails_leaves_no_half_of_a_text(text_path, cache, monkeypatch):
    write_text = Path.write_text

    def fill_the_disk(path, text, **kwargs):
        write_text(path, text[:5], **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill_the_disk)
        with pytest.raises(OSError, match="No space"):
            encode_file(text_path, CountingTokenizer(), cache)
    assert encode_file(text_path, CountingTokenizer(), cache).stats == count_stats(LINES)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path, text_path):
    monkeypatch.setenv("ULIMI_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "own"
    digest = encode_file(text_path, CountingTokenizer()).digest
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [f"{digest}.ids", f"{digest}.json"]
    monkeypatch.delenv("ULIMI_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "ulimi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "ulimi"


# --- Streams -----------------------------------------------------------------------------------------


def test_streams_are_stretches_of_the_text_without_the_remainder():
    ids = np.arange(14, dtype=np.uint16)
    streams_BS = make_streams(ids, 4)
    assert streams_BS.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert np.shares_memory(streams_BS, ids)


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(11, 4), (0, 1), (2, 1), (59, 20)])
def test_a_text_too_small_for_its_streams_is_an_error(num_tokens, batch_size):
    with pytest.raises(UlimiError, match=rf"{num_tokens} tokens.*batch_size = {batch_size}.*{3 * batch_size} are"):
        make_streams(np.arange(num_tokens), batch_size)
    assert make_streams(np.arange(3 * batch_size), batch_size).shape == (batch_size, 3)


# --- Windows -----------------------------------------------------------------------------------------

# Small numbers where the ends of an epoch have their cases, and some that leave room for many windows.
bptts = st.integers(2, 12) | st.integers(2, 90)
stream_lengths = st.integers(3, 40) | st.integers(3, 600)
seeds = st.integers(0, 2**32 - 1)


def make_windows(length, bptt, seed, *, batch_size=2, variable_length=True):
    streams_BS = np.arange(batch_size * length, dtype=np.uint16).reshape(batch_size, length)
    rng = np.random.default_rng(seed)
    return streams_BS, Windows(streams_BS, bptt=bptt, variable_length=variable_length, rng=rng)


def epoch(windows):
    """List the windows of an epoch; one that would never end is cut off, and is then wrong."""
    return list(itertools.islice(windows, 1000))


@given(length=stream_lengths, bptt=bptts, seed=seeds, batch_size=st.integers(1, 4), variable_length=st.booleans())
@example(length=3, bptt=2, seed=0, batch_size=1, variable_length=False)
@example(length=4, bptt=2, seed=0, batch_size=1, variable_length=False)
@example(length=72, bptt=70, seed=0, batch_size=1, variable_length=False)
@quick
def test_every_token_but_a_streams_first_is_a_target_exactly_once(length, bptt, seed, batch_size, variable_length):
    streams_BS, windows = make_windows(length, bptt, seed, batch_size=batch_size, variable_length=variable_length)
    pairs = epoch(windows)
    inputs_BS, targets_BS = (np.concatenate(arrays, axis=1) for arrays in zip(*pairs, strict=True))
    # In order besides, so that the carried state of a stream is that of the token before.
    assert inputs_BS.tolist() == streams_BS[:, :-1].tolist()
    assert targets_BS.tolist() == streams_BS[:, 1:].tolist()
    assert all(inputs.dtype == targets.dtype == np.int64 for inputs, targets in pairs)
    assert windows.position == length - 1
    assert epoch(windows) == [], "the epoch is over"


@given(length=stream_lengths, bptt=bptts, seed=seeds, variable_length=st.booleans())
@example(length=4, bptt=2, seed=0, variable_length=False)
@quick
def test_a_window_has_two_steps_at_least_and_twenty_beyond_bptt_at_most(length, bptt, seed, variable_length):
    _, windows = make_windows(length, bptt, seed, variable_length=variable_length)
    lengths = [inputs.shape[1] for inputs, _ in epoch(windows)]
    assert min(lengths) >= 2
    assert max(lengths) <= bptt + 20


@given(length=stream_lengths, bptt=bptts, seed=seeds)
@quick
def test_fixed_windows_have_bptt_steps_until_the_end(length, bptt, seed):
    _, windows = make_windows(length, bptt, seed, variable_length=False)
    lengths = [inputs.shape[1] for inputs, _ in epoch(windows)]
    whole, rest = divmod(length - 1, bptt)
    if rest != 1:
        assert lengths == [bptt] * whole + [rest] * (rest > 0)
    elif whole == 0 or bptt == 2:
        assert lengths == [bptt] * (whole - 1) + [bptt + 1]
    else:  # a rest of one step would be a window that TAR cannot take
        assert lengths == [bptt] * (whole - 1) + [bptt - 1, 2]


@given(length=stream_lengths, bptt=bptts, seed=seeds)
@quick
def test_lengths_are_those_of_the_reference_until_the_end(length, bptt, seed):
    _, windows = make_windows(length, bptt, seed)
    lengths = [inputs.shape[1] for inputs, _ in epoch(windows)]
    rng = np.random.default_rng(seed)
    draws = [(rng.random(), rng.standard_normal()) for _ in lengths]
    expected = reference.window_lengths(*zip(*draws, strict=True), bptt)
    # The end of the text shortens the last, and may shorten or lengthen the one before it by a step.
    assert lengths[:-2] == expected[: len(lengths)][:-2]
    assert all(abs(a - b) <= 1 or a < b for a, b in zip(lengths[-2:], expected[-2:], strict=True))


def test_windows_of_two_epochs_differ():
    streams_BS = np.arange(1200).reshape(2, 600)
    rng = np.random.default_rng(0)
    first, second = (
        [inputs.shape[1] for inputs, _ in Windows(streams_BS, bptt=20, variable_length=True, rng=rng)] for _ in "ab"
    )
    assert first != second


@given(length=stream_lengths, bptt=bptts, seed=seeds, stop=st.integers(0, 30), variable_length=st.booleans())
@quick
def test_position_and_random_state_give_the_same_remaining_windows(length, bptt, seed, stop, variable_length):
    streams_BS, windows = make_windows(length, bptt, seed, variable_length=variable_length)
    uninterrupted = epoch(windows)
    _, windows = make_windows(length, bptt, seed, variable_length=variable_length)
    done = list(itertools.islice(windows, min(stop, len(uninterrupted) - 1)))
    # As a checkpoint holds them: in JSON.
    saved = json.loads(json.dumps({"position": windows.position, "rng": windows._rng.bit_generator.state}))
    rng = np.random.default_rng(12345)
    rng.bit_generator.state = saved["rng"]
    position = saved["position"]
    rest = Windows(streams_BS, bptt=bptt, variable_length=variable_length, rng=rng, position=position)
    resumed = [*done, *epoch(rest)]
    assert [inputs.tolist() for inputs, _ in resumed] == [inputs.tolist() for inputs, _ in uninterrupted]
    assert [targets.tolist() for _, targets in resumed] == [targets.tolist() for _, targets in uninterrupted]


class GivenDraws:
    """A random generator that draws what it is told, to reach what chance does not."""

    def __init__(self, uniform, normal):
        self._uniform, self._normal = uniform, normal

    def random(self):
        return self._uniform

    def normal(self, loc, scale):
        return loc + scale * self._normal


@given(uniform=st.floats(0, 1, exclude_max=True), normal=st.floats(-9, 9), bptt=st.integers(2, 300))
@example(uniform=0.9499999, normal=0.0, bptt=71)
@example(uniform=0.95, normal=0.0, bptt=71)
@example(uniform=0.0, normal=8.0, bptt=70)
@example(uniform=0.99, normal=8.0, bptt=70)
@example(uniform=0.99, normal=-8.0, bptt=70)
@quick
def test_a_length_is_the_references_for_any_draw(uniform, normal, bptt):
    assert window_length(GivenDraws(uniform, normal), bptt) == reference.window_length(uniform, normal, bptt)


def test_lengths_have_the_published_distribution():
    rng = np.random.default_rng(0)
    lengths = np.array([window_length(rng, 200) for _ in range(20_000)])
    halves = lengths < 150
    assert abs(halves.mean() - 0.05) < 5 * math.sqrt(0.05 * 0.95 / len(lengths))
    for part, base in ((lengths[~halves], 200), (lengths[halves], 100)):
        # int() takes half a token from the mean.
        assert abs(part.mean() - (base - 0.5)) < 5 * 5 / math.sqrt(len(part))
        assert abs(part.std() - 5) < 5 * 5 / math.sqrt(2 * len(part))


# --- Validation --------------------------------------------------------------------------------------


@given(num_tokens=st.integers(1, 60), batch_size=st.integers(1, 80))
@example(num_tokens=5, batch_size=4)
@example(num_tokens=1, batch_size=10)
@settings(max_examples=300, deadline=None)
def test_validation_counts_every_token_once_also_where_there_are_more_rows_than_tokens(num_tokens, batch_size):
    first_input = 999
    ids = np.arange(num_tokens, dtype=np.uint16)
    inputs_BN, targets_BN = validation_rows(ids, batch_size, first_input)
    assert inputs_BN.shape == targets_BN.shape
    assert inputs_BN.dtype == targets_BN.dtype == np.int64
    assert len(inputs_BN) <= batch_size
    assert inputs_BN.shape[1] == math.ceil(num_tokens / min(batch_size, num_tokens))
    counted = targets_BN != IGNORED
    assert targets_BN[counted].tolist() == ids.tolist()
    # Each target is predicted from the id before it, the first from `first_input`.
    assert inputs_BN[counted].tolist() == [first_input, *ids[:-1].tolist()]
    assert counted.any(axis=1).all(), "no row is padding alone"
    assert set(inputs_BN[~counted].tolist()) <= {first_input}


V, EOS = 13, 12


@pytest.fixture(scope="module")
def model():
    rates = dict.fromkeys(
        ["embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"], 0.5
    )
    rng = torch.Generator().manual_seed(1)
    model = AWDLSTM(vocab_size=V, embedding_size=5, hidden_size=6, num_layers=2, **rates).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=rng)
    return model


def reference_nats(model, ids):
    """Nats of one stretch in one long pass, from a zero state and from <eos>."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    params = {
        "embedding": model.model.embed_tokens.weight,
        "layers": [tuple(getattr(layer.lstm, name) for name in names) for layer in model.layers],
        "decoder_bias": model.lm_head.bias,
    }
    inputs, targets = ids[:-1], ids[1:]
    logits = reference.awd_lstm_forward([inputs], params).logits
    return reference.cross_entropy_nats(logits, [targets]) * len(targets)


@pytest.mark.parametrize("num_tokens", [1, 2, 50, 57])
def test_validation_of_one_stream_is_one_long_pass(model, num_tokens):
    ids = np.random.default_rng(num_tokens).integers(0, V, num_tokens).astype(np.uint16)
    close(validation_nats(model, ids, 1, EOS), reference_nats(model, [EOS, *ids.tolist()]), 1e-10)


@pytest.mark.parametrize("batch_size", [2, 7, 10, 100])
def test_validation_of_several_streams_starts_each_from_zero(model, batch_size):
    ids = np.random.default_rng(0).integers(0, V, 57).astype(np.uint16)
    length = math.ceil(57 / min(batch_size, 57))
    text = [EOS, *ids.tolist()]
    expected = sum(reference_nats(model, text[start : start + length + 1]) for start in range(0, 57, length))
    close(validation_nats(model, ids, batch_size, EOS), expected, 1e-10)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_validation_does_not_depend_on_the_window(model, monkeypatch, batch_size):
    ids = np.random.default_rng(0).integers(0, V, 57).astype(np.uint16)
    nats = []
    for window in (1, 2, 5, 56, 57, 58, 1000):
        monkeypatch.setattr("ulimi.train.EVALUATION_WINDOW", window)
        nats.append(validation_nats(model, ids, batch_size, EOS))
    close(nats, [nats[0]] * len(nats), 1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_validation_drops_nothing_and_leaves_the_model_as_it_was(model, training):
    ids = np.random.default_rng(0).integers(0, V, 57).astype(np.uint16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    model.train(training)
    first, second = validation_nats(model, ids, 4, EOS), validation_nats(model, ids, 4, EOS)
    assert first == second
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
