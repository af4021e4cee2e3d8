"""The stream batch (StreamDiffusion, 2312.12491 section 3.1): n frames in flight, each one denoising step further.

A frame enters at t_0 and leaves n calls later at the clean end, and every call is one evaluation of n rows. Here a call
is a solver's step whose times are a row of the grid, so every solver with one evaluation a step streams: nothing below
knows LCM. `StreamProgram` is static; `Settings` and `State` are arrays, so that prompts, times, noise, guidance, mask
and weights change between two frames and nothing is compiled anew.

What is kept of a frame in flight is where it was, x, and what was believed of it there, not where it goes next: that is
decided by the times and the noise of the next call, and so a change of either reaches it without a flash.

Rows are ordered by step, then by frame: row i f + j is frame j of a buffer of f, at step i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.guidance import cfg, residual_cfg
from lcm_jax.diffusion.parameterization import add_noise, bind, expand
from lcm_jax.diffusion.samplers import Sampler
from lcm_jax.diffusion.schedules import floor_to_timestep
from lcm_jax.models.latent_diffusion import LatentDiffusion, Memory, as_apply
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.typing import Carry, Cond, Denoiser, Image, Key, Params, Prediction, Time

Frames = UInt8[Array, "f h w 3"]
Rows = Float[Array, " rows"]
KEPT_AWAY = 0.2  # of the first step, which motion never takes off a frame's noise


class Weights(NamedTuple):
    """The parameters of the denoiser and of the autoencoder."""

    net: Params
    vae: Params


class Settings(NamedTuple):
    """What may change between two frames.

    cond, null: of the prompt and of the negative prompt, one row. times: t_0 > ... > t_n, t_n where a picture is
    delivered. noise: unit noise, noise[0] of a frame that enters, noise[i] of its i-th step. mask: 1 where the frame
    is redrawn. virtual: what residual guidance adds to a frame's latents to have its negative (0: self-negative). scale
    and delta: of the guidance, the network's own if it has a w-embedding and `Program.guidance` is "none". renoise: 0
    leaves the noise of later steps out. fresh: 1 draws a new noise[0] for every frame. feedback: the share of the last
    picture in a frame. motion: how far motion takes a frame's first time down, in [0, 1].
    """

    cond: Cond
    null: Cond
    times: Float[Array, " n_plus_1"]
    noise: Float[Array, "n h w c"]
    mask: Float[Array, "h w 1"]
    virtual: Float[Array, "h w c"]
    scale: Float[Array, ""]
    delta: Float[Array, ""]
    renoise: Float[Array, ""]
    fresh: Float[Array, ""]
    feedback: Float[Array, ""]
    motion: Float[Array, ""]


class State(NamedTuple):
    """Frames in flight, n f rows each: the latents that entered, x at the time t and what was believed of it.

    latents: of the last pictures. moved: how much of late frames changed from one to the next, 0 to 1. memory: the
    tokens of the last call's self-attentions, rows by step. cold: nothing is in flight yet.
    """

    entered: Image
    x: Image
    t: Rows
    prediction: Prediction
    carry: Carry
    latents: Image
    moved: Float[Array, ""]
    memory: Mapping[str, Float[Array, "n f tokens c"]]
    key: Key
    calls: Int[Array, ""]
    cold: Bool[Array, ""]


@dataclass(frozen=True, kw_only=True)
class StreamProgram:
    """The static half of a stream.

    steps: n. frames: f, how many enter together. guidance: "none"; "full", classifier-free with two rows a frame;
    "residual", self-negative or onetime-negative by Settings.virtual. image: frames are redrawn; without, pictures come
    from noise. remember: self-attention sees the last call's tokens too (`generate.Memory`). narrow: whether
    the weights that it will be given are (`reading.low_precision`).
    """

    model: LatentDiffusion
    sampler: Sampler
    steps: int
    frames: int = 1
    guidance: str = "none"
    image: bool = True
    remember: bool = False
    low_precision: bool = False

    @property
    def copies(self) -> int:
        """Rows of the network for each row in flight."""
        return 2 if self.guidance == "full" else 1

    def init(self, weights: Weights, settings: Settings, key: Key) -> State:
        """A cold state; the call that warms it is `sequential`."""
        rows = (self.steps * self.frames, *settings.noise.shape[1:])

        def zeros() -> Image:  # each its own buffer, as the state is donated
            return jnp.zeros(rows, jnp.float32)

        t = jnp.broadcast_to(settings.times[0], rows[:1]).astype(jnp.float32)
        cold = jnp.ones((), bool)
        shapes = {}
        if self.remember:
            shapes = jax.eval_shape(self._predict, weights, settings, zeros(), t, {}, cold, zeros())[1]
        return State(
            entered=zeros(),
            x=zeros(),
            t=t,
            prediction=Prediction(zeros(), zeros()),
            carry=self.sampler.solver.init(zeros()),
            latents=zeros()[: self.frames],
            moved=jnp.zeros(()),
            memory={path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()},
            key=key,
            calls=jnp.zeros((), jnp.int32),
            cold=cold,
        )

    def step(self, weights: Weights, settings: Settings, state: State, frame: Frames) -> tuple[State, Frames]:
        """One frame in and the picture of the frame of n - 1 calls ago out, for one evaluation of n f rows."""
        f, last = self.frames, slice(0, -self.frames)
        entering, x, moved = self._enter(weights, settings, state, frame)
        starts, ends, noise = self._rows(settings, moved)
        entered = jnp.concatenate([entering, state.entered[last]])
        further, carry = self._move(*self._flying(state, last), starts[f:], noise[f:])
        x = self._keep(settings, jnp.concatenate([x, further]), entered, starts, noise)
        carry = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self.sampler.solver.init(x[:f]), carry)
        prediction, memory = self._predict(weights, settings, x, starts, state.memory, state.cold, entered)
        state = state._replace(entered=entered, x=x, t=starts, prediction=prediction, carry=carry, memory=memory)
        done, _ = self._move(*self._flying(state, slice(-f, None)), ends[-f:], jnp.zeros_like(x[-f:]))
        return self._finish(weights, settings, state, done, moved)

    def sequential(self, weights: Weights, settings: Settings, state: State, frame: Frames) -> tuple[State, Frames]:
        """One frame in and its own picture out, for n evaluations of f rows: the stream batch switched off.

        The state is that of a stream batch which had seen this frame n times: what a stream begins with.
        """
        n, f = self.steps, self.frames
        entering, x, moved = self._enter(weights, settings, state, frame)
        starts, ends, noise = (rows.reshape(n, f, *rows.shape[1:]) for rows in self._rows(settings, moved))
        then = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])

        def body(at: tuple[Image, Carry], inputs: Any) -> tuple[tuple[Image, Carry], Any]:
            (x, carry), (t, s, here, next_noise, memory) = at, inputs
            x = self._keep(settings, x, entering, t, here)
            past = jax.tree.map(lambda leaf: leaf[None], memory)
            prediction, memory = self._predict(weights, settings, x, t, past, state.cold, entering)
            seen = (x, prediction, carry, jax.tree.map(lambda leaf: leaf[0], memory))
            return self._move(prediction, x, t, carry, s, next_noise), seen

        scanned = (starts, ends, noise, then, state.memory)
        (done, _), (xs, prediction, carry, memory) = jax.lax.scan(body, (x, self.sampler.solver.init(x)), scanned)
        xs, prediction, carry = jax.tree.map(lambda leaf: leaf.reshape(n * f, *leaf.shape[2:]), (xs, prediction, carry))
        entered = jnp.concatenate([entering] * n)
        state = state._replace(entered=entered, x=xs, prediction=prediction, carry=carry, memory=memory)
        return self._finish(weights, settings, state._replace(t=starts.reshape(-1)), done, moved)

    def probe(self, weights: Weights, settings: Settings, state: State, frame: Frames) -> Float[Array, "h w c"]:
        """`Settings.virtual` of onetime-negative guidance: what the negative prompt makes of a frame, less itself."""
        entering, x, moved = self._enter(weights, settings, state, frame)
        t = self._rows(settings, moved)[0][: self.frames]
        denoise = self._bound(weights, settings.null, self.frames, 1.0, None)
        return jnp.mean(denoise(x, t).x0 - entering, axis=0)

    def _enter(
        self, weights: Weights, settings: Settings, state: State, frame: Frames
    ) -> tuple[Image, Image, Float[Array, ""]]:
        """Clean latents of the frame, x at the first time, and the motion that was seen."""
        schedule, f = self.model.schedule, self.frames
        new = jax.random.normal(jax.random.fold_in(state.key, state.calls), (f, *settings.noise.shape[1:]))
        noise = jnp.where(settings.fresh > 0.0, new, settings.noise[0])
        if not self.image:
            start = schedule.sigma(settings.times[0]) if self.sampler.spread_start else 1.0
            return jnp.zeros_like(noise), start * noise, jnp.zeros(())
        latents = self.model.encode(weights.vae, frame).astype(jnp.float32)
        warm = jnp.where(state.cold, 0.0, 1.0)
        latents = latents + warm * settings.feedback * (state.latents - latents)
        change = jnp.mean(jnp.abs(latents - state.entered[:f])) / (jnp.mean(jnp.abs(latents)) + 1e-6)
        moved = warm * 0.5 * (jnp.clip(change, 0.0, 1.0) + state.moved)
        return latents, add_noise(schedule, latents, noise, self._first(settings, moved)), moved

    def _first(self, settings: Settings, moved: Float[Array, ""]) -> Float[Array, ""]:
        """The first time of a frame: what moves is given less noise (StreamDiffusionV2's controller, 2511.07399)."""
        first, second = settings.times[0], settings.times[1]
        return floor_to_timestep(
            self.model.schedule, first - (1.0 - KEPT_AWAY) * settings.motion * moved * (first - second)
        )

    def _rows(self, settings: Settings, moved: Float[Array, ""]) -> tuple[Rows, Rows, Image]:
        """For n f rows: the times at which they are, to which they go, and the unit noise that took them there."""
        starts = jnp.concatenate([self._first(settings, moved)[None], settings.times[1:-1]])
        scales = jnp.ones(self.steps).at[1:].set(settings.renoise)
        noise = expand(scales, settings.noise) * settings.noise
        starts, ends, noise = (jnp.repeat(a, self.frames, axis=0) for a in (starts, settings.times[1:], noise))
        return starts, ends, noise

    def _keep(self, settings: Settings, x: Image, entered: Image, t: Time, noise: Image) -> Image:
        """Outside the mask, the frame itself at its time (`solvers.Inpaint`)."""
        if not self.image:
            return x
        return settings.mask * x + (1.0 - settings.mask) * add_noise(self.model.schedule, entered, noise, t)

    def _flying(self, state: State, rows: slice) -> tuple[Prediction, Image, Time, Carry]:
        """What is kept of some rows."""
        kept: tuple[Prediction, Image, Time, Carry]
        kept = jax.tree.map(lambda leaf: leaf[rows], (state.prediction, state.x, state.t, state.carry))
        return kept

    def _move(
        self, prediction: Prediction, x: Image, t: Time, carry: Carry, s: Time, noise: Image
    ) -> tuple[Image, Carry]:
        """The solver's step from t to s with what has been believed at t."""

        def denoise(*_: Any) -> Prediction:
            return prediction

        return self.sampler.solver.step(denoise, self.model.schedule, x, t, s, carry, noise)

    def _bound(self, weights: Weights, cond: Cond, rows: int, scale: Array | float, memory: Memory | None) -> Denoiser:
        """The network for so many rows, with a conditioning of one row or of as many."""
        own, cond_rows = self.model, jax.tree.map(lambda leaf: _repeat_row(leaf, rows), dict(cond))
        if own.embeds_guidance:
            cond_rows["guidance"] = jnp.broadcast_to(jnp.asarray(scale, jnp.float32) - 1.0, (rows,))
        return bind(
            as_apply(own.net, memory=memory), weights.net, cond_rows, own.schedule, own.kind, spans=own.embeds_span
        )

    def _predict(
        self,
        weights: Weights,
        settings: Settings,
        x: Image,
        t: Time,
        past: Mapping[str, Array],
        cold: Array | bool,
        entered: Image,
    ) -> tuple[Prediction, Mapping[str, Array]]:
        """The guided prediction of all rows, and what self-attention saw, (n, copies f, tokens, c)."""
        own, rows, n = self.model, x.shape[0], x.shape[0] // self.frames

        def by_copy(leaf: Array) -> Array:
            """(n, copies f, ...) to the network's rows, of which those of one copy are together."""
            leaf = leaf.reshape(n, self.copies, self.frames, *leaf.shape[2:])
            return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[3:])

        def by_step(leaf: Array) -> Array:
            leaf = leaf.reshape(self.copies, n, self.frames, *leaf.shape[1:])
            return leaf.swapaxes(0, 1).reshape(n, self.copies * self.frames, *leaf.shape[3:])

        memory = Memory(past=jax.tree.map(by_copy, dict(past)), cold=cold) if self.remember else None
        if self.guidance == "full":
            both = jax.tree.map(
                lambda *leaves: jnp.concatenate([_repeat_row(leaf, rows) for leaf in leaves]),
                dict(settings.null),
                dict(settings.cond),
            )
            strength = 1.0 + settings.delta * (settings.scale - 1.0)
            denoise = cfg(self._bound(weights, both, 2 * rows, 1.0, memory), strength)
        else:
            told = settings.scale if self.guidance == "none" else 1.0
            denoise = self._bound(weights, settings.cond, rows, told, memory)
        if self.guidance == "residual":
            virtual = entered + settings.virtual
            denoise = residual_cfg(denoise, virtual, settings.scale, schedule=own.schedule, delta=settings.delta)
        if self.sampler.consistency:
            denoise = consistency(denoise, own.schedule)
        prediction = denoise(x, t)
        return prediction, {} if memory is None else jax.tree.map(by_step, dict(memory.seen))

    def _finish(
        self, weights: Weights, settings: Settings, state: State, done: Image, moved: Float[Array, ""]
    ) -> tuple[State, Frames]:
        """Pictures of the rows that have arrived."""
        latents = done
        if self.image:
            latents = settings.mask * done + (1.0 - settings.mask) * state.entered[-self.frames :]
        picture = self.model.decode(weights.vae, latents)
        cold = jnp.zeros((), bool)
        return state._replace(latents=latents, moved=moved, calls=state.calls + 1, cold=cold), picture


def _repeat_row(leaf: Array, rows: int) -> Array:
    """A leaf of one row for each of so many."""
    return jnp.broadcast_to(leaf, (rows, *leaf.shape[1:]))


@functools.cache
def compiled(program: StreamProgram, method: str) -> Callable[..., tuple[tuple[State, ...], tuple[Frames, ...]]]:
    """`Program.step` or `.sequential` of several streams as one call: (weights, settings, states, frames), tuples.

    Their rows are one batch of the network. Compiled once for each number of streams; the states are donated.
    """
    single = getattr(program, method)

    def run(
        weights: Weights, settings: tuple[Settings, ...], states: tuple[State, ...], frames: tuple[Frames, ...]
    ) -> tuple[tuple[State, ...], tuple[Frames, ...]]:
        if len(states) == 1:
            state, picture = single(weights, settings[0], states[0], frames[0])
            return (state,), (picture,)
        stacked = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (settings, states, frames))
        out = jax.vmap(single, in_axes=(None, 0, 0, 0))(weights, *stacked)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(states))]
        return tuple(state for state, _ in each), tuple(picture for _, picture in each)

    return jax.jit(run, donate_argnums=2, compiler_options=compiler_options(low_precision=program.low_precision))


@functools.cache
def probing(program: StreamProgram) -> Callable[..., Float[Array, "h w c"]]:
    """`Program.probe`, compiled."""
    return jax.jit(program.probe, compiler_options=compiler_options(low_precision=program.low_precision))
