"""A process of a job, for the tests: trains light networks as told by a JSON file, and writes what came out.

    python job.py CASES.json [--coordinator HOST:PORT --processes N --process I]

CASES.json holds {"cases": [{"workdir": "...", "net": "unet", "lora": true, "loop": {...}, ...}, ...]}. Each case leaves
`workdir`/result.npz: the parameters and the moving average by path, the losses of the steps, what the last preview
shows, how many bytes each of this process's devices held before the start, and how many the state has, and has on one
device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import Loader
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.evaluation.evaluate import generate
from lcm_jax.inference.loading import load
from lcm_jax.lora import DEFAULT_TARGETS, MMDIT_TARGETS
from lcm_jax.nets import UNet, UNetConfig
from lcm_jax.objectives import Diffusion, LatentConsistencyDistillation
from lcm_jax.parallel import distributed
from lcm_jax.parallel.sharding import gather_to_host, make_mesh
from lcm_jax.train import loop
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.autoencoder import AutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.diffusion import DiffusionTask, initial
from lcm_jax.train.tasks.distillation import DistillationTask, Learner
from lcm_jax.train.tasks.finetune import FinetuneTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from mmdit import MMDiT, MMDiTConfig
from vae16 import LossConfig

UNET = UNetConfig(
    sample_size=4,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=32,
    norm_num_groups=4,
    time_cond_proj_dim=16,
)
MMDIT = MMDiTConfig(
    sample_size=4,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=32,
    pos_embed_max_size=4,
    time_cond_proj_dim=16,
)
# A key's bias has no gradient but rounding errors, which Adam must not blow up where runs are compared.
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup=1, eps=1e-5)


def distillation(net: str, adapted: bool) -> Task:
    """LCM of a random teacher on random latents, with all weights or with LoRA."""
    config: Any = {"unet": UNET, "mmdit": MMDIT}[net]
    if adapted:  # a network that is not told w
        config = replace(config, time_cond_proj_dim=None)
    module: Any = UNet(config) if net == "unet" else MMDiT(config)
    schedule, kind = (DDPM(), "epsilon") if net == "unet" else (RectifiedFlow(), "flow")
    options: Any = {"embed_w": False, "w_min": 7.5, "w_max": 7.5} if adapted else {}
    objective = LatentConsistencyDistillation(schedule=schedule, kind=kind, caption_dropout=0.3, **options)
    lora = LoraConfig(rank=32, targets=DEFAULT_TARGETS if net == "unet" else MMDIT_TARGETS) if adapted else None
    learner = Learner(net=module, objective=objective, lora=lora, critic=None)
    teacher = disturbed(jax.jit(initial(module))(jax.random.key(7)))
    random = np.random.default_rng(0)

    def record() -> dict[str, np.ndarray]:
        shapes = {"mean": (4, 4, 4), "std": (4, 4, 4), "context": (3, 32)} | (
            {"pooled": (32,)} if net == "mmdit" else {}
        )
        return {name: np.abs(random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}

    records = [record() for _ in range(24)]
    null = {name: jnp.zeros((1, *leaf.shape)) for name, leaf in records[0].items() if name not in ("mean", "std")}
    frozen = {"teacher": teacher, "null": null}
    return task(lambda key: learner.init_params(key, teacher, frozen), learner.loss, frozen, records)


def disturbed(params: Any) -> Any:
    """Trained networks have no gates that are shut and do not end in zeros."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    return tree.unflatten([leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def learning(kind: str, model: str, pictures: str) -> Task:
    """A task of a user's between the networks of a folder: "diffusion", "lcm-lora", "finetune" (the text encoder too)
    or "autoencoder".
    """
    data = DataConfig(name=f"folder:{pictures}", size=16)
    around: dict[str, Any] = {"vae": model, "text": model, "data": data, "prompts": data, "preview_steps": 2}
    if kind == "diffusion":
        net = load(model).model.net.config
        return DiffusionTask(net=net, objective=Diffusion(schedule=DDPM()), **around).build()
    if kind == "finetune":
        return FinetuneTask(model=model, data=data, preview_steps=2, train_text=True).build()
    if kind == "autoencoder":
        config = load(model).model.vae.config
        return AutoencoderTask(
            data=data, validation=data, model=config, loss=LossConfig(perceptual_weight=0.0, gan_weight=0.0)
        ).build()
    objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0)
    return DistillationTask(teacher=model, objective=objective, lora=LoraConfig(rank=2), **around).build()


def regression(seconds: float = 0.0, hang_at: int = -1) -> Task:
    """Two matrices fitted with noise on their inputs, each example of which takes a while to come.

    hang_at: of the example after which the last process is given no more.
    """
    given = itertools.count()
    random = np.random.default_rng(0)
    records = [{name: random.normal(size=64).astype(np.float32) for name in ("x", "y")} for _ in range(40)]

    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        y = jnp.tanh(x @ params["to_q"]["kernel"]) @ params["to_out_0"]["kernel"] @ frozen["out"]
        error = jnp.mean((y - batch["y"]) ** 2)
        return error, {"loss": error}

    def slowly(record: Any) -> Any:
        last = jax.process_index() == jax.process_count() - 1
        time.sleep(3600.0 if last and next(given) == hang_at else seconds)
        return record

    frozen = {"out": jnp.eye(64)}

    def init(key: Any) -> Any:
        drawn = jax.random.normal(key, (2, 64, 64)) / 8.0
        return {"to_q": {"kernel": drawn[0]}, "to_out_0": {"kernel": drawn[1]}}

    return task(init, loss, frozen, records, transform=slowly)


def task(init: Any, loss: Any, frozen: Any, records: Any, transform: Any = None) -> Task:
    return Task(
        init=init,
        loss=loss,
        frozen=frozen,
        batches=lambda size, seed, rows=None: iter(Loader(records, size, seed, rows=rows, transform=transform)),
        preview=lambda ema, frozen, batched_map: {"size": float(sum(map(jnp.size, jax.tree.leaves(ema))))},
        export=lambda ema, folder: folder.mkdir(exist_ok=True),
    )


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(gather_to_host(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def draw(case: dict[str, Any]) -> None:
    """Pictures of some prompts, more than fit in a batch."""
    pipe = load(case["model"])
    if "mesh" in case:
        pipe.shard(make_mesh(case["mesh"]))
    prompts = ["red heart", "dog face", "cat face", "flag of france", "yellow heart", "a", "b"]
    options = {"steps": 3, "guidance": 3.0, "sampler": "lcm", "batch_size": 5}
    images, _ = generate(pipe, prompts, **options)
    if distributed.is_main():
        np.savez(Path(case["workdir"]) / "result.npz", images=images)


def run(case: dict[str, Any]) -> None:
    if "model" in case:
        return draw(case)
    net = case.get("net", "regression")
    if "learn" in case:
        made = learning(case["learn"], case["folder"], case["pictures"])
    elif net == "regression":
        made = regression(case.get("seconds", 0.0), case.get("hang_at", -1))
    else:
        made = distillation(net, case.get("lora", False))
    held: Counter[Any] = Counter()
    for part in (part for array in jax.live_arrays() for part in array.addressable_shards):
        held[part.device] += part.data.nbytes
    devices = jax.devices()[:1] if case.get("one") else None
    loop.make_mesh = partial(make_mesh, devices=devices)
    losses: list[float] = []
    given: dict[str, Any] = {}
    write, show = loop._Run.write, loop._Run.show

    def listening(self: Any, step: int, metrics: Any, bar: Any) -> None:
        losses.append(float(metrics["loss"]))
        if step == case.get("full_at"):  # as on a full disk, no checkpoint can be written
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        write(self, step, metrics, bar)

    def showing(self: Any, step: int, shown: dict[str, Any]) -> None:
        given.update(shown)
        show(self, step, shown)

    loop._Run.write = listening  # type: ignore[method-assign]
    loop._Run.show = showing  # type: ignore[method-assign]

    workdir = Path(case["workdir"])
    state = loop.fit(made, LoopConfig(**case["loop"]), OPTIMIZER, workdir)
    loop._Run.write, loop._Run.show = write, show  # type: ignore[method-assign]
    sizes = [(leaf.nbytes, leaf.addressable_shards[0].data.nbytes) for leaf in jax.tree.leaves(state)]
    result = flat({"params": state.params, "ema": state.ema}) | {"losses": np.asarray(losses)}
    result |= {f"seen {name}": np.asarray(value) for name, value in given.items()}
    result |= {"held": np.asarray(sorted(held.values()))}
    result |= {"bytes": np.asarray([sum(size) for size in zip(*sizes, strict=True)])}  # of the state; on one device
    if distributed.is_main():
        np.savez(workdir / "result.npz", **result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--peer-timeout", type=int, default=100)
    options = parser.parse_args()
    distributed.initialize(options.coordinator, options.processes, options.process, timeout=options.peer_timeout)
    code = 0
    try:
        for case in json.loads(options.cases.read_text())["cases"]:
            run(case)
    except distributed.Preempted:
        code = distributed.SAVED
    except Exception as error:
        print(f"job: {distributed.peer_failure_message(error) or f'{type(error).__name__}: {error}'}", flush=True)
        raise
    distributed.leave_job(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
