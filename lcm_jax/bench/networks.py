"""The cases that time one call of a network: UNets, MMDiTs, autoencoders, text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.bench import peers
from lcm_jax.bench.measure import Row, program
from lcm_jax.bench.models import GEOMETRIES, PREFIX, at_scale, component
from lcm_jax.nets import example_inputs
from lcm_jax.precision.context import precision_context
from lcm_jax.precision.quantization import quantize
from lcm_jax.typing import Params
from lcm_jax.weights.diffusers_folder import Component
from mmdit import example_inputs as mmdit_inputs
from mmdit.presets import SD3_MEDIUM, family
from mmdit.text.t5_config import T5_XXL
from vae16 import TAESD

Titled = tuple[str, list[Row]]

# Case -> the geometries that it measures; --model random-NAME selects one of them.
MEASURED = {"unet": ("sd15", "sd-turbo", "sdxl"), "text-to-image": ("sd15", "sdxl", "sd3"), "training": ("sd15",)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a bench: the model of some cases, precision, scale and peer.

    batches: batch sizes; empty for each case's own. quantize: part of a model -> kind of 8 bits, measured as more rows.
    side: pixels of a stream's sides; None for the model's own.
    """

    model: str = "openmoji"
    dtype: str = "float32"
    scale: str = "full"
    peer: str | None = None
    batches: tuple[int, ...] = ()
    quantize: Mapping[str, str] = field(default_factory=dict, hash=False)
    side: int | None = None

    def geometries(self, case: str) -> tuple[str, ...]:
        """Return the geometries of a case to measure: the one of `random-NAME`, or all for another model.

        Raises ValueError if the case does not measure that one.
        """
        names = MEASURED[case]
        if not self.model.startswith(PREFIX):
            return names
        geometry = self.model.removeprefix(PREFIX)
        if geometry not in names:
            known = ", ".join(PREFIX + name for name in names)
            raise ValueError(f"--model {self.model}: bench {case} has {known}")
        return (geometry,)


def _normal(shape: tuple[int, ...], dtype: str) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def _call(part: Component, *arguments: Any, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function and the arguments of a network's call."""

    def call(params: Params, *inputs: Any) -> Any:
        with precision_context(params) as net_params:
            return part.module.apply({"params": net_params}, *inputs, **options)

    return call, (part.params, *arguments)


def _pair(title: str, ours: Row, theirs: Callable[[], Row] | None) -> Titled:
    """Return the title and rows of a network, the peer's row before ours."""
    if theirs is None:
        return title, [ours]
    peer = theirs()
    return title, [peer, replace(ours, against=peer.name)]


def _quantized(
    plain: Row, kind: str | None, function: Callable[..., Any], params: Params, *arguments: Any
) -> list[Row]:
    """Return a row of the same network in 8 bits if `kind` is given; its note is the error of the first output."""
    if kind is None:
        return []
    row = program(f"{plain.name}, {kind}", function, quantize(params, kind), *arguments)

    def error() -> str:
        ours, exact = (np.asarray(jax.tree.leaves(either.run())[0], np.float32) for either in (row, plain))
        return f"error {np.linalg.norm(ours - exact) / np.linalg.norm(exact):.2g}"

    return [replace(row, against=plain.name, frames=plain.frames, note=error)]


def unets(options: Options) -> Iterator[Titled]:
    """Yield the rows of a step of Stable Diffusion's UNets, without guidance."""
    for name, batch in product(options.geometries("unet"), options.batches or (1,)):
        kind, config = GEOMETRIES[name].parts["unet"]
        config = at_scale(config, options.scale)
        part = component(kind, config, options.dtype)
        side = config.sample_size
        x, t, cond = example_inputs(config, batch=batch, size=(side, side), tokens=77)
        x, t = _normal(x.shape, options.dtype), t + 500.0
        cond = {name: _normal(leaf.shape, options.dtype) for name, leaf in cond.items()}
        function, arguments = _call(part, x, t, cond)
        ours = program(f"{name} UNet", function, *arguments, frames=batch)

        def theirs(part: Component = part, x: Any = x, cond: Any = cond, name: str = name, batch: int = batch) -> Row:
            net = peers.network(part, options.dtype, str(options.peer))
            latents = peers.channels_first(x, options.dtype)
            inputs = {key: peers.tensor(leaf, options.dtype) for key, leaf in cond.items()}
            text = inputs["context"]
            added = (
                None if "pooled" not in inputs else {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
            )
            return peers.row(
                f"diffusers, {name} UNet",
                lambda: net(latents, 500, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False),
                frames=batch,
            )

        title, rows = _pair(f"{name} UNet, {batch} x latents {side}x{side}", ours, theirs if options.peer else None)
        yield title, rows + _quantized(ours, options.quantize.get("denoiser"), function, *arguments)


def mmdits(options: Options) -> Iterator[Titled]:
    """Yield the rows of a step of the MMDiT.

    Depths 12 and 24 are those of the paper's study at 256 x 256 pixels; SD3-medium is at 1024 x 1024.
    """
    rows = []
    for name, config in (("d12", family(12)), ("d24", family(24)), ("SD3-medium", SD3_MEDIUM)):
        config = at_scale(config, options.scale)
        part = component("SD3Transformer2DModel", config, options.dtype)
        side = config.sample_size
        x, t, cond = mmdit_inputs(config, size=(side, side), tokens=154)
        cond = {name: _normal(leaf.shape, options.dtype) for name, leaf in cond.items()}
        inputs = _normal(x.shape, options.dtype), t + 500.0, cond
        function, arguments = _call(part, *inputs)
        rows.append(program(f"MMDiT {name}, latents {side}x{side}", function, *arguments))
        rows += _quantized(rows[-1], options.quantize.get("denoiser"), function, *arguments)
    yield "MMDiT", rows


def autoencoders(options: Options) -> Iterator[Titled]:
    """Yield the rows of encoder and decoder, of the KL and the tiny autoencoder, at the size of the KL's config."""
    for name, (kind, config) in (("KL", GEOMETRIES["sd15"].parts["vae"]), ("tiny", ("AutoencoderTiny", TAESD))):
        side = at_scale(GEOMETRIES["sd15"].parts["vae"][1], options.scale).sample_size
        config = at_scale(config, options.scale)
        part = component(kind, config, options.dtype)
        pixels = _normal((1, side, side, 3), options.dtype)
        latents = _normal((1, side // 8, side // 8, config.latent_channels), options.dtype)
        net = peers.network(part, options.dtype, str(options.peer)) if options.peer else None
        for method, array in (("encode", pixels), ("decode", latents)):
            function, arguments = _call(part, array, method=method)
            ours = program(f"{name} {method}", function, *arguments)

            def theirs(array: Any = array, method: str = method, net: Any = net, name: str = name) -> Row:
                tensor = peers.channels_first(array, options.dtype)
                return peers.row(f"diffusers, {name} {method}", lambda: getattr(net, method)(tensor))

            title, rows = _pair(f"{name} {method}, {side}x{side} pixels", ours, theirs if options.peer else None)
            yield title, rows + _quantized(ours, options.quantize.get("vae"), function, *arguments)


def texts(options: Options) -> Iterator[Titled]:
    """Yield the rows of a prompt's encoding by CLIP-L (77 tokens) and T5-XXL (256 tokens)."""
    kinds = (
        ("CLIP-L", "CLIPTextModel", GEOMETRIES["sd15"].parts["text_encoder"][1], 77),
        ("T5-XXL", "T5EncoderModel", T5_XXL, 256),
    )
    for name, kind, config, length in kinds:
        if name == "T5-XXL" and options.scale == "full" and jax.default_backend() == "cpu":
            continue  # 19 GiB in float32
        part = component(kind, at_scale(config, options.scale), options.dtype)
        ids = jnp.asarray(np.random.default_rng(0).integers(3, 1000, (1, length)), jnp.int32)
        function, arguments = _call(part, ids)
        ours = program(name, function, *arguments)

        def theirs(part: Component = part, ids: Any = ids, name: str = name) -> Row:
            net, tokens = peers.network(part, options.dtype, str(options.peer)), peers.tensor(ids)
            return peers.row(f"transformers, {name}", lambda: net(tokens))

        title, rows = _pair(f"{name}, {length} tokens", ours, theirs if options.peer else None)
        yield title, rows + _quantized(ours, options.quantize.get("text"), function, *arguments)
