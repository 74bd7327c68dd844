"""Make the run of an n-gram model: the baseline beside a network, in a folder that every command takes which uses one.

Light floor: counting needs no PyTorch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulimi.corpus import open_corpus, read_lines
from ulimi.data import encode_file
from ulimi.errors import UlimiError
from ulimi.files import write_json, write_text
from ulimi.info import model_card
from ulimi.ngram import MAX_ORDER, NgramEngine, count_ngrams, write_ngrams
from ulimi.provenance import describe_corpus, describe_machine, new_meta
from ulimi.run import NGRAM, NGRAMS, Run, open_run, refuse_file, refuse_foreign
from ulimi.score import Score, score_stream
from ulimi.tokenizer import Tokenizer

DEFAULT_VOCAB_SIZE = 4000


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer: another run's, or one that is trained on the training text; None where nothing was said.

    Raises:
        UlimiError: both at once.
    """

    run_dir: Path | None = None
    kind: str | None = None
    vocab_size: int | None = None
    min_frequency: int | None = None

    def __post_init__(self) -> None:
        if self.run_dir is None:
            return
        for name in ("kind", "vocab_size", "min_frequency"):
            if getattr(self, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UlimiError(f"{option}: --tokenizer-from takes the tokenizer of {self.run_dir} as it is")

    def make(self, train_path: Path) -> Tokenizer:
        """Load the tokenizer or train it."""
        if self.run_dir is not None:
            return open_run(self.run_dir).tokenizer
        kind = self.kind or "bpe"
        size = DEFAULT_VOCAB_SIZE if self.vocab_size is None and kind in ("bpe", "unigram") else self.vocab_size
        least = 1 if self.min_frequency is None else self.min_frequency
        return Tokenizer.train(read_lines(train_path), kind=kind, vocab_size=size, min_frequency=least)


def make_ngram_run(
    corpus_path: Path,
    run_dir: Path,
    *,
    order: int,
    settings: TokenizerSettings,
    cache_dir: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Score:
    """Count a corpus's training text, score its validation text, and leave the model in a run folder.

    Args:
        corpus_path: as `ulimi.corpus.open_corpus` takes it.
        run_dir: the run folder; it must not hold anything yet.
        order: 1 to `MAX_ORDER`.
        settings: which tokenizer.
        cache_dir: where encoded text is kept, see `ulimi.data.encode_file`.
        note: told what is worth a line.

    Returns:
        The score of the validation text; its lines alone and the whole as one stream are the same.

    Raises:
        UlimiError: anything wrong with what was given.
    """
    if not 1 <= order <= MAX_ORDER:
        raise UlimiError(f"--order {order}: allowed: 1 to {MAX_ORDER}")
    _claim_folder(run_dir)
    if settings.run_dir is not None:
        open_run(settings.run_dir)  # before the corpus is read
    corpus = open_corpus(corpus_path, run_dir / "corpus")
    tokenizer = settings.make(corpus.train_path)
    train_text = encode_file(corpus.train_path, tokenizer, cache_dir)
    valid_text = encode_file(corpus.valid_path, tokenizer, cache_dir)

    started = time.perf_counter()
    levels = count_ngrams(train_text.ids, tokenizer.vocab_size, order)
    engine = NgramEngine(levels)
    seconds = time.perf_counter() - started
    nats = score_stream(engine, valid_text.ids, tokenizer.eos_id)
    score = Score.of(nats, len(valid_text.ids), valid_text.stats)
    num_ngrams = sum(engine.num_ngrams)
    note(
        f"{len(train_text.ids):,} tokens of {tokenizer.vocab_size} ({tokenizer.kind}): {num_ngrams:,} n-grams up to "
        f"order {order} in {seconds:.1f} s"
    )
    if engine.fallback_orders:
        note(
            f"order {', '.join(map(str, engine.fallback_orders))}: the text is too small or too regular to estimate "
            "discounts; 0.5, 1 and 1.5 are taken"
        )
    if valid_text.num_unknown:
        note(
            f"{valid_text.num_unknown:,} words of the validation text are <unk> to this closed vocabulary; its figures "
            "compare only with models of the same vocabulary"
        )

    meta = {
        **new_meta(describe_machine()),
        "data": describe_corpus(corpus, train_text, valid_text),
        "tokenizer_from": None if settings.run_dir is None else str(settings.run_dir.resolve()),
        "num_ngrams": engine.num_ngrams,  # by order
        "discounts": [d[1:] for d in engine.discounts],
        "fallback_orders": engine.fallback_orders,
        "scores": {"valid": score.as_dict()},
        "training": {"seconds": round(seconds, 1)},
    }
    eos = tokenizer.eos_id
    config = {"vocab_size": tokenizer.vocab_size, "order": order}
    write_json(run_dir / "meta.json", meta)
    tokenizer.save(run_dir)
    write_json(run_dir / "config.json", {"model_type": NGRAM, "bos_token_id": eos, "eos_token_id": eos, NGRAM: config})
    write_text(run_dir / "README.md", model_card(Run(run_dir, meta)))
    # Last: where it is, the run is complete.
    write_ngrams(levels, run_dir / NGRAMS)
    return score


def _claim_folder(run_dir: Path) -> None:
    """Refuse to write into what is not an empty folder, a split's, or that of an n-gram run which was cut off."""
    refuse_file(run_dir)
    if (run_dir / NGRAMS).is_file():
        raise UlimiError(f"{run_dir} already holds an n-gram model: give another --out")
    refuse_foreign(run_dir, {"corpus"}, {"README.md"})
