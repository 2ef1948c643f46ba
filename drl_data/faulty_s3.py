"""A public double: an S3 server that fails on schedule, in front of a real one.

    with FaultyS3("http://127.0.0.1:9000") as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.faults = [Fault("lost answer", on="put", key=".*/receipts/.*", nth=2)]

The proxy passes requests on as they are, the Host header too, which the signature covers. What it
does to a request that a fault strikes:

    500 502 503 429 409    answers so, with the XML of S3; the request is not carried out
    403 bucket expired full    the same, for good: access denied, no such bucket, old token, no room
    hang                   says nothing until the client gives up
    reset                  the connection breaks before the answer
    refused                the same, and connections are refused for the next `refused_s` seconds
    cut answer             the connection breaks in the middle of the answer's body
    short answer           half of the body, with a Content-Length that agrees
    cut upload             the connection breaks in the middle of the request's body
    lost answer            the request is carried out, then the connection breaks
    stale                  the listing leaves out keys that match `listed`
    ghost                  the listing still has keys that match `listed` and were listed before
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import unescape

Kind = Literal[
    "500", "502", "503", "429", "409", "403", "bucket", "expired", "full", "hang", "reset",
    "refused", "cut answer", "short answer", "cut upload", "lost answer", "stale", "ghost",
]  # fmt: skip

PASSING: tuple[Kind, ...] = (
    "500", "502", "503", "429", "reset", "cut answer", "short answer", "cut upload", "lost answer"
)  # fmt: skip
"""Faults after which the same request may succeed, and that cost no time."""

_ANSWERS: dict[Kind, tuple[int, str]] = {
    "500": (500, "InternalError"),
    "502": (502, "BadGateway"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "409": (409, "ConditionalRequestConflict"),
    "403": (403, "AccessDenied"),
    "bucket": (404, "NoSuchBucket"),
    "expired": (400, "ExpiredToken"),
    "full": (507, "InsufficientStorage"),
}
_ONLY_ON: dict[Kind, tuple[str, ...]] = {
    "409": ("put",),
    "cut answer": ("get", "list"),
    "short answer": ("get", "list"),
    "cut upload": ("put",),
    "lost answer": ("put", "delete"),
    "stale": ("list",),
    "ghost": ("list",),
}
_HOP_BY_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "expect", "te"))
_ENTRY = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """A request that came, and what was done to it."""

    operation: str
    """get, head, put, delete, list, or other."""
    key: str
    """Bucket and key; of a listing, bucket and prefix; of a deletion, the bucket."""
    struck: Kind | None = None


@dataclass(frozen=True)
class Fault:
    """Strikes the `nth` (from 1) and the `times` - 1 next ones of the requests that match.

    `on` (operations, see `Request`), `key` and `listed` are regular expressions for the whole. A
    request whose kind cannot suffer from the fault does not match: a HEAD has no body to cut.
    """

    kind: Kind
    on: str = ".*"
    key: str = ".*"
    nth: int = 1
    times: int | None = 1
    """None: all of them."""
    listed: str = ".*"

    def matches(self, operation: str, key: str) -> bool:
        """Whether a request is one of those that are counted."""
        suffers = operation in _ONLY_ON.get(self.kind, (operation,))
        return bool(suffers and re.fullmatch(self.on, operation) and re.fullmatch(self.key, key))

    def strikes(self, n: int) -> bool:
        """Whether it strikes the n-th of them, from 1."""
        return n >= self.nth and (self.times is None or n < self.nth + self.times)


@dataclass(frozen=True)
class RandomFaults:
    """Strikes a share of all requests, by a seed: which ones depends on operation, key (without
    the bucket), and how often that came, not on the order of threads."""

    rate: float
    seed: int
    kinds: tuple[Kind, ...] = PASSING

    def choose(self, operation: str, key: str, n: int) -> Kind | None:
        """What happens to the n-th request for an operation on a key, from 1."""
        text = f"{self.seed}\0{operation}\0{key.partition('/')[2]}\0{n}"
        digest = hashlib.sha256(text.encode()).digest()
        if int.from_bytes(digest[:8], "big") >= self.rate * 2**64:
            return None
        kinds = [k for k in self.kinds if operation in _ONLY_ON.get(k, (operation,))]
        return kinds[int.from_bytes(digest[8:16], "big") % len(kinds)] if kinds else None


class FaultyS3:
    """The proxy: serves from `start` (or `with`) to `close`, on a free port of this machine.

    `faults` and `random` may be changed at any time; `requests` has what came so far.
    """

    def __init__(
        self,
        upstream: str,
        faults: Sequence[Fault] = (),
        random: RandomFaults | None = None,
        *,
        refused_s: float = 0.3,
    ) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._refused_s = refused_s
        self._lock = threading.Lock()
        self._counts: Counter[object] = Counter()
        self._known: dict[str, bytes] = {}
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self._listener = self._listen(0)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults = faults
        self.random = random
        self.requests: list[Request] = []

    @property
    def faults(self) -> Sequence[Fault]:
        """What is scheduled; giving a new schedule counts anew."""
        return self._faults

    @faults.setter
    def faults(self, faults: Sequence[Fault]) -> None:
        with self._lock:
            self._faults = tuple(faults)
            self._counts.clear()

    def struck(self) -> Counter[str]:
        """How many requests each kind of fault struck."""
        with self._lock:
            return Counter(r.struck for r in self.requests if r.struck is not None)

    def __enter__(self) -> FaultyS3:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to serve."""
        self._spawn(self._accept)

    def close(self) -> None:
        """Stop; connections that are open are closed, whatever goes on in them."""
        with self._lock:
            self._closing.set()
            for open_socket in (self._listener, *self._connections):
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join(10)
        self._listener.close()

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads = [t for t in self._threads if t.is_alive()]
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port), backlog=128)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, or shut for a while
                if self._closing.wait(self._refused_s):
                    return
                self._listener = self._listen(int(self.endpoint.rpartition(":")[2]))
                continue
            self._spawn(self._serve, connection, address)

    def refuse(self) -> None:
        """Refuse connections for `refused_s` seconds."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _serve(self, connection: socket.socket, address: object) -> None:
        with connection, contextlib.suppress(OSError):
            with self._lock:
                if self._closing.is_set():
                    return
                self._connections.add(connection)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _Handler(connection, address, self)  # type: ignore[arg-type]
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def decide(self, operation: str, key: str) -> Fault | None:
        """What happens to a request; counts it."""
        with self._lock:
            chosen: Fault | None = None
            for i, fault in enumerate(self._faults):
                if fault.matches(operation, key):
                    self._counts[i] += 1
                    if chosen is None and fault.strikes(self._counts[i]):
                        chosen = fault
            self._counts[operation, key] += 1
            if chosen is None and self.random is not None:
                kind = self.random.choose(operation, key, self._counts[operation, key])
                chosen = None if kind is None else Fault(kind)
            struck = None if chosen is None else chosen.kind
            self.requests.append(Request(operation, key, struck))
            return chosen

    def pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Headers, bytes]:
        """Carry out a request: status, headers and body of the real server's answer."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(
                handler.command, handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in handler.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in _HOP_BY_HOP]
            return answer.status, headers, answer.read()

    def rewritten(self, listing: bytes, prefix: str, fault: Fault | None) -> bytes:
        """A listing without the keys that are left out, or with those that are gone; remembers
        what it saw."""
        entries = {}
        for entry in _ENTRY.findall(listing):
            found = _KEY.search(entry)
            assert found is not None, entry
            entries[unquote(unescape(found[1].decode()))] = entry
        with self._lock:
            self._known.update(entries)
            known = dict(self._known)
        if fault is None:
            return listing
        wanted = entries
        if fault.kind == "stale":
            wanted = {k: e for k, e in entries.items() if not re.fullmatch(fault.listed, k)}
        elif fault.kind == "ghost":
            ghosts = {
                k: e
                for k, e in known.items()
                if k.startswith(prefix) and re.fullmatch(fault.listed, k)
            }
            wanted = {**ghosts, **entries}
        bare = _ENTRY.sub(b"", listing)
        head, mark, tail = bare.partition(b"</ListBucketResult>")
        return head + b"".join(wanted[k] for k in sorted(wanted)) + mark + tail


Headers = list[tuple[str, str]]


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: FaultyS3  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the proxy keeps `requests`."""

    def _operation(self) -> tuple[str, str]:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        key = unquote(parts.path).lstrip("/")
        if self.command == "GET" and ("list-type" in query or "prefix" in query):
            return "list", f"{key.rstrip('/')}/{query.get('prefix', [''])[0]}"
        if self.command == "DELETE" or (self.command == "POST" and "delete" in query):
            return "delete", key
        return {"GET": "get", "HEAD": "head", "PUT": "put"}.get(self.command, "other"), key

    def do_GET(self) -> None:  # named by http.server
        """Any request."""
        operation, key = self._operation()
        fault = self.server.decide(operation, key)
        kind = None if fault is None else fault.kind
        n_bytes = int(self.headers.get("Content-Length") or 0)
        if kind == "cut upload":
            self.rfile.read(n_bytes // 2)
            self._break()
            return
        body = self.rfile.read(n_bytes)
        if kind in _ANSWERS:
            self._refuse(*_ANSWERS[kind])
        elif kind == "hang":
            self.server._closing.wait(60)
            self.close_connection = True
        elif kind in ("reset", "refused"):
            if kind == "refused":
                self.server.refuse()
            self._break()
        else:
            self._pass_on(body, operation, key, fault)

    do_PUT = do_HEAD = do_DELETE = do_POST = do_GET  # noqa: N815

    def _pass_on(self, body: bytes, operation: str, key: str, fault: Fault | None) -> None:
        status, headers, answer = self.server.pass_on(self, body)
        kind = None if fault is None else fault.kind
        if kind == "lost answer":
            self._break()
            return
        if operation == "list" and status == 200:
            answer = self.server.rewritten(answer, key.partition("/")[2], fault)
            headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
        if kind == "short answer" and len(answer) > 1:
            answer = answer[: len(answer) // 2]
            headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
        cut = kind == "cut answer" and len(answer) > 1
        self._answer(status, headers, answer, n_sent=len(answer) // 2 if cut else None)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
        body = b"" if self.command == "HEAD" else f'<?xml version="1.0"?>{text}'.encode()
        self._answer(status, [("Content-Type", "application/xml")], body)

    def _answer(
        self, status: int, headers: Headers, body: bytes, n_sent: int | None = None
    ) -> None:
        """Send an answer in one piece; or break off after `n_sent` bytes of its body."""
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if status not in (204, 304) and "content-length" not in {n.lower() for n, _ in headers}:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.wfile.write(head + (body if n_sent is None else body[:n_sent]))
        if n_sent is not None:
            self._break()

    def _break(self) -> None:
        """Close with a reset, as a server that died."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
