"""The n-gram model that figures of a network stand beside: interpolated modified Kneser-Ney, and its `Engine`.

Chen & Goodman (1999), "An empirical study of smoothing techniques for language modeling", with what lmplz of KenLM
decides where they leave a choice (Heafield et al. 2013, "Scalable modified Kneser-Ney language model estimation"):

    p_n(w | c) = (a(cw) - D_n(a(cw))) / a(c) + gamma(c) p_{n-1}(w | c without its first token)    where c has successors
    p_n(w | c) = p_{n-1}(w | c without its first token)                                           where it has none
    gamma(c) = sum over w of D_n(a(cw)) / a(c);  a(c) = sum over w of a(cw);  p_0(w) = 1 / V

A line is a sentence, and the <eos> before it stands for its <s>: no context reaches further back, and <s> itself is
never predicted. a is how often an n-gram occurs where n is the model's order or the n-gram begins with <s>, elsewhere
how many different tokens stand before it. D_n has one value for each of a = 1, 2 and 3 or more. Nothing is pruned.

The n-grams are the nodes of a trie, a level an order: the children of a context are its successors. Shape letters:
B streams, T time steps, V vocabulary, K = order - 1 lengths of context. This module must not know text or torch.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError
from ulimi.files import atomic_path

MAX_ORDER = 20

FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)
"""of a text so small or so regular that its own are not defined; those of lmplz --discount_fallback"""

NONE = -1
"""the node of an n-gram that the training text does not have; as an index, the neutral entry behind the others"""


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, sorted by their context's place in the level above, then by their last token."""

    num_successors: NDArray[Any]
    """how many of them each n-gram of the level above is the context of"""
    words: NDArray[Any]
    """their last tokens"""
    counts: NDArray[Any]
    """a of each; at order 1, where every token has its place, 0 for those that do not occur"""


def count_ngrams(ids: NDArray[Any], vocab_size: int, order: int) -> list[Level]:
    """Count what the model is made of; one sort of the text an order.

    Args:
        ids: (N,), an <eos>, the last id of the vocabulary, at the end of each line.
        vocab_size: V.
        order: of the longest n-grams.

    Returns:
        A level an order, the unigrams first.
    """
    tokens = np.concatenate([[vocab_size - 1], ids]).astype(np.int64)
    is_eos = tokens == vocab_size - 1
    # For each position, the place of the n-gram that ends there, NONE where it would begin before its line's <s>.
    grams, num_grams = tokens, vocab_size
    levels: list[Level] = []
    occurrences = np.bincount(tokens[1:], minlength=vocab_size)
    begins_with_bos = np.zeros(vocab_size, dtype=bool)
    num_successors, words = np.array([vocab_size]), np.arange(vocab_size)
    for n in range(2, order + 1):
        # An <eos> is a context as the <s> of the line after it, and a longer n-gram that ends in one is none.
        contexts = grams if n == 2 else np.where(is_eos, NONE, grams)
        ends = np.flatnonzero(contexts[:-1] != NONE) + 1
        keys, first, places, longer_occurrences = np.unique(
            contexts[ends - 1] * vocab_size + tokens[ends], return_index=True, return_inverse=True, return_counts=True
        )
        an_end = ends[first]
        continuations = np.bincount(grams[an_end], minlength=num_grams)
        levels.append(_level(num_successors, words, np.where(begins_with_bos, occurrences, continuations), vocab_size))
        num_successors, words = np.bincount(keys // vocab_size, minlength=num_grams), keys % vocab_size
        grams = np.full(len(tokens), NONE)
        grams[ends] = places
        num_grams, occurrences, begins_with_bos = len(keys), longer_occurrences, is_eos[an_end - n + 1]
    levels.append(_level(num_successors, words, occurrences, vocab_size))
    return levels


def _level(
    num_successors: NDArray[np.int64], words: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int
) -> Level:
    word_type = np.uint16 if vocab_size <= 2**16 else np.uint32
    return Level(num_successors.astype(np.uint32), words.astype(word_type), counts.astype(np.uint32))


def discounts(counts: NDArray[Any]) -> tuple[float, ...] | None:
    """Estimate D of an order from how many of its n-grams have a = 1, 2, 3 and 4 (Chen & Goodman, eq. 26).

    Returns:
        D for a = 0, 1, 2 and 3 or more; None if it is not defined or one is outside (0, a]. (lmplz lets a 0 pass, by
        which a token can become impossible.)
    """
    _, n1, n2, n3, n4, *_ = (int(n) for n in np.bincount(np.minimum(counts, 5).astype(np.int64), minlength=6))
    if not n1 * n2 * n3:
        return None
    y = n1 / (n1 + 2 * n2)
    found = (0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < d <= a for a, d in enumerate(found) if a) else None


class NgramEngine:
    """`ulimi.engine.Engine` of an n-gram model.

    The state is, for each stream, the place in the trie of its last 1, 2, … order - 1 tokens, (B, K), NONE for those
    that the training text does not have. Nothing reaches past an <eos>, so lines have the same score alone and in a
    stream. Everything is float64 inside.

    Args:
        levels: of `count_ngrams`.
    """

    batch_invariant = True
    alpha = 1.0
    """its logits become probabilities by softmax: they are log-probabilities already"""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.order = len(levels)
        self.vocab_size = len(levels[0].words)
        self.num_ngrams = [int(np.count_nonzero(level.counts)) for level in levels]
        own = [discounts(level.counts) for level in levels]
        self.fallback_orders = [n for n, found in enumerate(own, start=1) if found is None]
        """orders whose discounts are not their own"""
        self.discounts = [found or FALLBACK_DISCOUNTS for found in own]
        # Of each level: where the successors of a context begin, and its gamma; and of each n-gram (context, word) as
        # one number, sorted, and what it has for itself. The entry behind the last is that of NONE.
        self._begins: list[NDArray[np.int64]] = []
        self._gammas: list[NDArray[np.float64]] = []
        self._keys: list[NDArray[np.int64]] = []
        self._shares: list[NDArray[np.float64]] = []
        for level, d in zip(levels, self.discounts, strict=True):
            num_contexts, sizes = len(level.num_successors), level.num_successors.astype(np.int64)
            contexts = np.arange(num_contexts).repeat(sizes)
            counts = level.counts.astype(np.int64)
            discount = np.array(d)[np.minimum(counts, 3)]
            totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
            left_over = np.bincount(contexts, weights=discount, minlength=num_contexts)
            gammas = np.divide(left_over, totals, out=np.ones(num_contexts), where=totals > 0)
            self._begins.append(np.append(0, sizes.cumsum()))
            self._gammas.append(np.append(gammas, 1.0))
            self._keys.append(np.append(contexts * self.vocab_size + level.words, np.iinfo(np.int64).max))
            self._shares.append(np.append((counts - discount) / totals[contexts], 0.0))
        self._unigrams_V: NDArray[np.float64] = self._shares[0][:-1] + self._gammas[0][0] / self.vocab_size

    def initial_state(self, batch_size: int) -> NDArray[np.int64]:
        """No context for `batch_size` streams."""
        return np.full((batch_size, self.order - 1), NONE, dtype=np.int64)

    def step(self, ids_B: NDArray[np.int64], state: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Read one id a stream, (B,); give the log-probabilities of the next, (B, V)."""
        state = self._read(ids_B[:, None], state)[:, 0]
        return self._log_probabilities(state), state

    def prime(self, ids: Sequence[int], state: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Read several ids of one stream at once; give the log-probabilities after the last, (1, V)."""
        if not ids:
            raise ValueError("no ids to read")
        *before, last = ids
        if before:
            state = self._read(np.array([before], dtype=np.int64), state)[:, -1]
        return self.step(np.array([last], dtype=np.int64), state)

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Read a window; give the nats of each target, (B, T)."""
        nodes_BTK = self._read(inputs_BT, state)
        p_BT = self._unigrams_V[targets_BT]
        for k in range(self.order - 1):
            contexts_BT = nodes_BTK[..., k]
            found_BT = self._find(k + 1, contexts_BT, targets_BT)
            p_BT = self._gammas[k + 1][contexts_BT] * p_BT + self._shares[k + 1][found_BT]
        return -np.log(p_BT).astype(np.float32), nodes_BTK[:, -1].copy()

    def logits(
        self, inputs_BT: NDArray[np.int64], state: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Read a window; give the log-probabilities after each id, (B, T, V)."""
        nodes_BTK = self._read(inputs_BT, state)
        logits_NV = self._log_probabilities(nodes_BTK.reshape(inputs_BT.size, -1))
        return logits_NV.reshape(*inputs_BT.shape, -1), nodes_BTK[:, -1].copy()

    def repeat_state(self, state: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """Turn the state of one stream into that of `n` equal ones."""
        return state.repeat(n, axis=0)

    def select_state(self, state: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.int64]:
        """Keep these rows of a batch, in this order."""
        return state[list(rows)]

    def join_states(self, states: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Put the states of several streams or batches together as one batch, in this order."""
        return np.concatenate(states)

    def output(self, state: NDArray[np.int64]) -> NDArray[np.float32]:
        """Refuse: there are no layers."""
        raise UlimiError("an n-gram model has no hidden layer to compare contexts by; this needs a network")

    def _read(self, ids_BT: NDArray[np.int64], state_BK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the state after each id, (B, T, K)."""
        nodes_BTK = np.empty((*ids_BT.shape, self.order - 1), dtype=np.int64)
        nodes_BTK[..., :1] = ids_BT[..., None]
        for k in range(1, self.order - 1):
            # The last k + 1 tokens are the k that ended a step earlier, and the one that is read.
            before_BT = np.concatenate([state_BK[:, None, k - 1], nodes_BTK[:, :-1, k - 1]], axis=1)
            # What ends in an <eos> has no successors, so nothing from before it reaches the next line.
            nodes_BTK[..., k] = self._find(k, before_BT, ids_BT)
        return nodes_BTK

    def _find(self, level: int, contexts: NDArray[np.int64], words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the places of n-grams in a level, NONE for those that are not there and those without a context."""
        keys = contexts * self.vocab_size + words
        places = self._keys[level].searchsorted(keys)
        return np.where(self._keys[level][places] == keys, places, NONE)

    def _log_probabilities(self, nodes_NK: NDArray[np.int64]) -> NDArray[np.float32]:
        """Give the log-probabilities of all tokens after several contexts, (N, V)."""
        log_p_NV = np.empty((len(nodes_NK), self.vocab_size), dtype=np.float32)
        for log_p_V, nodes_K in zip(log_p_NV, nodes_NK.tolist(), strict=True):
            log_p_V[:] = np.log(self._distribution(nodes_K))
        return log_p_NV

    def _distribution(self, nodes_K: list[int]) -> NDArray[np.float64]:
        """Give the probabilities of all tokens after a context, (V,)."""
        p_V = self._unigrams_V.copy()
        for level, node in enumerate(nodes_K, start=1):
            if node == NONE:  # nor is there a longer one
                break
            begin, end = self._begins[level][node : node + 2].tolist()
            p_V *= self._gammas[level][node]
            p_V[self._keys[level][begin:end] - node * self.vocab_size] += self._shares[level][begin:end]
        return p_V


def write_ngrams(levels: Sequence[Level], path: Path) -> None:
    """Write the counts, of which loading makes the probabilities, as an .npz, whole or not at all."""
    arrays = {
        f"{name}_{n}": getattr(level, name)
        for n, level in enumerate(levels, start=1)
        for name in ("num_successors", "words", "counts")
    }
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_ngrams(path: Path) -> list[Level]:
    """Read what `write_ngrams` wrote.

    Raises:
        UlimiError: the file is not there or is no such file.
    """
    levels: list[Level] = []
    try:
        with path.open("rb") as file:
            is_archive = zipfile.is_zipfile(file)
        if not is_archive:
            raise ValueError("it is damaged, or no file of counts")  # numpy would say how to load a pickle
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for n in range(1, len(arrays.files) // 3 + 1):
                level = Level(*(arrays[f"{name}_{n}"] for name in ("num_successors", "words", "counts")))
                num_contexts = len(levels[-1].words) if levels else 1
                if not (
                    len(level.num_successors) == num_contexts
                    and level.num_successors.sum() == len(level.words) == len(level.counts)
                ):
                    raise ValueError(f"its {n}-grams do not fit together")
                levels.append(level)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None
    if not levels:
        raise UlimiError(f"{path}: cannot be read: it holds no n-grams")
    return levels
