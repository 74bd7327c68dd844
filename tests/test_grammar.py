"""Minimal pairs: the forms, typed here from grammar and not from grammar.toml, and what every pair must keep to."""

import re
import tomllib
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest

from ulimi import grammar
from ulimi.errors import UlimiError
from ulimi.grammar import Lexicon, Noun, Pair, lexicon, pairs, phenomena

CLASSES = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "14", "15"]


def row(text: str) -> dict[str, str]:
    """Give a class's form each, in the order of CLASSES; "-" is none."""
    return dict(zip(CLASSES, ["" if word == "-" else word for word in text.split()], strict=True))


# Every noun class with every table, as whole words where the word is what one knows.
NOUNS = row("umfana abafana umuthi imithi ibhuku amabhuku isikole izikole inja izinja uthango ubuhlalu ukudla")
VERBS = {
    ("subject", "yahamba"): row(
        "uyahamba bayahamba uyahamba iyahamba liyahamba ayahamba siyahamba ziyahamba iyahamba ziyahamba luyahamba "
        "buyahamba kuyahamba"
    ),
    ("subjunctive", "hambe"): row(
        "ahambe bahambe uhambe ihambe lihambe ahambe sihambe zihambe ihambe zihambe luhambe buhambe kuhambe"
    ),
    ("participial", "hamba"): row(
        "ehamba behamba uhamba ihamba lihamba ehamba sihamba zihamba ihamba zihamba luhamba buhamba kuhamba"
    ),
    ("negative", "hambi"): row(
        "akahambi abahambi awuhambi ayihambi alihambi awahambi asihambi azihambi ayihambi azihambi aluhambi "
        "abuhambi akuhambi"
    ),
    ("remote", "hamba"): row(
        "wahamba bahamba wahamba yahamba lahamba ahamba sahamba zahamba yahamba zahamba lwahamba bahamba kwahamba"
    ),
    ("object", "bona"): row(
        "mbona babona wubona yibona libona wabona sibona zibona yibona zibona lubona bubona kubona"
    ),
    ("relative", "qotho"): row(
        "oqotho abaqotho oqotho eqotho eliqotho aqotho esiqotho eziqotho eqotho eziqotho oluqotho obuqotho okuqotho"
    ),
    ("ka", "Sipho"): row(
        "kaSipho bakaSipho kaSipho kaSipho likaSipho kaSipho sikaSipho zikaSipho kaSipho zikaSipho lukaSipho "
        "bukaSipho kukaSipho"
    ),
    ("all", ""): row("wonke bonke wonke yonke lonke - sonke zonke yonke zonke lonke bonke -"),
    ("alone", ""): row("yedwa bodwa wodwa yodwa lodwa - sodwa zodwa yodwa zodwa lodwa bodwa -"),
}  # fmt: skip
ADJECTIVES = {
    ("adjective", "khulu"): row(
        "omkhulu abakhulu omkhulu emikhulu elikhulu amakhulu esikhulu ezinkulu enkulu ezinkulu olukhulu obukhulu "
        "okukhulu"
    ),
    ("adjective", "hle"): row(
        "omuhle abahle omuhle emihle elihle amahle esihle ezinhle enhle ezinhle oluhle obuhle okuhle"
    ),
    ("adjective", "bi"): row("omubi ababi omubi emibi elibi amabi esibi ezimbi embi ezimbi olubi obubi okubi"),
    ("adjective", "sha"): row(
        "omusha abasha omusha emisha elisha amasha esisha ezintsha entsha ezintsha olusha obusha okusha"
    ),
    ("adjective", "dala"): row(
        "omdala abadala omdala emidala elidala amadala esidala ezindala endala ezindala oludala obudala okudala"
    ),
    ("adjective", "ncane"): row(
        "omncane abancane omncane emincane elincane amancane esincane ezincane encane ezincane oluncane obuncane "
        "okuncane"
    ),
    ("adjective", "fushane"): row(
        "omfushane abafushane omfushane emifushane elifushane amafushane esifushane ezimfushane emfushane ezimfushane "
        "olufushane obufushane okufushane"
    ),
    ("predicate", "de"): row("mude bade mude mide lide made side zinde inde zinde lude bude kude"),
    ("predicate", "khulu"): row(
        "mkhulu bakhulu mkhulu mikhulu likhulu makhulu sikhulu zinkulu inkulu zinkulu lukhulu bukhulu kukhulu"
    ),
}  # fmt: skip
NUMERALS = {
    "bili": "ababili emibili amabili ezimbili ezimbili",
    "thathu": "abathathu emithathu amathathu ezintathu ezintathu",
    "ne": "abane emine amane ezine ezine",
    "hlanu": "abahlanu emihlanu amahlanu ezinhlanu ezinhlanu",
    "ningi": "abaningi eminingi amaningi eziningi eziningi",
}
POSSESSIVES = {
    "umfana": row(
        "womfana bomfana womfana yomfana lomfana omfana somfana zomfana yomfana zomfana lomfana bomfana komfana"
    ),
    "ingane": row(
        "wengane bengane wengane yengane lengane engane sengane zengane yengane zengane lwengane bengane kwengane"
    ),
    "abafana": row(
        "wabafana babafana wabafana yabafana labafana abafana sabafana zabafana yabafana zabafana lwabafana babafana "
        "kwabafana"
    ),
    "othisha": row(
        "wothisha bothisha wothisha yothisha lothisha othisha sothisha zothisha yothisha zothisha lothisha bothisha "
        "kothisha"
    ),
}  # fmt: skip
DEMONSTRATIVES = [
    row("lo laba lo le leli lawa lesi lezi le lezi lolu lobu lokhu"),
    row("lowo labo lowo leyo lelo lawo leso lezo leyo lezo lolo lobo lokho"),
    row("lowaya labaya lowaya leya leliya lawaya lesiya leziya leya leziya loluya lobuya lokhuya"),
]
WITH = row("naye nabo nawo nayo nalo nawo naso nazo nayo nazo nalo nabo nakho")
PREFIXES = {
    "1": "um", "1a": "u", "2": "ab", "2a": "o", "3": "um", "4": "imi", "5": "i", "6": "ama", "7": "is", "8": "iz",
    "9": "i", "10": "izi", "11": "u", "14": "ubu", "15": "uku",
}  # fmt: skip


@pytest.fixture(scope="module")
def words() -> Lexicon:
    return lexicon()


@pytest.fixture(scope="module")
def all_pairs() -> dict[str, list[Pair]]:
    return {name: pairs(name) for name in phenomena()}


def noun(text: str) -> Noun:
    found = [noun for noun in lexicon().nouns if noun.text == text]
    assert len(found) == 1, text
    return found[0]


def tokens(sentence: str) -> list[str]:
    return re.findall(r"[\w-]+", sentence)


def changed(pair: Pair) -> tuple[str, str]:
    """Give the two words in which a pair differs."""
    both = zip(tokens(pair.good), tokens(pair.bad), strict=True)
    (only,) = [(good.lower(), bad.lower()) for good, bad in both if good != bad]
    return only


def marker(pair: Pair) -> tuple[str, str]:
    """Give what differs in them, without what is common in front and behind."""
    good, bad = changed(pair)
    start = 0
    while start < min(len(good), len(bad)) and good[start] == bad[start]:
        start += 1
    end = 0
    while end < min(len(good), len(bad)) - start and good[-1 - end] == bad[-1 - end]:
        end += 1
    return good[start : len(good) - end], bad[start : len(bad) - end]


# Forms


@pytest.mark.parametrize("noun_class", CLASSES)
def test_every_class_has_its_concords(words, noun_class):
    it = noun(NOUNS[noun_class])
    assert it.noun_class == noun_class
    for (kind, rest), expected in VERBS.items():
        concord = words.concord(kind, it)
        assert (concord + rest if concord else "") == expected[noun_class], kind
    stems = {stem["plain"]: stem for group in words.data["adjectives"] for stem in group["stems"]}
    for (kind, stem), expected in ADJECTIVES.items():
        assert words.adjective(it, stems[stem], kind) == expected[noun_class]
    for possessor, expected in POSSESSIVES.items():
        assert words.possessive(it, noun(possessor)) == expected[noun_class]
    assert words.classes[noun_class]["demonstrative"] == [distance[noun_class] for distance in DEMONSTRATIVES]
    assert words.with_pronoun(it) == WITH[noun_class]


def test_there_is_no_class_besides(words):
    assert list(words.classes) == CLASSES
    assert {noun.noun_class for noun in words.nouns} == set(CLASSES)


def test_numerals_follow_the_plural_classes(words):
    for stem in words.data["numerals"]:
        forms = [words.adjective(noun(NOUNS[name]), stem) for name in ("2", "4", "6", "8", "10")]
        assert forms == NUMERALS[stem["plain"]].split()
    assert {stem["plain"] for stem in words.data["numerals"]} == set(NUMERALS)


def test_classes_1a_and_2a_agree_as_1_and_2(words):
    for text, noun_class in (("uthisha", "1"), ("othisha", "2")):
        it = noun(text)
        assert (it.noun_class, it.has_short_prefix) == (noun_class, True)


def test_nouns_carry_the_prefix_of_their_class(words):
    for it in words.nouns:
        prefix = PREFIXES[it.noun_class + "a" * it.has_short_prefix]
        assert it.text.startswith(prefix), it
        assert it.is_plural == (it.noun_class in ("2", "4", "6", "8", "10"))
    assert {PREFIXES[it.noun_class + "a" * it.has_short_prefix] for it in words.nouns} == set(PREFIXES.values())


def test_no_noun_stands_twice(words):
    assert [text for text, count in Counter(noun.text for noun in words.nouns).items() if count > 1] == []


def test_verbs_form_their_perfect_and_their_passive(words):
    assert words.perfect("hamb") == "hambile"
    assert words.perfect("nyamalal") == "nyamalele"
    assert [words.passive(root) + "a" for root in ("fund", "khumbul", "sebenzis", "bon")] == [
        "fundwa", "khunjulwa", "setshenziswa", "bonwa",
    ]  # fmt: skip


def test_roots_begin_and_end_as_the_rules_expect(words):
    """A root of one consonant, or one that begins with a vowel, would need other concords."""
    data = words.data
    roots = [root for table in ("intransitive", "transitive") for group in data[table] for root in group["roots"]]
    roots += [*data["activities"]["roots"], *data["together"]["person"], *data["together"]["thing"]]
    roots += data["places"]["object_roots"]
    assert [root for root in roots if not re.fullmatch(r"[^aeiou]+[aeiou].*[^aeiou]", root)] == []


def test_every_tag_is_one_that_a_noun_has(words):
    data = words.data
    tags = {noun.tag for noun in words.nouns}
    named = [group["subjects"] for group in data["intransitive"]] + [group["objects"] for group in data["transitive"]]
    named += [group["nouns"] for table in ("adjectives", "relatives") for group in data[table]]
    assert {tag for group in named for tag in group} <= tags
    assert all(words.verbs(noun) and words.transitive(noun) and words.stems("adjectives", noun) for noun in words.nouns)


def test_the_toml_says_what_each_key_is():
    text = files("ulimi").joinpath("grammar.toml").read_text(encoding="utf-8")
    for key in tomllib.loads(text)["classes"]["1"]:
        assert re.search(rf"^#.*\b{key}\b", text, re.M), key


# Pairs


def test_there_are_many_phenomena():
    assert len(phenomena()) >= 14
    assert len(set(phenomena())) == len(phenomena())


@pytest.mark.parametrize("name", phenomena())
def test_a_phenomenon_has_many_distinct_pairs_that_differ_in_one_marker(all_pairs, name):
    found = all_pairs[name]
    assert len(set(found)) == len(found) == 200
    goods, bads = {pair.good for pair in found}, {pair.bad for pair in found}
    assert not goods & bads
    for pair in found:
        assert pair.phenomenon == name
        good, bad = marker(pair)
        assert good != bad
        for sentence in (pair.good, pair.bad):
            assert re.fullmatch(r"[A-Z][A-Za-z ,]+\.", sentence), sentence
            assert "  " not in sentence


@pytest.mark.parametrize("name", phenomena())
def test_markers_are_right_as_often_as_wrong(all_pairs, name):
    """So that no preference for a marker, for a length or for a letter can be right more often than not."""
    found = all_pairs[name]
    assert Counter(marker(pair)[0] for pair in found) == Counter(marker(pair)[1] for pair in found)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert marker(first) == marker(second)[::-1]
        assert first.mirrors(second)
        assert not first.mirrors(first)
    longer = sum(len(pair.good) > len(pair.bad) for pair in found)
    shorter = sum(len(pair.good) < len(pair.bad) for pair in found)
    assert longer == shorter


@pytest.mark.parametrize("name", phenomena())
def test_no_marker_makes_up_most_of_a_phenomenon_of_agreement(all_pairs, name):
    counts = Counter(marker(pair)[0] for pair in all_pairs[name])
    two_way = {
        "negative-final", "negative-perfect", "subjunctive", "participial", "conjoint", "relative-suffix", "copulative",
        "coalescence", "locative-vowel",
    }  # fmt: skip
    if name in two_way:
        assert sorted(counts.values()) == [100, 100]
    elif name == "passive":  # with and without its -w-, and the roots that change
        assert counts["w"] == counts[""] < 100
    else:
        assert max(counts.values()) <= 200 / 3
        assert len(counts) >= 4


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others():
    assert pairs("adjective", 50, seed=3) == pairs("adjective", 50, seed=3)
    assert pairs("adjective", 50, seed=3) != pairs("adjective", 50, seed=4)
    assert pairs("adjective", 20, seed=3) == pairs("adjective", 50, seed=3)[:20]
    assert len(pairs("adjective", 7)) == 7


def test_the_first_pairs_stay_what_they_are():
    """Figures are compared between models and over time: a change of the pairs must be meant."""
    first = [pairs(name, 2)[0] for name in ("subject-present", "possessive", "locative-vowel")]
    assert [(pair.good, pair.bad) for pair in first] == [
        ("Umfula uyakhula.", "Umfula iyakhula."),
        ("Ngibona isitshalo sezisebenzi.", "Ngibona isitshalo ezisebenzi."),
        ("Iphoyisa livela emgwaqweni.", "Iphoyisa livela emgwaqwini."),
    ]


@pytest.mark.parametrize("name", phenomena())
def test_all_classes_that_can_take_part_do(name):
    found = pairs(name, 600)
    forms = {"demonstrative": lambda text: text[1:], "coalescence": with_na}.get(name, str)
    by_text = {forms(noun.text): noun.noun_class for noun in lexicon().nouns}
    seen = {by_text[word.lower()] for pair in found for word in tokens(pair.good) if word.lower() in by_text}
    people = {"1", "2", "5", "6", "7", "8", "9", "10"}
    expected = {
        "numeral": {"2", "4", "6", "8", "10"},
        "adjective-predicate": set(CLASSES) - {"15"},
        "possessive": set(CLASSES) - {"15"},
        "quantifier-all": set(CLASSES) - {"6", "15"},
        "quantifier-alone": set(CLASSES) - {"6", "15"},
        "subject-across-possessor": people | {"3", "4"},
        "subject-across-relative": people | {"11"},
        "subjunctive": people | {"11"},
        "relative-suffix": people - {"6"} | {"11"},
        "negative-final": people - {"2"},
        "negative-perfect": people - {"2"},
        "conjoint": people - {"2", "6"},
        "participial": {"1", "9"},  # 9: imoto iyafika
        "coalescence": {"1", "3", "4", "7", "8", "10"},
        "copulative": set(CLASSES),
        "locative-case": people | {"3", "11"},
        "locative-vowel": people,
    }.get(name, set(CLASSES))
    assert seen == expected


def with_na(text: str) -> str:
    return "n" + {"u": "o", "i": "e", "a": "a", "o": "o"}[text[0]] + text[1:]


def class_of(word: str) -> str:
    return next(noun.noun_class for noun in lexicon().nouns if noun.text == word.lower())


@pytest.mark.parametrize(("name", "kind", "rest"), [
    ("subject-present", "subject", "yahamba"),
    ("subject-future", "subject", "yahamba"),
    ("subject-negative", "negative", "hambi"),
    ("subject-remote-past", "remote", "hamba"),
])  # fmt: skip
def test_the_right_concord_is_that_of_the_noun_before_it(all_pairs, name, kind, rest):
    """Read the sentence back, with the tables typed here: the word before the verb is the subject."""
    for pair in all_pairs[name]:
        word = tokens(pair.good).index(
            next(w for w, v in zip(tokens(pair.good), tokens(pair.bad), strict=True) if w != v)
        )
        subject = class_of(tokens(pair.good)[word - 1])
        concord = VERBS[kind, rest][subject].removesuffix(rest)
        good, bad = changed(pair)
        assert good.startswith(concord)
        other = [VERBS[kind, rest][name].removesuffix(rest) for name in CLASSES]
        verb = good[len(concord) :]
        assert bad in {wrong + verb for wrong in other} - {concord + verb}


def test_the_wrong_concord_is_that_of_the_noun_beside_the_verb(all_pairs):
    tables = VERBS["subject", "yahamba"]
    for pair in all_pairs["subject-across-relative"]:
        *_, head, _relative, attractor, _verb = tokens(pair.good)
        good, bad = changed(pair)
        assert good.startswith(tables[class_of(head)].removesuffix("hamba"))
        assert bad.startswith(tables[class_of(attractor)].removesuffix("hamba"))


def test_people_are_not_judged_wrong_where_they_may_agree_as_people(all_pairs):
    """Amaphoyisa bayahamba, abantu siyahamba: heard, so no pair may call it wrong."""
    people = {noun.text: noun for noun in lexicon().nouns if noun.tag == "person"}
    checked = 0
    for pair in all_pairs["subject-present"]:
        subject = people.get(tokens(pair.good)[-2].lower())
        if subject is None:
            continue
        checked += 1
        _, bad = changed(pair)
        if subject.noun_class not in ("1", "2"):
            assert not re.match("u|ba", bad), pair
        if subject.is_plural:
            assert not bad.startswith("si"), pair
    assert checked > 20


def test_a_marker_is_excluded_by_its_spelling(words):
    def concord(it: Noun) -> str:
        return words.concord("subject", it)

    ingane, amadoda, umfana, umuthi = (noun(text) for text in ("ingane", "amadoda", "umfana", "umuthi"))
    isikole, abafana = noun("isikole"), noun("abafana")
    assert not grammar._excludes(ingane, umuthi, concord)  # u- is also that of class 1
    assert not grammar._excludes(amadoda, isikole, concord)  # si- is also "we"
    assert not grammar._excludes(abafana, isikole, concord)
    assert not grammar._excludes(umfana, umuthi, concord)  # the same
    assert grammar._excludes(umfana, abafana, concord)
    assert grammar._excludes(ingane, isikole, concord)
    assert grammar._excludes(noun("inja"), umuthi, concord)
    assert not grammar._excludes(replace(ingane, noun_class="9"), replace(umuthi, noun_class="1"), concord)


def test_forms_that_are_also_another_word_do_not_occur(all_pairs):
    everything = {word for found in all_pairs.values() for pair in found for word in tokens(pair.bad + pair.good)}
    assert not {"kodwa", "konke", "kuhle", "kude", "odwa", "onke"} & everything
    # Lo mfana, le ngane: written as one word a possessive would look like them.
    bad = {changed(pair)[1] for pair in all_pairs["possessive"]}
    assert not [word for word in bad if re.match("lo|le|kwa|ko", word)]
    # Ngabafana is also "by means of the boys".
    assert not [word for pair in all_pairs["passive"] for word in tokens(pair.bad) if re.match("ng[ao]", word)]
    # In the present a class 2 subject with a final -a after aba- is a relative clause.
    assert not [word for pair in all_pairs["negative-final"] for word in changed(pair) if word.startswith("aba")]


def test_the_short_present_stands_before_a_question_word_and_the_long_one_at_the_end(all_pairs):
    for pair in all_pairs["conjoint"]:
        good, bad = changed(pair)
        last = tokens(pair.good)[-1]
        if last in ("kuphi", "nini", "kanjani", "nobani"):
            assert len(good) + 2 == len(bad)
        else:
            assert last == good
            assert len(good) == len(bad) + 2


def test_an_unknown_phenomenon_is_refused_with_those_that_are_known():
    with pytest.raises(UlimiError, match=r"phenomenon is 'adjectiv'; allowed: .*numeral.*did you mean 'adjective'"):
        pairs("adjectiv")
    with pytest.raises(UlimiError, match="num is 0; allowed: 1 or more"):
        pairs("adjective", 0)


def test_more_pairs_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr("ulimi.grammar.FRUITLESS_DRAWS", 3)
    with pytest.raises(UlimiError, match=r"num is 9000; coalescence has about [0-9]+ pairs"):
        pairs("coalescence", 9000)


def test_a_sentence_begins_with_a_capital_also_where_the_marker_stands_first():
    assert grammar.Couple("{}ya", "{}", "u", "i").pairs("x") == (Pair("x", "Uya.", "Iya."), Pair("x", "I.", "U."))


def test_every_draw_is_a_couple_of_two_markers():
    for name, rule in grammar.PHENOMENA.items():
        rng = Random(1)
        couples = [rule(lexicon(), rng) for _ in range(300)]
        made = [couple for couple in couples if couple is not None]
        assert made, name
        assert all(couple.first != couple.second for couple in made), name


def test_the_document_explains_every_phenomenon():
    text = (Path(__file__).parent.parent / "docs" / "grammar.md").read_text(encoding="utf-8")
    assert re.findall(r"^- `([a-z-]+)`: ", text, re.M) == phenomena()
    assert f"each of the {len(phenomena())} phenomena" in text
