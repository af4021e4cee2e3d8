"""Which caption a sample has is a function of (seed, position), of the rate on average."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from lcm_jax.data import CaptionMix, Loader, open_cache, write_cache

SOURCE = [{"id": np.int32(i), "caption": f"original {i}", "synthetic_caption": f"synthetic {i}"} for i in range(50)]


def batches(seed=0, batch_size=8, **options):
    return Loader(SOURCE, batch_size, seed, augment=CaptionMix(), **options)


def texts(some):
    return [text for batch in some for text in batch["caption"]]


def test_captions_come_at_the_rate_and_stay_with_their_picture():
    for rate, count in ((0.0, 400), (0.3, 2000), (1.0, 400)):
        loader = Loader(SOURCE, 8, 0, augment=CaptionMix(rate=rate))
        some = [loader[k] for k in range(count // 8)]
        chosen = np.asarray([text.startswith("synthetic") for text in texts(some)])
        assert abs(chosen.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / count)
        assert all(
            text.split()[1] == str(i) for batch in some for i, text in zip(batch["id"], batch["caption"], strict=True)
        )
        assert set(some[0]) == {"id", "caption"}


def test_the_choice_is_new_each_epoch_and_has_the_seed():
    first, second = (texts([batches(batch_size=50)[epoch]]) for epoch in (0, 1))
    assert sorted(first) != sorted(second)
    assert texts([batches()[0]]) != texts([batches(seed=1)[0]])


def test_it_is_the_same_after_a_resume_and_for_any_batch_size_and_processes():
    full = texts(islice(batches(), 12))
    assert full == texts(islice(batches(batch_size=16), 6))
    assert full == texts(islice(batches(threads=2), 12))
    iterator = iter(batches())
    list(islice(iterator, 5))
    again = iter(batches())
    again.set_state(json.loads(json.dumps(iterator.get_state())))
    assert texts(islice(again, 7)) == full[40:]
    parts = [batches(rows=rows)[3]["caption"] for rows in (range(4), range(4, 8))]
    assert parts[0] + parts[1] == full[24:32]


def test_encodings_are_mixed_as_their_texts_are(tmp_path):
    """A cache of both encodings, loaded with the same seed, gives those of the texts that the source gives."""

    def encoded(text):
        return np.full((2, 3), float(text.split()[1]) + 0.5 * text.startswith("synthetic"), np.float16)

    records = (
        {"context": encoded(row["caption"]), "synthetic_context": encoded(row["synthetic_caption"])} for row in SOURCE
    )
    write_cache(tmp_path / "cache", records, {})
    cache = Loader(open_cache(tmp_path / "cache"), 8, 0, augment=CaptionMix())
    for k in range(9):
        np.testing.assert_array_equal(
            cache[k]["context"], np.stack([encoded(text) for text in batches()[k]["caption"]])
        )


def test_nothing_to_mix_is_refused():
    with pytest.raises(ValueError, match="fields id, caption: no synthetic captions to mix in"):
        Loader([{"id": 1, "caption": "x"}], 1, 0, augment=CaptionMix())[0]
    with pytest.raises(ValueError, match=r"rate is 1.5"):
        CaptionMix(rate=1.5)
