"""A model behind HTTP: JSON in, JSON out, and a page to try it on. For keyboards, editors and classrooms.

    GET  /          the page
    GET  /model     what model this is
    POST /generate  {"prompt": …, "num": 1, "seed": …, "temperature": …, …}  -> {"texts": […]}
    POST /suggest   {"text": …, "num": 5}                                     -> {"suggestions": […], "covered": …}
    POST /score     {"lines": […]}                                            -> {"lines": […]}

Fields and figures are those of the commands' options and of their `--json`. A mistake is {"error": one line} and a
status from 400 on. Nothing of what is typed is written down anywhere.

Python's own server is enough: a model answers one request after another on one core, whatever stands before it. It
listens on this machine alone unless it is told otherwise; in front of others belongs a server that knows who may ask.
Light floor.
"""

import json
import math
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import ulimi
from ulimi.engine import Engine
from ulimi.errors import UlimiError, nearest
from ulimi.score import score_lines
from ulimi.suggest import Suggester
from ulimi.tokenizer import Tokenizer
from ulimi.words import Ending
from ulimi.writer import Writer, Writing, choose_sampling

MAX_BYTES = 1 << 18
"""of a request: some 100 pages"""
MAX_NUM = 100
"""texts or words of one request"""
MAX_TOKENS = 2000
"""of a text: a request keeps the others waiting"""

PAGE = Path(__file__).with_name("web") / "index.html"
# The page is one file and asks this server alone.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

SAMPLING = {"temperature": float, "alpha": float, "top_k": int, "top_p": float, "min_p": float, "typical": float}
ENDING = {
    "max_tokens": int, "max_words": int, "max_chars": int, "min_tokens": int, "min_words": int, "min_chars": int,
}  # fmt: skip
RULES = {"repetition_penalty": float, "no_repeat_ngram": int}
GENERATE = {
    "prompt": str, "num": int, "seed": int, "probabilities": bool, **SAMPLING, **ENDING, "end": str, "stop": list,
    **RULES, "ban": list,
}  # fmt: skip
SUGGEST = {"text": str, "num": int}
SCORE = {"lines": list}

KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts"}


class Service:
    """What the server answers, without HTTP: of a request's JSON, that of the answer.

    Args:
        name: of the model, to be told.
        engine: the model; asked by one thread at a time.
        tokenizer: its tokenizer.
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer) -> None:
        self._name, self._engine, self._tokenizer = name, engine, tokenizer
        self._suggester = Suggester(engine, tokenizer)
        self._turn = threading.Lock()
        # Making a writer takes as long as writing some words; most requests are alike but for their prompts.
        self._writer = lru_cache(maxsize=16)(self._make_writer)

    def model(self) -> dict[str, Any]:
        """Say what model this is."""
        return {"model": self._name, "vocab_size": self._tokenizer.vocab_size, "ulimi": ulimi.__version__}

    def generate(self, request: Any) -> dict[str, Any]:
        """Write on from a prompt; fields are those of `ulimi generate` that sample."""
        given = _read(request, GENERATE)
        prompt, num = given.get("prompt", ""), _at_most("num", given.get("num", 1), MAX_NUM)
        _at_most("max_tokens", given.get("max_tokens", 1), MAX_TOKENS)
        seed = given.get("seed")
        if seed is None:
            seed = secrets.randbelow(2**31)
        with self._turn:
            writing = Writing(
                sampling=choose_sampling(self._engine, **{name: given.get(name) for name in SAMPLING}),
                ending=Ending(
                    at=given.get("end", "never"), stops=tuple(given.get("stop", ())),
                    **{name: given[name] for name in ENDING if name in given},
                ),
                banned=tuple(given.get("ban", ())), **{name: given[name] for name in RULES if name in given},
            )  # fmt: skip
            writer = self._writer(writing)
            before = writer.prompt_words(prompt) if given.get("probabilities") else None
            texts = writer.write(prompt, num=num, seed=seed)
        return {"texts": [text.as_dict(index, seed, before) for index, text in enumerate(texts)]}

    def suggest(self, request: Any) -> dict[str, Any]:
        """Suggest words, as `ulimi suggest` does."""
        given = _read(request, SUGGEST, needed="text")
        num = _at_most("num", given.get("num", 5), MAX_NUM)
        with self._turn:
            found = self._suggester.search(given["text"], num)
        words = [{"word": word.word, "probability": word.probability} for word in found.words]
        return {"text": given["text"], "suggestions": words, "covered": found.covered}

    def score(self, request: Any) -> dict[str, Any]:
        """Score each line by itself, as `ulimi score` does."""
        lines = _read(request, SCORE, needed="lines")["lines"]
        if broken := [line for line in lines if "\n" in line]:
            raise UlimiError(f"lines must each be one line; got one with a line end in it: {broken[0][:40]!r}")
        with self._turn:
            scored = list(score_lines(self._engine, self._tokenizer, lines))
        return {"lines": [{"text": line, **score.as_dict()} for line, score in scored]}

    def _make_writer(self, writing: Writing) -> Writer:
        return Writer(self._engine, self._tokenizer, writing)


def _read(request: Any, fields: Mapping[str, type], needed: str | None = None) -> dict[str, Any]:
    """Check the fields of a request; null is as if a field were not there."""
    if not isinstance(request, dict):
        raise UlimiError(f"the request must be a JSON object; got {_shown(request)}")
    given: dict[str, Any] = {}
    for name, value in request.items():
        if name not in fields:
            raise UlimiError(f"unknown field {name[:40]!r}; allowed: {', '.join(fields)}{nearest(name, fields)}")
        if value is not None:
            given[name] = _checked(name, value, fields[name])
    if needed is not None and needed not in given:
        raise UlimiError(f"the field {needed!r} is missing: {KINDS[fields[needed]]}")
    return given


def _checked(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # A float has no room for some of JSON's whole numbers.
        return float(value) if abs(value) < 2**53 else math.inf
    # To Python true and false are numbers.
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is list and not all(isinstance(item, str) for item in value)):
        raise UlimiError(f"{name} must be {KINDS[kind]}; got {_shown(value)}")
    return value


def _at_most(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise UlimiError(f"{name} must be 1 to {most} here; got {value}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


class Server(ThreadingHTTPServer):
    """Answers for a `Service` until it is shut down.

    Args:
        service: what is served.
        host: the address to listen on.
        port: likewise; 0 takes a free one.
        allow_origin: a web site whose pages may ask, too ("https://…", "*" for all); None: only our own page.

    Raises:
        UlimiError: there is no such address here, or it is taken.
    """

    daemon_threads = True
    """a slow reader does not keep the server from ending"""

    def __init__(self, service: Service, host: str, port: int, allow_origin: str | None = None) -> None:
        self.service, self.allow_origin, self.page = service, allow_origin, PAGE.read_bytes()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "allowed ports: 0 (any free one) to 65535"
            raise UlimiError(f"--host {host} --port {port}: {reason}") from None

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port, *_ = self.server_address
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def server_bind(self) -> None:
        """Take the address; unlike `HTTPServer`, ask no name server what it is called."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away; a fault of ours keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _RefusedError(Exception):
    """What is wrong with a request before anybody reads it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"ulimi/{ulimi.__version__}", ""
    timeout = 60
    # Head and body in one packet: in two, the second waits 40 ms for a client that has nothing to say.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": PAGE_POLICY}
            self._send(HTTPStatus.OK, self.server.page, headers)
        elif path == "/model":
            self._send_json(HTTPStatus.OK, self.server.service.model())
        else:
            self._refuse_path(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        service = self.server.service
        answers: dict[str, Callable[[Any], dict[str, Any]]] = {
            "/generate": service.generate, "/suggest": service.suggest, "/score": service.score,
        }  # fmt: skip
        path = self.path.partition("?")[0]
        try:
            body = self._body()
            if path not in answers:
                self._refuse_path(path)
                return
            answer = answers[path](_parse(body))
        except UlimiError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except _RefusedError as error:
            self.close_connection = True  # what follows of the request is not read
            self._send_json(error.status, {"error": str(error)})
        except (MemoryError, RecursionError):
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": "too large a request: fewer texts, tokens or lines"})
        except Exception:
            said = "a fault of ulimi's own; the terminal of its server shows it"
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": said})
            raise
        else:
            self._send_json(HTTPStatus.OK, answer)

    def do_OPTIONS(self) -> None:
        """Answer a browser that asks whether another site's page may ask."""
        self._send(HTTPStatus.NO_CONTENT, b"", {
            "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "Content-Type",
        })  # fmt: skip

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what Python's server refuses as everything else is refused."""
        self.close_connection = True
        self._send_json(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing down."""

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if int(length) > MAX_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has {length} bytes; allowed: up to {MAX_BYTES}"
            )
        body = self.rfile.read(int(length))
        # A page of another site can send anything else without asking first.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"Content-Type is {self.headers.get_content_type()}; allowed: application/json",
            )
        return body

    def _refuse_path(self, path: str) -> None:
        reads, asks = ("/", "/model"), ("/generate", "/suggest", "/score")
        if path in reads + asks:
            method = "GET" if path in reads else "POST"
            allowed = {"Content-Type": "application/json", "Allow": method}
            body = _to_json({"error": f"{path} answers {method}; got {self.command}"})
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, body, allowed)
            return
        known = f"GET {', '.join(reads)}; POST {', '.join(asks)}"
        self._send_json(HTTPStatus.NOT_FOUND, {"error": f"nothing at {path[:40]}; there are {known}"})

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, _to_json(value), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.allow_origin is not None:
            self.send_header("Access-Control-Allow-Origin", self.server.allow_origin)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:  # not JSON, not UTF-8, or a number too long to be read
        raise UlimiError(f"the request is not JSON: {error}") from None


def _to_json(value: dict[str, Any]) -> bytes:
    # A prompt may hold half of a surrogate pair, which JSON can write and UTF-8 cannot.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
