"""The TPU's attention, interpreted here: values, gradients, under vmap, when it is taken, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from lcm_jax.runtime.flops import flops
from mmdit import attention as module
from mmdit import tpu_attention
from mmdit.attention import attention

near = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def arrays(b: int, length: int, others: int, heads: int, width: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((b, n, heads, width)), jnp.float32) for n in (length, others, others)]


def everything(implementation: str, *qkv: jax.Array) -> object:
    """Values and gradients."""
    attend: Callable[..., jax.Array] = partial(attention, scale=0.3, implementation=implementation)  # type: ignore[arg-type]
    return attend(*qkv), jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), (0, 1, 2))(*qkv)


@pytest.mark.parametrize("shape", [(2, 5, 77, 2, 8), (1, 128, 128, 1, 64), (1, 3, 130, 1, 160)])
def test_it_is_attention(shape: tuple[int, ...]) -> None:
    qkv = arrays(*shape)
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(partial(everything, "tpu"))(*qkv)
    jax.tree.map(near, ours, jax.jit(partial(everything, "xla"))(*qkv))


def test_it_is_attention_under_vmap() -> None:
    q, k, v = arrays(6, 4, 9, 2, 8)
    queries, keys = (a.reshape(2, 3, *a.shape[1:]) for a in (q, k))

    def of(implementation: str, q: jax.Array, k: jax.Array) -> object:
        return everything(implementation, q, k, v[:3])

    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(jax.vmap(partial(of, "tpu")))(queries, keys)
    jax.tree.map(near, ours, jax.jit(jax.vmap(partial(of, "xla")))(queries, keys))


def test_long_ones_take_it_on_a_tpu_and_masks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "LOGITS", 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    long, short = arrays(1, 8, 8, 1, 8), arrays(1, 8, 7, 1, 8)

    def taken(platform: str, *qkv: jax.Array, **options: object) -> bool:
        with module.lowering_for(platform):
            return "pallas_call" in str(jax.make_jaxpr(lambda *qkv: attention(*qkv, **options))(*qkv))  # type: ignore[arg-type]

    assert taken("tpu", *long)
    assert not taken("tpu", *short)
    assert not taken("cpu", *long)
    assert not taken("tpu", *long, causal=True)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert not taken("tpu", *long)
    for devices, qkv in ((1, True), (2, False)):  # of which a batch of one gives each its row, or cannot
        with module.attention_mesh(
            AbstractMesh((devices, 1), ("rows", "heads"), (AxisType.Auto,) * 2), ("rows",), "heads"
        ):
            assert taken("tpu", *long) is qkv
    with pytest.raises(ValueError, match="implementation 'tpu' has no causal"):
        attention(*long, causal=True, implementation="tpu")


ON_A_MESH = """
import jax
import jax.numpy as jnp
from functools import partial
from jax.sharding import NamedSharding, PartitionSpec
from mmdit import attention as module, tpu_attention
from tests.mmdit.test_tpu_attention import arrays, everything, near

def plain(q, k, v, *, segment_ids, sm_scale, block_sizes):  # interpreted, several devices wait for one another forever
    seen = segment_ids.q[:, None, :, None] == segment_ids.kv[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(seen, sm_scale * jnp.einsum("bhld,bhmd->bhlm", q, k), -1e30))
    return jnp.einsum("bhlm,bhmd->bhld", weights, v)

tpu_attention.flash_attention = plain
mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rows = NamedSharding(mesh, PartitionSpec("rows"))
for heads, cut in ((2, "heads"), (3, None)):  # three do not divide among two devices: both have all of them
    qkv = arrays(2, 5, 9, heads, 8)
    with module.attention_mesh(mesh, ("rows",), "heads"):
        mine = jax.jit(partial(everything, "tpu"), in_shardings=(rows,) * 3)(*qkv)
    assert mine[0].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("rows", None, cut)), 4), mine[0].sharding
    jax.tree.map(near, mine, jax.jit(partial(everything, "xla"))(*qkv))
"""


def test_on_a_mesh_every_device_attends_for_its_rows_and_heads(on_four_devices: Callable[[str], None]) -> None:
    on_four_devices(ON_A_MESH)


def test_its_products_are_counted() -> None:
    qkv = arrays(2, 5, 7, 3, 8)
    forward = 2 * 2 * 2 * 3 * 5 * 7 * 8
    assert flops(jax.make_jaxpr(partial(attention, implementation="tpu"))(*qkv)) == forward
    slopes = jax.grad(lambda *qkv: attention(*qkv, implementation="tpu").sum(), (0, 1, 2))
    assert flops(jax.make_jaxpr(slopes)(*qkv)) == forward * (1 + 2.5)
