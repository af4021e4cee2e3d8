"""Names, captions and splits of OpenMoji, and the rendered data set on a few dozen drawings."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from lcm_jax.data import load_source, openmoji


@pytest.mark.parametrize(
    ("name", "role", "tones"),
    [
        (":woman_farmer_medium_skin_tone:", "woman farmer", ("medium",)),
        (":waving_hand_medium-dark_skin_tone:", "waving hand", ("medium-dark",)),
        (":man_dark_skin_tone_red_hair:", "man with red hair", ("dark",)),
        (":woman_light_skin_tone_bald:", "bald woman", ("light",)),
        (
            ":kiss_man_man_light_skin_tone_medium-light_skin_tone:",
            "kiss, man and man",
            ("light", "medium-light"),
        ),
        (":kiss_mark:", "kiss mark", ()),
        (":man’s_shoe:", "man's shoe", ()),
        (":São_Tomé_&_Príncipe:", "sao tome and principe", ()),
        (":keycap_#:", "keycap hash", ()),
        (":dark_skin_tone:", "dark skin tone", ()),
        (":O_button_(blood_type):", "o button blood type", ()),
    ],
)
def test_describe_gives_plain_words(name, role, tones):
    assert openmoji.describe(name) == (role, tones)


def test_catalogue_holds_every_named_drawing():
    items = openmoji.catalogue()
    captions = [item.caption for item in items]
    assert len(items) > 3900
    assert len(set(captions)) == len({item.codepoints for item in items}) == len(items)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9 ,'-]*", caption) for caption in captions)
    assert {"woman farmer, medium skin tone", "flag of france", "flag of scotland"} <= set(captions)
    assert sum(item.group == "flag" for item in items) > 250
    assert all(item.group == "people" for item in items if item.skin_tones)
    assert {tone for item in items for tone in item.skin_tones} == set(openmoji.TONES)


def test_splits_partition_the_catalogue():
    parts = {split: openmoji.split_items(split) for split in openmoji.SPLITS}
    every = [item.codepoints for part in parts.values() for item in part]
    assert sorted(every) == [item.codepoints for item in openmoji.catalogue()]
    assert 40 <= len(parts["compositional"]) <= 60
    assert 0.04 < len(parts["validation"]) / len(every) < 0.06


def test_held_out_pairs_compose_from_what_training_has_seen():
    train = openmoji.split_items("train")
    held_out = openmoji.held_out_pairs()
    trained = {(item.role, tone) for item in train for tone in item.skin_tones}  # both tones of a couple count
    assert held_out == {item.pair for item in openmoji.split_items("compositional")}
    assert not held_out & trained
    for role, tone in held_out:
        assert {t for r, t in trained if r == role} - {tone}, role
        assert {r for r, t in trained if t == tone} - {role}, tone
        assert not any(
            role in item.caption and f", {tone} skin tone" in item.caption and item.role == role for item in train
        )


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'test'; choose one of train, validation, compositional"):
        openmoji.split_items("test")


def test_render_is_opaque_rgb_on_white():
    picture = Image.open(io.BytesIO(openmoji.render("1F34B", 40)))
    assert (picture.mode, picture.size) == ("RGB", (40, 40))
    pixels = np.asarray(picture)
    assert (pixels[0, 0] == 255).all()
    assert np.ptp(pixels) > 200


def test_an_outline_is_the_drawing_without_its_fills():
    colour, outline = (
        np.asarray(Image.open(io.BytesIO(openmoji.render("1F34B", 64, style)))).astype(int)
        for style in ("colour", "outline")
    )
    assert (np.ptp(outline, axis=-1) == 0).all()  # no colour
    assert (outline == 255).all(axis=-1).mean() > 0.7
    black = (outline == 0).all(axis=-1)
    assert black.any()
    assert (colour[black] == 0).all()  # its lines are the drawing's


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """load_source over 24 + 4 + 4 drawings, in a cache of its own."""
    items = {split: openmoji.split_items(split) for split in openmoji.SPLITS}
    few = {
        "train": items["train"][::150][:24],
        "validation": items["validation"][:4],
        "compositional": items["compositional"][:4],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(openmoji, "split_items", few.__getitem__)
        yield few


def test_source_reads_what_was_rendered(small):
    for split, items in small.items():
        source = load_source("openmoji", split, 64)
        assert [record["caption"] for record in (source[i] for i in range(len(source)))] == [i.caption for i in items]
        drawn = np.asarray(Image.open(io.BytesIO(openmoji.render(items[1].codepoints, 64))))
        assert source[1]["image"].dtype == np.uint8
        np.testing.assert_array_equal(source[1]["image"], drawn)
        outlines = load_source("openmoji-outline", split, 64)
        assert [outlines[i]["caption"] for i in range(len(outlines))] == [i.caption for i in items]
        drawn = np.asarray(Image.open(io.BytesIO(openmoji.render(items[1].codepoints, 64, "outline"))))
        np.testing.assert_array_equal(outlines[1]["image"], drawn)
        with pytest.raises(ValueError, match="read-only"):
            source[1]["image"][0] = 0
    assert "tensorflow" not in sys.modules


def test_source_renders_once_and_prints_nothing(small, capsys, monkeypatch):
    load_source("openmoji", "train", 24)
    monkeypatch.setattr(openmoji, "render", None)
    assert load_source("openmoji", "validation", 24)[0]["image"].shape == (24, 24, 3)
    assert capsys.readouterr() == ("", "")


def test_drawing_is_one_bar_with_a_name(small, monkeypatch):
    """On a terminal, and without the bars of tensorflow-datasets."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    load_source("openmoji", "train", 20)
    bars = set(re.findall(r"\r([\w ,.-]+):", terminal.getvalue()))
    assert bars == {"drawing openmoji"}
    assert re.search(r"\d/\d+ \[", terminal.getvalue())
    assert "\n" not in terminal.getvalue()


def test_large_sizes_are_decoded_on_reading(small, monkeypatch):
    cached = load_source("openmoji", "validation", 64)
    monkeypatch.setattr("lcm_jax.data.sources.IN_MEMORY_BYTES", 0)
    late = load_source("openmoji", "validation", 64)
    assert type(late) is not type(cached)
    assert len(late) == len(cached)
    np.testing.assert_array_equal(late[2]["image"], cached[2]["image"])
    with pytest.raises(IndexError):
        late[len(late)]
