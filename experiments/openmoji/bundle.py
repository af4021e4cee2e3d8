"""Write trained parts into the bundled models: `python experiments/openmoji/bundle.py RUNS`.

RUNS holds work folders named after their configs (openmoji_lcm_fine is the student's second stage). For each folder
with an export, the parts named below are written in half precision to lcm_jax/bundled/openmoji or openmoji_sd3; all
other parts stay as they are. With the student's parts the folder is a diffusers folder; it also has the teacher's
network and scheduler, the LoRA, the image tower and the reference features. "openmoji-sd3" reads the parts that both
models share from "openmoji".

The autoencoder's shift is folded into its weights: UNet and MMDiT share the autoencoder, and diffusers reads a shift
only for MMDiTs. The student's weights are averaged with the teacher's, from which it started: between the two ends of a
finetuning there are weights that are better than either (Wortsman et al. 2022, arXiv:2109.01903).
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
from lcm_jax.evaluation.evaluate import ClipMetric
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.typing import Params
from lcm_jax.weights.diffusers_folder import Component, load_component, save_component, without_shift

BUNDLED = Path(lcm_jax.__file__).parent / "bundled"
# bundle -> config -> network in its export -> name in the bundle
NETWORKS = {
    "openmoji": {
        "openmoji_vae": {"vae": "vae"},
        "openmoji_clip": {"text_encoder": "text_encoder", "image_encoder": "image_encoder"},
        "openmoji_teacher": {"unet": "unet_teacher"},
        "openmoji_lcm_fine": {"unet": "unet"},
    },
    "openmoji_sd3": {
        "openmoji_clip2": {"text_encoder_2": "text_encoder_2"},
        "openmoji_t5": {"text_encoder_3": "text_encoder_3"},
        "openmoji_sd3": {"transformer": "transformer_teacher"},
        "openmoji_sd3_lcm": {"transformer": "transformer"},
    },
}
# the same for other files and folders
_TEACHER = {"scheduler": "scheduler_teacher", "model_index.json": "model_index_teacher.json"}
_STUDENT = {"scheduler": "scheduler", "model_index.json": "model_index.json"}
COPIES = {
    "openmoji": {
        "openmoji_clip": {"tokenizer": "tokenizer"},
        "openmoji_teacher": _TEACHER,
        "openmoji_lcm_fine": _STUDENT,
    },
    "openmoji_sd3": {
        "openmoji_t5": {"tokenizer_3": "tokenizer_3"},
        "openmoji_sd3": _TEACHER,
        "openmoji_sd3_lcm": _STUDENT,
    },
}
LORAS = {"openmoji": "openmoji_lcm_lora", "openmoji_sd3": "openmoji_sd3_lcm_lora"}
TEACHER_SHARE = {"openmoji": 0.2, "openmoji_sd3": 0.2}


def main(runs: Path) -> None:
    """Write every part that has been trained, of all bundles."""
    for bundle in NETWORKS:
        write_bundle(runs, bundle)


def write_bundle(runs: Path, bundle: str) -> None:
    """Write the trained parts of one bundle."""
    target = BUNDLED / bundle
    target.mkdir(parents=True, exist_ok=True)
    for config, parts in NETWORKS[bundle].items():
        export = runs / config / "export"
        for source, name in parts.items() if export.is_dir() else ():
            network = load_component(export, source)
            if source == "vae":
                network = without_shift(network)
            if (target / f"{name}_teacher").is_dir():
                teacher = load_component(target, f"{name}_teacher").params
                network = Component(network.module, averaged(network.params, teacher, TEACHER_SHARE[bundle]))
            shutil.rmtree(target / name, ignore_errors=True)
            save_component(target, name, network, dtype=jnp.float16)
    for config, parts in COPIES[bundle].items():
        for source, name in parts.items():
            path = runs / config / "export" / source
            if path.is_dir():
                shutil.rmtree(target / name, ignore_errors=True)
                shutil.copytree(path, target / name)
            elif path.is_file():
                shutil.copyfile(path, target / name)
    if (runs / LORAS[bundle] / "export").is_dir():
        adapters = lcm_jax.load_lora(runs / LORAS[bundle] / "export")
        lcm_jax.save_lora(target / "lora" / "pytorch_lora_weights.safetensors", adapters, dtype=jnp.float16)
    if (target / "image_encoder").is_dir():
        write_reference(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


def averaged(student: Params, teacher: Params, share: float) -> Params:
    """Return (1 - share) student + share teacher; the teacher's w-embedding, which it lacks, counts as zero."""
    teacher_leaves = flatten_dict(teacher)
    mixed = {path: (1 - share) * leaf for path, leaf in flatten_dict(student).items()}
    return unflatten_dict({path: leaf + share * teacher_leaves.get(path, 0.0) for path, leaf in mixed.items()})


def write_reference(target: Path) -> None:
    """Write the captions and the features of the validation pictures, so that the demo needs no data set."""
    source = load_source("openmoji", "validation", 64)
    records = [source[i] for i in range(len(source))]
    features = ClipMetric.load(target).features(np.stack([r["image"] for r in records]))
    (target / "reference").mkdir(exist_ok=True)
    write_json(target / "reference" / "validation.json", {"captions": [r["caption"] for r in records]})
    save_file({"features": features.astype(np.float32)}, target / "reference" / "validation.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
