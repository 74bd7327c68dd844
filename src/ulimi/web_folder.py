"""A folder that is a web page with the model in it: it suggests, writes and scores in the browser, by itself.

    index.html  answer.js  worker.js    the page of `ulimi serve`, and what answers it here
    ulimi.js  libraries.js              the model for programs of one's own, in a browser or in Node.js
    model/                              model.onnx.gz, tokenizer.json, model.json; the model's cards
    lib/                                ONNX Runtime Web and Hugging Face's tokenizers, from npm
    README.md  LICENSES.txt             what to do with it, and what may be done
    package.json                        tells Node.js that .js are modules

Nothing that is typed leaves the browser, and nothing is loaded from another place. What is large is packed, since not
every web server packs what it sends; ulimi.js unpacks what comes packed. Light floor: the graph is that of
`ulimi.export`, as it is.
"""

import gzip
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

import ulimi
from ulimi.engine import OnnxEngine, load_engine
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir, write_json
from ulimi.run import CARD, ONNX, SOURCE_CARD, Run
from ulimi.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("web")
COPIED = {
    "index.html": "index.html", "local.js": "answer.js", "worker.js": "worker.js", "ulimi.js": "ulimi.js",
    "libraries.js": "libraries.js", "LICENSES.txt": "LICENSES.txt",
}  # fmt: skip
"""of the package, and what it is called there"""

LIBRARIES = {
    "onnxruntime-web": (
        "^1.30.0",
        {
            "ort.wasm.min.mjs": "ort.wasm.min.js",
            "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
            "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm.gz",
        },
    ),
    "@huggingface/tokenizers": ("^0.2.0", {"tokenizers.min.mjs": "tokenizers.min.js"}),
}
"""packages of npm: versions that were tried; what of their dist/ is needed, and what it is called in lib/, since not
every web server knows that .mjs is JavaScript"""

GZIP, GZIP_BEGINS = ".gz", b"\x1f\x8b"

CARDS = (CARD, SOURCE_CARD)

NPM_SECONDS = 600


def write_web_folder(run: Run, out: Path, *, libraries: Path | None = None) -> int:
    """Write the folder, whole or not at all.

    Args:
        run: a network with its model.onnx.
        out: the folder to make.
        libraries: a folder with the files of `LIBRARIES`, or a node_modules with the packages; None asks npm for them.

    Returns:
        Its bytes.

    Raises:
        UlimiError: the run is no network, its output is sparse, its tokenizer is of kind "word", its graph is missing
            or of other weights, the folder is there, or the libraries cannot be had.
    """
    run.need_network("ulimi web")
    if run.alpha != 1:
        raise UlimiError(f"{run.dir}: its loss is entmax; `ulimi web` takes a network of cross entropy")
    tokenizer = run.tokenizer
    if not tokenizer.is_lossless:
        raise UlimiError(
            f"{run.dir}: its tokenizer is of kind {tokenizer.kind!r}; `ulimi web` takes bpe, unigram or char"
        )
    if not (run.dir / ONNX).is_file():
        raise UlimiError(f"{run.dir}: holds no {ONNX}; {run.export_advice}")
    engine = load_engine(run, kind="onnx")
    assert isinstance(engine, OnnxEngine)
    with atomic_dir(out) as unfinished:
        for name, target in COPIED.items():
            shutil.copyfile(PAGE / name, unfinished / target)
        write_json(unfinished / "package.json", {"type": "module", "private": True})
        _write_model(run, tokenizer, engine, unfinished / "model")
        lib = unfinished / "lib"
        lib.mkdir()
        if libraries is None:
            _fetch_libraries(lib)
        else:
            _copy_libraries(libraries, lib)
        num_bytes = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
        cards = [f"model/{name}" for name in CARDS if (unfinished / "model" / name).is_file()]
        licence = f"is told in {' and '.join(cards)}" if cards else "is for whoever trained it to say here"
        text = Template((PAGE / "README.md").read_text(encoding="utf-8"))
        said = text.substitute(
            name=run.title, version=ulimi.__version__, megabytes=round(num_bytes / 1e6), licence=licence
        )
        (unfinished / "README.md").write_text(said, encoding="utf-8", newline="\n")
    return num_bytes


def _write_model(run: Run, tokenizer: Tokenizer, engine: OnnxEngine, out: Path) -> None:
    out.mkdir()
    _put((run.dir / ONNX).read_bytes(), out / f"{ONNX}{GZIP}")
    for name in ("tokenizer.json", *CARDS):
        if (run.dir / name).is_file():
            shutil.copyfile(run.dir / name, out / name)
    write_json(out / "model.json", describe(run.title, tokenizer, engine))


def describe(name: str, tokenizer: Tokenizer, engine: OnnxEngine) -> dict[str, Any]:
    """Give what ulimi.js has to know beside graph and tokenizer.

    `tokens` are their bytes, U+0000 to U+00FF; `state` the graph's inputs beside the ids, with the last values that
    each begins with, the others being 0.
    """
    state = [
        {"name": name, "size": values.size, "ends": np.trim_zeros(values.ravel(), "f").tolist()}
        for name, values in zip(engine.state_names, engine.initial_state(1), strict=True)
    ]
    tokens = [tokenizer.token_bytes(id).decode("latin-1") for id in range(tokenizer.vocab_size)]
    return {
        "name": name, "about": "README.md", "ulimi": ulimi.__version__, "kind": tokenizer.kind, "state": state,
        "tokens": tokens,
    }  # fmt: skip


def _put(content: bytes, path: Path) -> None:
    """Write a file, packed where its name says so and it is not yet."""
    if path.suffix == GZIP and not content.startswith(GZIP_BEGINS):
        content = gzip.compress(content, mtime=0)  # the same file each time
    path.write_bytes(content)


def _copy_libraries(source: Path, lib: Path) -> None:
    for package, (_, names) in LIBRARIES.items():
        for name, target in names.items():
            places = [source / target, source / name, source / package / "dist" / name]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise UlimiError(
                    f"--libraries {source}: no {name}; allowed: a folder that holds it (another web folder's lib), "
                    f"or a node_modules with {package}"
                )
            _put(found.read_bytes(), lib / target)


def _fetch_libraries(lib: Path) -> None:
    """Let npm fetch the packages, which checks them; nothing of them is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise UlimiError(
            f"npm is not there to fetch {' and '.join(LIBRARIES)}: install Node.js, or name a folder that holds them "
            "with --libraries"
        )
    for package, (versions, names) in LIBRARIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            command = [npm, "pack", f"{package}@{versions}", "--pack-destination", scratch, "--loglevel", "error"]
            try:
                done = subprocess.run(command, check=False, capture_output=True, timeout=NPM_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _not_fetched(package, str(error)) from None
            packed = next(Path(scratch).glob("*.tgz"), None)
            if done.returncode or packed is None:
                said = " ".join(done.stderr.decode(errors="replace").splitlines()[:2])
                raise _not_fetched(package, said or "it left no package")
            try:
                with tarfile.open(packed) as archive:
                    for name, target in names.items():
                        file = archive.extractfile(f"package/dist/{name}")
                        if file is None:
                            raise KeyError(f"package/dist/{name} is no file")
                        _put(file.read(), lib / target)
            except (tarfile.TarError, KeyError) as error:
                raise _not_fetched(package, str(error.args[0]).splitlines()[0].rstrip(":")) from None


def _not_fetched(package: str, reason: str) -> UlimiError:
    return UlimiError(f"npm could not fetch {package}: {reason}; --libraries takes it from a folder")
