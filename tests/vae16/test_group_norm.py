"""Group norm: with an offset, in half precision, and the kernel of a GPU, which is interpreted here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from vae16 import gpu_group_norm, layers
from vae16.layers import GroupNorm, Normalisation, normalise

Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def drawn(shape: tuple[int, int, int, int]) -> Arrays:
    """x far from zero, offset, scale and bias."""
    keys = jax.random.split(jax.random.key(0), 4)
    b, c = shape[0], shape[-1]
    x = (3 + 2 * jax.random.normal(keys[0], shape)).astype(jnp.bfloat16)
    return x, *(jax.random.normal(key, of) for key, of in zip(keys[1:], [(b, c), (c,), (c,)], strict=True))


def error(y: jax.Array, want: jax.Array) -> float:
    y, want = (np.asarray(leaf, np.float32) for leaf in (y, want))
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def in_one(how: Normalisation, x: jax.Array, *others: jax.Array) -> jax.Array:
    """In float32, of the same numbers."""
    return normalise(how, x.astype(jnp.float32), *others)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 5, 6, 12), 4), ((1, 16, 16, 60), 2), ((2, 23, 31, 96), 32), ((1, 64, 64, 40), 4), ((3, 128, 128, 4), 2)],
    ids=["one program", "wide groups", "ragged parts", "many parts", "narrow groups"],
)
def test_the_kernel_is_group_norm(shape: tuple[int, int, int, int], groups: int) -> None:
    arrays = drawn(shape)
    options = [Normalisation(groups, 1e-5, silu) for silu in (False, True)]

    @jax.jit
    def both(*arrays: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        run = partial(gpu_group_norm.group_norm, interpret=True)
        return [(run(*arrays, **how._asdict()), in_one(how, *arrays)) for how in options]

    for y, want in both(*arrays):
        assert y.dtype == jnp.bfloat16
        assert error(y, want) < 3e-3  # the rounding of the result


def test_half_precision_is_near_float32_and_has_its_gradient() -> None:
    x, offset, scale, bias = drawn((2, 9, 8, 24))
    module, how = GroupNorm(4, silu=True, dtype=jnp.bfloat16), Normalisation(4, 1e-6, True)
    params = {"scale": scale, "bias": bias}

    def half(x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x, offset)

    def exact(x: jax.Array) -> jax.Array:
        return in_one(how, x, offset, scale, bias)

    @jax.jit
    def value_slope_and_direction(x: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [
            (jax.grad(lambda x, f=f: (f(x).astype(jnp.float32) ** 2).sum())(x), *jax.jvp(f, (x,), (x,)))
            for f in (half, exact)
        ]

    (slope, value, along), (want_slope, want, want_along) = value_slope_and_direction(x)
    assert error(value, want) < 3e-3
    assert error(slope, want_slope) < 0.02
    assert error(along, want_along) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_offset_is_added_beforehand(dtype: jnp.dtype) -> None:
    x, offset, scale, bias = drawn((2, 9, 8, 24))
    apply = jax.jit(partial(GroupNorm(4, dtype=dtype).apply, {"params": {"scale": scale, "bias": bias}}))
    x, offset = x.astype(dtype), jnp.round(offset * 4) / 4  # the sum is exact in both
    given, before = apply(x, offset), apply(x + offset[:, None, None].astype(dtype))
    assert error(given, before) < (1e-5 if dtype == jnp.float32 else 0.01)


def test_half_precision_under_vmap_pmap_and_shard_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vmap the kernel takes all copies as one batch."""
    batches: list[int] = []
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda x, *rest, default, **_: batches.append(len(x)) or default(x, *rest)
    )
    x, offset, scale, bias = drawn((6, 4, 4, 8))
    module = GroupNorm(2, dtype=jnp.bfloat16)

    def run(x: jax.Array, offset: jax.Array, scale: jax.Array = scale) -> jax.Array:
        return module.apply({"params": {"scale": scale, "bias": bias}}, x, offset)

    want = jax.jit(run)(x, offset)
    pair, offsets = x.reshape(2, 3, *x.shape[1:]), offset.reshape(2, 3, -1)
    batches.clear()
    assert error(jax.jit(jax.vmap(run))(pair, offsets).reshape(x.shape), want) < 1e-6
    assert 6 in batches
    one = jax.jit(jax.vmap(run, (0, None)))(pair, offsets[0])
    assert error(one[1], jax.jit(run)(pair[1], offsets[0])) < 1e-6
    scales = jnp.stack([scale, 2 * scale])
    twice = jax.jit(run)(x, offset, 2 * scale)
    assert error(jax.jit(jax.vmap(run, (None, None, 0)))(x, offset, scales)[1], twice) < 1e-6
    monkeypatch.undo()
    assert error(jax.pmap(run)(x[None], offset[None])[0], want) < 1e-6
    rows = PartitionSpec("data")
    mapped = jax.shard_map(run, mesh=Mesh(jax.devices()[:1], ("data",)), in_specs=(rows, rows), out_specs=rows)
    assert error(jax.jit(mapped)(x, offset), want) < 1e-6


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.vae16.test_group_norm import drawn
from vae16.gpu_group_norm import group_norm

arrays = drawn((8, 4, 4, 8))
run = jax.jit(lambda *own: group_norm(*own, groups=2, epsilon=1e-5, silu=True, interpret=True))
mesh = Mesh(jax.devices(), ("data",))
rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
placed = [jax.device_put(leaf, where) for leaf, where in zip(arrays, [rows, rows, everywhere, everywhere])]
program = run.lower(*placed).compile()
assert "all-gather" not in program.as_text()
y = program(*placed)
assert y.sharding.is_equivalent_to(rows, y.ndim), y.sharding
np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(run(*arrays), np.float32))
"""


def test_a_sharded_batch_stays_sharded(on_four_devices: Callable[[str], None]) -> None:
    on_four_devices(SHARDED)


def test_what_is_portable_has_no_kernel() -> None:
    x, offset, scale, bias = drawn((2, 4, 4, 8))
    module = GroupNorm(2, dtype=jnp.bfloat16)

    def traced() -> str:
        return str(jax.make_jaxpr(lambda x: module.apply({"params": {"scale": scale, "bias": bias}}, x, offset))(x))

    assert "pallas_call" in traced()
    with layers.portable():
        assert "pallas_call" not in traced()
