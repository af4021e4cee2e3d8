"""The one place that attends: which kernel is taken, and that every precision runs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit import attention as module
from mmdit import cpu_attention


def test_the_kernel_is_chosen_by_platform_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def kernel(query: jax.Array, *_: object, implementation: str, **__: object) -> jax.Array:
        taken.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)

    def choose(width: int, dtype: object, platform: str = "gpu") -> str:
        with module.lowering_for(platform):
            module.attention(*[jnp.zeros((1, 1, 1, width), dtype)] * 3)
        return taken[-1]

    monkeypatch.setattr(cpu_attention, "attend", partial(kernel, implementation="cpu"))
    assert [choose(64, jnp.bfloat16, platform) for platform in ("cpu", "tpu")] == ["cpu", "xla"]
    assert [choose(64, jnp.bfloat16), choose(160, jnp.bfloat16), choose(64, jnp.float32)] == ["cudnn", "xla", "xla"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_runs_everywhere(dtype: jnp.dtype) -> None:
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5, 3, 8)), jnp.float32)
    full = module.attention(q, k, v)
    half = module.attention(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    assert half.dtype == dtype
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.03)


@pytest.mark.parametrize("keys", [7, 4096])
def test_half_precision_on_a_cpu_errs_as_its_inputs_do(keys: int) -> None:
    """Weights that are cut off, not rounded, take nothing from the result: their sum is short of as much."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 16)), jnp.bfloat16) for n in (9, keys, keys))
    q, v = 3 * q, v + 5

    def slopes(implementation: str, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        def total(*qkv: jax.Array) -> jax.Array:
            found = module.attention(*qkv, implementation=implementation)  # type: ignore[arg-type]
            return (found.astype(jnp.float32) ** 2).sum()

        return jax.grad(total, (0, 1, 2))(*qkv)

    @jax.jit
    def everything(*qkv: jax.Array) -> tuple:
        full = [x.astype(jnp.float32) for x in qkv]
        values = module.attention(*full), module.attention(*qkv, implementation="cpu")
        return *values, slopes("cpu", *qkv), slopes("xla", *full)

    true, half, ours, plain = everything(q, k, v)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), true, rtol=2**-7)
    assert abs(float((half.astype(jnp.float32) / true).mean()) - 1.0) < 2**-10
    for one, other in zip(ours, plain, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < 0.02


def test_halved_attention_is_bfloat16s() -> None:
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5, 3, 8)), jnp.float32)
    with module.bfloat16_attention():
        half = module.attention(q, k, v)
    bfloat16 = module.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, bfloat16.astype(jnp.float32))


def test_what_is_traced_for_another_platform_takes_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def kernel(query: jax.Array, *_: object, implementation: str, **__: object) -> jax.Array:
        taken.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    even = jnp.zeros((1, 2, 1, 64), jnp.bfloat16)
    for platform in ("gpu", "tpu"):
        with module.lowering_for(platform):
            module.attention(even, even, even)
    module.attention(even, even, even, causal=True)
    assert taken == ["cudnn", "xla", "cudnn" if jax.default_backend() == "gpu" else "xla"]


@pytest.mark.parametrize("causal", [False, True])
def test_odd_lengths_in_even_ones_are_the_same_attention(causal: bool) -> None:
    """Values and gradients, also of a kernel's that has none: cuDNN's, which is not to be seen here."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (5, 7, 7))
    if causal:
        q = jnp.asarray(rng.standard_normal((2, 7, 3, 8)), jnp.float32)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def even(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return module.attend_even(q, k, v, is_causal=causal, implementation="xla")

    def without(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return module.flash((("is_causal", causal), ("implementation", "xla")), q, k, v)

    def everything(*qkv: jax.Array) -> list:
        """Return the values and gradients of each."""
        functions = (even, without, plain)
        return [(f(*qkv), jax.grad(lambda *qkv, f=f: jnp.sin(f(*qkv)).sum(), (0, 1, 2))(*qkv)) for f in functions]

    *ours, wanted = jax.jit(everything)(q, k, v)
    for one in ours:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), one, wanted)


@pytest.mark.parametrize(("full", "keys"), [(False, 7), (True, 77)])
def test_heads_and_queries_by_parts_are_the_same_attention(
    full: bool, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients and derivatives along a direction, of 23 queries in parts of 4 or in one."""
    monkeypatch.setattr(cpu_attention, "PART", 4)
    monkeypatch.setattr(cpu_attention, "LOGITS", 10**6 if full else 1)
    rng = np.random.default_rng(0)
    q, k, v, dq, dk, dv = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (23, keys, keys) * 2)

    @partial(jax.jit, static_argnums=0)
    def everything(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> object:
        def attend(*qkv: jax.Array) -> jax.Array:
            return module.attention(*qkv, scale=0.7, implementation=implementation)  # type: ignore[arg-type]

        slopes = jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), (0, 1, 2))(q, k, v)
        return slopes, jax.jvp(attend, (q, k, v), (dq, dk, dv))

    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, everything("cpu", q, k, v), everything("xla", q, k, v))
    with pytest.raises(ValueError, match="or leave it out"):
        module.attention(q, q, q, causal=True, implementation="cpu")


@pytest.mark.parametrize("keys", [1, 8, 9, 67, 77, 600])
def test_the_largest_logit_of_a_row_is_found_wherever_it_is(keys: int) -> None:
    """Logits of thousands, whose exponentials are infinite or nought unless the very largest is taken off first."""
    rng = np.random.default_rng(keys)
    rows = jnp.asarray(1e3 * rng.standard_normal((keys, keys)) + 1e4 * np.eye(keys), jnp.float32)
    np.testing.assert_array_equal(jax.jit(cpu_attention.row_max)(rows), np.asarray(rows).max(-1, keepdims=True))
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 8)), jnp.float32) for n in (5, keys, keys))
    attend = partial(module.attention, scale=1e3)
    ours, plain = jax.jit(lambda *qkv: [attend(*qkv, implementation=name) for name in ("cpu", "xla")])(q, k, v)
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3)
