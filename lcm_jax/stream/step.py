"""The stream batch (StreamDiffusion, 2312.12491 section 3.1): n frames in flight, each one denoising step further.

A frame enters at t_0, and its picture leaves with the n-th call, clean; every call evaluates the network once, on a
batch of n. Here a call is one step of a solver, at all n times of the grid at once. So every solver with one evaluation
a step can stream, and nothing below is specific to LCM. `StreamProgram` is static; `Settings` and `State` are arrays,
so that prompts, times, noise, guidance, mask and weights may change between two frames without a compilation.

The state of a frame in flight is its last x_t and the prediction at it, not its next x: that one depends on the times
and the noise of the next call, so that a change of these takes effect without a flash.

The batch is ordered by step, then by frame: row i f + j is frame j of a buffer of f frames, at step i.
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

Frames = UInt8[Array, "f h2 w2 3"]
Rows = Float[Array, " rows"]
MIN_FIRST_STEP_SHARE = 0.2  # share of the step from t_0 to t_1 that motion never takes off a frame's first time


class Weights(NamedTuple):
    """The parameters of the denoiser and of the autoencoder."""

    net: Params
    vae: Params


class Settings(NamedTuple):
    """The arrays that may change between two frames.

    cond, null: conditioning of the prompt and of the negative prompt, one row each. times: t_0 > ... > t_n; the picture
    leaves at t_n. noise: unit noise, noise[0] for a frame that enters, noise[i] for its i-th step. mask: 1 where the
    frame is redrawn. virtual: latents that RCFG adds to the frame's own for the negative: 0 for self-negative, the
    result of `StreamProgram.probe` for onetime-negative. scale, delta: of the guidance; the scale is an input of the
    network if that has a w-embedding and `StreamProgram.guidance` is "none". renoise: 0 leaves out the noise of later
    steps. fresh: 1 draws a new noise[0] for every frame. feedback: share of the last picture in a frame. motion: in
    [0, 1], how much motion lowers a frame's first time.
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
    """The frames in flight, a batch of n f: their clean latents `entered`, and their x at times t with its prediction.

    latents: those of the last pictures. moved: how much recent frames changed from one to the next, in [0, 1]. memory:
    the tokens of the last call's self-attentions, by layer and step. calls: their number. cold: nothing is in flight.
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
    """The static part of a stream; a change of it is a new compilation.

    steps: n, the frames in flight of a stream batch. frames: f, how many enter together. guidance: "none"; "full",
    classifier-free guidance with two rows of the network for each frame; "residual", residual classifier-free guidance
    (RCFG, StreamDiffusion section 3.2), self-negative or onetime-negative by `Settings.virtual`. image: True redraws
    frames, False draws pictures from noise. remember: self-attention sees the last call's tokens too
    (`attention_hooks.Memory`). low_precision: of the weights it is called with (`context.is_low_precision`).
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
        """The rows of the network for each frame in flight: 2 with classifier-free guidance."""
        return 2 if self.guidance == "full" else 1

    def init(self, weights: Weights, settings: Settings, key: Key) -> State:
        """Return a cold state, with which `sequential` has to be called first."""
        shape = (self.steps * self.frames, *settings.noise.shape[1:])

        def zeros() -> Image:  # a new buffer for each field, as the state is donated
            return jnp.zeros(shape, jnp.float32)

        t = jnp.broadcast_to(settings.times[0], shape[:1]).astype(jnp.float32)
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
        """Take a frame and return the picture of the one from n - 1 calls ago: one evaluation, on a batch of n f.

        frame: uint8 (f, h, w, 3), as the picture that is returned with the next state.
        """
        f, last = self.frames, slice(0, -self.frames)
        entering, x, moved = self._enter(weights, settings, state, frame)
        starts, ends, noise = self._times_and_noise(settings, moved)
        entered = jnp.concatenate([entering, state.entered[last]])
        further, carry = self._solver_step(*self._in_flight(state, last), starts[f:], noise[f:])
        x = self._inpaint(settings, jnp.concatenate([x, further]), entered, starts, noise)
        carry = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self.sampler.solver.init(x[:f]), carry)
        prediction, memory = self._predict(weights, settings, x, starts, state.memory, state.cold, entered)
        state = state._replace(entered=entered, x=x, t=starts, prediction=prediction, carry=carry, memory=memory)
        done, _ = self._solver_step(*self._in_flight(state, slice(-f, None)), ends[-f:], jnp.zeros_like(x[-f:]))
        return self._finish(weights, settings, state, done, moved)

    def sequential(self, weights: Weights, settings: Settings, state: State, frame: Frames) -> tuple[State, Frames]:
        """Take a frame and return its own picture: n evaluations on a batch of f, without the stream batch.

        The next state is that of a stream batch which was given this frame n times; a stream begins with it.
        """
        n, f = self.steps, self.frames
        entering, x, moved = self._enter(weights, settings, state, frame)
        starts, ends, noise = (a.reshape(n, f, *a.shape[1:]) for a in self._times_and_noise(settings, moved))
        next_noises = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])

        def body(current: tuple[Image, Carry], inputs: Any) -> tuple[tuple[Image, Carry], Any]:
            (x, carry), (t, s, step_noise, next_noise, memory) = current, inputs
            x = self._inpaint(settings, x, entering, t, step_noise)
            past = jax.tree.map(lambda leaf: leaf[None], memory)
            prediction, memory = self._predict(weights, settings, x, t, past, state.cold, entering)
            outputs = (x, prediction, carry, jax.tree.map(lambda leaf: leaf[0], memory))
            return self._solver_step(prediction, x, t, carry, s, next_noise), outputs

        scanned = (starts, ends, noise, next_noises, state.memory)
        (done, _), (xs, prediction, carry, memory) = jax.lax.scan(body, (x, self.sampler.solver.init(x)), scanned)
        xs, prediction, carry = jax.tree.map(lambda leaf: leaf.reshape(n * f, *leaf.shape[2:]), (xs, prediction, carry))
        entered = jnp.concatenate([entering] * n)
        state = state._replace(entered=entered, x=xs, prediction=prediction, carry=carry, memory=memory)
        return self._finish(weights, settings, state._replace(t=starts.reshape(-1)), done, moved)

    def probe(self, weights: Weights, settings: Settings, state: State, frame: Frames) -> Float[Array, "h w c"]:
        """Return `Settings.virtual` for onetime-negative RCFG: the negative prompt's x0, minus the frame's latents."""
        entering, x, moved = self._enter(weights, settings, state, frame)
        t = self._times_and_noise(settings, moved)[0][: self.frames]
        denoise = self._denoiser(weights, settings.null, self.frames, 1.0, None)
        return jnp.mean(denoise(x, t).x0 - entering, axis=0)

    def _enter(
        self, weights: Weights, settings: Settings, state: State, frame: Frames
    ) -> tuple[Image, Image, Float[Array, ""]]:
        """Return the clean latents of the frame, its x at the first time, and the motion up to it."""
        schedule, f = self.model.schedule, self.frames
        new_noise = jax.random.normal(jax.random.fold_in(state.key, state.calls), (f, *settings.noise.shape[1:]))
        noise = jnp.where(settings.fresh > 0.0, new_noise, settings.noise[0])
        if not self.image:
            start = schedule.sigma(settings.times[0]) if self.sampler.spread_start else 1.0
            return jnp.zeros_like(noise), start * noise, jnp.zeros(())
        latents = self.model.encode(weights.vae, frame).astype(jnp.float32)
        warm = jnp.where(state.cold, 0.0, 1.0)
        latents = latents + warm * settings.feedback * (state.latents - latents)
        change = jnp.mean(jnp.abs(latents - state.entered[:f])) / (jnp.mean(jnp.abs(latents)) + 1e-6)
        moved = warm * 0.5 * (jnp.clip(change, 0.0, 1.0) + state.moved)
        return latents, add_noise(schedule, latents, noise, self._first_time(settings, moved)), moved

    def _first_time(self, settings: Settings, moved: Float[Array, ""]) -> Float[Array, ""]:
        """Return the first time of a frame: moving ones get less noise (StreamDiffusionV2's controller, 2511.07399)."""
        first, second = settings.times[0], settings.times[1]
        return floor_to_timestep(
            self.model.schedule, first - (1.0 - MIN_FIRST_STEP_SHARE) * settings.motion * moved * (first - second)
        )

    def _times_and_noise(self, settings: Settings, moved: Float[Array, ""]) -> tuple[Rows, Rows, Image]:
        """Return, for the batch of n f, the times it is at, the times it goes to, and the unit noise of its x."""
        starts = jnp.concatenate([self._first_time(settings, moved)[None], settings.times[1:-1]])
        scales = jnp.ones(self.steps).at[1:].set(settings.renoise)
        noise = expand(scales, settings.noise) * settings.noise
        starts, ends, noise = (jnp.repeat(a, self.frames, axis=0) for a in (starts, settings.times[1:], noise))
        return starts, ends, noise

    def _inpaint(self, settings: Settings, x: Image, entered: Image, t: Time, noise: Image) -> Image:
        """Replace x outside the mask by the frame with noise at its time (`solvers.Inpaint`)."""
        if not self.image:
            return x
        return settings.mask * x + (1.0 - settings.mask) * add_noise(self.model.schedule, entered, noise, t)

    def _in_flight(self, state: State, part: slice) -> tuple[Prediction, Image, Time, Carry]:
        """Return a part of the batch in flight, as `_solver_step` takes it."""
        sliced: tuple[Prediction, Image, Time, Carry]
        sliced = jax.tree.map(lambda leaf: leaf[part], (state.prediction, state.x, state.t, state.carry))
        return sliced

    def _solver_step(
        self, prediction: Prediction, x: Image, t: Time, carry: Carry, s: Time, noise: Image
    ) -> tuple[Image, Carry]:
        """Take the solver's step from t to s with the prediction at t."""

        def denoise(*_: Any) -> Prediction:
            return prediction

        return self.sampler.solver.step(denoise, self.model.schedule, x, t, s, carry, noise)

    def _denoiser(
        self, weights: Weights, cond: Cond, batch_size: int, scale: Array | float, memory: Memory | None
    ) -> Denoiser:
        """Return the network's denoiser for a batch, with a conditioning of one row or of `batch_size`."""
        model, batch_cond = self.model, jax.tree.map(lambda leaf: _repeat_row(leaf, batch_size), dict(cond))
        if model.embeds_guidance:
            batch_cond["guidance"] = jnp.broadcast_to(jnp.asarray(scale, jnp.float32) - 1.0, (batch_size,))
        apply = as_apply(model.net, memory=memory)
        return bind(apply, weights.net, batch_cond, model.schedule, model.kind, spans=model.embeds_span)

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
        """Return the guided prediction of the batch, and its self-attentions' tokens, (n, copies f, tokens, c)."""
        model, batch_size, n = self.model, x.shape[0], x.shape[0] // self.frames

        def by_copy(leaf: Array) -> Array:
            """Reorder (n, copies f, ...) as the network's batch, (copies n f, ...)."""
            leaf = leaf.reshape(n, self.copies, self.frames, *leaf.shape[2:])
            return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[3:])

        def by_step(leaf: Array) -> Array:
            """Reorder the network's batch, (copies n f, ...), as (n, copies f, ...)."""
            leaf = leaf.reshape(self.copies, n, self.frames, *leaf.shape[1:])
            return leaf.swapaxes(0, 1).reshape(n, self.copies * self.frames, *leaf.shape[3:])

        memory = Memory(past=jax.tree.map(by_copy, dict(past)), cold=cold) if self.remember else None
        if self.guidance == "full":
            both = jax.tree.map(
                lambda *leaves: jnp.concatenate([_repeat_row(leaf, batch_size) for leaf in leaves]),
                dict(settings.null),
                dict(settings.cond),
            )
            strength = 1.0 + settings.delta * (settings.scale - 1.0)
            denoise = cfg(self._denoiser(weights, both, 2 * batch_size, 1.0, memory), strength)
        else:
            embedded_scale = settings.scale if self.guidance == "none" else 1.0
            denoise = self._denoiser(weights, settings.cond, batch_size, embedded_scale, memory)
        if self.guidance == "residual":  # RCFG: self-negative where settings.virtual is 0, else onetime-negative
            virtual = entered + settings.virtual
            denoise = residual_cfg(denoise, virtual, settings.scale, schedule=model.schedule, delta=settings.delta)
        if self.sampler.consistency:
            denoise = consistency(denoise, model.schedule)
        prediction = denoise(x, t)
        return prediction, {} if memory is None else jax.tree.map(by_step, dict(memory.tokens))

    def _finish(
        self, weights: Weights, settings: Settings, state: State, done: Image, moved: Float[Array, ""]
    ) -> tuple[State, Frames]:
        """Decode the frames that are done, and return the next state with their pictures."""
        latents = done
        if self.image:
            latents = settings.mask * done + (1.0 - settings.mask) * state.entered[-self.frames :]
        picture = self.model.decode(weights.vae, latents)
        cold = jnp.zeros((), bool)
        return state._replace(latents=latents, moved=moved, calls=state.calls + 1, cold=cold), picture


def _repeat_row(leaf: Array, batch_size: int) -> Array:
    """Repeat a leaf of one row `batch_size` times."""
    return jnp.broadcast_to(leaf, (batch_size, *leaf.shape[1:]))


@functools.cache
def compiled(program: StreamProgram, method: str) -> Callable[..., tuple[tuple[State, ...], tuple[Frames, ...]]]:
    """Return `program.step` or `.sequential`, compiled for several streams at once.

    method: "step" or "sequential". The function takes (weights, settings, states, frames), the last three tuples with
    an item for each stream, and returns a tuple of states and one of pictures. The streams share the network's batch;
    each number of streams is compiled once. The states are donated.
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
        per_stream = [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(states))]
        return tuple(state for state, _ in per_stream), tuple(picture for _, picture in per_stream)

    return jax.jit(run, donate_argnums=2, compiler_options=compiler_options(low_precision=program.low_precision))


@functools.cache
def compiled_probe(program: StreamProgram) -> Callable[..., Float[Array, "h w c"]]:
    """Return `program.probe`, compiled."""
    return jax.jit(program.probe, compiler_options=compiler_options(low_precision=program.low_precision))


def release(program: StreamProgram) -> None:
    """Free what was compiled for a program; it is compiled anew when it is used again."""
    functions: tuple[Any, ...] = compiled(program, "step"), compiled(program, "sequential"), compiled_probe(program)
    for function in functions:
        function.clear_cache()
