"""Pickled weights of PyTorch as safetensors files: `python -m lcm_jax.weights.from_pickle PATH ...`.

The library itself never reads a pickle, and nothing in it imports this module: it is a program of its own, for files
that you trust, and needs PyTorch. PyTorch reads them with `weights_only`, so nothing but tensors and plain containers
is built: what else a training program stored (callbacks, hyper-parameters) becomes an empty dict and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.runtime.atomic_files import written_aside
from lcm_jax.weights.safetensors_files import read_json

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_STATE = re.compile(r"optimizer|scheduler|scaler|training_args|random_states|rng_state")  # of a training, no weights
_NESTS = ("state_dict", "model_state_dict", "module", "model", "params_ema", "params")  # where a state dict lies


class _Stub(dict[Any, Any]):
    """The place of an object that is neither a tensor nor a plain container: nothing of it is kept."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


def target_of(path: Path) -> Path:
    """Return the name under which diffusers, transformers and this library look for the weights of a pickle.

    >>> from pathlib import Path
    >>> from lcm_jax.weights.from_pickle import target_of
    >>> [target_of(Path(name)).name for name in ("pytorch_model.fp16.bin", "diffusion_pytorch_model.bin", "sd-v1.ckpt")]
    ['model.fp16.safetensors', 'diffusion_pytorch_model.safetensors', 'sd-v1.safetensors']
    """
    stem = path.stem if path.suffix.lower() in (*SUFFIXES, ".safetensors") else path.name
    return path.with_name(re.sub(r"^pytorch_model(?=[.-]|$)", "model", stem) + ".safetensors")


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the tensors of nested dicts under dotted names, each with memory of its own."""
    import torch

    tensors: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            tensors |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value.detach().clone().contiguous()
    return tensors


def read(path: Path) -> dict[str, Any]:
    """Return the tensors of a pickle by name; ValueError if it holds none."""
    import torch

    serialization: Any = torch.serialization
    is_zip = zipfile.is_zipfile(path)
    unknown = serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    with serialization.safe_globals([(_Stub, name) for name in unknown]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    nest = next(
        (name for name in _NESTS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)), ""
    )
    content = content[nest] if nest else content
    tensors = _flat(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors")
    return tensors


def write(path: Path) -> Path:
    """Write the weights of one pickle beside it, and return the new file; a file that is there already is kept.

    A pickle that is itself named *.safetensors is renamed to *.ckpt first.
    """
    from safetensors.torch import save_file

    target = target_of(path)
    if target.exists() and target != path:
        return target
    if target == path:  # torch.load would take it for what it is named
        os.replace(path, path.with_suffix(".ckpt"))
        path = path.with_suffix(".ckpt")
    tensors = read(path)
    with written_aside(target) as (aside,):
        save_file(tensors, aside, metadata={"format": "pt"})
    return target


def _write_index(path: Path) -> Path:
    """Write the index of the converted shards that a pickles' index, such as pytorch_model.bin.index.json, names."""
    index = read_json(path)
    shards = index.get("weight_map")
    if not (
        isinstance(shards, dict) and all(isinstance(name, str) and Path(name).name == name for name in shards.values())
    ):
        raise ValueError(f"{path}: its weight_map is no object of names of files beside it")
    names = {key: target_of(path.with_name(shard)).name for key, shard in shards.items()}
    stem, _, rest = path.name.partition(".bin.index")
    target = target_of(path.with_name(f"{stem}.bin"))
    target = target.with_name(f"{target.name}.index{rest}")
    with written_aside(target) as (aside,):
        aside.write_text(json.dumps(index | {"weight_map": names}, indent=2) + "\n", encoding="utf-8")
    return target


def pickles(path: Path) -> list[Path]:
    """Return a file itself, or the pickles of weights in a folder and those below it."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    return [file for file in found if not _STATE.search(file.name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert files, or all pickles of weights in folders, and print what was written."""
    parser = argparse.ArgumentParser(prog="python -m lcm_jax.weights.from_pickle", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a pickle, or a folder with pickles")
    for path in parser.parse_args(argv).paths:
        found = pickles(path)
        if not found:
            print(f"{path}: no pickles of weights ({', '.join(SUFFIXES)})", file=sys.stderr)
            return 2
        for file in found:
            try:
                print(write(file))
            except Exception as error:  # torch raises errors of many kinds for a file that it cannot read
                print(f"{file}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
                return 2
        for index in sorted({i for file in found for i in file.parent.glob("*.bin.index*.json")}):
            try:
                print(_write_index(index))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
