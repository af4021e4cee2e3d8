"""Progress: a bar on a terminal; in a log whole lines, few of them, and none for work that is soon done."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from lcm_jax.runtime import progress as module
from lcm_jax.runtime.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of a clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_gets_whole_lines_now_and_then(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress(200, "encoding", "picture") as bar:
        for _ in range(200):
            clock[0] += 1
            bar.update()
            bar.set_postfix_str("loss 1")  # shows the bar again, but no line more often
            tqdm.write("other text", file=io.StringIO())
    written = capsys.readouterr().err
    assert "\r" not in written
    assert "\x1b" not in written
    lines = written.splitlines()
    assert len(lines) == 200 // module.LINE_SECONDS + 1
    assert all(re.fullmatch(r"encoding: \d+/200 picture \[.*, loss 1\]", line) for line in lines), lines
    assert lines[-1].startswith("encoding: 200/200")


def test_short_work_writes_nothing_into_a_log(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    for _ in progress(range(20), "reading", "picture"):
        clock[0] += 1
    assert capsys.readouterr().err == ""


def test_an_iterator_without_length_counts(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    def numbers() -> Iterator[int]:
        for i in range(50):
            clock[0] += 1
            yield i

    assert list(progress(numbers(), "reading", "picture", leave=True)) == list(range(50))
    assert [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "reading: 30/? picture",
        "reading: 50/? picture",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(3), "reading", "picture")) == [0, 1, 2]
    assert stream.getvalue().startswith("\rreading:")
    assert stream.getvalue().endswith("\r")
    with progress(3, "encoding", disable=True) as bar:
        bar.update(3)
    assert "encoding" not in stream.getvalue()


def test_a_phase_is_named_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lcm_jax"):
        with module.phase("loading"):
            pass
        monkeypatch.setattr(module, "PHASE_SECONDS", 0.0)
        with module.phase("compiling"):
            end = time.monotonic() + 60.0
            while not caplog.records and time.monotonic() < end:
                time.sleep(0.001)
    assert [record.getMessage() for record in caplog.records] == ["compiling"]
