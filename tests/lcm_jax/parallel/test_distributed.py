"""Several processes on one machine: the same run as of one, whatever becomes of them on the way."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lcm_jax.parallel import distributed

pytestmark = pytest.mark.usefixtures("own_cache")

JOB = Path(__file__).with_name("job.py")
LOOP = {"steps": 10, "batch_size": 8, "log_every": 1, "save_every": 100, "preview_every": 100, "ema": 0.9}


ENVIRONMENT: dict[str, str] = {}  # of the processes


@pytest.fixture(autouse=True)
def _environment(environment: Callable[[int], dict[str, str]]) -> None:
    ENVIRONMENT.update(environment(8))


@contextmanager
def started(case: dict[str, Any], processes: int, peer_timeout: int = 100) -> Iterator[list[Any]]:
    """A job whose processes share eight devices; all of them are gone at the end."""
    workdir = Path(case["workdir"])
    job_file = workdir.with_name(f"{workdir.name}.json")
    job_file.write_text(json.dumps({"cases": [case]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--peer-timeout={peer_timeout}"]
    running = []
    try:
        for i in range(processes):
            command = [sys.executable, str(JOB), str(job_file), *([*job, f"--process={i}"] if processes > 1 else [])]
            log = workdir.with_name(f"{workdir.name}.{i}.log").open("w+")
            devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}"}
            process = subprocess.Popen(command, env=ENVIRONMENT | devices, stdout=log, stderr=subprocess.STDOUT)
            process.log = log  # type: ignore[attr-defined]
            running.append(process)
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def said(process: Any) -> str:
    process.log.seek(0)
    return process.log.read()


def await_that(condition: Callable[[], bool], seconds: float = 300, every: float = 0.05) -> None:
    """Counts its own looks, so that a machine that stands still for a while does no harm."""
    for _ in range(int(seconds / every)):
        if condition():
            return
        time.sleep(every)
    raise TimeoutError(f"not within {seconds} s")


def ended(running: list[Any]) -> list[int]:
    """Exit codes, once all have ended by themselves."""
    await_that(lambda: all(process.poll() is not None for process in running))
    return [process.returncode for process in running]


def train(case: dict[str, Any], processes: int, **options: Any) -> Mapping[str, np.ndarray]:
    with started(case, processes, **options) as running:
        assert ended(running) == [0] * processes, [said(process)[-2000:] for process in running]
    return np.load(Path(case["workdir"]) / "result.npz")


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for name in set(one) | set(other):
        if name.startswith(("params", "ema")):
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "mesh"),
    [("regression", "data=2,fsdp=4"), ("regression", "fsdp=2,tensor=4"), ("mmdit", "data=2,fsdp=4")],
)
def test_processes_agree_with_one_and_go_on_from_one_another(tmp_path: Path, net: str, mesh: str) -> None:
    """With four a tensor axis reaches over processes, which then read the same rows."""

    def case(name: str, steps: int) -> dict[str, Any]:
        return {"workdir": str(tmp_path / name), "net": net, "loop": LOOP | {"mesh": mesh, "steps": steps}}

    one = train(case("one", 10), 1)
    for processes in (2, 4):
        many = train(case(f"of {processes}", 10), processes)
        same(one, many)
        np.testing.assert_allclose(one["losses"], many["losses"], rtol=1e-5)
    train(case("half", 5), 4)
    for processes in (1, 2):
        shutil.copytree(tmp_path / "half", tmp_path / f"rest on {processes}")
        same(one, train(case(f"rest on {processes}", 10), processes))


@pytest.mark.slow
def test_processes_draw_the_same_pictures(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = train({"workdir": str(tmp_path / "one"), "model": str(tiny_model)}, 1)
    two = train({"workdir": str(tmp_path / "two"), "model": str(tiny_model), "mesh": "fsdp=4"}, 2)
    assert np.abs(one["images"].astype(int) - two["images"]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["diffusion", "lcm-lora", "finetune", "autoencoder"])
def test_processes_look_at_the_same(tmp_path: Path, tiny_model: Path, pictures: Path, learn: str) -> None:
    """Eight devices show what one does, of all processes together; pictures are more than one for each device."""
    case = {"learn": learn, "folder": str(tiny_model), "pictures": str(pictures)}
    loop = LOOP | {"steps": 2}
    one = train({**case, "one": True, "loop": loop, "workdir": str(tmp_path / "one")}, 1)
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        many = train({**case, "loop": loop | {"mesh": "data=2,fsdp=4"}, "workdir": str(workdir)}, processes)
        held = many["held"]  # by the networks around the one that learns, which are cut over the process's devices
        assert learn == "autoencoder" or held[-1] < 0.5 * held.sum()
        conditions = [name for name in one if name.startswith("seen ")]
        assert conditions
        for name in conditions:
            close = {"atol": 2} if one[name].dtype == np.uint8 else {"rtol": 1e-4}
            np.testing.assert_allclose(many[name].astype(float), one[name], err_msg=name, **close)


@pytest.mark.slow
def test_no_kill_changes_what_comes_out(tmp_path: Path) -> None:
    """Each process in turn by SIGKILL and SIGTERM: at the start, among the steps, while a checkpoint is written."""
    loop = LOOP | {"steps": 300, "save_every": 4, "log_every": 10}
    case = {"seconds": 0.004, "loop": loop}
    uninterrupted = train({**case, "workdir": str(tmp_path / "whole")}, 2)
    job_file = {**case, "workdir": str(tmp_path / "killed")}
    checkpoints = tmp_path / "killed" / "checkpoints"
    moment, kills, codes = random.Random(0), 0, []

    def steps() -> list[int]:
        return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())

    while kills < 24:
        victim, number = kills % 2, (signal.SIGKILL, signal.SIGTERM)[kills // 2 % 2]
        before = steps()
        assert not before or before[-1] < loop["steps"], f"done after {kills} kills"
        with started(job_file, 2, peer_timeout=10) as running:
            if kills % 6 == 0:
                time.sleep(moment.uniform(0.0, 6.0))  # imports, compilation, the first steps
            else:
                await_that(lambda before=before: steps() != before)
                if kills % 3 == 1:
                    await_that(lambda: bool(list(checkpoints.glob("*tmp*"))), every=0.001)
                else:
                    time.sleep(moment.uniform(0.0, 0.6))
            alive = running[victim].poll() is None
            running[victim].send_signal(number)
            codes.append((number.name, ended(running)))
            kills += alive
        assert not before or steps()[-1] >= before[-1]
    for name, (first, second) in codes:
        if name == "SIGTERM":
            # a process may be ended before it has a handler
            assert first == second == distributed.SAVED or -signal.SIGTERM in (first, second), codes
        else:
            assert -signal.SIGKILL in (first, second), codes
            assert 0 not in (first, second), codes
    resumed = train(job_file, 2)
    for name in uninterrupted:
        if name.startswith(("params", "ema")):
            np.testing.assert_array_equal(uninterrupted[name], resumed[name], err_msg=name)


@pytest.mark.slow
def test_a_process_that_stops_or_hangs_ends_the_job(tmp_path: Path) -> None:
    case = {"workdir": str(tmp_path / "stopped"), "seconds": 0.01, "loop": LOOP | {"steps": 10**6}}
    with started(case, 2, peer_timeout=10) as running:
        await_that((tmp_path / "stopped" / "tensorboard").exists)
        time.sleep(5)
        running[1].send_signal(signal.SIGSTOP)
        assert ended(running[:1]) != [0]
    case = {"workdir": str(tmp_path / "hung"), "hang_at": 20, "loop": LOOP | {"steps": 1000, "hang_timeout": 8.0}}
    with started(case, 2) as running:
        assert ended(running[:1]) == [1]
        assert "has waited for 8 s at step" in said(running[0])


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    loop = LOOP | {"steps": 40, "save_every": 10}
    case = {"workdir": str(tmp_path / "full"), "seconds": 0.01, "loop": loop}
    with started({**case, "full_at": 25}, 1) as running:
        assert ended(running) == [1], said(running[0])
        assert "a checkpoint could not be written to" in said(running[0])
        assert "the last whole one is of step 20" in said(running[0])
    uninterrupted = train({**case, "workdir": str(tmp_path / "whole")}, 1)
    resumed = train(case, 1)
    for name in uninterrupted:
        if name.startswith(("params", "ema")):
            np.testing.assert_array_equal(uninterrupted[name], resumed[name], err_msg=name)


@pytest.mark.slow
def test_processes_pass_over_a_damaged_checkpoint_together(tmp_path: Path) -> None:
    """Each compares a part of the checksums, and all take the same step."""
    loop = LOOP | {"save_every": 5}
    uninterrupted = train({"workdir": str(tmp_path / "whole"), "loop": loop}, 2)
    case = {"workdir": str(tmp_path / "damaged"), "loop": loop}
    train(case, 2)
    newest = tmp_path / "damaged" / "checkpoints" / "10"
    for path in sorted((newest / "state").rglob("*"))[-2:]:  # of which each process compares one
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with started(case, 2) as running:
        assert ended(running) == [0, 0], [said(process)[-2000:] for process in running]
        assert "checkpoint 10 is damaged" in said(running[0])
        assert "goes on from step 5 of 10" in said(running[0])
    same(uninterrupted, np.load(tmp_path / "damaged" / "result.npz"), tolerance=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "host:1"}, "--processes, --process missing: a job is named by all of"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "--process 2: it must be from 0 to"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "--coordinator host: it must be HOST:PORT"),
    ],
)
def test_half_a_job_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.initialize(**arguments)


def test_without_a_job_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_main()
