"""A run as a folder that Hugging Face's transformers loads without ulimi, and that ulimi uses as a run, too.

config.json  generation_config.json     sizes, classes; how `ulimi generate` samples where nothing is asked for
configuration_awd_lstm.py  modeling_awd_lstm.py  LICENSE-CODE     the classes, of the package's hub/
model.safetensors                       float weights; of a release what its graph tells of them
tokenizer.json  tokenizer_config.json   the run's, which also put <eos> before a text
model.onnx  recipe.toml  metrics.jsonl  meta.json  curve.png    of the run
README.md                               the model card, with what the hub reads at its head
"""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers
from huggingface_hub import ModelCard
from tokenizers.processors import TemplateProcessing

from ulimi.engine import load_engine, load_model, write_tensors
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir, write_json, write_text
from ulimi.info import model_card
from ulimi.release import public_meta, refuse_places
from ulimi.run import CARD, ONNX, READ_BACK, SOURCE_CARD, WEIGHTS, Run
from ulimi.tokenizer import EOS
from ulimi.writer import TOP_P

MODELLING = Path(__file__).with_name("hub")
CODE = ("configuration_awd_lstm.py", "modeling_awd_lstm.py", "LICENSE-CODE")
CLASSES = {
    "AutoConfig": "configuration_awd_lstm.AWDLSTMConfig",
    "AutoModel": "modeling_awd_lstm.AWDLSTMModel",
    "AutoModelForCausalLM": "modeling_awd_lstm.AWDLSTMForCausalLM",
}
COPIED = (ONNX, "recipe.toml", "metrics.jsonl", "curve.png", CARD, SOURCE_CARD)
READ_BY_PEOPLE = (
    "config.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl", "meta.json", "README.md", CARD, SOURCE_CARD
)  # fmt: skip
"""what is searched for places; a vocabulary may hold any string"""

MAX_NEW_TOKENS = 100
"""as `ulimi generate` writes where nothing is asked for"""

TAGS = ("awd-lstm", "lstm", "ulimi")

LICENCE, LANGUAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*"), re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
"""what the hub calls a licence ("cc-by-sa-4.0") and a language ("zu")"""

USE = """
## With transformers

```python
from transformers import pipeline

write = pipeline("text-generation", {python_name}, trust_remote_code=True)
print(write("…")[0]["generated_text"])
```

USER/{name} is this folder's name on the hub, or its path; ulimi takes it as `ulimi generate "…" -m hf:USER/{name}`.
The two Python files in it are all the code that is needed; they are under the Apache License 2.0 (LICENSE-CODE). A text
is read from `<eos>` on, which the tokenizer puts before it. Give a line at a time: to this model a line's end is
`<eos>`, too.
"""
USE_READ_BACK = """
`model.safetensors` holds what `model.onnx` tells of the weights: its numbers, of 8 bits, times their scales.
"""


def write_hub_folder(run: Run, out: Path, *, licence: str | None = None, languages: Sequence[str] = ()) -> int:
    """Write the folder, whole or not at all.

    Args:
        run: a network of softmax outputs, finished: a training's run folder, a release, or what this made of one.
        out: the folder to make.
        licence: its identifier on the hub, for the card's head ("cc-by-sa-4.0"); None leaves what the card says, or
            what that of the release says which its training started from.
        languages: likewise, codes as "zu".

    Returns:
        Its bytes.

    Raises:
        UlimiError: the run is no network, is not finished, or its output is sparse; weights or graph cannot be used; a
            licence or language is none; the card's head cannot be read; a file names a place on this machine; the
            folder is there.
    """
    run.need_network("ulimi hub")
    _check_names(licence, languages)
    if run.alpha != 1:
        raise UlimiError(f"{run.dir}: its loss is entmax, which transformers does not know; allowed: cross entropy")
    run.need_finished()
    # Are they there, of one another, and of this tokenizer?
    model = load_model(run)
    if (run.dir / ONNX).is_file():
        load_engine(run, kind="onnx")
    run = replace(run, meta=public_meta(run))
    with atomic_dir(out) as unfinished:
        for name in COPIED:
            if (run.dir / name).is_file():
                shutil.copyfile(run.dir / name, unfinished / name)
        for name in CODE:
            shutil.copyfile(MODELLING / name, unfinished / name)
        if run.has_weights:
            shutil.copyfile(run.weights_path, unfinished / WEIGHTS)
        else:
            write_tensors(dict(model.named_parameters()), unfinished / WEIGHTS, {"format": "pt"})
        write_json(unfinished / "meta.json", run.meta | ({} if run.has_weights else {READ_BACK: True}))
        _write_configs(run, unfinished)
        _write_tokenizer(run, unfinished)
        name = out.resolve().name
        card = _card(run, name, licence, languages)
        if card.data.get("license") is not None and not (unfinished / CARD).is_file():
            # For whoever goes on from these weights.
            write_text(unfinished / CARD, str(card))
        write_text(unfinished / "README.md", f"{str(card).rstrip()}\n{_use(run, name)}")
        refuse_places(unfinished, [name for name in READ_BY_PEOPLE if (unfinished / name).is_file()])
        num_bytes = sum(path.stat().st_size for path in unfinished.iterdir())
    return num_bytes


def _check_names(licence: str | None, languages: Sequence[str]) -> None:
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UlimiError(f"--license {licence!r}: allowed: what the hub calls it, such as apache-2.0 or cc-by-sa-4.0")
    for language in languages:
        if not LANGUAGE.fullmatch(language):
            raise UlimiError(f"--language {language!r}: allowed: a code, such as zu")


def _write_configs(run: Run, out: Path) -> None:
    """Write config.json, ours with what transformers wants to know, and generation_config.json."""
    config, eos_id = run.config, run.tokenizer.eos_id
    ids = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    theirs = {
        "architectures": ["AWDLSTMForCausalLM"],
        "auto_map": CLASSES,
        "dtype": "float32",
        "vocab_size": config["vocab_size"],
        "embedding_size": config["embedding_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "tie_word_embeddings": config["tie_weights"],
        "mogrifier_rounds": config.get("mogrifier_rounds", 0),  # an older run does not say
        "mogrifier_rank": config.get("mogrifier_rank", 32),
    }
    write_json(out / "config.json", {**run.whole_config, **theirs, **ids})
    sampling = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    write_json(out / "generation_config.json", {**ids, **sampling})


def _write_tokenizer(run: Run, out: Path) -> None:
    """Write the tokenizer, with <eos> before each text, and as the pad, which an attention mask tells from it."""
    tokenizer = run.tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.eos_id)]
    )
    write_text(out / "tokenizer.json", backend.to_str(pretty=True))
    write_json(out / "tokenizer_config.json", {**tokenizer.config, "pad_token": EOS, "padding_side": "left"})


def _card(run: Run, name: str, licence: str | None, languages: Sequence[str]) -> ModelCard:
    """Give a release's own card, or what `ulimi train` writes, with what the hub reads at its head."""
    own = run.dir / CARD
    card = _read_card(own) if own.is_file() else _parse_card(model_card(run, Path(name)), own)
    source = run.dir / SOURCE_CARD
    if licence is None and card.data.get("license") is None and source.is_file():
        # Whoever trained on from a release gives on what they made of it under its licence.
        licence = _read_card(source).data.get("license")
    card.data["library_name"] = "transformers"
    card.data["pipeline_tag"] = "text-generation"
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    if licence is not None:
        card.data["license"] = licence
    if languages:
        card.data["language"] = list(languages)
    return card


def _use(run: Run, name: str) -> str:
    """Say how the folder is used, at the end of README.md."""
    use = USE.format(name=name, python_name=json.dumps(f"USER/{name}", ensure_ascii=False))
    return use if run.has_weights else use + USE_READ_BACK


def _read_card(path: Path) -> ModelCard:
    try:
        return _parse_card(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None


def _parse_card(text: str, path: Path) -> ModelCard:
    """Read a card with its head, which may be missing, but not be another thing than one."""
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a card may have no head yet
    try:
        card = ModelCard(text)
    except Exception as error:  # what a damaged head raises depends on the damage
        reason = " ".join(str(error).split())
        raise UlimiError(f"{path}: its head, between the lines ---, cannot be read: {reason}") from None
    if text.lstrip().startswith("---") and not card.data.to_dict():  # type: ignore[no-untyped-call]
        raise UlimiError(f"{path}: its head is not closed; allowed: YAML between two lines ---")
    return card
