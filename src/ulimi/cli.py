"""The command line: `ulimi COMMAND`. Each command imports what it needs when it runs, so that --help is quick.

Results go to standard output, everything else to standard error. A mistake of the user's is one line and exit status 2.
"""

import hashlib
import io
import json
import math
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ulimi
from ulimi.errors import UlimiError, install

if TYPE_CHECKING:
    from ulimi.data import EncodedText
    from ulimi.engine import Engine
    from ulimi.judge import Judgement
    from ulimi.run import Run
    from ulimi.score import Score
    from ulimi.tokenizer import Tokenizer
    from ulimi.words import Word
    from ulimi.writer import Writer

    Scorer = Callable[[Path, EncodedText, Callable[[int], None]], float]
    """a text file and its ids -> nats; told how many tokens are done"""

app = typer.Typer(
    name="ulimi",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

corpus_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Prepare text to train on.")
app.add_typer(corpus_app, name="corpus")

ModelOption = Annotated[
    Path, typer.Option("--model", "-m", metavar="RUN", help="A run folder, a shipped model's name, or hf:USER/NAME.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
EngineOption = Annotated[str, typer.Option(help="auto, onnx (int8) or torch; an n-gram model has none.")]
MarginalOption = Annotated[
    bool, typer.Option("--marginal", help="Add up all ways to cut a word into tokens; up to 7 times slower.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]

DEFAULT_MODEL = Path("isizulu")
"""ships with the package, see `ulimi.run.open_run`"""

FINETUNE = "finetune"
"""the recipe by which a release is trained on, where none is named"""

PROBABILITY_COLOURS = ("green", "cyan", "yellow", "magenta", "red")
"""by `ulimi.words.PROBABILITY_STEPS`"""


EXTRAS = {
    "train": ("torch", "safetensors", "pydantic", "tomli_w", "matplotlib", "onnx"),
    "study": ("sacrebleu", "jiwer", "mauve", "matplotlib"),
}
"""modules that a command may need beyond the light floor"""

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}

# Typer exports only this descendant of the exception that all mistakes in options and arguments are.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line; every mistake of the user's ends here."""
    for stream in (sys.stdout, sys.stderr):
        # What is read is UTF-8, wherever that is; so is what is written.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if sys.stdout is None:
        _fail("standard output is closed; to write nothing, send it to /dev/null")
    try:
        sys.exit(app(prog_name="ulimi", standalone_mode=False))
    except UlimiError as error:
        _fail(str(error))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx is not None else "ulimi"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except OSError as error:
        # Of a copy, both: the disk that is full is the second one's.
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
        where = f"{names}: " if names else ""
        # A name that leads nowhere is no danger to what was saved; a full disk makes one fear for it.
        is_wrong_name = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        _fail(f"{where}{error.strerror or error}" + ("" if is_wrong_name else "; what was saved before is intact"))
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no exception of its own for a CPU without memory.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        _fail(
            "out of memory: try a smaller data.batch_size, data.bptt, model.hidden_size or tokenizer.vocab_size; "
            "to generate, fewer texts (--num) or --beams"
        )
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    if sys.stderr is not None:  # else it would go to standard output
        print(f"ulimi: error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ulimi {ulimi.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, judge and use language models for isiZulu and for languages like it."""


@app.command()
def train(
    corpus: Annotated[
        Path, typer.Argument(help="A folder with train.txt, valid.txt, test.txt, or one text file (split 90/5/5).")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]…", help="Settings; `ulimi recipe default` explains them."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The run folder to make.")] = ...,  # type: ignore[assignment]
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a TOML file.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Finetune: start from this run's weights and tokenizer.")
    ] = None,
    new_tokenizer: Annotated[
        bool, typer.Option("--new-tokenizer", help="With --init-from: a tokenizer of this corpus's own.")
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Distil: learn this model's probabilities, too."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")] = False,
    device: DeviceOption = "auto",
    precision: Annotated[
        str, typer.Option(help="Of products: fp32, bf16, on a GPU also tf32, fp16; auto: bf16 where the device has it.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads (of each process); 0 = all cores.")] = 0,
    processes: Annotated[
        int, typer.Option(min=1, max=1024, help="On a CPU: processes that share the streams, beside threads.")
    ] = 1,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Time between checkpoints in an epoch.")] = 5.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
) -> None:
    """Train a model on a corpus and leave it in a run folder."""
    _need_extra("train")
    import torch

    from ulimi.corpus import open_corpus
    from ulimi.cpu import keep_freed_memory
    from ulimi.engine import choose_device
    from ulimi.progress import TrainingProgress
    from ulimi.recipe import OF_TOKENIZER, OF_WEIGHTS, build_recipe, kept_settings, load_recipe
    from ulimi.run import open_run
    from ulimi.start import check_processes, claim_folder, find_teacher
    from ulimi.train import Interrupted
    from ulimi.train import train as run_training

    if tensorboard and find_spec("tensorboard") is None:
        raise UlimiError(f"--tensorboard needs the tensorboard package: {install('all')}")
    if new_tokenizer and init_from is None:
        raise UlimiError("--new-tokenizer goes with --init-from; a run from scratch trains its own tokenizer anyway")
    if resume and init_from is not None:
        raise UlimiError("--resume continues the run in --out, which remembers where it started: leave out --init-from")
    source = open_run(init_from) if init_from is not None else None
    if source is not None:
        source.need_network("--init-from")
    overrides = settings or []
    teaching = open_run(teacher) if teacher is not None else None
    if teaching is not None:
        if new_tokenizer:
            raise UlimiError("--teacher keeps that model's tokenizer: leave out --new-tokenizer")
        if not resume and any(text.startswith("tokenizer.") for text in overrides):
            raise UlimiError("--teacher keeps that model's tokenizer: leave out the tokenizer settings")
    if source is not None and not new_tokenizer and any(text.startswith("tokenizer.") for text in overrides):
        raise UlimiError("--init-from keeps that run's tokenizer: tokenizer settings need --new-tokenizer")
    begun = open_run(out) if resume and (out / "recipe.toml").is_file() else None
    # A release remembers what suited the text that it was made of.
    is_release = source is not None and not source.has_weights
    if recipe is not None or is_release:
        # What is there stays what it is, whatever a recipe says of a network from scratch.
        there, keys = source or begun, {}
        if source is not None:
            keys = OF_WEIGHTS if new_tokenizer and recipe is not None else {**OF_WEIGHTS, **OF_TOKENIZER}
        elif begun is not None and (begun.meta.get("init_from") or begun.meta.get("teacher")):
            keys = {**OF_WEIGHTS, **OF_TOKENIZER} if begun.meta.get("init_from") else OF_TOKENIZER
        kept = [] if there is None else kept_settings(there.recipe, keys, source=f"{there.dir}/recipe.toml")
        chosen = load_recipe(recipe or FINETUNE, [*kept, *overrides])
    elif begun is not None:
        chosen = build_recipe(begun.recipe, overrides, source=f"{out}/recipe.toml")
    elif source is not None:
        name = f"{source.dir}/recipe.toml"
        chosen = build_recipe(source.recipe, overrides, source=name)
        if chosen.optim.kind == "nt-asgd":
            chosen = build_recipe(source.recipe, ["optim.average_at_start=true", *overrides], source=name)
    else:
        chosen = load_recipe(None, overrides)
    keep_freed_memory()
    if threads or processes > 1:
        torch.set_num_threads(threads or max(1, torch.get_num_threads() // processes))

    # A wrong command must not replace the split that a run in --out was trained on.
    check_processes(processes, chosen, choose_device(device))
    old = claim_folder(out, chosen, resume=resume, init_from=source)
    find_teacher(teaching, old, source, chosen)
    with tempfile.TemporaryDirectory(prefix="ulimi-") as scratch:
        another_text = resume and _is_of_another_text(out / "corpus", corpus)
        parts = open_corpus(corpus, Path(scratch) if another_text else out / "corpus")
        report = parts.report
        with _stop_on_signals() as should_stop, TrainingProgress(chosen.optim.max_epochs) as progress:
            progress.note(
                f"{corpus}: {report['train_lines']:,} training, {report['valid_lines']:,} validation, "
                f"{report['test_lines']:,} test lines; near-duplicates of held-out lines: "
                f"{report['near_duplicates']:,} kept, {report['near_duplicates_removed']:,} removed from training"
            )
            if source is not None and chosen.alpha != source.alpha:
                progress.note(
                    f"{source.name} was trained with another loss.kind or loss.alpha: its probabilities begin wrong"
                )
            try:
                score = run_training(
                    parts, out, chosen, init_from=source, new_tokenizer=new_tokenizer, teacher=teaching, resume=resume,
                    device=device, precision=precision, processes=processes, checkpoint_minutes=checkpoint_minutes,
                    tensorboard=tensorboard, reporter=progress, should_stop=should_stop,
                )  # fmt: skip
            except Interrupted:
                same = f" --threads {threads}" * (threads > 0) + f" --device {device}" * (device != "auto")
                same += f" --precision {precision}" * (precision != "auto") + " --tensorboard" * tensorboard
                same += f" --processes {processes}" * (processes > 1)
                again = f"ulimi train {corpus} --out {out} --resume{same}"
                progress.note(f"stopped; everything is saved. Continue with: {again}")
                raise typer.Exit(130) from None
    from ulimi.info import score_text

    typer.echo(f"validation, one stream: {score_text(score)}")
    typer.echo(f"the model is in {out}; try: ulimi generate -m {out}")


@app.command()
def ngram(
    corpus: Annotated[
        Path, typer.Argument(help="A folder with train.txt, valid.txt, test.txt, or one text file (split 90/5/5).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The run folder to make.")],
    order: Annotated[int, typer.Option(help="Tokens of the longest n-grams.")] = 6,
    tokenizer_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Take this run's tokenizer, to stand beside its model.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Else train one: bpe (default), unigram, word or char;")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="of this many tokens (4000; words and characters: all of them);")
    ] = None,
    min_frequency: Annotated[int | None, typer.Option(help="of what occurs at least as often (1).")] = None,
) -> None:
    """Make an n-gram model of a corpus, the baseline, in a run folder; export and release need a network."""
    from ulimi.baseline import TokenizerSettings, make_ngram_run
    from ulimi.info import score_text

    settings = TokenizerSettings(tokenizer_from, kind, vocab_size, min_frequency)
    score = make_ngram_run(corpus, out, order=order, settings=settings, note=lambda text: typer.echo(text, err=True))
    typer.echo(f"validation: {score_text(score.as_dict())}")
    typer.echo(f"the model is in {out}; try: ulimi evaluate FILE -m {out} --stateless")


@app.command()
def mix(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders, shipped models' names, hf:USER/NAME.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The run folder to make.")],
    tune: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Find the weights by this text, which no model was trained on.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Or say them: once for each model, in their order, 1 in all.")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Average the probabilities of models that share a tokenizer: a network and an n-gram model, several networks."""
    from ulimi.info import score_text
    from ulimi.mixture import make_mixture_run
    from ulimi.run import open_run

    names = [str(path) for path in runs]
    mixed = make_mixture_run(
        [open_run(path) for path in runs], names, out, weights=weight, tune_on=tune, device=device, kind=engine
    )
    if mixed.together is not None:
        _warn_unknown(str(tune), mixed.num_unknown)
        table = [("model", "weight", "bits/char alone")] + [
            (name, f"{share:.4f}", f"{score.bits_per_char:.4f}")
            for name, share, score in zip(names, mixed.weights, mixed.alone, strict=True)
        ]
        _print_table(table)
        typer.echo(f"together: {score_text(mixed.together.as_dict())}")
    typer.echo(f"the model is in {out}; try: ulimi generate -m {out}")


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Text files, plain, .gz or .zst.")],
    model: ModelOption = DEFAULT_MODEL,
    stateless: Annotated[bool, typer.Option("--stateless", help="Each line by itself, not one stream.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Mix in a neural cache.")] = False,
    cache_theta: Annotated[float | None, typer.Option(help="Flatness of the cache (2.0).")] = None,
    cache_lambda: Annotated[float | None, typer.Option(help="Share of the cache (0.1).")] = None,
    cache_window: Annotated[int | None, typer.Option(max=10**9, help="Tokens that it remembers (2000).")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Dynamic evaluation: learn while reading.")] = False,
    dynamic_lr: Annotated[float | None, typer.Option(help="Its learning rate (7e-5).")] = None,
    dynamic_decay: Annotated[float | None, typer.Option(help="Its pull to the trained weights (0.01).")] = None,
    dynamic_epsilon: Annotated[float | None, typer.Option(help="Added to the gradients' RMS (2e-5).")] = None,
    dynamic_window: Annotated[int | None, typer.Option(help="Tokens scored, then learned from, at once (10).")] = None,
    stats_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Training text for --dynamic's statistics; a mixture's networks share it."),
    ] = None,
    marginal: MarginalOption = False,
    keystrokes: Annotated[
        bool, typer.Option("--keystrokes", help="The share of keystrokes that suggestions spare, instead.")
    ] = False,
    suggestions: Annotated[int | None, typer.Option(min=1, help="Those that --keystrokes looks at (3).")] = None,
    max_lines: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="--keystrokes: the first lines of a file only.")
    ] = None,
    distribution: Annotated[
        bool, typer.Option("--distribution", help="Epsilon-perplexity, sparsemax score, JS divergence, instead.")
    ] = False,
    epsilon: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="--distribution: added to probabilities (1e-5).")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score text files: perplexity, bits per character, bits per byte; a row a file and one for all."""
    from ulimi.data import encode_file
    from ulimi.engine import load_engine
    from ulimi.progress import counting
    from ulimi.run import open_run
    from ulimi.score import Score

    if engine == "onnx" and (cache or dynamic):
        raise UlimiError("--engine onnx: --cache and --dynamic look inside the network and need --engine torch")
    if stateless and (cache or dynamic):
        raise UlimiError("--stateless reads each line by itself; --cache and --dynamic need one stream")
    if keystrokes and (cache or dynamic or stateless):
        raise UlimiError("--keystrokes types each line by itself; leave out --cache, --dynamic and --stateless")
    if distribution and (cache or dynamic or stateless or keystrokes):
        raise UlimiError("--distribution reads one stream; leave out --cache, --dynamic, --stateless and --keystrokes")
    if marginal and (cache or dynamic or keystrokes or distribution):
        raise UlimiError("--marginal: leave out --cache, --dynamic, --keystrokes and --distribution")
    if epsilon is not None and not distribution:
        raise UlimiError("--epsilon goes with --distribution")
    if not keystrokes and (suggestions or max_lines):
        raise UlimiError(f"--{'suggestions' if suggestions else 'max-lines'} goes with --keystrokes")
    cache_settings = _settings_of("--cache", cache, theta=cache_theta, lambda_=cache_lambda, window=cache_window)
    dynamic_settings = _settings_of(
        "--dynamic", dynamic, lr=dynamic_lr, decay=dynamic_decay, epsilon=dynamic_epsilon, window=dynamic_window
    )
    if stats_from is not None and not dynamic:
        raise UlimiError("--stats-from goes with --dynamic")
    run = open_run(model)
    if keystrokes:
        _evaluate_keystrokes(run, load_engine(run, device, kind=engine), files, suggestions or 3, max_lines, as_json)
        return
    if distribution:
        scored = load_engine(run, device, kind=engine, exact=True)
        _evaluate_distribution(run, scored, files, epsilon, as_json)
        return
    scorer: Scorer
    if cache or dynamic:
        asked = "--dynamic" if dynamic else "--cache"
        run.networks(asked)  # whoever has none needs no PyTorch either
        _need_extra("train", asked)
        from ulimi.adapt import Cache, Dynamic
        from ulimi.cpu import keep_freed_memory

        keep_freed_memory()
        scorer = _adaptive_scorer(
            run, device, stats_from,
            Cache(**cache_settings) if cache else None,
            Dynamic(**dynamic_settings) if dynamic else None,
        )  # fmt: skip
    else:
        scorer = _static_scorer(run, load_engine(run, device, kind=engine, exact=True), stateless, marginal)
    _note_smoothed(run)
    rows: list[tuple[str, Score]] = []
    told = {"marginal": True} if marginal else {}
    for path in files:
        with counting(f"reading {path}") as on_tokens:
            text = encode_file(path, run.tokenizer)
            _warn_unknown(path, text.num_unknown)
            nats = scorer(path, text, on_tokens)
        if not math.isfinite(nats):
            rates = {
                "--cache-theta": cache_theta, "--dynamic-lr": dynamic_lr, "--dynamic-epsilon": dynamic_epsilon
            }  # fmt: skip
            given = [f"{option} {value}" for option, value in rates.items() if value is not None]
            cause = f"; too extreme may be {' or '.join(given)}" if given else ", which its weights may be to blame for"
            raise UlimiError(f"{path}: the model's probabilities are no numbers{cause}")
        rows.append((str(path), Score.of(nats, len(text.ids), text.stats)))
        if as_json:
            typer.echo(json.dumps({"file": str(path), **rows[-1][1].as_dict(), **told}))
    if len(files) > 1:
        first, *others = (file_score for _, file_score in rows)
        rows.append(("all", sum(others, start=first)))
        if as_json:
            typer.echo(json.dumps({"file": "all", **rows[-1][1].as_dict(), **told}))
    if not as_json:
        _print_scores(rows)


def _evaluate_keystrokes(
    run: "Run", engine: "Engine", files: list[Path], num: int, max_lines: int | None, as_json: bool
) -> None:
    from itertools import islice

    from ulimi.corpus import read_lines
    from ulimi.keystrokes import Keystrokes, count_keystrokes
    from ulimi.progress import counting
    from ulimi.suggest import Suggester

    suggester = Suggester(engine, run.tokenizer)
    rows: list[tuple[str, Keystrokes]] = []
    for path in files:
        with counting(f"typing {path}, lines") as on_lines:
            rows.append((str(path), count_keystrokes(suggester, islice(read_lines(path), max_lines), num, on_lines)))
        if not rows[-1][1].num_chars:
            raise UlimiError(f"{path}: the text is empty")
    if len(rows) > 1:
        rows.append(("all", sum((cost for _, cost in rows), start=Keystrokes())))
    if as_json:
        for name, cost in rows:
            typer.echo(json.dumps({"file": name, "suggestions": num, **cost.as_dict()}))
        return
    header = ("file", "chars", "keystrokes", "words", "taken", "spared")
    _print_table([header] + [
        (
            name, f"{cost.num_chars:,}", f"{cost.num_keystrokes:,}", f"{cost.num_words:,}", f"{cost.num_taken:,}",
            f"{cost.spared:.2%}",
        )
        for name, cost in rows
    ])  # fmt: skip


def _evaluate_distribution(
    run: "Run", engine: "Engine", files: list[Path], epsilon: float | None, as_json: bool
) -> None:
    from ulimi.data import encode_file
    from ulimi.distribution import EPSILON
    from ulimi.progress import counting
    from ulimi.score import DistributionScore, score_distribution

    rows: list[tuple[str, DistributionScore]] = []
    for path in files:
        with counting(f"reading {path}") as on_tokens:
            text = encode_file(path, run.tokenizer)
            _warn_unknown(path, text.num_unknown)
            rows.append((str(path), score_distribution(
                engine, text.ids, run.tokenizer.eos_id, EPSILON if epsilon is None else epsilon, on_tokens
            )))  # fmt: skip
    if len(rows) > 1:
        first, *others = (score for _, score in rows)
        rows.append(("all", sum(others, start=first)))
    table = [("file", "tokens", "epsilon", "eps-ppl", "sparsemax", "JS", "support", "impossible")]
    for name, score in rows:
        scores = score.as_dict()
        if as_json:
            typer.echo(json.dumps({"file": name, **scores}))
        perplexity = scores["epsilon_perplexity"]
        table.append((
            name, f"{scores['num_tokens']:,}", f"{scores['epsilon']:g}",
            "inf" if perplexity is None else f"{perplexity:.2f}", f"{scores['sparsemax_score']:.4f}",
            f"{scores['js_divergence']:.4f}", f"{scores['support']:.1f}", f"{scores['impossible']:.2%}",
        ))  # fmt: skip
    if not as_json:
        _print_table(table)


def _settings_of(switch: str, on: bool, **given: float | None) -> dict[str, Any]:
    """Collect those of a switch's options that were given; they mean nothing without it."""
    known = {name: value for name, value in given.items() if value is not None}
    if known and not on:
        option = f"{switch}-{next(iter(known)).rstrip('_')}"
        raise UlimiError(f"{option} goes with {switch}")
    return known


def _static_scorer(run: "Run", engine: "Engine", stateless: bool, marginal: bool) -> "Scorer":
    from ulimi.corpus import read_lines
    from ulimi.marginal import Marginal
    from ulimi.score import score_lines, score_stream

    words = Marginal(engine, run.tokenizer) if marginal else None

    def one_stream(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        if words is not None:
            return words.score_stream(text.ids, on_tokens)
        return score_stream(engine, text.ids, run.tokenizer.eos_id, on_tokens)

    def lines_alone(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        nats, done = 0.0, 0
        rows = None if words is None else words.score_rows
        for _, score in score_lines(engine, run.tokenizer, read_lines(path), score_rows=rows):
            nats += score.nats
            done += score.num_tokens
            on_tokens(done)
        return nats

    return lines_alone if stateless else one_stream


def _adaptive_scorer(run: "Run", device: str, stats_from: Path | None, cache: Any, dynamic: Any) -> "Scorer":
    from ulimi.adapt import load_adaptive
    from ulimi.progress import counting

    with counting("gradient statistics of the training text, batch") as on_batches:
        nats = load_adaptive(run, device, cache=cache, dynamic=dynamic, stats_from=stats_from, on_batches=on_batches)

    def adapting(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        return nats(text.ids, on_tokens)

    return adapting


@app.command()
def score(
    model: ModelOption = DEFAULT_MODEL,
    file: Annotated[str, typer.Argument(help="A text file; - is standard input.")] = "-",
    words: Annotated[bool, typer.Option("--words", help="A row a word: its surprisal, in bits.")] = False,
    marginal: MarginalOption = False,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score each line by itself: a row a line, for filtering corpora and ranking candidates; or a row a word."""
    from ulimi.engine import load_engine
    from ulimi.marginal import Marginal
    from ulimi.run import open_run

    if words and marginal:
        raise UlimiError("--words and --marginal are two ways to score; choose one")
    run = open_run(model)
    scorer = load_engine(run, device, kind=engine, exact=True)
    tokenizer = run.tokenizer
    if words:
        heading, rows = "line\tbits\ttokens\tword\n", _word_rows(scorer, tokenizer, file, as_json)
    else:
        score_rows = Marginal(scorer, tokenizer).score_rows if marginal else None
        _note_smoothed(run)
        heading = "nats\ttokens\tchars\tbits_per_char\ttext\n"
        rows = _line_rows(scorer, tokenizer, file, as_json, score_rows)
    # A file that cannot be read is found with its first line: then there is no table to head.
    heading = "" if as_json else heading
    num_unknown = 0
    for line, printed in rows:
        if tokenizer.unk_id is not None:
            num_unknown += tokenizer.encode(line).count(tokenizer.unk_id)
        typer.echo(heading + printed)
        heading = ""
    typer.echo(heading, nl=False)
    _warn_unknown("standard input" if file == "-" else file, num_unknown)


def _line_rows(
    engine: "Engine", tokenizer: "Tokenizer", file: str, as_json: bool,
    score_rows: Callable[[list[list[int]]], list[float]] | None,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Give each line, and its score as it is printed; `score_rows` is what `--marginal` scores with."""
    from ulimi.corpus import read_lines
    from ulimi.score import score_lines

    told = {} if score_rows is None else {"marginal": True}
    # Who types lines wants each answer at once; a file is faster in batches.
    at_once = 1 if file == "-" and sys.stdin is not None and sys.stdin.isatty() else 256
    for line, s in score_lines(engine, tokenizer, read_lines(file), lines_at_once=at_once, score_rows=score_rows):
        if as_json:
            yield line, json.dumps({"text": line, **s.as_dict(), **told}, ensure_ascii=False)
        else:
            yield line, f"{s.nats:.4f}\t{s.num_tokens}\t{s.num_chars}\t{s.bits_per_char:.4f}\t{line}"


def _word_rows(engine: "Engine", tokenizer: "Tokenizer", file: str, as_json: bool) -> Iterator[tuple[str, str]]:
    """Give each line, and the surprisals of its words as they are printed."""
    from ulimi.corpus import read_lines
    from ulimi.surprisal import score_words
    from ulimi.tokenizer import EOS

    for number, (line, scored) in enumerate(score_words(engine, tokenizer, read_lines(file)), start=1):
        told = scored.as_dict()
        if as_json:
            yield line, json.dumps({"text": line, **told}, ensure_ascii=False)
        else:
            rows = [(word.bits, word.num_tokens, word.text.strip()) for word in scored.words]
            rows.append((told["end_bits"], scored.end_tokens, EOS))
            yield line, "\n".join(f"{number}\t{bits:.4f}\t{n}\t{text}" for bits, n, text in rows)


@app.command()
def judge(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="RUN", help=f"A run folder, or a shipped model's name ({DEFAULT_MODEL})."
        ),
    ] = None,
    hf: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead: a Hugging Face causal model's local folder.")
    ] = None,
    phenomenon: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Pairs a phenomenon (200).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same pairs (0).")] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own pairs: phenomenon, good, bad, tabs between.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the pairs; without a model judge none.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Also print the pairs that are judged wrongly.")] = False,
    marginal: MarginalOption = False,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ask minimal pairs of isiZulu grammar: how often is the correct sentence the more probable one?"""
    from ulimi import grammar
    from ulimi.engine import load_engine
    from ulimi.judge import hf_scorer, read_pairs, run_scorer, write_pairs
    from ulimi.judge import judge as judge_pairs
    from ulimi.run import open_run

    if model is not None and hf is not None:
        raise UlimiError(f"judge takes one model: --model {model} and --hf {hf} are two")
    if marginal and (hf is not None or (model is None and write is not None)):
        raise UlimiError("--marginal: needs a model of ulimi's, --model RUN; leave it out with --hf, or to write pairs")
    if model is None and hf is None and write is None:
        model = DEFAULT_MODEL
    chosen = [*dict.fromkeys(phenomenon or [])]
    if pairs is None:
        for name in chosen:
            grammar.check_phenomenon(name)
        asked = [pair for name in chosen or grammar.phenomena() for pair in grammar.pairs(name, num or 200, seed or 0)]
    else:
        for option, value in (("--num", num), ("--seed", seed)):
            if value is not None:
                raise UlimiError(
                    f"{option} {value} chooses among ulimi's own pairs; all of {pairs} are asked: leave it out"
                )
        asked = read_pairs(pairs)
        known = dict.fromkeys(pair.phenomenon for pair in asked)
        if absent := [name for name in chosen if name not in known]:
            raise UlimiError(f"--phenomenon {absent[0]}: {pairs} has {', '.join(known)}")
        asked = [pair for pair in asked if not chosen or pair.phenomenon in chosen]
    if write is not None:
        write_pairs(write, asked)
    if hf is not None:
        scorer = hf_scorer(hf)
    elif model is not None:
        run = open_run(model)
        scorer = run_scorer(load_engine(run, device, kind=engine, exact=True), run.tokenizer, marginal)
        if run.tokenizer.unk_id is not None:
            words = {word for pair in asked for word in f"{pair.good} {pair.bad}".split()}
            num_unknown = sum(run.tokenizer.unk_id in run.tokenizer.encode(word) for word in words)
            _warn_unknown("the pairs", num_unknown)
    else:
        return
    _print_judgement(judge_pairs(scorer, asked), show, as_json)


def _print_judgement(judgement: "Judgement", show: bool, as_json: bool) -> None:
    wrong = [verdict for verdict in judgement.verdicts if verdict.credit < 1] if show else []
    if as_json:
        for verdict in wrong:
            record = {**asdict(verdict.pair), "good_nats": verdict.good_nats, "bad_nats": verdict.bad_nats}
            typer.echo(json.dumps(record, ensure_ascii=False))
        for row in judgement.rows:
            typer.echo(json.dumps(row.as_dict(), ensure_ascii=False))
        typer.echo(json.dumps({"phenomenon": "mean", "accuracy": judgement.mean, "couples": judgement.couple_mean}))
        return
    for verdict in wrong:
        pair = verdict.pair
        typer.echo(f"{pair.phenomenon}\t{verdict.good_nats:.3f}\t{verdict.bad_nats:.3f}\t{pair.good}\t*{pair.bad}")
    width = max(len(name) for name in ("phenomenon", *(row.phenomenon for row in judgement.rows)))
    typer.echo(f"{'phenomenon':<{width}}\tpairs\taccuracy\tlow\thigh\tcouples")
    for row in judgement.rows:
        low, high = row.interval
        couples = _share(row.couple_accuracy)
        typer.echo(f"{row.phenomenon:<{width}}\t{row.num}\t{_share(row.accuracy)}   \t{low:.3f}\t{high:.3f}\t{couples}")
    mean, couples = _share(judgement.mean), _share(judgement.couple_mean)
    typer.echo(f"{'mean':<{width}}\t{len(judgement.verdicts)}\t{mean}   \t\t\t{couples}")
    typer.echo(
        "accuracy: share of pairs whose correct sentence is the more probable; low, high: its 95 % interval; "
        "couples: share of mirrored couples whose two correct sentences together are; chance is 50 %",
        err=True,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command()
def generate(
    model: ModelOption = DEFAULT_MODEL,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]…", help="None: a new text. It may end inside a word.")
    ] = None,
    prompts_from: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; - is standard input.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Texts a prompt; with --beams the best ones.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1 surer, above more varied, 0 the likeliest (1).")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Entmax: 1 = softmax … 2 = sparsemax (the model's own).")] = None,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the likeliest tokens that hold this much (1 = all; 0.8 if alone)."),
    ] = None,
    min_p: Annotated[
        float, typer.Option(help="Choose among tokens at least so likely, the best being 1; 0 = all.")
    ] = 0.0,
    typical: Annotated[float, typer.Option(help="Choose among the most typical that hold this much; 1 = all.")] = 1.0,
    contrastive: Annotated[
        float | None, typer.Option(metavar="PENALTY", help="Contrastive search, 0 to 1, among --top-k tokens (5).")
    ] = None,
    beams: Annotated[int | None, typer.Option(help="Beam search of this width.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of beams, kept apart by --diversity (1).")] = None,
    diversity: Annotated[float | None, typer.Option(help="Nats a token loses that another group chose (0.5).")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Beams: 0 shortest, 1 mean log-probability, more: longer (1).")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes unlikely.")] = 1.0,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="No n tokens in a row twice; 0 = off.")] = 0,
    ban: Annotated[list[str] | None, typer.Option(metavar="WORD", help="Never this word; may be repeated.")] = None,
    require: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="With --beams: this word must come; may be repeated.")
    ] = None,
    end: Annotated[str, typer.Option(help="End at: never, paragraph (line end) or sentence.")] = "never",
    stop: Annotated[
        list[str] | None, typer.Option(help=r"End before this string (\n: line end); may be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens after the prompt.")] = 100,
    max_words: Annotated[int, typer.Option(min=0, help="Longest text, in words; 0 = no limit.")] = 0,
    max_chars: Annotated[int, typer.Option(min=0, help="Longest text, in characters; words stay whole.")] = 0,
    min_tokens: Annotated[int, typer.Option(min=0, help="With --end: not before so many tokens.")] = 0,
    min_words: Annotated[int, typer.Option(min=0, help="With --end: not before so many words.")] = 0,
    min_chars: Annotated[int, typer.Option(min=0, help="With --end: not before so many characters.")] = 0,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Show how probable each word was.")] = False,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write text, whole words as they come: by sampling, beam search or contrastive search."""
    import secrets

    from ulimi.beam import Beams
    from ulimi.corpus import read_lines
    from ulimi.engine import load_engine
    from ulimi.run import open_run
    from ulimi.words import Ending
    from ulimi.writer import Writer, Writing, choose_sampling

    if prompts_from is not None and prompts:
        raise UlimiError(f"prompts are given twice: {prompts[0]!r} and --prompts {prompts_from}; choose one")
    beam_options = {"--groups": groups, "--diversity": diversity, "--length-penalty": length_penalty}
    if beams is None and (given := [name for name, value in beam_options.items() if value is not None]):
        raise UlimiError(f"{given[0]} goes with --beams")
    if diversity is not None and groups in (None, 1):
        raise UlimiError("--diversity keeps groups of beams apart: it goes with --groups, 2 or more")
    searching = "--beams" if beams is not None else "--contrastive" if contrastive is not None else None
    sampled = {
        "--temperature": temperature is not None, "--alpha": alpha is not None, "--top-p": top_p is not None,
        "--min-p": min_p != 0, "--typical": typical != 1, "--top-k": top_k != 0 and contrastive is None,
        "--seed": seed is not None,
    }  # fmt: skip
    if searching and (given := [name for name, is_given in sampled.items() if is_given]):
        raise UlimiError(f"{given[0]} is for sampling; {searching} chooses without chance: leave one of them out")
    opened = open_run(model)
    loaded = load_engine(opened, device, kind=engine)
    writing = Writing(
        sampling=choose_sampling(
            loaded, temperature=temperature, alpha=alpha, top_k=top_k or None, top_p=top_p, min_p=min_p or None,
            typical=None if typical == 1 else typical,
        ),
        ending=Ending(
            max_tokens=max_tokens, at=end, stops=tuple(text.replace("\\n", "\n") for text in stop or []),
            max_words=max_words, max_chars=max_chars,
            min_tokens=min_tokens, min_words=min_words, min_chars=min_chars,
        ),
        beams=None if beams is None else Beams(
            num=beams, num_groups=1 if groups is None else groups, diversity=0.5 if diversity is None else diversity,
            length_penalty=1.0 if length_penalty is None else length_penalty,
        ),
        contrastive=contrastive, repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram,
        banned=tuple(ban or []), required=tuple(require or []),
    )  # fmt: skip
    writer = Writer(loaded, opened.tokenizer, writing)
    says_seed = seed is None and not searching
    if seed is None:
        seed = secrets.randbelow(2**31)
    lines = read_lines(prompts_from) if prompts_from is not None else prompts or [""]
    for index, prompt in enumerate(lines):
        if index == 0 and says_seed:
            typer.echo(f"seed {seed}", err=True)
        if index and not as_json:
            typer.echo("")
        _generate_one(writer, prompt, num, None if searching else seed, probabilities, as_json)


def _generate_one(
    writer: "Writer", prompt: str, num: int, seed: int | None, probabilities: bool, as_json: bool
) -> None:
    """Write the texts of one prompt: one as it comes, several when they are complete."""
    streaming = num == 1 and not as_json
    before = writer.prompt_words(prompt) if probabilities else []
    shown = 0  # characters of the first words that are on the screen already

    def show(word: "Word") -> None:
        nonlocal shown
        _echo_words([replace(word, text=word.text[shown:])], probabilities)
        shown = max(0, shown - len(word.text))

    if streaming:
        if probabilities:
            _echo_words(before, probabilities)
        else:
            typed = writer.split(prompt)
            _echo_text(typed.prompt)
            shown = len(typed.typed)
    texts = writer.write(prompt, num=num, seed=seed or 0, on_word=show if streaming else None)
    if streaming:
        typer.echo("")
        return
    for row, text in enumerate(texts):
        if as_json:
            record = text.as_dict(row, seed, before if probabilities else None)
            typer.echo(json.dumps(record, ensure_ascii=False))
            continue
        if row:
            typer.echo("")
        if text.score is not None:
            typer.echo(f"{-text.nats:.2f}\t", nl=False)
        if probabilities:
            _echo_words([*before, *text.words], probabilities)
        else:
            _echo_text(text.text)
        typer.echo("")


def _echo_words(words: "Sequence[Word]", probabilities: bool) -> None:
    """Print words without a line end; with their probabilities, in colour on a terminal and in brackets elsewhere."""
    from ulimi.words import PROBABILITY_STEPS

    for word in words:
        if not probabilities or not word.text.strip():
            _echo_text(word.text)
            continue
        p = math.exp(word.logprob)
        colour = next(name for least, name in zip(PROBABILITY_STEPS, PROBABILITY_COLOURS, strict=True) if p >= least)
        text = _printable(word.text)
        body = text.lstrip()
        typer.echo(text[: len(text) - len(body)] + typer.style(body, fg=colour) + f"[{p:.2g}]", nl=False)
    sys.stdout.flush()


def _echo_text(text: str) -> None:
    typer.echo(_printable(text), nl=False)
    sys.stdout.flush()


def _printable(text: str) -> str:
    """Show control characters on a terminal: a byte-level vocabulary holds every one of them, ESC too."""
    return text.translate(CONTROL_PICTURES) if sys.stdout.isatty() else text


@app.command()
def suggest(
    text: Annotated[str, typer.Argument(metavar="PREFIX", help="The text typed so far; - reads one a line.")],
    model: ModelOption = DEFAULT_MODEL,
    num: Annotated[int, typer.Option(min=1, help="Words at most.")] = 5,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Suggest whole words, with probabilities: how the word begun may end, or, after a space, the next one."""
    from ulimi.corpus import read_lines
    from ulimi.engine import load_engine
    from ulimi.run import open_run
    from ulimi.suggest import Suggester

    run = open_run(model)
    suggester = Suggester(load_engine(run, device, kind=engine), run.tokenizer)
    for index, typed in enumerate(read_lines("-") if text == "-" else [text]):
        found = suggester.search(typed, num)
        if as_json:
            typer.echo(json.dumps(found.as_dict(typed), ensure_ascii=False))
            continue
        if index:
            typer.echo("")
        for suggestion in found.words:
            typer.echo(f"{suggestion.word}\t{suggestion.probability:.4f}")


@app.command()
def serve(
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let this site's pages ask, too; may be repeated.")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer over HTTP, in JSON: generate, suggest and score; with a page to try them on. Ctrl-C ends it."""
    from ulimi.engine import load_engine
    from ulimi.run import open_run
    from ulimi.serve import LOOPBACK, Service, listen, make_app, make_server, url_of

    run = open_run(model)
    service = Service(run.title, load_engine(run, device, kind=engine), run.tokenizer)
    app = make_app(service, allow_origin or [], any_host=host not in LOOPBACK)
    with listen(host, port) as listener:
        typer.echo(f"{url_of(listener)} serves {model}; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[listener])


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A held-out text: first words of its lines are the prompts.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of the study.")],
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", "-m", metavar="RUN", help="Several are set side by side (the shipped isizulu)."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, spread evenly over the text.")] = 100,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 5,
    max_words: Annotated[int, typer.Option(min=1, help="Longest text, in words; it ends with its paragraph.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Times that chance is tried.")] = 3,
    strategy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only those that begin like this; may be repeated.")
    ] = None,
    attested: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A large text, or a word list: which words are known.")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compare every decoding strategy on prompts from a text; stopped, the same command goes on."""
    _need_extra("study")
    from ulimi.corpus import read_lines
    from ulimi.data import encode_file
    from ulimi.engine import load_engine
    from ulimi.progress import working
    from ulimi.report import markdown_table, model_table, write_report
    from ulimi.run import open_run
    from ulimi.score import score_distribution
    from ulimi.study import Attested, Model, Settings, Study, choose_strategies, cut_prompts, digest_of, strategies

    runs = [open_run(path) for path in models or [DEFAULT_MODEL]]
    names = [run.title for run in runs]
    if len(set(names)) < len(names):
        raise UlimiError(f"--model: the runs must have different names; got {', '.join(names)}")
    loaded = [
        Model(name, digest_of(run.model_files()), load_engine(run, device, kind=engine), run.tokenizer)
        for name, run in zip(names, runs, strict=True)
    ]
    chosen = strategy or []
    choose_strategies(chosen, [known for model in loaded for known in strategies(model.engine.alpha, max_words)])
    known = Attested(attested) if attested else None
    with file.open("rb") as text:
        sha256 = hashlib.file_digest(text, "sha256").hexdigest()
    settings = Settings(
        file=file.name, file_sha256=sha256, prompts=tuple(cut_prompts(read_lines(file), num_prompts, prompt_words)),
        seeds=tuple(range(1, seeds + 1)), max_words=max_words, models=tuple((m.name, m.digest) for m in loaded),
    )  # fmt: skip
    made = Study(out, settings)
    with working() as say:
        own = {}
        for model, run in zip(loaded, runs, strict=True):
            say(f"{model.name}: its distributions on {file}")
            scores = score_distribution(model.engine, encode_file(file, run.tokenizer).ids, run.tokenizer.eos_id)
            own[model.name] = scores.as_dict()
        rows = made.run(loaded, chosen, known, lambda what, done, total: say(f"{done}/{total} {what}"))
    notes = [
        f"{len(settings.prompts)} prompts of {prompt_words} words from {file.name}; seeds {settings.seeds}; at most "
        f"{max_words} words, up to the end of the paragraph. Intervals are 95 %.",
    ]
    if attested:
        notes.append(f"attested: words of {', '.join(f'{p.parent.name}/{p.name}' for p in attested)}")
    write_report(out, f"Decoding strategies on {file.name}", notes, own, rows)
    typer.echo(f"{model_table(own)}\n\n{markdown_table(rows)}\n\n{out}/index.html shows samples and plots")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    valid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Validation text, if it is not where the run remembers it.")
    ] = None,
) -> None:
    """Write model.onnx, int8, which runs without PyTorch; training ends with this by itself."""
    from ulimi.run import open_run

    opened = open_run(run)
    if opened.origin is not None:
        raise UlimiError(f"ulimi export: {run} is a model of the hub; allowed: a run folder, which it writes into")
    opened.need_weights("ulimi export")
    _need_extra("train")
    from ulimi.data import encode_file
    from ulimi.export import describe_export, export_onnx
    from ulimi.files import write_json

    valid_path = valid or opened.text_path("valid")
    if valid_path is None:
        raise UlimiError(f"{run}: its validation text is not where it was: name it with --valid")
    result = export_onnx(opened, encode_file(valid_path, opened.tokenizer))
    # Read again: a training may have gone on, or ended, meanwhile.
    write_json(run / "meta.json", {**open_run(run).meta, "onnx": result})
    typer.echo(f"{run}/model.onnx: {describe_export(result)}")


@app.command()
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make.")],
    card: Annotated[Path, typer.Option(metavar="FILE", help="Its model card: licence, attribution, limits.")],
) -> None:
    """Make the folder of a model that is to be given away: the int8 graph, no float weights, no local paths."""
    _need_extra("train")
    from ulimi.release import release as make_release
    from ulimi.run import open_run

    num_bytes = make_release(open_run(run), out, card)
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB; try: ulimi generate -m {out}")


@app.command()
def web(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make.")],
    model: ModelOption = DEFAULT_MODEL,
    libraries: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Take the JavaScript libraries from here, a lib/ or node_modules; not by npm."
        ),
    ] = None,
) -> None:
    """Make a web page with the model in it: it suggests and writes in the browser, without a server of ulimi's."""
    from ulimi.run import open_run
    from ulimi.web_folder import write_web_folder

    num_bytes = write_web_folder(open_run(model), out, libraries=libraries)
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB; try: python3 -m http.server -d {shlex.quote(str(out))}")


@app.command()
def hub(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make.")],
    model: ModelOption = DEFAULT_MODEL,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="For the card's head, as the hub calls it: cc-by-sa-4.0."),
    ] = None,
    languages: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", help="Likewise: zu; may be repeated.")
    ] = None,
) -> None:
    """Make a folder that Hugging Face's transformers loads without ulimi, to be put on its hub, say."""
    _need_extra("train")
    from ulimi.hub_folder import write_hub_folder
    from ulimi.run import open_run

    num_bytes = write_hub_folder(open_run(model), out, licence=licence, languages=tuple(languages or ()))
    typer.echo(
        f"{out}: {num_bytes / 1e6:.1f} MB; try: AutoModelForCausalLM.from_pretrained({str(out)!r}, "
        f"trust_remote_code=True), or: hf upload USER/NAME {shlex.quote(str(out))}"
    )


@app.command()
def info(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, a shipped model's name, or hf:USER/NAME.")
    ] = DEFAULT_MODEL,
    as_json: JsonOption = False,
) -> None:
    """Say what a run is: how it was trained, its scores, its curve."""
    from ulimi.info import summary
    from ulimi.run import AWD_LSTM, open_run

    opened = open_run(run)
    if as_json:
        facts = {**opened.meta, "config": opened.config}
        if opened.kind == AWD_LSTM:
            facts |= {"recipe": opened.recipe, "metrics": opened.metrics()}
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    rows = summary(opened)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]…")] = None,
) -> None:
    """Print a recipe complete, each setting explained; without a name, list the recipes that come with ulimi."""
    _need_extra("train")
    from ulimi.recipe import explain, load_recipe, recipe_headline, recipe_names

    if name is None:
        typer.echo(f"{'default':<16} What a training takes that names no recipe: every setting at its default.")
        for known in recipe_names():
            typer.echo(f"{known:<16} {recipe_headline(known)}")
        return
    typer.echo(explain(load_recipe(None if name == "default" else name, settings or [])))


@corpus_app.command("clean")
def corpus_clean(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Text files (plain, .gz, .zst), or a corpus folder with train.txt."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="The cleaned file; a folder for several.")],
    keep: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Leave out a rule; may be given several times.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Apply this rule alone; may be given several times.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each change: file, line, rule, action, before, after.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite results that are there.")] = False,
) -> None:
    """Clean text before training: broken words, page marks, headings, other languages, repetitions.

    What is a broken word the text itself tells, all files together. Of a folder train.txt is cleaned; valid.txt and
    test.txt are copied as they are, for a published split must stay exact. Cleaned text cleaned again does not change.
    The rules, in their order: characters, spaces, replaced, index, tables, spaced, capitals, speakers, foreign,
    hyphens, parted, duplicates.
    """
    from ulimi.clean import RULES, choose_rules, plan_cleaning, run_plan

    rules = choose_rules(keep or (), only or ())
    plan = plan_cleaning(files, out, report, force)
    counts = run_plan(plan, rules, report)
    typer.echo(f"{'rule':<12}{'changed':>9}{'removed':>9}{'chars':>11}")
    for rule, count in counts.items():
        typer.echo(f"{rule:<12}{count.changed:>9,}{count.removed:>9,}{count.chars:>11,}  {RULES[rule]}")
    for source, target in plan.cleaned:
        typer.echo(f"{source} -> {target}", err=True)
    for source, target in plan.copied:
        typer.echo(f"{source} -> {target}, as it is", err=True)


def _print_scores(scores: "Sequence[tuple[str, Score]]") -> None:
    header = ("file", "tokens", "chars", "nats", "ppl/token", "ppl/word", "bits/char", "bits/byte")
    rows = [header] + [
        (
            name, f"{s.num_tokens:,}", f"{s.num_chars:,}", f"{s.nats:.1f}", f"{s.perplexity:.2f}",
            f"{s.word_perplexity:.1f}", f"{s.bits_per_char:.4f}", f"{s.bits_per_byte:.4f}",
        )
        for name, s in scores
    ]  # fmt: skip
    _print_table(rows)


def _print_table(rows: "Sequence[tuple[str, ...]]") -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  ".join(cells))


def _note_smoothed(run: "Run") -> None:
    if run.alpha != 1:
        from ulimi.distribution import EPSILON

        typer.echo(
            f"ulimi: note: {run.dir} is a sparse model: {EPSILON:g} is added to its probabilities, since what it rules "
            "out would cost infinitely many nats",
            err=True,
        )


def _warn_unknown(path: Path | str, num_unknown: int) -> None:
    if num_unknown:
        typer.echo(
            f"ulimi: note: {path}: {num_unknown:,} words are <unk> to this model's closed vocabulary; "
            "its figures compare only with models of the same vocabulary",
            err=True,
        )


def _is_of_another_text(work_dir: Path, corpus: Path) -> bool:
    """Tell whether the split in a folder was made of another file than this one."""
    try:
        source = json.loads((work_dir / "split.json").read_bytes())["source"]
        with corpus.open("rb") as file:
            return bool(source["sha256"] != hashlib.file_digest(file, "sha256").hexdigest())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _need_extra(extra: str, asked: str = "this command") -> None:
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise UlimiError(f"{asked} needs {module}: {install(extra)}")


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop, so that no step is cut in two; a second one ends us."""
    wished = False

    def wish(number: int, _frame: Any) -> None:
        nonlocal wished
        wished = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
