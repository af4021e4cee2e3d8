"""One client's stream as the engine sees it: frames and controls go in, events come out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.stream import Job, Stream


class Frame(NamedTuple):
    """received: seconds of time.perf_counter, when its message had arrived; decoded: when the engine got it."""

    sequence: int
    pixels: UInt8[np.ndarray, "h w 3"]
    received: float
    decoded: float


class Answer(NamedTuple):
    """To `frame`: the picture of `shows`, which entered the stream batch before it; None if the last one still holds.

    owed: no answer before stood for `shows` already, as those of the filter do for all that is in flight.
    taken, done: seconds, when the engine began and ended. saved: the similarity filter's share so far.
    """

    frame: Frame
    shows: Frame
    owed: bool
    picture: UInt8[np.ndarray, "h w 3"] | None
    taken: float
    done: float
    saved: float


class Now(NamedTuple):
    """The controls that hold from here on; first: the session has been opened."""

    controls: Controls
    first: bool


class Compiling(NamedTuple):
    """The controls that are wanted need a program that is being compiled; until then the old ones hold."""


class Ended(NamedTuple):
    """The session failed and is over."""

    reason: str


Event = Answer | Now | Compiling | Ended


class Session:
    """wanted and inbox are written by others; everything else belongs to the compute thread.

    tell: called in the compute thread with each event, and must not block. depth: frames that wait at most; one more
    pushes out the oldest.
    """

    def __init__(self, controls: Controls, tell: Callable[[Event], None], *, depth: int = 1) -> None:
        self.wanted, self.tell = controls, tell
        self.inbox: deque[Frame] = deque(maxlen=depth)
        self.stream: Stream | None = None
        self.asked: Controls | None = None  # controls that a program was asked for
        self._settled: Controls | None = None
        self._entered: Frame
        self._flight: deque[tuple[Frame, bool]] = deque()  # in the stream batch, the oldest first, and whether owed

    @property
    def unsettled(self) -> bool:
        """Whether other controls have been asked for since `settle`."""
        return self.wanted is not self._settled

    def settle(self, wanted: Controls, make: Callable[[Controls], Stream]) -> None:
        """Bring the stream, which `make` makes, up to the controls."""
        self._settled, self.asked = wanted, None
        first = self.stream is None
        if self.stream is None:
            self.stream = make(wanted)
        else:
            self.stream.set(**{field.name: getattr(wanted, field.name) for field in fields(wanted)})
        self.tell(Now(self.stream.controls, first))

    def prepare(self, stream: Stream) -> Job | None:
        """Take a frame in. None if the filter leaves it out."""
        self._entered, taken = self.inbox.popleft(), time.perf_counter()
        job = stream.prepare(self._entered.pixels)
        if job is None:  # what is in flight is as this is, and now answered
            self._flight = deque((frame, False) for frame, _ in self._flight)
            self._answer(stream, self._entered, True, None, taken)
        return job

    def finish(self, stream: Stream, job: Job, result: Any, taken: float) -> None:
        """Hand out what `run` gave: the picture of the frame that entered `in_flight` calls ago."""
        picture = stream.finish(*result)
        if job.method == "sequential":
            shows, owed = self._entered, True
            self._flight = deque([(shows, False)] * stream.in_flight)
        else:
            self._flight.append((self._entered, True))
            shows, owed = self._flight.popleft()
        self._answer(stream, shows, owed, picture, taken)

    def _answer(self, stream: Stream, shows: Frame, owed: bool, picture: Any, taken: float) -> None:
        saved = 0.0 if stream.filter is None else stream.filter.saved
        self.tell(Answer(self._entered, shows, owed, picture, taken, time.perf_counter(), saved))
