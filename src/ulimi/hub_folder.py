"""A run as a folder that Hugging Face's transformers loads without ulimi, and that ulimi uses as a run, too.

config.json  generation_config.json     sizes, classes; how `ulimi generate` samples where nothing is asked for
configuration_awd_lstm.py  modeling_awd_lstm.py     the classes, of the package's hub/
model.safetensors                       float weights; of a release what its graph tells of them
tokenizer.json  tokenizer_config.json   the run's, which also put <eos> before a text
model.onnx  recipe.toml  metrics.jsonl  meta.json  curve.png    of the run
README.md                               the model card, with what the hub reads at its head
"""

import json
import shutil
from pathlib import Path

import tokenizers
from huggingface_hub import ModelCard
from tokenizers.processors import TemplateProcessing

from ulimi.engine import read_weights, write_tensors
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir, write_json, write_text
from ulimi.graph_weights import name_weights
from ulimi.info import model_card
from ulimi.release import refuse_places, without_places
from ulimi.run import CARD, ONNX, SOURCE_CARD, WEIGHTS, Run, open_run
from ulimi.tokenizer import EOS
from ulimi.writer import TOP_P

MODELLING = Path(__file__).with_name("hub")
CODE = ("configuration_awd_lstm.py", "modeling_awd_lstm.py")
CLASSES = {
    "AutoConfig": "configuration_awd_lstm.AWDLSTMConfig",
    "AutoModel": "modeling_awd_lstm.AWDLSTMModel",
    "AutoModelForCausalLM": "modeling_awd_lstm.AWDLSTMForCausalLM",
}
COPIED = ("recipe.toml", "metrics.jsonl", "curve.png", CARD, SOURCE_CARD)
READ_BY_PEOPLE = (
    "config.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl", "meta.json", "README.md", CARD, SOURCE_CARD
)  # fmt: skip
"""what is searched for places; a vocabulary may hold any string"""

MAX_NEW_TOKENS = 100
"""as `ulimi generate` writes where nothing is asked for"""

TAGS = ("awd-lstm", "lstm", "ulimi")

USE = """
## With transformers

```python
from transformers import pipeline

write = pipeline("text-generation", "USER/{name}", trust_remote_code=True)
print(write("…")[0]["generated_text"])
```

USER/{name} is this folder's name on the hub, or its path; ulimi takes it as `ulimi generate "…" -m hf:USER/{name}`.
The two Python files in it are all the code that is needed. A text is read from `<eos>` on, which the tokenizer puts
before it. Give a line at a time: to this model a line's end is `<eos>`, too.
"""
READ_BACK = """
`model.safetensors` holds what `model.onnx` tells of the weights: its numbers, of 8 bits, times their scales.
"""


def write_hub_folder(run: Run, out: Path, *, licence: str | None = None, languages: tuple[str, ...] = ()) -> int:
    """Write the folder, whole or not at all.

    Args:
        run: a network of softmax outputs, finished: a training's run folder, or a release.
        out: the folder to make.
        licence: its identifier on the hub, for the card's head ("cc-by-sa-4.0"); None leaves what the card says.
        languages: likewise, codes as "zu".

    Returns:
        Its bytes.

    Raises:
        UlimiError: the run is no network, is not finished, its output is sparse, its weights cannot be read, a file
            names a place on this machine, or the folder is there.
    """
    run.need_network("ulimi hub")
    if run.alpha != 1:
        raise UlimiError(f"{run.dir}: its loss is entmax, which transformers does not know; allowed: cross entropy")
    if not run.meta.get("training"):
        raise UlimiError(f"{run.dir}: its training is not finished; `ulimi train … --resume` goes on with it")
    with atomic_dir(out) as unfinished:
        for name in COPIED:
            if (run.dir / name).is_file():
                shutil.copyfile(run.dir / name, unfinished / name)
        for name in CODE:
            shutil.copyfile(MODELLING / name, unfinished / name)
        write_json(unfinished / "meta.json", without_places(run.meta))
        _write_weights(run, unfinished)
        _write_configs(run, unfinished)
        _write_tokenizer(run, unfinished)
        _write_card(run, unfinished, out.resolve().name, licence, languages)
        refuse_places(unfinished, [name for name in READ_BY_PEOPLE if (unfinished / name).is_file()])
        num_bytes = sum(path.stat().st_size for path in unfinished.iterdir())
    return num_bytes


def _write_weights(run: Run, out: Path) -> None:
    """Write the float weights, and the graph under their name."""
    if run.has_weights:
        shutil.copyfile(run.weights_path, out / WEIGHTS)
    else:
        write_tensors(read_weights(run), out / WEIGHTS, {"format": "pt"})
    if (run.dir / ONNX).is_file():
        shutil.copyfile(run.dir / ONNX, out / ONNX)
        if not run.has_weights:
            name_weights(out / ONNX, open_run(out).weights_sha256)


def _write_configs(run: Run, out: Path) -> None:
    config = run.config
    ids = {
        "bos_token_id": run.tokenizer.eos_id,
        "eos_token_id": run.tokenizer.eos_id,
        "pad_token_id": run.tokenizer.eos_id,
    }
    ours = json.loads((run.dir / "config.json").read_text(encoding="utf-8"))
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
    write_json(out / "config.json", {**ours, **theirs, **ids})
    sampling = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    write_json(out / "generation_config.json", {**ids, **sampling})


def _write_tokenizer(run: Run, out: Path) -> None:
    """Write the tokenizer, with <eos> before each text, and as the pad, which an attention mask tells from it."""
    tokenizer = run.tokenizer
    tokenizer.save(out)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.eos_id)]
    )
    write_text(out / "tokenizer.json", backend.to_str(pretty=True))
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**settings, "pad_token": EOS, "padding_side": "left"})


def _write_card(run: Run, out: Path, name: str, licence: str | None, languages: tuple[str, ...]) -> None:
    """Write README.md: a release's own card, or what `ulimi train` writes, without this machine's places."""
    own = run.dir / CARD
    text = own.read_text(encoding="utf-8") if own.is_file() else model_card(open_run(out), Path(name))
    card = ModelCard(text if text.startswith("---\n") else f"---\nlibrary_name: transformers\n---\n\n{text}")
    card.data["library_name"] = "transformers"
    card.data["pipeline_tag"] = "text-generation"
    card.data["tags"] = [*TAGS]
    if licence is not None:
        card.data["license"] = licence
    if languages:
        card.data["language"] = list(languages)
    use = USE.format(name=name) + ("" if run.has_weights else READ_BACK)
    write_text(out / "README.md", f"{str(card).rstrip()}\n{use}")
