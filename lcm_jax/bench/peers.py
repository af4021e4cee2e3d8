"""The peers: diffusers' networks and pipelines in PyTorch, with the weights of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcm_jax.bench.measure import Row
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.lora import Adapters
from lcm_jax.runtime.optional_deps import require
from lcm_jax.weights.diffusers_folder import Component, save_component
from lcm_jax.weights.lora.files import save_lora
from lcm_jax.weights.registry import class_name

PEERS = ("diffusers", "diffusers-compiled")  # eager, and by torch.compile


def put_on_device() -> str:
    """Return the device that PyTorch runs on: "cuda" if there is one, or "cpu"."""
    torch = pytorch()
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def pytorch() -> Any:
    """Return the package torch; without it an error says what to install."""
    require("test")
    import torch

    return torch


def tensor(array: Any, dtype: str | None = None) -> Any:
    """Return an array as a tensor on PyTorch's device. dtype: torch's name of a float type; None for integers."""
    torch = pytorch()
    kind = np.int64 if dtype is None else np.float32
    copied = torch.from_numpy(np.array(jnp.asarray(array), kind)).to(put_on_device())
    return copied if dtype is None else copied.to(getattr(torch, dtype))


def channels_first(array: Any, dtype: str) -> Any:
    """Return an array (b, h, w, c) as a tensor (b, c, h, w)."""
    return tensor(np.moveaxis(np.asarray(array, np.float32), -1, 1), dtype)


def network(part: Component, dtype: str, peer: str, adapters: Adapters | None = None) -> Any:
    """Return a network of ours as diffusers' or transformers' module.

    peer: one of `PEERS`. adapters: a LoRA that is loaded into a UNet and not merged.
    """
    import diffusers
    import transformers

    kind, torch = class_name(part.module), pytorch()
    cls = getattr(diffusers, kind, None) or getattr(transformers, kind)
    with tempfile.TemporaryDirectory() as folder:
        save_component(Path(folder), "part", part)
        module = cls.from_pretrained(f"{folder}/part", torch_dtype=getattr(torch, dtype))
        if adapters is not None:
            save_lora(f"{folder}/adapters.safetensors", adapters)
            module.load_lora_adapter(folder, prefix="unet", weight_name="adapters.safetensors")
        module = module.to(put_on_device()).eval()
    return _compiled(module) if peer == "diffusers-compiled" else module


def _compiled(module: Any) -> Any:
    """Return a module compiled as diffusers' documentation advises: channels last, CUDA graphs."""
    torch = pytorch()
    module = module.to(memory_format=torch.channels_last)
    return torch.compile(module, mode="reduce-overhead" if put_on_device() == "cuda" else "default")


def pipeline(pipe: Pipeline, dtype: str, peer: str, *, auto: str | None = None) -> Any:
    """Return a pipeline of ours as diffusers' pipeline, with LCM's scheduler; SD3 keeps its own.

    peer: one of `PEERS`. auto: "image-to-image", or None for text-to-image.
    """
    import diffusers

    torch = pytorch()
    cls = diffusers.AutoPipelineForText2Image if auto is None else diffusers.AutoPipelineForImage2Image
    with tempfile.TemporaryDirectory() as folder:
        pipe.save(folder)
        options = {"torch_dtype": getattr(torch, dtype)}
        if pipe.folder.family == "sd":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        theirs = cls.from_pretrained(folder, **options).to(put_on_device())
    if pipe.folder.family != "sd3":
        theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    if peer == "diffusers-compiled":
        name = pipe.folder.denoiser
        setattr(theirs, name, _compiled(getattr(theirs, name)))
        theirs.vae.decode, theirs.vae.encode = torch.compile(theirs.vae.decode), torch.compile(theirs.vae.encode)
    return theirs


def row(name: str, run: Callable[[], Any], **options: Any) -> Row:
    """Return a row of PyTorch, whose run ends when the device has finished. options: other fields of the row."""
    torch = pytorch()

    def run_and_wait() -> None:
        with torch.no_grad():
            run()
        if put_on_device() == "cuda":
            torch.cuda.synchronize()

    return Row(name=name, run=run_and_wait, **options)
