"""Folders and tensorflow-datasets as sources, and every refusal in one line."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lcm_jax.data import InMemory, load_source, records
from lcm_jax.data.sources import open_tfds
from lcm_jax.train.tasks.common import Subset, captions


def picture(path, mode="RGB", size=(12, 8), color=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else 0).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions beside them."""
    for name, color in (("a.png", "red"), ("sub/b.jpg", "lime"), ("c.webp", "blue")):
        picture(tmp_path / name, color=color).with_suffix(".txt").write_text(f" {color} \n", encoding="utf-8")
    return tmp_path


def refused(kind, words, name, split="train"):
    with pytest.raises(kind, match=re.escape(words)) as caught:
        load_source(str(name), split, 8)
    assert "\n" not in str(caught.value)


def test_folder_with_captions_beside(folder):
    source = load_source(f"folder:{folder}", "train", 8)
    records = [source[i] for i in range(len(source))]
    assert [r["caption"] for r in records] == ["red", "blue", "lime"]
    assert all(r["image"].shape == (8, 8, 3) and r["image"].dtype == np.uint8 for r in records)
    assert records[0]["image"].reshape(-1, 3).max(0).tolist() == [255, 0, 0]
    assert source[-1]["caption"] == "lime"


def test_folder_with_metadata_and_splits(tmp_path):
    picture(tmp_path / "test" / "deep" / "x.png", color="red")
    line = json.dumps({"file_name": "deep/x.png", "text": "red é", "more": 1})
    (tmp_path / "test" / "metadata.jsonl").write_text(line + "\n\n", encoding="utf-8")
    assert load_source(str(tmp_path), "test", 8)[0]["caption"] == "red é"
    refused(FileNotFoundError, f"{tmp_path / 'validation'}: no such folder", tmp_path, "validation")


def test_folder_with_two_texts_to_a_picture(folder):
    names = ("a.png", "sub/b.jpg", "c.webp")
    rows = [{"file_name": name, "text": f"{name} ", "synthetic": f" much about {name}"} for name in names]
    table = folder / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    record = load_source(str(folder), "train", 8)[0]
    assert (record["caption"], record["synthetic_caption"]) == ("a.png", "much about a.png")
    table.write_text("\n".join(map(json.dumps, [*rows[:2], rows[2] | {"synthetic": " "}])))
    refused(ValueError, 'metadata.jsonl:3: "synthetic": empty caption', folder)
    del rows[1]["synthetic"]
    table.write_text("\n".join(map(json.dumps, rows)))
    refused(ValueError, 'metadata.jsonl: b.jpg has no "synthetic" text, others have', folder)


def test_pictures_are_scaled_and_cropped_about_the_centre(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("green middle")
    image = load_source(str(tmp_path), "train", 10)[0]["image"]
    assert (image == (0, 255, 0)).all()


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
    ],
)
def test_other_modes_become_rgb_on_white(tmp_path, mode, color, rgb):
    picture(tmp_path / "a.png", mode, color=color).with_suffix(".txt").write_text("x")
    assert load_source(str(tmp_path), "train", 8)[0]["image"][3, 3].tolist() == list(rgb)


def test_transparent_palette_becomes_white(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "a.png", transparency=1)
    (tmp_path / "a.txt").write_text("x")
    assert (load_source(str(tmp_path), "train", 8)[0]["image"] == 255).all()


def test_bad_folders_are_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    refused(ValueError, f"{empty}: empty dataset", empty)
    refused(FileNotFoundError, "no such folder", f"folder:{empty}/nowhere")
    refused(ValueError, "no data source 'nowhere': give openmoji, openmoji-outline, folder:PATH", "nowhere")
    (folder / "a.txt").write_text(" \n")
    refused(ValueError, f"{folder / 'a.txt'}: empty caption", folder)
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00x")
    refused(ValueError, f"{folder / 'a.txt'}: caption is not UTF-8", folder)
    (folder / "a.txt").unlink()
    refused(ValueError, f"{folder / 'a.png'}: picture without caption", folder)
    (folder / "a.txt").write_text("red")
    (folder / "d.txt").write_text("lost")
    refused(ValueError, f"{folder / 'd.txt'}: caption file without a picture", folder)
    (folder / "d.txt").unlink()
    picture(folder / "a.jpg")
    refused(ValueError, "shares its caption file", folder)


def png_without_pixels(path):
    """A well-formed header that says 0 x 5."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b""), "picture of zero bytes"),
        (png_without_pixels, "not a readable picture"),
        (lambda path: path.write_bytes(b"not a picture"), "not a readable picture (unknown format)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a readable picture"),
        (lambda path: picture(path, "I;16"), "picture mode I;16 is not RGB"),
    ],
)
def test_bad_pictures_are_refused_when_opened(folder, spoil, words):
    spoil(folder / "a.png")
    refused(ValueError, f"{folder / 'a.png'}: {words}", folder)


def test_float_picture_is_refused(tmp_path):
    picture(tmp_path / "a.tiff", "F").rename(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    refused(ValueError, "picture mode F is not RGB", tmp_path)


def test_truncated_jpeg_is_refused(folder):
    """When it is opened; without that check, when it is read."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = folder / "sub" / "b.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    refused(ValueError, f"{path}: not a readable picture (image file is truncated", folder)
    source = load_source(str(folder), "train", 8, check=False)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable picture")):
        source[2]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name"', "metadata.jsonl:2: not JSON"),
        ('{"file_name": "a.png"}', 'metadata.jsonl:1: needs text values for "file_name" and "text"'),
        ("[1]", "metadata.jsonl:1: needs text values"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "metadata.jsonl:2: a.png is listed twice"),
        ('{"file_name": "z.png", "text": "x"}', "caption of z.png without a picture"),
        ('{"file_name": "a.png", "text": "x"}', "c.webp: picture without caption"),
    ],
)
def test_bad_metadata_is_refused(folder, lines, words):
    (folder / "metadata.jsonl").write_text(lines)
    refused(ValueError, words, folder)


class TinyLabels(tfds.core.GeneratorBasedBuilder):
    """Six grey pictures of two classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 6, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["dark", "bright"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield i, {"image": Image.new("L", (6, 8), 200 * (i % 2)), "label": i % 2}


def test_tfds_pictures_and_labels(tmp_path, capsys):
    (source,) = open_tfds("tiny_labels", "train", [(4, 4)], data_dir=tmp_path).values()
    assert len(source) == 6
    for i in range(6):
        record = source[i]
        assert record["image"].shape == (4, 4, 3)
        assert (record["image"] == {"dark": 0, "bright": 200}[record["caption"]]).all()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no split 'test'; choose one of train"):
        open_tfds("tiny_labels", "test", [(4, 4)], data_dir=tmp_path)
    buckets = open_tfds("tiny_labels", "train", [(4, 8), (8, 8), (8, 4)], data_dir=tmp_path)  # the pictures are 8 x 6
    assert {size: (len(part), part[5]["image"].shape) for size, part in buckets.items()} == {(8, 8): (6, (8, 8, 3))}


def test_unknown_tfds_name_is_refused():
    refused(ValueError, "tfds:no_such_set: tensorflow-datasets knows no such data set", "tfds:no_such_set")


def tar(path, *names, mode="w"):
    with tarfile.open(path, mode) as file:
        for name in names:
            data = name.encode()
            if name.endswith(".png"):
                data = io.BytesIO()
                Image.new("RGB", (8, 8), "red").save(data, "png")
                data = data.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_samples(tmp_path):
    tar(tmp_path / "b.tar", "x.1.png", "x.txt", "x.png", "x.json")
    tar(tmp_path / "a.tar", "y.txt", "in/x.txt", "y.png", "in/x.png")
    source = load_source(f"tar:{tmp_path}", "train", 8)
    assert [source[i]["caption"] for i in range(3)] == ["y.txt", "in/x.txt", "x.txt"]
    assert (source[2]["image"] == (255, 0, 0)).all()
    assert len(load_source(f"tar:{tmp_path}/b.t*", "train", 8)) == len(load_source(f"tar:{tmp_path}/b.tar")) == 1
    refused(FileNotFoundError, f"{tmp_path / 'validation'}: no such folder", f"tar:{tmp_path}", "validation")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1200]), "damaged or cut off at byte"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "not a plain tar"),
        (lambda path: path.write_bytes(path.read_bytes()[:1024] + b"x" * 9000), "damaged or cut off at byte 1024"),
        (lambda path: path.write_bytes(b"not a tar" * 99), "not a plain tar"),
        (lambda path: tar(path, "a.png", "a.txt", mode="w:gz"), "not a plain tar"),
        (lambda path: tar(path, "a.txt", "b.txt", "a.png"), "sample b has no picture"),
        (lambda path: tar(path, "a.txt", "b.png", "a.png"), "sample b has no .txt caption"),
        (lambda path: tar(path, "a.txt", "a.png", "a.jpg"), "a.jpg and a.png are of one sample"),
        (lambda path: tar(path, "a.txt", "a.jpg"), "a.jpg: not a readable picture (unknown format)"),
        (lambda path: tar(path, "a.json"), "empty dataset"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_bad_tars_are_refused(tmp_path, spoil, words):
    spoil(tar(tmp_path / "a.tar", "a.txt", "a.png"))
    refused((ValueError, FileNotFoundError), words, f"tar:{tmp_path / 'a.tar'}")


def test_captions_are_read_without_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, tables, tars, OpenMoji, their parts and sources with `texts` decode no picture; others read records."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    table = shutil.copytree(folder, tmp_path / "table")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(3)]
    (table / "metadata.jsonl").write_text("\n".join(lines))
    sources = [
        load_source(name, "train", 8) for name in (f"folder:{folder}", f"folder:{table}", f"tar:{tmp_path / 'a.tar'}")
    ]
    sources.append(Subset(sources[0], [0, 1, 2]))
    sources.append(InMemory(images=np.zeros((3, 8, 8, 3), np.uint8), captions=tuple(captions(sources[0]))))
    plain = [dict(sources[0][index]) for index in range(3)]

    def decoded(*_: object) -> None:
        pytest.fail("a picture is decoded")

    monkeypatch.setattr(records, "read_picture", decoded)
    for source in sources:
        assert captions(source) == ["picture 0", "picture 1", "picture 2"]
        assert captions(source, 2) == ["picture 0", "picture 1"]
    assert captions(plain) == ["picture 0", "picture 1", "picture 2"]


def test_a_folder_s_faults_are_told_together(tmp_path: Path) -> None:
    """So that a folder with five of them is not opened five times."""
    for i in range(4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("a dot")
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "9.txt").write_text("of nothing")
    with pytest.raises(
        ValueError, match=r"9\.txt: caption file without a picture.*\(3 problems more: .*1\.txt.*2\.png"
    ) as caught:
        load_source(f"folder:{tmp_path}", "train", 8)
    assert "\n" not in str(caught.value)
