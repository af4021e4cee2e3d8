"""The stream of one client as the engine sees it: frames and controls go in, events come out."""

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
    """A frame of a client.

    sequence: the client's number of it. received, decoded: the times, in seconds of time.perf_counter, at which its
    message had arrived and the engine got it.
    """

    sequence: int
    pixels: UInt8[np.ndarray, "h w 3"]
    received: float
    decoded: float


class Answer(NamedTuple):
    """The answer to a frame.

    frame: the frame that is answered. shows: the frame that the picture shows, which entered the stream batch n - 1
    calls before. owed: True for the first answer that stands for `shows`; one by the similarity filter stands for all
    frames in flight. picture: None if the last one stays. taken, done: the times, in seconds of
    time.perf_counter, at which the engine began and ended. saved: share of frames that the filter has skipped so far.
    """

    frame: Frame
    shows: Frame
    owed: bool
    picture: UInt8[np.ndarray, "h w 3"] | None
    taken: float
    done: float
    saved: float


class Now(NamedTuple):
    """The event that new controls are in use; first: the session has just been opened."""

    controls: Controls
    first: bool


class Compiling(NamedTuple):
    """The event that a program for the wanted controls is being compiled; the old ones stay in use until then."""


class Ended(NamedTuple):
    """The event that the session has failed and is over."""

    reason: str


Event = Answer | Now | Compiling | Ended


class Session:
    """The stream of one client. Other threads write `wanted` and `inbox`; the rest belongs to the compute thread.

    tell: called in the compute thread with each event; it must not block. depth: the most frames that wait; one more
    drops the oldest.
    """

    def __init__(self, controls: Controls, tell: Callable[[Event], None], *, depth: int = 1) -> None:
        self.wanted, self.tell = controls, tell
        self.inbox: deque[Frame] = deque(maxlen=depth)
        self.stream: Stream | None = None
        self.asked: Controls | None = None  # controls that a program was asked for
        self._settled: Controls | None = None
        self._entered: Frame
        self._flight: deque[tuple[Frame, bool]] = deque()  # in the stream batch, oldest first: (frame, owed)

    @property
    def unsettled(self) -> bool:
        """True if other controls have been asked for since `settle`."""
        return self.wanted is not self._settled

    def settle(self, wanted: Controls, make: Callable[[Controls], Stream]) -> Stream:
        """Apply the controls to the stream, which `make` makes at the first call, and return it."""
        self._settled, self.asked = wanted, None
        first = self.stream is None
        if self.stream is None:
            self.stream = make(wanted)
        else:
            self.stream.set(**{field.name: getattr(wanted, field.name) for field in fields(wanted)})
        self.tell(Now(self.stream.controls, first))
        return self.stream

    def prepare(self, stream: Stream) -> Job | None:
        """Return the job of the oldest waiting frame, None if the filter skips it, which answers it at once."""
        self._entered, taken = self.inbox.popleft(), time.perf_counter()
        job = stream.prepare(self._entered.pixels)
        if job is None:  # this answer stands for the frames in flight too, which look the same
            self._flight = deque((frame, False) for frame, _ in self._flight)
            self._answer(stream, self._entered, True, None, taken)
        return job

    def finish(self, stream: Stream, job: Job, result: Any, taken: float) -> None:
        """Answer with the result of a job by `run`: the picture of the frame from `in_flight` calls ago."""
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
