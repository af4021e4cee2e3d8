"""The tiny autoencoder (TAESD) read and written: a diffusers folder, or its author's two files, one for each half."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.diffusers_folder import Component, load_component
from lcm_jax.weights.safetensors_files import load_tensors, read_json, save_tensors
from lcm_jax.weights.torch_params import from_torch, to_torch
from vae16 import TINY_ORIGINAL_RULES, AutoencoderTiny, TinyConfig

_KIND = "AutoencoderTiny"
_HALVES = ("encoder", "decoder")
_KEY = re.compile(r"(\d+)\.(conv\.\d+\.)?(?:weight|bias)")


def load_tiny(path: str | Path, *, dtype: Any = jnp.float32) -> Component:
    """Return the tiny autoencoder in a diffusers folder with config.json, or in a folder with the original two files.

    These are NAME_encoder.safetensors and NAME_decoder.safetensors, whose shapes give the config. dtype: that of
    parameters and computation. Raises FileNotFoundError, and ValueError with the file's name and what does not fit.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name")
        if kind != _KIND:
            raise ValueError(f"{folder / 'config.json'}: the class is {kind!r}, not {_KIND!r}; give a tiny autoencoder")
        return load_component(folder, "", dtype=dtype)
    files = {half: _find(folder, half) for half in _HALVES}
    parts = {half: load_tensors(file) for half, file in files.items()}
    encoder, decoder = (_outline(parts[half], files[half]) for half in _HALVES)
    try:
        config = TinyConfig(
            in_channels=encoder.inputs,
            out_channels=decoder.outputs,
            latent_channels=encoder.outputs,
            encoder_block_out_channels=(encoder.width,) * len(encoder.depths),
            decoder_block_out_channels=(decoder.width,) * len(decoder.depths),
            num_encoder_blocks=encoder.depths,
            num_decoder_blocks=decoder.depths,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    module = AutoencoderTiny(config, dtype=dtype)
    tensors = {f"{half}.{key}": tensor for half, part in parts.items() for key, tensor in part.items()}
    like = abstract_params(_KIND, config)
    return Component(module, from_torch(tensors, like, TINY_ORIGINAL_RULES, dtype=dtype, source=str(folder)))


def save_tiny_original(folder: str | Path, component: Component, *, name: str = "taesd", dtype: Any = None) -> None:
    """Write `folder`/NAME_encoder.safetensors and NAME_decoder.safetensors, which the original TAESD reads.

    name: the original ones are "taesd", "taesdxl", "taesd3" and "taef1". dtype: that of the files; None keeps the
    parameters'. Raises ValueError if the config has values that these files cannot hold.
    """
    config, plain = component.module.config, TinyConfig()
    for key in ("act_fn", "upsampling_scaling_factor", "scaling_factor", "shift_factor"):
        if getattr(config, key) != getattr(plain, key):
            raise ValueError(
                f"{folder}: {key}={getattr(config, key)!r} would be lost, the original has {getattr(plain, key)!r} and "
                "no config; save a diffusers folder"
            )
    tensors = to_torch(component.params, TINY_ORIGINAL_RULES, dtype=dtype)
    for half in _HALVES:
        part = {key.removeprefix(f"{half}."): value for key, value in tensors.items() if key.startswith(f"{half}.")}
        save_tensors(Path(folder) / f"{name}_{half}.safetensors", part)


def _find(folder: Path, half: str) -> Path:
    """Return the file of one half."""
    for suffix in (".safetensors", ".pth"):  # .pth files are pickles: reading one raises an error on how to convert it
        files = sorted(folder.glob(f"*_{half}{suffix}"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder}: which of {names}? give a folder that holds one tiny autoencoder")
        if files:
            return files[0]
    raise FileNotFoundError(
        f"{folder}: no config.json and no *_{half}.safetensors; give a diffusers folder or the two original files"
    )


class _Outline(NamedTuple):
    """The sizes of one half, as its keys and shapes tell them."""

    inputs: int  # channels
    width: int
    outputs: int
    depths: tuple[int, ...]  # number of residual blocks after each convolution but the last


def _outline(tensors: Mapping[str, np.ndarray], file: Path) -> _Outline:
    layers: dict[int, str] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file}: {key} is no key of a tiny autoencoder, such as 0.weight or 1.conv.0.weight")
        layers[int(match[1])] = "b" if match[2] else "c"
    order = sorted(layers)
    ends = [tensors.get(f"{i}.weight") for i in order[:1] + order[-1:]]
    shapes = [end.shape for end in ends if end is not None and end.ndim == 4]
    if len(shapes) != 2:
        raise ValueError(f"{file}: does not begin and end with a convolution as a tiny autoencoder does")
    runs = "".join(layers[i] for i in order).split("c")[1:-1]
    return _Outline(shapes[0][1], shapes[0][0], shapes[1][0], tuple(len(run) for run in runs))
