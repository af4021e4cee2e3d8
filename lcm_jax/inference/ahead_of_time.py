"""A pipeline's program in a file: traced ahead of time, and run without tracing a network again.

The file is a zip archive of header.json and program.bin, StableHLO as `jax.export` writes it: versioned, without
weights, and no pickle. The machine code that XLA makes of it is in the compilation cache (`lcm_jax.runtime.cache`), so
that where the file was made it starts at once, and on another machine after XLA's own time.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import UInt8

from lcm_jax.diffusion.samplers import get_sampler, sampler_name
from lcm_jax.diffusion.time_grids import Grid, pad
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.models.text_conditioning import Ids, pair_texts
from lcm_jax.precision.context import is_low_precision
from lcm_jax.runtime.atomic_files import written_aside
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.typing import Array, Params
from mmdit.attention import lowering_for
from mmdit.text import zero_prompt
from vae16 import portable

VERSION = 1
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # and as jax.export names them
_MOST_HEADER = 2**16  # bytes


@dataclass(frozen=True, kw_only=True)
class Header:
    """The description of a program in its file.

    jax: the version of JAX that wrote it. device: its kind, "" for any of the platform. model: the model's `digest`.
    size: (height, width) in pixels. batch: images of a call. guided: it runs classifier-free guidance. program: SHA-256
    of program.bin.

    >>> from lcm_jax.inference.ahead_of_time import Header
    >>> target = {"jax": "0.10.2", "platform": "cpu", "device": "", "model": "0123"}
    >>> Header(**target, size=(64, 64), batch=1, sampler="lcm", guided=False).version
    1
    """

    version: int = VERSION
    jax: str
    platform: str
    device: str
    model: str
    size: tuple[int, int]
    batch: int
    sampler: str
    guided: bool
    program: str = ""


class Call(NamedTuple):
    """The arguments of a program beside the parameters: (parameters, call) -> uint8 (b, h, w, 3)."""

    ids: Ids  # prompts, for each encoder
    negative: Ids
    empty: Array  # () bool, whether there is no negative prompt
    grid: tuple[Array, Array]  # a `Grid`
    noise_sigma: Array  # () factor of the unit noise
    guidance: Array  # ()
    key: Array  # (2,) words of the noise's key


def digest(pipe: Pipeline) -> str:
    """Return the SHA-256 of all that a model's program depends on: shapes and dtypes of the weights, not their values.

    >>> import lcm_jax
    >>> from lcm_jax.inference.ahead_of_time import digest
    >>> len(digest(lcm_jax.load("openmoji")))
    64
    """
    leaves = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(_parameters(pipe))
    ]
    modules = {name: repr(pipe.component(name).module) for name in _parameters(pipe)}
    return hashlib.sha256(repr((leaves, modules, pipe.model.schedule, pipe.spacing)).encode()).hexdigest()


def write_program(
    pipe: Pipeline,
    path: Path,
    *,
    size: Sequence[int] | None = None,
    batch: int = 1,
    sampler: str = "lcm",
    guidance: float = 1.0,
    platform: str | None = None,
) -> Header:
    """Write the program that draws `batch` images of `size`, and compile it if it is for this machine.

    guidance: the program takes any scale but 1, which is a program of its own, without guidance. platform: "cpu", "gpu"
    or "tpu", which need not be at hand; this machine's by default. ValueError for an unknown sampler or platform, or
    for a model with a part in 8 bits.

    >>> import lcm_jax
    >>> from pathlib import Path
    >>> from lcm_jax.inference.ahead_of_time import Exported, write_program
    >>> pipe = lcm_jax.load("openmoji")
    >>> header = write_program(pipe, Path("heart.program"))  # doctest: +SKIP
    >>> Exported(pipe, Path("heart.program"))("red heart").shape  # doctest: +SKIP
    (1, 64, 64, 3)
    """
    pipe.plain("a compiled program")
    sampler = sampler_name(sampler)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    here = jax.default_backend()
    platform = platform or here
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r} is unknown; known are {', '.join(PLATFORMS)}")
    header = Header(
        jax=jax.__version__,
        platform=platform,
        device=jax.devices()[0].device_kind if platform == here else "",
        model=digest(pipe),
        size=pipe.check_size(size),
        batch=batch,
        sampler=sampler,
        guided=guidance != 1.0 and not pipe.model.embeds_guidance,
    )
    call = _call(pipe, header, [""] * batch, None, steps=4, guidance=guidance, seed=0)
    shapes = jax.eval_shape(lambda *trees: trees, _parameters(pipe), _leaves(call))
    with lowering_for(platform), portable():
        exported = export.export(jax.jit(_program(pipe, header)), platforms=[PLATFORMS[platform]])(*shapes)
    body = bytes(exported.serialize())
    written = asdict(header) | {"program": hashlib.sha256(body).hexdigest()}
    with written_aside(path) as (aside,), zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(written, indent=2))
        archive.writestr("program.bin", body)
    if platform == here:
        _compilable(exported).lower(*shapes).compile()
    return header


class Exported:
    """A pipeline that draws with a program of `write_program`, without tracing a network.

    >>> import lcm_jax
    >>> from pathlib import Path
    >>> from lcm_jax.inference.ahead_of_time import Exported
    >>> Exported(lcm_jax.load("openmoji"), Path("absent.program"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: ...

    ValueError where the program is for another model, platform, device or version of JAX.
    """

    def __init__(self, pipe: Pipeline, path: Path) -> None:
        self.pipe, self.path = pipe, path
        self.header, body = _read(path)
        device = jax.devices()[0]
        here = {
            "jax": jax.__version__,
            "platform": device.platform,
            "device": device.device_kind,
            "model": digest(pipe),
        }
        for name, value in here.items():
            recorded = getattr(self.header, name)
            if recorded not in (value, "" if name == "device" else value):
                raise ValueError(
                    f"{path} was compiled for {name} {recorded:.20}, and this is {value:.20}: run lcm-jax compile again"
                )
        self._body = body

    @cached_property
    def _run(self) -> Callable[..., Array]:
        return _compilable(export.deserialize(bytearray(self._body)))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 4,
        guidance: float = 1.0,
        seed: int = 0,
        num_images: int = 1,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Return images as `Pipeline.__call__` draws them, of header.batch prompts with their num_images.

        ValueError for another number of images, or for guidance where the program has none.
        """
        header = self.header
        prompts, negatives = pair_texts(prompt, negative_prompt, num_images)
        if len(prompts) != header.batch:
            raise ValueError(f"{self.path} draws {header.batch} pictures in a call, and this asks for {len(prompts)}")
        if not self.pipe.model.embeds_guidance and header.guided != (guidance != 1.0):
            made = "with guidance" if header.guided else "without guidance"
            raise ValueError(f"{self.path} was compiled {made}, and this asks for a scale of {guidance:g}")
        empty = None if negative_prompt == "" else negatives
        call = _call(self.pipe, header, prompts, empty, steps=steps, guidance=guidance, seed=seed)
        return np.asarray(self._run(_parameters(self.pipe), _leaves(call)))


def _parameters(pipe: Pipeline) -> dict[str, Params]:
    return {name: pipe.params[name] for name in (pipe.folder.denoiser, "vae", *pipe.folder.prompts.modules)}


def _call(
    pipe: Pipeline,
    header: Header,
    prompts: list[str],
    negatives: list[str] | None,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Call:
    spec = get_sampler(header.sampler)
    if spec.at(steps, pipe.spacing) != spec.at(4, pipe.spacing):
        raise ValueError(
            f"sampler {header.sampler}: {steps} steps need another program than a file holds; sample without"
        )
    times = pipe.times(pipe.model, spec, steps, pipe.spacing, 1.0)
    texts = pipe.folder.prompts
    return Call(
        ids=texts.tokenize(prompts),
        negative=texts.tokenize(negatives or [""] * len(prompts)),
        empty=jnp.asarray(negatives is None),
        grid=pad(times),
        noise_sigma=jnp.float32(spec.init_noise_sigma(pipe.model.schedule, times, pipe.spacing)),
        guidance=jnp.float32(guidance),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def _leaves(call: Call) -> tuple[Any, ...]:
    """Return the call as tuples, which every version of jax.export can write."""
    return tuple(call._replace(grid=tuple(call.grid)))  # type: ignore[arg-type]


def _program(pipe: Pipeline, header: Header) -> Callable[[dict[str, Params], tuple[Any, ...]], Array]:
    """Return the function (parameters, `Call`) -> uint8 (b, h, w, 3) that does what `Pipeline.__call__` does."""
    model, texts, net = pipe.model, pipe.folder.prompts, pipe.folder.denoiser
    sampler, sizes = get_sampler(header.sampler).at(4, pipe.spacing), pipe.size_conditioning(header.size)

    def encode(params: dict[str, Params], ids: Ids, size: Any) -> dict[str, Array]:
        rows = None if size is None else jnp.tile(jnp.asarray(size, jnp.float32), (header.batch, 1))
        return texts.encode(params, ids, rows)

    def draw(params: dict[str, Params], given: tuple[Any, ...]) -> Array:
        call = Call(*given)
        noise_key, key = jax.random.split(jax.random.wrap_key_data(call.key))
        x = pipe.noise(noise_key, header.batch, header.size) * call.noise_sigma
        cond = null = encode(params, call.ids, sizes[0])
        if header.guided:
            null = encode(params, call.negative, sizes[1])
            if pipe.folder.zeros_for_empty_prompt:
                null = jax.tree.map(lambda zero, leaf: jnp.where(call.empty, zero, leaf), zero_prompt(null), null)
        parts = (params[net], cond, null, x, Grid(*call.grid), call.guidance, key)
        return model.decode(params["vae"], model.latents(*parts, sampler=sampler, guided=header.guided))

    return draw


def _compilable(exported: export.Exported) -> Any:
    return jax.jit(exported.call, compiler_options=compiler_options(low_precision=is_low_precision(exported.in_avals)))


def _read(path: Path) -> tuple[Header, bytes]:
    """Read a program's file. ValueError if truncated or of another version, FileNotFoundError if absent."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("header.json").file_size > _MOST_HEADER:
                raise ValueError("its header is too long")
            fields, body = json.loads(archive.read("header.json")), archive.read("program.bin")
        if fields.get("version") != VERSION:
            raise ValueError(f"it has the version {fields.get('version')}, and this reads {VERSION}")
        header = Header(**fields | {"size": tuple(fields["size"])})
        if hashlib.sha256(body).hexdigest() != header.program:
            raise ValueError("its program is damaged")
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no file of lcm-jax compile that can be read ({error}); make it again") from None
    return header, body
