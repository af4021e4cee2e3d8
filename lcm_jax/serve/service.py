"""The parts that all connections of a server share: pipeline, engine, queue, statistics."""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.serve.engine import Engine
from lcm_jax.serve.protocol import GOING_AWAY, Bye
from lcm_jax.serve.telemetry import Telemetry
from lcm_jax.serve.waiting_line import WaitingQueue
from lcm_jax.stream.controls import Controls
from lcm_jax.stream.stream import Stream

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[\w.-]+)(:\d+)?", re.ASCII)  # as browsers send it
SPARE_SOCKETS = 256  # connections beyond those that stream and wait, which are told that the server is full
FAREWELL = 2.0  # seconds that clients have to leave when the server stops


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a server, checked when constructed; a wrong value raises ValueError.

    model: its name, as the page shows it. size: (height, width) of frames and pictures in pixels. controls: those of a
    new session. sampler, together, most_calls: see `Stream` and `Engine`. guidance: the default scale of
    pictures by HTTP. max_sessions, max_waiting: clients that stream, and that wait in line. idle_timeout: seconds
    without a frame or a control after which a session ends. token: the secret that a client has to send, None for none.
    origins: sites whose pages may connect besides the server's own, such as "https://example.org".
    """

    model: str
    size: tuple[int, int]
    controls: Controls
    sampler: str = "lcm"
    guidance: float = 1.0
    together: int = 1
    host: str = "127.0.0.1"
    port: int = 7860
    max_sessions: int = 4
    max_waiting: int = 16
    most_calls: int = 4
    idle_timeout: float = 60.0
    token: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_sessions", 1), ("max_waiting", 0), ("most_calls", 0), ("together", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not self.idle_timeout > 0:
            raise ValueError(f"idle_timeout is {self.idle_timeout}: it must be above 0")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}: it must be from 0 to 65535")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"origin {origin!r:.80}: give scheme and host, such as https://example.org, or *")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ValueError("the token must be of printable ASCII characters, and not empty")


def beginning(pipe: Pipeline, sampler: str, scale: float) -> Controls:
    """Return the controls that sessions of a model and device begin with.

    Networks that were distilled, or have the guidance scale as an input, are not guided further. Of many seeds and
    strengths these redraw the page's first drawing best with the bundled model, by our eyes. A CPU needs about as
    long for a batch of n as for n evaluations: there a stream batch would delay pictures by n - 1 frames for little
    speed.
    """
    unguided = pipe.model.embeds_guidance or sampler == "lcm"
    batch = jax.default_backend() != "cpu"
    return Controls(
        guidance="none" if unguided else "full",
        scale=scale,
        steps=2,
        strength=0.5,
        seed=4,
        similarity=0.98,
        batch=batch,
    )


@runtime_checkable
class Client(Protocol):
    """The interface of a connection, as the service needs it."""

    def leave(self, bye: Bye) -> asyncio.Task[Any]:
        """End the connection, and return a task that is done when it has ended."""


class Service:
    """A served pipeline, with its engine, queue, statistics and connections."""

    def __init__(self, pipe: Pipeline, config: Config) -> None:
        self.pipe, self.config = pipe, config
        self.template = self.make(config.controls)  # never run: it checks controls
        self.engine = Engine(self.make, together=config.together, most_calls=config.most_calls)
        self.line = WaitingQueue(config.max_sessions, config.max_waiting)
        self.telemetry = Telemetry()
        threads = max(2, min(os.cpu_count() or 2, 8))
        self.decoders = ThreadPoolExecutor(threads, "lcm-jax decoder")  # a frame that takes long delays no picture
        self.encoders = ThreadPoolExecutor(threads, "lcm-jax encoder")
        self.requests = ThreadPoolExecutor(1, "lcm-jax HTTP")  # one at a time, which may need much memory
        self.connections: set[Client] = set()
        self.refused = 0

    def make(self, controls: Controls) -> Stream:
        """Return a new stream for a session."""
        return Stream(self.pipe, size=self.config.size, sampler=self.config.sampler, **vars(controls))

    @property
    def most_sockets(self) -> int:
        """The number of connections that are read at once."""
        return self.config.max_sessions + self.config.max_waiting + SPARE_SOCKETS

    async def goodbye(self) -> None:
        """Tell all clients that the server stops, and wait a moment for them to leave."""
        bye = Bye(GOING_AWAY, "the server is stopping")
        gone = [connection.leave(bye) for connection in self.connections]
        if gone:
            await asyncio.wait(gone, timeout=FAREWELL)

    def stop(self) -> None:
        """Stop the threads after their present work."""
        self.engine.stop()
        for pool in (self.decoders, self.encoders, self.requests):
            pool.shutdown(cancel_futures=True)

    def metrics(self) -> str:
        """Return the statistics of all connections in Prometheus' text format."""
        return self.telemetry.metrics(
            {
                "sessions": self.line.streaming,
                "waiting": self.line.waiting,
                "connections": len(self.connections),
                "refused_total": self.refused,
            }
        )
