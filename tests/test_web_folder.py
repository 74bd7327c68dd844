"""A web page with the model in it: its JavaScript says what Python says, and the folder needs nobody else."""

import gzip
import io
import json
import math
import os
import queue
import random
import re
import shutil
import stat
import subprocess
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from conftest import TINY, synthetic_lines
from ulimi.cli import DEFAULT_MODEL
from ulimi.corpus import open_corpus
from ulimi.engine import ENDS_C, ENDS_H, load_engine
from ulimi.errors import UlimiError
from ulimi.recipe import load_recipe
from ulimi.run import AWD_LSTM, MODELS, ONNX, SOURCE_CARD, Run, open_run
from ulimi.sampling import Sampling
from ulimi.score import score_lines
from ulimi.suggest import Suggester
from ulimi.surprisal import score_words
from ulimi.train import train
from ulimi.web_folder import LIBRARIES, PAGE, write_web_folder
from ulimi.words import Ending
from ulimi.writer import Writer, Writing

FILES = {
    "README.md", "LICENSES.txt", "package.json", "index.html", "answer.js", "worker.js", "ulimi.js", "libraries.js",
    "model/model.onnx.gz", "model/tokenizer.json", "model/model.json",
    *(f"lib/{name}" for _, names in LIBRARIES.values() for name in names.values()),
}  # fmt: skip

TEXTS = (
    "Abantwana bafund", "Abantwana ", "", "Umfundi uhamba isik", "Abantu.\nIzing", "e-", "i-Go", "ng'", "Kwa-Zu", "2",
    "ngo-202", "12345", "abc\U0001f600", "caf\u00e9", "cafe\u0301", "na\u0308", "x" * 90, "Ngiya <eos> ng", "  ",
    "a   b  ", "«Ng", "\u0301a", "kwe\u00a0si", "\u65e5\u672c", "yini\u2011", "\ufeffNgi", "umuntu- ", "-", "Yebo! ",
    "Yebo.", "abantu " * 40 + "baf", "\u00e9" * 50, "a" + "\u00e9" * 50,
)  # fmt: skip
ODD = (
    "e-Goli", "ng'ombe", "kwaZulu-Natal", "i-TV", "\u201cyebo\u201d", "caf\u00e9", "2024", "12345", "R5,000",
    "\U0001f600", "\u65e5\u672c", "\u0940", "-", "'", "ngo-2024", "yini?", "Yebo!", "(no.)",
)  # fmt: skip
KINDS = {
    "bpe": (),
    "unigram": ("tokenizer.kind=unigram", "model.tie_weights=false"),
    "char": ("tokenizer.kind=char",),
    "mogrifier": ("model.mogrifier_rounds=2", "model.mogrifier_rank=8"),
}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A folder in place of the libraries, for tests that run none."""
    folder = tmp_path_factory.mktemp("libraries")
    for _, names in LIBRARIES.values():
        for name in names:
            (folder / name).write_text(f"// {name}\n")
    return folder


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The libraries themselves, from npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("wants Node.js and npm")
    folder = tmp_path_factory.mktemp("npm")
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Where there is no network, say so soon.
            patch.setenv("npm_config_fetch_timeout", "120000")
            patch.setenv("npm_config_fetch_retries", "0")
            write_web_folder(open_run(DEFAULT_MODEL), folder / "web")
    except UlimiError as error:
        # A newer version whose files are called otherwise is no reason to be silent.
        if "npm could not fetch" not in str(error) or "package/dist" in str(error):
            raise
        pytest.skip(str(error))
    return folder / "web" / "lib"


@pytest.fixture(scope="session")
def odd_text(tmp_path_factory):
    """A text of which no character is sure, so that a model of it goes on in every way there is."""
    rng = random.Random(0)
    lines = [
        " ".join(rng.choice(ODD) if rng.random() < 0.4 else word for word in line.split())
        for line in synthetic_lines(200)
    ]
    path = tmp_path_factory.mktemp("odd") / "odd.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=KINDS)
def small(request, tmp_path_factory, odd_text):
    """A run of each kind that there is."""
    run_dir = tmp_path_factory.mktemp("web-runs") / request.param
    train(open_corpus(odd_text, run_dir / "corpus"), run_dir, load_recipe(None, (*TINY, *KINDS[request.param])))
    return open_run(run_dir)


def ask(folder: Path, *questions: list) -> list:
    """Ask a web folder's model in Node.js."""
    driver = Path(__file__).with_name("web_folder.mjs")
    done = subprocess.run(
        ["node", driver, folder], input=json.dumps(questions), capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_equal(folder: Path, run: Run) -> None:
    """Compare all that JavaScript says with what Python says, of the same graph."""
    engine, tokenizer = load_engine(run, kind="onnx"), run.tokenizer
    lines = [text for text in TEXTS if "\n" not in text]
    modes = [({"max_words": 8, "max_tokens": 40}, Ending(max_words=8, max_tokens=40)),
             ({"end": "sentence", "max_tokens": 25}, Ending(at="sentence", max_tokens=25)),
             ({"end": "paragraph", "max_tokens": 25}, Ending(at="paragraph", max_tokens=25))]  # fmt: skip
    answers = iter(ask(
        folder,
        *(["encode", text] for text in TEXTS),
        *(["suggest", text, 4] for text in TEXTS),
        *(["score", line] for line in lines),
        *(["write", text, {"temperature": 0, **asked}] for asked, _ in modes for text in TEXTS),
    ))  # fmt: skip
    for text in TEXTS:
        assert next(answers) == tokenizer.encode(text), text
    suggester = Suggester(engine, tokenizer)
    num_words = 0
    for text in TEXTS:
        found, expected = next(answers), suggester.search(text, 4)
        mine = {s["word"]: s["probability"] for s in found["suggestions"]}
        assert mine == pytest.approx({s.word: s.probability for s in expected.words}, abs=1e-4), text
        assert [s["probability"] for s in found["suggestions"]] == sorted(mine.values(), reverse=True)
        assert found["covered"] == pytest.approx(expected.covered, abs=2e-3), text
        num_words += len(mine)
    assert num_words > 2 * len(TEXTS)
    for (_, score), (_, words) in zip(
        score_lines(engine, tokenizer, lines), score_words(engine, tokenizer, lines), strict=True
    ):
        found, expected, by_word = next(answers), score.as_dict(), words.as_dict()
        assert found.pop("text") in lines
        assert [(w["text"], w["num_tokens"]) for w in found["words"]] == [
            (w["text"], w["num_tokens"]) for w in by_word["words"]
        ]
        assert found.pop("end_tokens") == by_word["end_tokens"]
        bits = [*(w["bits"] for w in found.pop("words")), found.pop("end_bits")]
        assert bits == pytest.approx([*(w["bits"] for w in by_word["words"]), by_word["end_bits"]], rel=1e-3, abs=1e-2)
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-3)
    for _, ending in modes:
        writer = Writer(engine, tokenizer, Writing(sampling=Sampling(temperature=0), ending=ending))
        num_written = 0
        for text in TEXTS:
            found, expected = next(answers), writer.write(text)[0].as_dict(0, None, writer.prompt_words(text))
            assert found["prompt"] == expected["prompt"]
            assert found["text"] == expected["text"], text
            assert [(w["text"], w["num_tokens"]) for w in found["words"]] == [
                (w["text"], w["num_tokens"]) for w in expected["words"]
            ]
            assert [w["probability"] for w in found["words"]] == pytest.approx(
                [w["probability"] for w in expected["words"]], abs=5e-3
            )
            num_written += len(found["words"])
        assert num_written > len(TEXTS)
    assert next(answers, None) is None


def test_every_kind_of_network_says_what_python_says(small, libraries, tmp_path):
    write_web_folder(small, tmp_path / "web", libraries=libraries)
    check_equal(tmp_path / "web", small)


def test_the_shipped_model_says_what_python_says(libraries):
    # As npm's libraries came with it; this folder was made with nothing but the command.
    run = open_run(DEFAULT_MODEL)
    answers = ask(
        libraries.parent, ["suggest", "Ngiyabonga kakh", 3], ["score", "Sawubona, unjani?"],
        ["write", "Namhlanje", {"temperature": 0, "max_words": 8}],
    )  # fmt: skip
    engine = load_engine(run, kind="onnx")
    expected = Suggester(engine, run.tokenizer).search("Ngiyabonga kakh", 3)
    found = [(s["word"], s["probability"]) for s in answers[0]["suggestions"]]
    assert found == [(s.word, pytest.approx(s.probability, abs=1e-4)) for s in expected.words]
    [(_, score)] = score_lines(engine, run.tokenizer, ["Sawubona, unjani?"])
    assert answers[1]["bits_per_char"] == pytest.approx(score.bits_per_char, rel=1e-3)
    writer = Writer(engine, run.tokenizer, Writing(sampling=Sampling(temperature=0), ending=Ending(max_words=8)))
    assert answers[2]["text"] == writer.write("Namhlanje")[0].text


def test_chance(tiny_run, libraries, tmp_path):
    write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
    one = {"max_tokens": 1, "top_p": 1}
    first, again, other, unseeded, *draws = ask(
        tmp_path / "web",
        *(["write", "Abantu ", {"max_words": 12, **asked}] for asked in ({"seed": 3}, {"seed": 3}, {"seed": 4}, {})),
        *(["write", "Abantwana\n", {**one, "seed": seed}] for seed in range(400)),
        *(["write", "Abantwana\n", {**one, "top_p": 0.5, "seed": seed}] for seed in range(200)),
    )
    assert first == again
    assert len({json.dumps(text) for text in (first, other, unseeded)}) == 3
    # Tokens come as often as the model finds them probable. Those that are no whole characters look alike.
    drawn = Counter((text["words"][-1]["text"], text["words"][-1]["probability"]) for text in draws[:400])
    for (_, probability), count in drawn.most_common(5):
        assert count / 400 == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 400) ** 0.5)
    assert len(drawn) > 20
    # And from the nucleus none but the least set that is as probable as it has to be.
    nucleus = {text["words"][-1]["text"]: text["words"][-1]["probability"] for text in draws[400:]}
    assert 1 < len(nucleus) < len(drawn)
    assert sum(nucleus.values()) - min(nucleus.values()) < 0.5


MISTAKES = (
    (["write", "a", {"max_tokens": 0}], "max_tokens is 0; allowed: a whole number, 1 or more"),
    (["write", "a", {"max_words": -1}], "max_words is -1; allowed: "),
    (["write", "a", {"temperature": -1}], "temperature is -1; allowed: "),
    (["write", "a", {"top_p": 0}], "top_p is 0; allowed: above 0, at most 1"),
    (["write", "a", {"seed": 0.5}], "seed is 0.5; allowed: "),
    (["write", "a", {"seed": 2**32}], "seed is 4294967296; allowed: "),
    (["write", "a", {"end": "page"}], "end is page; allowed: never, paragraph, sentence"),
    (["write", "a", {"top_k": 5}], "unknown option top_k; allowed: max_tokens, "),
    (["suggest", "a", 0], "num is 0; allowed: a whole number, 1 or more"),
    (["suggest", "a", 2, {"max_steps": 0}], "max_steps is 0; allowed: "),
    (["suggest", None], "the text is null; allowed: a string"),
    (["score", 5], "the text is 5; allowed: a string"),
    (["score", "a\nb" * 99], "allowed: one line, without a line end in it"),
    (["suggest", "\ud800"], "the text holds a lone surrogate"),
    (["write", "a\udc00", {}], "the text holds a lone surrogate"),
)


def test_mistakes_are_told_and_the_model_goes_on(tiny_run, libraries, tmp_path):
    write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
    *answers, last = ask(tmp_path / "web", *(question for question, _ in MISTAKES), ["suggest", "ab", 2])
    for answer, (_, said) in zip(answers, MISTAKES, strict=True):
        assert said in answer["error"]
    assert "suggestions" in last


PROBE = """
<iframe src="index.html"></iframe>
<script type="module">
  const frame = document.querySelector("iframe");
  await new Promise((done) => { frame.onload = done; });
  const page = frame.contentDocument, $ = (id) => page.getElementById(id);
  const until = async (ready) => { while (!ready()) await new Promise((done) => setTimeout(done, 50)); };
  const words = () => [...$("suggestions").children].map((button) => button.textContent);
  await until(() => words().length);
  const told = { model: $("model").textContent, first: words() };
  $("typed").focus();
  page.execCommand("insertText", false, "Ngiyabonga kakh");
  await until(() => words()[0] === "kakhulu" && $("suggestions").style.visibility === "");
  told.typed = words();
  $("suggestions").firstChild.click();
  told.taken = $("typed").value;
  $("words").value = 4;
  $("write").click();
  await until(() => $("text").textContent);
  told.written = $("text").textContent;
  $("score").click();
  await until(() => !$("scores").hidden);
  told.bits = $("scores").querySelector("tbody .number").textContent;
  told.line = $("scores").querySelector("tbody td").textContent;
  told.words = [...$("scores").querySelectorAll("tbody span")].map(({ textContent }) => textContent);
  $("scores").querySelector("tbody span").click();
  told.figure = $("figure").textContent;
  const [first, second] = $("scores").querySelectorAll("tbody span");
  first.focus();
  first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  told.next = [page.activeElement === second, first.tabIndex, second.tabIndex, $("figure").textContent];
  $("temperature").value = -1;
  $("write").click();
  await until(() => $("error").textContent);
  told.error = $("error").textContent;
  await fetch("told", { method: "POST", body: JSON.stringify(told) });
</script>
"""


class Probed(SimpleHTTPRequestHandler):
    """Serve a folder as a server does that knows few types; keep what the probe tells."""

    extensions_map: ClassVar = {"": "application/octet-stream", ".html": "text/html", ".js": "text/javascript"}

    def do_POST(self):
        self.server.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_questions_at_once_are_answered_as_one_after_another(tiny_run, libraries, tmp_path):
    write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
    questions = [["suggest", "Abantu baf", 3], ["write", "Umf", {"seed": 1}], ["score", "abantu"], ["suggest", "ik", 3]]
    together, *alone = ask(tmp_path / "web", ["together", questions * 3], *questions)
    assert together == alone * 3


def test_a_start_is_as_probable_as_among_those_that_can_be_chosen(libraries):
    # A space may be the beginning of more tokens than are looked at.
    [text] = ask(libraries.parent, ["write", "Sawubona, ", {"temperature": 0, "max_tokens": 1}])
    run = open_run(DEFAULT_MODEL)
    ending = Ending(max_tokens=1)
    writer = Writer(
        load_engine(run, kind="onnx"), run.tokenizer, Writing(sampling=Sampling(temperature=0), ending=ending)
    )
    [word] = writer.write("Sawubona, ")[0].words
    assert text["words"][-1]["probability"] == pytest.approx(math.exp(word.logprob), rel=1e-4)


def test_what_is_missing_is_named(tiny_run, libraries, tmp_path):
    for name, said in (
        ("model/model.onnx.gz", "no such file or directory"), ("model/model.json", "no such file or directory"),
        ("lib/tokenizers.min.js", "Cannot find module"),
        ("lib/ort-wasm-simd-threaded.wasm.gz", "no such file or directory"),
    ):  # fmt: skip
        write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
        (tmp_path / "web" / name).unlink()
        with pytest.raises(AssertionError, match=said) as raised:
            ask(tmp_path / "web", ["score", "a"])
        assert name in str(raised.value)
        shutil.rmtree(tmp_path / "web")
    write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
    graph = tmp_path / "web" / "model" / "model.onnx.gz"
    packed = graph.read_bytes()
    for content, said in ((packed[:-100], "unpacked"), (b"cut off", "used"), (gzip.compress(b"cut off"), "used")):
        graph.write_bytes(content)
        with pytest.raises(AssertionError, match=rf"model\.onnx\.gz cannot be {said}"):
            ask(tmp_path / "web", ["score", "a"])
    (tmp_path / "web" / "model" / "tokenizer.json").write_text("<html>")
    with pytest.raises(AssertionError, match=r"tokenizer\.json is no JSON"):
        ask(tmp_path / "web", ["score", "a"])


def test_a_server_that_unpacks_what_is_packed_does_no_harm(tiny_run, libraries, tmp_path):
    write_web_folder(tiny_run, tmp_path / "web", libraries=libraries)
    before = ask(tmp_path / "web", ["score", "Abantwana bafunda"])
    for name in ("model/model.onnx.gz", "lib/ort-wasm-simd-threaded.wasm.gz"):
        path = tmp_path / "web" / name
        path.write_bytes(gzip.decompress(path.read_bytes()))
    assert ask(tmp_path / "web", ["score", "Abantwana bafunda"]) == before


def test_the_page_in_a_browser(libraries, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("wants Chromium")
    folder = tmp_path / "web"
    shutil.copytree(libraries.parent, folder)
    (folder / "probe.html").write_text(PROBE)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Probed, directory=folder)) as server:
        server.told = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/profile"]
        with subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/probe.html"], stderr=subprocess.DEVNULL
        ) as running:
            try:
                told = server.told.get(timeout=240)
            finally:
                running.kill()
                server.shutdown()
    run = open_run(DEFAULT_MODEL)
    suggester = Suggester(load_engine(run, kind="onnx"), run.tokenizer)
    assert told["model"].startswith(f"isizulu: {run.tokenizer.vocab_size} tokens, ulimi ")
    assert told["first"] == [s.word for s in suggester.suggest("")]
    assert told["typed"] == [s.word for s in suggester.suggest("Ngiyabonga kakh")]
    assert told["taken"] == "Ngiyabonga kakhulu "
    assert told["written"].startswith("Ngiyabonga kakhulu")
    assert len(told["written"].split()) == 6
    engine = load_engine(run, kind="onnx")
    [(_, score)] = score_lines(engine, run.tokenizer, ["Ngiyabonga kakhulu "])
    assert told["bits"] == f"{score.bits_per_char:.3f}"
    assert told["line"] == "".join(told["words"]) == told["taken"].rstrip()
    assert [word.strip() for word in told["words"]] == told["taken"].split()
    assert re.fullmatch(r"Ngiyabonga: 0\.\d+\.", told["figure"])
    is_there, *indices, figure = told["next"]
    assert is_there
    assert indices == [-1, 0]
    assert re.fullmatch(r"kakhulu: 0\.\d+\.", figure)
    assert told["error"] == "temperature is -1; allowed: 0 (the most probable token) or more"


# The folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_what_the_page_needs_and_no_more(tiny_run, stand_ins, works, tmp_path):
    out = tmp_path / "new" / "web"
    told = works("web", "--out", out, "-m", tiny_run.dir, "--libraries", stand_ins)
    assert files_of(out) == FILES
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert told.out.startswith(f"{out}: {num_bytes / 1e6:.1f} MB; try: python3 -m http.server -d {out}")
    assert gzip.decompress((out / "model" / f"{ONNX}.gz").read_bytes()) == (tiny_run.dir / ONNX).read_bytes()
    assert (out / "lib" / "ort-wasm-simd-threaded.wasm.gz").read_bytes().startswith(b"\x1f\x8b")
    assert (out / "answer.js").read_bytes() == (PAGE / "local.js").read_bytes()
    described = json.loads((out / "model" / "model.json").read_text(encoding="utf-8"))
    assert described["name"] == "tiny"
    assert described["kind"] == "bpe"
    assert [token.encode("latin-1") for token in described["tokens"]] == [
        tiny_run.tokenizer.token_bytes(id) for id in range(tiny_run.tokenizer.vocab_size)
    ]
    state = load_engine(tiny_run, kind="onnx").initial_state(1)
    assert [entry["size"] for entry in described["state"]] == [array.size for array in state]
    assert [entry["name"] for entry in described["state"]] == ["h0", "c0", "h1", "c1"]
    assert [entry["ends"] for entry in described["state"]] == [list(ENDS_H), list(ENDS_C)] * 2
    assert (out / "README.md").read_text(encoding="utf-8").startswith("# tiny, in the browser\n")


def test_cards_and_licence_go_along(tiny_run, stand_ins, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run.dir, copy)
    (copy / SOURCE_CARD).write_text("what it started from\n")
    write_web_folder(open_run(copy), tmp_path / "web", libraries=stand_ins)
    assert (tmp_path / "web" / "model" / SOURCE_CARD).read_text() == "what it started from\n"
    write_web_folder(open_run(DEFAULT_MODEL), tmp_path / "shipped", libraries=stand_ins)
    card = (tmp_path / "shipped" / "model" / "MODEL_CARD.md").read_bytes()
    assert card == (MODELS / DEFAULT_MODEL / "MODEL_CARD.md").read_bytes()


def test_nothing_is_loaded_from_another_place(tiny_run, stand_ins, tmp_path):
    write_web_folder(tiny_run, tmp_path / "web", libraries=stand_ins)
    imported = set()
    for name in ("index.html", "answer.js", "worker.js", "ulimi.js", "libraries.js"):
        code = "\n".join(
            line for line in (tmp_path / "web" / name).read_text(encoding="utf-8").splitlines()
            if not line.lstrip().startswith("//")
        )  # fmt: skip
        assert not re.search(r"https?:/|src=|importScripts|XMLHttpRequest|WebSocket|sendBeacon", code), name
        imported |= set(re.findall(r'(?:from |import\(|new URL\()"(\./.+?)"', code))
    libraries = {f"./lib/{name}" for _, names in LIBRARIES.values() for name in names.values()}
    assert imported == {"./answer.js", "./worker.js", "./ulimi.js", "./libraries.js", "./model/", *libraries}
    imported.remove("./model/")
    assert all((tmp_path / "web" / name).is_file() for name in imported)


def test_licences_go_along_and_the_readme_says_where(tiny_run, stand_ins, tmp_path):
    write_web_folder(tiny_run, tmp_path / "own", libraries=stand_ins)
    licences = (tmp_path / "own" / "LICENSES.txt").read_text(encoding="utf-8")
    assert (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8") in licences
    assert "Permission is hereby granted, free of charge" in licences
    assert "is for whoever trained it to say here" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    write_web_folder(open_run(DEFAULT_MODEL), tmp_path / "shipped", libraries=stand_ins)
    assert "is told in model/MODEL_CARD.md." in (tmp_path / "shipped" / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_node_modules_will_do(tiny_run, stand_ins, tmp_path):
    for package, (_, names) in LIBRARIES.items():
        (tmp_path / "node_modules" / package / "dist").mkdir(parents=True)
        for name in names:
            shutil.copyfile(stand_ins / name, tmp_path / "node_modules" / package / "dist" / name)
    write_web_folder(tiny_run, tmp_path / "web", libraries=tmp_path / "node_modules")
    targets = {target for _, names in LIBRARIES.values() for target in names.values()}
    assert files_of(tmp_path / "web" / "lib") == targets
    write_web_folder(tiny_run, tmp_path / "again", libraries=tmp_path / "web" / "lib")
    assert files_of(tmp_path / "again" / "lib") == targets
    for name in targets:  # what is packed is not packed again
        assert (tmp_path / "again" / "lib" / name).read_bytes() == (tmp_path / "web" / "lib" / name).read_bytes()


def fake_npm(folder: Path, script: str) -> str:
    """A PATH on which npm is a shell script, and nothing else of that name."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


def test_npm_is_asked_for_the_packages_and_runs_none_of_them(tiny_run, tmp_path, monkeypatch):
    for package, (_, names) in LIBRARIES.items():
        with tarfile.open(tmp_path / f"{package.replace('/', '-')}.tgz", "w:gz") as archive:
            for name in (*names, "else.js"):
                entry = tarfile.TarInfo(f"package/dist/{name}")
                entry.size = len(name)
                archive.addfile(entry, io.BytesIO(name.encode()))
    script = (
        f'echo "$@" >> {tmp_path}/asked\n'
        f'case "$2" in @*) cp {tmp_path}/@*.tgz "$4";; *) cp {tmp_path}/onnxruntime-web.tgz "$4";; esac'
    )
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    write_web_folder(tiny_run, tmp_path / "web")
    asked = [line.split()[:3] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == [["pack", f"{name}@{versions}", "--pack-destination"] for name, (versions, _) in LIBRARIES.items()]
    for _, names in LIBRARIES.values():
        for name, target in names.items():
            content = (tmp_path / "web" / "lib" / target).read_bytes()
            assert (gzip.decompress(content) if target.endswith(".gz") else content) == name.encode()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "npm is not there to fetch onnxruntime-web and @huggingface/tokenizers"),
        ("echo npm error network down >&2; exit 1", "npm could not fetch onnxruntime-web: npm error network down"),
        ("exit 0", "npm could not fetch onnxruntime-web: it left no package; "),
        ('echo no archive > "$4/a.tgz"', "npm could not fetch onnxruntime-web: file could not be opened"),
        ('tar czf "$4/a.tgz" -C / etc/hostname', "'package/dist/ort.wasm.min.mjs' not found"),
    ],
)
def test_without_npm_or_network_one_line_says_so(tiny_run, refused, tmp_path, monkeypatch, script, said):
    if script is None:
        (tmp_path / "empty").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    else:
        monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    line = refused("web", "--out", tmp_path / "web", "-m", tiny_run.dir)
    assert said in line
    assert "--libraries" in line
    assert not (tmp_path / "web").exists()


def test_what_a_browser_cannot_take_is_refused(tiny_run, corpus_dir, stand_ins, refused, works, tmp_path):
    out = ("--out", tmp_path / "web", "--libraries", stand_ins)
    works("ngram", corpus_dir, "--out", tmp_path / "ngram", "--tokenizer-from", tiny_run.dir)
    works("mix", tiny_run.dir, tmp_path / "ngram", "--weight", "0.5", "--weight", "0.5", "--out", tmp_path / "mixed")
    assert "holds an n-gram model" in refused("web", *out, "-m", tmp_path / "ngram")
    assert "holds a mixture" in refused("web", *out, "-m", tmp_path / "mixed")
    for name, settings, said in (
        ("sparse", ("loss.kind=entmax",), "its loss is entmax; `ulimi web` takes a network of cross entropy"),
        ("words", ("tokenizer.kind=word",), "kind 'word'; `ulimi web` takes bpe, unigram or char"),
    ):
        train(
            open_corpus(corpus_dir, tmp_path / name / "corpus"), tmp_path / name, load_recipe(None, (*TINY, *settings))
        )
        assert said in refused("web", *out, "-m", tmp_path / name)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run.dir, copy)
    (copy / ONNX).unlink()
    assert f"holds no {ONNX}; `ulimi export {copy}` writes it" in refused("web", *out, "-m", copy)
    assert open_run(copy).kind == AWD_LSTM
    assert not (tmp_path / "web").exists()


def test_mistakes_with_folders(tiny_run, stand_ins, refused, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "mine").write_text("mine")
    line = refused("web", "--out", tmp_path / "web", "-m", tiny_run.dir, "--libraries", stand_ins)
    assert "is there already" in line
    assert (tmp_path / "web" / "mine").read_text() == "mine"
    line = refused("web", "--out", tmp_path / "other", "-m", tiny_run.dir, "--libraries", tmp_path)
    assert f"--libraries {tmp_path}: no ort.wasm.min.mjs; allowed: " in line
    assert not (tmp_path / "other").exists()
