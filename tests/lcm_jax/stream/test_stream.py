"""`Stream`: what a user turns, what stays in flight, what is compiled, encoded and evaluated, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax import lora
from lcm_jax.stream import Stream
from lcm_jax.stream.step import compiled
from lcm_jax.stream.stream import fit, run

Pipe = Any  # of conftest: as much of a pipeline as a stream asks for


def near(a: Any, b: Any) -> bool:
    """Equal but for rounding to a byte."""
    return bool(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1)


def test_first_pictures_are_warm_and_the_last_are_flushed(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Error 10: frame 0's own picture comes first; `map` gives one for each frame, as drawing each alone would."""
    for guidance in ("none", "self", "full"):
        options = {"steps": 3, "strength": 0.8, "guidance": guidance, "scale": 1.5}
        alone = Stream(light_pipe, "red heart", batch=False, **options)
        wanted = [alone(frame[0]) for frame in frames]
        stream = Stream(light_pipe, "red heart", **options)
        assert near(stream(frames[0, 0]), wanted[0])
        assert stream.in_flight == 2
        stream.reset()
        found = list(stream.map(frame[0] for frame in frames))
        assert len(found) == len(frames)
        assert near(found, wanted)


def test_buffers_of_frames(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Error 5: two frames at a time through three steps."""
    alone = Stream(light_pipe, "red heart", steps=3, strength=0.8, batch=False)
    wanted = [alone(frame[0]) for frame in frames[:6]]
    stream = Stream(light_pipe, "red heart", steps=3, strength=0.8, frames=2)
    found = list(stream.map(frames[i : i + 2, 0] for i in (0, 2, 4)))
    assert near(np.concatenate(found), wanted)


def test_nothing_compiles_anew(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Prompts, guidance, times, seed, blend and adapters change; one program of a step stays."""
    adapters = {"unet": lora.init(lora.jax.random.key(0), light_pipe.net_params, rank=2, targets="kernel$")}
    stream = Stream(light_pipe, "red heart", guidance="self", loras={"style": adapters})
    stream(frames[0, 0])
    stream(frames[1, 0])
    step = compiled(stream.program, "step")
    before = step._cache_size()
    for change in (
        {"prompt": "dog face"},
        {"prompt": [("dog face", 0.3), ("cat face", 0.7)], "blend": "slerp"},
        {"prompt": [("a", 1), ("b", 2), ("c", 3)], "travel": 3},
        {"negative_prompt": "blurry", "guidance": "onetime"},
        {"scale": 2.5, "delta": 0.5},
        {"t_index": (10, 40)},
        {"strength": 0.3},
        {"seed": [(1, 0.5), (2, 0.5)]},
        {"add_noise": False, "fresh": True, "feedback": 0.3, "motion": 0.5},
        {"lora": [("style", 0.7)]},
    ):
        stream.set(**change)
        picture = stream(frames[2, 0])
        assert picture.shape == (16, 16, 3)
    stream.set_mask(np.eye(16, dtype=bool))
    stream(frames[2, 0])
    assert compiled(stream.program, "step") is step
    assert step._cache_size() == before


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles from now on."""
    found: list[str] = []

    def listen(event: str, _: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("controls", "programs"),
    [
        ({}, 2),
        ({"similarity": 0.98}, 2),
        ({"guidance": "onetime", "negative_prompt": "cat"}, 3),
        ({"batch": False}, 1),
        ({"steps": 1}, 1),
        ({"feedback": 0.3, "motion": 0.5}, 2),
    ],
    ids=["plain", "similarity", "onetime", "sequential", "one-step", "feedback"],
)
def test_a_rehearsed_stream_compiles_nothing(
    light_pipe: Pipe, frames: np.ndarray, compilations: list[str], controls: dict[str, Any], programs: int
) -> None:
    """Neither its first frame, nor its second, nor those that are skipped or come out at the end; and it is as new."""
    options = {"steps": 3, "strength": 0.8, "size": (12, 16), "scale": 1.5} | controls
    stream = Stream(light_pipe, "red heart", **options)
    assert stream.rehearse() == programs
    before = len(compilations)
    found = list(stream.map(frames[[0, 1, 1, 2, 2, 2], 0]))
    assert compilations[before:] == []
    assert stream.filter is None or (stream.filter.skipped, stream.filter.drawn) != (0, 0)
    other = Stream(light_pipe, "red heart", **options)
    assert near(found, list(other.map(frames[[0, 1, 1, 2, 2, 2], 0])))


def test_a_listener_sees_what_is_compiled(light_pipe: Pipe, frames: np.ndarray, compilations: list[str]) -> None:
    """Without a rehearsal the first frame compiles one program and the second another."""
    stream = Stream(light_pipe, "red heart", steps=3, strength=0.8, size=(12, 14))
    counts = []
    for i in range(3):
        before = len(compilations)
        stream(frames[i, 0])
        counts.append(len(compilations) - before)
    assert counts[0] > 0
    assert counts[1] > 0
    assert counts[2] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "dog face"},
        {"seed": 7},
        {"strength": 0.9},
        {"scale": 3.0},
        {"lora": [("style", 2.0)]},
        {"prompt": [("red heart", 0.5), ("dog face", 0.5)]},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_live_change_is_a_new_stream(light_pipe: Pipe, frames: np.ndarray, change: dict[str, Any]) -> None:
    """After a change has passed through, pictures are those of a stream that began with it (errors 6 and 7)."""
    adapters = lora.init(lora.jax.random.key(0), light_pipe.net_params, rank=2, targets="kernel$")
    for adapter in adapters.values():
        adapter["up"] = adapter["up"] + 0.3
    options: dict[str, Any] = {"guidance": "full", "scale": 1.5, "loras": {"style": {"unet": adapters}}}
    stream = Stream(light_pipe, **({"prompt": "red heart", "negative_prompt": "cat"} | options))
    old = stream(frames[0, 0])
    stream.set(**change)
    for _ in range(stream.in_flight + 1):
        new = stream(frames[0, 0])
    fresh = Stream(light_pipe, **({"prompt": "red heart", "negative_prompt": "cat"} | options | change))
    assert near(new, fresh(frames[0, 0]))
    assert not near(new, old)


def test_prompts_are_encoded_once(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Error 9: the text encoder runs when a text is new, not when a frame is."""
    stream = Stream(light_pipe, "red heart")
    for i in range(4):
        stream.set(prompt=("red heart", "dog face")[i % 2])
        stream(frames[i, 0])
    assert stream.encoded == 2
    assert light_pipe.encoded == ["red heart", "dog face"]


def test_onetime_means_one_time(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Error 11: the negative prompt is evaluated at a change of prompt, not at every frame."""
    stream = Stream(light_pipe, "red heart", negative_prompt="dog face", guidance="onetime", scale=1.5)
    for frame in frames:
        stream(frame[0])
    assert stream.probes == 1
    stream.set(scale=2.0, strength=0.5)
    stream(frames[0, 0])
    assert stream.probes == 1
    stream.set(prompt="cat face")
    stream(frames[0, 0])
    stream(frames[1, 0])
    assert stream.probes == 2


def test_travel_arrives(light_pipe: Pipe, frames: np.ndarray) -> None:
    """A change of prompt over four frames goes through what lies between, and ends at the new prompt."""
    stream = Stream(light_pipe, "red heart", steps=1)
    old = stream(frames[0, 0]).astype(int)
    there = Stream(light_pipe, "dog face", steps=1)(frames[0, 0]).astype(int)
    stream.set(prompt="dog face", travel=4)
    way = [stream(frames[0, 0]).astype(int) for _ in range(5)]
    far = [np.abs(picture - there).sum() for picture in way]
    assert np.abs(old - there).sum() > far[0] > far[1] > far[2]
    assert near(way[3], there)
    assert near(way[4], there)
    stream.set(prompt="cat face", travel=4, similarity=0.98)
    way = [stream(frames[0, 0]) for _ in range(4)]
    assert near(way[3], Stream(light_pipe, "cat face", steps=1)(frames[0, 0])), "no still scene on the way"


def test_filter_spares_a_still_scene_and_holds_nothing_back(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Error 8: of 20 still frames few are drawn; when motion stops, the last frame's own picture is what stays."""
    stream = Stream(light_pipe, "red heart", steps=3, strength=0.8, similarity=0.98)
    for _ in range(20):
        stream(frames[0, 0])
    assert stream.filter is not None
    assert stream.filter.drawn <= 8
    assert stream.filter.saved >= 1 - 1 / 2.4
    for k in (1, 2, 3):
        stream(frames[k, 0])
    for _ in range(6):
        last = stream(frames[3, 0])
    assert near(last, Stream(light_pipe, "red heart", steps=3, strength=0.8)(frames[3, 0]))
    drawn = stream.filter.drawn
    stream.set(prompt="dog face")
    for _ in range(3):
        last = stream(frames[3, 0])
    assert stream.filter.drawn == drawn + 3, "a change of prompt is no still scene"
    assert near(last, Stream(light_pipe, "dog face", steps=3, strength=0.8)(frames[3, 0]))


def test_map_with_the_filter_gives_one_picture_for_each_frame(light_pipe: Pipe, frames: np.ndarray) -> None:
    scene = [frames[0, 0]] * 9 + [frames[1, 0]] * 2 + [frames[2, 0]] * 9
    stream = Stream(light_pipe, "red heart", steps=3, strength=0.8, similarity=0.98)
    alone = Stream(light_pipe, "red heart", steps=3, strength=0.8, batch=False)
    wanted = [alone(frame) for frame in scene]
    found = list(stream.map(scene))
    assert len(found) == len(scene)
    assert near(found, wanted)
    assert stream.filter is not None
    assert stream.filter.skipped >= 5


def test_streams_share_calls(light_pipe: Pipe, frames: np.ndarray) -> None:
    """Three sessions in one turn are two calls, and each gets what it would have got alone."""

    def three() -> list[Stream]:
        return [Stream(light_pipe, text, seed=i) for i, text in enumerate(("red heart", "dog face", "cat face"))]

    alone, together = three(), three()
    for k in range(3):
        wanted = [stream(frames[k + i, 0]) for i, stream in enumerate(alone)]
        jobs = [stream.prepare(frames[k + i, 0]) for i, stream in enumerate(together)]
        done = run([job for job in jobs if job is not None])
        found = [stream.finish(*result) for stream, result in zip(together, done, strict=True)]
        assert near(found, wanted)


def test_feedback_and_reset(light_pipe: Pipe, frames: np.ndarray) -> None:
    """The last picture's share moves a still scene on; after a reset it begins again."""
    stream = Stream(light_pipe, "red heart", steps=1, feedback=0.5)
    first, second = stream(frames[0, 0]), stream(frames[0, 0])
    assert not near(first, second)
    stream.reset()
    assert np.array_equal(stream(frames[0, 0]), first)


def test_fresh_noise(light_pipe: Pipe) -> None:
    """From noise, a fixed seed gives one picture, and fresh noise many."""
    still = Stream(light_pipe, "red heart", image=False, strength=1.0)
    assert np.array_equal(still(), still())
    moving = Stream(light_pipe, "red heart", image=False, strength=1.0, fresh=True, batch=False)
    assert not near(moving(), moving())


def test_from_noise_it_is_the_pipeline(tiny_model: Path) -> None:
    """Without frames, with the same noise, a stream draws what the pipeline draws."""
    pipe = lcm_jax.load(tiny_model)
    stream = Stream(pipe, "red heart", image=False, steps=1, strength=1.0)
    noise = stream._settings.noise
    assert near(stream(), pipe("red heart", steps=1, guidance=1.0, sampler="lcm", latents=noise)[0])


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", "euler"])
def test_sd3_streams(tiny_sd3: Path, frames: np.ndarray, sampler: str) -> None:
    """A rectified flow on an MMDiT: the batch gives what drawing one by one gives."""
    pipe = lcm_jax.load(tiny_sd3)
    one = Stream(pipe, "red heart", sampler=sampler, guidance="full", scale=2.0, batch=False)
    two = Stream(pipe, "red heart", sampler=sampler, guidance="full", scale=2.0)
    wanted = [one(frame[0]) for frame in frames[:4]]
    assert near(list(two.map(frame[0] for frame in frames[:4])), wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "heun"}, "heun"),
        pytest.param({"prompt": 3}, "prompt", marks=pytest.mark.wrong_types),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x" * 1_000_000}, "1000000 characters"),
        ({"prompt": [("a", float("nan"))]}, "prompt"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps"),
        pytest.param({"steps": 1.5}, "steps", marks=pytest.mark.wrong_types),
        ({"strength": 0.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        pytest.param({"guidance": "cfg"}, "guidance 'cfg' is unknown", marks=pytest.mark.wrong_types),
        ({"t_index": (5, 5)}, "t_index"),
        ({"t_index": (3, 50)}, "t_index"),
        ({"seed": -1}, "seed"),
        ({"colour": 1}, "'colour' is no control"),
        ({"lora": [("style", 1.0)]}, "lora 'style' is unknown"),
        ({"size": (15, 16)}, "15x16"),
        ({"frames": 0}, "frames is 0"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_controls(light_pipe: Pipe, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Stream(light_pipe, **({"prompt": "red heart"} | change))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_wrong_change_changes_nothing(light_pipe: Pipe, frames: np.ndarray) -> None:
    stream = Stream(light_pipe, "red heart")
    before = stream(frames[0, 0])
    with pytest.raises(ValueError, match="scale"):
        stream.set(prompt="dog face", scale=99.0)
    assert stream.controls.prompts == (("red heart", 1.0),)
    assert near(stream(frames[0, 0]), before)


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 4), (1, 16, 16, 3)])
def test_bad_frames(light_pipe: Pipe, shape: tuple[int, ...]) -> None:
    stream = Stream(light_pipe, "red heart")
    with pytest.raises(ValueError, match="frame: expected uint8"):
        stream(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="frame: expected uint8"):
        stream(np.zeros((16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="give it one"):
        stream()


def test_frames_of_other_sizes_are_fitted(light_pipe: Pipe) -> None:
    """The largest middle part of the stream's shape."""
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 255
    assert np.array_equal(fit(frame, (16, 16)), np.full((16, 16, 3), 255, np.uint8))
    assert Stream(light_pipe, "red heart")(frame).shape == (16, 16, 3)
