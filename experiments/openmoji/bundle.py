"""Puts trained parts into the bundled model: `python experiments/openmoji/bundle.py RUNS`.

RUNS holds work folders named after their configs (openmoji_lcm_fine is the student's second stage); of each that has an
export, the parts named here are written in half precision to lcm_jax/bundled/openmoji, and the rest of the bundle is
left as it is. The student makes it a diffusers folder; the teacher's UNet and scheduler, the LoRA, the image tower and
the reference features lie beside.

The student's weights are averaged with the teacher's, from which it started: between the two ends of a finetuning lie
weights that are better than either (Wortsman et al. 2022, arXiv:2109.01903).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import lcm_jax
from lcm_jax.data import load_source
from lcm_jax.evaluate import ClipMetric
from lcm_jax.typing import Params
from lcm_jax.weights.files import write_json
from lcm_jax.weights.folders import load_component, save_component

TEACHER_SHARE = 0.2
TARGET = Path(lcm_jax.__file__).parent / "bundled" / "openmoji"
# config -> networks and plain files of its export -> where they go
NETWORKS = {
    "openmoji_vae": {"vae": "vae"},
    "openmoji_clip": {"text_encoder": "text_encoder", "image_encoder": "image_encoder"},
    "openmoji_teacher": {"unet": "unet_teacher"},
    "openmoji_lcm_fine": {"unet": "unet"},
}
COPIES = {
    "openmoji_clip": {"tokenizer": "tokenizer"},
    "openmoji_teacher": {"scheduler": "scheduler_teacher", "model_index.json": "model_index_teacher.json"},
    "openmoji_lcm_fine": {"scheduler": "scheduler", "model_index.json": "model_index.json"},
}


def main(runs: Path) -> None:
    """Write every part that has been trained."""
    TARGET.mkdir(parents=True, exist_ok=True)
    for config, parts in NETWORKS.items():
        export = runs / config / "export"
        for source, place in parts.items() if export.is_dir() else ():
            network = load_component(export, source)
            if place == "unet":
                network = network._replace(params=averaged(network.params))
            shutil.rmtree(TARGET / place, ignore_errors=True)
            save_component(TARGET, place, network, dtype=jnp.float16)
    for config, parts in COPIES.items():
        for source, place in parts.items():
            path = runs / config / "export" / source
            if path.is_dir():
                shutil.rmtree(TARGET / place, ignore_errors=True)
                shutil.copytree(path, TARGET / place)
            elif path.is_file():
                shutil.copyfile(path, TARGET / place)
    if (runs / "openmoji_lcm_lora" / "export").is_dir():
        adapters = lcm_jax.load_lora(runs / "openmoji_lcm_lora" / "export")
        lcm_jax.save_lora(TARGET / "lora" / "pytorch_lora_weights.safetensors", adapters, dtype=jnp.float16)
    if (TARGET / "image_encoder").is_dir():
        write_reference()
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {size / 2**20:.1f} MiB")


def averaged(student: Params) -> Params:
    """The student's weights and the bundled teacher's, whose w-embedding is zero."""
    teacher = flatten_dict(load_component(TARGET, "unet_teacher").params)
    mixed = {path: (1 - TEACHER_SHARE) * leaf for path, leaf in flatten_dict(student).items()}
    return unflatten_dict({path: leaf + TEACHER_SHARE * teacher.get(path, 0.0) for path, leaf in mixed.items()})


def write_reference() -> None:
    """Captions of the validation pictures and the features of the pictures, so that the demo needs no data set."""
    source = load_source("openmoji", "validation", 64)
    records = [source[i] for i in range(len(source))]
    features = ClipMetric.load(TARGET).features(np.stack([r["image"] for r in records]))
    (TARGET / "reference").mkdir(exist_ok=True)
    write_json(TARGET / "reference" / "validation.json", {"captions": [r["caption"] for r in records]})
    save_file({"features": features.astype(np.float32)}, TARGET / "reference" / "validation.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
