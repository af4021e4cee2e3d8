"""The programs that are compiled, and a thread that compiles others one after another while streams go on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.step import compiled_probe
from lcm_jax.stream.stream import Job, Stream, run

log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds that `stop` waits for the present task


def kind_of(controls: Controls) -> Hashable:
    """Return the key of the programs that a stream with these controls runs.

    >>> two_steps, three_steps = kind_of(Controls(steps=2)), kind_of(Controls(steps=3))
    >>> kind_of(Controls(prompt="a cat", steps=2)) == two_steps, two_steps == three_steps
    (True, False)
    """
    return "stream", controls.steps, controls.guidance, controls.batch, controls.remember, controls.blend


def call_of(job: Job, n: int) -> Hashable:
    """Return the key of the program that runs n jobs of this group in one call."""
    return job.program, job.method, job.frame.shape, n


def rehearse(stream: Stream) -> None:
    """Run every program that a stream may run with its present controls, so that they are compiled."""
    jobs = stream.rehearsals()
    if stream.controls.guidance == "onetime":
        first = jobs[0]
        jax.block_until_ready(compiled_probe(first.program)(first.weights, first.settings, first.state, first.frame))
    for job in jobs:
        together([job])


def together(jobs: Sequence[Job]) -> None:
    """Run jobs of one group in one call, and wait for it."""
    jax.block_until_ready(run(jobs))


class Programs:
    """The keys of the compiled programs, and the thread that compiles more.

    changed: called in that thread whenever a program has been compiled.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._compiled: set[Hashable] = set()
        self._tasks: deque[tuple[Hashable, Callable[[], Any], Callable[[], bool]]] = deque()
        self._news = threading.Condition()
        self._stopping = False
        # A daemon: a compilation cannot be interrupted, and must not hold up the end.
        self._thread = threading.Thread(target=self._run, name="lcm-jax compiler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Compile nothing more, and wait a moment for the present compilation."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def has(self, key: Hashable) -> bool:
        """Return whether the program of a key is compiled."""
        return key in self._compiled

    def add(self, key: Hashable) -> None:
        """Record that the program of a key has been compiled."""
        self._compiled.add(key)

    def ask(self, key: Hashable, task: Callable[[], Any], wanted: Callable[[], bool] = lambda: True) -> None:
        """Let the thread run a task that compiles the program of `key`.

        wanted: returns whether the program is still needed; asked when the task's turn comes.
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
                except Exception:  # whoever needs the program runs into the same error, which is reported there
                    log.exception("a program could not be compiled ahead: %s", key)
                self.add(key)
                self._changed()
