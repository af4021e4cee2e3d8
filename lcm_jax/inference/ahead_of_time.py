"""A pipeline's program in a file: traced ahead of time, and run without tracing a network again.

The file is a zip archive of header.json and program.bin, StableHLO as `jax.export` writes it: versioned, without
weights, and no pickle. The machine code that XLA makes of it is in the compilation cache (`lcm_jax.runtime.cache`), so
that where the file was made it starts at once, and on another machine after XLA's own time.

A program is native code once it is compiled, so run those of people you trust. What can be checked is: a program that
would call code outside of itself (on the host, or a library's) is refused, and it must take and return what the model
does. How long it runs and how much memory it takes is in the hands of who made it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
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
from lcm_jax.inference.call_options import GUIDANCE, whole_number
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.models.text_conditioning import Ids, pair_texts
from lcm_jax.precision.context import is_low_precision
from lcm_jax.runtime.atomic_files import written_aside
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.runtime.config_values import check_config, check_values
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.messages import shortened, shown
from lcm_jax.runtime.progress import phase
from lcm_jax.typing import Array, Params
from mmdit.attention import lowering_for
from mmdit.text import zero_prompt
from vae16 import portable

VERSION = 1
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # and as jax.export names them
_MOST_HEADER = 2**16  # bytes
_MOST_PROGRAM = 2**28  # bytes; that of SDXL has a few million
_BYTECODE = b"ML\xefR"  # begins a module in MLIR's binary form, in which the names of operations are plain text
# The operations that reach out of a program. Of the calls of other code these alone are known: the random numbers of
# NVIDIA's and AMD's devices, and a kernel for the TPU, which runs there and not on the host.
_REACHING_OUT = re.compile(r"custom_call|\b(?:infeed|outfeed|send|recv)\b")
_KNOWN_CALL = re.compile(r"stablehlo\.custom_call @(?:cu_threefry2x32_ffi|hip_threefry2x32_ffi|tpu_custom_call)\(")
_MAY_REACH_OUT = re.compile(rb"custom_call|infeed|outfeed|send_v|recv_v")


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
    grid: tuple[Array, ...]  # a `Grid`
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
    sampler: str | None = None,
    guidance: float | None = None,
    platform: str | None = None,
) -> Header:
    """Write the program that draws `batch` images of `size`, and compile it if it is for this machine.

    sampler, guidance: the model's own for None (`Pipeline.settings`); the program takes any scale but 1, which is a
    program of its own, without guidance. platform: "cpu", "gpu" or "tpu", which need not be at hand; this machine's by
    default. ValueError for an unknown sampler or platform, or for a model with a part in 8 bits.

    >>> import lcm_jax
    >>> from pathlib import Path
    >>> from lcm_jax.inference.ahead_of_time import Exported, write_program
    >>> pipe = lcm_jax.load("openmoji")
    >>> header = write_program(pipe, Path("heart.program"))  # doctest: +SKIP
    >>> Exported(pipe, Path("heart.program"))("red heart").shape  # doctest: +SKIP
    (1, 64, 64, 3)
    """
    pipe.plain("a compiled program")
    _, guidance, chosen = pipe.settings(guidance=guidance, sampler=sampler)
    name = sampler_name(str(chosen))
    if whole_number("batch", batch) < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    here = jax.default_backend()
    platform = platform or here
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r} is unknown; known are {', '.join(PLATFORMS)}")
    if platform == here:
        pipe.check_memory(pipe.check_size(size), batch)
    header = Header(
        jax=jax.__version__,
        platform=platform,
        device=jax.devices()[0].device_kind if platform == here else "",
        model=digest(pipe),
        size=pipe.check_size(size),
        batch=batch,
        sampler=name,
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

    ValueError where the program is for another model, platform, device or version of JAX, takes or returns something
    else than it says, or calls other code.
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
                    f"{path} was compiled for {name} {shortened(recorded, 20)}, and this is {shortened(value, 20)}: "
                    "run lcm-jax compile again"
                )
        try:
            self._exported = _checked(export.deserialize(bytearray(body)), pipe, self.header)
        except Exception as error:  # of any type: the file's bytes lead through flatbuffers, pytrees and MLIR
            raise _unreadable(path, error) from error

    @cached_property
    def _run(self) -> Callable[..., Array]:
        return _compilable(self._exported)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        num_images: int = 1,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Return images as `Pipeline.__call__` draws them, of header.batch prompts with their num_images.

        steps: None is the sampler's usual number. guidance: None is the model's own, 1 where the program has none.
        ValueError for another number of images, or for guidance where the program has none.
        """
        header = self.header
        prompts, negatives = pair_texts(prompt, negative_prompt, whole_number("num_images", num_images))
        if guidance is None:
            guidance = GUIDANCE if header.guided or self.pipe.model.embeds_guidance else 1.0
        steps, guidance, _ = self.pipe.settings(steps=steps, guidance=guidance, sampler=header.sampler)
        seed = whole_number("seed", seed, 0, 2**32 - 1)
        if len(prompts) != header.batch:
            raise ValueError(f"{self.path} draws {header.batch} pictures in a call, and this asks for {len(prompts)}")
        if not self.pipe.model.embeds_guidance and header.guided != (guidance != 1.0):
            made = "with guidance" if header.guided else "without guidance"
            raise ValueError(f"{self.path} was compiled {made}, and this asks for a scale of {guidance:g}")
        empty = None if negative_prompt is None or negative_prompt == "" else negatives
        call = _call(self.pipe, header, prompts, empty, steps=steps, guidance=guidance, seed=seed)
        with phase("loading the compiled program"):
            pictures = self._run(_parameters(self.pipe), _leaves(call))
        with phase(f"drawing in {steps} steps"):
            return np.asarray(pictures)


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
    if pipe.prompt_syntax is not None or pipe.clip_skip is not None:
        raise ValueError("prompt_syntax and clip_skip are no options of a compiled program: leave them out")
    spec = get_sampler(header.sampler)
    walked = pipe.walk(pipe.model, spec.configured(pipe.spacing, pipe.model.kind), steps, pipe.spacing, 1.0)
    texts = pipe.folder.prompts
    return Call(
        ids=texts.tokenize(prompts),
        negative=texts.tokenize(negatives or [""] * len(prompts)),
        empty=jnp.asarray(negatives is None),
        grid=pad(walked),  # type: ignore[arg-type]
        noise_sigma=jnp.float32(spec.init_noise_sigma(pipe.model.schedule, walked.times, pipe.spacing)),
        guidance=jnp.float32(guidance),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def _leaves(call: Call) -> tuple[Any, ...]:
    """Return the call as tuples, which every version of jax.export can write."""
    return tuple(call._replace(grid=tuple(call.grid)))


def _program(pipe: Pipeline, header: Header) -> Callable[[dict[str, Params], tuple[Any, ...]], Array]:
    """Return the function (parameters, `Call`) -> uint8 (b, h, w, 3) that does what `Pipeline.__call__` does."""
    model, texts, net = pipe.model, pipe.folder.prompts, pipe.folder.denoiser
    sizes = pipe.size_conditioning(header.size)
    sampler = get_sampler(header.sampler).configured(pipe.spacing, model.kind)

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


def _checked(exported: export.Exported, pipe: Pipeline, header: Header) -> export.Exported:
    """Return the program; ValueError unless it takes and returns what the model does, on its own and one device."""
    call = _call(pipe, header, [""] * header.batch, None, steps=4, guidance=1.0, seed=0)
    arguments = jax.eval_shape(lambda *trees: trees, _parameters(pipe), _leaves(call))
    pictures = jax.ShapeDtypeStruct((header.batch, *header.size, 3), jnp.uint8)
    in_tree: Any = exported.in_tree
    out_tree: Any = exported.out_tree
    if in_tree != jax.tree.structure((arguments, {})) or _types(exported.in_avals) != _types(
        jax.tree.leaves(arguments)
    ):
        raise ValueError("it takes other arguments than the model's")
    if out_tree != jax.tree.structure(pictures) or _types(exported.out_avals) != _types([pictures]):
        raise ValueError("it does not return pictures of the size it says")
    if exported.platforms != (PLATFORMS[header.platform],) or exported.nr_devices != 1:
        raise ValueError("it is for other devices than it says")
    module = bytes(exported.mlir_module_serialized)
    if exported.ordered_effects or exported.unordered_effects or not module.startswith(_BYTECODE):
        raise ValueError("it does more than compute")
    if _MAY_REACH_OUT.search(module):
        text = exported.mlir_module()
        for match in _REACHING_OUT.finditer(text):
            begin = match.start() - len("stablehlo.")
            if not _KNOWN_CALL.match(text, begin):
                raise ValueError(f"it calls code outside of itself: {shown(text[begin : match.end() + 40])}")
    return exported


def _types(avals: Sequence[Any]) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(aval.shape), str(aval.dtype)) for aval in avals]


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = shortened(" ".join(str(error).split()) or type(error).__name__, 200)
    return ValueError(f"{path}: no file of lcm-jax compile that can be read ({reason}); make it again")


def _read(path: Path) -> tuple[Header, bytes]:
    """Read a program's file. ValueError if truncated or of another version, FileNotFoundError if absent."""
    with path.open("rb") as file:  # what is wrong with the path itself is an OSError that says so
        try:
            with zipfile.ZipFile(file) as archive:
                fields = parse_json(_member(archive, "header.json", _MOST_HEADER))
                body = _member(archive, "program.bin", _MOST_PROGRAM)
            header = _header(fields)
            if hashlib.sha256(body).hexdigest() != header.program:
                raise ValueError("its program is damaged")
        except Exception as error:  # zipfile's own are of many types
            raise _unreadable(path, error) from None
    return header, body


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Return a file of an archive that is compressed as `write_program` does; nothing longer than `most` bytes."""
    info = archive.getinfo(name)
    if info.file_size > most:  # zipfile reads no further than this number says
        raise ValueError(f"its {name} would have {info.file_size} bytes, at most {most} are allowed")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its {name} is compressed in a way that lcm-jax does not use")
    return archive.read(info)


def _header(fields: Any) -> Header:
    """Return the description in a header.json; ValueError for another version or a value that a field cannot have."""
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        version = fields.get("version") if isinstance(fields, dict) else None
        raise ValueError(f"it has the version {shown(version)}, and this reads {VERSION}")
    check_values(Header, fields, "its header")
    header = Header(**fields | {"size": tuple(fields["size"])})
    check_config(header, "its header")
    if header.platform not in PLATFORMS:
        raise ValueError(f"its platform {shown(header.platform)} is unknown")
    get_sampler(header.sampler)
    return header
