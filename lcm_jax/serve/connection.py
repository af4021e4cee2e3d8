"""The WebSocket of one client, from hello to bye: four tasks, with queues between them that drop what is oldest."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from lcm_jax.serve import protocol
from lcm_jax.serve.codec import MOST_PIXELS, decode, encode
from lcm_jax.serve.protocol import PICTURE, SAME, Binary, Bye, message
from lcm_jax.serve.service import Service
from lcm_jax.serve.session import Answer, Compiling, Ended, Event, Frame, Now, Session
from lcm_jax.serve.telemetry import Telemetry
from lcm_jax.serve.waiting_line import Full
from lcm_jax.stream.controls import MOST_STEPS, MOST_TEXT

log = logging.getLogger(__name__)
HELLO_SECONDS = 10.0  # within which a client has to say hello
SEND_SECONDS = 20.0  # that one message may take to be sent
CLOSE_SECONDS = 1.0
MOST_MESSAGES = 150  # of a client that are read in a second
PICTURES = 2  # answers that wait to be sent at most
TEXTS = 64  # text messages that wait to be sent at most


def push(answers: deque[Answer], answer: Answer) -> int:
    """Append an answer to at most PICTURES that wait to be sent, and return how many pictures were dropped for it."""
    answers.append(answer)
    if len(answers) <= PICTURES:
        return 0
    old, following = answers.popleft(), answers[0]
    if old.picture is not None and following.picture is None:  # "the last picture holds", which was not sent yet
        answers[0] = following._replace(shows=old.shows, owed=old.owed, picture=old.picture)
        return 0
    return int(old.picture is not None)


async def out(sending: Awaitable[None]) -> None:
    """Await the sending of one message. Raise `Bye` if it takes longer than SEND_SECONDS."""
    try:
        async with asyncio.timeout(SEND_SECONDS):  # wait_for in Python 3.11 may swallow a cancellation
            await sending
    except TimeoutError:
        raise Bye(protocol.SLOW, f"a message could not be sent for {SEND_SECONDS:g} seconds") from None


class Connection:
    """The connection of one client, served by `run`."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.socket, self.service = socket, service
        self.telemetry = Telemetry(service.telemetry)
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Bye] = self._loop.create_future()
        self._gone = asyncio.Event()
        self._read, self._second = 0, 0.0  # messages read since the time `_second`
        self._active = self._loop.time()
        self._frames: deque[tuple[Binary, float]] = deque()
        self._come = asyncio.Event()
        self._texts: deque[str] = deque(maxlen=TEXTS)
        self._answers: deque[Answer] = deque()
        self._news = asyncio.Event()  # something is to be sent
        self._open = False  # True as soon as the session has its stream

    def leave(self, bye: Bye) -> asyncio.Task[Any]:
        """End the connection, and return a task that is done when it has ended."""
        if not self._over.done():
            self._over.set_result(bye)
        return asyncio.create_task(self._gone.wait())

    async def run(self) -> None:
        """Serve the client until it leaves, fails or is sent away."""
        self.service.connections.add(self)
        try:
            await self.socket.accept()
            await self._talk()
        except Bye as bye:
            await self._close(bye)
        except (WebSocketDisconnect, OSError):
            pass
        except Exception:
            log.exception("a connection ends by an error")
            await self._close(Bye(protocol.FAILED, "the server failed; its log says why"))
        finally:
            self.service.connections.discard(self)
            self._gone.set()
            self._frames.clear()  # what else is left of a connection may wait long for the garbage collector
            self._answers.clear()

    async def _talk(self) -> None:
        service = self.service
        if len(service.connections) > service.most_sockets:
            service.refused += 1
            raise Bye(protocol.FULL, "too many clients are connected: try again later")
        await self._hello()
        self.session = Session(self.controls, self._tell)
        try:
            self.ticket = service.line.enter()
        except Full as full:
            service.refused += 1
            raise Bye(protocol.FULL, str(full)) from None
        work = (self._receive, self._decode, self._send, self._live)
        tasks: list[asyncio.Future[Any]] = [asyncio.create_task(task()) for task in work]
        try:
            await asyncio.wait([*tasks, self._over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            service.engine.close(self.session)
            service.line.leave(self.ticket)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            del self.session, tasks, task  # else an exception and its frame would hold each other, and the stream
        try:
            if self._over.done():
                raise self._over.result()
            raise next(end for end in ends if isinstance(end, Exception))  # CancelledError is no Exception
        finally:
            del ends

    async def _hello(self) -> None:
        """Read the first message, which has the controls and the format that the session begins with."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = protocol.parse((await self._message()).get("text") or "")
            if hello.type != "hello":
                raise ValueError(f"the first message must be a hello, and this is a {hello.type}")
            self.controls = self.service.config.controls.changed(**hello.controls)
            self.service.template.check(self.controls)
        except ValueError as error:
            raise Bye(protocol.BAD_HELLO, str(error)) from None
        except TimeoutError:
            raise Bye(protocol.BAD_HELLO, f"no hello came in {HELLO_SECONDS:g} seconds") from None
        self.form = hello.form

    async def _message(self) -> Any:
        """Return the next message; a client that sends more than MOST_MESSAGES a second is read more slowly."""
        now = self._loop.time()
        if now - self._second >= 1.0:
            self._read, self._second = 0, now
        self._read += 1
        if self._read > MOST_MESSAGES:
            await asyncio.sleep(self._second + 1.0 - now)
        received = await self.socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        return received

    async def _receive(self) -> None:
        while True:
            received = await self._message()
            try:
                if received.get("text") is not None:
                    self._on_text(received["text"])
                elif self._open:
                    self._frames.append((protocol.unpack_frame(received["bytes"]), time.perf_counter()))
                    if len(self._frames) > 1:
                        self._frames.popleft()
                        self.telemetry.count("lost")
                    self._come.set()
            except ValueError as error:
                self._say("error", message=str(error))

    def _on_text(self, text: str) -> None:
        received = protocol.parse(text)
        if received.type == "bye":
            raise Bye(protocol.NORMAL, "bye")
        if received.type == "hello":
            raise ValueError("hello has been said already: use set")
        controls = self.controls.changed(**received.controls)
        self.service.template.check(controls)
        self.controls, self._active = controls, self._loop.time()
        self.service.engine.set(self.session, controls)

    async def _decode(self) -> None:
        """Decode the newest frame in a worker thread, and give it to the engine, again and again."""
        while True:
            await self._come.wait()
            self._come.clear()
            while self._frames:
                frame, received = self._frames.popleft()
                try:
                    pixels = await self._loop.run_in_executor(
                        self.service.decoders, decode, frame.body, self.service.config.size
                    )
                except ValueError as error:
                    self.telemetry.count("failed")
                    self._say("error", message=str(error), sequence=frame.sequence)
                    continue
                self._active = self._loop.time()
                entering = Frame(frame.sequence, pixels, received, time.perf_counter())
                if not self.service.engine.offer(self.session, entering):
                    self.telemetry.count("lost")

    async def _live(self) -> None:
        """Wait in line, open the session, report its statistics, and end it when it has been idle for too long."""
        while self.ticket.position > 0:
            self._say("waiting", position=self.ticket.position)
            await self.ticket.moved()
        self.service.engine.open(self.session)
        limit = self.service.config.idle_timeout
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            if self._open:
                if self._loop.time() - self._active > limit:
                    raise Bye(protocol.IDLE, f"no frame and no control came for {limit:g} seconds")
                line = self.service.line
                self._say("stats", **self.telemetry.stats(), sessions=line.streaming, waiting=line.waiting)

    def _tell(self, event: Event) -> None:
        """Pass an event of the compute thread on to the event loop."""
        with suppress(RuntimeError):  # the loop is closed, as the server has stopped
            self._loop.call_soon_threadsafe(self._on, event)

    def _on(self, event: Event) -> None:
        match event:
            case Now(controls, first):
                self._open, self._active = True, self._loop.time()
                kind, more = ("welcome", self._about()) if first else ("controls", {})
                self._say(kind, controls=protocol.as_json(controls), **more)
            case Compiling():
                self._say("compiling")
            case Ended(reason):
                self.leave(Bye(protocol.FAILED, f"the stream failed: {reason}"))
            case Answer():
                self.telemetry.count("unsent", push(self._answers, event))
                self._news.set()

    def _about(self) -> dict[str, Any]:
        config = self.service.config
        limits = {
            "bytes": protocol.MOST_BYTES,
            "pixels": MOST_PIXELS,
            "text": MOST_TEXT,
            "steps": MOST_STEPS,
            "idle_seconds": config.idle_timeout,
        }
        embeds = self.service.pipe.model.embeds_guidance
        return {"model": config.model, "size": config.size, "embeds_guidance": embeds, "limits": limits}

    def _say(self, kind: str, **fields: Any) -> None:
        self._texts.append(message(kind, **fields))
        self._news.set()

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._texts or self._answers:
                if self._texts:
                    await out(self.socket.send_text(self._texts.popleft()))
                    continue
                answer, body = self._answers.popleft(), b""
                if answer.picture is not None:
                    body = await self._loop.run_in_executor(self.service.encoders, encode, answer.picture, self.form)
                encoded, kind = time.perf_counter(), SAME if answer.picture is None else PICTURE
                waited = max(
                    round(1000 * (answer.taken - answer.frame.decoded)), 0
                )  # a turn may begin before its frame comes
                data = protocol.pack(kind, answer.frame.sequence, answer.shows.sequence, body, waited)
                await out(self.socket.send_bytes(data))
                self.telemetry.sent(answer, encoded)

    async def _close(self, bye: Bye) -> None:
        """Tell the client why the connection ends; it may have gone already, or never read this."""
        reason = bye.reason.encode()[:120].decode(errors="ignore")  # a close frame holds no more
        try:
            text = message("bye", code=bye.code, reason=bye.reason)
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.socket.send_text(text)
                await self.socket.close(bye.code, reason)
        except (WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
            pass
