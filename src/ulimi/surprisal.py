"""What each word of a text costs, given the words before it in its line: its surprisal.

A word is what stands between white space, the white space in front of it included. Of a tokenizer whose tokens begin
with that space, the tokens' own probabilities do not say that a word ends; the token after it does, which is the next
word's. So the probability of a word is that of its tokens and that the next one begins a word, given that its own first
one began one (Pimentel & Meister 2024, "How to compute the probability of a word", arXiv 2406.14561):

    p(word | before) = p(tokens | before) p(next begins a word | tokens, before) / p(next begins a word | before)

Over a line, its end included, that adds up to the line's usual score, to the last nat. White space that no token begins
with (a no-break space, where the tokenizer's text had none) parts words, too, but without those two factors: its bytes
may begin other characters as well.

Light floor: the network is whatever `Engine` is given.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ulimi.distribution import log_probs
from ulimi.engine import Engine
from ulimi.errors import UlimiError
from ulimi.score import windows
from ulimi.tokenizer import Tokenizer


class WordScore(NamedTuple):
    """What a word costs."""

    text: str
    """with the white space in front of it, as it stands in the line (in NFC)"""
    nats: float
    num_tokens: int

    @property
    def bits(self) -> float:
        """Its surprisal."""
        return self.nats / math.log(2)


class LineScore(NamedTuple):
    """What the words of a line cost, and that it ends after them."""

    words: list[WordScore]
    end_nats: float
    """of the line's end, with the white space that may stand before it"""
    end_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The keys of `--json`, in bits."""
        words = [{"text": word.text, "bits": word.bits, "num_tokens": word.num_tokens} for word in self.words]
        return {"words": words, "end_bits": self.end_nats / math.log(2), "end_tokens": self.end_tokens}


def score_words(engine: Engine, tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[tuple[str, LineScore]]:
    """Score each word of each line, which is read by itself, from a zero state and an <eos>.

    Args:
        engine: the network.
        tokenizer: its tokenizer.
        lines: without their line ends.

    Raises:
        UlimiError: the model is sparse: it gives some words no probability, which no number of nats says.
    """
    if engine.alpha != 1:
        raise UlimiError("words: a sparse model (entmax) rules some out; allowed: models of cross entropy")
    parts = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    # Kind "word" has a token a word, each of which begins one.
    begins_V = np.array([not tokenizer.is_lossless or _text(part)[:1].isspace() for part in parts])
    for line in lines:
        ids = tokenizer.encode_lines([line])[0]
        state = engine.initial_state(1)
        nats: list[float] = []
        log_begins: list[float] = []
        for inputs_1T, targets_1T, _ in windows(np.array(ids), tokenizer.eos_id):
            logits_1TV, state = engine.logits(inputs_1T, state)
            logp_TV = log_probs(logits_1TV[0], 1.0)
            nats += (-logp_TV[np.arange(len(logp_TV)), targets_1T[0]]).tolist()
            log_begins += np.log(np.maximum(np.exp(logp_TV[:, begins_V]).sum(axis=1), 1e-300)).tolist()
        words: list[tuple[bytes, float, int]] = []
        for place, id in enumerate(ids):
            part, cost = parts[id], nats[place]
            # A character has four bytes at most.
            begins = begins_V[id] or _text(b"".join(parts[id] for id in ids[place : place + 4])[:4])[:1].isspace()
            if not words:
                words.append((part, cost, 1))
                continue
            before, cost_before, tokens_before = words.pop()
            moved = log_begins[place] if begins_V[id] else 0.0
            # White space alone stands in front of the word after it.
            if begins and _text(before).strip():
                words += [(before, cost_before - moved, tokens_before), (part, cost + moved, 1)]
            else:
                words.append((before + part, cost_before + cost, tokens_before + 1))
        *own, (_, end_nats, end_tokens) = words
        texts = [_text(text) for text, _, _ in own]
        if not tokenizer.is_lossless:
            # As they were written, known or not.
            texts = [" " * (place > 0) + word for place, word in enumerate(tokenizer.normalize(line).split())]
        scored = [WordScore(text, cost, n) for text, (_, cost, n) in zip(texts, own, strict=True)]
        yield line, LineScore(scored, end_nats, end_tokens)


def _text(part: bytes) -> str:
    return part.decode("utf-8", "replace")
