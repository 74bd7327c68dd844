"""A folder that is a web page with the model in it: it suggests, writes and scores in the browser, by itself.

    index.html  answer.js  worker.js    the page of `ulimi serve`, and what answers it here
    ulimi.js                            the model for programs of one's own, in a browser or in Node.js
    model/                              model.onnx, tokenizer.json, model.json; the model's cards
    lib/                                ONNX Runtime Web and Hugging Face's tokenizers, from npm
    README.md                           what to do with it

Nothing that is typed leaves the browser, and nothing is loaded from another place, so it works without a network once
it is there. Light floor: the graph is that of `ulimi.export`, as it is.
"""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import ulimi
from ulimi.engine import ENDS_C, ENDS_H, OnnxEngine, load_engine
from ulimi.errors import UlimiError
from ulimi.files import atomic_dir, write_json
from ulimi.run import CARD, ONNX, SOURCE_CARD, Run
from ulimi.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("web")
COPIED = {
    "index.html": "index.html", "local.js": "answer.js", "worker.js": "worker.js", "ulimi.js": "ulimi.js",
}  # fmt: skip
"""of the package, and what it is called there"""

LIBRARIES = {
    "onnxruntime-web": ("^1.30.0", ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")),
    "@huggingface/tokenizers": ("^0.2.0", ("tokenizers.min.mjs",)),
}
"""packages of npm: versions that were tried, and what of their dist/ is needed"""

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
    engine = load_engine(run, kind="onnx")
    assert isinstance(engine, OnnxEngine)
    with atomic_dir(out) as unfinished:
        for name, target in COPIED.items():
            shutil.copyfile(PAGE / name, unfinished / target)
        _write_model(run, tokenizer, engine, unfinished / "model")
        lib = unfinished / "lib"
        lib.mkdir()
        if libraries is None:
            _fetch_libraries(lib)
        else:
            _copy_libraries(libraries, lib)
        num_bytes = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
        text = Template((PAGE / "README.md").read_text(encoding="utf-8"))
        said = text.substitute(name=run.dir.resolve().name, version=ulimi.__version__, megabytes=round(num_bytes / 1e6))
        (unfinished / "README.md").write_text(said, encoding="utf-8", newline="\n")
    return num_bytes


def _write_model(run: Run, tokenizer: Tokenizer, engine: OnnxEngine, out: Path) -> None:
    out.mkdir()
    for name in (ONNX, "tokenizer.json", CARD, SOURCE_CARD):
        if (run.dir / name).is_file():
            shutil.copyfile(run.dir / name, out / name)
    write_json(out / "model.json", describe(run.dir.resolve().name, tokenizer, engine))


def describe(name: str, tokenizer: Tokenizer, engine: OnnxEngine) -> dict[str, Any]:
    """Give what ulimi.js has to know beside graph and tokenizer.

    `tokens` are their bytes, U+0000 to U+00FF; `state` the graph's inputs beside the ids, with the last values that
    each begins with, the others being 0.
    """
    state = [
        {
            "name": name,
            "size": size,
            "ends": list(ENDS_H if name.startswith("h") else ENDS_C) if engine.has_ends else [],
        }
        for name, size in engine.state_sizes.items()
    ]
    tokens = [tokenizer.token_bytes(id).decode("latin-1") for id in range(tokenizer.vocab_size)]
    return {"name": name, "ulimi": ulimi.__version__, "kind": tokenizer.kind, "state": state, "tokens": tokens}


def _copy_libraries(source: Path, lib: Path) -> None:
    for package, (_, names) in LIBRARIES.items():
        for name in names:
            places = [source / name, source / package / "dist" / name]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise UlimiError(
                    f"--libraries {source}: no {name}; allowed: a folder that holds it (another web folder's lib), "
                    f"or a node_modules with {package}"
                )
            shutil.copyfile(found, lib / name)


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
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=NPM_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _not_fetched(package, str(error)) from None
            packed = next(Path(scratch).glob("*.tgz"), None)
            if done.returncode or packed is None:
                raise _not_fetched(package, " ".join(done.stderr.split("\n")[:2]).strip() or "it left no package")
            try:
                with tarfile.open(packed) as archive:
                    for name in names:
                        member = archive.extractfile(f"package/dist/{name}")
                        assert member is not None
                        (lib / name).write_bytes(member.read())
            except (tarfile.TarError, KeyError) as error:
                raise _not_fetched(package, str(error.args[0]).splitlines()[0].rstrip(":")) from None


def _not_fetched(package: str, reason: str) -> UlimiError:
    return UlimiError(f"npm could not fetch {package}: {reason}; --libraries takes it from a folder")
