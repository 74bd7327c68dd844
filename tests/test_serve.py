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

import pytest

from ulimi.engine import load_engine
from ulimi.sampling import Sampling
from ulimi.serve import GENERATE, MAX_BYTES, PAGE, SCORE, SUGGEST, Server, Service
from ulimi.words import Ending
from ulimi.writer import TOP_P, Writer, Writing


@pytest.fixture(scope="module")
def service(tiny_run):
    return Service("tiny", load_engine(tiny_run), tiny_run.tokenizer)


def started(service, *args):
    server = Server(service, "127.0.0.1", 0, *args)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(service):
    with started(service) as server:
        yield server
        server.shutdown()


def send(server, path, body=None, *, kind="application/json", method=None):
    """Give status, headers and text of an answer."""
    data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
    request = urllib.request.Request(server.url + path, data, {"Content-Type": kind}, method=method)
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


def test_it_says_what_model_it_is(server, tiny_run):
    status, headers, text = send(server, "/model")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(text)["model"] == "tiny"
    assert json.loads(text)["vocab_size"] == tiny_run.tokenizer.vocab_size


def test_many_at_once_get_what_each_gets_alone(server):
    requests = [("/generate", {"prompt": p, "seed": s, "max_tokens": 10}) for p in ("Abantu", "Izin") for s in range(5)]
    requests += [("/suggest", {"text": text}) for text in ("Ab", "Aba", "Abantu ", "Abantu b")] * 3
    alone = [ask(server, *request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda request: ask(server, *request), requests)) == alone


def test_a_connection_is_kept(server):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
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
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        connection.request("GET", "/model")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - start)
    connection.close()
    assert sorted(seconds)[4] < 0.03, seconds  # TCP's delayed acknowledgement takes 0.04


def test_the_page_asks_nobody_else(server):
    status, headers, text = send(server, "/?from=a-bookmark")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert text == PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"https?:|src=|@import", text)
    # What its script sends are fields that there are.
    sent = dict(re.findall(r'ask\("(\w+)", \{(.*?)\}\)', text, re.S))
    assert sent.keys() == {"generate", "suggest", "score"}
    for path, fields in (("generate", GENERATE), ("suggest", SUGGEST), ("score", SCORE)):
        names = re.findall(r"(\w+):", sent[path])
        assert names
        assert set(names) <= fields.keys()


# --- What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body", "said"), [
    ("/generate", {"promt": "Abantu"}, "unknown field 'promt'; allowed: prompt, num, "),
    ("/generate", {"promt": "Abantu"}, "did you mean 'prompt'?"),
    ("/generate", {"x" * 99: 1}, "unknown field 'xxxx"),
    ("/generate", {"prompt": 3}, "prompt must be a text; got 3"),
    ("/generate", {"num": True}, "num must be a whole number; got true"),
    ("/generate", {"num": 1.0}, "num must be a whole number; got 1.0"),
    ("/generate", {"num": 0}, "num must be 1 to 100 here; got 0"),
    ("/generate", {"num": 101}, "num must be 1 to 100 here; got 101"),
    ("/generate", {"max_tokens": 10**6}, "max_tokens must be 1 to 2000 here; got 1000000"),
    ("/generate", {"temperature": "hot"}, 'temperature must be a number; got "hot"'),
    ("/generate", {"temperature": False}, "temperature must be a number; got false"),
    ("/generate", {"temperature": -1}, "temperature must be a finite number"),
    ("/generate", {"temperature": 10**300}, "temperature must be a finite number"),
    ("/generate", b'{"top_p": NaN}', "top_p must be above 0"),
    ("/generate", {"top_p": 2}, "top_p must be above 0 and at most 1"),
    ("/generate", {"seed": -1}, "seed must be 0 or more; got -1"),
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
    ("/generate", b"[" * 100_000, "too large a request"),
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
    assert "nothing at /nowhere; there are GET /, /model; POST /generate, /suggest, /score" in text
    status, headers, text = send(server, "/suggest")
    assert (status, headers["Allow"]) == (405, "POST")
    assert "/suggest answers POST; got GET" in text
    status, headers, text = send(server, "/model", {})
    assert (status, headers["Allow"]) == (405, "GET")
    assert send(server, "/nowhere", {})[0] == 404
    # What a form of another site could send.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, text = send(server, "/suggest", b'{"text": "Ab"}', kind=kind)
        assert status == 415
        assert f"Content-Type is {kind}; allowed: application/json" in text
    assert send(server, "/suggest", {"text": "Ab"}, kind="application/json; charset=utf-8")[0] == 200
    status, _, text = send(server, "/suggest", b" " * (MAX_BYTES + 1))
    assert status == 413
    assert f"the request has {MAX_BYTES + 1} bytes; allowed: up to {MAX_BYTES}" in text
    status, _, text = send(server, "/suggest", {"text": "Ab"}, method="PUT")
    assert status == 501
    assert json.loads(text) == {"error": "Unsupported method ('PUT')"}


@pytest.mark.parametrize(("raw", "status"), [
    (b"POST /suggest HTTP/1.1\r\nContent-Type: application/json\r\n\r\n", b"411"),
    (b"POST /suggest HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"411"),
    (b"POST /suggest HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", b"411"),
    (b"hello\r\n\r\n", b'{"error": "Bad request'),
    (b"A B C D E\r\n\r\n", b'{"error": "Bad request'),
    (b"", b""),
    (b"POST /suggest HTTP/1.1\r\nContent-Length: 100\r\n\r\nshort", b""),
])  # fmt: skip
def test_a_broken_request_harms_nobody(server, raw, status, capfd):
    with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
    assert status in answer[:30]
    assert send(server, "/model")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_fault_of_ours_keeps_its_traceback_and_the_server(server, service, monkeypatch, capfd):
    def broken(_):
        raise KeyError("a fault")

    monkeypatch.setattr(service, "suggest", broken)
    status, _, text = send(server, "/suggest", {"text": "Ab"})
    assert status == 500
    assert "a fault of ulimi's own" in json.loads(text)["error"]
    monkeypatch.undo()
    assert send(server, "/suggest", {"text": "Ab"})[0] == 200
    assert "KeyError: 'a fault'" in capfd.readouterr().err


def test_a_mistake_lets_the_next_one_in(service):
    with pytest.raises(ValueError, match="temperature"):
        service.generate({"temperature": -1})
    assert service.generate({"max_tokens": 1, "seed": 1})["texts"]


def test_other_sites_may_ask_if_they_are_let(server, service):
    assert "Access-Control-Allow-Origin" not in send(server, "/model")[1]
    with started(service, "https://keyboard.example") as open_server:
        status, headers, _ = send(open_server, "/suggest", method="OPTIONS")
        assert status == 204
        assert headers["Access-Control-Allow-Origin"] == "https://keyboard.example"
        assert headers["Access-Control-Allow-Headers"] == "Content-Type"
        for path, body in (("/suggest", {"text": "Ab"}), ("/suggest", {}), ("/model", None)):
            headers = send(open_server, path, body)[1]
            assert headers["Access-Control-Allow-Origin"] == "https://keyboard.example"
        open_server.shutdown()


# --- The command -------------------------------------------------------------------------------------


def test_addresses_that_are_none(refused, server):
    port = server.server_address[1]
    assert f"--host 127.0.0.1 --port {port}: " in refused("serve", "--port", port)
    assert "--host nowhere.invalid --port 0: " in refused("serve", "--host", "nowhere.invalid", "--port", 0)
    assert "allowed ports: 0 (any free one) to 65535" in refused("serve", "--port", 70000)
    assert "no run folder" in refused("serve", "-m", "nowhere")


def test_the_command_serves_until_it_is_stopped(tiny_run):
    process = subprocess.Popen(
        [sys.executable, "-m", "ulimi", "serve", "-m", tiny_run.dir, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+) serves .*tiny; Ctrl-C ends it", said)[1]
        with urllib.request.urlopen(f"{url}/model", timeout=30) as answer:
            assert json.loads(answer.read())["model"] == "tiny"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert (out, err) == ("", "")
