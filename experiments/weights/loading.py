"""Seconds and peak memory to load Stable Diffusion 1.5's geometry, in this library and in diffusers, in turn.

`python experiments/weights/loading.py [--runs 5] [--json FILE]`: a random model of the published shape (4.0 GiB in
float32: UNet, autoencoder, CLIP-L) is written to a temporary folder and read once so that the page cache is warm. Then
the two libraries load it alternately, each time in a new process. The seconds do not include imports; the peak, which
is the kernel's VmHWM, does. "seconds" is the time of the call, in which both libraries map the files and read no
values. "used" is the time until every parameter has been read once; until then this library has checked each value,
transposed it and placed it on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

_PEAK = """
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20
print(json.dumps({"seconds": seconds, "used": used, "peak_gib": peak}))
"""
LOADERS = {
    "lcm_jax": f"""
import json, sys, time
import jax, lcm_jax, numpy
jax.devices()
start = time.perf_counter()
pipe = lcm_jax.load(sys.argv[1])
seconds = time.perf_counter() - start
for leaf in jax.tree.leaves(pipe.params):
    numpy.asarray(leaf).sum()
used = time.perf_counter() - start
{_PEAK}""",
    "diffusers": f"""
import json, sys, time
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
start = time.perf_counter()
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
seconds = time.perf_counter() - start
with torch.no_grad():
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in module.parameters():
            parameter.sum()
used = time.perf_counter() - start
{_PEAK}""",
}
MAKE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.component import Part, names_of, write_part
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.nets import SD15
from mmdit.text import CLIP_L, train_tokenizer
from vae16 import AutoencoderConfig

out = Path(sys.argv[1])
rng = np.random.default_rng(0)
vae = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
kinds = {"unet": ("UNet2DConditionModel", SD15), "vae": ("AutoencoderKL", vae),
         "text_encoder": ("CLIPTextModel", CLIP_L)}
index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.36.0", "safety_checker": [None, None],
         "feature_extractor": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
         "tokenizer": ["transformers", "CLIPTokenizer"], "requires_safety_checker": False}
for name, (kind, config) in kinds.items():
    tensors = {key: rng.standard_normal(shape, np.float32) * 0.02 for key, shape in names_of(kind, config).items()}
    index[name] = write_part(out / name, Part(kind, config, tensors, name))
train_tokenizer(["red heart", "yellow heart"], 600, out / "tokenizer", 77)
write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1, "num_train_timesteps": 1000})
write_json(out / "model_index.json", index)
"""


def run(program: str, folder: Path) -> str:
    """Run a program in a new process with `folder` as its argument and return the last line that it prints.

    Raises RuntimeError with its standard error if it fails.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    """Measure, print, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(MAKE, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2**30
        for file in folder.rglob("*.safetensors"):
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(arguments.runs):
            for name, program in LOADERS.items():
                runs[name].append(json.loads(run(program, folder)))
                print(name, runs[name][-1], flush=True)
    medians = {
        key: {name: statistics.median(record[key] for record in records) for name, records in runs.items()}
        for key in ("seconds", "used")
    }
    peaks = {name: max(record["peak_gib"] for record in records) / size for name, records in runs.items()}
    print(f"{size:.2f} GiB; peak over file: {peaks}")
    for key, value in medians.items():
        print(f"{key}, medians {value}, ratio {value['lcm_jax'] / value['diffusers']:.2f}")
    if arguments.json:
        versions = {name: version(name) for name in ("jax", "torch", "diffusers", "safetensors")}
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        result = {**machine, "versions": versions, "gib": size, "runs": runs}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
