"""From a text that ends anywhere to the tokens that can spell its end: the probability of a string, not of its tokens.

A person stops in the middle of a word, and the tokens of "kakh" are not the first tokens of "kakhulu". So the piece
that was begun is taken off the prompt (`split_prompt`), and all token sequences that spell it, or spell it and go on,
are its covers (`covers`): the probability of a string is the sum over its covers. The idea is known as token healing,
and with all covers as exact byte-level prediction (Vieira et al. 2024, "From Language Models over Tokens to Language
Models over Characters"; Phan et al. 2024).

Shape letters: V vocabulary. Light floor: the network is whatever `Engine` is given.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulimi import distribution
from ulimi.engine import Engine, EngineState
from ulimi.sampling import checked_logits
from ulimi.tokenizer import Tokenizer

MAX_BEGUN_BYTES = 64
"""of a longer piece the first tokens are taken as the tokenizer gives them"""


class TokenIndex:
    """A vocabulary by its bytes; <eos> and <unk> spell nothing and are not in it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = {tokenizer.eos_id, tokenizer.unk_id}
        entries = sorted((tokenizer.token_bytes(id), id) for id in range(tokenizer.vocab_size) if id not in special)
        self._bytes = [part for part, _ in entries]
        self._ids_N = np.array([id for _, id in entries], dtype=np.int64)
        self._longest = max(map(len, self._bytes))
        # A word of a closed vocabulary stands alone: no two of them spell a third.
        self._splits = tokenizer.is_lossless
        self._unk_id = tokenizer.unk_id
        self._bytes_of = {id: part for part, id in entries}

    def token_bytes(self, id: int) -> bytes:
        """Give the bytes of a token; none for <eos> and <unk>."""
        return self._bytes_of.get(id, b"")

    def reaching(self, rest: bytes) -> NDArray[np.int64]:
        """Give the ids of the tokens that begin with `rest`, (N,); <unk> where a closed vocabulary has none."""
        first = bisect_left(self._bytes, rest)
        last = bisect_left(self._bytes, True, lo=first, key=lambda part: not part.startswith(rest))
        if first == last and self._unk_id is not None:
            return np.array([self._unk_id], dtype=np.int64)
        return self._ids_N[first:last]

    def within(self, rest: bytes) -> Iterator[tuple[int, int]]:
        """Yield (id, length) of the tokens with which `rest` begins and that leave something of it."""
        if not self._splits:
            return
        for length in range(1, min(len(rest) - 1, self._longest) + 1):
            part = rest[:length]
            place = bisect_left(self._bytes, part)
            # In kind "char" a character and its byte are two tokens of the same bytes.
            while place < len(self._bytes) and self._bytes[place] == part:
                yield int(self._ids_N[place]), length
                place += 1


@dataclass(frozen=True)
class Cover:
    """One way to spell what was begun: its last token, and none before, reaches or passes the end."""

    ids: tuple[int, ...]
    """after the context; none where nothing was begun"""
    logprob: float
    """nats, given the context"""
    surplus: bytes
    """what the last token spells beyond the end; it may stop inside a character"""
    state: EngineState
    """before the last of `ids` is read; with no ids, after the context"""
    logits: NDArray[np.float32] | None = None
    """(1, V) after all of them, where known"""

    def read(self, engine: Engine) -> tuple[NDArray[np.float32], EngineState]:
        """Give the logits (1, V) and the state after context and cover; it costs one step, each time."""
        if self.logits is not None:
            return self.logits, self.state
        return engine.step(np.array(self.ids[-1:], dtype=np.int64), self.state)


@dataclass
class _Node:
    """Tokens that spell the first `place` bytes and not all."""

    ids: tuple[int, ...]
    place: int
    logprob: float
    state: EngineState
    """before the last of `ids` is read; with no ids, after the context"""


def split_prompt(tokenizer: Tokenizer, text: str) -> tuple[list[int], bytes]:
    r"""Split a prompt into the ids that are certain and the bytes of the piece that was begun.

    Tokens never reach over the cut, whatever is written on, so the model's distribution after the ids, over what begins
    with the bytes, is that given the string. The text goes on in NFC, so "e" is not the beginning of "é". A prompt that
    ends in white space has begun all of it, since its last space belongs to the next word; "e-" has begun "-", "kwa-Zu"
    "Zu"; after a line's end, nothing is begun. Of a piece of more than `MAX_BEGUN_BYTES` bytes the first tokens count
    as certain.

    Args:
        tokenizer: the model's.
        text: any text, in any Unicode normal form.

    Returns:
        The ids, `eos_id` first; the bytes, possibly none.

    Raises:
        UlimiError: the text holds a lone surrogate.
    """
    line = text.rpartition("\n")[2]
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    piece = tokenizer.last_piece(line)
    if not tokenizer.is_lossless:
        return (ids[:-1], piece.encode()) if piece else (ids, b"")
    num_bytes = MAX_BEGUN_BYTES if piece is None else min(len(piece.encode()), MAX_BEGUN_BYTES)
    begun = b""
    while len(begun) < num_bytes or _begins_inside(begun):
        begun = tokenizer.token_bytes(ids.pop()) + begun
    return ids, begun


def _begins_inside(text: bytes) -> bool:
    """Tell whether UTF-8 begins inside a character."""
    return bool(text) and 0x80 <= text[0] < 0xC0


def covers(
    engine: Engine, index: TokenIndex, state: EngineState, logits_1V: NDArray[np.float32], begun: bytes, *,
    max_covers: int = 1000, min_share: float = 1e-4, max_steps: int = 200,
) -> list[Cover]:  # fmt: skip
    """Find the ways to spell what was begun, the most probable first.

    The search goes from token to token, each time where most is to be expected: a beginning that spells n bytes is
    judged by its share among all known ways to spell these n bytes. It ends once what is left has, so judged, less
    than `min_share`; at 0 it finds all.

    Args:
        engine: the network.
        index: of its tokenizer.
        state: of one stream, after the context.
        logits_1V: the logits after the context, (1, V).
        begun: see `split_prompt`.
        max_covers: the most covers to give; those left out are the least probable that were found.
        min_share: what may be missed of the probability.
        max_steps: steps of the network; should nothing be found by then, the longest beginning alone goes on.

    Returns:
        None of probability 0; nothing at all where the model rules out what was begun.
    """
    if not begun:
        return [Cover((), 0.0, b"", state, logits_1V)]

    def read(id: int, state: EngineState) -> tuple[NDArray[np.float64], EngineState]:
        next_1V, state = engine.step(np.array([id], dtype=np.int64), state)
        return log_probs(engine, next_1V)[0], state

    found, _ = search_covers(
        read, index, state, log_probs(engine, logits_1V)[0], begun,
        max_covers=max_covers, min_share=min_share, max_steps=max_steps,
    )  # fmt: skip
    return found


def search_covers(
    read: Callable[[int, EngineState], tuple[NDArray[np.float64], EngineState]], index: TokenIndex, state: EngineState,
    log_probs_V: NDArray[np.float64], begun: bytes, *, max_covers: int, min_share: float, max_steps: int,
) -> tuple[list[Cover], float]:  # fmt: skip
    """Find the `covers` of at least one byte with whatever reads a token: id, state -> log-probabilities (V,), state.

    Returns:
        The best covers, and the log of the probability of all that were found; -inf if none.
    """
    # known[n]: log of the probability, as far as found, that the text begins with the first n bytes.
    known = np.full(len(begun) + 1, -np.inf)
    known[0] = 0.0
    nodes = [_Node((), 0, 0.0, state)]
    found: list[tuple[_Node, EngineState, NDArray[np.int64], NDArray[np.float64]]] = []
    num_steps = 0
    while nodes:
        shares = [math.exp(node.logprob - known[node.place]) for node in nodes]
        if (found and (sum(shares) <= min_share or num_steps >= max_steps)) or num_steps >= max_steps + len(begun):
            break
        if num_steps >= max_steps:
            best = max(range(len(nodes)), key=lambda i: (nodes[i].place, nodes[i].logprob))
        else:
            best = max(range(len(nodes)), key=shares.__getitem__)
        node = nodes.pop(best)
        if node.ids:
            log_probs_V, state = read(node.ids[-1], node.state)
            num_steps += 1
        rest = begun[node.place :]
        ids_N = index.reaching(rest)
        reached_N = log_probs_V[ids_N] + node.logprob
        possible_N = reached_N > -np.inf
        if possible_N.any():
            found.append((node, state, ids_N[possible_N], reached_N[possible_N]))
            known[node.place + 1 :] = np.logaddexp(known[node.place + 1 :], np.logaddexp.reduce(reached_N[possible_N]))
        for id, length in index.within(rest):
            logprob = float(log_probs_V[id]) + node.logprob
            if logprob > -np.inf:
                place = node.place + length
                nodes.append(_Node((*node.ids, id), place, logprob, state))
                known[node.place + 1 : place + 1] = np.logaddexp(known[node.place + 1 : place + 1], logprob)
    if not found:
        return [], -math.inf
    logprobs_N = np.concatenate([reached_N for *_, reached_N in found])
    all_ids_N = np.concatenate([ids_N for *_, ids_N, _ in found])
    from_N = np.concatenate([np.full(len(ids_N), i) for i, (*_, ids_N, _) in enumerate(found)])
    best_covers: list[Cover] = []
    for i in np.argsort(-logprobs_N, kind="stable")[:max_covers]:
        node, state, *_ = found[from_N[i]]
        id = int(all_ids_N[i])
        surplus = index.token_bytes(id)[len(begun) - node.place :]
        best_covers.append(Cover((*node.ids, id), float(logprobs_N[i]), surplus, state))
    return best_covers, float(known[-1])


def log_probs(engine: Engine, logits_BV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Turn an engine's logits (B, V) into log-probabilities in nats, (B, V); -inf is a token that it rules out.

    Raises:
        UlimiError: the logits are not finite.
    """
    return distribution.log_probs(checked_logits(logits_BV), engine.alpha)
