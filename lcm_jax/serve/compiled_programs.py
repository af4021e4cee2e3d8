"""What is compiled already. A thread of its own compiles the rest, one thing after another, while streams go on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.step import probing
from lcm_jax.stream.stream import Job, Stream, run

log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds that `stop` gives the present task


def kind_of(controls: Controls) -> Hashable:
    """Streams with controls of one kind run the same programs."""
    own = controls
    return "stream", own.steps, own.guidance, own.batch, own.remember, own.blend


def call_of(job: Job, n: int) -> Hashable:
    """The call of n such jobs."""
    return job.program, job.method, job.frame.shape, n


def rehearse(stream: Stream) -> None:
    """Run whatever a stream may run with its present controls."""
    jobs = stream.rehearsals()
    if stream.controls.guidance == "onetime":
        own = jobs[0]
        jax.block_until_ready(probing(own.program)(own.weights, own.settings, own.state, own.frame))
    for job in jobs:
        together([job])


def together(jobs: Sequence[Job]) -> None:
    """Run jobs as one call."""
    jax.block_until_ready(run(jobs))


class Programs:
    """changed: called when something new is there."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._there: set[Hashable] = set()
        self._tasks: deque[tuple[Hashable, Callable[[], Any], Callable[[], bool]]] = deque()
        self._news = threading.Condition()
        self._stopping = False
        # A daemon: a compilation cannot be interrupted, and must not hold up the end.
        self._thread = threading.Thread(target=self._run, name="lcm-jax compiler", daemon=True)

    def start(self) -> None:
        """Begin to compile what is asked for."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Compile nothing more, and give the present compilation a moment to end."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def has(self, key: Hashable) -> bool:
        """Whether it is compiled."""
        return key in self._there

    def add(self, key: Hashable) -> None:
        """It has been compiled."""
        self._there.add(key)

    def ask(self, key: Hashable, task: Callable[[], Any], wanted: Callable[[], bool] = lambda: True) -> None:
        """Have a task run in the thread, after which `key` is there.

        wanted: whether somebody still waits for it, looked at when its turn comes.
        """
        with self._news:
            self._tasks.append((key, task, wanted))
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._stopping or self._tasks)
                if self._stopping:
                    return
                key, task, wanted = self._tasks.popleft()
            if wanted():
                try:
                    task()
                except Exception:  # whoever needs it meets the same error, and is told
                    log.exception("what was to be compiled ahead could not be")
                self.add(key)
                self._changed()
