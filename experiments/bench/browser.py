"""Frames a second and latency of `lcm-jax serve` in a headless browser, with Chromium's fake camera.

    python experiments/bench/browser.py [--seconds 20] [--json FILE]

The server draws 64 x 64 and 128 x 128 pixels in two steps, its default, and in one step. In the page latency is the
time from the capture of a frame until the first picture that shows it is displayed, the median of the last ones. In the
server it is the time from the arrival of a frame until that picture is sent.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
from itertools import product
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

from lcm_jax.bench import provenance
from lcm_jax.bench.serving import serving
from lcm_jax.runtime.atomic_files import write_json

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
WARM_UP = 15.0  # seconds until a camera's programs are compiled and the page has settled


def measure(browser: Any, size: int, steps: int, seconds: float) -> dict[str, float]:
    """Return the medians of frames a second and latency that the page shows, and the server's latency quantiles.

    size: pixels of both sides. The page is read twice a second for `seconds`. Latencies are milliseconds.
    """
    with serving("--size", str(size), str(size), "--steps", str(steps)) as server:
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.goto(server.address)
        page.get_by_text("Streaming", exact=True).wait_for(timeout=180_000)
        page.get_by_label("Camera").check(force=True)
        page.wait_for_timeout(1000 * WARM_UP)
        rates, delays = [], []
        for _ in range(round(2 * seconds)):
            page.wait_for_timeout(500)
            rates.append(float(page.text_content("#fps")))
            delays.append(float(page.text_content("#latency").split()[0]))
        metrics = urlopen(server.address + "/metrics").read().decode()
        quantiles = dict(re.findall(r'lcm_jax_latency_seconds{quantile="([\d.]+)"} (\S+)', metrics))
        page.context.close()
    in_page = {"fps": statistics.median(rates), "page_ms": statistics.median(delays)}
    in_server = {f"server_p{round(100 * float(q))}_ms": 1e3 * float(value) for q, value in quantiles.items()}
    return {"size": size, "steps": steps} | in_page | in_server


def main() -> None:
    """Measure every case, print it and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=[*OPTIONS, *CAMERA])
        cases = [measure(browser, *case, arguments.seconds) for case in product((64, 128), (2, 1))]
    for row in cases:
        print({name: round(value, 1) for name, value in row.items()})
    if arguments.json is not None:
        write_json(arguments.json, provenance() | {"seconds": arguments.seconds, "cases": cases})


if __name__ == "__main__":
    main()
