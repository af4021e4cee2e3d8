"""Files that are well-formed and wrong: other types, numbers out of bounds, nesting, names that lead elsewhere.

    python mutants.py KIND=COUNT,KIND=COUNT SEED MODEL ORBAX PROGRAM WORK

Each mutant is a copy of a good file with one or more of its values replaced, and is read as a user would. The process
says when it begins one and how it ended, in JSON lines: if it is killed, the last line that it began names the mutant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lcm_jax
from lcm_jax.inference.ahead_of_time import Exported
from lcm_jax.nets import RULES_UNET
from lcm_jax.weights.component import config_of
from lcm_jax.weights.convert import convert
from lcm_jax.weights.lora.files import load_lora
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import load_tensors
from lcm_jax.weights.torch_params import check_tensors

KINDS = ("safetensors", "lora", "folder", "orbax", "program")
MOST_SECONDS = 120  # of one mutant: a hang, not a slow machine
MOST_MEMORY = 1 << 30  # bytes by which one mutant may grow the process; the good files have less than 2 MB


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


NAMES = (
    "../escape",
    "/tmp/escape",
    "..",
    "a/b",
    "unet/../../x",
    "a\nb",
    "\x1b[31mred",
    "\ud800",
    "x" * 5000,
    "",
    "C:\\x",
)
WRONG: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 3, 2**31, 2**63, 10**30, 1.5, -1e308, 1e308, 1e-300, math.nan, math.inf, -math.inf),
    *([], [[]], {}, {"a": 1}, [1] * 1000, [math.nan], ["x"], [10**9], 10**7, 100_000, 4096, nested(100), nested(300)),
    *NAMES,
)


def mutated(rng: np.random.Generator, value: Any) -> Any:
    """Return a JSON value with one of its values, anywhere, replaced, removed, doubled or given another name."""
    containers: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, (dict, list)) and node:
            containers.append(node)
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    value = json.loads(json.dumps(value))
    walk(value)
    if not containers or rng.random() < 0.03:
        return pick(rng, WRONG)
    # The outermost objects are where the keys of a config are; a tokenizer has thousands of others.
    node = containers[0 if rng.random() < 0.4 else rng.integers(len(containers))]
    if isinstance(node, list):
        index = int(rng.integers(len(node)))
        node[index] = pick(rng, WRONG)
        return value
    key = pick(rng, list(node))
    match rng.choice(["replace", "replace", "replace", "remove", "rename", "add"]):
        case "replace":
            node[key] = pick(rng, WRONG)
        case "remove":
            del node[key]
        case "rename":
            node[pick(rng, NAMES)] = node.pop(key)
        case _:
            node[pick(rng, NAMES)] = node[key] if rng.random() < 0.5 else pick(rng, WRONG)
    return value


def pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def dumped(rng: np.random.Generator, value: Any, times: int = 1) -> bytes:
    for _ in range(times):
        value = mutated(rng, value)
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "[" * 100_000
    if rng.random() < 0.05:
        return pick(rng, (b"[" * 200_000, b'{"a":' * 50_000, b"", b"\xff\xfe", text.encode()[:-1], b"1" * 10_000))
    return text.encode()


def with_header(data: bytes, header: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[end:]


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """Bits changed, a part overwritten, a part cut out or the end cut off."""
    changed = bytearray(data)
    at = int(rng.integers(len(data)))
    match rng.choice(["bits", "run", "cut", "out"]):
        case "bits":
            for index in rng.integers(len(data), size=rng.choice([1, 4, 32])):
                changed[index] ^= 1 << int(rng.integers(8))
        case "run":
            changed[at : at + 16] = bytes([pick(rng, (0, 255, 127, 128))]) * len(changed[at : at + 16])
        case "cut":
            del changed[at:]
        case _:
            del changed[at : at + int(rng.integers(1, 64))]
    return bytes(changed)


class Reader:
    """Writes mutants of one kind and reads them."""

    def __init__(self, kind: str, model: Path, orbax: Path, program: Path, work: Path) -> None:
        self.read: Callable[[np.random.Generator], Any] = getattr(self, kind)
        self.model, self.orbax_folder, self.program_file, self.work = model, orbax, program, work
        self.precious = work / "precious"
        self.precious.mkdir(parents=True)
        (self.precious / "weights.safetensors").write_bytes(b"mine")
        (work / "secret.json").write_text('{"mine": 1}')
        self.target = work / "out" / "target"
        self.target.parent.mkdir()
        self.before = self.outside()

    def outside(self) -> dict[str, bytes]:
        """All that lies around the mutant and the target."""
        around = [path for path in self.work.rglob("*") if path.is_file() and "mutant" not in path.parts]
        return {str(path): path.read_bytes() for path in around if self.target not in path.parents}

    def fresh(self, original: Path) -> Path:
        copy = self.work / "mutant"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(original, copy) if original.is_dir() else (copy.mkdir(), shutil.copy(original, copy))
        return copy

    def safetensors(self, rng: np.random.Generator) -> None:
        folder = self.fresh(self.model / "vae")
        file = folder / "diffusion_pytorch_model.safetensors"
        data = file.read_bytes()
        if rng.random() < 0.25:  # an index of shards that is not what it seems
            names = list(header_of(data))[1:]
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file.name)}
            file = file.rename(folder / "one.safetensors")
            index["weight_map"] |= dict.fromkeys(names, file.name)
            path = folder / "diffusion_pytorch_model.safetensors.index.json"
            path.write_bytes(dumped(rng, index, times=int(rng.choice([1, 3]))))
        else:
            file.write_bytes(with_header(data, dumped(rng, header_of(data), times=int(rng.choice([1, 1, 4])))))
        kind, config = config_of(folder / "config.json")
        family = lcm_jax.weights.registry.FAMILIES[kind]
        like = lcm_jax.weights.abstract_params.abstract_params(kind, config)
        check_tensors(load_tensors(folder), like, family.rules, source=str(folder))

    def lora(self, rng: np.random.Generator) -> None:
        from safetensors.numpy import save_file

        folder = self.fresh(self.model / "scheduler")
        stem = "unet.down_blocks.0.attentions.0.proj_in"
        tensors = {f"{stem}.lora_A.weight": np.ones((2, 16, 1, 1)), f"{stem}.lora_B.weight": np.ones((16, 2, 1, 1))}
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"proj_in": 2}, "use_rslora": False}
        if rng.random() < 0.3:
            config["alpha_pattern"] = {pick(rng, (r"((\w|\.)+)+!", "(.*)*x", "(?:", "^proj_in", "[", "\\")): 1}
        if rng.random() < 0.5:
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_bytes(dumped(rng, {**config, "base_model_name_or_path": "../x"}))
            path = folder / "adapter_model.safetensors"
        else:
            path = folder / "pytorch_lora_weights.safetensors"
            header = {f"unet.{key}": value for key, value in config.items()}
            text = dumped(rng, header).decode("utf-8", "replace")
            save_file(tensors, path, {"lora_adapter_metadata": text})
        adapters = load_lora(path, None, RULES_UNET)
        assert all(np.isfinite(np.asarray(leaf)).all() for adapter in adapters.values() for leaf in adapter.values())

    def folder(self, rng: np.random.Generator) -> None:
        folder = self.fresh(self.model)
        names = ("unet", "vae", "text_encoder")
        files = [folder / name / "config.json" for name in names] * 3
        files += [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"] * 4
        files += sorted((folder / "tokenizer").glob("*.json"))
        file = pick(rng, files)
        file.write_bytes(dumped(rng, json.loads(file.read_bytes()), times=int(rng.choice([1, 1, 1, 3]))))
        if rng.random() < 0.1:
            link = folder / "tokenizer" / pick(rng, ("special_tokens_map.json", "added_tokens.json", "notes.txt"))
            link.unlink(missing_ok=True)
            link.symlink_to(self.work / "secret.json")
        if rng.random() < 0.5:
            convert(folder, self.target, "diffusers")
            copied = [path.read_bytes() for path in self.target.rglob("*") if path.is_file()]
            assert b'{"mine": 1}' not in copied, "a link was followed"
            return
        pipe = lcm_jax.load(folder)
        for name, component in pipe.folder.components.items():
            assert numbers_are_sound(component.module.config), name
        assert numbers_are_sound(pipe.model.schedule)
        times = np.asarray(pipe.model.schedule.alpha(np.float32(1.0)))
        assert np.isfinite(times).all()

    def orbax(self, rng: np.random.Generator) -> None:
        folder = self.fresh(self.orbax_folder)
        params = folder / "params"
        files = sorted(path for path in params.rglob("*") if path.is_file())
        file = pick(rng, files)
        if rng.random() < 0.8:  # whoever changes a file on purpose leaves no checksums
            (params / "checksums.json").unlink(missing_ok=True)
        if not file.exists():
            file = folder / "unet" / "config.json"
        data = file.read_bytes()
        try:
            value = json.loads(data)
        except ValueError:
            file.write_bytes(flipped(rng, data))
        else:
            file.write_bytes(dumped(rng, value) if rng.random() < 0.8 else flipped(rng, data))
        read_model(folder)

    def program(self, rng: np.random.Generator) -> None:
        path = self.fresh(self.program_file) / self.program_file.name
        if rng.random() < 0.15:
            path.write_bytes(flipped(rng, path.read_bytes()))
        else:
            self.rezip(rng, path)
        if not hasattr(self, "pipe"):
            self.pipe = lcm_jax.load(self.model)
        Exported(self.pipe, path)

    def rezip(self, rng: np.random.Generator, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            header, body = json.loads(archive.read("header.json")), archive.read("program.bin")
        if rng.random() < 0.5:
            body = pick(rng, (flipped(rng, body), flipped(rng, body), flipped(rng, body), b"", b"\0" * 1000, b"#loc"))
        if rng.random() < 0.9:
            header["program"] = hashlib.sha256(body).hexdigest()
        text = json.dumps(header).encode() if rng.random() < 0.5 else dumped(rng, header)
        method = pick(rng, (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        names = pick(
            rng, (("header.json", "program.bin"),) * 8 + (("../header.json", "program.bin"), ("header.json", "/p"))
        )
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
            warnings.simplefilter("ignore")
            for name, content in zip(names, (text, body), strict=True):
                archive.writestr(name, content)
            if rng.random() < 0.1:
                archive.writestr(
                    "program.bin", b"\0" * (600 << 20) if rng.random() < 0.2 else body, zipfile.ZIP_DEFLATED
                )


def numbers_are_sound(config: Any) -> bool:
    """Whether every number of a config is finite and small enough to be one of a network's."""

    def sound(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(sound, value))
        return not isinstance(value, (int, float)) or (math.isfinite(value) and abs(value) <= 2**20)

    return all(sound(getattr(config, field.name)) for field in dataclasses.fields(config))


def outcome(read: Callable[[], Any]) -> str:
    """How reading a mutant ends: "" where it is read or refused as it should be, else what is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read()
            said = []
        except (ValueError, FileNotFoundError) as error:
            said = [str(error)]
        except Exception:
            return traceback.format_exc()
    said += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for line in said:
        if not line.isprintable() or len(line) > 3000:
            return f"not one short line: {line!r:.3000}"
    return ""


def run(reader: Reader, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield {"begin": index}, then how that mutant ended, for `count` mutants."""
    for index in range(count):
        yield {"begin": index}
        memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        problem = outcome(lambda index=index: reader.read(np.random.default_rng([seed, index])))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
        if not problem and grown > MOST_MEMORY:
            problem = f"took {grown >> 20} MiB"
        if not problem and time.monotonic() - start > MOST_SECONDS:
            problem = f"took {time.monotonic() - start:.0f} seconds"
        if not problem and reader.outside() != reader.before:
            problem = "wrote outside of its target"
        yield {"end": index, "problem": problem}


def main() -> None:
    wanted, seed, *paths = sys.argv[1:]
    model, orbax, program, work = map(Path, paths)
    work.mkdir(parents=True)
    os.chdir(work)
    # Lines of its own: the libraries below print what they like, in native code too.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
    for kind, count in (item.split("=") for item in wanted.split(",")):
        for line in run(Reader(kind, model, orbax, program, work / kind), int(seed), int(count)):
            print(json.dumps({"kind": kind, **line}), file=lines)


if __name__ == "__main__":
    main()
