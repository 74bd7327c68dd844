"""The server says what the commands say, refuses in one line, and outlives whatever it is sent."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import NamedTuple

import pytest

from ulimi.engine import load_engine
from ulimi.sampling import Sampling
from ulimi.serve import (
    GENERATE,
    MAX_BYTES,
    MAX_CHARS,
    MAX_ITEMS,
    PAGE,
    SCORE,
    SUGGEST,
    Service,
    listen,
    make_app,
    make_server,
    url_of,
)
from ulimi.words import PROBABILITY_STEPS, Ending
from ulimi.writer import TOP_P, Writer, Writing


@pytest.fixture(scope="module")
def service(tiny_run):
    return Service("tiny", load_engine(tiny_run), tiny_run.tokenizer)


class Serving(NamedTuple):
    url: str
    address: tuple[str, int]


@contextmanager
def serving(service, origins=(), *, any_host=False):
    with listen("127.0.0.1", 0) as listener:
        running = make_server(make_app(service, origins, any_host=any_host))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield Serving(url_of(listener), listener.getsockname())
        running.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(service):
    with serving(service) as server:
        yield server


def send(server, path, body=None, *, kind="application/json", method=None, **headers):
    """Give status, headers and text of an answer."""
    data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
    request = urllib.request.Request(server.url + path, data, {"Content-Type": kind, **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def ask(server, path, body):
    status, _, text = send(server, path, body)
    assert status == 200, text
    return json.loads(text)


# --- What it answers ---------------------------------------------------------------------------------


def test_texts_are_those_of_the_command(server, works, tiny_run):
    options = ("--seed", 3, "--num", 2, "--max-tokens", 12, "--probabilities")
    rows = works("generate", "Abantu baf", "-m", tiny_run.dir, *options, "--json").json
    request = {"prompt": "Abantu baf", "seed": 3, "num": 2, "max_tokens": 12, "probabilities": True}
    assert ask(server, "/generate", request) == {"texts": rows}
    del request["probabilities"]
    assert "words" not in ask(server, "/generate", request)["texts"][0]


def test_every_setting_reaches_the_text(tiny_run, monkeypatch):
    writings = []
    monkeypatch.setattr("ulimi.serve.Writer", lambda *args: writings.append(args[-1]) or Writer(*args))
    ending = {
        "max_tokens": 30, "max_words": 9, "max_chars": 90, "min_tokens": 2, "min_words": 1, "min_chars": 3,
    }  # fmt: skip
    sampling = {"temperature": 1.3, "alpha": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical": 0.95}
    rules = {"repetition_penalty": 1.2, "no_repeat_ngram": 2}
    service = Service("tiny", load_engine(tiny_run), tiny_run.tokenizer)
    request = {
        "prompt": "Abantu", "num": 3, "seed": 11, "probabilities": False, "end": "paragraph", "stop": ["!", "?"],
        "ban": ["abantu"], **ending, **sampling, **rules,
    }  # fmt: skip
    assert request.keys() == GENERATE.keys()
    service.generate(request)
    whole = Writing(
        sampling=Sampling(**sampling), ending=Ending(at="paragraph", stops=("!", "?"), **ending), banned=("abantu",),
        **rules,
    )  # fmt: skip
    assert writings == [whole]
    # Alike requests share a writer; without any, the default of the command.
    service.generate(request | {"prompt": "Izingane", "seed": 12})
    assert writings == [whole]
    service.generate({})
    assert writings[1:] == [Writing(sampling=Sampling(top_p=TOP_P))]


def test_without_a_seed_texts_differ_and_can_be_had_again(server):
    one, two = (ask(server, "/generate", {"max_tokens": 20})["texts"][0] for _ in range(2))
    assert one["seed"] != two["seed"]
    assert ask(server, "/generate", {"max_tokens": 20, "seed": one["seed"]})["texts"] == [one]


def test_null_is_as_if_a_field_were_not_there(server):
    plain = {"seed": 1, "max_tokens": 15}
    nulls = plain | {"prompt": None, "temperature": None, "top_p": None, "num": None, "stop": None, "end": None}
    assert ask(server, "/generate", nulls) == ask(server, "/generate", plain)


def test_suggestions_are_those_of_the_command(server, works, tiny_run):
    for text in ("Abantu bafun", "Abantu ", ""):
        (row,) = works("suggest", text, "-m", tiny_run.dir, "--num", 3, "--json").json
        assert ask(server, "/suggest", {"text": text, "num": 3}) == row
    assert len(ask(server, "/suggest", {"text": "Abantu "})["suggestions"]) == 5


def test_scores_are_those_of_the_command(server, works, tiny_run, corpus_dir):
    lines = (corpus_dir / "test.txt").read_text().splitlines()
    rows = works("score", corpus_dir / "test.txt", "-m", tiny_run.dir, "--engine", "onnx", "--json").json
    assert ask(server, "/score", {"lines": lines}) == {"lines": rows}
    assert ask(server, "/score", {"lines": []}) == {"lines": []}
    command = ("score", "--words", corpus_dir / "test.txt", "-m", tiny_run.dir, "--engine", "onnx", "--json")
    with_words = [row | words for row, words in zip(rows, works(*command).json, strict=True)]
    assert ask(server, "/score", {"lines": lines, "words": True}) == {"lines": with_words}
    assert ask(server, "/score", {"lines": lines[:2], "words": False}) == {"lines": rows[:2]}


def test_it_says_what_model_it_is(server, tiny_run):
    status, headers, text = send(server, "/model")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(text)["model"] == "tiny"
    assert json.loads(text)["vocab_size"] == tiny_run.tokenizer.vocab_size
    assert json.loads(text)["sparse"] is False


def test_many_at_once_get_what_each_gets_alone(server):
    requests = [("/generate", {"prompt": p, "seed": s, "max_tokens": 10}) for p in ("Abantu", "Izin") for s in range(5)]
    requests += [("/suggest", {"text": text}) for text in ("Ab", "Aba", "Abantu ", "Abantu b")] * 3
    alone = [ask(server, *request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda request: ask(server, *request), requests)) == alone


def test_the_model_is_asked_one_question_at_a_time(monkeypatch):
    inside, seen = [], []

    def slow(_self, _request):
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return {"answered": len(seen)}

    monkeypatch.setattr(Service, "suggest", slow)
    with serving(Service.__new__(Service)) as other, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(other, "/suggest", {}), range(16)))
    assert seen == [1] * 16


def test_who_went_away_is_not_worked_for(monkeypatch):
    answered = []

    def slow(_self, request):
        answered.append(request)
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(Service, "suggest", slow)
    body = b'{"text": "gone"}'
    raw = b"POST /suggest HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with serving(Service.__new__(Service)) as other:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, other, "/suggest", {"text": "first"})
            while not answered:
                time.sleep(0.01)
            with socket.create_connection(other.address) as connection:
                connection.sendall(raw % len(body) + body)
                time.sleep(0.1)
            first.result()
        ask(other, "/suggest", {"text": "last"})
    assert answered == [{"text": "first"}, {"text": "last"}]


def test_a_connection_is_kept(server):
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.connect()
    kept = connection.sock
    for body, status in ((b'{"text": "Ab"}', 200), (b'{"txt": "Ab"}', 400), (b"{}", 400), (b'{"text": "Ab"}', 200)):
        connection.request("POST", "/suggest", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == status
        answer.read()
        assert connection.sock is kept
    connection.request("HEAD", "/model")
    answer = connection.getresponse()
    assert int(answer.headers["Content-Length"]) > 10
    assert answer.read() == b""
    connection.close()


def test_an_answer_does_not_wait_for_the_network(server):
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        connection.request("GET", "/model")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - start)
    connection.close()
    # TCP's delayed acknowledgement takes 0.04 from the second answer on.
    assert min(seconds[1:]) < 0.03, seconds


def test_the_page_asks_nobody_else(server):
    status, headers, text = send(server, "/?from=a-bookmark")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert text == (PAGE / "index.html").read_text(encoding="utf-8")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    # Its icon is an empty one of its own: a browser that may not have it complains, without one it asks for another.
    assert '<link rel="icon" href="data:,">' in text
    assert "img-src data:" in policy
    assert not re.search(r"https?:|src=|@import", text)
    # What it asks with comes from this server as well, and asks it in turn.
    assert re.findall(r' from "(.*?)"', text) == ["./answer.js"]
    assert "script-src 'unsafe-inline' 'self'" in policy
    status, headers, script = send(server, "/answer.js")
    assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
    assert script == (PAGE / "answer.js").read_text(encoding="utf-8")
    assert not re.search(r"https?:|import", script)
    # What its script sends are fields that there are.
    sent = dict(re.findall(r'ask\("(\w+)", \{(.*?)\}[,)]', text, re.S))
    assert sent.keys() == {"generate", "suggest", "score"}
    for path, fields in (("generate", GENERATE), ("suggest", SUGGEST), ("score", SCORE)):
        names = re.findall(r"(?:^|,)\s*(\w+)\s*(?=[:,]|$)", sent[path].strip())
        assert names
        assert set(names) <= fields.keys()
    assert f"STEPS = [{', '.join(f'{step:g}' for step in PROBABILITY_STEPS)}]" in text


class Elements(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.all = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))


def test_the_script_of_the_page_finds_what_it_is_about():
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    ids = [attrs["id"] for _, attrs in Elements(text).all if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:\$|number|onPress)\("(\w+)"', text)) <= set(ids)


def test_the_page_can_be_used_without_seeing_it():
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    elements = Elements(text).all
    assert [tag for tag, _ in elements if re.fullmatch(r"main|h\d", tag)] == ["main", "h1", "h2", "h2"]
    # A name is read out only of what has a role; a field has a label; what changes by itself is told.
    assert all("role" in attrs for tag, attrs in elements if tag == "div" and "aria-label" in attrs)
    labelled = {attrs["for"] for tag, attrs in elements if tag == "label" and "for" in attrs}
    wrapped = set(re.findall(r'<label>\w+ <\w+ id="(\w+)"', text))
    assert {attrs["id"] for tag, attrs in elements if tag in ("input", "textarea")} == labelled | wrapped
    told = {attrs["id"] for _, attrs in elements if "aria-live" in attrs or attrs.get("role") in ("alert", "status")}
    assert told == {"suggestions", "error", "text", "figure", "scored"}
    # A button that is disabled while it works loses the focus.
    assert ".disabled" not in text


@pytest.mark.parametrize(("scheme", "page"), [("light", "#ffffff"), ("dark", "#121212")])
def test_the_colours_of_the_page_can_be_read(scheme, page):
    def luminance(color):
        """As WCAG 2 has it."""
        digits = color[1:] if len(color) == 7 else "".join(digit * 2 for digit in color[1:])
        parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one, other):
        dark, bright = sorted((luminance(one), luminance(other)))
        return (bright + 0.05) / (dark + 0.05)

    text = (PAGE / "index.html").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in re.findall(r":root \{(.*?)\}", text))
    colors = light if scheme == "light" else light | dark
    assert colors.keys() == {"line", "quiet", "p0", "p1", "p2", "p3", "p4"}
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast(colors.pop("line"), page) >= 3
    assert min(contrast(color, page) for color in colors.values()) >= 4.5


# --- What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body", "said"), [
    ("/generate", {"promt": "Abantu"}, "unknown field 'promt'; allowed: prompt, num, "),
    ("/generate", {"promt": "Abantu"}, "did you mean 'prompt'?"),
    ("/generate", {"x" * 99: 1}, "unknown field 'xxxx"),
    ("/generate", {"prompt": 3}, "prompt must be a text; got 3"),
    ("/generate", {"num": True}, "num must be a whole number; got true"),
    ("/generate", {"num": 1.0}, "num must be a whole number; got 1.0"),
    ("/generate", {"num": 10**30}, "num must be a whole number; got a far larger one"),
    ("/generate", {"num": 0}, "num must be 1 to 100 here; got 0"),
    ("/generate", {"num": 101}, "num must be 1 to 100 here; got 101"),
    ("/generate", {"max_tokens": 10**6}, "num times max_tokens must be 1 to 10000 here; got 1000000"),
    ("/generate", {"max_tokens": 1000, "num": 11}, "num times max_tokens must be 1 to 10000 here; got 11000"),
    ("/generate", {"max_tokens": 0}, "num times max_tokens must be 1 to 10000 here; got 0"),
    ("/generate", {"prompt": "a" * (MAX_CHARS + 1)}, "prompt has 10001 characters; allowed: up to 10000"),
    ("/generate", {"stop": ["a"] * (MAX_ITEMS + 1)}, "stop has 1001 texts; allowed: up to 1000"),
    ("/generate", {"temperature": "hot"}, 'temperature must be a number; got "hot"'),
    ("/generate", {"temperature": False}, "temperature must be a number; got false"),
    ("/generate", {"temperature": -1}, "temperature must be a finite number"),
    ("/generate", {"temperature": 10**300}, "temperature must be a finite number"),
    ("/generate", b'{"top_p": NaN}', "top_p must be above 0"),
    ("/generate", {"top_p": 2}, "top_p must be above 0 and at most 1"),
    ("/generate", {"seed": -1}, "seed must be 0 or more; got -1"),
    ("/generate", {"seed": -(10**4200)}, "seed must be a whole number; got a far larger one"),
    ("/generate", {"stop": "."}, 'stop must be a list of texts; got "."'),
    ("/generate", {"stop": [1]}, "stop must be a list of texts; got [1]"),
    ("/generate", {"stop": [""]}, "an empty stop string"),
    ("/generate", {"end": "page"}, "a text ends 'page': allowed: "),
    ("/generate", {"probabilities": 1}, "probabilities must be true or false; got 1"),
    ("/generate", {"prompt": "\ud800"}, "lone surrogate"),
    ("/generate", [1, 2], "the request must be a JSON object; got [1, 2]"),
    ("/generate", b"", "the request is not JSON"),
    ("/generate", b"{'prompt': 1}", "the request is not JSON"),
    ("/generate", b"\xff\xfe", "the request is not JSON"),
    ("/generate", b'{"num": ' + b"9" * 5000 + b"}", "the request is not JSON"),
    ("/generate", b"[" * 100_000, "too many brackets within each other"),
    ("/suggest", {}, "the field 'text' is missing: a text"),
    ("/suggest", {"text": None}, "the field 'text' is missing"),
    ("/suggest", {"text": "Ab", "num": 1000}, "num must be 1 to 100 here"),
    ("/suggest", {"text": "\udfff"}, "lone surrogate"),
    ("/score", {"lines": "Abantu"}, 'lines must be a list of texts; got "Abantu"'),
    ("/score", {"lines": ["one\ntwo"]}, "lines must each be one line"),
])  # fmt: skip
def test_a_mistake_is_one_line(server, path, body, said):
    status, headers, text = send(server, path, body)
    assert status == 400
    assert headers["Content-Type"] == "application/json"
    error = json.loads(text)["error"]
    assert said in error
    assert "\n" not in error
    assert len(error) < 500


@pytest.mark.parametrize("name", [name for name, kind in GENERATE.items() if kind in (int, float)])
def test_no_number_is_too_much_for_it(server, name):
    for number in (10**30, -(10**30), 1e300, 0, -1, 0.5, 1e-300):
        status, _, text = send(server, "/generate", {"max_tokens": 3, name: number})
        assert status in (200, 400), (number, text)


def test_what_is_no_request_of_ours(server):
    status, _, text = send(server, "/nowhere")
    assert status == 404
    assert "nothing at /nowhere; there are GET /, /model; POST /generate, /suggest, /score" in json.loads(text)["error"]
    status, headers, text = send(server, "/suggest")
    assert (status, headers["Allow"]) == (405, "POST")
    assert json.loads(text) == {"error": "/suggest answers POST; got GET"}
    status, headers, text = send(server, "/model", {})
    assert (status, "GET" in headers["Allow"]) == (405, True)
    assert json.loads(text) == {"error": "/model answers GET; got POST"}
    assert send(server, "/nowhere", {})[0] == 404
    assert send(server, "/suggest", {"text": "Ab"}, method="PUT")[0] == 405
    # What a form of another site could send.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, text = send(server, "/suggest", b'{"text": "Ab"}', kind=kind)
        assert status == 415
        assert json.loads(text) == {"error": f"Content-Type is {kind}; allowed: application/json"}
    assert send(server, "/suggest", {"text": "Ab"}, kind="application/json; charset=utf-8")[0] == 200
    status, _, text = send(server, "/suggest", b" " * (MAX_BYTES + 1))
    assert status == 413
    assert json.loads(text) == {"error": f"the request has more than {MAX_BYTES} bytes"}


HEAD = b"POST /suggest HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(("raw", "starts"), [
    (HEAD + b"\r\n", b"HTTP/1.1 400"),
    (HEAD + b"Content-Length: -5\r\n\r\n", b"HTTP/1.1 400"),
    (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"HTTP/1.1 400"),
    (HEAD + b"Content-Length: 14\r\n\r\n" + b'{"text": "Ab"}', b"HTTP/1.1 200"),
    (HEAD + b"Content-Length: 16\r\n\r\n" + b'{"text": "Ab"}', b""),  # cut off: nobody is there for an answer
    (HEAD + b"Expect: 100-continue\r\nContent-Length: 14\r\n\r\n" + b'{"text": "Ab"}', b"HTTP/1.1 100 "),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\ne\r\n" + b'{"text": "Ab"}' + b"\r\n0\r\n\r\n", b"HTTP/1.1 200"),
    (b"GET /model HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"HTTP/1.1 400"),
    (b"GET /model HTTP/1.1\r\nHost: localhost:8000\r\n\r\n", b"HTTP/1.1 200"),
    (b"GET /model HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", b"HTTP/1.1 200"),
    (b"GET /model HTTP/1.1\r\nHost: [2001:db8::1]:8000\r\n\r\n", b"HTTP/1.1 400"),
    (b"hello\r\n\r\n", b"HTTP/1.1 400"),
    (b"", b""),
])  # fmt: skip
def test_a_strange_request_harms_nobody(server, raw, starts, capfd):
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(raw)
        if not starts:
            connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
    assert answer.startswith(starts)
    assert bool(answer) == bool(starts)
    assert send(server, "/model")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_fault_of_ours_keeps_its_traceback_and_the_server(monkeypatch, capfd):
    def broken(_self, _request):
        raise KeyError("a fault")

    monkeypatch.setattr(Service, "suggest", broken)
    with serving(Service.__new__(Service)) as server:
        for _ in range(2):
            status, _, text = send(server, "/suggest", {"text": "Ab"})
            assert status == 500
            assert json.loads(text) == {"error": "a fault of ulimi's own; the terminal of its server shows it"}
    assert "KeyError: 'a fault'" in capfd.readouterr().err


def test_a_mistake_lets_the_next_one_in(server):
    assert send(server, "/generate", {"temperature": -1})[0] == 400
    assert ask(server, "/generate", {"max_tokens": 1, "seed": 1})["texts"]


def test_other_sites_may_ask_if_they_are_let(server, service):
    def asked_by(origin, server, path, body=None, method=None):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        status, headers, _ = send(server, path, body, method=method, **asked)
        return status, headers["Access-Control-Allow-Origin"]

    ours, another = "https://keyboard.example", "https://other.example"
    requests = [("/suggest", {"text": "Ab"}), ("/suggest", {}), ("/model",), ("/suggest", None, "OPTIONS")]
    assert [asked_by(ours, server, *request)[1] for request in requests] == [None] * 4
    with serving(service, [ours, "http://localhost:3000"]) as open_server:
        assert [asked_by(ours, open_server, *request) for request in requests] == [
            (200, ours), (400, ours), (200, ours), (200, ours),
        ]  # fmt: skip
        assert [asked_by(another, open_server, *request)[1] for request in requests] == [None] * 4
    with serving(service, ["*"]) as open_server:
        assert [asked_by(another, open_server, *request)[1] for request in requests] == ["*"] * 4


def test_a_server_for_others_has_any_name(service):
    with serving(service, any_host=True) as server, socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(b"GET /model HTTP/1.1\r\nHost: models.example\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


# --- The command -------------------------------------------------------------------------------------


def test_addresses_that_are_none(refused, server):
    port = server.address[1]
    assert f"--host 127.0.0.1 --port {port}: " in refused("serve", "--port", port)
    assert "--host nowhere.invalid --port 0: " in refused("serve", "--host", "nowhere.invalid", "--port", 0)
    assert "--port 70000: allowed: 0 (any free one) to 65535" in refused("serve", "--port", 70000)
    assert "--host is empty; allowed: 127.0.0.1" in refused("serve", "--host", "")
    for host in ("\u00e9..x", "a\0b"):
        assert f"--host {host} --port 0: " in refused("serve", "--host", host, "--port", 0)
    for origin in ("keyboard.example", "https://keyboard.example/", "https://\u4e2d.example", "null", "https://a\nb"):
        assert f"--allow-origin {origin!r}: allowed: " in refused("serve", "--port", 0, "--allow-origin", origin)
    assert "no run folder" in refused("serve", "-m", "nowhere")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_command_serves_until_it_is_stopped(tiny_run, host):
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    process = subprocess.Popen(
        [sys.executable, "-m", "ulimi", "serve", "-m", tiny_run.dir, "--port", "0", "--host", host],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        url = re.match(r"(http://(?:127\.0\.0\.1|\[::1\]):\d+) serves .*tiny; Ctrl-C ends it", said)[1]
        with urllib.request.urlopen(f"{url}/model", timeout=30) as answer:
            assert json.loads(answer.read())["model"] == "tiny"
        # A page of another site that gives its own name this machine's address.
        stranger = urllib.request.Request(f"{url}/model", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(stranger, timeout=30)
        assert caught.value.code == 400
        caught.value.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert (out, err) == ("", "")
