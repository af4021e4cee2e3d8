"""Plans: what is read from a program's text, what a chip's wires carry, and a step planned for eight devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import configs
from lcm_jax.cli import main as cli
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import Diffusion, LatentConsistencyDistillation
from lcm_jax.plan import topologies
from lcm_jax.plan.compiled_program import CompiledProgram
from lcm_jax.plan.planning import Traced, _digest, bytes_needed, candidates
from lcm_jax.plan.topologies import HOP, Topology, open_topology, parse
from lcm_jax.runtime.flops import flops
from lcm_jax.runtime.hardware import CHIPS, chip_of
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.lora_config import LoraConfig

LOOP = """
HloModule step, is_scheduled=true, num_partitions=8

%body (state: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %state = (s32[], f32[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[16,32]{1,0} get-tuple-element(%state), index=1
  %start = (f32[16,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[64,32]{1,0} all-gather-done(%start)
  %y = f32[64,64]{1,0} dot(%whole, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %cut = f32[16,32]{1,0:T(8,128)} slice(%y), slice={[0:16], [0:32]}
  ROOT %out = (s32[], f32[16,32]{1,0}) tuple(%next, %cut)
}

%condition (state: (s32[], f32[16,32])) -> pred[] {
  %state.1 = (s32[], f32[16,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %length = s32[] constant(24)
  ROOT %less = pred[] compare(%i.1, %length), direction=LT
}

ENTRY %main (x: f32[16,32]) -> f32[16,32] {
  %x.1 = f32[16,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %from = s32[] copy(%zero)
  %first = (s32[], f32[16,32]{1,0}) tuple(%from, %x.1)
  %loop = (s32[], f32[16,32]{1,0}) while(%first), condition=%condition, body=%body KNOWN
  %last = f32[16,32]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[16,32]{1,0} all-reduce(%last), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""
SHARD = 16 * 32 * 4  # bytes


@pytest.mark.parametrize(
    "text",
    [
        LOOP.replace(" KNOWN", ', backend_config={"known_trip_count":{"n":"24"}}').replace(
            "constant(24)", "constant(9)"
        ),
        LOOP.replace(" KNOWN", ""),
        LOOP.replace(" KNOWN", "")
        .replace("one = s32[] constant(1)", "one = s32[] constant(2)")
        .replace("(24)", "(47)"),
        LOOP.replace(" KNOWN", "")
        .replace("zero = s32[] constant(0)", "zero = s32[] constant(3)")
        .replace("(24)", "(27)"),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(text: str) -> None:
    program = CompiledProgram(text, 8)
    found = {work.collective.kind: work for work in program.work if work.collective is not None}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.times, gather.collective.bytes, gather.collective.group) == (24, 3 * SHARD, (0, 1, 2, 3))
    assert (reduce.times, reduce.collective.bytes, reduce.collective.group) == (1, SHARD, (0, 4))
    assert program.flops == 24 * 2 * 64 * 64 * 32
    assert program.bytes == 8 + 24 * (12 + 64 * 32 * 4 + 64 * 64 * 4 + 2 * SHARD)  # the counter; the product, its cut
    assert not program.endless


def test_a_loop_of_unknown_length_is_said_to_count_once() -> None:
    program = CompiledProgram(LOOP.replace(" KNOWN", "").replace("direction=LT", "direction=NE"), 8)
    assert program.flops == 2 * 64 * 64 * 32
    assert program.endless == ["loop"]


FUSIONS = """
HloModule fusions

%sliced (stack: f32[24,64,64], i: s32[]) -> f32[64,64] {
  %stack = f32[24,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %layer = f32[1,64,64]{2,1,0} dynamic-slice(%stack, %i, %z, %z), dynamic_slice_sizes={1,64,64}
}

%all-reduce-scatter.1 (g: f32[64,64]) -> f32[8,64] {
  %g = f32[64,64]{1,0} parameter(0)
  %summed = f32[64,64]{1,0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add
  %own = s32[] constant(0)
  ROOT %part = f32[8,64]{1,0} dynamic-slice(%summed, %own, %own), dynamic_slice_sizes={8,64}
}

ENTRY %main (stack: f32[24,64,64], i: s32[], near: f32[64,64]) -> f32[8,64] {
  %stack.1 = f32[24,64,64]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %near = f32[64,64]{1,0:T(8,128)S(1)} parameter(2)
  %layer.1 = f32[1,64,64]{2,1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%sliced
  %flat = f32[64,64]{1,0} bitcast(%layer.1)
  %both = f32[64,64]{1,0} add(%flat, %near)
  ROOT %scattered = f32[8,64]{1,0} fusion(%both), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_fusions_read_slices_and_tpus_scatter_in_them() -> None:
    program, layer = CompiledProgram(FUSIONS, 8), 64 * 64 * 4
    (scatter,) = [work.collective for work in program.work if work.collective is not None]
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", layer * 7 / 8)
    assert (
        program.bytes == (4 + 2 * layer) + 2 * layer + layer // 8
    )  # the stack gives one layer and its index; what is near is no traffic


STEPS = """
HloModule steps

%start (x: f32[8,64]) -> (f32[8,64], f32[64,64]) {
  %x = f32[8,64]{1,0} parameter(0)
  %gather.1 = f32[64,64]{1,0} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %sent = (f32[8,64]{1,0}, f32[64,64]{1,0}) custom-call(%gather.1), custom_call_target="start"
}

%beside (y: f32[64,64], x: f32[8,64], whole: f32[64,64]) -> (f32[64,64], f32[64,64]) {
  %y = f32[64,64]{1,0} parameter(0)
  %x.1 = f32[8,64]{1,0} parameter(1)
  %whole = f32[64,64]{1,0} parameter(2)
  %gather.2 = f32[64,64]{1,0} all-gather(%x.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %square = f32[64,64]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %on = f32[64,64]{1,0} custom-call(%whole, %gather.2), custom_call_target="step"
  ROOT %both = (f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%square, %on)
}

ENTRY %main (x: f32[8,64], y: f32[64,64]) -> f32[64,64] {
  %x.2 = f32[8,64]{1,0} parameter(0)
  %y.1 = f32[64,64]{1,0} parameter(1)
  %begun = (f32[8,64]{1,0}, f32[64,64]{1,0}) fusion(%x.2), kind=kCustom, calls=%start
  %x.3 = f32[8,64]{1,0} get-tuple-element(%begun), index=0
  %whole.1 = f32[64,64]{1,0} get-tuple-element(%begun), index=1
  %going = (f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(%y.1, %x.3, %whole.1), kind=kOutput, calls=%beside
  ROOT %z = f32[64,64]{1,0} get-tuple-element(%going), index=0
}
"""


def test_a_collective_that_is_fused_with_other_work_in_steps_counts_once() -> None:
    program, square = CompiledProgram(STEPS, 8), 64 * 64 * 4
    (gather,) = [work.collective for work in program.work if work.collective is not None]
    assert (gather.kind, gather.bytes, gather.group) == ("all-gather", 3 * 8 * 64 * 4, (0, 1, 2, 3))
    assert program.flops == 2 * 64**3
    assert program.bytes == 2 * square  # of the product; what the collective carries is none


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("{{0,2},{1,3},{4,6},{5,7}}", (0, 2)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_of_devices(groups: str, group: tuple[int, ...]) -> None:
    program = CompiledProgram(LOOP.replace("{{0,4},{1,5},{2,6},{3,7}}", groups), 8)
    (found,) = [w.collective for w in program.work if w.collective is not None and w.collective.kind == "all-reduce"]
    assert found.group == group


def test_a_batched_product_written_as_a_convolution() -> None:
    """TPUs write products of matrices so: of the 24 positions of the window one meets a number."""
    text = """
    ENTRY %main (a: f32[24,16,8], b: f32[24,8,32]) -> f32[24,16,32] {
      %a = f32[24,16,8]{2,1,0} parameter(0)
      %b = f32[24,8,32]{2,1,0} parameter(1)
      ROOT %y = f32[24,16,32]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
    }"""
    text = dedent(text).lstrip().replace("WINDOW", "window={size=24 stride=23 lhs_dilate=24}")
    assert CompiledProgram(text, 1).flops == 24 * 2 * 16 * 8 * 32


def test_products_inside_a_tpus_attention() -> None:
    """Kernels, which XLA calls and does not look into: two of attention, three and four of its gradients.

    Transformations of a function stand before the name of its kernel.
    """
    text = """
    ENTRY %main (q: bf16[2,4,512,64], k: bf16[2,4,256,64]) -> bf16[2,4,512,64] {
      %q = bf16[2,4,512,64]{3,2,1,0} parameter(0)
      %k = bf16[2,4,256,64]{3,2,1,0} parameter(1)
      %flash_mha_bwd_dq_block_q_major_512.1 = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %k, %k), CALL
      %flash_mha_bwd_dkv_block_q_512.1 = (bf16[2,4,256,64]{3,2,1,0}, u8[]) custom-call(%q, %k, %k), CALL
      %sort.1 = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %k), CALL
      %jvp_flash_tangent_fwd_.1 = (bf16[2,4,512,64]{3,2,1,0}, f32[2,1,512]{2,1,0}) custom-call(%q, %k, %k, %q), CALL
      %transpose_jvp_flash_tangent_bwd_k__.1 = bf16[2,4,256,64]{3,2,1,0} custom-call(%q, %k, %k), CALL
      ROOT %flash_attention.3 = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %k, %k), CALL
    }"""
    text = dedent(text).lstrip().replace("CALL", 'custom_call_target="tpu_custom_call"')
    assert CompiledProgram(text, 1).flops == (2 + 3 + 4 + 6 + 12) * 2 * 8 * 512 * 256 * 64


LIBRARIES = """
HloModule jit_step, frontend_attributes={a = "b"}

ENTRY %main (x: bf16[2,8,8,16], k: bf16[32,3,3,16]) -> bf16[] {
  %x = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %k = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %w = bf16[32,64]{1,0} parameter(2)
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(3)
  %v = bf16[2,256,4,64]{3,2,1,0} parameter(4)
  OPERATION
}
"""
WINDOW = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
TAPS = 2 * (4 * 3 - 1) ** 2 * 2 * 16 * 32  # 8 x 8 pixels to 4 x 4: one row of taps lies outside
CONVOLVED = 2 * (2 * 8 * 8 * 16 + 32 * 9 * 16 + 2 * 4 * 4 * 32)  # bytes
ATTENDED = 2 * (2 * 4) * 128 * 256 * 64
READ = 2 * 2 * (128 + 256) * 4 * 64


@pytest.mark.parametrize(
    ("operation", "flops", "traffic"),
    [
        ('%y = (bf16[2,4,4,32]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %k), WINDOW, '
         'custom_call_target="__cudnn$convForward"', TAPS, CONVOLVED),
        ('%y = (bf16[32,3,3,16]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %g), WINDOW, '
         'custom_call_target="__cudnn$convBackwardFilter"', TAPS, CONVOLVED),
        ('%y = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), WINDOW, '
         'custom_call_target="__cudnn$convBackwardInput"', TAPS, CONVOLVED),
        ('%y = (f32[32,32]{1,0}, s8[4194304]{0}) custom-call(%w, %w), custom_call_target="__cublas$lt$matmul", '
         'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
         '"rhs_contracting_dimensions":["1"]}}}', 2 * 32 * 32 * 64, 32 * 64 * 2 + 32 * 32 * 4),
        ('%y = (bf16[2,4,128,64]{3,1,2,0}, f32[2,4,128]{2,1,0}, u8[64]{0}) custom-call(%q, %v, %v), '
         'custom_call_target="__cudnn$fmhaSoftmax"', 2 * ATTENDED, READ + 2 * 2 * 4 * 128 * 64 + 4 * 2 * 4 * 128),
        ('%y = (bf16[2,4,128,64]{3,1,2,0}, bf16[2,4,256,64]{3,1,2,0}, u8[64]{0}) custom-call(%q, %v, %v), '
         'custom_call_target="__cudnn$fmhaSoftmaxBackward"', 5 * ATTENDED, 2 * READ),
        ('%y = f32[32]{0} custom-call(%w), custom_call_target="__gpu$TopK"', 0, 32 * 64 * 2 + 32 * 4),
    ],
)  # fmt: skip
def test_what_gpus_leave_to_libraries(operation: str, flops: int, traffic: int) -> None:
    """cuBLAS and cuDNN count as the product, convolution or attention that they are; workspaces are no traffic."""
    gradient = "%g = bf16[2,4,4,32]{3,2,1,0} bitcast(%q)\n  ROOT "
    program = CompiledProgram(LIBRARIES.replace("OPERATION", gradient + operation.replace("WINDOW", WINDOW)), 1)
    assert program.flops == flops
    assert program.bytes == traffic


def test_flops_of_what_is_mapped_over_devices() -> None:
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, kernel = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    P = jax.sharding.PartitionSpec
    mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(jax.make_jaxpr(mapped)(rows, kernel)) == 2 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("error", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 58.50G of 15.75G hbm. Exceeded", 58.5),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (58.50G) exceeds available HBM (15.75G).", 58.5),
        ("RESOURCE_EXHAUSTED: no figure", None),
        ("INTERNAL: Used 58.50G of 15.75G", None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_no_error(error: str, gib: float | None) -> None:
    assert bytes_needed(error) == (None if gib is None else gib * 2**30)


def test_flops_of_cudnns_attention() -> None:
    """Of which only the operands are seen, and only on a machine that has it."""
    q, kv = (SimpleNamespace(aval=SimpleNamespace(shape=(2, length, 4, 64))) for length in (128, 256))

    def equation(name: str) -> Any:
        return SimpleNamespace(primitive=SimpleNamespace(name=name), params={}, invars=[q, kv, kv])

    product = 2 * (2 * 4) * 128 * 256 * 64
    forward, backward = (f"dot_product_attention_{way}_wrapper" for way in ("fwd", "bwd"))
    assert flops(SimpleNamespace(eqns=[equation(forward)])) == 2 * product
    assert flops(SimpleNamespace(eqns=[equation(forward), equation(backward)])) == 7 * product


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, name: str | None) -> None:
    assert chip_of(kind) == (CHIPS[name] if name else None)


def test_flops_of_a_real_program() -> None:
    """A scanned layer, a convolution and their gradients: in the trace and in what XLA makes of it."""

    def loss(w: Any, kernel: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y, _ = jax.lax.scan(lambda y, layer: (jnp.tanh(y @ layer), None), y.reshape(2, -1), w)
        return jnp.sum(y)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 64, 64), (3, 3, 3, 4), (2, 6, 6, 3))]
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
    layers, conv = 5 * 2 * 2 * 64 * 64, 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert flops(traced.jaxpr) == 3 * layers + 2 * conv
    assert CompiledProgram(traced.lower().compile().as_text(), 1).flops == 3 * layers + 2 * conv


def torus(kind: str, *shape: int) -> Topology:
    @dataclass(frozen=True)
    class Device:
        coords: tuple[int, ...]

    places = [Device((*index, 0)) for index in np.ndindex(*shape)]
    return Topology(name=f"{kind}:{'x'.join(map(str, shape))}", chip=CHIPS[kind], shape=shape, devices=places)


def test_what_wires_carry() -> None:
    link, sent = CHIPS["v5e"].link, 45e9
    small, large = torus("v5e", 8, 8), torus("v5e", 16, 16)
    assert small.seconds(sent, small.devices[:8]) == pytest.approx(sent / link + 7 * HOP)  # a row is a line
    assert small.seconds(sent, small.devices) == pytest.approx(sent / link / 2 + 14 * HOP)
    assert large.seconds(sent, large.devices[:16]) == pytest.approx(sent / link / 2 + 8 * HOP)  # a ring
    assert large.seconds(sent, large.devices[:8]) == pytest.approx(sent / link + 7 * HOP)  # half of one
    assert large.seconds(sent, large.devices) == pytest.approx(sent / link / 4 + 16 * HOP)
    nodes = Topology(name="h100:16", chip=CHIPS["h100"], shape=(16,), devices=range(16))
    assert nodes.seconds(sent, range(16)) == pytest.approx(sent / 50e9 + 15 * HOP)
    assert nodes.seconds(sent, range(8)) == pytest.approx(sent / 450e9 + 7 * HOP)


def test_candidates_cut_the_batch() -> None:
    assert set(candidates(4, 4)) == {
        "data=4,fsdp=1,tensor=1", "data=2,fsdp=2,tensor=1", "data=1,fsdp=4,tensor=1", "data=2,fsdp=1,tensor=2",
        "data=1,fsdp=2,tensor=2", "data=1,fsdp=1,tensor=4",
    }  # fmt: skip
    assert set(candidates(4, 2)) == {"data=2,fsdp=1,tensor=2", "data=1,fsdp=2,tensor=2", "data=1,fsdp=1,tensor=4"}


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v9:2x2", "v5e:8x", "v5e:0x8", "8x8"])
def test_a_topology_is_a_chip_and_sides(name: str) -> None:
    with pytest.raises(ValueError, match=r"write CHIP:SIDES, such as v5e:8x8; chips are v4, v5e"):
        parse(name)


def test_without_the_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package libtpu, and no TPU: pip install libtpu"):
        open_topology("v5e:8x8")
    with pytest.raises(ModuleNotFoundError, match=r"needs JAX's CUDA plugin: pip install 'lcm-jax\[cuda\]'"):
        open_topology("h100:8")
    assert cli.main(["plan", "--config", "mmdit_d15", "--topology", "v5e:8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gpus_come_in_whole_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def described(name: str, platform: str, said: str, **options: Any) -> list[Any]:
        asked.append(options["topology"])
        return [None] * int(np.prod(list(map(int, options["topology"].split("x")))))

    monkeypatch.setattr(topologies, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies, "_described", described)
    assert [len(open_topology(f"h100:{sides}").devices) for sides in ("1", "8", "2x8")] == [1, 8, 16]
    assert asked == ["1x1x1", "1x1x8", "1x2x8"]
    with pytest.raises(ValueError, match="12 GPUs are no whole nodes of 8"):
        open_topology("a100:12")


def test_a_plan_is_known_again_by_its_program() -> None:
    """In which a call to cuDNN names where this process keeps the rules of its partitioning."""

    def digest(text: str) -> str:
        class Known(Traced):
            mesh: Any = SimpleNamespace(shape={"data": 2})
            arguments, lowered = 1, SimpleNamespace(as_text=lambda: text)

            def __init__(self) -> None: ...

        return _digest(Known(), torus("v5e", 2, 2))

    call = '%1 = stablehlo.custom_call @CustomSPMDPartitioning(%0) {{backend_config = "{}"}} : tensor<{}xf32>'
    assert digest(call.format(140122359132880, 4)) == digest(call.format(140339688824336, 4))
    assert digest(call.format(140122359132880, 4)) != digest(call.format(140122359132880, 5))


def test_a_topology_has_as_many_devices_as_this_process() -> None:
    with pytest.raises(ValueError, match=r"this process has 1 CPU devices"):
        open_topology("cpu:8")


WIDTH, ROWS = 64, 32
SCRIPT = f"""
import json, sys
from dataclasses import dataclass
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from lcm_jax.plan import planning
from lcm_jax.plan.planning import plan, search
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.tasks.abstract_step import abstract_task

def loss(params, ema, frozen, batch, key, step):
    error = jnp.mean((batch["x"] @ params["kernel"] - batch["x"] @ frozen) ** 2)
    return error, {{"loss": error}}

@dataclass(frozen=True)
class Linear:
    def abstract(self):
        square = jax.ShapeDtypeStruct(({WIDTH}, {WIDTH}), jnp.float32)
        rows = lambda n: {{"x": jax.ShapeDtypeStruct((n, {WIDTH}), jnp.float32)}}
        return abstract_task(lambda key: {{"kernel": jnp.zeros(square.shape)}}, loss, square, rows)

planning._TENSOR = (1,)
config = TrainConfig(task=Linear(), loop=LoopConfig(batch_size={ROWS}, mesh="data=8"))
plans = [plan(config, "cpu:8", "linear"), *search(config, "cpu:8", "linear")]
again = plan(config, "cpu:8", "linear")
assert again == plans[0], (again, plans[0])
print(json.dumps([each.to_dict() for each in plans]))
"""


def test_a_step_planned_for_eight_devices(tmp_path: Path) -> None:
    """By hand: three products of a batch's part with a square; a gradient summed over all."""
    environment = os.environ | {"LCM_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    split, *found = json.loads(done.stdout)
    square = WIDTH * WIDTH * 4
    assert split["chips"] == 8
    assert split["parameters"] == WIDTH * WIDTH
    # kernel, average, two moments and the frozen square; the counters of state and optimizer; the batch's part
    assert 0 <= split["arguments"] - (5 * square + ROWS // 8 * WIDTH * 4) <= 32
    assert split["model_flops"] == split["flops"] == 3 * 2 * (ROWS // 8) * WIDTH * WIDTH
    (reduce,) = split["collectives"].values()
    assert 0 <= reduce["bytes"] - 2 * square * 7 / 8 <= 64  # the gradient, and the loss
    assert split["step"] == pytest.approx(
        split["compute"] + reduce["bytes"] / CHIPS["cpu"].link + 7 * HOP * reduce["count"]
    )

    steps = [found_plan["step"] for found_plan in found]
    assert len(found) == 4
    assert steps == sorted(steps)
    by_parameters = next(
        found_plan for found_plan in found if found_plan["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    )
    assert 0 <= by_parameters["arguments"] - (5 * square // 8 + ROWS // 8 * WIDTH * 4) <= 32


@pytest.mark.slow
def test_a_step_planned_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    """By JAX's CUDA plugin; without it a process says what to install."""
    script = SCRIPT.replace("cpu:8", "h100:8").replace('search(config, "h100:8", "linear")', "()")
    environment = os.environ | {"LCM_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        assert "needs JAX's CUDA plugin: pip install 'lcm-jax[cuda]'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (split,) = json.loads(done.stdout)
    assert split["model_flops"] == split["flops"] == 3 * 2 * (ROWS // 8) * WIDTH * WIDTH
    assert sum(found_plan["bytes"] for found_plan in split["collectives"].values()) >= 2 * WIDTH * WIDTH * 4 * 7 / 8


SCHEDULE = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "whole", "lora"])
def test_an_abstract_task_has_the_shapes_of_the_task(
    kind: str, tiny_model: Path, tiny_components: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path))
    data = DataConfig(name=f"folder:{pictures}", size=16)
    around = {"vae": str(tiny_model), "text": str(tiny_model), "data": data, "prompts": data}
    task: Any
    if kind == "diffusion":
        net = tiny_components["unet"].module.config
        task = DiffusionTask(net=net, objective=Diffusion(schedule=SCHEDULE), **around)
    else:
        lora = LoraConfig(rank=2) if kind == "lora" else None
        objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0)
        task = DistillationTask(teacher=str(tiny_model), objective=objective, lora=lora, **around)
    built, abstract = task.build(), task.abstract()

    def shapes(made: Any) -> Any:
        init = jax.eval_shape(made.init, jax.random.key(0))
        trees = (init, made.frozen, next(made.batches(4, 0)))
        return jax.tree.map(lambda leaf: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name), trees)

    assert shapes(abstract) == shapes(built)


# The counts of the papers and of the repositories; a w-embedding is 256 x 320, or 256 x the network's width.
LARGE = {
    "sd15_lcm": 859_520_964 + 256 * 320,
    "sdxl_lcm": 2_567_463_684 + 256 * 320,
    "sd3_medium_lcm": 2_028_328_000 + 192 * 192 * 1536 + 256 * 256,
    "sd35_large_lcm": 8_056_627_520 + 192 * 192 * 2432 + 256 * 256,
    "mmdit_d15": 496_070_000 + 32 * 32 * 960,  # with its position grid
    "sd15_lcm_lora": 67_250_000,
    "sdxl_lcm_lora": 196_750_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_large_models_have_their_size(name: str) -> None:
    params = jax.eval_shape(configs.get(name).task.abstract().init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(LARGE[name], rel=1e-4)
