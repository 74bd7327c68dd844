"""From prompts to texts: what is written ends where the unlimited text would be cut, whatever the tokens and strategy.

The model is an n-gram model of a few lines, with every kind of tokenizer; it writes much that is no word.
"""

import functools
import itertools
import re
import unicodedata

import numpy as np
import pytest

from conftest import synthetic_lines
from ulimi.beam import Beams
from ulimi.engine import load_engine
from ulimi.errors import UlimiError
from ulimi.ngram import NgramEngine, count_ngrams
from ulimi.sampling import Sampling
from ulimi.tokenizer import KINDS, Tokenizer
from ulimi.words import Ending
from ulimi.writer import Text, Writer, Writing

QUOTED = [
    "UThandi uthi: “Inja yami idla ukudla.” Uhamba izolo!",
    "Ubani? Inja; ikati, 'inja' noma inja-nja… Uthisha wase-Afrika uthanda inja.",
    "I-Afrika inkulu. Ngiyabonga kakhulu! Kuhle.",
    "Abafundi bafunda ngo-2026 (namhlanje). Izolo injana yami incane.",
] * 6
SYNTHETIC = synthetic_lines(96)
LINES = [f"{one} {two} {three}" for one, two, three in zip(SYNTHETIC[::2], SYNTHETIC[1::2], QUOTED * 2, strict=True)]
SIZES = {"bpe": 400, "unigram": 400, "word": None, "char": None}
TOKENIZERS = {kind: Tokenizer.train(LINES, kind=kind, vocab_size=SIZES[kind]) for kind in KINDS}
ORDERS = {"bpe": 3, "unigram": 3, "word": 2, "char": 5}


def make_engine(kind: str) -> NgramEngine:
    tokenizer = TOKENIZERS[kind]
    ids = np.array([id for ids in tokenizer.encode_lines(LINES) for id in ids])
    return NgramEngine(count_ngrams(ids, tokenizer.vocab_size, ORDERS[kind]))


ENGINES = {kind: make_engine(kind) for kind in KINDS}
CALM = Sampling(temperature=0.8, top_k=30)
PROMPTS = [
    "", "Inja", "Inja ", "In", "Uthisha uthanda inj", "inja.", "Kuhle. ", "Ubani?", "a\n", "a\nInj", "Ngo-", "ngo-20",
    "“", "Inja  ", "(", "wase-Af",
]  # fmt: skip


def writer(kind: str, **options) -> Writer:
    ending = {name: options.pop(name) for name in list(options) if name in Ending.__dataclass_fields__}
    writing = Writing(ending=Ending(**{"max_tokens": 60} | ending), **{"sampling": CALM} | options)
    return Writer(ENGINES[kind], TOKENIZERS[kind], writing)


def write(kind: str, prompt: str, seed: int = 0, **options) -> Text:
    (text,) = writer(kind, **options).write(prompt, seed=seed)
    return text


@functools.cache
def unlimited(kind: str, prompt: str, seed: int) -> str:
    return write(kind, prompt, seed).written


def breaks(written: str) -> list[int]:
    """Where a word may end: before white space, and after a line's end."""
    return [place for place in range(len(written)) if written[place].isspace() or written[place - 1 : place] == "\n"]


cases = pytest.mark.parametrize("kind", KINDS)


# Texts and prompts


@cases
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"beams": Beams(num=2)}, {"at": "sentence"}], ids=str)
def test_a_text_is_its_prompt_and_what_was_written(kind, prompt, options):
    options = {"max_tokens": 12 if "beams" in options else 40} | options
    text = write(kind, prompt, **options)
    assert text.prompt == prompt
    assert text.text == prompt + text.written
    assert prompt.endswith(text.typed)
    words = "".join(word.text for word in text.words)
    assert words == text.typed + text.written
    assert text.nats == pytest.approx(-sum(word.logprob for word in text.words))
    assert text.nats >= 0
    assert text.num_tokens == sum(word.num_tokens for word in text.words)


@cases
def test_words_of_a_closed_vocabulary_and_others_are_parted_by_one_space(kind):
    for prompt in ("Inja", "Inja ", "Uthisha uthanda", "a\n"):
        text = write(kind, prompt, sampling=Sampling(temperature=0)).text
        assert re.search(r"\S\n?\S", text)
        assert not re.search(r"  | \n|\n ", text[len(prompt) - 1 :])


@cases
def test_a_prompt_is_the_same_in_every_normal_form(kind):
    engine = writer(kind)
    for prompt in ("Indlovukazi é", "é", "Ngiyá", "Ngiyá "):
        composed, decomposed = (unicodedata.normalize(form, prompt) for form in ("NFC", "NFD"))
        assert composed != decomposed
        for seed in range(3):
            assert engine.write(decomposed, seed=seed) == engine.write(composed, seed=seed)


def test_what_a_closed_vocabulary_does_not_know_stays_as_it_was_typed():
    for prompt in ("Xylofoni", "Inja xyz", "Inja\nxyz"):
        text = write("word", prompt, max_words=3)
        assert text.text.startswith(prompt)
        assert text.text == prompt + text.written
        assert not text.written.startswith("nk>")
        assert text.written[:1] in ("", " ", "\n")


@cases
def test_the_seed_decides_and_a_text_does_not_depend_on_those_beside_it(kind):
    engine = writer(kind, max_tokens=25)
    for prompt in ("", "Inja in"):
        many = engine.write(prompt, num=4, seed=3)
        assert engine.write(prompt, seed=3) == many[:1]
        assert engine.write(prompt, num=2, seed=3) == many[:2]
        assert len({text.text for text in many}) > 1


@cases
@pytest.mark.parametrize("options", [
    {}, {"stops": ("in", "ka ")}, {"at": "sentence"}, {"max_words": 5}, {"max_chars": 30}, {"banned": ("inja",)},
    {"beams": Beams(num=2), "max_tokens": 9},
], ids=str)  # fmt: skip
def test_streaming_gives_the_words_of_the_text(kind, options):
    for prompt, seed in itertools.product(("", "Uthisha in", "Kuhle. "), range(1 if "beams" in options else 5)):
        words = []
        text, *_ = writer(kind, **options).write(prompt, num=2, seed=seed, on_word=words.append)
        assert tuple(words) == text.words


# Ends


@cases
@pytest.mark.parametrize("prompt", ["", "In", "Kuhle.", "Ubani? "])
def test_a_text_ends_with_its_sentence_or_paragraph(kind, prompt):
    sentence = re.compile(r"""[.!?…]["'”’»)\]]*$""")
    num_inside = 0
    for seed in range(15):
        whole = unlimited(kind, prompt, seed)
        line = whole.find("\n") if "\n" in whole else len(whole)
        paragraph = write(kind, prompt, seed, at="paragraph").written
        assert paragraph == whole[:line]
        ends = [place for place in breaks(whole) if place and sentence.search(prompt + whole[:place])]
        end = min([line, *ends])
        assert write(kind, prompt, seed, at="sentence").written == whole[:end]
        num_inside += end < line
    assert num_inside > 3 or prompt == "Kuhle."  # which is the end of each line that has it


@cases
@pytest.mark.parametrize("prompt", ["", "In", "Inja", "Inja "])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_text_ends_with_its_last_word(kind, prompt, limit):
    for seed in range(8):
        whole = unlimited(kind, prompt, seed)
        ends = [place for place in breaks(whole) if len(whole[:place].split()) >= limit]
        assert write(kind, prompt, seed, max_words=limit).written == whole[: min(ends, default=len(whole))]


@cases
@pytest.mark.parametrize("prompt", ["", "In", "Inja "])
@pytest.mark.parametrize("limit", [1, 7, 20])
def test_a_word_that_would_pass_the_last_character_is_left_out(kind, prompt, limit):
    for seed in range(8):
        whole = unlimited(kind, prompt, seed)
        ends = [place for place in [*breaks(whole), len(whole)] if place <= limit]
        limited = write(kind, prompt, seed, max_chars=limit).written
        assert len(limited) <= limit
        assert limited == whole[: max(ends, default=0)]


@cases
@pytest.mark.parametrize("prompt", ["", "In", "Inja ", "Kuhle"])
def test_a_text_ends_before_a_stop_string_in_what_was_written(kind, prompt):
    for seed, stop in itertools.product(range(4), ("inja", " ", "i", "a u", ".", "ja", "\n", "In", "Kuhle")):
        whole = unlimited(kind, prompt, seed)
        place = whole.find(stop)
        if place >= 0:
            assert write(kind, prompt, seed, stops=(stop,)).written == whole[:place]


NFD = unicodedata.normalize("NFD", "Ngiyabôna")


@pytest.mark.parametrize("stop", ["ô", unicodedata.normalize("NFD", "ô")])
def test_a_stop_string_is_the_same_in_every_normal_form(stop):
    lines = [NFD] * 6
    tokenizer = Tokenizer.train(lines, kind="char")
    ids = np.array([id for ids in tokenizer.encode_lines(lines) for id in ids])
    engine = NgramEngine(count_ngrams(ids, tokenizer.vocab_size, 4))
    writing = Writing(sampling=Sampling(temperature=0.0), ending=Ending(max_tokens=7, stops=(stop,)))
    (text,) = Writer(engine, tokenizer, writing).write("Ngi")
    assert text.text == "Ngiyab"


def test_a_stop_string_that_is_no_text_is_refused():
    with pytest.raises(UlimiError, match="surrogate"):
        writer("bpe", stops=("\ud800",))


@cases
def test_a_text_in_which_nothing_may_come_twice_can_still_end(kind):
    texts = writer(kind, no_repeat_ngram=1, at="paragraph", sampling=Sampling(), max_tokens=400).write("In", num=8)
    assert any(text.num_tokens < 60 for text in texts)


@cases
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{"max_chars": 1}, {"max_tokens": 1}, {"beams": Beams(num=2), "max_chars": 1}, {}])
def test_the_words_are_all_of_the_text(kind, prompt, options):
    one = writer(kind, **options)
    (text,) = one.write(prompt)
    told = "".join(word.text for word in [*one.prompt_words(prompt), *text.words])
    if kind != "word":
        assert told == text.text
    elif TOKENIZERS[kind].unk_id not in TOKENIZERS[kind].encode(prompt):
        assert told.split() == text.text.split()


@cases
@pytest.mark.parametrize("prompt", ["", "Uthisha uthanda in"])
@pytest.mark.parametrize("at", ["sentence", "paragraph"])
@pytest.mark.parametrize("minimum", [{"min_words": 9}, {"min_chars": 50}, {"min_tokens": 20}], ids=str)
def test_a_text_does_not_end_before_its_minimum(kind, prompt, at, minimum):
    num_ended = 0
    for seed in range(12):
        text = write(kind, prompt, seed, at=at, max_tokens=120, **minimum)
        assert "\n" not in text.written
        if text.num_tokens > 115:  # the limit may have ended it
            continue
        num_ended += 1
        assert len(text.written.split()) >= minimum.get("min_words", 0)
        assert len(text.written) >= minimum.get("min_chars", 0)
        assert text.num_tokens >= minimum.get("min_tokens", 0)
    assert num_ended > 2 or at == "paragraph"


def test_tokens_that_spell_what_was_typed_do_not_reach_the_minimum():
    text = write("char", "injana enc", at="paragraph", min_tokens=2, sampling=Sampling(temperature=0))
    assert text.typed == ""  # in kind "char" nothing is begun
    for seed in range(10):
        text = write("bpe", "xqxqxqxq", seed, at="sentence", min_tokens=6, max_tokens=80)
        assert text.num_tokens >= 6 + len(TOKENIZERS["bpe"].encode("xqxqxqxq")) - 2


# Banned words


def has_word(text: str, word: str) -> bool:
    edge = r"(?<!\w)(?<!\w['’]){}(?!\w)(?!['’]\w)"
    return re.search(edge.format(re.escape(word.lower())), text.lower()) is not None


@cases
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_banned_words_never_come(kind, temperature):
    banned = ("INJA", "uthisha", "Afrika", "wase-Afrika", "2026")
    sampling = Sampling(temperature=temperature)
    free = forced = 0
    prompts = ["", "In", "Ubani? In", "Uthisha uthanda i"]
    for prompt in prompts if kind == "word" else [*prompts, "wase-", "ngo-20", "Uthi: “"]:
        texts = writer(kind, sampling=sampling, banned=banned, max_tokens=80).write(prompt, num=8, seed=1)
        for text in texts:
            # What was typed is not ours; a word that it begins is.
            line = prompt.removeprefix("Uthisha ") + text.written
            assert not [word for word in banned if has_word(line, word)], line
            forced += 1
        for text in writer(kind, sampling=sampling, max_tokens=80).write(prompt, num=8, seed=1):
            free += any(has_word(text.written, word) for word in banned)
    assert free > forced / 9


@cases
def test_a_banned_word_may_begin_a_longer_one(kind):
    texts = writer(kind, banned=("inja",), max_tokens=80).write("", num=40, seed=0)
    assert any(has_word(text.text, "injana") for text in texts)


def test_a_word_that_was_typed_goes_on_where_it_is_banned():
    for kind in KINDS:
        for seed in range(10):
            assert not has_word(write(kind, "inja", seed, banned=("Inja",)).text, "inja")


@cases
@pytest.mark.parametrize("options", [{"beams": Beams(num=3)}, {"stops": ("a",)}, {"stops": ("na",)}, {}], ids=str)
def test_a_limit_or_a_stop_string_does_not_leave_a_banned_word_at_the_end(kind, options):
    banned = ("inja", "uthisha", "i", "in", "uth", "kuhle")
    came = 0
    for prompt, limit in itertools.product(["", "Ubani? ", "Uthisha uthanda i", "inj"], (1, 2, 3, 5)):
        texts = writer(kind, banned=banned, max_tokens=limit, **options).write(prompt, num=3, seed=limit)
        for text in texts:
            last = re.search(r"[\w'’]*$", text.text.lower())[0]
            assert not text.written or last not in banned, text
        free = writer(kind, max_tokens=limit, **options).write(prompt, num=3, seed=limit)
        came += sum(re.search(r"[\w'’]*$", text.text.lower())[0] in banned for text in free)
    assert came > 0 or kind == "word"  # a closed vocabulary's words are whole, and banned ones never come


def test_if_a_closed_vocabulary_has_banned_words_only_that_is_said():
    with pytest.raises(UlimiError, match="all words that the model knows to begin like 'Kuhl' are banned"):
        write("word", "Kuhl", banned=("kuhle",))


# Searches


@cases
@pytest.mark.parametrize("prompt", ["", "Uthisha uthanda in"])
def test_beams_are_distinct_and_end_exactly_at_a_sentences_end(kind, prompt):
    texts = writer(kind, beams=Beams(num=4), at="sentence", max_tokens=30, min_words=3).write(prompt, num=4)
    assert 1 <= len(texts) <= 4
    assert len({text.text for text in texts}) == len(texts)
    assert [text.score for text in texts] == sorted((text.score for text in texts), reverse=True)
    for text in texts:
        assert "\n" not in text.written
        assert len(text.written.split()) >= 3
        if text.num_tokens < 25:
            inside = [place for place in breaks(text.written) if len(text.written[:place].split()) >= 3]
            assert not [place for place in inside if re.search(r"[.!?…][\"'”’»)\]]*$", text.written[:place])]
    assert any(re.search(r"[.!?…][\"'”’»)\]]*$", text.written) for text in texts) or kind == "word"


@cases
def test_beams_of_so_many_words_have_so_many(kind):
    for limit in (1, 3):
        for text in writer(kind, beams=Beams(num=4), max_words=limit, max_tokens=60).write("Uthisha ", num=4):
            assert len(text.written.split()) == limit


@cases
@pytest.mark.parametrize("required", [("inja",), ("umlimi", "ekhaya"), ("injana", "inja")])
@pytest.mark.parametrize("options", [{}, {"at": "sentence"}, {"max_chars": 60}, {"stops": ("ubani",)}], ids=str)
def test_required_words_are_there_whole(kind, required, options):
    search = writer(kind, beams=Beams(num=4), required=required, max_tokens=30 if kind != "char" else 60, **options)
    for prompt in ("", "Uthisha uthanda in"):
        try:
            texts = search.write(prompt, num=3)
        except UlimiError as error:
            texts, said = [], str(error)
            assert "all required words" in said
            assert len(required) > 1 or options == {"max_chars": 60}
        for text in texts:
            assert all(re.search(rf"(?<!\w){word}(?!\w)", text.text) for word in required), text.text


def test_beams_hold_no_banned_word():
    for kind in KINDS:
        (best,) = writer(kind, beams=Beams(num=3), at="sentence", max_tokens=25).write("Uthisha uthanda ")
        word = best.written.strip(" .!?…”").split()[0].strip("'“;,.")
        for text in writer(kind, beams=Beams(num=3), at="sentence", max_tokens=25, banned=(word,)).write(
            "Uthisha uthanda ", num=3
        ):
            assert not has_word(text.written, word)


def test_contrastive_search_without_a_penalty_is_greedy(tiny_run):
    engine = load_engine(tiny_run, kind="torch")
    for prompt in ("", "Abantu ba", "Abantu "):
        for ending in (Ending(max_tokens=30), Ending(max_tokens=30, at="sentence"), Ending(max_tokens=30, max_words=3)):
            greedy, contrastive = (
                Writer(engine, tiny_run.tokenizer, writing).write(prompt)[0]
                for writing in (
                    Writing(sampling=Sampling(temperature=0), ending=ending), Writing(contrastive=0, ending=ending),
                )
            )  # fmt: skip
            assert contrastive.text == greedy.text
            assert contrastive.nats == pytest.approx(greedy.nats, rel=1e-4)


# Refusals


@pytest.mark.parametrize(("options", "said"), [
    ({"beams": Beams(2), "contrastive": 0.5}, "choose one"),
    ({"contrastive": 1.5}, "the contrastive penalty must be 0 to 1; got 1.5"),
    ({"required": ("inja",)}, "required words need beam search"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram must be 0"),
    ({"repetition_penalty": 0.5}, "repetition_penalty must be"),
    ({"banned": ("",)}, "a banned word must be one word"),
    ({"banned": ("inja yami",)}, "a banned word must be one word.*got 'inja yami'"),
    ({"banned": ("inja.",)}, "a banned word must be one word.*got 'inja.'"),
    ({"banned": ("-",)}, "a banned word must be one word"),
    ({"banned": ("'",)}, "a banned word must be one word"),
    ({"beams": Beams(2), "required": ("a b",)}, "a required word must be one word"),
    ({"beams": Beams(2), "required": ("Inja",), "banned": ("inja",)}, "'Inja' is required and banned"),
])  # fmt: skip
def test_values_that_are_not_allowed_or_not_together_are_refused(options, said):
    with pytest.raises(UlimiError, match=said):
        Writing(**options)


def test_other_refusals():
    with pytest.raises(UlimiError, match="a beam of 2 gives 1 to 2 texts; got 3"):
        writer("bpe", beams=Beams(2)).write("", num=3)
    with pytest.raises(UlimiError, match="this needs a network"):
        writer("bpe", contrastive=0.5)
    with pytest.raises(UlimiError, match="'xyz' is not in the model's closed vocabulary"):
        writer("word", beams=Beams(2), required=("xyz",))
    with pytest.raises(UlimiError, match="all required words"):
        writer("bpe", beams=Beams(2), required=("xyzxyz",), max_tokens=2).write("")
