"""`Stream`, which redraws frames while its controls change, and `run`, which lets several streams share one call."""

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
from lcm_jax.inference.prompt_conditioning import check_prompts
from lcm_jax.lora import Adapters, merge_all
from lcm_jax.models.image_inputs import latent_mask
from lcm_jax.precision.context import is_low_precision
from lcm_jax.runtime.progress import progress as progress_of
from lcm_jax.stream.controls import Controls, blended_noise
from lcm_jax.stream.prompt_cache import PromptCache
from lcm_jax.stream.similarity import SimilarityFilter
from lcm_jax.stream.step import Settings, State, StreamProgram, Weights, compiled, compiled_probe
from lcm_jax.typing import Array, Cond, Params

Frame = UInt8[np.ndarray, "*f h2 w2 3"]  # of any size
Picture = UInt8[np.ndarray, "*f h w 3"]  # of the stream's size


class Job(NamedTuple):
    """One call that a stream is ready for.

    method: of the program, "step" or "sequential". frame: uint8 (f, h, w, 3), on the device.
    """

    program: StreamProgram
    method: str
    weights: Weights
    settings: Settings
    state: State
    frame: Array

    @property
    def group(self) -> Hashable:
        """The key of the jobs that can share a call."""
        return self.program, self.method, id(self.weights.net), self.frame.shape


def run(jobs: Sequence[Job]) -> list[tuple[State, Array]]:
    """Run jobs, those of a group in as few calls as possible, and return (next state, pictures) of each.

    The pictures are still on the device. A call takes 1, 2, 4, 8, ... streams, so that few sizes are compiled.
    """
    done: dict[int, tuple[State, Array]] = {}
    groups: dict[Hashable, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.group, []).append(i)
    for members in groups.values():
        while members:
            together, members = _power(members)
            first = jobs[together[0]]
            trees = zip(*((jobs[i].settings, jobs[i].state, jobs[i].frame) for i in together), strict=True)
            states, pictures = compiled(first.program, first.method)(first.weights, *trees)
            done |= dict(zip(together, zip(states, pictures, strict=True), strict=True))
    return [done[i] for i in range(len(jobs))]


def _power(members: list[int]) -> tuple[list[int], list[int]]:
    """Split off as many members as the largest power of two holds."""
    n = 1 << (len(members).bit_length() - 1)
    return members[:n], members[n:]


class Stream:
    """A pipeline that redraws frames one after another, with the stream batch and RCFG of StreamDiffusion (2312.12491).

    size: (height, width) in pixels, the pipeline's own by default; frames of other sizes are cropped to its shape and
    scaled. frames: f, a buffer of several frames that enter together, (f, h, w, 3). image: False draws pictures from
    noise, with `stream()`. sampler: one with a single evaluation a step. loras: adapters by name, for the control
    `lora`. controls: see `Controls`. Raise ValueError for a control or an option that the pipeline cannot follow.

    >>> import lcm_jax
    >>> from lcm_jax.stream import Stream
    >>> pipe = lcm_jax.load("openmoji")  # doctest: +SKIP
    >>> stream = Stream(pipe, "cat face", steps=2, guidance="self", scale=1.4)  # doctest: +SKIP
    >>> picture = stream(frame)  # of the frame from n - 1 calls ago, uint8 (h, w, 3)  # doctest: +SKIP
    >>> stream.set(prompt="dog face", travel=10)  # doctest: +SKIP
    >>> pictures = list(stream.map(frames))  # one for each frame, in order  # doctest: +SKIP
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
        pipe.check_memory(self.size)
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
        """Change controls from the next frame on. Raise ValueError, and change none, if one is wrong.

        The mask is changed by `set_mask`.
        """
        controls = self.controls.changed(**changes)
        self.check(controls)
        before, self.controls = self.controls, controls
        if controls != before:
            self._apply(before)

    def set_mask(self, mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"] | None) -> None:
        """Redraw only where the mask is white (128 and above) or true; None redraws everything."""
        height, width, _ = self._latent_shape
        white = jnp.ones((height, width, 1))
        if mask is not None:
            white = latent_mask(mask, self.size, 1, self.pipe.model.vae.config.downsample_factor)[0]
        self._settings = self._settings._replace(mask=white)
        self._forget()

    def reset(self) -> None:
        """Discard the frames in flight and the last picture; the next call returns the picture of its own frame."""
        key = jax.random.key(self.controls.seeds[0][0])
        self._state: State | None = self.program.init(self._weights, self._settings, key)
        self._cold = True
        self._pictures: Array | None = None  # the last ones, on the device
        self._probed = False
        self._forget()

    def __call__(self, frame: Frame | None = None) -> Picture:
        """Return the picture of the frame from `in_flight` calls ago, or the last one again if the filter skips this.

        frame: uint8 (h, w, 3), or (f, h, w, 3) with a buffer of f frames; None in a stream from noise. The picture is
        uint8 of `size`. Raise ValueError for a frame of another kind.
        """
        job = self.prepare(frame)
        if job is not None:
            return self.finish(*run([job])[0])
        assert self.picture is not None
        return self.picture

    def prepare(self, frame: Frame | None = None) -> Job | None:
        """Return the job of a frame, None if the filter skips it.

        Its result by `run` has to be given to `finish` before the next frame. Raise RuntimeError if it was not.
        """
        pixels = self._fit(frame)
        if self._left:
            self._forget()  # while the prompt changes, a still scene is drawn again too
        if self.filter is not None and self.filter.skip(pixels, self.in_flight):
            return None
        device = jnp.asarray(pixels.reshape(self.frames, *self.size, 3))
        self._travel()
        if self._state is None:
            raise RuntimeError("the last frame is not finished: give the result of its job to `finish` first")
        if self.controls.guidance == "onetime" and not self._probed:
            virtual = compiled_probe(self.program)(self._weights, self._settings, self._state, device)
            self._settings, self._probed = self._settings._replace(virtual=virtual), True
            self.probes += 1
        sequential = self._cold or not self.controls.batch or self.program.steps == 1
        state, self._state = self._state, None  # it is donated
        method = "sequential" if sequential else "step"
        return Job(self.program, method, self._weights, self._settings, state, device)

    def finish(self, state: State, pictures: Array) -> Picture:
        """Take the result of `prepare`'s job by `run`, wait for its picture, and return it."""
        self._take(state, pictures)
        assert self.picture is not None
        return self.picture

    def _take(self, state: State, pictures: Array) -> None:
        self._state, self._cold, self._pictures = state, False, pictures
        pictures.copy_to_host_async()

    @property
    def picture(self) -> Picture | None:
        """The last picture, None before the first."""
        return None if self._pictures is None else self._on_host(self._pictures)

    def _on_host(self, pictures: Array) -> Picture:
        return np.asarray(pictures)[0] if self.frames == 1 else np.asarray(pictures)

    def rehearsals(self) -> list[Job]:
        """Return the jobs that `prepare` may return with these controls, on new states, to compile them beforehand."""
        methods = ["sequential", "step"] if self.controls.batch and self.program.steps > 1 else ["sequential"]
        frame = jnp.asarray(np.zeros((self.frames, *self.size, 3), np.uint8))  # from the host, as a real one
        states = [self.program.init(self._weights, self._settings, jax.random.key(0)) for _ in methods]
        return [
            Job(self.program, method, self._weights, self._settings, state, frame)
            for method, state in zip(methods, states, strict=True)
        ]

    def rehearse(self, *, progress: bool = False) -> int:
        """Compile every program that these controls may use, so that no frame waits for one, and return their number.

        Each is run once on a state of its own; the frames in flight and all counts stay as they are. progress: show
        the phase "compiling" on stderr.
        """
        jobs, probes = self.rehearsals(), int(self.controls.guidance == "onetime")
        with progress_of(len(jobs) + probes, "compiling", "program", disable=not progress) as bar:
            if probes:
                first = jobs[0]
                probe = compiled_probe(first.program)
                jax.block_until_ready(probe(first.weights, first.settings, first.state, first.frame))
                bar.update()
            for job in jobs:
                jax.block_until_ready(run([job]))
                bar.update()
        return len(jobs) + probes

    def map(self, frames: Iterable[Frame], *, ahead: int = 0) -> Iterator[Picture]:
        """Yield exactly one picture for each frame, in order, those in flight at the end included.

        ahead: calls that are sent to the device before the picture of the first of them is waited for.
        """
        flight: deque[bool] = deque()  # of each frame in flight, oldest first: whether it still needs a picture
        drawn: deque[tuple[Array, int]] = deque()  # pictures not waited for yet, and the number of their frames
        last: Frame | None = None

        def call(frame: Frame, owed: bool) -> None:
            nonlocal flight
            job = self.prepare(frame)
            if job is None:  # the frames in flight look like this one: all of them get the last picture
                count, flight = sum(flight) + owed, deque([False] * len(flight))
            else:
                self._take(*run([job])[0])
                if job.method == "sequential":  # the frame's own picture; those in flight are copies of it
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
        """Raise ValueError if this pipeline and its adapters cannot follow some controls."""
        times = controls.times(self._sampler, self.pipe.model.schedule, self.pipe.spacing)
        self.pipe.model.check_start(float(times[0]))
        texts = [controls.negative_prompt, *(text for text, _ in controls.prompts)]
        check_prompts(texts, self.pipe.prompt_syntax, None)
        for name, _ in controls.loras:
            if name not in self.loras:
                known = ", ".join(self.loras) or "none"
                raise ValueError(f"lora {name!r:.80} is unknown: this stream was made with {known}")
        if not self.image and controls.guidance in ("self", "onetime") and controls.steps == 1:
            raise ValueError(f"guidance {controls.guidance!r} needs a frame, or more than one step from noise")

    @property
    def in_flight(self) -> int:
        """The calls between the one that takes a frame and the one that returns its picture: n - 1, or 0."""
        return self.program.steps - 1 if self.controls.batch else 0

    @property
    def encoded(self) -> int:
        """The number of times a text encoder has run."""
        return self._prompts.encoded

    @cached_property
    def _latent_shape(self) -> tuple[int, int, int]:
        config = self.pipe.model.vae.config
        height, width = (side // config.downsample_factor for side in self.size)
        return height, width, config.latent_channels

    def _apply(self, before: Controls | None) -> None:
        """Update program, weights and settings for the controls that differ from `before`; None updates all."""
        now = self.controls

        def changed(*names: str) -> bool:
            return before is None or any(getattr(before, name) != getattr(now, name) for name in names)

        if changed("lora"):
            self._weights = self._merged(now)
        net = self._weights.net
        text_changed = changed("prompt", "blend", "lora")
        if text_changed:
            self._target: Cond = self._prompts(net, now.prompts, now.blend)
        if before is None:
            self._settings = self._first_settings()
        if text_changed:
            travel = 0 if before is None or changed("lora") else now.travel
            self._left, self._from, self._length = travel, self._settings.cond, travel
            if travel == 0:
                self._settings = self._settings._replace(cond=self._target)
        needs_negative = now.guidance in ("full", "onetime")
        if needs_negative and changed("negative_prompt", "guidance", "lora"):
            self._settings = self._settings._replace(null=self._prompts.negative(net, now.negative_prompt))
        if changed("prompt", "negative_prompt", "guidance", "lora", "blend"):
            self._probed = False
            if now.guidance != "onetime":  # virtual 0 is self-negative RCFG
                self._settings = self._settings._replace(virtual=jnp.zeros(self._latent_shape))
        if changed("seed", "steps", "t_index"):
            shape = (now.steps, *self._latent_shape)
            self._settings = self._settings._replace(
                noise=blended_noise(lambda seed: _noise(np.uint32(seed), shape), now.seeds)
            )
        times = now.times(self._sampler, self.pipe.model.schedule, self.pipe.spacing)
        numbers = {name: jnp.float32(getattr(now, name)) for name in ("scale", "delta", "feedback", "motion", "fresh")}
        self._settings = self._settings._replace(
            times=jnp.asarray(times), renoise=jnp.float32(now.add_noise), **numbers
        )
        if changed("similarity", "max_skips"):
            old, self.filter = self.filter, None
            if now.similarity is not None:
                self.filter = SimilarityFilter(threshold=now.similarity, max_skips=now.max_skips)
                if old is not None:
                    self.filter.drawn, self.filter.skipped = old.drawn, old.skipped
        program = StreamProgram(
            model=self.pipe.model,
            sampler=self._sampler.configured(self.pipe.spacing, self.pipe.model.kind),
            steps=now.steps,
            frames=self.frames,
            guidance={"self": "residual", "onetime": "residual"}.get(now.guidance, now.guidance),
            image=self.image,
            remember=now.remember,
            low_precision=is_low_precision(*self._weights),
        )
        program_changed, self.program = before is None or program != self.program, program
        if before is not None and program_changed:
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
        """Go one frame further from the old prompt to the new one."""
        if self._left > 0:
            self._left -= 1
            share = jnp.float32(1.0 - self._left / self._length)
            self._settings = self._settings._replace(cond=_between(self._from, self._target, share))

    def _merged(self, controls: Controls) -> Weights:
        """Return the parameters with the adapters merged in."""
        net, scales = self.pipe.net_params, dict(controls.loras)
        if self.loras:
            net = _merge(net, [(adapters, jnp.float32(scales.get(name, 0.0))) for name, adapters in self.loras.items()])
        return Weights(net, self.pipe.params["vae"])

    def _fit(self, frame: Frame | None) -> Picture:
        """Return the frame in the stream's size; for a stream from noise, zeros that are not used."""
        shape = (self.frames, *self.size, 3) if self.frames > 1 else (*self.size, 3)
        if frame is None:
            if self.image:
                raise ValueError("this stream redraws frames: give it one")
            return np.zeros(shape, np.uint8)
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != len(shape) or frame.shape[-1] != 3:
            raise ValueError(f"frame: expected uint8 {shape}, got {frame.dtype} {frame.shape}")
        if frame.ndim == 4 and len(frame) != self.frames:
            raise ValueError(f"frame: {len(frame)} frames given, and this stream takes {self.frames} at once")
        if frame.shape == shape:
            return frame
        return fit(frame, self.size) if frame.ndim == 3 else np.stack([fit(single, self.size) for single in frame])


def fit(frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return the largest middle part of a frame that has the shape of `size` (height, width), scaled to it.

    >>> import numpy as np
    >>> fit(np.zeros((20, 60, 3), np.uint8), (16, 16)).shape
    (16, 16, 3)
    """
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
