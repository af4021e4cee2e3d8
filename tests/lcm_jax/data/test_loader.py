"""The order of the batches is a function of (seed, position) alone."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from lcm_jax.data import Loader

SOURCE = [{"id": np.int32(i), "image": np.full((2, 2, 3), i, np.uint8), "caption": f"number {i}"} for i in range(23)]


def ids(batches):
    return [batch["id"].tolist() for batch in batches]


def test_batches_stack_arrays_and_list_texts():
    batch = Loader(SOURCE, 4, 0)[0]
    assert batch["image"].shape == (4, 2, 2, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["caption"] == [f"number {i}" for i in batch["id"]]


def test_each_example_comes_once_an_epoch_in_a_new_order():
    stream = np.concatenate(ids(islice(Loader(SOURCE, 4, 0), 23)))  # four epochs of 23 in batches of 4
    epochs = stream.reshape(4, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_alone():
    first = ids(islice(Loader(SOURCE, 4, 7), 12))
    assert first == ids(islice(Loader(SOURCE, 4, 7), 12)) == ids(Loader(SOURCE, 4, 7)[k] for k in range(12))
    assert first != ids(islice(Loader(SOURCE, 4, 8), 12))
    assert np.ravel(first).tolist() == np.ravel(ids(islice(Loader(SOURCE, 6, 7), 8))).tolist()


def test_without_shuffle_the_source_order_repeats():
    stream = np.concatenate(ids(islice(Loader(SOURCE, 5, 0, shuffle=False), 10)))
    np.testing.assert_array_equal(stream, np.arange(50) % 23)


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_mid_epoch_gives_the_same_batches(threads):
    loader = Loader(SOURCE, 4, 3, threads=threads)
    iterator = iter(loader)
    list(islice(iterator, 8))  # in the second epoch
    state = json.loads(json.dumps(iterator.get_state()))
    taken = list(islice(iterator, 7))
    again = iter(Loader(SOURCE, 4, 3, threads=threads))
    again.set_state(state)
    for a, b in zip(taken, islice(again, 7), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]
    assert again.get_state() == iterator.get_state()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_partition_the_global_batch(count):
    full = islice(Loader(SOURCE, 8, 5), 6)
    parts = [islice(Loader(SOURCE, 8, 5, rows=range(p, 8, count)), 6) for p in range(count)]
    for batch, *pieces in zip(full, *parts, strict=True):
        assert batch["id"].reshape(-1, count).T.tolist() == [piece["id"].tolist() for piece in pieces]


def test_state_moves_between_process_counts():
    one = iter(Loader(SOURCE, 8, 5))
    list(islice(one, 3))
    two = iter(Loader(SOURCE, 8, 5, rows=range(4, 8)))
    two.set_state(one.get_state())
    assert next(two)["id"].tolist() == next(one)["id"].tolist()[4:]


def test_transform_maps_records():
    double = Loader(SOURCE, 4, 0, transform=lambda r: {"twice": 2 * r["id"]})
    plain = Loader(SOURCE, 4, 0)
    np.testing.assert_array_equal(double[3]["twice"], 2 * plain[3]["id"])


def test_a_batch_may_be_larger_than_the_source():
    batch = Loader(SOURCE[:3], 8, 0)[0]
    assert sorted(batch["id"][:3]) == sorted(batch["id"][3:6]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": []}, "empty dataset"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"rows": (2, 4)}, r"rows=\(2, 4\) must be some of the rows of a batch, 0 to 3"),
        ({"rows": ()}, r"rows=\(\) must be some of the rows"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"threads": -1}, "threads=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Loader(**({"source": SOURCE, "batch_size": 4, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Loader(SOURCE, 4, 1), "loader state has seed=0, this loader 1"),
        (Loader(SOURCE[:9], 4, 0), "loader state has examples=23, this loader 9"),
        (Loader(SOURCE, 8, 0), "position=4 is no multiple of batch_size=8"),
    ],
)
def test_a_state_of_another_order_is_refused(other, words):
    iterator = iter(Loader(SOURCE, 4, 0))
    next(iterator)
    with pytest.raises(ValueError, match=words):
        iter(other).set_state(iterator.get_state())
