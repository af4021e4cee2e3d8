"""One call of each network: UNets, MMDiTs, autoencoders, text encoders."""

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

# Case -> the geometries that it measures, or one of them: --model random-NAME.
MEASURED = {"unet": ("sd15", "sd-turbo", "sdxl"), "text-to-image": ("sd15", "sdxl", "sd3"), "training": ("sd15",)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a bench: the model that some cases take, precision, scale and peer."""

    model: str = "openmoji"
    dtype: str = "float32"
    scale: str = "full"
    peer: str | None = None
    batches: tuple[int, ...] = ()
    quantize: Mapping[str, str] = field(default_factory=dict, hash=False)  # part -> its kind of 8 bits, in rows beside
    side: int | None = None  # in pixels, of a stream; the model's own by default

    def geometries(self, case: str) -> tuple[str, ...]:
        """Of those of a case the ones asked for: one where the model is of random weights, all otherwise."""
        names = MEASURED[case]
        if not self.model.startswith(PREFIX):
            return names
        own = self.model.removeprefix(PREFIX)
        if own not in names:
            known = ", ".join(PREFIX + name for name in names)
            raise ValueError(f"--model {self.model}: bench {case} has {known}")
        return (own,)


def _normal(shape: tuple[int, ...], dtype: str) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def _call(part: Component, *arguments: Any, **how: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Function and arguments of a network's call."""

    def call(params: Params, *given: Any) -> Any:
        with precision_context(params) as own:
            return part.module.apply({"params": own}, *given, **how)

    return call, (part.params, *arguments)


def _pair(title: str, ours: Row, theirs: Callable[[], Row] | None) -> Titled:
    """The rows of a network, the peer's before ours."""
    if theirs is None:
        return title, [ours]
    peer = theirs()
    return title, [peer, replace(ours, against=peer.name)]


def _rounded(plain: Row, kind: str | None, function: Callable[..., Any], params: Params, *arguments: Any) -> list[Row]:
    """The row of the same network in 8 bits if that is asked for, and how far what it gives first is from the plain."""
    if kind is None:
        return []
    row = program(f"{plain.name}, {kind}", function, quantize(params, kind), *arguments)

    def error() -> str:
        near, true = (np.asarray(jax.tree.leaves(of.run())[0], np.float32) for of in (row, plain))
        return f"error {np.linalg.norm(near - true) / np.linalg.norm(true):.2g}"

    return [replace(row, against=plain.name, frames=plain.frames, note=error)]


def unets(options: Options) -> Iterator[Titled]:
    """A step of Stable Diffusion's UNets, without guidance."""
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
            pixels, own = peers.channels_first(x, options.dtype), {}
            for key, leaf in cond.items():
                own[key] = peers.tensor(leaf, options.dtype)
            words = own["context"]
            added = None if "pooled" not in own else {"text_embeds": own["pooled"], "time_ids": own["time_ids"]}
            return peers.row(
                f"diffusers, {name} UNet",
                lambda: net(pixels, 500, encoder_hidden_states=words, added_cond_kwargs=added, return_dict=False),
                frames=batch,
            )

        title, rows = _pair(f"{name} UNet, {batch} x latents {side}x{side}", ours, theirs if options.peer else None)
        yield title, rows + _rounded(ours, options.quantize.get("denoiser"), function, *arguments)


def mmdits(options: Options) -> Iterator[Titled]:
    """A step of the MMDiT: depths 12 and 24 of the paper's study at 256 x 256 pixels, SD3-medium at 1024."""
    rows = []
    for name, config in (("d12", family(12)), ("d24", family(24)), ("SD3-medium", SD3_MEDIUM)):
        config = at_scale(config, options.scale)
        part = component("SD3Transformer2DModel", config, options.dtype)
        side = config.sample_size
        x, t, cond = mmdit_inputs(config, size=(side, side), tokens=154)
        cond = {name: _normal(leaf.shape, options.dtype) for name, leaf in cond.items()}
        given = _normal(x.shape, options.dtype), t + 500.0, cond
        function, arguments = _call(part, *given)
        rows.append(program(f"MMDiT {name}, latents {side}x{side}", function, *arguments))
        rows += _rounded(rows[-1], options.quantize.get("denoiser"), function, *arguments)
    yield "MMDiT", rows


def autoencoders(options: Options) -> Iterator[Titled]:
    """Encoder and decoder, KL and tiny, at the size of the KL's config."""
    for name, (kind, config) in (("KL", GEOMETRIES["sd15"].parts["vae"]), ("tiny", ("AutoencoderTiny", TAESD))):
        side = at_scale(GEOMETRIES["sd15"].parts["vae"][1], options.scale).sample_size
        config = at_scale(config, options.scale)
        part = component(kind, config, options.dtype)
        pixels = _normal((1, side, side, 3), options.dtype)
        latents = _normal((1, side // 8, side // 8, config.latent_channels), options.dtype)
        net = peers.network(part, options.dtype, str(options.peer)) if options.peer else None
        for method, given in (("encode", pixels), ("decode", latents)):
            function, arguments = _call(part, given, method=method)
            ours = program(f"{name} {method}", function, *arguments)

            def theirs(given: Any = given, method: str = method, net: Any = net, name: str = name) -> Row:
                own = peers.channels_first(given, options.dtype)
                return peers.row(f"diffusers, {name} {method}", lambda: getattr(net, method)(own))

            title, rows = _pair(f"{name} {method}, {side}x{side} pixels", ours, theirs if options.peer else None)
            yield title, rows + _rounded(ours, options.quantize.get("vae"), function, *arguments)


def texts(options: Options) -> Iterator[Titled]:
    """A prompt through CLIP-L (77 tokens) and T5-XXL (256)."""
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
            net, own = peers.network(part, options.dtype, str(options.peer)), peers.tensor(ids)
            return peers.row(f"transformers, {name}", lambda: net(own))

        title, rows = _pair(f"{name}, {length} tokens", ours, theirs if options.peer else None)
        yield title, rows + _rounded(ours, options.quantize.get("text"), function, *arguments)
