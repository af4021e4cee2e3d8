"""`Stream`: frames in, pictures out, every control live; and how the frames of several streams share one call."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image as PILImage

from lcm_jax.diffusion.samplers import SAMPLERS, get_sampler
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.lora import Adapters, merge_all
from lcm_jax.models.image_inputs import latent_mask
from lcm_jax.precision.context import is_low_precision
from lcm_jax.stream.controls import Controls, blended_noise
from lcm_jax.stream.prompt_cache import PromptCache
from lcm_jax.stream.similarity import SimilarityFilter
from lcm_jax.stream.step import Settings, State, StreamProgram, Weights, compiled, probing
from lcm_jax.typing import Array, Cond, Params

Picture = UInt8[np.ndarray, "*f h w 3"]


class Job(NamedTuple):
    """A call that one stream is ready for."""

    program: StreamProgram
    method: str
    weights: Weights
    settings: Settings
    state: State
    frame: Array

    @property
    def group(self) -> Hashable:
        """Jobs of one group can share a call."""
        return self.program, self.method, id(self.weights.net), self.frame.shape


def run(jobs: Sequence[Job]) -> list[tuple[State, Array]]:
    """The next state and the pictures, still on the device, of every job; those of a group in as few calls as may be.

    A call holds 1, 2, 4, 8, ... streams, so that few numbers are ever compiled.
    """
    done: dict[int, tuple[State, Array]] = {}
    groups: dict[Hashable, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.group, []).append(i)
    for members in groups.values():
        while members:
            now, members = _power(members)
            first = jobs[now[0]]
            trees = zip(*((jobs[i].settings, jobs[i].state, jobs[i].frame) for i in now), strict=True)
            states, pictures = compiled(first.program, first.method)(first.weights, *trees)
            done |= dict(zip(now, zip(states, pictures, strict=True), strict=True))
    return [done[i] for i in range(len(jobs))]


def _power(members: list[int]) -> tuple[list[int], list[int]]:
    """The largest power of two of them, and the rest."""
    n = 1 << (len(members).bit_length() - 1)
    return members[:n], members[n:]


class Stream:
    """A pipeline that redraws frames one after another.

    stream = Stream(pipe, "a cat", steps=2, strength=0.6, guidance="self", scale=1.4)
    picture = stream(frame)          # the frame of n - 1 calls ago, redrawn
    stream.set(prompt="a dog", travel=10)
    for picture in stream.map(frames): ...       # one for each, in order

    size: (height, width) in pixels, the pipeline's own by default; frames of other sizes are cropped to its shape and
    scaled. frames: a buffer of several frames enters at once, (f, h, w, 3). image: False draws from noise, `stream()`.
    loras: adapters by name, for the control `lora`. controls: see `Controls`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        prompt: Any = "",
        *,
        size: tuple[int, int] | None = None,
        frames: int = 1,
        image: bool = True,
        sampler: str = "lcm",
        loras: Mapping[str, Mapping[str, Adapters]] | None = None,
        **controls: Any,
    ) -> None:
        if not get_sampler(sampler).streams:
            streaming = ", ".join(name for name, spec in SAMPLERS.items() if spec.streams)
            raise ValueError(f"sampler {sampler!r} does not stream: use one of {streaming}")
        if frames < 1:
            raise ValueError(f"frames is {frames}: it must be at least 1")
        self.pipe, self.size, self.frames, self.image = pipe, pipe.check_size(size), frames, image
        self._sampler, self.loras = get_sampler(sampler), {}
        for name, adapters in (loras or {}).items():
            others = set(adapters) - {pipe.folder.denoiser}
            if others:
                raise ValueError(f"lora {name!r}: a stream changes the {pipe.folder.denoiser} alone, not {min(others)}")
            self.loras[name] = adapters[pipe.folder.denoiser]
        self.controls = Controls().changed(prompt=prompt, **controls)
        self.check(self.controls)
        self._prompts = PromptCache(pipe, self.size)
        self.filter: SimilarityFilter | None = None
        self.program: StreamProgram
        self._settings: Settings
        self.probes = 0  # extra evaluations, one at a change of prompt with "onetime"
        self._apply(None)
        self.reset()

    def set(self, **changes: Any) -> None:
        """Change controls from the next frame on; all of them, or none if one is wrong. mask: see `set_mask`."""
        controls = self.controls.changed(**changes)
        self.check(controls)
        before, self.controls = self.controls, controls
        if controls != before:
            self._apply(before)

    def set_mask(self, mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"] | None) -> None:
        """Redraw only where it is white (128 and above) or true; None redraws everything."""
        height, width, _ = self._latent_shape
        white = jnp.ones((height, width, 1))
        if mask is not None:
            white = latent_mask(mask, self.size, 1, self.pipe.model.vae.config.downsample_factor)[0]
        self._settings = self._settings._replace(mask=white)
        self._forget()

    def reset(self) -> None:
        """Forget the frames in flight and the last picture; the next frame's own picture is the first to come out."""
        key = jax.random.key(self.controls.seeds[0][0])
        self._state: State | None = self.program.init(self._weights, self._settings, key)
        self._cold = True
        self._pictures: Array | None = None  # the last ones, on the device
        self._probed = False
        self._forget()

    def __call__(self, frame: Picture | None = None) -> Picture:
        """The next picture, uint8 of `size`: of the frame of `in_flight` calls ago, or the last one again if the filter
        finds nothing new. frame: (h, w, 3), or (f, h, w, 3) with a buffer of frames."""
        job = self.prepare(frame)
        if job is not None:
            return self.finish(*run([job])[0])
        assert self.picture is not None
        return self.picture

    def prepare(self, frame: Picture | None = None) -> Job | None:
        """What has to be run for a frame, by `run`, and given to `finish` before the next; None if nothing."""
        pixels = self._fit(frame)
        if self._left:
            self._forget()  # on the way to another prompt no scene is still
        if self.filter is not None and self.filter.skip(pixels, self.in_flight):
            return None
        device = jnp.asarray(pixels.reshape(self.frames, *self.size, 3))
        self._travel()
        if self._state is None:
            raise RuntimeError("the last frame is not finished")
        if self.controls.guidance == "onetime" and not self._probed:
            virtual = probing(self.program)(self._weights, self._settings, self._state, device)
            self._settings, self._probed = self._settings._replace(virtual=virtual), True
            self.probes += 1
        sequential = self._cold or not self.controls.batch or self.program.steps == 1
        state, self._state = self._state, None  # it is donated
        method = "sequential" if sequential else "step"
        return Job(self.program, method, self._weights, self._settings, state, device)

    def finish(self, state: State, pictures: Array) -> Picture:
        """Take what `run` gave for `prepare`'s job, and wait for its picture."""
        self._take(state, pictures)
        assert self.picture is not None
        return self.picture

    def _take(self, state: State, pictures: Array) -> None:
        self._state, self._cold, self._pictures = state, False, pictures
        pictures.copy_to_host_async()

    @property
    def picture(self) -> Picture | None:
        """The last one, if there has been one."""
        return None if self._pictures is None else self._on_host(self._pictures)

    def _on_host(self, pictures: Array) -> Picture:
        return np.asarray(pictures)[0] if self.frames == 1 else np.asarray(pictures)

    def rehearsals(self) -> list[Job]:
        """The jobs that `prepare` may give with these controls, on states of their own: to be compiled beforehand."""
        methods = ["sequential", "step"] if self.controls.batch and self.program.steps > 1 else ["sequential"]
        frame = jnp.zeros((self.frames, *self.size, 3), jnp.uint8)
        states = [self.program.init(self._weights, self._settings, jax.random.key(0)) for _ in methods]
        return [
            Job(self.program, method, self._weights, self._settings, state, frame)
            for method, state in zip(methods, states, strict=True)
        ]

    def map(self, frames: Iterable[Picture], *, ahead: int = 0) -> Iterator[Picture]:
        """Exactly one picture for each frame, in order, those in flight at the end included.

        ahead: how many calls are sent to the device before the picture of the first of them is waited for.
        """
        flight: deque[bool] = deque()  # whether a picture is still owed for each frame in flight, the oldest first
        drawn: deque[tuple[Array, int]] = deque()  # pictures not waited for yet, and for how many frames they stand
        last: Picture | None = None

        def call(frame: Picture, owed: bool) -> None:
            nonlocal flight
            job = self.prepare(frame)
            if job is None:  # what is in flight is as this is: all of them get the picture that there is
                count, flight = sum(flight) + owed, deque([False] * len(flight))
            else:
                self._take(*run([job])[0])
                if job.method == "sequential":  # its own picture; what is in flight, if anything, are copies of it
                    count, flight = int(owed), deque([False] * self.in_flight)
                else:
                    flight.append(owed)
                    count = int(flight.popleft())
            assert self._pictures is not None
            drawn.append((self._pictures, count))

        def ready(waiting: int) -> Iterator[Picture]:
            while len(drawn) > waiting:
                pictures, count = drawn.popleft()
                if count:
                    yield from [self._on_host(pictures)] * count

        for last in frames:
            call(last, True)
            yield from ready(ahead)
        while last is not None and any(flight):
            self._forget()
            call(last, False)
            yield from ready(ahead)
        yield from ready(0)

    def check(self, controls: Controls) -> None:
        """ValueError for controls that this pipeline and its adapters cannot follow."""
        times = controls.times(self._sampler, self.pipe.model.schedule, self.pipe.spacing)
        self.pipe.model.check_start(float(times[0]))
        for name, _ in controls.lora:
            if name not in self.loras:
                known = ", ".join(self.loras) or "none"
                raise ValueError(f"lora {name!r:.80} is unknown: this stream was made with {known}")
        if not self.image and controls.guidance in ("self", "onetime") and controls.steps == 1:
            raise ValueError(f"guidance {controls.guidance!r} needs a frame, or more than one step from noise")

    @property
    def in_flight(self) -> int:
        """Calls between that of a frame and that which gives its picture."""
        return self.program.steps - 1 if self.controls.batch else 0

    @property
    def encoded(self) -> int:
        """How many texts have been encoded."""
        return self._prompts.encoded

    @cached_property
    def _latent_shape(self) -> tuple[int, int, int]:
        config = self.pipe.model.vae.config
        height, width = (side // config.downsample_factor for side in self.size)
        return height, width, config.latent_channels

    def _apply(self, before: Controls | None) -> None:
        """Bring program, weights and settings up to the controls; what has not changed is left alone."""
        now = self.controls

        def new(*names: str) -> bool:
            return before is None or any(getattr(before, name) != getattr(now, name) for name in names)

        if new("lora"):
            self._weights = self._merged(now)
        net = self._weights.net
        texts = new("prompt", "blend", "lora")
        if texts:
            self._target: Cond = self._prompts(net, now.prompts, now.blend)
        if before is None:
            self._settings = self._first_settings()
        if texts:
            travel = 0 if before is None or new("lora") else now.travel
            self._left, self._from, self._length = travel, self._settings.cond, travel
            if travel == 0:
                self._settings = self._settings._replace(cond=self._target)
        needed = now.guidance in ("full", "onetime")
        if needed and new("negative_prompt", "guidance", "lora"):
            self._settings = self._settings._replace(null=self._prompts.negative(net, now.negative_prompt))
        if new("prompt", "negative_prompt", "guidance", "lora", "blend"):
            self._probed = False
            if now.guidance != "onetime":
                self._settings = self._settings._replace(virtual=jnp.zeros(self._latent_shape))
        if new("seed", "steps", "t_index"):
            shape = (now.steps, *self._latent_shape)
            self._settings = self._settings._replace(
                noise=blended_noise(lambda seed: _noise(np.uint32(seed), shape), now.seeds)
            )
        times = now.times(self._sampler, self.pipe.model.schedule, self.pipe.spacing)
        numbers = {name: jnp.float32(getattr(now, name)) for name in ("scale", "delta", "feedback", "motion", "fresh")}
        self._settings = self._settings._replace(
            times=jnp.asarray(times), renoise=jnp.float32(now.add_noise), **numbers
        )
        if new("similarity", "max_skips"):
            old, self.filter = self.filter, None
            if now.similarity is not None:
                self.filter = SimilarityFilter(threshold=now.similarity, max_skips=now.max_skips)
                if old is not None:
                    self.filter.drawn, self.filter.skipped = old.drawn, old.skipped
        program = StreamProgram(
            model=self.pipe.model,
            sampler=self._sampler.at(now.steps, self.pipe.spacing),
            steps=now.steps,
            frames=self.frames,
            guidance={"self": "residual", "onetime": "residual"}.get(now.guidance, now.guidance),
            image=self.image,
            remember=now.remember,
            low_precision=is_low_precision(*self._weights),
        )
        another, self.program = before is None or program != self.program, program
        if before is not None and another:
            pictures = self._pictures
            self.reset()
            self._pictures = pictures
        self._forget()

    def _first_settings(self) -> Settings:
        height, width, channels = self._latent_shape
        zero = jnp.zeros(())
        return Settings(
            cond=self._target,
            null=self._target,
            times=jnp.zeros(2),
            noise=jnp.zeros((1, height, width, channels)),
            mask=jnp.ones((height, width, 1)),
            virtual=jnp.zeros((height, width, channels)),
            scale=zero,
            delta=zero,
            renoise=zero,
            fresh=zero,
            feedback=zero,
            motion=zero,
        )

    def _forget(self) -> None:
        if self.filter is not None:
            self.filter.forget()

    def _travel(self) -> None:
        """One frame further from the old prompt to the new one."""
        if self._left > 0:
            self._left -= 1
            share = jnp.float32(1.0 - self._left / self._length)
            self._settings = self._settings._replace(cond=_between(self._from, self._target, share))

    def _merged(self, controls: Controls) -> Weights:
        """The parameters with the adapters."""
        net, scales = self.pipe.net_params, dict(controls.lora)
        if self.loras:
            net = _merge(net, [(own, jnp.float32(scales.get(name, 0.0))) for name, own in self.loras.items()])
        return Weights(net, self.pipe.params["vae"])

    def _fit(self, frame: Picture | None) -> Picture:
        """The frame in the stream's size; of a stream from noise, zeros that nothing looks at."""
        shape = (self.frames, *self.size, 3) if self.frames > 1 else (*self.size, 3)
        if frame is None:
            if self.image:
                raise ValueError("this stream redraws frames: give it one")
            return np.zeros(shape, np.uint8)
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != len(shape) or frame.shape[-1] != 3:
            raise ValueError(f"frame: expected uint8 {shape}, got {frame.dtype} {frame.shape}")
        if frame.ndim == 4 and len(frame) != self.frames:
            raise ValueError(f"frame: {len(frame)} frames for a buffer of {self.frames}")
        if frame.shape == shape:
            return frame
        return fit(frame, self.size) if frame.ndim == 3 else np.stack([fit(one, self.size) for one in frame])


def fit(frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The largest middle part of a frame that has the shape of `size` (height, width), scaled to it."""
    height, width = frame.shape[:2]
    ratio = min(height / size[0], width / size[1])
    tall, wide = max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)
    top, left = (height - tall) // 2, (width - wide) // 2
    part = np.ascontiguousarray(frame[top : top + tall, left : left + wide])
    return np.asarray(PILImage.fromarray(part).resize((size[1], size[0]), PILImage.Resampling.BILINEAR))


@partial(jax.jit, static_argnames="shape")
def _noise(seed: Array, shape: tuple[int, ...]) -> Float[Array, "n h w c"]:
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def _between(a: Cond, b: Cond, share: Array) -> Cond:
    return jax.tree.map(lambda x, y: ((1.0 - share) * x + share * y).astype(y.dtype), a, b)


@jax.jit
def _merge(params: Params, parts: Sequence[tuple[Adapters, Array]]) -> Params:
    return merge_all(params, parts)
