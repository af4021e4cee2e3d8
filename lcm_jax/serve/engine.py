"""The thread that computes: sessions give it frames and controls, and it tells them the results.

In each turn it takes a frame of every session that has one, advances their streams together and returns the pictures. A
second thread compiles new programs, so that one session's new number of steps does not stop the others; that session
goes on with its old controls until then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from lcm_jax.serve.compiled_programs import Programs, call_of, kind_of, rehearse, together
from lcm_jax.serve.session import Compiling, Ended, Frame, Session
from lcm_jax.stream.controls import Controls
from lcm_jax.stream.step import StreamProgram
from lcm_jax.stream.stream import Job, Stream, run

log = logging.getLogger(__name__)
WORTH = 8  # turns in which a group of streams could share a call before that call is compiled

Member = tuple[Session, Stream, Job]


class Busy(Exception):
    """An error: as many calls wait as are allowed."""


class Engine:
    """The thread that runs the streams of all sessions, and single calls between their turns.

    make: makes a stream with given controls. together: the most streams in one call, which takes 1, 2, 4, 8, ... of
    them. most_calls: single calls, for pictures outside of streams, that may wait at once.
    """

    def __init__(self, make: Callable[[Controls], Stream], *, together: int = 1, most_calls: int = 4) -> None:
        self.make, self.together, self.most_calls = make, together, most_calls
        self._changed = threading.Condition()
        self._sessions: list[Session] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._unanswered: set[Future[Any]] = set()
        self._programs = Programs(self._wake)
        self._met: Counter[tuple[StreamProgram, str, tuple[int, ...], int]] = Counter()
        self._start: Hashable = None  # the kind that sessions begin with, which stays compiled
        self.stopping = False
        self._thread = threading.Thread(target=self._run, name="lcm-jax engine")

    def start(self) -> None:
        """Start the threads."""
        self._programs.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present turn, wait for its end, and cancel the calls that still wait."""
        with self._changed:
            self.stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        for future in list(self._unanswered):
            future.cancel()
        self._programs.stop()

    @property
    def compiling(self) -> bool:
        """True if a compilation goes on after `stop`."""
        return self._programs.alive

    @property
    def alive(self) -> bool:
        """True while the thread that computes runs."""
        return self._thread.is_alive()

    def warm(self, controls: Controls) -> None:
        """Compile, in the caller's thread, the programs of a stream with these controls."""
        self._start = kind_of(controls)
        self._compile(controls)

    def open(self, session: Session) -> None:
        """Add a session; it gets the event `Now` when its stream is ready."""
        with self._changed:
            self._sessions.append(session)
            self._changed.notify()

    def close(self, session: Session) -> None:
        """Remove a session."""
        with self._changed:
            if session in self._sessions:
                self._sessions.remove(session)

    def offer(self, session: Session, frame: Frame) -> bool:
        """Give a session's next frame, and return False if an older one that waited was dropped for it."""
        with self._changed:
            full = len(session.inbox) == session.inbox.maxlen
            session.inbox.append(frame)
            self._changed.notify()
        return not full

    def set(self, session: Session, controls: Controls) -> None:
        """Change a session's controls, from the next turn on or as soon as their program is compiled."""
        with self._changed:
            session.wanted = controls
            self._changed.notify()

    def call(self, function: Callable[[], Any], *, compiled: bool) -> Future[Any]:
        """Run a function between two turns, or in the thread that compiles if it has to be compiled; return its future.

        Raise `Busy` if as many calls wait as are allowed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self.stopping or len(self._unanswered) >= self.most_calls:
                raise Busy(f"{len(self._unanswered)} pictures are being drawn: try again later")
            self._unanswered.add(future)
            future.add_done_callback(self._answered)
            if compiled:
                self._calls.append((function, future))
                self._changed.notify()
            else:
                self._programs.ask(lambda: _resolve(future, function))
        return future

    def _answered(self, future: Future[Any]) -> None:
        with self._changed:
            self._unanswered.discard(future)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while not self.stopping:
            self._turn(*self._gather())
            self._evict()

    def _gather(self) -> tuple[Sequence[Session], tuple[Callable[[], Any], Future[Any]] | None]:
        """Wait for something to do, and return the sessions that are due and a call."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or self._calls or any(map(self._is_due, self._sessions)))
            due = [session for session in self._sessions if self._is_due(session)]
            return due, self._calls.popleft() if self._calls else None

    def _evict(self) -> None:
        """Free the programs that are too many, and count anew how often calls of them would be shared."""
        freed = self._programs.evict(self._held)
        if freed:
            self._met = Counter({key: count for key, count in self._met.items() if key[0] not in freed})

    def _held(self) -> set[StreamProgram]:
        """Return the programs of all sessions, also those that they wait for, and of new ones."""
        with self._changed:
            sessions = list(self._sessions)
        wanted = [kind_of(session.wanted) for session in sessions]
        running = {session.stream.program for session in sessions if session.stream is not None}
        return running | self._programs.programs_of([self._start, *wanted])

    def _is_due(self, session: Session) -> bool:
        return self._settles(session) or (bool(session.inbox) and session.stream is not None)

    def _settles(self, session: Session) -> bool:
        """Return whether a session's new controls can be applied, or their program has still to be asked for."""
        if not session.unsettled:
            return False
        return session.asked is not session.wanted or self._programs.has(kind_of(session.wanted))

    def _turn(self, due: Sequence[Session], call: tuple[Callable[[], Any], Future[Any]] | None) -> None:
        """Advance each session by one frame, and run one call."""
        began, members = time.perf_counter(), []
        for session in due:
            with self._guard(session):
                members += self._next(session)
        for group in self._groups(members):
            with self._guard(*(session for session, _, _ in group)):
                results = run([job for _, _, job in group])
                for (session, stream, job), result in zip(group, results, strict=True):
                    with self._guard(session):
                        session.finish(stream, job, result, began)
        if call is not None:
            _resolve(call[1], call[0])

    def _next(self, session: Session) -> list[Member]:
        """Return the job of a session's next frame, if it has one."""
        if session.unsettled:
            self._settle(session)
        stream = session.stream
        if not session.inbox or stream is None:
            return []
        job = session.prepare(stream)
        return [] if job is None else [(session, stream, job)]

    def _settle(self, session: Session) -> None:
        """Apply the controls that a session wants if their program is compiled, else ask for it."""
        wanted = session.wanted
        kind = kind_of(wanted)
        if self._programs.has(kind):
            self._programs.use(session.settle(wanted, self.make).program)
        elif session.asked is not wanted:
            if session.asked is None or kind_of(session.asked) != kind:
                session.tell(Compiling())
                self._programs.ask(lambda: self._compile(wanted), lambda: self._waits(session, kind))
            session.asked = wanted

    def _compile(self, controls: Controls) -> None:
        """Compile the programs of a stream with these controls, in the caller's thread."""
        kind = kind_of(controls)
        try:
            stream = self.make(controls)
        except Exception:
            self._programs.add(kind)  # whoever waits for it runs into the same error, which is reported there
            raise
        self._programs.compile(kind, stream.program, lambda: rehearse(stream))

    def _waits(self, session: Session, kind: Hashable) -> bool:
        """Return whether a session still waits for a program."""
        return session in self._sessions and kind_of(session.wanted) == kind and not self._programs.has(kind)

    def _groups(self, members: Sequence[Member]) -> Iterator[Sequence[Member]]:
        """Yield groups that share a call, each as large as a program is compiled for."""
        by_group: dict[Hashable, list[Member]] = {}
        for member in members:
            by_group.setdefault(member[2].group, []).append(member)
        for group in by_group.values():
            while group:
                n = self._together(group)
                yield group[:n]
                group = group[n:]

    def _together(self, members: Sequence[Member]) -> int:
        """Return how many members share a call, a power of two that is compiled; ask for more if often of use."""
        job = members[0][2]
        best = n = 1 << (min(len(members), self.together).bit_length() - 1)
        while n > 1 and not self._programs.has(call_of(job, n)):
            n //= 2
        key = call_of(job, best)
        self._met[key] += n < best
        if self._met[key] == WORTH and n < best:
            streams = [stream for _, stream, _ in members[:best]]
            similar = [other for stream in streams for other in stream.rehearsals() if other.method == job.method]
            self._programs.ask(lambda: self._programs.compile(key, job.program, lambda: together(similar)))
        return n

    @contextmanager
    def _guard(self, *sessions: Session) -> Iterator[None]:
        """Return a context in which an exception ends these sessions, and nothing else."""
        try:
            yield
        except Exception as error:
            log.error("a session ends by an error", exc_info=error)
            for session in sessions:
                self.close(session)
                session.tell(Ended(f"{type(error).__name__}: {error!s:.200}"))


def _resolve(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
