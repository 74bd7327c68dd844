"""The command line: `ulimi COMMAND`. Each command imports what it needs when it runs, so that --help is quick.

Results go to standard output, everything else to standard error. A mistake of the user's is one line and exit status 2.
"""

import hashlib
import json
import math
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ulimi
from ulimi.errors import UlimiError

if TYPE_CHECKING:
    from ulimi.data import EncodedText
    from ulimi.engine import Engine
    from ulimi.judge import Judgement
    from ulimi.run import Run
    from ulimi.score import Score
    from ulimi.words import Word

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

ModelOption = Annotated[Path, typer.Option("--model", "-m", metavar="RUN", help="The run folder.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
EngineOption = Annotated[str, typer.Option(help="auto, onnx (int8) or torch.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]

PROBABILITY_COLOURS = ((0.5, "green"), (0.1, "cyan"), (0.01, "yellow"), (0.001, "magenta"), (0.0, "red"))
"""a word at least this probable gets this colour"""


CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}

# Typer exports only this descendant of the exception that all mistakes in options and arguments are.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line; every mistake of the user's ends here."""
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
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; what was saved before is intact")
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no exception of its own for a CPU without memory.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        _fail("out of memory: try a smaller data.batch_size, data.bptt, model.hidden_size or tokenizer.vocab_size")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")] = False,
    device: DeviceOption = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores.")] = 0,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Time between checkpoints in an epoch.")] = 5.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
) -> None:
    """Train a model on a corpus and leave it in a run folder."""
    _need_training_extra()
    import torch

    from ulimi.corpus import open_corpus
    from ulimi.progress import TrainingProgress
    from ulimi.recipe import build_recipe, load_recipe
    from ulimi.run import open_run
    from ulimi.train import Interrupted, claim_folder
    from ulimi.train import train as run_training

    if tensorboard and find_spec("tensorboard") is None:
        raise UlimiError("--tensorboard needs the tensorboard package: pip install 'ulimi[all]'")
    if new_tokenizer and init_from is None:
        raise UlimiError("--new-tokenizer goes with --init-from; a run from scratch trains its own tokenizer anyway")
    if resume and init_from is not None:
        raise UlimiError("--resume continues the run in --out, which remembers where it started: leave out --init-from")
    source = open_run(init_from) if init_from is not None else None
    overrides = settings or []
    if source is not None and not new_tokenizer and any(text.startswith("tokenizer.") for text in overrides):
        raise UlimiError("--init-from keeps that run's tokenizer: tokenizer settings need --new-tokenizer")
    if recipe is not None:
        chosen = load_recipe(recipe, overrides)
    elif resume and (out / "recipe.toml").is_file():
        chosen = build_recipe(open_run(out).recipe, overrides, source=f"{out}/recipe.toml")
    elif source is not None:
        name = f"{source.dir}/recipe.toml"
        chosen = build_recipe(source.recipe, overrides, source=name)
        if chosen.optim.kind == "nt-asgd":
            chosen = build_recipe(source.recipe, ["optim.average_at_start=true", *overrides], source=name)
    else:
        chosen = load_recipe(None, overrides)
    if threads:
        torch.set_num_threads(threads)

    # A wrong command must not replace the split that a run in --out was trained on.
    claim_folder(out, chosen, resume=resume, init_from=source)
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
            try:
                score = run_training(
                    parts, out, chosen, init_from=source, new_tokenizer=new_tokenizer, resume=resume, device=device,
                    checkpoint_minutes=checkpoint_minutes, tensorboard=tensorboard, reporter=progress,
                    should_stop=should_stop,
                )  # fmt: skip
            except Interrupted:
                same = f" --threads {threads}" * (threads > 0) + f" --device {device}" * (device != "auto")
                same += " --tensorboard" * tensorboard
                again = f"ulimi train {corpus} --out {out} --resume{same}"
                progress.note(f"stopped; everything is saved. Continue with: {again}")
                raise typer.Exit(130) from None
    from ulimi.info import score_text

    typer.echo(f"validation, one stream: {score_text(score)}")
    typer.echo(f"the model is in {out}; try: ulimi generate -m {out}")


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Text files, plain, .gz or .zst.")],
    model: ModelOption,
    stateless: Annotated[bool, typer.Option("--stateless", help="Each line by itself, not one stream.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Mix in a neural cache.")] = False,
    cache_theta: Annotated[float | None, typer.Option(help="Flatness of the cache (2.0).")] = None,
    cache_lambda: Annotated[float | None, typer.Option(help="Share of the cache (0.1).")] = None,
    cache_window: Annotated[int | None, typer.Option(help="Tokens that it remembers (2000).")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Dynamic evaluation: learn while reading.")] = False,
    dynamic_lr: Annotated[float | None, typer.Option(help="Its learning rate (7e-5).")] = None,
    dynamic_decay: Annotated[float | None, typer.Option(help="Its pull to the trained weights (0.01).")] = None,
    dynamic_epsilon: Annotated[float | None, typer.Option(help="Added to the gradients' RMS (2e-5).")] = None,
    dynamic_window: Annotated[int | None, typer.Option(help="Tokens scored, then learned from, at once (10).")] = None,
    stats_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Training text for --dynamic's gradient statistics.")
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
    run = open_run(model)
    cache_settings = _settings_of("--cache", cache, theta=cache_theta, lambda_=cache_lambda, window=cache_window)
    dynamic_settings = _settings_of(
        "--dynamic", dynamic, lr=dynamic_lr, decay=dynamic_decay, epsilon=dynamic_epsilon, window=dynamic_window
    )
    if stats_from is not None and not dynamic:
        raise UlimiError("--stats-from goes with --dynamic")
    scorer: Scorer
    if cache or dynamic:
        _need_training_extra()
        from ulimi.adapt import Cache, Dynamic

        scorer = _adaptive_scorer(
            run, device, stats_from,
            Cache(**cache_settings) if cache else None,
            Dynamic(**dynamic_settings) if dynamic else None,
        )  # fmt: skip
    else:
        scorer = _static_scorer(run, load_engine(run, device, kind=_engine_for_figures(engine)), stateless)
    rows: list[tuple[str, Score]] = []
    for path in files:
        with counting(f"reading {path}") as on_tokens:
            text = encode_file(path, run.tokenizer)
            _warn_unknown(path, text.num_unknown)
            nats = scorer(path, text, on_tokens)
        rows.append((str(path), Score.of(nats, len(text.ids), text.stats)))
        if as_json:
            typer.echo(json.dumps({"file": str(path), **rows[-1][1].as_dict()}))
    if len(files) > 1:
        first, *others = (file_score for _, file_score in rows)
        rows.append(("all", sum(others, start=first)))
        if as_json:
            typer.echo(json.dumps({"file": "all", **rows[-1][1].as_dict()}))
    if not as_json:
        _print_scores(rows)


def _settings_of(switch: str, on: bool, **given: float | None) -> dict[str, Any]:
    """Collect those of a switch's options that were given; they mean nothing without it."""
    known = {name: value for name, value in given.items() if value is not None}
    if known and not on:
        option = f"{switch}-{next(iter(known)).rstrip('_')}"
        raise UlimiError(f"{option} goes with {switch}")
    return known


def _engine_for_figures(engine: str) -> str:
    """A figure is that of the weights where they can be run: how their int8 copy rounds depends on the whole batch."""
    return "torch" if engine == "auto" and find_spec("torch") is not None else engine


def _static_scorer(run: "Run", engine: "Engine", stateless: bool) -> "Scorer":
    from ulimi.corpus import read_lines
    from ulimi.score import score_lines, score_stream

    def one_stream(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        return score_stream(engine, text.ids, run.tokenizer.eos_id, on_tokens)

    def lines_alone(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        nats, done = 0.0, 0
        for _, score in score_lines(engine, run.tokenizer, read_lines(path)):
            nats += score.nats
            done += score.num_tokens
            on_tokens(done)
        return nats

    return lines_alone if stateless else one_stream


def _adaptive_scorer(run: "Run", device: str, stats_from: Path | None, cache: Any, dynamic: Any) -> "Scorer":
    from ulimi.adapt import run_stats, score_adaptive
    from ulimi.engine import choose_device, load_model
    from ulimi.progress import counting

    model = load_model(run, choose_device(device))
    stats = None
    if dynamic is not None:
        with counting("gradient statistics of the training text, batch") as on_batches:
            stats = run_stats(run, model, stats_from, on_batches)

    def adapting(path: Path, text: "EncodedText", on_tokens: Callable[[int], None]) -> float:
        return score_adaptive(
            model, text.ids, run.tokenizer.eos_id, cache=cache, dynamic=dynamic, stats=stats, on_tokens=on_tokens
        )

    return adapting


@app.command()
def score(
    model: ModelOption,
    file: Annotated[str, typer.Argument(help="A text file; - is standard input.")] = "-",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score each line by itself: a row a line, for filtering corpora and ranking candidates."""
    from ulimi.corpus import read_lines
    from ulimi.engine import load_engine
    from ulimi.run import open_run
    from ulimi.score import score_lines

    run = open_run(model)
    scorer = load_engine(run, device, kind=_engine_for_figures(engine))
    num_unknown = 0
    # Who types lines wants each answer at once; a file is faster in batches.
    at_once = 1 if file == "-" and sys.stdin.isatty() else 256
    if not as_json:
        typer.echo("nats\ttokens\tchars\tbits_per_char\ttext")
    tokenizer = run.tokenizer
    for line, line_score in score_lines(scorer, tokenizer, read_lines(file), lines_at_once=at_once):
        if tokenizer.unk_id is not None:
            num_unknown += tokenizer.encode(line).count(tokenizer.unk_id)
        if as_json:
            typer.echo(json.dumps({"text": line, **line_score.as_dict()}, ensure_ascii=False))
        else:
            s = line_score
            typer.echo(f"{s.nats:.4f}\t{s.num_tokens}\t{s.num_chars}\t{s.bits_per_char:.4f}\t{line}")
    _warn_unknown("standard input" if file == "-" else file, num_unknown)


@app.command()
def judge(
    model: Annotated[Path | None, typer.Option("--model", "-m", metavar="RUN", help="The run folder.")] = None,
    hf: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead: a Hugging Face causal model's local folder.")
    ] = None,
    phenomenon: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Pairs a phenomenon.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pairs.")] = 0,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own pairs: phenomenon, good, bad, tabs between.")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the pairs that are judged.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Also print the pairs that are judged wrongly.")] = False,
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

    if (model is None) == (hf is None) and (hf is not None or write is None):
        raise UlimiError("judge needs one model, --model RUN or --hf DIR; --write FILE alone needs none")
    chosen = [*dict.fromkeys(phenomenon or [])]
    if pairs is None:
        for name in chosen:
            grammar.check_phenomenon(name)
        asked = [pair for name in chosen or grammar.phenomena() for pair in grammar.pairs(name, num, seed)]
    else:
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
        scorer = run_scorer(load_engine(run, device, kind=_engine_for_figures(engine)), run.tokenizer)
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
    model: ModelOption,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]…", help="None: a new text.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Texts a prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens after the prompt.")] = 100,
    temperature: Annotated[float, typer.Option(help="Below 1 surer, above more varied, 0 the likeliest.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this much; 1 = all.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help=r"End before this string (\n: line end); may be repeated.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Show how probable each word was.")] = False,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write text, whole words as they come."""
    import secrets

    from ulimi.engine import load_engine
    from ulimi.generate import Sampling
    from ulimi.run import open_run

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    stops = [text.replace("\\n", "\n") for text in stop or []]
    if "" in stops:
        raise UlimiError("--stop '': an empty stop string would end every text at once")
    run = open_run(model)
    writer = load_engine(run, device, kind=engine)
    if seed is None:
        seed = secrets.randbelow(2**31)
        typer.echo(f"seed {seed}", err=True)
    for index, prompt in enumerate(prompts or [""]):
        if index and not as_json:
            typer.echo("")
        _generate_one(run, writer, prompt, sampling, num, max_tokens, seed, stops, probabilities, as_json)


def _generate_one(
    run: "Run", engine: Any, prompt: str, sampling: Any, num: int, max_tokens: int, seed: int, stops: list[str],
    probabilities: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write the texts of one prompt: one as it comes, several each when it is complete."""
    from ulimi.generate import generate as generate_ids
    from ulimi.generate import score_prompt
    from ulimi.words import WordWriter, group_words

    tokenizer = run.tokenizer
    # A space belongs to the token after it: the model would never follow a lone one with a word.
    prompt = prompt.rstrip(" ")
    # Every text starts after a line's end, and so does every prompt.
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    prompt_words: list[tuple[str, Word | None]] = [(prompt, None)]
    if probabilities and prompt:
        scored = group_words(tokenizer, [(step.id, step.logprob) for step in score_prompt(engine, ids)])
        prompt_words = [(word.text, word) for word in scored]
    writers = [WordWriter(tokenizer, stops, after=prompt) for _ in range(num)]
    words: list[list[Word]] = [[] for _ in range(num)]
    streaming = num == 1 and not as_json
    if streaming:
        _echo_words(prompt_words, probabilities)
    num_tokens = [0] * num
    for step in generate_ids(
        engine, ids, sampling=sampling, max_tokens=max_tokens, num=num, seed=seed,
        should_stop=lambda row, _: writers[row].stopped,
    ):  # fmt: skip
        num_tokens[step.row] += 1
        for word in writers[step.row].push(step.id, step.logprob):
            words[step.row].append(word)
            if streaming:
                _echo_words([(word.text, word)], probabilities)
    for row, writer in enumerate(writers):
        cut_off = num_tokens[row] == max_tokens and not writer.stopped and writer.unfinished
        rest = list(writer.flush())
        if cut_off and (words[row] or len(rest) > 1):
            # The limit fell inside a word, as far as anyone can tell: words come out whole.
            rest.pop()
        words[row].extend(rest)
        if streaming:
            _echo_words([(word.text, word) for word in rest], probabilities)
            typer.echo("")
        elif as_json:
            record: dict[str, Any] = {
                "prompt": prompt,
                "text": prompt + "".join(word.text for word in words[row]),
                "seed": seed,
                "index": row,
                "nats": -sum(word.logprob for word in words[row]),
                "num_tokens": sum(word.num_tokens for word in words[row]),
            }
            if probabilities:
                record["words"] = [
                    {"text": word.text, "probability": math.exp(word.logprob), "num_tokens": word.num_tokens}
                    for word in [*(known for _, known in prompt_words if known is not None), *words[row]]
                ]
            typer.echo(json.dumps(record, ensure_ascii=False))
        else:
            if row:
                typer.echo("")
            _echo_words([*prompt_words, *((word.text, word) for word in words[row])], probabilities)
            typer.echo("")


def _echo_words(words: "Sequence[tuple[str, Word | None]]", probabilities: bool) -> None:
    """Print words without a line end; with their probabilities, in colour on a terminal and in brackets elsewhere."""
    for text, word in words:
        if sys.stdout.isatty():
            # A byte-level vocabulary holds every control character, ESC too.
            text = text.translate(CONTROL_PICTURES)
        if not probabilities or word is None or not text.strip():
            typer.echo(text, nl=False)
            continue
        p = math.exp(word.logprob)
        colour = next(name for least, name in PROBABILITY_COLOURS if p >= least)
        body = text.lstrip()
        typer.echo(text[: len(text) - len(body)] + typer.style(body, fg=colour) + f"[{p:.2g}]", nl=False)
    sys.stdout.flush()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    valid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Validation text, if it is not where the run remembers it.")
    ] = None,
) -> None:
    """Write model.onnx, int8, which runs without PyTorch; training ends with this by itself."""
    _need_training_extra()
    from ulimi.data import encode_file
    from ulimi.export import describe_export, export_onnx
    from ulimi.files import write_json
    from ulimi.run import open_run

    opened = open_run(run)
    valid_path = valid or opened.text_path("valid")
    if valid_path is None:
        raise UlimiError(f"{run}: its validation text is not where it was: name it with --valid")
    result = export_onnx(opened, encode_file(valid_path, opened.tokenizer))
    write_json(run / "meta.json", {**opened.meta, "onnx": result})
    typer.echo(f"{run}/model.onnx: {describe_export(result)}")


@app.command()
def info(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")], as_json: JsonOption = False
) -> None:
    """Say what a run is: how it was trained, its scores, its curve."""
    from ulimi.info import summary
    from ulimi.run import open_run

    opened = open_run(run)
    if as_json:
        facts = {**opened.meta, "config": opened.config, "recipe": opened.recipe, "metrics": opened.metrics()}
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
    _need_training_extra()
    from ulimi.recipe import explain, load_recipe, recipe_headline, recipe_names

    if name is None:
        for known in recipe_names():
            typer.echo(f"{known:<16} {recipe_headline(known)}")
        return
    typer.echo(explain(load_recipe(None if name == "default" else name, settings or [])))


def _print_scores(scores: "Sequence[tuple[str, Score]]") -> None:
    header = ("file", "tokens", "chars", "nats", "ppl/token", "ppl/word", "bits/char", "bits/byte")
    rows = [header] + [
        (
            name, f"{s.num_tokens:,}", f"{s.num_chars:,}", f"{s.nats:.1f}", f"{s.perplexity:.2f}",
            f"{s.word_perplexity:.1f}", f"{s.bits_per_char:.4f}", f"{s.bits_per_byte:.4f}",
        )
        for name, s in scores
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  ".join(cells))


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


def _need_training_extra() -> None:
    for module in ("torch", "safetensors", "pydantic", "tomli_w", "matplotlib", "onnx"):
        if find_spec(module) is None:
            raise UlimiError(f"this command needs {module}: pip install 'ulimi[train]'")


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
