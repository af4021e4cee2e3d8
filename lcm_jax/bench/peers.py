"""The peers: diffusers' networks and pipelines in PyTorch, on the weights of ours."""

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
    """Where PyTorch runs."""
    torch = pytorch()
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def pytorch() -> Any:
    """The package, or what to install."""
    require("test")
    import torch

    return torch


def tensor(array: Any, dtype: str | None = None) -> Any:
    """An array as a tensor where PyTorch runs. dtype: by torch's name; None keeps integers as they are."""
    torch = pytorch()
    kind = np.int64 if dtype is None else np.float32
    own = torch.from_numpy(np.array(jnp.asarray(array), kind)).to(put_on_device())
    return own if dtype is None else own.to(getattr(torch, dtype))


def channels_first(array: Any, dtype: str) -> Any:
    """(b, h, w, c) as PyTorch has it."""
    return tensor(np.moveaxis(np.asarray(array, np.float32), -1, 1), dtype)


def network(part: Component, dtype: str, peer: str, adapters: Adapters | None = None) -> Any:
    """A network of ours in diffusers or transformers. adapters: on a UNet, not merged."""
    import diffusers
    import transformers

    kind, torch = class_name(part.module), pytorch()
    cls = getattr(diffusers, kind, None) or getattr(transformers, kind)
    with tempfile.TemporaryDirectory() as folder:
        save_component(Path(folder), "part", part)
        own = cls.from_pretrained(f"{folder}/part", torch_dtype=getattr(torch, dtype))
        if adapters is not None:
            save_lora(f"{folder}/adapters.safetensors", adapters)
            own.load_lora_adapter(folder, prefix="unet", weight_name="adapters.safetensors")
        own = own.to(put_on_device()).eval()
    return _compiled(own) if peer == "diffusers-compiled" else own


def _compiled(module: Any) -> Any:
    """As diffusers' documentation advises: channels last, CUDA graphs."""
    torch = pytorch()
    module = module.to(memory_format=torch.channels_last)
    return torch.compile(module, mode="reduce-overhead" if put_on_device() == "cuda" else "default")


def pipeline(pipe: Pipeline, dtype: str, peer: str, *, auto: str | None = None) -> Any:
    """A pipeline of ours in diffusers with LCM's scheduler, SD3's with its own. auto: "image-to-image"."""
    import diffusers

    torch = pytorch()
    cls = diffusers.AutoPipelineForText2Image if auto is None else diffusers.AutoPipelineForImage2Image
    with tempfile.TemporaryDirectory() as folder:
        pipe.save(folder)
        options = {"torch_dtype": getattr(torch, dtype)}
        if pipe.folder.family == "sd":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        own = cls.from_pretrained(folder, **options).to(put_on_device())
    if pipe.folder.family != "sd3":
        own.scheduler = diffusers.LCMScheduler.from_config(own.scheduler.config)
    own.set_progress_bar_config(disable=True)
    if peer == "diffusers-compiled":
        name = pipe.folder.denoiser
        setattr(own, name, _compiled(getattr(own, name)))
        own.vae.decode, own.vae.encode = torch.compile(own.vae.decode), torch.compile(own.vae.encode)
    return own


def row(name: str, run: Callable[[], Any], **options: Any) -> Row:
    """A row of PyTorch's, which ends when the device has ended."""
    torch = pytorch()

    def whole() -> None:
        with torch.no_grad():
            run()
        if put_on_device() == "cuda":
            torch.cuda.synchronize()

    return Row(name=name, run=whole, **options)
