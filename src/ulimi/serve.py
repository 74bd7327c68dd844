"""A model behind HTTP: JSON in, JSON out, and a page to try it on. For keyboards, editors and classrooms.

    GET  /          the page, and what it asks with, /answer.js
    GET  /model     what model this is
    POST /generate  {"prompt": …, "num": 1, "seed": …, "temperature": …, …}  -> {"texts": […]}
    POST /suggest   {"text": …, "num": 5}                                     -> {"suggestions": […], "covered": …}
    POST /score     {"lines": […], "words": true, …}                          -> {"lines": […]}

Fields and figures are those of the commands' options and of their `--json`. A mistake is {"error": one line} and a
status from 400 on; only another Host than this machine gets its 400 from Starlette, in plain text. Nothing of what is
typed is written down anywhere. Starlette and uvicorn know HTTP; the model answers one request after another, in the
order in which they came. Light floor.
"""

import asyncio
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import ulimi
from ulimi.engine import Engine
from ulimi.errors import UlimiError, nearest
from ulimi.score import score_lines
from ulimi.suggest import Suggester
from ulimi.surprisal import score_words
from ulimi.tokenizer import Tokenizer
from ulimi.words import Ending
from ulimi.writer import Writer, Writing, choose_sampling

# What a request may ask for: some seconds of one core, in which the others wait.
MAX_BYTES = 1 << 18
MAX_CHARS = 10_000
"""of a prompt or of a text to suggest words for"""
MAX_NUM = 100
"""texts or words"""
MAX_TOKENS = 10_000
"""of all texts together"""
MAX_ITEMS = 1000
"""of a list"""

PAGE = Path(__file__).with_name("web")
# The page asks this server alone.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'self'; connect-src 'self'; "
    "img-src data:"
)
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

LOOPBACK = ["127.0.0.1", "localhost", "::1"]
"""names that only this machine is called by, from itself"""

ORIGIN = re.compile(r"https?://[!-.0-~]+|\*")
"""what browsers send as Origin, or all of them"""

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
SCORE = {"lines": list, "words": bool}

KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts"}


class Service:
    """What the server answers, without HTTP: of a request's JSON, that of the answer. One question at a time.

    Args:
        name: of the model, to be told.
        engine: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer) -> None:
        self._name, self._engine, self._tokenizer = name, engine, tokenizer
        self._suggester = Suggester(engine, tokenizer)
        # Making a writer takes as long as writing some words; most requests are alike but for their prompts.
        self._writer = lru_cache(maxsize=16)(partial(Writer, engine, tokenizer))

    def model(self) -> dict[str, Any]:
        """Say what model this is."""
        return {
            "model": self._name, "vocab_size": self._tokenizer.vocab_size, "sparse": self._engine.alpha != 1,
            "ulimi": ulimi.__version__,
        }  # fmt: skip

    def generate(self, request: Any) -> dict[str, Any]:
        """Write on from a prompt; fields are those of `ulimi generate` that sample."""
        given = _read(request, GENERATE)
        num, max_tokens = given.get("num", 1), given.get("max_tokens", Ending().max_tokens)
        _check_limit("num", num, MAX_NUM)
        _check_limit("num times max_tokens", num * max_tokens, MAX_TOKENS)
        writing = Writing(
            sampling=choose_sampling(self._engine, **{name: given.get(name) for name in SAMPLING}),
            ending=Ending(
                at=given.get("end", "never"), stops=tuple(given.get("stop", ())),
                **{name: given[name] for name in ENDING if name in given},
            ),
            banned=tuple(given.get("ban", ())), **{name: given[name] for name in RULES if name in given},
        )  # fmt: skip
        seed = given["seed"] if "seed" in given else secrets.randbelow(2**31)
        writer = self._writer(writing)
        prompt = given.get("prompt", "")
        before = writer.prompt_words(prompt) if given.get("probabilities") else None
        texts = writer.write(prompt, num=num, seed=seed)
        return {"texts": [text.as_dict(index, seed, before) for index, text in enumerate(texts)]}

    def suggest(self, request: Any) -> dict[str, Any]:
        """Suggest words, as `ulimi suggest` does."""
        given = _read(request, SUGGEST, needed="text")
        num = given.get("num", 5)
        _check_limit("num", num, MAX_NUM)
        return self._suggester.search(given["text"], num).as_dict(given["text"])

    def score(self, request: Any) -> dict[str, Any]:
        """Score each line by itself, as `ulimi score` does, and with `words` each word, as `ulimi score --words`."""
        given = _read(request, SCORE, needed="lines")
        lines = given["lines"]
        if broken := [line for line in lines if "\n" in line]:
            raise UlimiError(f"lines must each be one line; got one with a line end in it: {broken[0][:40]!r}")
        scored = list(score_lines(self._engine, self._tokenizer, lines))
        told = [{"text": line, **score.as_dict()} for line, score in scored]
        if given.get("words"):
            for row, (_, scores) in zip(told, score_words(self._engine, self._tokenizer, lines), strict=True):
                row |= scores.as_dict()
        return {"lines": told}


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
    # To Python true and false are numbers; and a float has no room for some of JSON's whole numbers.
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**53 else math.inf
    if kind is int and type(value) is int and abs(value) < 2**63:
        return value
    fits = isinstance(value, kind) and kind is not int
    if not fits or (kind is list and not all(isinstance(item, str) for item in value)):
        raise UlimiError(f"{name} must be {KINDS[kind]}; got {_shown(value)}")
    if kind is str and len(value) > MAX_CHARS:
        raise UlimiError(f"{name} has {len(value)} characters; allowed: up to {MAX_CHARS}: its last lines will do")
    if kind is list and len(value) > MAX_ITEMS:
        raise UlimiError(f"{name} has {len(value)} texts; allowed: up to {MAX_ITEMS}")
    return value


def _check_limit(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UlimiError(f"{name} must be 1 to {most} here; got {value}")


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 2**63 else "a far larger one"
    return text if len(text) <= 40 else f"{text[:40]}…"


# HTTP


def make_app(service: Service, origins: Sequence[str] = (), *, any_host: bool = False) -> Starlette:
    """Put a service behind HTTP.

    Args:
        service: what answers.
        origins: web sites whose pages may ask, too ("https://keyboard.example", "*" for all).
        any_host: answer whatever name the server was called by. Otherwise only names of this machine: or a page of
            another site could ask by giving its own name this machine's address (DNS rebinding).

    Raises:
        UlimiError: an origin is none.
    """
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise UlimiError(
                f"--allow-origin {origin!r}: allowed: https://HOST or http://HOST:PORT, no path; * for all"
            )
    turn = asyncio.Lock()
    asks = {"/generate": service.generate, "/suggest": service.suggest, "/score": service.score}

    async def page(_: Request) -> Response:
        headers = {**NO_STORE, "Content-Security-Policy": PAGE_POLICY}
        return Response((PAGE / "index.html").read_bytes(), headers=headers, media_type="text/html")

    async def page_answer(_: Request) -> Response:
        return Response((PAGE / "answer.js").read_bytes(), headers=NO_STORE, media_type="text/javascript")

    async def model(_: Request) -> Response:
        return _json_response(service.model())

    async def mistake(_: Request, error: Exception) -> Response:
        return _json_response({"error": str(error)}, 400)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said, path = error.detail, request.url.path[:40]
        if error.status_code == 404:
            said = f"nothing at {path}; there are GET /, /model; POST {', '.join(asks)}"
        elif error.status_code == 405:
            said = f"{path} answers {'POST' if path in asks else 'GET'}; got {request.method}"
        return _json_response({"error": said}, error.status_code, error.headers)

    async def too_large(_: Request, error: Exception) -> Response:
        return _json_response({"error": "out of memory: ask for fewer texts, tokens or lines"}, 400)

    async def fault(_: Request, error: Exception) -> Response:
        return _json_response({"error": "a fault of ulimi's own; the terminal of its server shows it"}, 500)

    routes = [Route("/", page), Route("/answer.js", page_answer), Route("/model", model)]
    routes += [Route(path, _endpoint(answer, turn), methods=["POST"]) for path, answer in asks.items()]
    middleware: list[Middleware] = []
    if origins:
        methods, headers = ["GET", "POST"], ["Content-Type"]
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)
        )
    if not any_host:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[_in_url(name) for name in LOOPBACK]))
    return Starlette(
        routes=routes, middleware=middleware,
        exception_handlers={UlimiError: mistake, HTTPException: refuse, MemoryError: too_large, Exception: fault},
    )  # fmt: skip


def _endpoint(answer: Callable[[Any], dict[str, Any]], turn: asyncio.Lock) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        given = _parse(await _body(request))
        async with turn:
            if await request.is_disconnected():  # nobody waits for it any more
                return Response(status_code=400)
            return _json_response(await run_in_threadpool(answer, given))

    return endpoint


async def _body(request: Request) -> bytes:
    # A page of another site can send anything else without asking first.
    kind = request.headers.get("Content-Type", "none")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"Content-Type is {kind[:40]}; allowed: application/json")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the request has more than {MAX_BYTES} bytes")
    return body


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise UlimiError("the request is not JSON that can be read: too many brackets within each other") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number too long to be read
        raise UlimiError(f"the request is not JSON: {error}") from None


def _json_response(value: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # A prompt may hold half of a surrogate pair, which JSON can write and UTF-8 cannot.
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    return Response(body, status, {**(headers or {}), **NO_STORE}, "application/json")


def listen(host: str, port: int) -> socket.socket:
    """Take an address; port 0 is a free one.

    Raises:
        UlimiError: there is no such address here, or it is taken.
    """
    if not host:
        raise UlimiError("--host is empty; allowed: 127.0.0.1 (this machine alone), 0.0.0.0 (all), an address of it")
    if not 0 <= port <= 65535:
        raise UlimiError(f"--port {port}: allowed: 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Its protocol must be named: or asyncio does not know that it is TCP, and an answer in two packets takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere this would take an address from another program
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except (OSError, UnicodeError, TypeError) as error:  # TypeError: a name that is none, with a NUL or an empty label
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UlimiError(f"--host {host} --port {port}: {reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Give the address to open in a browser."""
    host, port, *_ = listener.getsockname()
    return f"http://{_in_url(host)}:{port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def make_server(app: Starlette) -> uvicorn.Server:
    """Make what runs an app: `run(sockets=[…])`, until Ctrl-C or `should_exit`."""
    return uvicorn.Server(uvicorn.Config(
        app, http="h11", loop="asyncio", ws="none", lifespan="off", log_level="error", access_log=False,
        server_header=False, timeout_graceful_shutdown=1,
    ))  # fmt: skip
