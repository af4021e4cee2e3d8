"""A soak test of `lcm-jax serve`: several clients send frames until 20,000 are answered in all.

    python experiments/bench/soak.py [--frames 20000] [--clients 3] [--json FILE]

Each client draws a moving disc in a colour of its own, changes its prompt and strength from time to time, and keeps two
frames in flight. The server's resident memory is read every second and at the end. The run fails if a session is lost,
if an answer does not come, or if memory at the end is more than 5 % above that after a tenth of the frames.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from websockets.sync.client import connect

from lcm_jax.bench import provenance
from lcm_jax.bench.serving import serving
from lcm_jax.bench.stream import moving_scene
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.serve import protocol

PROMPTS = ("cat face", "red heart", "dog face", "tree")
IN_FLIGHT, CHANGES = 2, 250  # frames; frames from one change of the controls to the next


def scene(number: int) -> list[bytes]:
    """Return a client's frames as PNG files."""
    frames = []
    for picture in moving_scene((64, 64), 50):
        out = io.BytesIO()
        Image.fromarray(np.roll(picture, number, axis=-1)).save(out, "PNG")
        frames.append(out.getvalue())
    return frames


def client(address: str, number: int, frames: int, bar: tqdm) -> None:
    """Send frames and receive answers; raise an error if the connection ends, is silent, or the server reports one."""
    pictures = scene(number)
    with connect(address, compression=None, open_timeout=600, max_size=None) as socket:
        controls = {"prompt": PROMPTS[number % len(PROMPTS)]}
        socket.send(protocol.message("hello", controls=controls, format="png"))
        while json.loads(socket.recv(600))["type"] != "welcome":
            pass  # waiting in line
        sent = answered = 0
        while answered < frames:
            while sent < min(answered + IN_FLIGHT, frames):
                socket.send(protocol.pack(protocol.FRAME, sent, 0, pictures[sent % len(pictures)]))
                sent += 1
            received = socket.recv(120)
            if isinstance(received, str):
                if json.loads(received)["type"] == "error":
                    raise RuntimeError(received)
                continue
            before, answered = answered, protocol.unpack(received).sequence + 1
            bar.update(answered - before)
            if before // CHANGES != answered // CHANGES:
                turn = answered // CHANGES
                controls = {"prompt": PROMPTS[turn % len(PROMPTS)], "strength": 0.4 + 0.1 * (turn % 5)}
                socket.send(protocol.message("set", controls=controls))
        socket.send(protocol.message("bye"))


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1024


def main() -> None:
    """Run the clients, print and write the result, and exit with code 1 if the run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000, help="of all clients together")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    failures: list[str] = []
    memory: list[tuple[int, float]] = []  # frames answered, MiB
    with serving() as server, tqdm(total=arguments.frames, unit="frame", smoothing=0.02) as bar:

        def run(number: int) -> None:
            share = arguments.frames // arguments.clients + (number < arguments.frames % arguments.clients)
            try:
                client(server.address.replace("http", "ws") + "/ws", number, share, bar)
            except Exception as error:
                failures.append(f"client {number}: {error!r}")

        threads = [threading.Thread(target=run, args=(number,)) for number in range(arguments.clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append((bar.n, resident(server.process.pid)))
            bar.set_postfix_str(f"{memory[-1][1]:.0f} MiB", refresh=False)
            deadline = time.perf_counter() + 1
            while time.perf_counter() < deadline and any(thread.is_alive() for thread in threads):
                time.sleep(0.1)
        memory.append((bar.n, resident(server.process.pid)))
        seconds = time.perf_counter() - start
    early = max(mib for frames, mib in memory if frames <= max(0.1 * arguments.frames, memory[0][0]))
    result = {
        "frames": memory[-1][0],
        "clients": arguments.clients,
        "seconds": seconds,
        "mib": memory,
        "growth_after_a_tenth": memory[-1][1] / early - 1.0,
        "failures": failures,
    }
    print({name: value for name, value in result.items() if name != "mib"}, f"{early:.0f} to {memory[-1][1]:.0f} MiB")
    if arguments.json is not None:
        write_json(arguments.json, provenance() | result)
    if failures or memory[-1][1] > 1.05 * early:
        sys.exit(1)


if __name__ == "__main__":
    main()
