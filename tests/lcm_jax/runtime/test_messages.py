"""Errors that several packages share: too little memory, an absent platform, the name that was meant."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

from lcm_jax.runtime.messages import did_you_mean, out_of_memory


def test_too_little_memory_is_one_line() -> None:
    said = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nBuffer assignment:")
    expected = r"2 pictures: the memory of .* is too small; draw fewer"
    with pytest.raises(MemoryError, match=expected) as caught, out_of_memory("2 pictures", "draw fewer"):
        raise said
    assert "\n" not in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory("x", "y"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")


def test_upper_case_is_no_other_name() -> None:
    assert did_you_mean("OPENMOJI", ["openmoji", "sd15"]) == "; did you mean openmoji?"
    assert did_you_mean("zzz", ["openmoji"]) == ""


def test_an_absent_platform_is_one_line() -> None:
    code = """
import jax
from lcm_jax.runtime.hardware import check_platform
for name in ("cuda", "magic"):
    jax.config.update("jax_platforms", name)
    try:
        check_platform()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split(", and")[0] for line in lines] == ["JAX_PLATFORMS is cuda", "JAX_PLATFORMS is magic"], done
    assert all("unset it" in line for line in lines)
