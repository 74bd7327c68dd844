"""Minimal pairs of isiZulu: a correct sentence and the same one with one wrong marker, from a lexicon and rules.

Lexicon and concords stand in grammar.toml, where a speaker can correct them; here are the rules that join them:
coalescence of vowels, nasal adjectives, who may do what, and which wrong markers are wrong on every reading.

Pairs come in mirrored couples, a two-by-two design: two contexts, two markers, each right in one and wrong in the other
("Abafana bayahamba / *uyahamba", "Umfana uyahamba / *bayahamba"). So a model that likes one marker, or one length,
whatever the context, is right exactly half the time.

Written after C. M. Doke, Textbook of Zulu Grammar; G. Poulos and C. T. Msimang, A Linguistic Analysis of Zulu;
N. N. Canonici, Zulu Grammatical Structure; for the conjoint and disjoint present L. Buell, Issues in Zulu Verbal
Morphosyntax. No native speaker has checked it; docs/grammar.md says what is known to be doubtful.

Light floor: this module knows no model and no files but its own.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

from ulimi.errors import UlimiError, nearest

FRUITLESS_DRAWS = 10_000
"""one after the other, after which a phenomenon is said to have no more pairs"""

HUMAN_CLASSES = ("1", "2")
MEDIALS = {"a": "a", "i": "e", "u": "o", "o": "o"}
"""what a + this vowel becomes"""


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in one marker."""

    phenomenon: str
    good: str
    bad: str

    @property
    def markers(self) -> tuple[str, str]:
        """What differs, right and wrong, without what both begin and end with."""
        start = _common_start(self.good, self.bad)
        good, bad = self.good[start:].lower(), self.bad[start:].lower()
        end = _common_start(good[::-1], bad[::-1])
        return good[: len(good) - end], bad[: len(bad) - end]

    def mirrors(self, other: "Pair") -> bool:
        """Tell whether the other pair is this one's mirror image: its markers are these, the other way round."""
        return self.phenomenon == other.phenomenon and self.markers == other.markers[::-1]


@dataclass(frozen=True)
class Noun:
    """One form of a noun, singular or plural."""

    text: str
    noun_class: str
    """"1" to "15", also where the prefix is that of 1a or 2a"""
    has_short_prefix: bool
    """class 1a or 2a"""
    is_plural: bool
    tag: str
    locative: str


@dataclass(frozen=True)
class Couple:
    """Two contexts, each with a place for a marker, "{}": `first` is right in `context`, `second` in `mirror`."""

    context: str
    mirror: str
    first: str
    second: str

    def pairs(self, phenomenon: str) -> tuple[Pair, Pair]:
        """Write out the two pairs."""
        return (
            Pair(phenomenon, _sentence(self.context, self.first), _sentence(self.context, self.second)),
            Pair(phenomenon, _sentence(self.mirror, self.second), _sentence(self.mirror, self.first)),
        )


class Lexicon:
    """What grammar.toml holds, and the word forms that follow from it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.classes: dict[str, dict[str, Any]] = data["classes"]
        self.openers: dict[str, list[str]] = data["openers"]
        self.nouns = [
            noun for group in data["nouns"] for forms in group["forms"] for noun in _read_forms(forms, group["tags"][0])
        ]

    def concord(self, kind: str, noun: Noun) -> str:
        """Give the concord of a noun's class, as grammar.toml names them."""
        return str(self.classes[noun.noun_class][kind])

    def adjective(self, noun: Noun, stem: dict[str, Any], kind: str = "adjective") -> str:
        """Join an adjective's stem with its concord; kind is "adjective" or "predicate"."""
        concord = self.concord(kind + "_short" if stem.get("short") else kind, noun)
        return concord + str(stem["nasal" if self.classes[noun.noun_class].get("nasal") else "plain"])

    def possessive(self, noun: Noun, possessor: Noun) -> str:
        """Give "of the possessor", agreeing with the noun: wa + umfana = womfana, lwa + umfana = lomfana."""
        concord = self.concord("possessive", noun)[:-1]
        vowel = MEDIALS[possessor.text[0]]
        if vowel == "o" and len(concord) > 1:
            concord = concord.removesuffix("w")
        return concord + vowel + possessor.text[1:]

    def with_pronoun(self, noun: Noun) -> str:
        """Give "with it": na + yena = naye."""
        return "na" + self.concord("pronoun", noun).removesuffix("na")

    def verbs(self, *subjects: Noun) -> list[str]:
        """Give the roots of verbs without an object that all these nouns can do."""
        return [
            root
            for group in self.data["intransitive"]
            if all(noun.tag in group["subjects"] for noun in subjects)
            for root in group["roots"]
        ]

    def perfect(self, root: str) -> str:
        """Give the long perfect, final vowel included."""
        for group in self.data["intransitive"]:
            if root in group.get("perfect", {}):
                return str(group["perfect"][root])
        return root + "ile"

    def transitive(self, *objects: Noun) -> list[str]:
        """Give the roots of verbs that take all these nouns as objects."""
        return [
            root
            for group in self.data["transitive"]
            if all(noun.tag in group["objects"] for noun in objects)
            for root in group["roots"]
        ]

    def passive(self, root: str) -> str:
        """Give the passive root."""
        for group in self.data["transitive"]:
            if root in group.get("passive", {}):
                return str(group["passive"][root])
        return root + "w"

    def stems(self, table: str, *nouns: Noun) -> list[Any]:
        """Give the stems of "adjectives" or "relatives" that suit all these nouns."""
        return [
            stem
            for group in self.data[table]
            if all(noun.tag in group["nouns"] for noun in nouns)
            for stem in group["stems"]
        ]


@cache
def lexicon() -> Lexicon:
    """Read grammar.toml, once."""
    return Lexicon(tomllib.loads(files("ulimi").joinpath("grammar.toml").read_text(encoding="utf-8")))


def phenomena() -> list[str]:
    """Name what can be asked for, in order."""
    return list(PHENOMENA)


def check_phenomenon(name: str) -> None:
    """Raise UlimiError for an unknown phenomenon."""
    if name not in PHENOMENA:
        raise UlimiError(f"phenomenon is {name!r}; allowed: {', '.join(PHENOMENA)}{nearest(name, PHENOMENA)}")


def pairs(phenomenon: str, num: int = 200, seed: int = 0) -> list[Pair]:
    """Write distinct pairs of one phenomenon, each next to its mirror image; the same seed gives the same pairs.

    Args:
        phenomenon: one of `phenomena()`.
        num: how many; an odd number leaves the last one without its mirror image.
        seed: of the choice.

    Raises:
        UlimiError: the phenomenon is unknown, or has no so many pairs.
    """
    check_phenomenon(phenomenon)
    if num < 1:
        raise UlimiError(f"num is {num}; allowed: 1 or more")
    rng = Random(f"{phenomenon} {seed}")
    draw = PHENOMENA[phenomenon]
    found: dict[Pair, None] = {}
    fruitless = 0
    while fruitless < FRUITLESS_DRAWS:
        fruitless += 1
        couple = draw(lexicon(), rng)
        if couple is None or couple.first == couple.second:
            continue
        both = couple.pairs(phenomenon)
        if not any(pair in found for pair in both):
            found.update(dict.fromkeys(both))
            fruitless = 0
        if len(found) >= num:
            return list(found)[:num]
    raise UlimiError(f"num is {num}; {phenomenon} has about {len(found)} pairs")


# Building blocks


def _common_start(one: str, other: str) -> int:
    alike = (a == b for a, b in zip(one, other, strict=False))
    return next((place for place, same in enumerate(alike) if not same), min(len(one), len(other)))


def _read_forms(forms: dict[str, str], tag: str) -> list[Noun]:
    locative = forms.get("locative", "")
    named = [(name, text) for name, text in forms.items() if name != "locative"]
    return [
        Noun(
            text=text,
            noun_class=name.removesuffix("a"),
            has_short_prefix=name.endswith("a"),
            is_plural=name in ("2", "2a", "4", "6", "8", "10"),
            tag=tag,
            locative="" if place else locative,
        )
        for place, (name, text) in enumerate(named)
    ]


def _sentence(context: str, marker: str) -> str:
    text = context.format(marker)
    return text[0].upper() + text[1:] + "."


def _of(words: Lexicon, *tags: str) -> list[Noun]:
    return [noun for noun in words.nouns if noun.tag in tags]


def _draw(rng: Random, nouns: Sequence[Noun]) -> Noun:
    """Choose a class, then a noun of it, so that rich classes do not crowd out the others."""
    wanted = rng.choice(sorted({noun.noun_class for noun in nouns}))
    return rng.choice([noun for noun in nouns if noun.noun_class == wanted])


def _excludes(noun: Noun, other: Noun, form: Callable[[Noun], str]) -> bool:
    """Tell whether the other noun's marker is wrong with this noun on every reading.

    People may take the concords of classes 1 and 2 whatever their own class, and a plural of people may go with si-,
    "we". What counts is how a marker is spelt: u- is that of class 3 too.
    """
    if noun.tag != "person" or form(noun) == form(other):
        return form(noun) != form(other)
    allowed = [] if noun.noun_class in HUMAN_CLASSES else [*HUMAN_CLASSES]
    if noun.is_plural:
        allowed.append("7")
    return form(other) not in [form(replace(other, noun_class=name)) for name in allowed]


def _draw_two(rng: Random, nouns: Sequence[Noun], form: Callable[[Noun], str]) -> tuple[Noun, Noun] | None:
    """Draw two nouns whose markers differ, each marker wrong with the other noun."""
    first, second = _draw(rng, nouns), _draw(rng, nouns)
    if not _excludes(first, second, form) or not _excludes(second, first, form):
        return None
    return first, second


def _subject(words: Lexicon, rng: Random, concord: str, opener: str, tense: Callable[[str], str]) -> Couple | None:
    """Agree a verb with the subject before it; `tense` gives the rest of the verb, after the concord."""
    two = _draw_two(rng, words.nouns, lambda noun: words.concord(concord, noun))
    roots = words.verbs(*two) if two else []
    # Aka- is also heard in class 6.
    if not two or not roots or (concord == "negative" and {noun.noun_class for noun in two} == {"1", "6"}):
        return None
    start, end = rng.choice(words.openers[opener]), tense(rng.choice(roots))
    return Couple(
        f"{start}{two[0].text} {{}}{end}", f"{start}{two[1].text} {{}}{end}",
        words.concord(concord, two[0]), words.concord(concord, two[1]),
    )  # fmt: skip


def _within_object(
    rng: Random, words: Lexicon, two: tuple[Noun, Noun] | None, form: Callable[[Noun], str], before: bool = False
) -> Couple | None:
    """Put a word that agrees with an object after it, or before it."""
    if not two:
        return None
    frame = rng.choice(words.openers["object"])
    first, second = (frame.format(f"{{}} {n.text}" if before else f"{n.text} {{}}") for n in two)
    return Couple(first, second, form(two[0]), form(two[1]))


def _copulative(noun: Noun) -> str:
    return "y" if noun.text[0] == "i" else "ng"


# Agreement of the verb with its subject


def subject_present(words: Lexicon, rng: Random) -> Couple | None:
    """Abafana bayahamba / *uyahamba."""
    return _subject(words, rng, "subject", "present", lambda root: f"ya{root}a")


def subject_future(words: Lexicon, rng: Random) -> Couple | None:
    """Kusasa abafana bazohamba / *uzohamba."""
    return _subject(words, rng, "subject", "future", lambda root: f"zo{root}a")


def subject_perfect(words: Lexicon, rng: Random) -> Couple | None:
    """Abafana bahambile / *uhambile."""
    return _subject(words, rng, "subject", "perfect", words.perfect)


def subject_remote_past(words: Lexicon, rng: Random) -> Couple | None:
    """Kudala umfana wahamba / *yahamba."""
    return _subject(words, rng, "remote", "remote", lambda root: f"{root}a")


def subject_negative(words: Lexicon, rng: Random) -> Couple | None:
    """Umfana akahambi / *ayihambi."""
    return _subject(words, rng, "negative", "present", lambda root: f"{root}i")


def subject_across_possessor(words: Lexicon, rng: Random) -> Couple | None:
    """Abazali bengane bayahamba / *iyahamba: the wrong concord is that of the possessor beside the verb."""
    heads = _of(words, "person", "animal", "thing", "text")
    possessors = [noun for noun in _of(words, "person") if not noun.has_short_prefix or noun.is_plural]

    def concord(noun: Noun) -> str:
        return words.concord("subject", noun)

    head, mirror_head = _draw(rng, heads), _draw(rng, heads)
    possessor, mirror_possessor = _draw(rng, possessors), _draw(rng, possessors)
    first, second = concord(head), concord(mirror_head)
    if first == second or concord(possessor) != second or concord(mirror_possessor) != first:
        return None
    if not (_excludes(head, possessor, concord) and _excludes(mirror_head, mirror_possessor, concord)):
        return None
    phrases = [
        f"{noun.text} {words.possessive(noun, other)}"
        for noun, other in ((head, possessor), (mirror_head, mirror_possessor))
    ]
    roots = words.verbs(head, mirror_head)
    # Class 6 before a-: amabhuku + abafana looks like two nouns.
    if not roots or possessor.text in phrases[0].split() or mirror_possessor.text in phrases[1].split():
        return None
    start, root = rng.choice(words.openers["present"]), rng.choice(roots)
    return Couple(f"{start}{phrases[0]} {{}}ya{root}a", f"{start}{phrases[1]} {{}}ya{root}a", first, second)


def subject_across_relative(words: Lexicon, rng: Random) -> Couple | None:
    """Abafana abathanda inja bayahamba / *iyahamba: the wrong concord is that of the object beside the verb."""
    two = _draw_two(rng, _of(words, "person", "animal"), lambda noun: words.concord("subject", noun))
    if not two:
        return None
    start, root, inner = (
        rng.choice(words.openers["present"]), rng.choice(words.verbs(*two)), rng.choice(words.transitive(*two)),
    )  # fmt: skip
    first, second = (
        f"{start}{noun.text} {words.concord('relative', noun)}{inner}a {other.text} {{}}ya{root}a"
        for noun, other in (two, two[::-1])
    )
    return Couple(first, second, words.concord("subject", two[0]), words.concord("subject", two[1]))


# Agreement of the verb with its object


def object_topic(words: Lexicon, rng: Random) -> Couple | None:
    """Incwadi ngiyayifunda / *ngiyazifunda."""
    return _object(words, rng, topic=True)


def object_afterthought(words: Lexicon, rng: Random) -> Couple | None:
    """Ngiyayifunda incwadi / *Ngiyazifunda incwadi."""
    return _object(words, rng, topic=False)


def _object(words: Lexicon, rng: Random, topic: bool) -> Couple | None:
    two = _draw_two(rng, words.nouns, lambda noun: words.concord("object", noun))
    if not two:
        return None
    # Not si-: people in the plural and "we" go together (abafana siyambona).
    verb = f"ngi{rng.choice(['ya', 'zo'])}{{}}{rng.choice(words.transitive(*two))}a"
    first, second = (f"{noun.text} {verb}" if topic else f"{verb} {noun.text}" for noun in two)
    return Couple(first, second, words.concord("object", two[0]), words.concord("object", two[1]))


def pronoun_with(words: Lexicon, rng: Random) -> Couple | None:
    """Umfana ngikhuluma naye / *nabo."""
    tags, key = rng.choice([(("person",), "person"), (("thing", "text", "food", "animal"), "thing")])
    two = _draw_two(rng, _of(words, *tags), words.with_pronoun)
    if not two:
        return None
    verb = f"{rng.choice(['ngi', 'ngizo'])}{rng.choice(words.data['together'][key])}a {{}}"
    return Couple(
        f"{two[0].text} {verb}", f"{two[1].text} {verb}", words.with_pronoun(two[0]), words.with_pronoun(two[1])
    )


# Agreement within a noun phrase


def possessive(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona isikole sabantwana / *zabantwana."""
    possessors = [noun for noun in _of(words, "person") if not noun.has_short_prefix or noun.is_plural]
    possessor = _draw(rng, possessors)

    def form(noun: Noun) -> str:
        return words.possessive(noun, possessor)

    two = _draw_two(rng, words.nouns, form)
    # As two words "this": lo mfana, le ngane; kwa- is also "at"; and amabhuku + abafana looks like two nouns.
    if not two or any(form(noun).startswith(("lo", "le", "k")) or form(noun) == possessor.text for noun in two):
        return None
    return _within_object(rng, words, two, form)


def possessive_of_name(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona isikole sikaSipho / *zikaSipho."""
    relatives = [noun.text[1:] for noun in _of(words, "person") if noun.has_short_prefix and not noun.is_plural]
    name = str(rng.choice([*words.data["names"], *relatives]))

    def form(noun: Noun) -> str:
        return words.concord("ka", noun) + name

    return _within_object(rng, words, _draw_two(rng, words.nouns, form), form)


def adjective(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona umfana omude / *abade."""
    two = _draw_two(rng, words.nouns, lambda noun: words.concord("adjective", noun) + _nasal(words, noun))
    stems = words.stems("adjectives", *two) if two else []
    if not stems:
        return None
    stem = rng.choice(stems)
    return _within_object(rng, words, two, lambda noun: words.adjective(noun, stem))


def adjective_predicate(words: Lexicon, rng: Random) -> Couple | None:
    """Siyabona ukuthi umfana mude / *bade."""
    # Kuhle, kubi, kude are also "it is good", "it is bad", "far".
    nouns = [noun for noun in words.nouns if noun.noun_class != "15"]
    two = _draw_two(rng, nouns, lambda noun: words.concord("predicate", noun) + _nasal(words, noun))
    stems = words.stems("adjectives", *two) if two else []
    if not two or not stems:
        return None
    start, stem = rng.choice(words.openers["present"]), rng.choice(stems)
    forms = [words.adjective(noun, stem, "predicate") for noun in two]
    return Couple(f"{start}{two[0].text} {{}}", f"{start}{two[1].text} {{}}", *forms)


def _nasal(words: Lexicon, noun: Noun) -> str:
    return "n" if words.classes[noun.noun_class].get("nasal") else ""


def numeral(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona abafana ababili / *amabili."""
    stem = rng.choice(words.data["numerals"])

    def form(noun: Noun) -> str:
        return words.adjective(noun, stem)

    plurals = [noun for noun in words.nouns if noun.is_plural]
    return _within_object(rng, words, _draw_two(rng, plurals, form), form)


def relative(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona umfana oqotho / *abaqotho."""
    two = _draw_two(rng, words.nouns, lambda noun: words.concord("relative", noun))
    stems = words.stems("relatives", *two) if two else []
    if not stems:
        return None
    stem = rng.choice(stems)
    return _within_object(rng, words, two, lambda noun: words.concord("relative", noun) + str(stem))


def relative_verb(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona umfana ogijimayo / *abagijimayo."""
    two = _draw_two(rng, words.nouns, lambda noun: words.concord("relative", noun))
    roots = words.verbs(*two) if two else []
    if not roots:
        return None
    root = rng.choice(roots)
    return _within_object(rng, words, two, lambda noun: f"{words.concord('relative', noun)}{root}ayo")


def demonstrative(words: Lexicon, rng: Random) -> Couple | None:
    """Lo mfana uyahamba / *Leli mfana uyahamba: as a subject, since a noun without augment is a vocative too."""
    distance = rng.randrange(3)

    def form(noun: Noun) -> str:
        return str(words.classes[noun.noun_class]["demonstrative"][distance])

    two = _draw_two(rng, [noun for noun in words.nouns if not noun.has_short_prefix], form)
    roots = words.verbs(*two) if two else []
    if not two or not roots:
        return None
    start, root = rng.choice(words.openers["present"]), rng.choice(roots)
    first, second = (
        f"{start}{{}} {noun.text[1:]} {words.concord('subject', noun)}ya{root}a" for noun in two
    )  # fmt: skip
    return Couple(first, second, form(two[0]), form(two[1]))


def quantifier_all(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona bonke abafana / *zonke abafana."""

    def form(noun: Noun) -> str:
        return words.concord("all", noun)

    two = _draw_two(rng, [noun for noun in words.nouns if form(noun)], form)
    return _within_object(rng, words, two, form, before=rng.random() < 0.5)


def quantifier_alone(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona umfana yedwa / *zodwa."""

    def form(noun: Noun) -> str:
        return words.concord("alone", noun)

    two = _draw_two(rng, [noun for noun in words.nouns if form(noun)], form)
    return _within_object(rng, words, two, form)


# Forms of the verb


def negative_final(words: Lexicon, rng: Random) -> Couple | None:
    """Umfana akadlali ekhaya / *akadlala; umfana udlala ekhaya / *udlali."""
    # After "that": alone, azicula ekhaya could be a relative, "whom he sings of at home".
    noun, start = _draw(rng, _unlike_relative(words)), rng.choice(words.openers["fact"])
    root, adjunct = (rng.choice(words.data["activities"][key]) for key in ("roots", "adjuncts"))
    first, second = (
        f"{start}{noun.text} {words.concord(kind, noun)}{root}{{}} {adjunct}" for kind in ("negative", "subject")
    )
    return Couple(first, second, "i", "a")


def negative_perfect(words: Lexicon, rng: Random) -> Couple | None:
    """Izolo umfana akafundanga / *akafunda; umfana uyafunda / *uyafundanga."""
    noun = _draw(rng, _unlike_relative(words))
    root = rng.choice(words.verbs(noun))
    past, present = rng.choice(words.openers["past"]), rng.choice(words.openers["present"])
    return Couple(
        f"{past}{noun.text} {words.concord('negative', noun)}{root}{{}}",
        f"{present}{noun.text} {words.concord('subject', noun)}ya{root}{{}}",
        "anga", "a",
    )  # fmt: skip


def _unlike_relative(words: Lexicon) -> list[Noun]:
    """Leave out class 2, where "aba-" with a final -a is "who" and not a broken negative."""
    return [noun for noun in _of(words, "person") if words.concord("negative", noun) != words.concord("relative", noun)]


def subjunctive(words: Lexicon, rng: Random) -> Couple | None:
    """Ngifuna ukuthi abafana bahambe / *bahamba; ngiyazi ukuthi abafana bayahamba / *bayahambe."""
    noun = _draw(rng, _of(words, "person", "animal"))
    root = rng.choice(words.verbs(noun))
    wish, fact = rng.choice(words.openers["wish"]), rng.choice(words.openers["fact"])
    return Couple(
        f"{wish}{noun.text} {words.concord('subjunctive', noun)}{root}{{}}",
        f"{fact}{noun.text} {words.concord('subject', noun)}ya{root}{{}}",
        "e", "a",
    )  # fmt: skip


def participial(words: Lexicon, rng: Random) -> Couple | None:
    """Uma umfana edlala ekhaya, … / *udlala; ngiyazi ukuthi umfana udlala ekhaya / *edlala."""
    # Class 1 alone: elsewhere the two are the same, or, in classes 2 and 6, the indicative is also a remote past.
    noun = _draw(rng, [noun for noun in _of(words, "person") if noun.noun_class == "1"])
    root, adjunct = (rng.choice(words.data["activities"][key]) for key in ("roots", "adjuncts"))
    clause = f"{noun.text} {{}}{root}a {adjunct}"
    start, end, fact = (rng.choice(words.openers[key]) for key in ("while", "after_while", "fact"))
    return Couple(
        f"{start}{clause}, {end}", f"{fact}{clause}", words.concord("participial", noun), words.concord("subject", noun)
    )


def conjoint(words: Lexicon, rng: Random) -> Couple | None:
    """Angazi ukuthi umfana udlala kuphi / *uyadlala kuphi; ngiyazi ukuthi umfana uyadlala / *udlala."""
    # Where the remote past is spelt like the short present, the latter may end a sentence.
    nouns = [noun for noun in _of(words, "person") if words.concord("remote", noun) != words.concord("subject", noun)]
    noun = _draw(rng, nouns)
    root, question = (rng.choice(words.data["activities"][key]) for key in ("roots", "questions"))
    clause = f"{noun.text} {words.concord('subject', noun)}{{}}{root}a"
    doubt, fact = rng.choice(words.openers["doubt"]), rng.choice(words.openers["fact"])
    return Couple(f"{doubt}{clause} {question}", f"{fact}{clause}", "", "ya")


def relative_suffix(words: Lexicon, rng: Random) -> Couple | None:
    """Ngibona umfana ohambayo / *ohamba; ngiyazi ukuthi umfana uyahamba / *uyahambayo."""
    # In class 6 the verb without -yo is also a remote past.
    nouns = [
        noun
        for noun in _of(words, "person", "animal")
        if words.concord("remote", noun) != words.concord("relative", noun)
    ]
    noun = _draw(rng, nouns)
    root = rng.choice(words.verbs(noun))
    frame = rng.choice([opener for opener in words.openers["object"] if opener.endswith("{}")])
    return Couple(
        frame.format(f"{noun.text} {words.concord('relative', noun)}{root}a{{}}"),
        f"{rng.choice(words.openers['fact'])}{noun.text} {words.concord('subject', noun)}ya{root}a{{}}",
        "yo", "",
    )  # fmt: skip


def passive(words: Lexicon, rng: Random) -> Couple | None:
    """Incwadi ifundwa yingane / *ifunda yingane; incwadi ingane iyayifunda / *iyayifundwa."""
    # Ngabafana, ngothisha are also "by means of": an agent in a- or o- would leave the active a reading.
    agents = [noun for noun in _of(words, "person") if noun.text[0] in "ui"]
    agent, patient = _draw(rng, agents), _draw(rng, words.nouns)
    root, start = rng.choice(words.transitive(patient)), rng.choice(words.openers["present"])
    # In the mirror the object is a topic: after the verb it could be an agent whose ng- or y- is left out.
    verb = f"{words.concord('subject', agent)}ya{words.concord('object', patient)}"
    return Couple(
        f"{start}{patient.text} {words.concord('subject', patient)}{{}} {_copulative(agent)}{agent.text}",
        f"{start}{patient.text} {agent.text} {verb}{{}}",
        f"{words.passive(root)}a", f"{root}a",
    )  # fmt: skip


# Forms of the noun


def copulative(words: Lexicon, rng: Random) -> Couple | None:
    """Incwadi ifundwa ngumfana / *yumfana; incwadi ifundwa yingane / *ngingane."""
    # y + abafana would be a possessive: "of the boys".
    agents = _of(words, "person")
    first = _draw(rng, [noun for noun in agents if noun.text[0] == "u"])
    second = _draw(rng, [noun for noun in agents if noun.text[0] == "i"])
    patient = _draw(rng, words.nouns)
    root, start = rng.choice(words.transitive(patient)), rng.choice(words.openers["present"])
    verb = f"{start}{patient.text} {words.concord('subject', patient)}{words.passive(root)}a {{}}"
    return Couple(verb + first.text, verb + second.text, "ng", "y")


def coalescence(words: Lexicon, rng: Random) -> Couple | None:
    """Ngihamba nomfana / *nemfana; ngihamba nezingane / *nozingane."""
    tags, key = rng.choice([(("person",), "person"), (("thing", "text", "food", "animal"), "thing")])
    # Other classes have doublets: ithisha beside uthisha.
    first, second = (
        _draw(rng, [noun for noun in _of(words, *tags) if noun.noun_class in classes and not noun.has_short_prefix])
        for classes in (("1", "3"), ("4", "7", "8", "10"))
    )
    who, root = (rng.choice(words.data["together"][part]) for part in ("who", key))
    verb = f"{who}{root}a n{{}}"
    return Couple(verb + first.text[1:], verb + second.text[1:], "o", "e")


def locative_case(words: Lexicon, rng: Random) -> Couple | None:
    """Umfana uya esikoleni / *isikole; umfana udinga isikole / *esikoleni."""
    who, place = _draw(rng, _of(words, "person")), _draw(rng, [noun for noun in words.nouns if noun.locative])
    there, it = (rng.choice(words.data["places"][key]) for key in ("locative_roots", "object_roots"))
    start = rng.choice(words.openers["present"]) + f"{who.text} {words.concord('subject', who)}"
    return Couple(f"{start}{there}a {{}}", f"{start}{it}a {{}}", place.locative, place.text)


def locative_vowel(words: Lexicon, rng: Random) -> Couple | None:
    """Umfana uya entabeni / *entabini; umfana uya elokishini / *elokisheni."""
    places = [noun.locative for noun in words.nouns if re.search("[ei]ni$", noun.locative)]
    first, second = (rng.choice([place for place in places if place.endswith(end)]) for end in ("eni", "ini"))
    who, root = _draw(rng, _of(words, "person")), rng.choice(words.data["places"]["locative_roots"])
    start = rng.choice(words.openers["present"]) + f"{who.text} {words.concord('subject', who)}{root}a "
    return Couple(f"{start}{first[:-3]}{{}}ni", f"{start}{second[:-3]}{{}}ni", "e", "i")


PHENOMENA: dict[str, Callable[[Lexicon, Random], Couple | None]] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        subject_present, subject_future, subject_perfect, subject_remote_past, subject_negative,
        subject_across_possessor, subject_across_relative, object_topic, object_afterthought, pronoun_with, possessive,
        possessive_of_name, adjective, adjective_predicate, numeral, relative, relative_verb, demonstrative,
        quantifier_all, quantifier_alone, negative_final, negative_perfect, subjunctive, participial, conjoint,
        relative_suffix, passive, copulative, coalescence, locative_case, locative_vowel,
    )
}  # fmt: skip
"""what a phenomenon is called: how one couple of it is drawn, or None where the draw came to nothing"""
