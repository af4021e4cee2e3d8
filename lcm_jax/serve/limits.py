"""uvicorn's HTTP and WebSocket protocols with limits on what one client can take: time, memory, and the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from lcm_jax.serve.protocol import BAD_TEXT, MOST_TEXT, POLICY, TOO_BIG

HEAD_SECONDS = 10.0  # within which the head of a request has to arrive, on a new connection too
MESSAGE_SECONDS = 30.0  # within which a message that has begun has to be complete
UNREAD_SECONDS = 30.0  # for which a client may leave unread what it is sent
MOST_CONNECTIONS = 600  # open at once, below the 1,024 files that many systems allow; one more is closed unanswered
MOST_HELLO = 5 * MOST_TEXT  # bytes of a WebSocket before its first message is complete: four a character, and the head
MOST_FRAMES = 1500  # of a WebSocket in a second: messages, their fragments and pings
SLICE = 16_384  # bytes that are read at once, as each frame in them takes time in the event loop


class Deadline:
    """A time at which a connection is cut, without a word, unless it is called off before."""

    def __init__(self, transport: Any) -> None:  # asyncio's, or uvloop's, which is of no class of asyncio's
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float) -> None:
        """Set the time, unless it is set already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def call_off(self) -> None:
        """Remove the time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Limited(asyncio.Protocol):
    """The limits that HTTP and WebSocket have in common; a mixin, before uvicorn's protocol in the order of bases."""

    transport: Any
    connections: set[Any]

    def connection_made(self, transport: Any) -> None:
        """Begin, or cut a connection that is one too many."""
        self.read_deadline, self.write_deadline = Deadline(transport), Deadline(transport)
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        self.write_deadline.begin(UNREAD_SECONDS)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Go on, as the client reads."""
        self.write_deadline.call_off()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        self.read_deadline.call_off()
        self.write_deadline.call_off()
        super().connection_lost(exc)


class HTTP(Limited, H11Protocol):
    """uvicorn's HTTP/1.1, which cuts connections that are silent, or send the head of a request slowly."""

    def connection_made(self, transport: Any) -> None:
        """Begin, and wait for the first request."""
        super().connection_made(transport)
        self.read_deadline.begin(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Read, and wait for the rest of a head."""
        last = self.cycle
        if last is None or last.response_complete:
            self.read_deadline.begin(HEAD_SECONDS)
        super().data_received(data)
        if self.cycle is not last or self.transport.get_protocol() is not self:  # a request has come, or a WebSocket
            self.read_deadline.call_off()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection, and keep nothing of a body: what is left may wait long for the garbage collector."""
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.body = bytearray()


class WebSockets(Limited, WebSocketsSansIOProtocol):
    """uvicorn's WebSockets, which limit the size, the frames and the time of a message that is not complete."""

    _messages = _bytes = _frames = 0
    _second = 0.0  # since which frames are counted

    def data_received(self, data: bytes) -> None:
        """Read, as long as the client stays within its limits."""
        if self.handshake_initiated and not self.handshake_complete:  # nothing may come before the answer
            return self.transport.abort()
        self._bytes += len(data)
        for at in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return
            super().data_received(data[at : at + SLICE])
            if self._frames > MOST_FRAMES:
                return self._fail(POLICY, f"a client may send at most {MOST_FRAMES} frames a second")
        if self._messages == 0 and self._bytes > MOST_HELLO:
            return self._fail(TOO_BIG, f"the first message may have at most {MOST_TEXT} characters")
        if self.frames or self.conn.reader.buffer:
            self.read_deadline.begin(MESSAGE_SECONDS)
        else:
            self.read_deadline.call_off()

    def handle_events(self) -> None:
        """Count the frames that have been read, and handle them."""
        if self.loop.time() - self._second >= 1.0:
            self._frames, self._second = 0, self.loop.time()
        self._frames += len(self.conn.events)
        super().handle_events()

    def send_receive_event_to_app(self) -> None:
        """Pass on a message that is complete."""
        self._messages += 1
        self.read_deadline.call_off()
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # which uvicorn would log with a traceback
                return self._fail(BAD_TEXT, "a text message must be UTF-8")
        super().send_receive_event_to_app()

    def _fail(self, code: int, reason: str) -> None:
        self.frames = []
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection, and keep no message: what is left may wait long for the garbage collector."""
        self.frames = []
        for _ in range(self.queue.qsize()):
            event = self.queue.get_nowait()
            if event["type"] != "websocket.receive":
                self.queue.put_nowait(event)
        if not self.conn.reader.eof:
            self.conn.receive_eof()  # drops what it has read
            self.conn.parser_exc = None  # whose traceback holds the last frame
        super().connection_lost(exc)
