"""What one client can take of a server: time, memory and the event loop. Each limit is made small for its test."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lcm_jax.serve.server import listen, uvicorn_config

SECONDS = 60.0
LARGE = 20_000_000  # bytes, more than the system keeps between server and client
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
MASK = b"\0\0\0\0"
FIRST_FRAGMENT, FRAGMENT, PING, MESSAGE = b"\x02", b"\x00", b"\x89", b"\x82"


def application() -> Starlette:
    """It returns what it is sent, and closes no connection by itself."""

    async def echo(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return PlainTextResponse("gone")
        return PlainTextResponse(f"{len(body)} bytes")

    async def slow(_: Request) -> Response:
        await asyncio.sleep(1.0)
        return PlainTextResponse("at last")

    async def large(_: Request) -> Response:
        return Response(bytes(LARGE))

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            async for data in websocket.iter_bytes():
                await websocket.send_bytes(data)

    async def late(websocket: WebSocket) -> None:
        await asyncio.sleep(0.5)
        await talk(websocket)

    return Starlette(
        routes=[
            Route("/", echo, methods=["GET", "POST"]),
            Route("/slow", slow),
            Route("/large", large),
            WebSocketRoute("/ws", talk),
            WebSocketRoute("/late", late),
        ]
    )


class Server(uvicorn.Server):
    """A server in a thread."""

    def __init__(self) -> None:
        super().__init__(uvicorn_config(application()))
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def open(self, sent: bytes = b"") -> socket.socket:
        """A connection that has sent something."""
        connection = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        connection.sendall(sent)
        return connection

    def until_gone(self) -> None:
        """Wait until no connection is left."""
        deadline = time.monotonic() + SECONDS
        while self.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.should_exit = True
    server.thread.join(SECONDS)
    assert not server.thread.is_alive()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    return lambda name, value: monkeypatch.setattr(f"lcm_jax.serve.limits.{name}", value)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, which has to have no traceback in the end."""
    with caplog.at_level(logging.INFO):
        yield caplog
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def is_cut(connection: socket.socket) -> bool:
    """Whether the server ends a connection, without an answer, rather than leave it open for a long time."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def drip(connection: socket.socket, data: bytes) -> bool:
    """Send byte after byte, and return whether the server ended the connection before the last."""
    connection.settimeout(0.05)
    for i in range(len(data)):
        try:
            connection.sendall(data[i : i + 1])
            if connection.recv(1) == b"":
                return True
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return True
    return False


def websocket(server: Server, path: bytes = b"/ws") -> socket.socket:
    connection = server.open(HANDSHAKE.replace(b"/ws", path))
    assert connection.recv(4096).startswith(b"HTTP/1.1 101")
    return connection


def received(connection: socket.socket, size: int) -> bytes:
    """The next bytes, fewer if the connection ends before."""
    data = b""
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return data


def close_code(connection: socket.socket) -> int:
    """The code that the server closes a WebSocket with; 1006 if it cuts it."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    at = data.find(b"\x88")
    return int.from_bytes(data[at + 2 : at + 4], "big") if at >= 0 else 1006


def test_a_silent_connection_is_cut(server: Server, limit: Any) -> None:
    limit("HEAD_SECONDS", 0.2)
    assert is_cut(server.open())


def test_a_slow_head_is_cut_also_after_an_answer(server: Server, limit: Any) -> None:
    limit("HEAD_SECONDS", 0.5)
    assert drip(server.open(), b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100)
    again = server.open(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert again.recv(4096).endswith(b"0 bytes")
    assert drip(again, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100)


def test_a_slow_body_that_nobody_waits_for_is_cut(server: Server, limit: Any) -> None:
    limit("HEAD_SECONDS", 0.5)
    refused = server.open(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
    assert refused.recv(4096).startswith(b"HTTP/1.1 404")
    assert drip(refused, bytes(100))


def test_who_waits_for_an_answer_is_not_cut(server: Server, limit: Any) -> None:
    limit("HEAD_SECONDS", 0.2)
    assert server.open(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n").recv(4096).endswith(b"at last")


def test_a_quiet_websocket_is_not_cut(server: Server, limit: Any) -> None:
    limit("HEAD_SECONDS", 0.2)
    limit("MESSAGE_SECONDS", 0.2)
    with connect(f"ws://127.0.0.1:{server.port}/ws") as client:
        for parts in ([b"one"], [b"t", b"w", b"o"]):
            time.sleep(0.4)
            client.ping().wait(SECONDS)
            client.send(parts)
            assert client.recv(SECONDS) == b"".join(parts)


@pytest.mark.parametrize(
    "begun",
    [MESSAGE + b"\xff" + (10_000).to_bytes(8, "big") + MASK + b"...", FIRST_FRAGMENT + b"\x81" + MASK + b"x"],
    ids=["frame", "fragment"],
)
def test_a_message_that_does_not_end_is_cut(server: Server, limit: Any, begun: bytes) -> None:
    limit("MESSAGE_SECONDS", 0.3)
    connection = websocket(server)
    connection.sendall(begun)
    assert is_cut(connection)


@pytest.mark.parametrize(
    "frames",
    [
        FIRST_FRAGMENT + b"\x81" + MASK + b"x" + (FRAGMENT + b"\x81" + MASK + b"x") * 400,
        (PING + b"\x80" + MASK) * 400,
        (MESSAGE + b"\x80" + MASK) * 400,
    ],
    ids=["fragments", "pings", "messages"],
)
def test_frames_are_counted_whatever_they_are(server: Server, limit: Any, frames: bytes) -> None:
    limit("MOST_FRAMES", 300)
    connection = websocket(server)
    connection.sendall(frames)
    assert close_code(connection) == 1008


def test_frames_are_counted_by_the_second(server: Server, limit: Any) -> None:
    limit("MOST_FRAMES", 30)
    connection = websocket(server)
    for _ in range(2):
        connection.sendall((MESSAGE + b"\x80" + MASK) * 20)
        assert len(received(connection, 40)) == 40
        time.sleep(1.05)


def test_a_first_message_is_short(server: Server, limit: Any) -> None:
    limit("MOST_HELLO", 10_000)
    connection = websocket(server)
    connection.sendall(MESSAGE + b"\xff" + (100_000).to_bytes(8, "big") + MASK + bytes(20_000))
    assert close_code(connection) == 1009
    with connect(f"ws://127.0.0.1:{server.port}/ws") as client:
        for data in (b"short", bytes(100_000)):
            client.send(data)
            assert client.recv(SECONDS) == data


def test_nothing_may_come_before_the_handshake_is_answered(server: Server, log: pytest.LogCaptureFixture) -> None:
    connection = server.open(HANDSHAKE.replace(b"/ws", b"/late"))
    time.sleep(0.2)
    connection.sendall(b"\xff" * 100)
    assert is_cut(connection)
    server.until_gone()


def test_text_that_is_no_utf8_is_told_in_one_line(server: Server, log: pytest.LogCaptureFixture) -> None:
    connection = websocket(server)
    connection.sendall(b"\x81\x81" + MASK + b"\xff")
    assert close_code(connection) == 1007


def test_who_does_not_read_is_cut(server: Server, limit: Any) -> None:
    limit("UNREAD_SECONDS", 0.3)
    server.until_gone()
    server.open(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n").recv(10)
    with connect(f"ws://127.0.0.1:{server.port}/ws", max_queue=1, ping_interval=None, close_timeout=0) as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(1000):
                client.send(bytes(100_000))
        server.until_gone()


def test_who_reads_slowly_but_does_gets_everything(server: Server, limit: Any) -> None:
    limit("UNREAD_SECONDS", 5.0)
    connection, total = server.open(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"), 0
    time.sleep(0.5)
    while part := connection.recv(1_000_000):
        total += len(part)
    assert total > LARGE


def test_connections_are_counted(server: Server, limit: Any) -> None:
    server.until_gone()
    limit("MOST_CONNECTIONS", 3)
    few = [server.open() for _ in range(3)]
    deadline = time.monotonic() + SECONDS
    while len(server.server_state.connections) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_cut(server.open(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    few[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert few[0].recv(4096).endswith(b"0 bytes")
    for connection in few:
        connection.close()
    server.until_gone()
    assert server.open(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").recv(4096).endswith(b"0 bytes")


BIG = 1_000_000
VANISHED = {
    "frame": HANDSHAKE + MESSAGE + b"\xff" + (2 * BIG).to_bytes(8, "big") + MASK + bytes(BIG),
    "fragment": HANDSHAKE + FIRST_FRAGMENT + b"\xff" + BIG.to_bytes(8, "big") + MASK + bytes(BIG),
    "body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n" + bytes(BIG),
}


@pytest.mark.parametrize("kind", VANISHED)
def test_nothing_is_kept_of_clients_that_have_vanished(
    server: Server, limit: Any, log: pytest.LogCaptureFixture, kind: str
) -> None:
    """Also while the garbage collector does not run."""
    limit("MOST_HELLO", 10 * BIG)

    def vanish() -> None:
        head, _, rest = VANISHED[kind].partition(b"\r\n\r\n")
        connection = server.open(head + b"\r\n\r\n")
        if kind != "body":
            assert connection.recv(4096).startswith(b"HTTP/1.1 101")
        connection.sendall(rest)
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        server.until_gone()

    vanish()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            vanish()
        time.sleep(0.05)
        assert tracemalloc.get_traced_memory()[0] < BIG
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000,
        HANDSHAKE.replace(b"MDEyMzQ1Njc4OWFiY2RlZg==", b"short"),
        HANDSHAKE.replace(b"Version: 13", b"Version: 12"),
        HANDSHAKE.replace(b"localhost", b"\xff"),
        HANDSHAKE.replace(b"/ws", b"/"),
    ],
    ids=range(11),
)
def test_what_is_no_request_is_refused_in_one_line(server: Server, log: pytest.LogCaptureFixture, sent: bytes) -> None:
    connection = server.open()
    with contextlib.suppress(OSError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    connection.close()
    server.until_gone()
    assert all("\n" not in record.getMessage() for record in log.records)
