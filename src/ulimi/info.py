"""What a run folder tells about itself: for the terminal, and as the model card that lies in it."""

from pathlib import Path
from typing import Any

from ulimi.errors import UlimiError
from ulimi.run import AWD_LSTM, CARD, MEMBERS, MIXTURE, NGRAM, SOURCE_CARD, Run

BARS = "▁▂▃▄▅▆▇█"


def summary(run: Run, place: Path | None = None) -> list[tuple[str, str]]:
    """Give the facts of a run as (name, value) rows.

    Args:
        run: the run.
        place: where its folder is going to be, if it is not there yet.

    Raises:
        UlimiError: its meta.json is not complete.
    """
    try:
        return _facts(run, place or run.dir)
    except KeyError as error:
        raise UlimiError(f"{run.dir}/meta.json: no entry {error}") from None
    except (TypeError, ValueError) as error:
        raise UlimiError(f"{run.dir}/meta.json: an entry is not of the kind that it should be: {error}") from None


def _facts(run: Run, place: Path) -> list[tuple[str, str]]:
    meta = run.meta
    rows = [
        ("run", str(place)),
        ("made by", f"ulimi {meta['ulimi']}" + (f" ({meta['commit']})" if meta.get("commit") else "")),
        ("created", meta["created"]),
        ("machine", _machine_text(meta["machine"])),
        *_model_facts(run),
        ("tokenizer", f"{run.tokenizer.kind}, {run.tokenizer.vocab_size} tokens"),
    ]
    if run.kind == MIXTURE:
        rows += [("weights tuned on", _text(meta["tuned_on"]))] if meta["tuned_on"] else []
    else:
        rows += [("trained on", _text(meta["data"]["train"])), ("validated on", _text(meta["data"]["valid"]))]
    if run.kind == AWD_LSTM:
        rows += _training_facts(run)
    for name, said in ((CARD, "licence, limits"), (SOURCE_CARD, "licence of what it started from")):
        for card in sorted([*run.dir.glob(name), *(run.dir / MEMBERS).glob(f"*/{name}")]):
            rows.append((said, str(place / card.relative_to(run.dir))))
    for name, score in meta.get("scores", {}).items():
        rows.append((f"score, {name}", score_text(score)))
    return rows


def _model_facts(run: Run) -> list[tuple[str, str]]:
    meta, config = run.meta, run.config
    if run.kind == NGRAM:
        return [("model", _ngram_text(meta, config))]
    if run.kind == MIXTURE:
        members, names = run.members(), meta["members"]
        if not isinstance(names, list) or len(names) != len(members):
            raise UlimiError(f"{run.dir}/meta.json: members is {names!r}; needed: {len(members)} names")
        models = [dict(summary(member)) for member in members]
        return [
            (f"member {number}, {weight:.4f}", f"{given}: {model.get('network') or model.get('model')}")
            for number, (weight, given, model) in enumerate(zip(config["weights"], names, models, strict=True), start=1)
        ]
    text = (
        f"AWD-LSTM, {meta['num_parameters'] / 1e6:.1f}M parameters: embedding {config['embedding_size']}, "
        f"{config['num_layers']} layers of {config['hidden_size']}" + (", tied" if config["tie_weights"] else "")
    )
    if rounds := config.get("mogrifier_rounds"):  # an older run does not say
        text += f", Mogrifier of {rounds} rounds of rank {config['mogrifier_rank']}"
    return [("network", text + (f", output {run.alpha:g}-entmax" if run.alpha != 1 else ""))]


def _ngram_text(meta: dict[str, Any], config: dict[str, Any]) -> str:
    text = f"modified Kneser-Ney of order {config['order']}, {sum(meta['num_ngrams']):,} n-grams"
    if orders := meta["fallback_orders"]:
        text += f"; the text is too small for its own discounts at order {', '.join(map(str, orders))}"
    return text


def _training_facts(run: Run) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    meta, metrics = run.meta, run.metrics()
    if meta.get("init_from"):
        rows.append(("started from", meta["init_from"]))
    if meta.get("teacher"):
        rows.append(("teacher", meta["teacher"]["path"]))
    if metrics:
        best = min(metrics, key=lambda row: row["valid_nll"])
        rows.append(
            ("training", f"{len(metrics)} epochs in {metrics[-1]['seconds'] / 60:.1f} min, best {best['epoch']}")
        )
        rows.append(("curve", curve([row["valid_bits_per_char"] for row in metrics])))
    rows.append(("state", "finished" if meta.get("training") else "not finished: continue with ulimi train … --resume"))
    if onnx := meta.get("onnx"):
        rows.append(("without torch", f"model.onnx, {onnx['kind']}, {onnx['num_bytes'] / 1e6:.1f} MB"))
    return rows


def score_text(score: dict[str, Any]) -> str:
    """Say a score in one line, with what each number is per."""
    word, token = (
        "beyond all bounds" if score[key] is None else f"{score[key]:.{digits}f}"
        for key, digits in (("word_perplexity", 1), ("perplexity", 2))
    )
    return (
        f"{score['bits_per_char']:.4f} bits per character, {score['bits_per_byte']:.4f} bits per byte, "
        f"word perplexity {word}, perplexity per token {token}"
    )


def curve(values: list[float], width: int = 40) -> str:
    """Draw values as one line of bars, first and last number beside it."""
    stride = -(-len(values) // width)
    shown = values[::stride]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((value - low) * scale)] for value in shown)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f} bits per character on validation"


def model_card(run: Run, place: Path | None = None) -> str:
    """Write the README.md of a run folder; the arguments are those of `summary`."""
    place = place or run.dir
    name = place.name if place.name not in ("", "..") else place.resolve().name
    table = "\n".join(f"| {name} | {value} |" for name, value in summary(run, place))
    pictured = recipe = ""
    if run.kind == NGRAM:
        what, made_of = "An interpolated modified Kneser-Ney n-gram model (Chen & Goodman 1999) counted", "n-grams"
    elif run.kind == MIXTURE:
        what, made_of = "Several models whose probabilities are averaged (Jelinek & Mercer 1980), mixed", "members"
    else:
        layers = " of Mogrifier layers (Melis, Kočiský & Blunsom 2020)" if run.config.get("mogrifier_rounds") else ""
        what, made_of = f"An AWD-LSTM language model (Merity, Keskar & Socher 2017){layers} trained", "weights"
        pictured = "\n![validation and training loss](curve.png)\n" if (run.dir / "curve.png").is_file() else ""
        toml = (run.dir / "recipe.toml").read_text(encoding="utf-8").strip()
        recipe = f"\n## Recipe\n\n```toml\n{toml}\n```\n"
    inherited = ""
    if (run.dir / SOURCE_CARD).is_file():
        inherited = (
            f"\nIts weights started from a released model, whose licence holds for them, too: see {SOURCE_CARD}.\n"
        )
    return f"""---
library_name: ulimi
pipeline_tag: text-generation
---

# {name}

{what} with ulimi.

| | |
|---|---|
{table}
{pictured}
Bits per character count every code point of the original text and one newline a line.

## Use

```
ulimi generate -m {place} "…"
ulimi evaluate FILE -m {place}
```
{recipe}
The text that a model was trained on decides what may be done with its {made_of}: see to it that its licence allows what
you intend.
{inherited}"""


def _machine_text(machine: dict[str, Any]) -> str:
    processes = f", processes: {machine['processes']}" if "processes" in machine else ""
    return f"{machine['cpu']}, {machine['device']}, threads: {machine['threads']}{processes}"


def _text(data: dict[str, Any]) -> str:
    return f"{data['path']}: {data['num_lines']:,} lines, {data['num_words']:,} words, {data['num_tokens']:,} tokens"
