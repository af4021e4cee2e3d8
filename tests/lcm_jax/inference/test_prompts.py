"""Prompts of a pipeline: weights, any length, schedules, given embeddings, bad input, and what must not change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax import Pipeline
from lcm_jax.cli.main import main
from lcm_jax.diffusion.samplers import get_sampler
from lcm_jax.diffusion.solvers import DDIM
from lcm_jax.stream import Stream
from lcm_jax.stream.prompt_cache import PromptCache
from lcm_jax.weights.safetensors_files import save_tensors

LONG = "red heart, dog face, cat face, flag of france"
DRAW: dict[str, Any] = {"steps": 4, "sampler": "ddim", "guidance": 3.0}


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return lcm_jax.load(tiny_model)


def test_without_a_syntax_brackets_are_text(pipe: Pipeline) -> None:
    """Nothing of a plain prompt goes through the code of the others: the tokens of the brackets are there."""
    context = pipe.encode_prompt(["(red:1.5)"])["context"]
    np.testing.assert_array_equal(context, pipe.folder.prompts(pipe.params, ["(red:1.5)"])["context"])
    assert not np.array_equal(context, pipe.encode_prompt(["red"])["context"])
    assert (
        np.abs(np.asarray(context - pipe.encode_prompt(["(red:1.5)"], prompt_syntax="a1111")["context"])).max() > 1e-3
    )


def test_without_weights_a_syntax_changes_nothing(pipe: Pipeline) -> None:
    plain = pipe(["red heart", "dog face"], negative_prompt="cat", **DRAW)
    for syntax in ("a1111", "compel", "comfyui"):
        other = pipe(["red heart", "dog face"], negative_prompt="cat", prompt_syntax=syntax, **DRAW)
        assert np.abs(other - plain.astype(int)).max() <= 1  # other batches of the text encoder: other roundings
    weighted = pipe("(red:2) heart", prompt_syntax="a1111", **DRAW)
    assert np.any(weighted != plain[:1])
    np.testing.assert_array_equal(weighted, pipe("(red:2.0) heart", prompt_syntax="a1111", **DRAW))


def test_a_prompt_draws_the_same_beside_a_longer_one(pipe: Pipeline) -> None:
    options = {"prompt_syntax": "a1111", "steps": 2, "sampler": "ddim", "guidance": 3.0}
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    both = pipe([LONG, "dog face"], latents=latents, **options)
    alone = pipe("dog face", latents=latents[1:], **options)
    assert np.abs(both[1:] - alone.astype(int)).max() <= 1
    assert pipe.encode_prompt([LONG], prompt_syntax="a1111")["context"].shape == (1, 24, 16)
    with pytest.warns(UserWarning, match="text_encoder reads 12 tokens"):
        pipe(LONG, steps=1, sampler="ddim", guidance=1.0)


def test_a_schedule_switches_within_one_program(pipe: Pipeline) -> None:
    """The picture of a schedule is that of its parts drawn one after another, and another one compiles nothing."""
    options: dict[str, Any] = {"prompt_syntax": "a1111", **DRAW, "guidance": 3.0}
    times = pipe.walk(pipe.model, get_sampler("ddim"), 4, pipe.spacing, 1.0).times
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    drawn = pipe("a [dog:cat:0.5]", latents=x, **options)
    programs = pipe._draw._cache_size()
    for text in ("[dog|cat]", "a [cat::1] face", "(a:1.4) [dog:flag:3]"):
        assert np.any(pipe(text, latents=x, **options) != drawn)
    for seed in (1, 2):
        pipe("[dog|cat]", seed=seed, **options | {"guidance": 4.0, "steps": 3})
    assert pipe._draw._cache_size() == programs
    state: Any = jnp.asarray(x)
    for i, text in enumerate(["a dog", "a dog", "a cat", "a cat"]):
        denoise = pipe.denoiser(text, guidance=3.0)
        state, _ = DDIM().step(denoise, pipe.model.schedule, state, times[i], times[i + 1], DDIM().init(state),
                               jax.random.key(0))  # fmt: skip
    want = np.asarray(pipe.model.decode(pipe.params["vae"], state))
    assert np.abs(drawn - want.astype(int)).max() <= 1
    unchanged = pipe("a [dog:cat:99]", latents=x, **options)
    assert np.abs(unchanged - pipe("a dog", latents=x, **DRAW).astype(int)).max() <= 1


@pytest.mark.slow
def test_schedules_of_several_prompts(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"prompt_syntax": "a1111", **DRAW}
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    both = pipe(["a [dog:cat:0.5]", "red heart"], negative_prompt="[flag:dog:1]", latents=x, **options)
    for i, prompt in enumerate(["a [dog:cat:0.5]", "red heart"]):
        alone = pipe(prompt, negative_prompt="[flag:dog:1]", latents=x[i : i + 1], **options)
        assert np.abs(both[i : i + 1] - alone.astype(int)).max() <= 1


def test_other_weights_and_calls_compile_nothing(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"prompt_syntax": "a1111", "clip_skip": 1, **DRAW}
    pipe("(red:1.5) heart", negative_prompt="dog", **options)
    encoders = [pipe._prompts(None, skip)._encode_chunks(False) for skip in (1, None)]
    programs = [encode._cache_size() for encode in (*encoders, pipe._draw)]
    for prompt, negative in (("(red:0.7) [heart]", "(dog:2)"), ("cat", "red"), ("flag BREAK dog", "cat BREAK dog")):
        pipe(prompt, negative_prompt=negative, **options)
        if "BREAK" not in prompt:
            assert [encode._cache_size() for encode in (*encoders, pipe._draw)] == programs
    after = [encode._cache_size() for encode in (*encoders, pipe._draw)]
    assert after[0] == programs[0] + 1, "another number of chunks"
    assert all(n <= before + 1 for n, before in zip(after, programs, strict=True))


def test_given_embeddings_of_one_encoder(pipe: Pipeline) -> None:
    want = pipe("dog face", negative_prompt="cat", **DRAW)
    array = np.asarray(pipe.encode_prompt(["dog face"])["context"])
    given = pipe(prompt_embeds=array, negative_prompt="cat", **DRAW)
    np.testing.assert_array_equal(given, want)
    twice = np.tile(array, (1, 2, 1))  # of two chunks that are equal: the negative prompt is repeated too
    assert np.abs(pipe(prompt_embeds=twice, negative_prompt="cat", **DRAW) - want.astype(int)).max() <= 1
    several = pipe(prompt_embeds=np.tile(array, (2, 1, 1)), num_images=2, **DRAW)
    assert len(several) == 4


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_syntax": "a111"}, "prompt_syntax 'a111' is unknown; did you mean a1111?"),
        ({"prompt_syntax": 5}, "prompt_syntax 5 is unknown"),
        ({"prompt_syntax": "a1111", "prompt": "(a:1..2)"}, "'1..2' is no weight"),
        ({"prompt_syntax": "a1111", "negative_prompt": "(a:1..2)"}, "'1..2' is no weight"),
        ({"prompt_syntax": "a1111", "prompt": "[dog:(a:1..2):3]"}, "'1..2' is no weight"),
        ({"clip_skip": 3}, "clip_skip is 3: this model's text_encoder has 2 layers, of which from 0 to 2"),
        ({"clip_skip": -1}, "clip_skip is -1"),
        ({"clip_skip": 1.5}, "clip_skip is 1.5: give a whole number"),
        ({"prompt_embeds": np.zeros((1, 12, 16))}, "prompt_embeds stands in place of prompt: give one of them"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 12, 15))}, r"the shape \(1, 12, 15\).*\(n, l, 16\)"),
        ({"prompt": None, "prompt_embeds": np.full((1, 12, 16), np.inf)}, "context holds infinity or NaN"),
        ({"prompt": None, "prompt_embeds": "dog"}, "context is a str, and an array is needed"),
        ({"prompt": None, "prompt_embeds": {"pooled": 1}}, "prompt_embeds has 'pooled': this model takes"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 13, 16))}, "has 13 tokens and the negative prompt 12"),
        ({"negative_prompt_embeds": np.zeros((3, 12, 16))}, "has 3 rows, and there are 1 prompts"),
        ({"prompt_syntax": "a1111", "prompt": "dog " * 300}, "a prompt has 30 chunks of 75 tokens, and at most 24"),
    ],
)  # fmt: skip
def test_bad_input(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"prompt": "dog", **DRAW, **options})
    assert "\n" not in str(error.value)


def test_schedules_need_steps(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=re.escape("[a:b:0.5] and [a|b] change with the step")):
        pipe.encode_prompt(["[a|b]"], prompt_syntax="a1111")


def test_a_stream_reads_the_first_chunk_of_a_prompt_with_weights(tiny_model: Path) -> None:
    pipe = lcm_jax.load(tiny_model)
    plain = PromptCache(pipe, (16, 16))
    pipe.prompt_syntax = "a1111"
    prompts = PromptCache(pipe, (16, 16))
    weighted = prompts._encode("(red:1.5) heart")["context"]
    np.testing.assert_array_equal(weighted, pipe.encode_prompt(["(red:1.5) heart"])["context"])
    with pytest.warns(UserWarning, match="leaves out the rest"):
        assert prompts._encode(LONG)["context"].shape == weighted.shape
    pipe.prompt_syntax = None
    assert not np.array_equal(weighted, plain._encode("red heart")["context"])


def test_the_command_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_tensors(tmp_path / "style.safetensors", {"emb_params": word})
    base = ["sample", "--model", str(tiny_model), "--steps", "1", "--guidance", "1", "--out", str(tmp_path / "x.png")]
    options = ["--prompt-syntax", "a1111", "--clip-skip", "1", "--embeddings", f"{tmp_path}/style.safetensors:<style>"]
    assert main([*base, *options, "--prompt", "(red heart:1.2), <style>"]) == 0
    assert (tmp_path / "x.png").is_file()
    for wrong, message in (
        (["--prompt-syntax", "a1111", "--prompt", "(a:1..2)"], "'1..2' is no weight"),
        (["--clip-skip", "9", "--prompt", "a"], "clip_skip is 9"),
        (["--embeddings", "nothing.safetensors", "--prompt", "a"], "embedding 'nothing.safetensors': no such file"),
    ):
        assert main([*base, *wrong]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1]


def test_a_stream_refuses_what_does_not_parse_before_it_changes(light_pipe: Pipeline) -> None:
    stream = Stream(light_pipe, "red heart", steps=1)
    light_pipe.prompt_syntax = "a1111"
    for prompt, message in (("(a:1..2)", "is no weight"), ("[a|b]", "change with the step")):
        with pytest.raises(ValueError, match=message):
            stream.set(prompt=prompt)
        with pytest.raises(ValueError, match=message):
            stream.set(negative_prompt=prompt)
    assert stream.controls.prompts == (("red heart", 1.0),)
