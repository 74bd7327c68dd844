"""A model of Hugging Face's hub, fetched by its own library from a hub that runs here."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import TINY, refusal
from ulimi.adapt import run_stats
from ulimi.corpus import open_corpus
from ulimi.engine import load_engine, load_model
from ulimi.fetch import fetch_run
from ulimi.recipe import load_recipe
from ulimi.run import open_run
from ulimi.train import train

SEVERAL = """
import json, sys
from ulimi.errors import UlimiError
from ulimi.run import open_run
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(open_run(name).dir)))
    except UlimiError as error:
        print(json.dumps("error: " + str(error)))
"""


class Hub:
    """As much of the hub as fetching a model asks for: what a revision is, what it holds, its files."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.closed: set[str] = set()
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format, *args):
                pass

            def answer(self, code, body=b"", **headers):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self):
                place = self.path.split("?")[0]
                hub.asked.append(f"{self.command} {place}")
                api, parts = place.startswith("/api/models/"), place.removeprefix("/api/models").split("/")[1:]
                model = "/".join(parts[:2])
                if model in hub.closed:
                    return self.answer(403, b"{}", X_Error_Code="GatedRepo")
                if model not in hub.models:
                    return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
                files, commit = hub.models[model], hub.commit(model)
                if parts[3] not in ("main", "v1", commit):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                if api:
                    rows = [
                        {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                        for name, data in files.items()
                    ]
                    about = {"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                    body = json.dumps(rows if parts[2] == "tree" else about).encode()
                    return self.answer(200, body, Content_Type="application/json")
                data = files["/".join(parts[4:])]
                return self.answer(200, data, ETag=f'"{oid(data)}"', X_Repo_Commit=commit)

            do_HEAD = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, model: str) -> str:
        return oid(repr(sorted(self.models[model].items())).encode())

    def environment(self, home: Path) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self.server.server_port}"
        return {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tiny_run):
    hub = Hub()
    # As it would be if somebody put the whole run folder there, and a program with it.
    hub.models["zulu/tiny"] = {**files_of(tiny_run.dir), "modeling_awd_lstm.py": b"raise SystemExit(1)\n"}
    yield hub
    hub.close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Open models in a process of its own, since the library reads its settings once; give folders and errors."""

    def call(*names):
        command = [sys.executable, "-c", SEVERAL, *names]
        done = subprocess.run(
            command, env=hub.environment(tmp_path / "home"), capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def test_a_model_is_fetched_once_and_used_without_a_network(hub, fetch, tiny_run):
    first, again, other = fetch("hf:zulu/tiny", "hf:zulu/tiny", "hf:zulu/tiny@v1")
    assert first == again == other
    assert open_run(first).recipe == tiny_run.recipe
    assert open_run(first).model_sha256 == tiny_run.model_sha256
    wanted = {name for name in files_of(tiny_run.dir) if name.split("/")[0] not in ("last", "corpus")}
    assert {"last/checkpoint.safetensors", "model.onnx", "model.safetensors"} <= set(files_of(tiny_run.dir))
    assert set(files_of(Path(first))) == wanted
    assert sum(asked == f"GET /zulu/tiny/resolve/{hub.commit('zulu/tiny')}/model.onnx" for asked in hub.asked) == 1
    hub.close()
    kept, missing = fetch("hf:zulu/tiny", "hf:zulu/small")
    assert kept == first
    assert missing.startswith("error: hf:zulu/small: cannot be fetched: ")
    assert "\n" not in missing


def test_what_has_changed_there_is_fetched_anew(hub, fetch):
    (first,) = fetch("hf:zulu/tiny")
    hub.models["zulu/tiny"]["README.md"] += b"\nmore\n"
    (second,) = fetch("hf:zulu/tiny")
    assert second != first
    assert (Path(second) / "README.md").read_bytes().endswith(b"\nmore\n")
    assert (Path(second) / "model.onnx").read_bytes() == (Path(first) / "model.onnx").read_bytes()


def test_why_it_is_not_to_be_had_is_said(hub, fetch):
    hub.models["zulu/other"] = {"config.json": b"{}"}
    hub.closed.add("zulu/closed")
    said = fetch("hf:zulu/none", "hf:zulu/tiny@v9", "hf:zulu/closed", "hf:zulu/other", "hf:zulu/a--b..c")
    assert [line.split(": ", 1)[1] for line in said] == [
        "hf:zulu/none: no such model on the hub, or not for you; `hf auth login` says who you are",
        "hf:zulu/tiny@v9: no revision 'v9'",
        "hf:zulu/closed: is open to those alone whom its owner lets in; `hf auth login` says who you are",
        "hf:zulu/other: holds no meta.json; allowed: what `ulimi hub` makes, or another run folder",
        "hf:zulu/a--b..c: Cannot have -- or .. in repo_id: 'zulu/a--b..c'.",
    ]
    # Nor was anything else of it fetched, which may be large.
    assert not [asked for asked in hub.asked if asked.endswith("config.json") and "/zulu/other/" in asked]
    assert "\n" not in "".join(said)


@pytest.mark.parametrize("name", ["hf:", "hf:tiny", "hf:a/b/c", "hf:a/b@", "hf:zulu/ti ny", "hf:../x y", "hf:/a/b"])
def test_what_is_no_name_is_refused(name):
    allowed = f"{name}: allowed: hf:USER/NAME or hf:USER/NAME@REVISION"
    assert refusal(lambda: fetch_run(name)) == allowed
    assert "allowed: hf:USER/NAME" in refusal(lambda: open_run(name))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("https://hub.example/them/theirs", "hf:them/theirs"),
        ("https://hub.example/them/theirs/tree/main", "hf:them/theirs"),
        ("hub.example/them/theirs", "hf:them/theirs"),
        ("them/theirs-0.1", "hf:them/theirs-0.1"),
        ("theirs", None),
        ("/them/theirs", None),
        ("a/b/c", None),
        ("../theirs", None),
    ],
)
def test_who_gives_an_address_is_told_the_name(path, name):
    said = refusal(lambda: open_run(path))
    assert (said.rpartition(" it would be ")[2] if "on the hub" in said else None) == name


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch, tiny_run):
    (tmp_path / "hf:zulu").mkdir()
    (tmp_path / "hf:zulu" / "tiny").symlink_to(tiny_run.dir)
    monkeypatch.chdir(tmp_path)
    assert open_run("hf:zulu/tiny").recipe == tiny_run.recipe


def test_a_mixture_comes_with_its_members(hub, fetch, tiny_run, corpus_dir, works, tmp_path):
    works("ngram", corpus_dir, "--out", tmp_path / "ngram", "--tokenizer-from", tiny_run.dir)
    works("mix", tiny_run.dir, tmp_path / "ngram", "-o", tmp_path / "mixed", "--weight", 0.25, "--weight", 0.75)
    hub.models["zulu/mixed"] = files_of(tmp_path / "mixed")
    (folder,) = fetch("hf:zulu/mixed")
    assert set(files_of(Path(folder))) == set(files_of(tmp_path / "mixed"))


def test_what_was_fetched_is_called_by_its_name_and_stays_as_it_is(tiny_run, tmp_path, corpus_dir):
    fetched = replace(
        tiny_run, dir=Path(shutil.copytree(tiny_run.dir, tmp_path / "0123abcd")), origin="hf:zulu/tiny@v1"
    )
    assert fetched.name == "hf:zulu/tiny@v1"
    assert fetched.title == "tiny"
    # What it says of where its text was is about another machine.
    assert tiny_run.text_path("train") is not None
    shutil.rmtree(fetched.dir / "corpus", ignore_errors=True)
    assert fetched.text_path("train") is None
    before = files_of(fetched.dir)
    run_stats(fetched, load_model(fetched), corpus_dir / "train.txt")
    assert files_of(fetched.dir) == before
    (fetched.dir / "model.onnx").unlink()
    said = refusal(lambda: load_engine(fetched, kind="onnx"))
    assert "`ulimi export RUN`, where it was trained, writes it" in said
    run_dir = tmp_path / "further"
    train(
        open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, (*TINY, "optim.max_epochs=1")),
        init_from=fetched,
    )  # fmt: skip
    assert open_run(run_dir).meta["init_from"] == "hf:zulu/tiny@0123abcd"


def test_commands_take_it(hub, tmp_path, tiny_run, works):
    def call(*args):
        command = [sys.executable, "-m", "ulimi", *map(str, args)]
        return subprocess.run(
            command, env=hub.environment(tmp_path / "home"), cwd=tmp_path, capture_output=True, encoding="utf-8",
            check=False,
        )  # fmt: skip

    done = call("generate", "Abantu", "-m", "hf:zulu/tiny", "--seed", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == works("generate", "Abantu", "-m", tiny_run.dir, "--seed", 1).out
    done = call("export", "hf:zulu/tiny")
    assert done.returncode == 2
    assert "ulimi export: hf:zulu/tiny is a model of the hub; allowed: a run folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
