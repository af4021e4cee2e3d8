"""The programs that are compiled and kept, and a thread that compiles others one after another while streams go on."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.step import StreamProgram, release
from lcm_jax.stream.stream import Job, Stream, run

log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds that `stop` waits for the present task
MOST_PROGRAMS = 4  # `StreamProgram`s that stay compiled besides those in use: each may take 150 MB and more


def kind_of(controls: Controls) -> Hashable:
    """Return the key of the programs that a stream with these controls runs.

    >>> two_steps, three_steps = kind_of(Controls(steps=2)), kind_of(Controls(steps=3))
    >>> kind_of(Controls(prompt="a cat", steps=2)) == two_steps, two_steps == three_steps
    (True, False)
    """
    return "stream", controls.steps, controls.guidance, controls.batch, controls.remember, controls.blend


def call_of(job: Job, n: int) -> tuple[StreamProgram, str, tuple[int, ...], int]:
    """Return the key of the program that runs n jobs of this group in one call."""
    return job.program, job.method, job.frame.shape, n


def rehearse(stream: Stream) -> None:
    """Run every program that a stream may run with its present controls, so that they are compiled."""
    stream.rehearse()


def together(jobs: Sequence[Job]) -> None:
    """Run jobs of one group in one call, and wait for it."""
    jax.block_until_ready(run(jobs))


class Programs:
    """The keys of what is compiled, by the program it belongs to, and the thread that compiles more.

    changed: called in that thread after each of its tasks.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._keys: OrderedDict[StreamProgram, set[Hashable]] = OrderedDict()  # the program used last at the end
        self._compiled: set[Hashable] = set()  # all of these keys
        self._compiling: StreamProgram | None = None
        self._tasks: deque[tuple[Callable[[], Any], Callable[[], bool]]] = deque()
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
        """Return whether what a key stands for is compiled."""
        return key in self._compiled

    def add(self, key: Hashable) -> None:
        """Record that nothing is to be compiled for a key."""
        self._compiled.add(key)

    def programs_of(self, keys: Collection[Hashable]) -> set[StreamProgram]:
        """Return the programs that some keys belong to, as far as these are compiled."""
        with self._news:
            return {program for program, compiled in self._keys.items() if not compiled.isdisjoint(keys)}

    def compile(self, key: Hashable, program: StreamProgram, task: Callable[[], Any]) -> None:
        """Run a task that compiles what `key` stands for, in the caller's thread."""
        with self._news:
            self._compiling = program
            self._keys.setdefault(program, set())
            self._keys.move_to_end(program)
        try:
            task()
        finally:  # after an error too, as in `Engine`
            with self._news:
                self._compiling = None
                self._keys[program].add(key)
                self._compiled.add(key)

    def use(self, program: StreamProgram) -> None:
        """Record that a program is used now."""
        with self._news:
            if program in self._keys:
                self._keys.move_to_end(program)

    def evict(self, held: Callable[[], Collection[StreamProgram]]) -> set[StreamProgram]:
        """Free all programs but the last MOST_PROGRAMS and those that `held` returns; return those that were freed.

        To be called in the thread that runs the programs, between two runs.
        """
        if len(self._keys) <= MOST_PROGRAMS:
            return set()
        keep, freed = held(), set[StreamProgram]()
        with self._news:
            for program in list(self._keys):
                if len(self._keys) > MOST_PROGRAMS and program not in keep and program != self._compiling:
                    self._compiled -= self._keys.pop(program)
                    release(program)
                    freed.add(program)
        return freed

    def ask(self, task: Callable[[], Any], wanted: Callable[[], bool] = lambda: True) -> None:
        """Let the thread run a task. wanted: returns whether it is still needed; asked when its turn comes."""
        with self._news:
            self._tasks.append((task, wanted))
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._stopping or self._tasks)
                if self._stopping:
                    return
                task, wanted = self._tasks.popleft()
            if wanted():
                try:
                    task()
                except Exception:
                    log.exception("a program could not be compiled ahead")
                self._changed()
            del task, wanted  # which may hold a session's stream
