"""The engine: each session's pictures are those of a stream of its own, whatever the others do."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import pytest

from lcm_jax.serve import compiled_programs
from lcm_jax.serve.engine import WORTH, Busy, Engine
from lcm_jax.serve.session import Answer, Compiling, Ended, Event, Frame, Now, Session
from lcm_jax.stream import Controls, Stream
from lcm_jax.stream.step import release

SECONDS = 300.0  # that anything may take on a machine that has other things to do


class Client:
    """A session and what it has been told."""

    def __init__(self, engine: Engine, controls: Controls, depth: int = 1) -> None:
        self.engine, self.events = engine, list[Event]()
        self._told = threading.Condition()
        self.session = Session(controls, self._tell, depth=depth)
        engine.open(self.session)

    def _tell(self, event: Event) -> None:
        with self._told:
            self.events.append(event)
            self._told.notify_all()

    def wait(self, kind: type, number: int = 1) -> Any:
        """The `number`-th event of a kind."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.of(kind)) >= number, SECONDS), self.events
            return self.of(kind)[number - 1]

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def offer(self, sequence: int, pixels: np.ndarray) -> bool:
        now = time.perf_counter()
        return self.engine.offer(self.session, Frame(sequence, pixels, now, now))

    def draw(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """The answers to frames, one after another."""
        so_far = len(self.of(Answer))
        pictures = []
        for i, pixels in enumerate(frames):
            self.offer(i, pixels)
            pictures.append(self.wait(Answer, so_far + i + 1).picture)
        return pictures


@pytest.fixture
def make(light_pipe: Any) -> Callable[[Controls], Stream]:
    def make(controls: Controls) -> Stream:
        stream = Stream(light_pipe)
        stream.set(**vars(controls))
        return stream

    return make


@pytest.fixture
def begin(make: Callable[[Controls], Stream]) -> Iterator[Callable[..., Engine]]:
    """Engines that are stopped in the end, as no thread of theirs would let Python end."""
    with ExitStack() as stack:

        def begin(**options: Any) -> Engine:
            engine = Engine(make, **options)
            engine.warm(Controls())
            stack.callback(engine.stop)
            engine.start()
            return engine

        yield begin


@pytest.fixture
def engine(begin: Callable[..., Engine]) -> Engine:
    return begin()


@pytest.fixture
def moving(frames: np.ndarray) -> list[np.ndarray]:
    return [frame[0] for frame in frames]


def test_a_session_is_a_stream(engine: Engine, make: Callable[[Controls], Stream], moving: list[np.ndarray]) -> None:
    controls = Controls(prompt="a", seed=3)
    solo = make(controls)
    for ours, alone in zip(Client(engine, controls).draw(moving), map(solo, moving), strict=True):
        assert np.array_equal(ours, alone)


def test_an_answer_names_the_frame_that_its_picture_shows(engine: Engine, moving: list[np.ndarray]) -> None:
    client = Client(engine, Controls(steps=3))
    client.draw(moving[:6])
    answers = client.of(Answer)
    assert [answer.frame.sequence for answer in answers] == [0, 1, 2, 3, 4, 5]
    assert [answer.shows.sequence for answer in answers] == [0, 0, 0, 1, 2, 3]
    one = Client(engine, Controls(steps=3, batch=False))
    one.draw(moving[:3])
    assert [answer.shows.sequence for answer in one.of(Answer)] == [0, 1, 2]


def test_the_filters_answer_has_no_picture(engine: Engine, moving: list[np.ndarray]) -> None:
    client = Client(engine, Controls(steps=1, similarity=0.9))
    pictures = client.draw([moving[0]] * 4 + [moving[1]])
    assert [picture is None for picture in pictures] == [False, True, True, True, False]
    assert client.of(Answer)[-2].saved == 0.75


def test_a_frame_is_owed_until_an_answer_has_stood_for_it(engine: Engine, moving: list[np.ndarray]) -> None:
    """One without a picture stands for its frame and for all before it."""
    client = Client(engine, Controls(steps=3, similarity=0.9, max_skips=2))
    client.draw([moving[i] for i in (0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4)])
    stood: set[int] = set()
    kinds = set()
    for answer in client.of(Answer):
        assert answer.owed == (answer.shows.sequence not in stood)
        kinds.add((answer.picture is None, answer.owed))
        stood |= {answer.shows.sequence} if answer.picture is not None else set(range(answer.frame.sequence + 1))
    assert kinds == {(False, True), (False, False), (True, True)}


@pytest.mark.parametrize("together", [1, 4])
def test_sessions_are_isolated(
    begin: Callable[..., Engine], make: Callable[[Controls], Stream], moving: list[np.ndarray], together: int
) -> None:
    """One changes everything it can, all the time, and the other's pictures are bit for bit what they are alone."""
    engine = begin(together=together)
    calm, wild = Controls(prompt="a", seed=1), Controls(prompt="b", seed=2)
    solo = make(calm)
    alone = [solo(moving[i % 8]) for i in range(4 * WORTH)]
    first, second = Client(engine, calm), Client(engine, wild)
    for i in range(4 * WORTH):
        changes: dict[str, Any] = {"prompt": f"b{i}", "strength": 0.3 + 0.01 * i, "seed": i, "feedback": 0.5}
        if i > 3 * WORTH:
            changes |= {"steps": 1 + i % 3, "guidance": "self"}
        wild = wild.changed(**changes)
        engine.set(second.session, wild)
        second.offer(i, moving[i % 8])
        first.offer(i, moving[i % 8])
        assert np.array_equal(first.wait(Answer, i + 1).picture, alone[i]), i
    second.wait(Answer, WORTH)
    assert not np.array_equal(second.of(Answer)[WORTH - 1].picture, alone[WORTH - 1])


def test_sessions_share_a_call_when_they_meet_often(
    begin: Callable[..., Engine], moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcm_jax.serve import engine as module

    sizes: list[int] = []
    original = module.run
    monkeypatch.setattr(module, "run", lambda jobs: sizes.append(len(jobs)) or original(jobs))
    engine = begin(together=4)
    clients = [Client(engine, Controls(prompt=text)) for text in "abc"]
    for client in clients:
        client.wait(Now)
    deadline = time.monotonic() + SECONDS
    i = 0
    while 2 not in sizes and time.monotonic() < deadline:
        with engine._changed:  # all of them wait when the next turn begins
            for client in clients:
                client.offer(i, moving[i % 8])
        i += 1
        for client in clients:
            client.wait(Answer, i)
    assert sizes[:3] == [1, 1, 1]
    assert 2 in sizes
    assert max(sizes) == 2  # of three, two together and one alone


def test_a_new_program_stops_nobody(
    engine: Engine, make: Callable[[Controls], Stream], moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is compiled others stream, and so does who asked, with the controls of before."""
    from lcm_jax.serve import engine as module

    allowed = threading.Event()
    original = module.rehearse
    monkeypatch.setattr(module, "rehearse", lambda stream: allowed.wait(SECONDS) and original(stream))
    asking, other = Client(engine, Controls()), Client(engine, Controls())
    assert not isinstance(asking.draw(moving[:2])[-1], type(None))
    engine.set(asking.session, asking.session.wanted.changed(steps=5))
    asking.wait(Compiling)
    asking.draw(moving)
    other.draw(moving)
    assert len(asking.of(Now)) == 1
    allowed.set()
    assert asking.wait(Now, 2).controls.steps == 5
    asking.draw(moving[:1])
    assert asking.session.stream is not None
    assert asking.session.stream.program.steps == 5


def test_a_program_that_is_not_wanted_any_more_is_not_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_jax.serve import engine as module

    begun, allowed, made = threading.Event(), threading.Event(), list[int]()

    def rehearse(stream: Stream) -> None:
        made.append(stream.controls.steps)
        begun.set()
        assert allowed.wait(SECONDS)

    monkeypatch.setattr(module, "rehearse", rehearse)
    client = Client(engine, Controls())
    client.wait(Now)
    for number, steps in enumerate((3, 4, 5, 6)):
        engine.set(client.session, client.session.wanted.changed(steps=steps))
        client.wait(Compiling, number + 1)
        assert begun.wait(SECONDS)
    allowed.set()
    assert client.wait(Now, 2).controls.steps == 6
    assert made == [3, 6]


def test_the_last_programs_stay_compiled_and_those_in_use(
    engine: Engine, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm_jax.serve.compiled_programs.MOST_PROGRAMS", 3)
    freed: list[int] = []
    original = compiled_programs.release
    monkeypatch.setattr(compiled_programs, "release", lambda program: freed.append(program.steps) or original(program))
    stays, changes = Client(engine, Controls(steps=5, batch=False)), Client(engine, Controls(batch=False))
    stays.draw(moving[:1])
    changes.draw(moving[:1])

    def change(**controls: Any) -> None:
        changes_before = len(changes.of(Now))
        engine.set(changes.session, changes.session.wanted.changed(**controls))
        changes.wait(Now, changes_before + 1)
        changes.draw(moving[:1])
        stays.draw(moving[:1])  # a turn has gone by

    for steps in (3, 4, 6):
        change(steps=steps)
    assert freed == [3, 4]  # 5 is in use, and sessions begin with 2
    compiled_before = len(changes.of(Compiling))
    change(steps=2)
    change(steps=6)
    assert len(changes.of(Compiling)) == compiled_before
    change(steps=6, blend="slerp")  # another kind of the same program
    change(steps=3)
    assert len(changes.of(Compiling)) == compiled_before + 2
    assert freed == [3, 4, 6]
    assert stays.session.stream is not None
    assert {program.steps for program in engine._programs._keys} == {2, 3, 5}


def test_what_is_released_is_freed(make: Callable[[Controls], Stream], moving: list[np.ndarray]) -> None:
    client = jax.devices()[0].client
    stream = make(Controls(guidance="onetime"))
    for frame in moving[:2]:
        stream(frame)
    before = len(client.live_executables())
    release(stream.program)
    assert before - len(client.live_executables()) >= 3  # sequential, step, probe: of this size, and of other tests'


def test_the_newest_frames_are_kept(engine: Engine, moving: list[np.ndarray]) -> None:
    session = Session(Controls(), lambda event: None, depth=2)  # of no engine: nobody takes frames out
    offers = [engine.offer(session, Frame(i, moving[0], 0.0, 0.0)) for i in range(5)]
    assert offers == [True, True, False, False, False]
    assert [frame.sequence for frame in session.inbox] == [3, 4]


@pytest.mark.parametrize("where", ["prepare", "finish", "set"])
def test_a_failure_ends_its_session_only(engine: Engine, moving: list[np.ndarray], where: str) -> None:
    good, bad = Client(engine, Controls()), Client(engine, Controls())
    before = [good.draw(moving[:2]), bad.draw(moving[:2])]
    assert np.array_equal(*[pictures[-1] for pictures in before])

    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("broken")

    setattr(bad.session.stream, where, fail)
    if where == "set":
        engine.set(bad.session, bad.session.wanted.changed(strength=0.7))
    bad.offer(9, moving[2])
    good.offer(9, moving[2])
    assert "broken" in bad.wait(Ended).reason
    assert good.wait(Answer, 3).picture is not None
    good.draw(moving)
    assert not good.of(Ended)
    assert len(bad.of(Answer)) == 2


def test_a_call_of_a_group_that_fails_ends_its_members_only(
    engine: Engine, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcm_jax.serve import engine as module

    original = module.run

    def run(jobs: Any) -> Any:
        if any(float(job.settings.feedback) == 0.5 for job in jobs):
            raise MemoryError("no room")
        return original(jobs)

    monkeypatch.setattr(module, "run", run)
    good, bad = Client(engine, Controls()), Client(engine, Controls(feedback=0.5))
    bad.offer(0, moving[0])
    assert "no room" in bad.wait(Ended).reason
    good.draw(moving)


def test_calls_run_between_turns_and_only_so_many_wait(engine: Engine, moving: list[np.ndarray]) -> None:
    names: list[str] = []

    def work() -> int:
        names.append(threading.current_thread().name)
        return 7

    assert engine.call(work, compiled=False).result(SECONDS) == 7
    assert engine.call(work, compiled=True).result(SECONDS) == 7
    assert names == ["lcm-jax compiler", "lcm-jax engine"]  # the first compiles, and would hold up the streams

    with pytest.raises(ValueError, match="wrong"):
        engine.call(lambda: (_ for _ in ()).throw(ValueError("wrong")), compiled=True).result(SECONDS)

    allowed = threading.Event()
    held = [engine.call(lambda: allowed.wait(SECONDS), compiled=True) for _ in range(engine.most_calls)]
    with pytest.raises(Busy):
        engine.call(work, compiled=True)
    allowed.set()
    assert all(future.result(SECONDS) for future in held)
    assert engine.call(work, compiled=True).result(SECONDS) == 7


def test_a_session_that_is_closed_is_forgotten(engine: Engine, moving: list[np.ndarray]) -> None:
    import weakref

    client = Client(engine, Controls())
    client.draw(moving[:2])
    stream = weakref.ref(client.session.stream)
    gc.disable()
    try:
        engine.close(client.session)
        other = Client(engine, Controls())
        other.draw(moving[:2])
        client.session.tell = print  # what the test itself ties together
        del client
        assert stream() is None
    finally:
        gc.enable()


def test_stopping_waits_for_the_turn_and_cancels_what_waits(engine: Engine) -> None:
    engine.call(int, compiled=True).result(SECONDS)
    going = threading.Event()
    running = engine.call(lambda: going.set() or time.sleep(0.3) or "done", compiled=True)
    waiting = engine.call(int, compiled=True)
    assert going.wait(SECONDS)
    engine.stop()
    assert running.result(0) == "done"
    assert waiting.cancelled()
    assert not engine.alive
    with pytest.raises(Busy):
        engine.call(int, compiled=True)
