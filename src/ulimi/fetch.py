"""A run from Hugging Face's hub: fetched once into the hub's own cache, and from there where there is no network.

huggingface_hub does it, which comes with tokenizers: `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are what
they are to it. Nothing that is fetched is run: the Python files of a folder of `ulimi hub` stay behind.
"""

import re
import sys
from functools import partial
from pathlib import Path

import ulimi
from ulimi.errors import UlimiError

HUB = "hf:"
"""what the name of a model on the hub begins with: hf:USER/NAME, or hf:USER/NAME@REVISION"""

FETCHED = (
    "meta.json", "config.json", "recipe.toml", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "model.onnx", "ngram.npz", "metrics.jsonl", "curve.png", "README.md", "MODEL_CARD.md", "SOURCE_CARD.md",
    "members/*",
)  # fmt: skip
"""what using a model needs of a run folder, and what it tells of itself"""

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@\s]+))?", re.ASCII)

_ADDRESS = re.compile(r"(?:(?:https?:/)?[\w-]+(?:\.[\w-]+)+/)?(\w[\w.-]*/\w[\w.-]*)(?:/tree/.*)?", re.ASCII)
"""of a model's page; so a path has it, of whose slashes two that follow one another are one"""


def name_on_hub(path: Path) -> str | None:
    """Give the name that was perhaps meant by what is no folder: the address of a page, or USER/NAME."""
    match = _ADDRESS.fullmatch(path.as_posix())
    return None if match is None else HUB + match[1]


def fetch_run(name: str) -> Path:
    """Give the folder of a model on the hub; the first time, or where it has changed there, it is fetched.

    Args:
        name: begins with `HUB`.

    Raises:
        UlimiError: the name is none, there is no such model or revision, it is no run, it is not open to this user, or
            it can neither be fetched nor is it in the cache.
    """
    match = _NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise UlimiError(f"{name}: allowed: {HUB}USER/NAME or {HUB}USER/NAME@REVISION")
    repo, revision = match.groups()

    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    fetch = partial(snapshot_download, repo, library_name="ulimi", library_version=ulimi.__version__)
    try:
        # First what tells whether it is a run at all: other models have gigabytes.
        folder = Path(fetch(revision=revision, allow_patterns="meta.json"))
        if (folder / "meta.json").is_file():
            fetch(revision=folder.name, allow_patterns=list(FETCHED))
    except errors.GatedRepoError:
        reason = "is open to those alone whom its owner lets in; `hf auth login` says who you are"
    except errors.RepositoryNotFoundError:
        reason = "no such model on the hub, or not for you; `hf auth login` says who you are"
    except errors.RevisionNotFoundError:
        reason = f"no revision {revision!r}"
    except errors.HFValidationError as error:
        reason = str(error).splitlines()[0]
    # What no network raises depends on where it ends.
    except Exception as error:
        reason = f"cannot be fetched: {str(error).partition(chr(10))[0] or repr(error)}"
    else:
        if (folder / "meta.json").is_file():
            return folder
        reason = "holds no meta.json; allowed: what `ulimi hub` makes, or another run folder"
    raise UlimiError(f"{name}: {reason}")
