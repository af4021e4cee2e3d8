"""Sizes of equal area, the nearest of them, and batches of one size each in an order of (seed, position) alone."""

from __future__ import annotations

import json
import math
import re
from itertools import islice, pairwise

import numpy as np
import pytest
from PIL import ExifTags, Image

from lcm_jax.data import BucketLoader, CaptionMix, bucket_sizes, load_buckets
from lcm_jax.data.buckets import nearest_bucket

# --- sizes


@pytest.mark.parametrize(
    ("side", "multiple", "aspect"), [(1024, 16, 2.0), (1024, 64, 4.0), (256, 16, 2.0), (96, 8, 1.6), (40, 8, 1.0)]
)
def test_sizes_are_all_that_are_nearest_the_area_from_below(side, multiple, aspect):
    sizes = bucket_sizes(side, multiple, aspect)

    def could_grow(h, w):
        return (h + multiple) * w <= side**2 or h * (w + multiple) <= side**2

    every = range(multiple, int(aspect * side) + 1, multiple)
    every = [(h, w) for h in every for w in every if h * w <= side**2 and max(h, w) <= aspect * min(h, w)]
    assert sorted(sizes) == [size for size in every if not could_grow(*size)]
    assert (side, side) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert all(side**2 - multiple * min(size) < math.prod(size) for size in sizes)
    shapes = [h / w for h, w in sizes]
    assert all(a < b for a, b in pairwise(shapes))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 32), "size=16 must be a positive multiple of multiple=32"),
        ((40, 16), "size=40 must be a positive multiple of multiple=16"),
        ((0, 16), "size=0 must"),
        ((64, 0), "multiple=0"),
        ((64, 16, 0.5), "aspect=0.5 is the longer side over the shorter"),
        ((64, 16, math.nan), "aspect=nan"),
    ],
)
def test_bad_sizes_are_refused(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bucket_sizes(*arguments)


def test_the_nearest_bucket_has_the_nearest_logarithm():
    sizes = bucket_sizes(256)
    assert all(nearest_bucket(sizes, (3 * h, 3 * w)) == (h, w) for h, w in sizes)
    random = np.random.default_rng(0)
    for height, width in random.integers(100, 4000, (200, 2)).tolist():
        h, w = nearest_bucket(sizes, (height, width))
        assert nearest_bucket(sizes, (width, height)) == (w, h)
        apart = [abs(math.log(height * b / (width * a))) for a, b in sizes]
        assert abs(math.log(height * w / (width * h))) == pytest.approx(min(apart), abs=1e-12)
    assert nearest_bucket(sizes, (10, 1000)) == sizes[0] == (192, 336)
    assert nearest_bucket(sizes, (1000, 10)) == sizes[-1]


# --- sources


def save(path, height, width, **options):
    """White ends along the longer side of a green middle."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    rows, columns = (slice(height // 4, -height // 4), slice(None)), (slice(None), slice(width // 4, -width // 4))
    pixels[rows if height > width else columns] = (0, 255, 0)
    Image.fromarray(pixels).save(path, **options)
    path.with_suffix(".txt").write_text(path.stem)


def test_pictures_come_in_the_bucket_nearest_as_they_are_shown(tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    shapes = {"a": (32, 60), "b": (40, 40), "c": (70, 30), "d": (20, 200), "e": (36, 40)}
    for name, shape in shapes.items():
        save(tmp_path / f"{name}.png", *shape)
    for name, suffix in (("f", "jpg"), ("g", "png"), ("h", "webp")):
        save(tmp_path / f"{name}.{suffix}", 24, 40, exif=turned)  # which is shown 40 high
    buckets = load_buckets(f"folder:{tmp_path}", "train", bucket_sizes(16, 4))
    found = {size: [part[i]["caption"] for i in range(len(part))] for size, part in buckets.items()}
    assert found == {(12, 20): ["a", "d"], (16, 16): ["b", "e"], (20, 12): ["c", "f", "g", "h"]}
    for size, part in buckets.items():
        assert {part[i]["image"].shape for i in range(len(part))} == {(*size, 3)}
    middle = buckets[12, 20][1]["image"]  # of "d", whose ends are cut off
    assert (middle == (0, 255, 0)).all()
    assert (buckets[20, 12][0]["image"][0] > 250).all()  # of "c", which keeps them


def test_square_drawings_have_no_buckets():
    with pytest.raises(ValueError, match="openmoji: its drawings are square"):
        load_buckets("openmoji", "train", bucket_sizes(64))


# --- batches

COUNTS = (23, 9, 2)
SOURCES = [
    [
        {"id": np.int32(i), "x": np.full((2, 2 + b), b), "caption": f"original {i}", "synthetic_caption": f"new {i}"}
        for i in range(count)
    ]
    for b, count in enumerate(COUNTS)
]


def batches(count, seed=0, batch_size=4, **options):
    return list(islice(BucketLoader.of(SOURCES, batch_size, seed, **options), count))


def bucket(batch):
    return batch["x"].shape[2] - 2


def same(some, others):
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert (a["id"].tolist(), a["caption"]) == (b["id"].tolist(), b["caption"])


def test_a_batch_is_of_one_bucket_and_every_example_comes_once_in_each_of_its_epochs():
    drawn_ids = {b: [] for b in range(len(COUNTS))}
    for batch in batches(80):
        assert (batch["x"] == bucket(batch)).all()
        drawn_ids[bucket(batch)] += batch["id"].tolist()
    for b, count in enumerate(COUNTS):
        epochs = np.reshape(drawn_ids[b][: len(drawn_ids[b]) // count * count], (-1, count))
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) >= 2


def test_buckets_share_the_batches_in_proportion():
    """Exactly after as many epochs as a batch has examples, within an epoch's share in between, and mixed."""
    total, size, loader = sum(COUNTS), 4, BucketLoader.of(SOURCES, 4, 1)
    order = np.asarray([loader.position(k)[0] for k in range(3 * total)])
    given = np.cumsum(np.eye(3)[order], axis=0)
    assert given[total - 1 :: total].tolist() == [[i * count for count in COUNTS] for i in (1, 2, 3)]
    even = np.arange(1, len(order) + 1)[:, None] * np.asarray(COUNTS) / total
    assert (np.abs(given - even) < np.asarray(COUNTS) / size + 2).all()
    assert np.count_nonzero(np.diff(order)) > total / 2


def test_buckets_smaller_than_a_batch_come_as_often_from_the_first_epoch():
    """10 examples and 1 to a batch of 8: in expectation 1.25 and 1/8 batches an epoch."""
    firsts = [[BucketLoader.of([range(10), range(1)], 8, seed).position(k)[0] for k in range(2)] for seed in range(800)]
    share = np.mean(firsts)
    assert abs(share - 1 / 11) < 0.03
    alone = BucketLoader.of([[{"id": np.int32(5)}]], 8, 0)
    assert alone[3]["id"].tolist() == [5] * 8


def test_places_count_each_buckets_batches():
    loader, next_of = BucketLoader.of(SOURCES, 4, 7), [0, 0, 0]
    for k in range(300):
        b, number = loader.position(k)
        assert number == next_of[b]
        next_of[b] += 1
    far = [loader.position(10**12 + k) for k in range(200)]
    assert np.allclose([b for b, _ in far].count(0) / 200, 23 / 34, atol=0.1)


def test_order_depends_on_the_seed_alone():
    same(batches(30, seed=7), [BucketLoader.of(SOURCES, 4, 7)[k] for k in range(30)])
    assert [bucket(b) for b in batches(30, seed=7)] != [bucket(b) for b in batches(30, seed=8)]


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_gives_the_same_batches(threads):
    def start():
        return iter(BucketLoader.of(SOURCES, 4, 3, threads=threads, augment=CaptionMix()))

    iterator = start()
    list(islice(iterator, 9))
    state = json.loads(json.dumps(iterator.get_state()))
    again = start()
    again.set_state(state)
    same(islice(iterator, 8), islice(again, 8))
    assert again.get_state() == iterator.get_state()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_agree_on_the_bucket_and_partition_the_batch(count):
    options = {"batch_size": 8, "augment": CaptionMix()}
    n = 8 // count
    parts = [batches(12, rows=range(p * n, (p + 1) * n), **options) for p in range(count)]
    for full, *pieces in zip(batches(12, **options), *parts, strict=True):
        assert full["id"].tolist() == [i for piece in pieces for i in piece["id"]]
        assert full["caption"] == [text for piece in pieces for text in piece["caption"]]
        assert {piece["x"].shape for piece in pieces} == {(n, *full["x"].shape[1:])}


def test_captions_are_mixed_in_every_bucket_for_itself():
    loaders = BucketLoader.of([SOURCES[0], SOURCES[0]], 4, 0, augment=CaptionMix()).loaders
    chosen = [[text.startswith("new") for k in range(25) for text in loader[k]["caption"]] for loader in loaders]
    assert chosen[0] != chosen[1]
    assert all(30 < sum(some) < 70 for some in chosen)


def test_bad_loaders_and_states_are_refused():
    with pytest.raises(ValueError, match="empty dataset"):
        BucketLoader.of([SOURCES[0], []], 4, 0)
    with pytest.raises(ValueError, match="seed=-1 must lie in"):
        BucketLoader.of(SOURCES, 4, -1)
    iterator = iter(BucketLoader.of(SOURCES, 4, 0))
    next(iterator)
    for other, words in (
        (BucketLoader.of(SOURCES, 4, 1), "loader state has seed=0, this loader 1"),
        (BucketLoader.of(SOURCES[:2], 4, 0), "loader state has examples=[23, 9, 2], this loader [23, 9]"),
        (BucketLoader.of(SOURCES, 8, 0), "loader state has batch_size=4, this loader 8"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            iter(other).set_state(iterator.get_state())
