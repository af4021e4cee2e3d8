"""The one place that attends: which kernel is taken, and that every precision runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit import attention as module


def test_the_kernel_is_chosen_by_platform_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def kernel(query: jax.Array, *_: object, implementation: str, **__: object) -> jax.Array:
        taken.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)

    def choose(width: int, dtype: object) -> str:
        module.attention(*[jnp.zeros((1, 1, 1, width), dtype)] * 3)
        return taken[-1]

    assert choose(64, jnp.bfloat16) == ("cudnn" if jax.default_backend() == "gpu" else "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [choose(64, jnp.bfloat16), choose(160, jnp.bfloat16), choose(64, jnp.float32)] == ["cudnn", "xla", "xla"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_runs_everywhere(dtype: jnp.dtype) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 3, 8)).astype(np.float32)
    whole = module.attention(q, k, v)
    half = module.attention(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    assert half.dtype == dtype
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.03)
