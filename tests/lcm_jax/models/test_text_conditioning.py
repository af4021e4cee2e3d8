"""Texts of three encoders: their lengths, and what is said about texts that are too long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lcm_jax
from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.typing import Params

LONG = "woman farmer, medium skin tone"


@pytest.fixture(scope="module")
def pipe(tiny_sd3: Path) -> lcm_jax.Pipeline:
    return lcm_jax.load(tiny_sd3)


@pytest.fixture
def prompts(pipe: lcm_jax.Pipeline) -> Prompts:
    return pipe.folder.prompts


@pytest.fixture
def params(pipe: lcm_jax.Pipeline) -> dict[str, Params]:
    return pipe.params


def test_the_context_is_the_clips_and_then_t5(prompts: Prompts, params: dict[str, Params]) -> None:
    out = prompts(params, ["red heart", "dog face"])
    assert {name: leaf.shape for name, leaf in out.items()} == {"context": (2, 12 + 10, 32), "pooled": (2, 16)}
    assert not np.asarray(out["context"])[:, :12, 28:].any()  # 16 + 12 channels, filled up with zeros
    assert prompts.shapes(params) == {"context": (1, 22, 32), "pooled": (1, 16)}


def test_t5_may_read_fewer_tokens(prompts: Prompts, params: dict[str, Params]) -> None:
    full, short = prompts(params, ["dog"]), replace(prompts, t5_tokens=5)(params, ["dog"])
    assert short["context"].shape == (1, 12 + 5, 32)
    np.testing.assert_allclose(short["context"][:, :12], full["context"][:, :12], atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 11, 0])
def test_t5_reads_no_more_than_it_can(prompts: Prompts, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"t5_tokens is {tokens}: this model's T5 reads from 2 to 10 tokens"):
        replace(prompts, t5_tokens=tokens)


def test_texts_that_are_too_long_are_named_with_the_encoder(prompts: Prompts) -> None:
    assert not prompts.too_long(["dog"])
    lines = replace(prompts, t5_tokens=5).too_long(["dog", LONG])
    assert len(lines) == 1  # the CLIPs read it whole
    assert lines[0].startswith("text_encoder_3 reads 5 tokens and leaves out the rest of the ")
    assert repr(LONG) in lines[0]
    assert len(prompts.too_long([" ".join([LONG] * 3)])) == 3


def test_without_t5_its_tokens_are_zeros(tiny_sd3: Path) -> None:
    pipe = lcm_jax.load(tiny_sd3, t5=False)
    context = np.asarray(pipe.encode_prompt(["dog"], t5_tokens=7)["context"])
    assert context.shape == (1, 12 + 7, 32)
    assert context[:, :12].any()
    assert not context[:, 12:].any()
