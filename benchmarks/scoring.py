"""How many tokens a second are scored: ulimi's network in 1, 10 and 64 streams, its n-gram model, and KenLM.

    python benchmarks/scoring.py --train train.txt --text valid.txt --out benchmarks/results/scoring.json

Without files it takes samples/isizulu.txt for both. The network is the one that ships, in int8; a stream is the text,
or a part of it, in windows. `score` is what `ulimi score` does: lines are encoded, sorted, scored and counted. The
n-gram model is counted from `--train`, in the same tokens, order 6; KenLM reads the same model from an ARPA file that
is written here, probing, and is asked line by line, as its Python module can be. Both must give the same nats.
"""

from common import Turn, arguments, finish, take_turns  # isort: skip

import math
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulimi.corpus import read_lines
from ulimi.engine import EVALUATION_WINDOW, Engine, load_engine
from ulimi.ngram import NgramEngine, count_ngrams
from ulimi.run import open_run
from ulimi.score import score_lines
from ulimi.tokenizer import Tokenizer

ORDER = 6
STREAMS = (1, 10, 64)
SAMPLE = Path(__file__).parent.parent / "samples" / "isizulu.txt"


def by_streams(engine: Engine, ids: NDArray[np.int64], eos_id: int, num: int) -> Turn:
    """Score a text cut into `num` streams of one length."""
    targets = ids[: len(ids) // num * num].reshape(num, -1)
    inputs = np.concatenate([np.full((num, 1), eos_id), targets[:, :-1]], axis=1)

    def turn() -> int:
        state = engine.initial_state(num)
        for start in range(0, targets.shape[1], EVALUATION_WINDOW):
            window = slice(start, start + EVALUATION_WINDOW)
            _, state = engine.nll(inputs[:, window], targets[:, window], state)
        return int(targets.size)

    return turn


def by_lines(engine: Engine, tokenizer: Tokenizer, lines: list[str]) -> Turn:
    """Score lines as `ulimi score` does."""
    return lambda: sum(score.num_tokens for _, score in score_lines(engine, tokenizer, lines))


def write_arpa(engine: NgramEngine, path: Path) -> None:
    """Write an n-gram model in the form that KenLM reads: each token is its id, the last one </s>."""
    eos_id, order = engine.vocab_size - 1, engine.order
    levels: list[list[tuple[tuple[int, ...], float]]] = [[((token,), p) for token, p in enumerate(engine._unigrams_V)]]
    for n in range(1, order):
        before = levels[-1]
        level = []
        keys, shares, gammas = engine._keys[n][:-1], engine._shares[n], engine._gammas[n]
        shorter = dict(before)
        for place, key in enumerate(keys.tolist()):
            context, token = divmod(key, engine.vocab_size)
            gram = (*before[context][0], token)
            level.append((gram, gammas[context] * shorter[gram[1:]] + shares[place]))
        levels.append(level)

    def name(place: int, gram: tuple[int, ...]) -> str:
        token = gram[place]
        return str(token) if token != eos_id else "<s>" if place == 0 and len(gram) > 1 else "</s>"

    with path.open("w", encoding="utf-8") as file:
        # <s> is an <eos> that is read and never predicted.
        counts = [len(level) + 2 * (n == 0) for n, level in enumerate(levels)]
        file.write("\\data\\\n" + "".join(f"ngram {n}={count}\n" for n, count in enumerate(counts, start=1)))
        for n, level in enumerate(levels, start=1):
            file.write(f"\n\\{n}-grams:\n")
            gammas = engine._gammas[n] if n < order else None
            if n == 1 and gammas is not None:
                file.write(f"-99\t<s>\t{math.log10(gammas[eos_id])}\n-99\t<unk>\t0\n")
            for place, (gram, p) in enumerate(level):
                text = " ".join(name(i, gram) for i in range(n))
                ends = n == order or gram[-1] == eos_id
                file.write(f"{math.log10(p)}\t{text}" + ("\n" if ends else f"\t{math.log10(gammas[place])}\n"))
        file.write("\n\\end\\\n")


def of_kenlm(engine: NgramEngine, ids_of_lines: list[list[int]]) -> tuple[Turn, float]:
    """Score lines with KenLM; give the nats, too."""
    import kenlm

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.arpa"
        write_arpa(engine, path)
        model = kenlm.Model(str(path))
    sentences = [" ".join(map(str, ids[:-1])) for ids in ids_of_lines]

    def nats() -> float:
        return -sum(model.score(sentence) for sentence in sentences) * math.log(10)

    def turn() -> int:
        nats()
        return sum(map(len, ids_of_lines))

    return turn, nats()


def main() -> None:
    """See the module."""
    files: dict[str, Any] = {"type": Path, "default": SAMPLE}
    args = arguments(__doc__, train=files, text=files)
    run = open_run(Path("isizulu"))
    tokenizer, engine = run.tokenizer, load_engine(run, kind="onnx")
    lines, training_lines = list(read_lines(args.text)), list(read_lines(args.train))
    if args.tiny:
        lines, training_lines = lines[:20], training_lines[:20]
    ids_of_lines = tokenizer.encode_lines(lines)
    ids = np.array([id for line in ids_of_lines for id in line])
    training_ids = np.array([id for line in tokenizer.encode_lines(training_lines) for id in line])
    ngrams = NgramEngine(count_ngrams(training_ids, tokenizer.vocab_size, ORDER))

    turns: dict[str, Turn] = {}
    for num in STREAMS:
        turns[f"ulimi isizulu, int8, {num} stream{'s' * (num > 1)}"] = by_streams(engine, ids, tokenizer.eos_id, num)
    turns["ulimi isizulu, int8, score"] = by_lines(engine, tokenizer, lines)
    turns["ulimi n-gram, 1 stream"] = by_streams(ngrams, ids, tokenizer.eos_id, 1)
    turns["ulimi n-gram, 64 streams"] = by_streams(ngrams, ids, tokenizer.eos_id, 64)
    turns["ulimi n-gram, score"] = by_lines(ngrams, tokenizer, lines)
    if find_spec("kenlm"):
        ours = sum(score.nats for _, score in score_lines(ngrams, tokenizer, lines))
        turns["KenLM, lines of tokens"], theirs = of_kenlm(ngrams, ids_of_lines)
        print(f"nats: n-gram {ours:.2f}, KenLM {theirs:.2f}")
        assert math.isclose(ours, theirs, rel_tol=1e-4)
    rows = [
        {"contender": name, "tokens_per_s": round(rate, 1)} for name, rate in take_turns(turns, args.rounds).items()
    ]
    facts = {"text": args.text.name, "num_tokens": len(ids), "num_ngrams": sum(ngrams.num_ngrams)}
    finish(args, rows, ("numpy", "onnxruntime", "kenlm"), **facts)


if __name__ == "__main__":
    main()
