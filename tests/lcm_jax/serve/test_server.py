"""The server over real sockets of this machine: bad input, the line, those who never read, who may come in, the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import re
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image as PILImage
from websockets.asyncio.client import connect as async_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import lcm_jax
from lcm_jax.bench.serving import serving
from lcm_jax.serve.codec import decode, encode, from_base64
from lcm_jax.serve.connection import MOST_MESSAGES, out, push
from lcm_jax.serve.protocol import FRAME, MOST_BYTES, PICTURE, SAME, pack, unpack
from lcm_jax.serve.server import FILES, PAGE, Server, listen, open_page
from lcm_jax.serve.service import Config, Service
from lcm_jax.serve.session import Answer, Ended, Frame
from lcm_jax.stream import Controls, Stream

SECONDS = 120.0
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
START = Controls(prompt="a", similarity=None)


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


@pytest.mark.parametrize(
    ("drawn", "sent", "lost"),
    [
        ("AB", "AB", 0),
        ("ABC", "BC", 1),
        ("AB.", "B.", 1),
        ("A..", "A.", 0),  # what says that A holds may only come after A
        ("A...", "A.", 0),
        ("A..B", "AB", 0),
        ("..A", ".A", 0),
        ("ABCDE.", "E.", 4),
    ],
)
def test_a_picture_that_holds_is_sent_before_it_is_said_to_hold(drawn: str, sent: str, lost: int) -> None:
    """Letters are pictures, dots answers without one; two wait to be sent."""
    waiting: deque[Answer] = deque()
    discarded = 0
    for i, letter in enumerate(drawn):
        frame = Frame(i, np.zeros((1, 1, 3), np.uint8), 0.0, 0.0)
        picture = None if letter == "." else np.full((1, 1, 3), ord(letter), np.uint8)
        discarded += push(waiting, Answer(frame, frame, True, picture, 0.0, 0.0, 0.0))
    assert "".join("." if one.picture is None else chr(one.picture[0, 0, 0]) for one in waiting) == sent
    assert waiting[-1].frame.sequence == len(drawn) - 1
    assert discarded == lost


@pytest.mark.parametrize("turns", range(4))
def test_who_sends_may_be_cancelled_at_any_moment(turns: int) -> None:
    """Also when the message has just been sent, or the connection would never end."""

    async def cancel() -> None:
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def send() -> None:
            await sent

        sender = asyncio.create_task(out(send()))
        await asyncio.sleep(0.01)
        sent.set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        if sender.cancel():
            with pytest.raises(asyncio.CancelledError):
                await sender

    asyncio.run(cancel())


class House:
    """A server in a thread."""

    def __init__(self, pipe: Any, **options: Any) -> None:
        config = Config(model="light", size=(16, 16), controls=START, port=0, **options)
        self.listener = listen(config.host, 0)
        self.port = self.listener.getsockname()[1]
        self.service = Service(pipe, config)
        self.service.engine.warm(config.controls)
        self.server = Server(self.service)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        assert not self.service.engine.alive
        assert not self.service.connections

    def get(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Response:
        asking = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(asking):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a server need not read all of it
                asking.request(method, path, body, headers)
            reply = asking.getresponse()
            return Response(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())

    def post(self, body: Any, **headers: str) -> Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.get("/v1/images", "POST", content, **headers)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").content.decode().splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1])

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


class Client:
    """A well-behaved one: PNG, one frame at a time."""

    def __init__(self, house: House, controls: dict[str, Any] | None = None, path: str = "/ws", **options: Any) -> None:
        url = f"ws://127.0.0.1:{house.port}{path}"
        self._open = connect(url, compression=None, ping_interval=None, open_timeout=SECONDS, **options)
        self.socket: ClientConnection = self._open.__enter__()
        self.say("hello", controls=controls or {}, format="png")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"v": 1, "type": kind, **fields}))

    def hear(self, *kinds: str) -> dict[str, Any]:
        """The next text message of a kind."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            data = self.socket.recv(SECONDS)
            if isinstance(data, str) and (message := json.loads(data))["type"] in kinds:
                return message
        raise AssertionError(kinds)

    def send(self, sequence: int, pixels: np.ndarray | bytes) -> None:
        self.socket.send(pack(FRAME, sequence, 0, pixels if isinstance(pixels, bytes) else encode(pixels)))

    def draw(self, sequence: int, pixels: np.ndarray) -> np.ndarray | None:
        """The answer to a frame."""
        self.send(sequence, pixels)
        while True:
            data = self.socket.recv(SECONDS)
            if isinstance(data, bytes) and (frame := unpack(data)).sequence == sequence:
                return decode(frame.body) if frame.kind == PICTURE else None

    def set(self, **controls: Any) -> dict[str, Any]:
        self.say("set", controls=controls)
        return self.hear("controls", "error")

    def ended(self) -> tuple[int, str]:
        """The code that the connection is closed with, and the last words."""
        words = ""
        with contextlib.suppress(ConnectionClosed):
            while True:
                data = self.socket.recv(SECONDS)
                if isinstance(data, str) and json.loads(data)["type"] == "bye":
                    words = json.loads(data)["reason"]
        assert self.socket.close_code is not None
        return self.socket.close_code, words


def drawing(light_pipe: Any) -> Any:
    """A pipeline that gives, asked for a picture, one of the seed's colour, once it is allowed to."""

    class Drawing(type(light_pipe)):  # type: ignore[misc]
        allowed = threading.Event()
        allowed.set()

        def __call__(self, **options: Any) -> np.ndarray:
            assert self.allowed.wait(SECONDS)
            if options["prompt"] == "bad":
                raise ValueError("the pipeline does not like this")
            return np.full((1, *options["size"], 3), options["seed"] % 256, np.uint8)

    light_pipe.__class__ = Drawing
    return light_pipe


@pytest.fixture
def pipe(light_pipe: Any) -> Any:
    return drawing(light_pipe)


@pytest.fixture(scope="module")
def standing(make_light_pipe: Callable[[], Any]) -> Iterator[House]:
    """One for all requests that leave nothing behind."""
    house = House(drawing(make_light_pipe()))
    yield house
    house.stop()


@pytest.fixture
def open_house(pipe: Any) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def open_house(**options: Any) -> House:
            house = House(pipe, **options)
            stack.callback(house.stop)
            return house

        yield open_house


@pytest.fixture
def house(open_house: Callable[..., House]) -> House:
    return open_house()


@pytest.fixture
def moving(frames: np.ndarray) -> list[np.ndarray]:
    return [frame[0] for frame in frames]


def solo(pipe: Any, **controls: Any) -> Stream:
    stream = Stream(pipe)
    stream.set(**vars(START))
    stream.set(**controls)
    return stream


def test_welcome_says_what_there_is(house: House) -> None:
    with Client(house, {"steps": 1}) as client:
        welcome = client.hear("welcome")
    assert (welcome["v"], welcome["model"], welcome["size"]) == (1, "light", [16, 16])
    assert welcome["controls"]["prompt"] == [["a", 1.0]]
    assert welcome["controls"]["steps"] == 1
    assert welcome["limits"]["bytes"] == MOST_BYTES
    assert Controls().changed(**welcome["controls"]) == START.changed(steps=1)


def test_frames_are_redrawn_as_a_stream_redraws_them(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    with Client(house) as client:
        client.hear("welcome")
        for i, frame in enumerate(moving):
            assert np.array_equal(client.draw(i, frame), alone(frame))


def test_an_answer_names_the_frame_it_shows_and_a_still_one_has_no_bytes(
    house: House, moving: list[np.ndarray]
) -> None:
    with Client(house, {"similarity": 0.9, "max_skips": 1000}) as client:
        client.hear("welcome")
        frames = []
        for i, frame in enumerate([moving[0], moving[1], moving[1], moving[1], moving[1]]):
            client.send(10 + i, frame)
            while not isinstance(data := client.socket.recv(SECONDS), bytes):
                pass
            frames.append(unpack(data))
    assert [frame.sequence for frame in frames] == [10, 11, 12, 13, 14]
    # Two are in flight: the second frame comes out when it has been sent twice, and then nothing is new.
    assert [frame.shows for frame in frames] == [10, 10, 11, 13, 14]
    assert [frame.kind for frame in frames] == [PICTURE, PICTURE, PICTURE, SAME, SAME]
    assert [len(frame.body) > 0 for frame in frames] == [True, True, True, False, False]


def test_controls_change_while_it_streams(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    changes: list[dict[str, Any]] = [{"prompt": [["b", 1], ["c", 0.5]]}, {"strength": 0.9}, {"seed": 5, "scale": 2}]
    with Client(house) as client:
        client.hear("welcome")
        for i, change in enumerate(changes):
            assert np.array_equal(client.draw(2 * i, moving[i]), alone(moving[i]))
            reply = client.set(**change)
            alone.set(**change)
            assert Controls().changed(**reply["controls"]) == alone.controls
            assert np.array_equal(client.draw(2 * i + 1, moving[i]), alone(moving[i]))


BAD_TEXTS = [
    ("", "must be JSON"),
    ("[" * 60_000, "must be JSON"),
    (json.dumps({"v": 1, "type": "nonsense"}), "'nonsense'"),
    (json.dumps({"v": 1, "type": "hello"}), "hello has been said"),
    (json.dumps({"v": 1, "type": "set", "controls": {"strenght": 1}}), "'strenght' is no control"),
    (json.dumps({"v": 1, "type": "set", "controls": {"strength": 2}}), "from 0.02 to 1"),
    (json.dumps({"v": 1, "type": "set", "controls": {"strength": "high"}}), "must be a number"),
    (json.dumps({"v": 1, "type": "set", "controls": {"prompt": "a" * 3000}}), "at most 2000"),
    (json.dumps({"v": 1, "type": "set", "controls": {"prompt": "a" * 1_000_000}}), "65536 characters"),
    (json.dumps({"v": 1, "type": "set", "controls": {"lora": [["x", 1]]}}), "lora 'x' is unknown"),
    ('{"v": 1, "type": "set", "controls": {"t_index": [1e400]}}', "the number 1e400"),
    ('{"v": 1, "type": "set", "controls": {"t_index": 1e400}}', "the number 1e400"),
    ('{"v": 1, "type": "set", "controls": {"t_index": [10, true]}}', "whole numbers"),
    ('{"v": 1, "type": "set", "controls": {"t_index": "12"}}', "whole numbers"),
    ('{"v": 1, "type": "set", "controls": {"t_index": [1.5]}}', "whole numbers"),
    (json.dumps({"v": 1, "type": "set", "controls": {"t_index": [1] * 20_000}}), "rising"),
]


@pytest.mark.wrong_types
def test_bad_text_is_told_and_changes_nothing(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    with Client(house) as client:
        client.hear("welcome")
        for i, (text, why) in enumerate(BAD_TEXTS):
            client.socket.send(text)
            assert why in client.hear("error")["message"]
            assert np.array_equal(client.draw(i, moving[i % 8]), alone(moving[i % 8])), why


def bomb() -> bytes:
    """A small PNG of 100 megapixels: the header of a real one with other dimensions."""
    import struct
    import zlib

    data = encode(np.zeros((4, 4, 3), np.uint8))
    head = b"IHDR" + struct.pack("!II", 10_000, 10_000) + data[24:29]
    return data[:12] + head + struct.pack("!I", zlib.crc32(head)) + data[33:]


def many_scans(number: int) -> bytes:
    """A progressive JPEG with scans that have no data, each of which a decoder passes over all pixels for."""
    out = io.BytesIO()
    PILImage.new("RGB", (64, 64)).save(out, "JPEG", progressive=True)
    return out.getvalue()[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * number + b"\xff\xd9"


BAD_FRAMES = [
    (b"", "header of 12 bytes"),
    (pack(FRAME, 5)[:11], "header of 12 bytes"),
    (pack(PICTURE, 5, 0, b"x"), "kind 1"),
    (pack(FRAME, 5), "neither"),
    (pack(FRAME, 5, 0, b"GIF89a" + bytes(100)), "neither"),
    (pack(FRAME, 5, 0, bytes(100_000)), "neither"),
    (pack(FRAME, 5, 0, encode(np.zeros((64, 64, 3), np.uint8))[:70]), "cannot be read"),
    (pack(FRAME, 5, 0, bomb()), "10000 x 10000"),
    (pack(FRAME, 5, 0, many_scans(300)), "at most 100 scans"),
]


def test_bad_frames_are_told_and_disturb_nobody(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    with Client(house) as bad, Client(house) as good:
        bad.hear("welcome")
        good.hear("welcome")
        for i, (data, why) in enumerate(BAD_FRAMES):
            bad.socket.send(data)
            message = bad.hear("error")
            assert why in message["message"]
            assert message.get("sequence") == (5 if "kind" not in why and "header" not in why else None)
            expected = alone(moving[i % 8])
            assert np.array_equal(good.draw(i, moving[i % 8]), expected)
            assert np.array_equal(bad.draw(100 + i, moving[i % 8]), expected)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (json.dumps({"v": 2, "type": "set", "controls": {}}), 4000),
        (json.dumps({"type": "set", "controls": {}}), 4000),
        (b"\x02" + pack(FRAME, 0)[1:], 4000),
        (pack(FRAME, 0, 0, bytes(MOST_BYTES)), 1009),
        (json.dumps({"v": 1, "type": "bye"}), 1000),
    ],
)
def test_what_ends_a_connection_ends_no_other(
    house: House, pipe: Any, moving: list[np.ndarray], data: str | bytes, code: int
) -> None:
    alone = solo(pipe)
    with Client(house) as bad, Client(house) as good:
        bad.hear("welcome")
        good.hear("welcome")
        for i in range(3):
            if i == 1:
                with contextlib.suppress(ConnectionClosed):
                    bad.socket.send(data)
            assert np.array_equal(good.draw(i, moving[i]), alone(moving[i]))
        assert bad.ended()[0] == code
    house.until(lambda: house.metric("lcm_jax_sessions") == 0)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (b"\x01\x01", "must be JSON"),
        ("hello", "must be JSON"),
        (json.dumps({"v": 1, "type": "set", "controls": {}}), "must be a hello"),
        (json.dumps({"v": 1, "type": "hello", "controls": {"steps": 99}}), "steps is 99"),
        (json.dumps({"v": 1, "type": "hello", "controls": {"x": 1}}), "no control"),
    ],
)
def test_a_connection_begins_with_a_good_hello(standing: House, hello: str | bytes, why: str) -> None:
    with connect(f"ws://127.0.0.1:{standing.port}/ws") as socket:
        socket.send(hello)
        message = json.loads(socket.recv(SECONDS))
        assert message["type"] == "bye"
        assert why in message["reason"]
        with pytest.raises(ConnectionClosed):
            socket.recv(SECONDS)
        assert socket.close_code == 4001


def test_who_says_no_hello_is_sent_away(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_jax.serve.connection.HELLO_SECONDS", 0.2)
    with connect(f"ws://127.0.0.1:{house.port}/ws") as socket:
        assert "no hello" in json.loads(socket.recv(SECONDS))["reason"]


def test_sessions_are_isolated(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    """The same frames, other controls: other pictures; and what one changes leaves the other's as they are alone."""
    alone = solo(pipe, seed=1)
    with Client(house, {"seed": 1}) as calm, Client(house, {"prompt": "b", "seed": 2}) as wild:
        calm.hear("welcome")
        wild.hear("welcome")
        for i in range(12):
            frame = moving[i % 8]
            wild.send(i, frame)
            expected = alone(frame)
            assert np.array_equal(calm.draw(i, frame), expected)
            wild.say("set", controls={"prompt": f"b{i}", "strength": 0.3 + 0.05 * i, "seed": i, "feedback": 0.3})
        other = wild.draw(99, moving[11 % 8])
        assert other is not None
        assert not np.array_equal(other, expected)


def test_a_line_of_those_who_wait(open_house: Callable[..., House], moving: list[np.ndarray]) -> None:
    house = open_house(max_sessions=1, max_waiting=2)
    with Client(house) as first:
        first.hear("welcome")
        with Client(house) as second:
            assert second.hear("waiting")["position"] == 1
            with Client(house) as third:
                assert third.hear("waiting")["position"] == 2
                with Client(house) as fourth:
                    code, words = fourth.ended()
                    assert code == 1013
                    assert "1 sessions are streaming and 2 are waiting" in words
                second.send(0, moving[0])  # too early, and no harm
                assert first.draw(0, moving[0]) is not None
                assert house.metric("lcm_jax_waiting") == 2
                second.socket.close()
                assert third.hear("waiting")["position"] == 1
                first.say("bye")
                third.hear("welcome")
                assert third.draw(0, moving[0]) is not None
    house.until(lambda: house.metric("lcm_jax_sessions") == 0)
    assert house.metric("lcm_jax_refused_total") == 1


def test_a_client_that_never_reads_costs_nothing_and_is_let_go(
    pipe: Any, open_house: Callable[..., House], moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm_jax.serve.connection.SEND_SECONDS", 1.0)
    # With what follows its end a picture is large enough to fill what lies between server and client.
    monkeypatch.setattr("lcm_jax.serve.connection.encode", lambda *args: encode(*args) + bytes(50_000))
    house = open_house()
    alone = solo(pipe)
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(Client(house))
        good.hear("welcome")
        house.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of connections from now on
        deaf = stack.enter_context(Client(house, max_queue=1, close_timeout=0.1))
        deaf.hear("welcome")
        deaf.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        i, deadline = 0, time.monotonic() + 20  # before a ping that is not answered would end it
        while house.metric("lcm_jax_sessions") == 2:
            assert time.monotonic() < deadline
            with contextlib.suppress(ConnectionClosed):
                deaf.send(i, moving[i % 8])
            assert np.array_equal(good.draw(i, moving[i % 8]), alone(moving[i % 8]))
            assert all(
                len(connection._answers) <= 2 and len(connection._texts) <= 64
                for connection in house.service.connections
            )
            i += 1
        assert house.service.telemetry.unsent > 0
        assert good.draw(i, moving[0]) is not None


def test_a_client_that_vanishes_in_the_middle_of_a_frame(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    with Client(house) as good:
        good.hear("welcome")
        for i in range(6):
            gone = Client(house)
            gone.hear("welcome")
            gone.send(0, moving[0])
            raw = gone.socket.socket
            raw.sendall(b"\x82\xfe\x10\x00" + bytes(100))  # the first bytes of a message of 4096
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.close()  # with a reset, without a goodbye
            assert np.array_equal(good.draw(i, moving[i]), alone(moving[i]))
        house.until(lambda: house.metric("lcm_jax_sessions") == 1)


def test_two_hundred_connections_at_once(open_house: Callable[..., House], moving: list[np.ndarray]) -> None:
    house = open_house(max_sessions=2, max_waiting=16)

    async def visit(stack: contextlib.AsyncExitStack) -> str:
        url = f"ws://127.0.0.1:{house.port}/ws"
        client = await stack.enter_async_context(async_connect(url, ping_interval=None, open_timeout=SECONDS))
        await client.send(json.dumps({"v": 1, "type": "hello"}))
        kind: str = json.loads(await client.recv())["type"]
        if kind == "welcome":
            await client.send(pack(FRAME, 0, 0, encode(moving[0])))
            while not isinstance(await client.recv(), bytes):
                pass
        return kind

    async def visits() -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            kinds = await asyncio.gather(*(visit(stack) for _ in range(200)))
            assert await asyncio.to_thread(lambda: house.get("/healthz").json()) == {"status": "ok"}
            return kinds

    kinds = asyncio.run(visits())
    assert (kinds.count("welcome"), kinds.count("waiting"), kinds.count("bye")) == (2, 16, 182)
    assert house.metric("lcm_jax_refused_total") == 182
    house.until(lambda: house.metric("lcm_jax_connections") == 0)
    with Client(house) as client:
        client.hear("welcome")
        assert client.draw(0, moving[0]) is not None


def test_a_message_that_is_far_too_large_is_not_even_read(house: House, moving: list[np.ndarray]) -> None:
    with Client(house) as bad, Client(house) as good:
        bad.hear("welcome")
        good.hear("welcome")
        with contextlib.suppress(ConnectionClosed):
            bad.socket.send(bytes(20_000_000))
        assert bad.ended()[0] in (1009, 1006)  # the code may be lost with what was still to be read
        assert good.draw(0, moving[0]) is not None


def test_who_sends_too_much_is_read_slowly(house: House, pipe: Any, moving: list[np.ndarray]) -> None:
    alone = solo(pipe)
    with Client(house) as good, Client(house) as flood:
        good.hear("welcome")
        flood.hear("welcome")
        start = time.monotonic()
        sending = threading.Thread(target=lambda: [flood.socket.send("x") for _ in range(4 * MOST_MESSAGES)])
        sending.start()
        for i in range(8):
            assert np.array_equal(good.draw(i, moving[i]), alone(moving[i]))
        sending.join(SECONDS)
        flood.set(strength=0.5)
        while (reply := flood.hear("controls", "error"))["type"] == "error":
            pass
        assert reply["controls"]["strength"] == 0.5
        assert time.monotonic() - start > 2.0


def test_an_idle_session_ends(open_house: Callable[..., House], moving: list[np.ndarray]) -> None:
    house = open_house(idle_timeout=1.0)
    with Client(house) as idle, Client(house) as busy:
        idle.hear("welcome")
        busy.hear("welcome")
        start = time.monotonic()
        while time.monotonic() - start < 2.0:
            busy.draw(int(1000 * (time.monotonic() - start)), moving[0])
            with contextlib.suppress(ConnectionClosed):
                idle.socket.send(b"junk")  # does not count
            time.sleep(0.05)
        code, words = idle.ended()
        assert code == 4002
        assert "1 seconds" in words
        assert busy.draw(0, moving[0]) is not None


def test_a_session_that_fails_is_told(house: House, moving: list[np.ndarray]) -> None:
    with contextlib.ExitStack() as stack, Client(house) as bad:
        bad.hear("welcome")
        session = next(iter(house.service.connections)).session
        good = stack.enter_context(Client(house))
        good.hear("welcome")
        assert session.stream is not None
        session.stream.prepare = lambda frame: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        bad.send(0, moving[0])
        code, words = bad.ended()
        assert code == 4003
        assert "ZeroDivisionError" in words
        assert good.draw(0, moving[0]) is not None


def test_stats_and_metrics_count(house: House, moving: list[np.ndarray]) -> None:
    with Client(house, {"similarity": 0.9, "max_skips": 1000, "steps": 1}) as client:
        client.hear("welcome")
        for i, frame in enumerate([moving[0], moving[1], moving[1], moving[1]]):
            client.draw(i, frame)
        client.socket.send(pack(FRAME, 9, 0, b"no picture"))
        client.hear("error")
        stats = client.hear("stats")
        while stats["frames"] < 4:
            stats = client.hear("stats")
        assert stats["skipped"] == 0.5
        assert stats["sessions"] == 1
        times = stats["latency_ms"]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert sum(stats["times_ms"].values()) > 0
        text = house.get("/metrics").content.decode()
        for line in text.splitlines():
            assert line.startswith("# TYPE lcm_jax_") or float(line.rsplit(" ", 1)[1]) >= 0
        assert 'lcm_jax_frames_total{result="drawn"} 2' in text
        assert 'lcm_jax_frames_total{result="same"} 2' in text
        assert 'lcm_jax_frames_total{result="failed"} 1' in text
        assert "lcm_jax_latency_seconds_count 2" in text
        assert "lcm_jax_skipped_share 0.5" in text
        assert house.metric("lcm_jax_sessions") == 1


def test_latency_is_from_a_frames_arrival_to_its_picture(house: House, moving: list[np.ndarray]) -> None:
    """With a stream batch of two it has the wait for the next frame in it."""
    with Client(house) as client:
        client.hear("welcome")
        client.draw(0, moving[0])
        client.draw(1, moving[1])
        time.sleep(1.5)
        client.draw(2, moving[2])
        house.until(lambda: house.service.telemetry.drawn == 3)
    assert len(house.service.telemetry.latencies) == 2  # of three pictures two show the first frame
    assert max(house.service.telemetry.latencies) > 1.5


def test_an_answer_says_how_long_its_frame_waited(house: House, moving: list[np.ndarray]) -> None:
    """While the engine does something else."""
    engine, busy, free = house.service.engine, threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        assert free.wait(SECONDS)

    with Client(house) as client:
        client.hear("welcome")
        engine.call(work, compiled=True)
        assert busy.wait(SECONDS)
        client.send(0, moving[0])
        time.sleep(0.5)
        free.set()
        while isinstance(data := client.socket.recv(SECONDS), str):
            pass
        assert 250 < unpack(data).waited <= 65_535


def status(path: str, house: House, **headers: str) -> int:
    """Of a WebSocket's handshake."""
    try:
        with connect(f"ws://127.0.0.1:{house.port}{path}", additional_headers=headers or None):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def test_pages_of_others_may_not_connect(open_house: Callable[..., House]) -> None:
    house = open_house(origins=("https://friend.org",))
    origin = f"http://127.0.0.1:{house.port}"
    assert status("/ws", house) == 101
    assert status("/ws", house, Origin=origin) == 101
    assert status("/ws", house, Origin="https://friend.org") == 101
    for other in ("https://evil.org", "null", "http://127.0.0.1", f"{origin}.evil.org", "https://friend.org.evil.org"):
        assert status("/ws", house, Origin=other) == 403
        assert house.post({"prompt": "x"}, Origin=other).status == 403
    assert house.post({"prompt": "x"}, Origin=origin).status == 200


def test_a_local_server_has_local_names(open_house: Callable[..., House]) -> None:
    house = open_house(origins=("https://friend.org",))
    for host, code in (("localhost:1", 200), ("[::1]:80", 200), ("friend.org", 200), ("evil.org", 403), ("", 403)):
        assert house.get("/metrics", Host=host).status == code, host
    assert house.get("/healthz", Host="10.0.0.7").status == 200


def test_the_guard_reads_the_path_that_is_routed(
    open_house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the address that old versions of starlette put together from the header Host."""

    def url(_: Any) -> None:
        raise AssertionError("the guard asked for the address")

    monkeypatch.setattr("starlette.requests.HTTPConnection.url", property(url))
    house = open_house(token="secret")
    assert house.get("/metrics?token=secret").status == 200
    for host in (
        "x/healthz?",
        "x/healthz#",
        "localhost/healthz?",
        "localhost:1/healthz?",
        "localhost@x",
        "[",
        "[::1",
        "a b",
    ):
        assert house.get("/metrics", Host=host).status == 400, host
        assert house.get("/metrics?token=secret", Host=host).status == 400, host
        assert status("/ws?token=secret", house, Host=host) == 400, host
    for origin in ("http://[", "[", "http://", ""):
        assert house.get("/metrics?token=secret", Origin=origin).status == 403, origin


def test_a_token_is_asked_for(open_house: Callable[..., House]) -> None:
    house = open_house(token="s3cret token")
    right, wrong = "?token=s3cret%20token", "?token=s3cret"
    for path in ("/", "/metrics"):
        assert [house.get(path + query).status for query in (right, wrong, "")] == [200, 401, 401]
    assert house.get("/healthz").status == house.get("/app.js").status == 200
    assert [status("/ws" + query, house) for query in (right, wrong, "")] == [101, 401, 401]
    assert status("/ws", house, Authorization="Bearer s3cret token") == 101
    for value, code in (("Bearer s3cret token", 200), ("Bearer nonsense", 401), ("Basic s3cret token", 401)):
        assert house.post({"prompt": "x"}, Authorization=value).status == code
    assert house.post({"prompt": "x"}).status == 401


def test_the_page_is_all_here_and_asks_nobody_else(standing: House) -> None:
    page = standing.get("/")
    assert page.status == 200
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    kinds = {"js": "text/javascript", "css": "text/css", "html": "text/html"}
    for name in FILES:
        file = standing.get(f"/{name}")
        assert file.status == 200 or name == "index.html"
        assert name == "index.html" or file.headers["content-type"].startswith(kinds[name.split(".")[-1]])
        text = (PAGE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w+://\w|[\"'(]//", text), name
        assert not re.search(r"\s(style|on[a-z]+)=", text), name  # which the policy would not let through


def test_a_picture_by_http(house: House) -> None:
    reply = house.post({"prompt": "x", "seed": 77, "steps": 2})
    assert reply.status == 200
    assert reply.headers["content-type"] == "image/png"
    assert np.array_equal(decode(reply.content), np.full((16, 16, 3), 77, np.uint8))
    image = base64.b64encode(encode(np.zeros((30, 40, 3), np.uint8), "jpeg")).decode()
    reply = house.post({"prompt": "x", "image": image, "strength": 1, "mask": image, "size": [16, 32], "guidance": 2})
    assert decode(reply.content).shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        ([1], 'a JSON object, such as {"prompt"'),
        ({"steps": 1}, 'a "prompt"'),
        ({"promt": "x"}, "'promt' is no key of a request"),
        pytest.param({"prompt": 5}, "prompt is 5", marks=pytest.mark.wrong_types),
        ({"prompt": "x" * 3000}, "at most 2000"),
        ({"prompt": "\ud83d"}, "surrogate"),
        ({"prompt": "x", "negative_prompt": "\ud83d"}, "negative_prompt: "),
        ({"prompt": "x", "step": 3}, "'step' is no key"),
        ({"prompt": "x", "steps": 0}, "from 1 to 50"),
        ({"prompt": "x", "steps": True}, "whole number"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        pytest.param({"prompt": "x", "seed": None}, "seed is None", marks=pytest.mark.wrong_types),
        ({"prompt": "x", "guidance": float("nan")}, "the number NaN"),
        ({"prompt": "x", "guidance": 10**400}, "guidance is 1000"),
        ({"prompt": "x", "size": [16]}, "give [height, width]"),
        ({"prompt": "x", "size": [15, 16]}, "multiples of 2"),
        ({"prompt": "x", "size": [1600, 1600]}, "4 times the area"),
        ({"prompt": "x", "size": [-16, -16]}, "positive"),
        ({"prompt": "x", "strength": 0.5}, "without an image"),
        ({"prompt": "x", "image": "?"}, "image: a picture must be in base64"),
        ({"prompt": "x", "image": ""}, "must be in base64"),
        ({"prompt": "x", "image": "data:image/png,abc"}, "must begin like data:image/png;base64"),
        ({"prompt": "x", "image": base64.b64encode(many_scans(300)).decode()}, "at most 100 scans"),
        ({"prompt": "x", "image": base64.b64encode(b"hello").decode()}, "neither"),
        ({"prompt": "x", "image": base64.b64encode(bomb()).decode()}, "10000 x 10000"),
        ({"prompt": "bad"}, "the pipeline does not like this"),
    ],
)
def test_bad_requests_are_told_why(standing: House, body: Any, why: str) -> None:
    answer = standing.post(body)
    assert answer.status == 400
    assert why in answer.json()["error"]
    assert len(answer.json()["error"]) < 300


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\r\nand\ta tab",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",  # a family joined, a heart
        "\u732b\u3000\u306e\u9854",  # ideographic space
        "a\u00a0no-break\u202fspace",
        "",
        "x" * 2000,
    ],
)
def test_http_and_the_socket_take_the_same_prompts(standing: House, text: str) -> None:
    for name in ("prompt", "negative_prompt"):
        assert standing.post({"prompt": "x"} | {name: text}).status == 200
        assert getattr(Controls(**{name: text}), name) == (text if name == "negative_prompt" else ((text, 1.0),))


def test_a_picture_may_be_in_any_base64(standing: House) -> None:
    picture = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    plain, safe = base64.b64encode(picture).decode(), base64.urlsafe_b64encode(picture).decode()
    assert set("+/") <= set(plain)
    for text in (
        plain,
        base64.encodebytes(picture).decode(),
        plain.replace("A", "A\r\n"),
        safe,
        safe.rstrip("="),
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;name=x.png;base64,{quote(plain)}",
    ):
        assert standing.post({"prompt": "x", "image": text}).status == 200, text[:50]
        assert from_base64(text) == picture


def test_a_large_request_is_not_read(standing: House) -> None:
    answer = standing.post(b"x" * 17_000_000)
    assert answer.status == 413
    assert "16000000" in answer.json()["error"]


def test_other_errors_are_json_too(standing: House) -> None:
    assert standing.get("/nothing").status == 404
    assert standing.get("/v1/images").status == 405
    for path in ("/nothing", "/v1/images", "/../server.py", "/%2e%2e/server.py"):
        assert "error" in standing.get(path).json()
    assert status("/nothing", standing) in (403, 404)


def test_the_last_kinds_of_pictures_stay_compiled(house: House, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number may be asked for, and those that are refused cost no other its place."""
    monkeypatch.setattr("lcm_jax.serve.http_images.MOST_KINDS", 3)
    threads: list[str] = []
    draw = type(pipe).__call__

    def drawn(*args: Any, **options: Any) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return draw(*args, **options)

    monkeypatch.setattr(type(pipe), "__call__", drawn)

    def ask(width: int, prompt: str = "x") -> str | int:
        """The thread that drew a picture of a size, or the status of an error."""
        reply = house.post({"prompt": prompt, "size": [16, width]})
        return threads[-1].removeprefix("lcm-jax ") if reply.status == 200 else reply.status

    assert [ask(width) for width in (2, 4, 6, 2)] == ["compiler"] * 3 + ["engine"]
    assert [ask(width, "bad") for width in range(8, 30, 2)] == [400] * 11
    assert [ask(width) for width in (4, 6, 2)] == ["engine"] * 3
    assert [ask(width) for width in (8, 6, 2, 4)] == ["compiler", "engine", "engine", "compiler"]


def test_only_so_many_pictures_wait_and_streams_go_on(
    open_house: Callable[..., House], pipe: Any, moving: list[np.ndarray]
) -> None:
    house = open_house(most_calls=2)
    type(pipe).allowed.clear()
    with Client(house) as client, ThreadPoolExecutor(4) as pool:
        client.hear("welcome")
        first = [pool.submit(house.post, {"prompt": "x"}) for _ in range(2)]
        house.until(lambda: len(house.service.engine._unanswered) == 2)
        busy = house.post({"prompt": "x"})
        assert busy.status == 503
        assert "retry-after" in busy.headers
        assert client.draw(0, moving[0]) is not None  # the first of its kind is compiled beside the streams
        type(pipe).allowed.set()
        assert [one.result().status for one in first] == [200, 200]
    assert house.post({"prompt": "x"}).status == 200


def test_only_so_many_requests_are_read(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_jax.serve.http_images.MOST_READ", 2)
    monkeypatch.setattr("lcm_jax.serve.http_images.BODY_SECONDS", 1.0)
    slow = [socket.create_connection(("127.0.0.1", house.port)) for _ in range(2)]
    for connection in slow:  # the head of a request, whose body never comes
        connection.sendall(b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    house.until(lambda: house.post({"prompt": "x"}).status == 503)
    assert all(connection.recv(100).startswith(b"HTTP/1.1 408") for connection in slow)
    assert house.post({"prompt": "x"}).status == 200


def test_a_client_that_vanishes_is_no_error(house: House, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        gone = socket.create_connection(("127.0.0.1", house.port))
        gone.sendall(b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.05)
        gone.close()
        for host in (b"localhost", b"evil.org"):
            gone = socket.create_connection(("127.0.0.1", house.port))
            gone.sendall(HANDSHAKE.replace(b"localhost", host))
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.close()
    house.until(lambda: len(house.server.server_state.connections) == 0)
    assert house.post({"prompt": "x"}).status == 200
    assert [record for record in caplog.records if record.exc_info] == []


def test_what_a_session_held_is_freed_when_it_ends(house: House, moving: list[np.ndarray]) -> None:
    """By whatever end, and while the garbage collector does not run."""
    ends: list[Callable[[Client], None]] = [
        lambda client: client.say("bye"),
        lambda client: client.socket.send(json.dumps({"v": 2})),
        lambda client: client.socket.close(),
        lambda client: client.socket.socket.shutdown(socket.SHUT_RDWR),
        lambda client: house.service.engine._sessions[0].tell(Ended("broken")),
    ]
    gc.collect()
    gc.disable()
    try:
        for end in ends:
            client = Client(house)
            client.hear("welcome")
            assert client.draw(0, moving[0]) is not None
            held = weakref.ref(house.service.engine._sessions[0].stream)
            end(client)
            house.until(lambda held=held: held() is None)
    finally:
        gc.enable()


def test_decoders_do_not_hold_up_encoders(house: House, moving: list[np.ndarray]) -> None:
    """While every decoder is at work a picture is sent, and one is drawn by HTTP."""
    free = threading.Event()
    with Client(house) as client:
        client.hear("welcome")
        held = [house.service.decoders.submit(free.wait, SECONDS) for _ in range(house.service.decoders._max_workers)]
        session = house.service.engine._sessions[0]
        house.service.engine.offer(session, Frame(7, moving[0], time.perf_counter(), time.perf_counter()))
        while not isinstance(data := client.socket.recv(SECONDS), bytes):
            pass
        assert unpack(data).sequence == 7
        assert house.post({"prompt": "x"}).status == 200
        free.set()
        assert all(future.result(SECONDS) for future in held)


def test_the_end_is_told(pipe: Any, moving: list[np.ndarray]) -> None:
    house = House(pipe, max_sessions=1)
    with Client(house) as streaming, Client(house) as waiting:
        streaming.hear("welcome")
        waiting.hear("waiting")
        assert streaming.draw(0, moving[0]) is not None
        start = time.monotonic()
        house.server.should_exit = True
        assert streaming.ended() == waiting.ended() == (1001, "the server is stopping")
        house.stop()
        assert time.monotonic() - start < 30
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", house.port), 1)


def test_a_config_is_checked() -> None:
    good = Config(model="x", size=(16, 16), controls=START)
    for changes, why in [
        ({"max_sessions": 0}, "max_sessions"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"idle_timeout": 0.0}, "idle_timeout"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
        ({"port": 70_000}, "port"),
        ({"token": ""}, "token"),
        ({"token": "\u00e9"}, "token"),
        ({"origins": ("example.org",)}, "origin 'example.org'"),
        ({"origins": ("https://example.org/",)}, "such as https://example.org"),
        ({"origins": ("*", "http://[")}, "origin"),
    ]:
        with pytest.raises(ValueError, match=why):
            replace(good, **changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_page_is_opened_in_a_browser(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    answers = iter([True, False])
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or next(answers))
    config = Config(model="light", size=(16, 16), controls=START, host=host, token="a b")
    with listen("127.0.0.1", 0) as listener:
        name = {"0.0.0.0": "localhost"}.get(host, host)
        expected = f"http://{name}:{listener.getsockname()[1]}/?token=a%20b"
        open_page(config, listener)
        assert capsys.readouterr().err == ""
        open_page(config, listener)
        assert capsys.readouterr().err == f"lcm-jax: no browser could be opened here: open {expected}\n"
    assert opened == [expected, expected]


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
            listen("127.0.0.1", port)


@pytest.mark.slow
def test_a_real_pipeline_is_served(tiny_model: Path, moving: list[np.ndarray]) -> None:
    """Frames by the socket and pictures by HTTP are those of a stream and of the pipeline."""
    pipe = lcm_jax.load(tiny_model)
    house = House(pipe, guidance=1.0)
    try:
        alone = solo(pipe, prompt="red heart")
        with Client(house, {"prompt": "red heart"}) as client:
            client.hear("welcome")
            for i, frame in enumerate(moving[:4]):
                assert np.array_equal(client.draw(i, frame), alone(frame))
            order = {"prompt": "dog face", "steps": 3, "seed": 5, "image": base64.b64encode(encode(moving[0])).decode()}
            expected = pipe("dog face", steps=3, seed=5, image=moving[0], guidance=1.0, sampler="lcm")[0]
            for _ in range(2):  # beside the streams, then between their turns
                assert np.array_equal(decode(house.post(order).content), expected)
            assert np.array_equal(client.draw(9, moving[4]), alone(moving[4]))
    finally:
        house.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_command_in_peace(tiny_model: Path, name: str) -> None:
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    with serving("--model", str(tiny_model), "--sampler", "lcm", **environment) as server:
        with connect(server.address.replace("http", "ws") + "/ws") as client:
            client.send(json.dumps({"v": 1, "type": "hello"}))
            while json.loads(client.recv(SECONDS))["type"] != "welcome":
                pass
            server.process.send_signal(getattr(signal, name))
            with contextlib.suppress(ConnectionClosed):
                while True:
                    client.recv(SECONDS)
            assert client.close_code == 1001
        assert server.process.wait(SECONDS) == 0
        assert server.process.stdout.read() == "lcm-jax: stopped\n"
