"""The TPU's attention, interpreted here: values, gradients, under vmap, when it is taken, and its FLOPs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from lcm_jax.runtime.flops import flops
from mmdit import attention as module
from mmdit import tpu_attention, tpu_attention_jvp
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


def six_arrays(*shape: int) -> tuple[jax.Array, ...]:
    """Query, key and value, and a direction for each."""
    return (*arrays(*shape), *[jnp.cos(3.0 * x) for x in arrays(*shape)])


def along_a_direction(implementation: str, *six: jax.Array) -> object:
    """Values and tangents, and the gradients of a loss of both and of one that has the tangents in its target."""

    def both(*six: jax.Array, frozen: bool = False) -> tuple[jax.Array, jax.Array]:
        attend = partial(attention, scale=0.3, implementation=implementation)  # type: ignore[arg-type]
        with module.forward_mode(frozen=frozen):
            return jax.jvp(attend, six[:3], six[3:])

    def loss(*six: jax.Array) -> jax.Array:
        o, tangent = both(*six)
        return jnp.sin(o).sum() + jnp.cos(1.3 * tangent).sum()

    def of_a_target(*six: jax.Array) -> jax.Array:
        o, tangent = both(*six, frozen=True)
        return jnp.square(o + jax.lax.stop_gradient(tangent)).sum()

    return both(*six), jax.grad(loss, range(6))(*six), jax.grad(of_a_target, range(3))(*six)


@pytest.mark.parametrize("shape", [pytest.param((2, 5, 7, 2, 8), marks=pytest.mark.slow), (1, 150, 270, 1, 16)])
def test_its_derivative_along_a_direction_has_values_and_gradients(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and tangent in one pass, and the gradients of both: against XLA's, over several tiles, with padding."""
    monkeypatch.setattr(tpu_attention_jvp, "TILE", 128)
    six = six_arrays(*shape)
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(partial(along_a_direction, "tpu"))(*six)
    jax.tree.map(partial(near, rtol=1e-5, atol=1e-5), ours, jax.jit(partial(along_a_direction, "xla"))(*six))


def test_forward_mode_chooses_kernels_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "LOGITS", 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    qkv = arrays(1, 8, 8, 1, 8)

    def program(platform: str) -> str:
        with module.lowering_for(platform), module.forward_mode():
            return str(jax.make_jaxpr(lambda *qkv: jax.jvp(attention, qkv, qkv))(*qkv))

    assert "flash_tangent_fwd" in program("tpu")
    assert "pallas_call" not in program("cpu")
    half = [x.astype(jnp.bfloat16) for x in qkv]
    with module.lowering_for("gpu"):
        with pytest.raises(RuntimeError, match="cuDNN"):  # it is asked for, and not here
            jax.make_jaxpr(attention)(*half)
        with module.forward_mode():
            jax.make_jaxpr(attention)(*half)


def test_the_products_of_the_derivative_are_counted() -> None:
    """6 in the pass, 9 and 12 in its gradients, over whole tiles."""
    b, n, h, d = 2, 512, 3, 64
    six = [jax.ShapeDtypeStruct((b, n, h, d), jnp.float32)] * 6
    once = 2.0 * b * h * n * n * d
    both = partial(tpu_attention_jvp.attend_with_tangent, scale=0.3)
    assert flops(jax.make_jaxpr(both)(*six)) == 6 * once
    gradient = jax.grad(lambda *six: sum(x.sum() for x in both(*six)), range(6))
    assert flops(jax.make_jaxpr(gradient)(*six)) == (6 + 9 + 12) * once


def test_products_are_counted_where_flax_scans_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It evaluates what does not depend on the loop (the masks), and leaves functions without arguments."""
    monkeypatch.setattr(tpu_attention, "LOGITS", 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return attention(x, x, x), None

    layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jnp.ones((1, 16, 1, 8))
    with module.lowering_for("tpu"), module.forward_mode():
        jaxpr = jax.make_jaxpr(lambda x: jax.jvp(lambda x: layers.apply({}, x, None)[0], (x,), (x,)))(x)
    assert flops(jaxpr) == 3 * 6 * 2 * 128 * 128 * 8


ON_A_MESH = """
import jax
import jax.numpy as jnp
from functools import partial
from jax.sharding import NamedSharding, PartitionSpec
from mmdit import attention as module, tpu_attention
from tests.mmdit.test_tpu_attention import arrays, everything, near

def plain(q, k, v, *, segment_ids, sm_scale, block_sizes):  # interpreted, several devices wait for one another forever
    visible = segment_ids.q[:, None, :, None] == segment_ids.kv[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(visible, sm_scale * jnp.einsum("bhld,bhmd->bhlm", q, k), -1e30))
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


TANGENTS_ON_A_MESH = """
import jax
import jax.numpy as jnp
from functools import partial
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from mmdit import attention as module, tpu_attention_jvp
from tests.mmdit.test_tpu_attention import along_a_direction, near, plain_gradient, six_arrays

pl.pallas_call = partial(pl.pallas_call, interpret=True)  # each device by itself, as an ordinary program
tpu_attention_jvp.dot_product_attention_tpu_bwd = plain_gradient
mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rows = NamedSharding(mesh, PartitionSpec("rows"))

def layers(implementation, *six):  # two equal layers, scanned, and computed again for the gradient
    def layer(x, scale):
        return jnp.tanh(module.attention(x, 2.0 * x, jnp.sin(x), scale=scale, implementation=implementation)), None

    def network(x):
        return jax.lax.scan(jax.checkpoint(lambda x, _: layer(x, 0.3)), x, None, length=2)[0]

    def loss(x, direction):
        with module.forward_mode():
            y, tangent = jax.jvp(network, (x,), (direction,))
        return jnp.sin(y).sum() + jnp.cos(1.3 * tangent).sum()

    return jax.value_and_grad(loss, (0, 1))(six[0], six[3])

for function, heads in ((along_a_direction, 2), (along_a_direction, 3), (layers, 2)):
    six = six_arrays(2, 5, 9, heads, 8)  # three heads do not divide among two devices: both have all of them
    with module.attention_mesh(mesh, ("rows",), "heads"):
        step = jax.jit(partial(function, "tpu"), in_shardings=(rows,) * 6)
        assert "flash_tangent_fwd" in str(step.trace(*six).jaxpr) and "shard_map" in str(step.trace(*six).jaxpr)
        mine = step(*six)
    jax.tree.map(partial(near, rtol=1e-5, atol=1e-5), mine, jax.jit(partial(function, "xla"))(*six))
"""


def plain_gradient(query: jax.Array, *others: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """XLA's gradient in place of JAX's kernel."""
    *keys, slope = others
    attend = partial(attention, scale=scale, implementation="xla")
    return jax.vjp(attend, query, *keys)[1](slope)


def test_on_a_mesh_every_device_has_the_derivative_of_its_rows_and_heads(
    on_four_devices: Callable[[str], None],
) -> None:
    """With its gradients, alone and in scanned layers that are computed again."""
    on_four_devices(TANGENTS_ON_A_MESH)


COMPILED = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lcm_jax.plan.compiled_program import CompiledProgram
from lcm_jax.plan.topologies import open_topology
from mmdit.tpu_attention_jvp import attend_with_tangent

one = NamedSharding(Mesh(np.array(open_topology("v5e:1x1").devices), ("x",)), PartitionSpec())
both = partial(attend_with_tangent, scale=0.1)
gradient = jax.grad(lambda *six: sum(jnp.sin(x.astype(jnp.float32)).sum() for x in both(*six)), range(6))
for case in sys.argv[1:]:
    dtype, length, others, width = case.split(",")
    n, m, width = map(int, (length, others, width))
    six = [jax.ShapeDtypeStruct((1, k, 2, width), dtype) for k in (n, m, m)] * 2
    for function, products in ((both, 6), (gradient, 6 + 9 + 12)):
        compiled = jax.jit(function, in_shardings=one, out_shardings=one).trace(*six).lower().compile()
        program, once = CompiledProgram(compiled.as_text(), 1), 2 * 2 * n * m * width
        assert products * once <= program.flops <= 2 * products * once, (case, program.flops / once)
        largest = max(op.shapes[0].bytes for each in program.computations.values() for op in each.values() if op.shapes)
        assert largest < 4 * 2 * n * max(m, 1024) / 2, (case, largest)  # half of a matrix of logits
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_derivatives_kernels_compile_for_a_v5e_that_is_not_there(dtype: str) -> None:
    """SD3's joint attention at 1024 pixels, those of SD1.5 and SDXL, and wide heads; none has a matrix of logits."""
    if find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU needs libtpu, but no TPU: pip install libtpu")
    shapes = ["4429,4429,64", "4096,4096,40", "4096,4096,128", "1024,1024,80", "4096,77,160", "1100,1100,256"]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *(f"{dtype},{shape}" for shape in shapes)],
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_its_products_are_counted() -> None:
    qkv = arrays(2, 5, 7, 3, 8)
    forward = 2 * 2 * 2 * 3 * 5 * 7 * 8
    assert flops(jax.make_jaxpr(partial(attention, implementation="tpu"))(*qkv)) == forward
    slopes = jax.grad(lambda *qkv: attention(*qkv, implementation="tpu").sum(), (0, 1, 2))
    assert flops(jax.make_jaxpr(slopes)(*qkv)) == forward * (1 + 2.5)
