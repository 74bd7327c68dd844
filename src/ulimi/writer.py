"""From a prompt to texts, by every strategy: the one place where strings, tokens and the network come together.

A prompt may end anywhere, inside a word too: the text goes on from its letters (`ulimi.spelling`), whatever tokens they
are. Light floor.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ulimi.beam import Beams, Required, beam_search, nothing_found
from ulimi.engine import Engine
from ulimi.errors import UlimiError
from ulimi.generate import Start, Step, contrastive_search, generate, score_prompt
from ulimi.sampling import NoRepeatNgram, RepetitionPenalty, Rule, Sampling
from ulimi.spelling import TokenIndex, covers, split_prompt
from ulimi.tokenizer import Tokenizer
from ulimi.words import (
    APOSTROPHES,
    BannedWords,
    Ending,
    Word,
    WordWriter,
    begins_word,
    check_words,
    ends_word,
    group_words,
    words_in,
)

TOP_P = 0.8
"""of sampling where nothing else is asked for; docs/generation.md says why"""

CONTRASTIVE_TOP_K = 5
"""candidates of contrastive search where top_k is not given"""


def choose_sampling(engine: Engine, **asked: Any) -> Sampling:
    """Sample as was asked for; where nothing was, from the nucleus of `TOP_P`.

    A sparse model has made its own choice of tokens: it gets no nucleus, and keeps its alpha.

    Args:
        engine: the model.
        asked: fields of `Sampling`; None is as if it were not there.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    top_p = TOP_P if engine.alpha == 1 and not given else 1.0
    return Sampling(**{"alpha": engine.alpha, "top_p": top_p, **given})


@dataclass(frozen=True)
class Writing:
    """How to write: by sampling, unless beams or contrastive search are asked for.

    Raises:
        UlimiError: values that are not allowed, or not together.
    """

    sampling: Sampling = field(default_factory=Sampling)
    ending: Ending = field(default_factory=Ending)
    beams: Beams | None = None
    contrastive: float | None = None
    """penalty of contrastive search, 0 to 1"""
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    """tokens; 0 = off"""
    banned: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    """with beams only"""

    def __post_init__(self) -> None:
        if self.beams is not None and self.contrastive is not None:
            raise UlimiError("beams and contrastive search are two ways to search; choose one")
        if self.contrastive is not None and not 0 <= self.contrastive <= 1:
            raise UlimiError(f"the contrastive penalty must be 0 to 1; got {self.contrastive!r}")
        if self.required and self.beams is None:
            raise UlimiError("required words need beam search: sampling cannot know beforehand where they fit")
        if self.no_repeat_ngram < 0:
            raise UlimiError(f"no_repeat_ngram must be 0 (off) or more; got {self.no_repeat_ngram}")
        RepetitionPenalty(self.repetition_penalty)
        check_words(self.banned, "a banned word")
        check_words(self.required, "a required word")
        banned = {word.casefold() for word in self.banned}
        if both := [word for word in self.required if word.casefold() in banned]:
            raise UlimiError(f"{both[0]!r} is required and banned: choose one")


@dataclass(frozen=True)
class Prompt:
    """What a text goes on from."""

    prompt: str
    """in NFC"""
    context: list[int]
    """ids before the word that was begun"""
    begun: bytes
    """of that word; possibly none"""

    @property
    def typed(self) -> str:
        """The text of what was begun."""
        return self.begun.decode("utf-8", "replace")

    @property
    def before(self) -> str:
        """The text before what was begun."""
        return self.prompt[: len(self.prompt) - len(self.typed)]


@dataclass(frozen=True)
class Text:
    """What was written."""

    prompt: str
    """in NFC"""
    typed: str
    """the end of the prompt with which the first word begins"""
    words: tuple[Word, ...]
    score: float | None = None
    """of beam search"""

    @property
    def text(self) -> str:
        """Prompt and what was written on from it."""
        return self.prompt + self.written

    @property
    def written(self) -> str:
        """What was written, without the prompt."""
        return "".join(word.text for word in self.words)[len(self.typed) :]

    @property
    def nats(self) -> float:
        """Of all words, given the prompt."""
        return -sum(word.logprob for word in self.words)

    @property
    def num_tokens(self) -> int:
        """Of all words."""
        return sum(word.num_tokens for word in self.words)

    def as_dict(self, index: int, seed: int | None, before: Sequence[Word] | None = None) -> dict[str, Any]:
        """Give what is told of it in JSON.

        Args:
            index: its place among the texts of its prompt.
            seed: of sampling; None of a search.
            before: the words of the prompt, if the probabilities of all words are wanted.
        """
        record: dict[str, Any] = {
            "prompt": self.prompt, "text": self.text, "seed": seed, "index": index,
            "nats": self.nats if math.isfinite(self.nats) else None,  # a sparse model may rule out a token
            "num_tokens": self.num_tokens,
        }  # fmt: skip
        if self.score is not None:
            record["score"] = self.score
        if before is not None:
            record["words"] = [
                {"text": word.text, "probability": math.exp(word.logprob), "num_tokens": word.num_tokens}
                for word in [*before, *self.words]
            ]
        return record


class Writer:
    """Write texts with one model, in one way.

    Args:
        engine: the model.
        tokenizer: its tokenizer.
        writing: how.

    Raises:
        UlimiError: contrastive search on a model that has no outputs to compare; a required word that a closed
            vocabulary does not have.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, writing: Writing) -> None:
        self._engine, self._tokenizer, self._writing = engine, tokenizer, writing
        # Texts are in NFC, and so is what can be found in them.
        self._ending = replace(writing.ending, stops=tuple(map(tokenizer.normalize, writing.ending.stops)))
        self._index = TokenIndex(tokenizer)
        # They look at the whole vocabulary, and beam search alone asks for them.
        self._ends_word_V = ends_word(tokenizer) if writing.required else None
        self._begins_word_V = begins_word(tokenizer) if writing.beams is not None else None
        self._rules: list[Rule] = []
        if writing.repetition_penalty != 1:
            self._rules.append(_after_start(RepetitionPenalty(writing.repetition_penalty)))
        if writing.no_repeat_ngram:
            self._rules.append(_after_start(NoRepeatNgram(writing.no_repeat_ngram)))
        self._banned = BannedWords(tokenizer, writing.banned) if writing.banned else None
        if self._banned is not None:
            self._rules.append(self._banned)
        self._required = [self._spell(word) for word in writing.required]
        if writing.contrastive is not None:
            engine.output(engine.initial_state(1))

    def write(
        self, prompt: str, *, num: int = 1, seed: int = 0, on_word: Callable[[Word], None] | None = None
    ) -> list[Text]:
        """Write on from a prompt.

        Args:
            prompt: any text, in any Unicode normal form; it may end inside a word.
            num: texts; of a search the best ones, best first.
            seed: of sampling: the same seed gives the same texts.
            on_word: told each word of the first text as soon as it is certain, of beams at their end.

        Raises:
            UlimiError: arguments that are not allowed.
        """
        beams = self._writing.beams
        if beams is not None and num > beams.num:
            raise UlimiError(f"a beam of {beams.num} gives 1 to {beams.num} texts; got {num}")
        if self._writing.contrastive is not None and num != 1:
            raise UlimiError(f"contrastive search finds one text; got {num} to find")
        given = self.split(prompt)
        prompt, typed, context = given.prompt, given.typed, given.context
        starts = self._starts(given)

        def make() -> WordWriter:
            return WordWriter(self._tokenizer, self._ending, given.before, typed, self._may_end)

        if beams is not None:
            texts = self._search(beams, prompt, typed, context, starts, num, make)
            if on_word is not None:
                for word in texts[0].words:
                    on_word(word)
            return texts

        writers = [make() for _ in range(num)]
        words: list[list[Word]] = [[] for _ in range(num)]

        def take(row: int, word: Word) -> None:
            words[row].append(word)
            if row == 0 and on_word is not None:
                on_word(word)

        for step in self._steps(context, starts, writers, num, seed):
            for word in writers[step.row].push(step.id, step.logprob):
                take(step.row, word)
        for row, writer in enumerate(writers):
            # It was the limit that ended the text, inside a word as far as anyone can tell: words come out whole.
            for word in writer.flush(cut_off=True):
                take(row, word)
        return [Text(prompt, typed, tuple(row)) for row in words]

    def prompt_words(self, prompt: str) -> list[Word]:
        """Give the words of a prompt that are certain to be whole, each with its probability after those before it."""
        given = self.split(prompt)
        scored = [(step.id, step.logprob) for step in score_prompt(self._engine, given.context)]
        words = group_words(self._tokenizer, scored)
        before = given.before
        if not self._tokenizer.is_lossless and words and before[-1:].isspace() and not before.endswith("\n"):
            words.append(Word(" ", 0.0, 0))  # no token of a closed vocabulary holds it
        return words

    def split(self, prompt: str) -> "Prompt":
        """Read a prompt: normalise it, and part the word that was begun from what stands before it."""
        prompt = self._tokenizer.normalize(prompt)
        return Prompt(prompt, *split_prompt(self._tokenizer, prompt))

    def _starts(self, given: "Prompt") -> list[Start]:
        if not given.begun:
            return []
        logits_1V, state = self._engine.prime(given.context, self._engine.initial_state(1))
        found = covers(self._engine, self._index, state, logits_1V, given.begun)
        if not found:
            # A sparse model rules out every way to spell it: the text goes on from the tokenizer's own.
            ids = [self._tokenizer.eos_id, *self._tokenizer.encode(given.prompt)]
            _, state = self._engine.prime(ids[:-1], self._engine.initial_state(1))
            return [Start(tuple(ids[len(given.context) :]), 0.0, state)]
        if self._banned is not None and not self._tokenizer.is_lossless:
            # The first token is a whole word; those of other kinds still go on.
            allowed_V = np.zeros(self._tokenizer.vocab_size)
            self._banned(given.context, allowed_V)
            found = [cover for cover in found if allowed_V[cover.ids[0]] == 0]
            if not found:
                raise UlimiError(f"all words that the model knows to begin like {given.typed!r} are banned")
        return [Start(cover.ids, cover.logprob, cover.state) for cover in found]

    def _steps(
        self, context: list[int], starts: list[Start], writers: Sequence[WordWriter], num: int, seed: int
    ) -> Iterator[Step]:
        writing = self._writing

        def stopped(row: int, _ids: list[int]) -> bool:
            return writers[row].stopped

        if writing.contrastive is not None:
            return contrastive_search(
                self._engine, context, penalty=writing.contrastive,
                top_k=writing.sampling.top_k or CONTRASTIVE_TOP_K, max_tokens=self._ending.max_tokens,
                should_stop=stopped, rules=self._rules_for(writers[0]), starts=starts,
            )  # fmt: skip
        return generate(
            self._engine, context, sampling=writing.sampling, max_tokens=self._ending.max_tokens, num=num, seed=seed,
            should_stop=stopped, rules=lambda row: self._rules_for(writers[row]), starts=starts,
        )  # fmt: skip

    def _rules_for(self, writer: WordWriter) -> list[Rule]:
        if self._ending.at == "never":
            return self._rules

        def not_yet(_ids: Sequence[int], logits_V: Any) -> None:
            if not writer.long_enough:
                logits_V[self._tokenizer.eos_id] = -float("inf")

        return [*self._rules, not_yet]

    def _search(
        self, beams: Beams, prompt: str, typed: str, context: list[int], starts: list[Start], num: int,
        make: Callable[[], WordWriter],
    ) -> list[Text]:  # fmt: skip
        ending = self._ending

        # Every text but the first is one that was read already, and a token.
        known: dict[tuple[int, ...], WordWriter] = {(): make()}

        def read(ids: Sequence[int]) -> WordWriter:
            text = tuple(ids)
            if text not in known:
                begun = text[:-1] if text[:-1] in known else ()
                writer = known[begun].fork()
                for token in text[len(begun) :]:
                    list(writer.push(token, 0.0))
                known[text] = writer
            return known[text]

        found = beam_search(
            self._engine, context, beams, max_tokens=ending.max_tokens,
            stop_ids=() if ending.at == "never" else (self._tokenizer.eos_id,),
            should_stop=lambda ids: read(ids).stopped,
            ends_before=lambda ids: self._begins_word_V if read(ids).ends_with_this_word else None,
            rules=lambda ids: self._rules_for(read(ids)),
            required=self._required, ends_word_V=self._ends_word_V,
            line_ends=(self._tokenizer.eos_id,),
            starts=starts,
        )  # fmt: skip
        # Where the limit cuts a last word off, several hypotheses leave the same text.
        texts: dict[str, Text] = {}
        for hypothesis in found:
            writer = make()
            pairs = zip(hypothesis.ids, hypothesis.logprobs, strict=False)
            words = [word for token, logprob in pairs for word in writer.push(token, logprob)]
            # One that ended before a token, which it does not hold, has a log-probability more than ids.
            words += writer.flush(cut_off=len(hypothesis.logprobs) == len(hypothesis.ids))
            text = Text(prompt, typed, tuple(words), hypothesis.score)
            if self._holds_required(words):
                texts.setdefault(text.text, text)
        if not texts:
            raise UlimiError(nothing_found(ending.max_tokens, required=True))
        return list(texts.values())[:num]

    def _may_end(self, text: str) -> bool:
        return self._banned is None or not self._banned.ends(text)

    def _holds_required(self, words: Sequence[Word]) -> bool:
        """Whether the required words are still there, after a limit or a stop string has cut the text."""
        there = words_in("".join(word.text for word in words))
        return all(self._tokenizer.normalize(word).strip(APOSTROPHES) in there for word in self._writing.required)

    def _spell(self, word: str) -> Required:
        """Give the tokens of a required word."""
        at_start = tuple(self._tokenizer.encode(word))
        if self._tokenizer.unk_id in at_start:
            raise UlimiError(f"the required word {word!r} is not in the model's closed vocabulary")
        inside = tuple(self._tokenizer.encode(f" {word}")) if self._tokenizer.is_lossless else at_start
        return Required(inside, at_start)


def _after_start(rule: Rule) -> Rule:
    """Let a rule not see the <eos> that each prompt begins with: no line has ended there."""
    return lambda ids, logits_V: rule(ids[1:], logits_V)
