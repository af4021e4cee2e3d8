"""Puts the trained parts of the bundled model together: `python experiments/openmoji/bundle.py RUNS`.

RUNS holds the work folders of openmoji_clip, openmoji_teacher, openmoji_lcm and openmoji_lcm_lora. The result, half
precision, is lcm_jax/bundled/openmoji: the student as a diffusers folder, the teacher's UNet and scheduler, the LoRA,
the image tower and the validation captions with their pictures' features beside it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import lcm_jax
from lcm_jax.data import load_source
from lcm_jax.evaluate import ClipMetric
from lcm_jax.nets import RULES_UNET
from lcm_jax.weights.files import write_json
from lcm_jax.weights.folders import load_component, save_component
from lcm_jax.weights.lora import load_lora, save_lora

TARGET = Path(lcm_jax.__file__).parent / "bundled" / "openmoji"


def main(runs: Path) -> None:
    """Assemble TARGET from the exports under `runs`."""
    half = jnp.float16
    lcm_jax.load(runs / "openmoji_lcm" / "export").save(TARGET, dtype="float16")
    teacher = runs / "openmoji_teacher" / "export"
    unet = load_component(teacher, "unet")
    save_component(TARGET, "unet_teacher", unet, dtype=half)
    shutil.copytree(teacher / "scheduler", TARGET / "scheduler_teacher")
    save_component(
        TARGET, "image_encoder", load_component(runs / "openmoji_clip" / "export", "image_encoder"), dtype=half
    )
    adapters = load_lora(runs / "openmoji_lcm_lora" / "export", unet.params, RULES_UNET)
    save_lora(TARGET / "lora" / "pytorch_lora_weights.safetensors", adapters, RULES_UNET, dtype=half)

    source = load_source("openmoji", "validation", 64)
    records = [source[i] for i in range(len(source))]
    features = ClipMetric.load(str(TARGET)).features(np.stack([r["image"] for r in records]))
    (TARGET / "reference").mkdir()
    write_json(TARGET / "reference" / "validation.json", {"captions": [r["caption"] for r in records]})
    save_file({"features": features.astype(np.float32)}, TARGET / "reference" / "validation.safetensors")
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
