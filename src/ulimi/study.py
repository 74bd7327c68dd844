"""Compare decoding strategies: every one over its grid, on prompts from a held-out text, judged and set side by side.

A cell is one strategy, one model, one seed; its texts are a file, so that a study that was stopped goes on where it
was. Metrics of others' making are computed by their kept libraries: BLEU (Papineni et al. 2002) and chrF++ (Popović
2017) by sacrebleu, the character error rate by jiwer, MAUVE (Pillutla et al. 2021) by mauve-text.

What each figure is:

    bleu, chrf          against the rest of the line; chrf is chrF++ (word order 2); 0 to 100
    cer                 character edits / characters of the rest; above 1 where more was written than that
    mauve               the texts against the lines themselves; features: the first model's output after reading them;
                        below some hundred texts a seed it is rough
    distinct_2          unique / all pairs of neighbouring words, over all texts of a seed
    repetition          share of a text's word trigrams that it had already
    attested            share of words that stand in the attested text
    words               words of what was written, cut-off ones left out
    nats                nats a token under the model itself, for what was written; not measured where a sparse model
                        rules out some of it

Intervals are 95 %: of bleu and chrf by sacrebleu's bootstrap, of per-text means by ours, both over texts of all seeds;
of distinct_2 and mauve from the seeds (Student's t), none for one seed.

This module belongs to the study extra: sacrebleu, jiwer, mauve-text.
"""

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.beam import Beams
from ulimi.corpus import read_lines
from ulimi.engine import Engine
from ulimi.errors import UlimiError, nearest
from ulimi.files import write_json
from ulimi.sampling import Sampling
from ulimi.tokenizer import Tokenizer
from ulimi.words import Ending
from ulimi.writer import Text, Writer, Writing

STUDY_FILE = "study.json"
NUM_RESAMPLES = 1000
NUM_SAMPLES = 5
ITSELF = "the text itself"
METRICS = ("bleu", "chrf", "cer", "mauve", "distinct_2", "repetition", "attested", "words", "nats")
PUNCTUATION = "\"'“”‘’«».,;:!?…()[]{}–—-/"

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""of Student's t, by degrees of freedom from 1"""


@dataclass(frozen=True)
class Strategy:
    """A way to write, with a name that says it."""

    name: str
    writing: Writing

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another text."""
        w = self.writing
        return w.beams is None and w.contrastive is None and w.sampling.temperature > 0


@dataclass(frozen=True)
class Settings:
    """What is written on from what; two studies with the same settings are the same study."""

    file: str
    file_sha256: str
    prompts: tuple[tuple[str, str], ...] = field(repr=False)
    """(first words, rest of the line)"""
    seeds: tuple[int, ...]
    max_words: int
    models: tuple[tuple[str, str], ...]
    """(name, hash of what runs it)"""


@dataclass(frozen=True)
class Model:
    """One of the models compared."""

    name: str
    digest: str
    engine: Engine
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Figure:
    """A mean and its 95 % interval: the mean plus or minus `half_width`, None where there is no telling."""

    mean: float
    half_width: float | None


def strategies(alpha: float, max_words: int) -> list[Strategy]:
    """Give every strategy over its grid, for a model whose output is alpha-entmax (1: softmax)."""
    ending = Ending(max_tokens=5 * max_words, at="paragraph", max_words=max_words)

    def sampled(name: str, repetition_penalty: float = 1.0, **sampling: Any) -> Strategy:
        chosen = Sampling(**{"alpha": alpha, **sampling})
        return Strategy(name, Writing(chosen, ending, repetition_penalty=repetition_penalty))

    def searched(name: str, beams: Beams, no_repeat_ngram: int = 0) -> Strategy:
        return Strategy(name, Writing(Sampling(), ending, beams=beams, no_repeat_ngram=no_repeat_ngram))

    found = [sampled("greedy", temperature=0)]
    found += [searched(f"beam {n}", Beams(n)) for n in (4, 8)]
    found.append(searched("beam 4, no repeated 3-gram", Beams(4), no_repeat_ngram=3))
    found.append(searched("diverse beam 8, 4 groups", Beams(8, 4, 0.5)))
    found += [Strategy(f"contrastive {p}, k 5", Writing(Sampling(top_k=5), ending, contrastive=p)) for p in (0.2, 0.6)]
    found += [sampled(f"temperature {t}", temperature=t) for t in (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)]
    found += [sampled(f"top-k {k}", top_k=k) for k in (10, 50)]
    found += [sampled(f"top-p {p}", top_p=p) for p in (0.7, 0.8, 0.9, 0.95)]
    found += [sampled(f"min-p {p}", min_p=p) for p in (0.05, 0.1, 0.2)]
    found += [sampled(f"typical {p}", typical=p) for p in (0.2, 0.9)]
    found += [sampled(f"entmax {a}", alpha=a) for a in (1.2, 1.5, 2.0) if a > alpha]
    found.append(sampled("temperature 0.7, top-p 0.9", temperature=0.7, top_p=0.9))
    found.append(sampled("temperature 0.7, repetition penalty 1.1", 1.1, temperature=0.7))
    return found


def choose_strategies(names: Sequence[str], known: Sequence[Strategy]) -> list[Strategy]:
    """Keep those whose name begins with one of `names`; all for none.

    Raises:
        UlimiError: a name fits none.
    """
    for name in names:
        if not any(strategy.name.startswith(name) for strategy in known):
            allowed = dict.fromkeys(strategy.name.split()[0] for strategy in known)
            raise UlimiError(f"--strategy {name!r}: allowed: {', '.join(allowed)}{nearest(name, allowed)}")
    return [strategy for strategy in known if _is_chosen(strategy, names)]


def _is_chosen(strategy: Strategy, names: Sequence[str]) -> bool:
    return not names or strategy.name.startswith(tuple(names))


def _has_output(engine: Engine) -> bool:
    """Whether a model has outputs, which contrastive search and MAUVE compare."""
    try:
        engine.output(engine.initial_state(1))
    except UlimiError:
        return False
    return True


def cut_prompts(lines: Iterable[str], num: int, num_words: int, min_rest: int = 5) -> list[tuple[str, str]]:
    """Cut (first words, rest) from lines spread evenly over those that are long enough.

    Raises:
        UlimiError: no line is long enough.
    """
    pairs = []
    for line in lines:
        words = line.split()
        if len(words) >= num_words + min_rest:
            pairs.append((" ".join(words[:num_words]), " ".join(words[num_words:])))
    if not pairs:
        raise UlimiError(
            f"no line has {num_words + min_rest} words: {num_words} for the prompt, {min_rest} to compare with"
        )
    chosen = np.linspace(0, len(pairs) - 1, min(num, len(pairs))).round().astype(int)
    return [pairs[i] for i in dict.fromkeys(chosen.tolist())]


class Study:
    """A study in its folder.

    Args:
        out: the folder.
        settings: what is studied.

    Raises:
        UlimiError: the folder holds another study, or something else.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings
        path = out / STUDY_FILE
        if path.is_file():
            if _read_json(path) != json.loads(json.dumps(asdict(settings))):
                raise UlimiError(f"{out} holds a study of other settings, text or models; give another --out")
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UlimiError(f"--out {out}: holds other things; give a new folder")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(settings))

    def texts(self, model: Model, strategy: Strategy, seed: int) -> list[dict[str, Any]]:
        """Give a cell's texts: those of its file, or new ones, which are then kept."""
        name = f"{model.name}-{strategy.name}-{seed}".replace(" ", "_").replace(",", "").replace("/", "_")
        path = self.out / "texts" / f"{name}.json"
        # A strategy may come to mean something else under its name.
        how = {"engine": type(model.engine).__name__, "writing": json.loads(json.dumps(asdict(strategy.writing)))}
        if path.is_file():
            kept = _read_json(path)
            if isinstance(kept, dict) and kept.get("how") == how:
                texts: list[dict[str, Any]] = kept["texts"]
                return texts
        writer = Writer(model.engine, model.tokenizer, strategy.writing)
        records = []
        for index, (prompt, rest) in enumerate(self.settings.prompts):
            # Each prompt has its own seed, or all would begin alike.
            text = writer.write(prompt + " ", seed=seed * 100_000 + index)[0]
            records.append(_record(text, rest))
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"how": how, "texts": records})
        return records

    def run(
        self, models: Sequence[Model], names: Sequence[str], attested: Callable[[str], bool] | None,
        on_cell: Callable[[str, int, int], None],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Write all texts and judge them.

        Args:
            models: those of the settings; the first gives MAUVE its features.
            names: strategies to take, by the beginning of their names; all for none. Contrastive search is left out
                for a model without outputs, which is no network.
            attested: whether a word, in lower case without punctuation, is known; None: not measured.
            on_cell: told what comes next, how many cells are done, and how many there are.

        Returns:
            A row for the text itself, then one a model and strategy: "model", "strategy", a `Figure` for each of
            `METRICS`, and "samples".
        """
        features = _Features(models[0])
        plan = [
            (model, strategy)
            for model in models
            for strategy in strategies(model.engine.alpha, self.settings.max_words)
            if _is_chosen(strategy, names) and (strategy.writing.contrastive is None or _has_output(model.engine))
        ]
        rows: list[dict[str, Any]] = [self._itself(attested)]
        done = 0
        total = sum(len(self._seeds(strategy)) for _, strategy in plan)
        for model, strategy in plan:
            seeds = []
            for seed in self._seeds(strategy):
                on_cell(f"{model.name}, {strategy.name}", done, total)
                seeds.append(self.texts(model, strategy, seed))
                done += 1
            figures = judge_texts(seeds, attested, features)
            rows.append({"model": model.name, "strategy": strategy.name, **figures, "samples": seeds[0][:NUM_SAMPLES]})
        return rows

    def _itself(self, attested: Callable[[str], bool] | None) -> dict[str, Any]:
        """Judge the rests of the lines as if someone had written them: what the other rows are to be read against."""
        records = [
            {
                "prompt": prompt,
                "rest": rest,
                "written": rest,
                "words": [[f" {rest}", 1.0]],
                "nats": 0.0,
                "num_tokens": 0,
            }
            for prompt, rest in self.settings.prompts
        ]
        figures = judge_texts([records], attested, lambda texts: None)
        figures |= dict.fromkeys(("bleu", "chrf", "cer", "nats"))
        return {"model": "", "strategy": ITSELF, **figures, "samples": records[:NUM_SAMPLES]}

    def _seeds(self, strategy: Strategy) -> tuple[int, ...]:
        return self.settings.seeds if strategy.is_random else self.settings.seeds[:1]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UlimiError(f"{path}: cannot be read: {error}; remove it, and it is made anew") from None


def _record(text: Text, rest: str) -> dict[str, Any]:
    words = [[word.text, math.exp(word.logprob)] for word in text.words]
    return {
        "prompt": text.prompt,
        "rest": rest,
        "written": text.written.strip(),
        "words": words,
        "nats": text.nats if math.isfinite(text.nats) else None,  # JSON has no infinity
        "num_tokens": text.num_tokens,
    }


class _Features:
    """What MAUVE compares: the output of one model after reading a text, whoever wrote it."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """Give a row a text, (N, E); None for a model that has no outputs."""
        engine, tokenizer = self._model.engine, self._model.tokenizer
        if not _has_output(engine):
            return None
        rows = []
        for text in texts:
            _, state = engine.prime([tokenizer.eos_id, *tokenizer.encode(text)], engine.initial_state(1))
            rows.append(engine.output(state)[0])
        return np.stack(rows)


def _give_floats(metric: Any) -> None:
    """Let a sacrebleu metric give Python's numbers: of numpy's and its own together it cannot take the mean."""
    compute = metric._compute_score_from_stats

    def compute_float(stats: Any) -> Any:
        score = compute(stats)
        score.score = float(score.score)
        return score

    metric._compute_score_from_stats = compute_float


def judge_texts(
    seeds: Sequence[Sequence[dict[str, Any]]], attested: Callable[[str], bool] | None,
    features: Callable[[Sequence[str]], NDArray[np.float32] | None],
) -> dict[str, Figure | None]:  # fmt: skip
    """Judge the texts of one strategy, those of each seed apart.

    Args:
        seeds: a list of texts a seed.
        attested: see `Study.run`.
        features: texts -> (N, E).

    Returns:
        A figure for each of `METRICS`, None where it was not measured.
    """
    import jiwer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    records = [record for seed in seeds for record in seed]
    written, rests = [r["written"] for r in records], [r["rest"] for r in records]
    figures: dict[str, Figure | None] = {}
    for name, metric in (("bleu", BLEU(effective_order=False)), ("chrf", CHRF(word_order=2))):
        _give_floats(metric)
        score = metric.corpus_score(written, [rests], n_bootstrap=NUM_RESAMPLES if len(records) > 1 else 1)
        figures[name] = Figure(float(score.score), float(score._ci) if len(records) > 1 else None)
    cers = [_character_errors(r["rest"], r["written"], jiwer) for r in records]
    figures["cer"] = _ratio([errors for errors, _ in cers], [length for _, length in cers])
    words = [text.split() for text in written]
    figures["repetition"] = _ratio(*zip(*(_repeated(text) for text in words), strict=True))
    figures["words"] = _ratio([len(text) for text in words], [1] * len(words))
    nats = [r["nats"] for r in records]
    # A sparse model may be made to write what it holds to be impossible; nothing in JSON stands for that.
    finite = np.isfinite(np.asarray(nats, dtype=np.float64)).all()
    figures["nats"] = _ratio(nats, [max(1, r["num_tokens"]) for r in records]) if finite else None
    figures["attested"] = None
    if attested is not None:
        bare = [[word for raw in text if (word := raw.strip(PUNCTUATION).casefold())] for text in words]
        figures["attested"] = _ratio([sum(map(attested, text)) for text in bare], [len(text) for text in bare])
    figures["distinct_2"] = _of_seeds([_distinct_2([record["written"].split() for record in seed]) for seed in seeds])
    figures["mauve"] = _of_seeds([value for seed in seeds if (value := _mauve(seed, features)) is not None])
    return {name: figures[name] for name in METRICS}


def _character_errors(rest: str, written: str, jiwer: Any) -> tuple[int, int]:
    if not written:
        return len(rest), len(rest)
    found = jiwer.process_characters(rest, written)
    return found.substitutions + found.deletions + found.insertions, len(rest)


def _repeated(words: Sequence[str]) -> tuple[int, int]:
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(trigrams) - len(set(trigrams)), len(trigrams)


def _distinct_2(texts: Sequence[Sequence[str]]) -> float:
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    return len(pairs) / max(1, pairs.total())


def _mauve(
    records: Sequence[dict[str, Any]], features: Callable[[Sequence[str]], NDArray[np.float32] | None]
) -> float | None:
    if len(records) < 20:
        return None  # it clusters them
    theirs = features([f"{r['prompt']}{r['written']}" for r in records])
    ours = features([f"{r['prompt']}{r['rest']}" for r in records])
    if theirs is None or ours is None:
        return None
    with _silent():
        import mauve

        return float(mauve.compute_mauve(p_features=ours, q_features=theirs, verbose=False, seed=25).mauve)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep from the terminal what faiss, in C++, says of small samples; the docstring says it once for all."""
    kept = os.dup(2)
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere:
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """Sum over sum, with the bootstrap's interval over texts."""
    a_N, b_N = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    mean = float(a_N.sum() / max(b_N.sum(), 1e-12))
    if len(a_N) < 2:
        return Figure(mean, None)
    chosen_RN = np.random.default_rng(0).integers(len(a_N), size=(NUM_RESAMPLES, len(a_N)))
    means_R = a_N[chosen_RN].sum(axis=1) / np.maximum(b_N[chosen_RN].sum(axis=1), 1e-12)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Figure(mean, float(high - low) / 2)


def _of_seeds(values: Sequence[float]) -> Figure | None:
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) < 2:
        return Figure(mean, None)
    t = T_975[min(len(values) - 2, len(T_975) - 1)]
    return Figure(mean, t * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


class Attested:
    """The words of a text, or of a word list: which are known.

    Args:
        paths: text files, plain, .gz or .zst.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.words = frozenset(
            word.strip(PUNCTUATION).casefold() for path in paths for line in read_lines(path) for word in line.split()
        )
        """in lower case, without punctuation around them"""

    def __call__(self, word: str) -> bool:
        """Whether the word stands there."""
        return word in self.words


def digest_of(paths: Iterable[Path]) -> str:
    """Hash what a model is made of."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
