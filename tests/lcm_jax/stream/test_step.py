"""The stream batch against StreamDiffusion's equations, written out frame by frame in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.stream import Settings, State, StreamProgram, Weights
from lcm_jax.stream.step import compiled, compiled_probe

Model = Any  # of conftest: generator, weights, cond, null

TIMES = {1: (559,), 2: (679, 359), 3: (799, 499, 199), 4: (999, 679, 359, 99)}
MODES = ("none", "full", "self", "onetime")
GAMMA = 1.7


class Reference:
    """One frame after another in numpy; networks are functions of arrays."""

    def __init__(self, model: Model, mode: str, times: tuple[int, ...], noise: np.ndarray) -> None:
        self.model, self.mode, self.times, self.noise = model, mode, times, noise
        bar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        self.alpha, self.beta = np.sqrt(bar), np.sqrt(1.0 - bar)
        net = model.model.net
        self._net = jax.jit(lambda p, x, t, c: net.apply({"params": p}, x, t, {"context": c}))
        self._encode = jax.jit(model.model.encode)
        self.offset: np.ndarray | None = None

    def eps(self, x: np.ndarray, t: int, cond: Any) -> np.ndarray:
        return np.asarray(
            self._net(self.model.weights.net, jnp.asarray(x, jnp.float32), jnp.float32([t]), cond["context"])
        )

    def latents(self, frame: np.ndarray) -> np.ndarray:
        return np.asarray(self._encode(self.model.weights.vae, frame), np.float64)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        z = self.latents(frame)
        a, b = self.alpha[list(self.times)], self.beta[list(self.times)]
        x = a[0] * z + b[0] * self.noise[0]
        if self.mode == "onetime" and self.offset is None:
            # Eq. 6: the negative prompt's x0 at the first time; kept as its distance from the frame
            negative = self.eps(x, self.times[0], self.model.null)
            self.offset = (x - b[0] * negative) / a[0] - z
        for i, t in enumerate(self.times):
            eps = self.eps(x, t, self.model.cond)
            if self.mode == "full":
                unguided = self.eps(x, t, self.model.null)
            elif self.mode == "self":
                unguided = (x - a[i] * z) / b[i]  # eq. 5
            elif self.mode == "onetime":
                unguided = (x - a[i] * (z + self.offset)) / b[i]
            else:
                unguided = eps
            eps = unguided + GAMMA * (eps - unguided)  # eq. 7 with delta = 1
            scaled = 10.0 * t
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
            x0 = out * (x - b[i] * eps) / a[i] + skip * x
            if i + 1 < len(self.times):
                x = a[i + 1] * x0 + b[i + 1] * self.noise[i + 1]
        return x0


def made(
    model: Model, mode: str, times: tuple[int, ...], *, frames: int = 1, sampler: str = "lcm", **changes: Any
) -> tuple[StreamProgram, Weights, Settings, State]:
    """A program with its weights, the settings of two prompts and a cold state."""
    n = len(times)
    program = StreamProgram(
        model=model.model,
        sampler=SAMPLERS[sampler],
        steps=n,
        frames=frames,
        guidance={"self": "residual", "onetime": "residual"}.get(mode, mode),
    )
    shape = (n, 8, 8, 4)
    numbers = {"renoise": 1.0, "fresh": 0.0, "feedback": 0.0, "motion": 0.0, "scale": GAMMA, "delta": 1.0}
    settings = Settings(
        cond=model.cond,
        null=model.null,
        times=jnp.asarray([*times, -1.0], jnp.float32),
        noise=jax.random.normal(jax.random.key(1), shape),
        mask=jnp.ones((8, 8, 1)),
        virtual=jnp.zeros(shape[1:]),
        **{name: jnp.float32(value) for name, value in numbers.items()},
    )._replace(**changes)
    return program, model.weights, settings, program.init(model.weights, settings, jax.random.key(0))


def call(
    program: StreamProgram, method: str, weights: Weights, settings: Settings, state: State, frame: np.ndarray
) -> State:
    (state,), _ = compiled(program, method)(weights, (settings,), (state,), (jnp.asarray(frame),))
    return state


def close(a: Any, b: Any, tolerance: float) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1.0))


SLOW = pytest.mark.slow
NETS = [("light", 1), ("light", 3)]  # the others take as long each to compile
ALL = [pytest.param(name, n, marks=() if (name, n) in NETS else SLOW) for name in ("light", "unet") for n in TIMES]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "n"), ALL)
def test_agrees_with_the_equations(
    name: str, n: int, mode: str, frames: np.ndarray, request: pytest.FixtureRequest
) -> None:
    """The stream batch and the sequential stream give, for each frame, what the paper's equations give."""
    model: Model = request.getfixturevalue(name)
    program, weights, settings, state = made(model, mode, TIMES[n])
    if mode == "onetime":
        virtual = compiled_probe(program)(weights, settings, state, jnp.asarray(frames[0]))
        settings = settings._replace(virtual=virtual)
    reference = Reference(model, mode, TIMES[n], np.asarray(settings.noise, np.float64))
    wanted = [reference(frame) for frame in frames]
    state = call(program, "sequential", weights, settings, state, frames[0])
    assert close(state.latents, wanted[0], 1e-4), "the first frame's own picture comes out first"
    for k in range(1, len(frames)):
        state = call(program, "step", weights, settings, state, frames[k])
        assert close(state.latents, wanted[max(k - n + 1, 0)], 1e-4), (k, "stream batch")
    alone = program.init(weights, settings, jax.random.key(0))
    for k in (0, 1):
        alone = call(program, "sequential", weights, settings, alone, frames[k])
        assert close(alone.latents, wanted[k], 1e-4), (k, "sequential")


@pytest.mark.parametrize("sampler", ["tcd", "dpm++2m", *(pytest.param(name, marks=SLOW) for name in ("lcm", "ddim"))])
def test_any_solver_of_one_evaluation_streams(light: Model, frames: np.ndarray, sampler: str) -> None:
    """Frames that pass through the batch are those that are drawn one by one, two at a time, and in one call."""
    program, weights, settings, state = made(light, "self", TIMES[3], frames=2, sampler=sampler)
    pairs = [np.concatenate(frames[2 * k : 2 * k + 2]) for k in range(4)]
    single = replace(program, frames=1)
    wanted = []
    for frame in frames:
        alone = single.init(weights, settings, jax.random.key(0))
        wanted.append(np.asarray(call(single, "sequential", weights, settings, alone, frame).latents))
    state = call(program, "sequential", weights, settings, state, pairs[0])
    assert close(state.latents, np.concatenate(wanted[:2]), 1e-4)
    for k in range(1, 4):
        state = call(program, "step", weights, settings, state, pairs[k])
        first = 2 * max(k - 2, 0)
        assert close(state.latents, np.concatenate(wanted[first : first + 2]), 1e-4), k


def test_one_step_of_self_guidance_does_not_diverge(light: Model, frames: np.ndarray) -> None:
    """Error 1 of the reference: its stock noise was never set back, and the stream overflowed within frames."""
    program, weights, settings, state = made(light, "self", (359,))
    first = None
    for _ in range(60):
        state = call(program, "step", weights, settings, state, frames[0])
        first = np.asarray(state.latents) if first is None else first
    assert np.array_equal(first, state.latents)


@pytest.mark.parametrize(("delta", "renoise"), [(0.5, 0.0), (0.5, 1.0), (2.0, 1.0)])
def test_guidance_leaves_no_noise_behind(light: Model, delta: float, renoise: float) -> None:
    """Errors 2 and 3: where prompt and frame agree (eps_c = s), any scale and delta change nothing, noise added or not.

    The network is one that sees the frame through the noise, x0 = z, so that its picture is the frame.
    """

    class Seeing:
        """eps = (x - alpha z) / sigma of the frame that cond names."""

        def __init__(self, z: jax.Array) -> None:
            self.z = z
            self.config = light.model.net.config

        def apply(self, params: Any, x: Any, t: Any, cond: Any) -> Any:
            schedule = light.model.schedule
            alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            return (x - alpha * self.z) / sigma

    frame = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 3), np.uint8)
    z = light.model.encode({}, jnp.asarray(frame))
    program, weights, settings, state = made(
        light, "self", TIMES[3], scale=jnp.float32(7.0), delta=jnp.float32(delta), renoise=jnp.float32(renoise)
    )
    program = replace(program, model=replace(light.model, net=Seeing(z)))
    for _ in range(4):
        state = call(program, "step", weights, settings, state, frame)
    assert close(state.latents, z, 1e-3)


def test_times_and_noise_change_under_frames_in_flight(light: Model, frames: np.ndarray) -> None:
    """Error 10: a frame in flight goes on to the new times, and what comes out is what they would have given it."""
    program, weights, settings, state = made(light, "none", TIMES[2])
    state = call(program, "sequential", weights, settings, state, frames[0])
    state = call(program, "step", weights, settings, state, frames[1])
    prediction = np.asarray(state.prediction.x0[:1], np.float64)
    noise = jax.random.normal(jax.random.key(9), settings.noise.shape)
    later = settings._replace(times=jnp.asarray([599.0, 159.0, -1.0]), noise=noise)
    state = call(program, "step", weights, later, state, frames[2])
    reference = Reference(light, "none", (159,), np.asarray(noise[1:], np.float64))
    alpha, beta = reference.alpha[159], reference.beta[159]
    x = alpha * prediction + beta * reference.noise[0]
    wanted = (x - beta * reference.eps(x, 159, light.cond)) / alpha
    assert close(state.latents, wanted, 1e-3)


def test_mask_keeps_the_frame(light: Model, frames: np.ndarray) -> None:
    mask = jnp.zeros((8, 8, 1)).at[:, :4].set(1.0)
    program, weights, settings, state = made(light, "none", TIMES[2], mask=mask)
    state = call(program, "sequential", weights, settings, state, frames[0])
    for k in (1, 2):
        state = call(program, "step", weights, settings, state, frames[k])
    z = np.asarray(light.model.encode({}, jnp.asarray(frames[1])))
    assert np.array_equal(state.latents[:, :, 4:], z[:, :, 4:])
    assert not close(state.latents[:, :, :4], z[:, :, :4], 1e-2)


def test_motion_takes_noise_away(light: Model, frames: np.ndarray) -> None:
    """A still frame keeps its first time, a moving one starts nearer to the second."""
    program, weights, settings, state = made(light, "none", TIMES[2], motion=jnp.ones(()))
    state = call(program, "sequential", weights, settings, state, frames[0])
    assert float(state.t[0]) == TIMES[2][0]
    state = call(program, "step", weights, settings, state, frames[0])
    assert float(state.t[0]) == TIMES[2][0]
    state = call(program, "step", weights, settings, state, frames[1])
    assert TIMES[2][1] < float(state.t[0]) < TIMES[2][0]


@pytest.mark.slow
def test_remembering_changes_nothing_in_a_still_scene(unet: Model, frames: np.ndarray) -> None:
    """Attention on the same tokens twice is attention on them once; on another frame's it is not."""
    plain, weights, settings, state = made(unet, "full", TIMES[2])
    extended_attention = replace(plain, remember=True)
    held = extended_attention.init(weights, settings, jax.random.key(0))
    assert held.memory, "the UNet has self-attention"
    for method, frame in (("sequential", 0), ("step", 0), ("step", 0)):
        state = call(plain, method, weights, settings, state, frames[frame])
        held = call(extended_attention, method, weights, settings, held, frames[frame])
        assert close(held.latents, state.latents, 1e-4)
    for _ in range(2):
        state = call(plain, "step", weights, settings, state, frames[1])
        held = call(extended_attention, "step", weights, settings, held, frames[1])
    assert not close(held.latents, state.latents, 1e-4)


def test_sessions_share_a_call(light: Model, frames: np.ndarray) -> None:
    """Two streams with their own prompts, times and noise in one call are those two alone."""
    program, weights, one, _ = made(light, "self", TIMES[2])
    two = one._replace(cond=one.null, times=jnp.asarray([599.0, 199.0, -1.0]), noise=one.noise[::-1])
    new = lambda: program.init(weights, one, jax.random.key(0))  # noqa: E731
    alone = [new(), new()]
    shared = (new(), new())
    for method, k in (("sequential", 0), ("step", 1), ("step", 2)):
        pair = [frames[k], frames[k + 3]]
        alone = [call(program, method, weights, s, a, f) for s, a, f in zip((one, two), alone, pair, strict=True)]
        shared, _ = compiled(program, method)(weights, (one, two), shared, tuple(map(jnp.asarray, pair)))
    for a, b in zip(shared, alone, strict=True):
        assert close(a.latents, b.latents, 1e-4)
