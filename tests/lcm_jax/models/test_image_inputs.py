"""Sizes, pictures and masks that a user gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcm_jax.models.image_inputs import check_pictures, check_size, fit_masks, latent_mask


def test_the_first_pixel_decides_for_a_latent() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[0, 0], mask[2, 2], mask[2, 5] = 128, 127, 255
    small = np.asarray(latent_mask(mask, (4, 6), 2, 2))
    assert small.shape == (2, 2, 3, 1)
    assert small.dtype == np.float32
    np.testing.assert_array_equal(small[0, ..., 0], [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(small[0], small[1])


def test_true_is_white() -> None:
    mask = np.eye(4, dtype=bool)
    white = latent_mask(mask, (4, 4), 1, 1)
    np.testing.assert_array_equal(white, latent_mask(255 * mask.astype(np.uint8), (4, 4), 1, 1))


def test_each_mask_is_for_its_own_prompts() -> None:
    masks = np.stack([np.zeros((4, 4), bool), np.ones((4, 4), bool)])
    assert latent_mask(masks, (4, 4), 4, 2)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(
            np.zeros((4, 4), np.float32),
            r"mask: expected uint8 or bool \(h, w\) or \(n, h, w\), got float32 \(4, 4\)",
            marks=pytest.mark.wrong_types,
        ),
        (np.zeros((1, 4, 4, 1), np.uint8), "mask: expected"),
        (np.zeros((4, 5), np.uint8), "mask is 4x5, the picture is to be 4x4"),
        (np.zeros((3, 4, 4), bool), "mask: 3 given for 2 prompts"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_mask(mask, (4, 4), 2, 2)


def test_one_picture_is_several() -> None:
    assert check_pictures(np.zeros((4, 4, 3), np.uint8), (4, 4), 2).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 20), "size 24x20: height and width must be positive multiples of 16 pixels"),
        ((16, 0), "multiples of 16"),
        ((16, 112), r"size 16x112: larger than the position grid, whose 6 patches .* reach 96 pixels"),
    ],
)
def test_sizes_that_the_network_cannot_draw(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_size(size, 16, 6)


def test_sizes_that_it_can() -> None:
    assert check_size([96, 16], 16, 6) == (96, 16)
    assert check_size((16, 1600), 16, None) == (16, 1600)
    assert check_size(96, 16, 6) == check_size(np.array([96, 96]).tolist(), 16, 6) == (96, 96)


@pytest.mark.wrong_types
@pytest.mark.parametrize("size", ["64", None, (), (16, 16, 16), (16, "16"), 16.0])
def test_no_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"size is .*: give \(height, width\) in pixels"):
        check_size(size, 16, None)


def test_pictures_of_other_shapes_keep_their_middle() -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    with pytest.warns(UserWarning, match="image is 8x16 and its middle becomes 8x8"):
        assert (check_pictures(image, (8, 8), 1) == 200).all()
    with pytest.warns(UserWarning, match="mask is 8x16 and its middle becomes 4x4"):
        assert (fit_masks(image[..., 0] > 0, (4, 4)) >= 128).all()


@pytest.mark.filterwarnings("error")
def test_a_picture_of_the_same_shape_is_scaled_without_a_word() -> None:
    for sides in ((32, 48), (33, 49), (4, 6)):
        assert check_pictures(np.full((*sides, 3), 7, np.uint8), (16, 24), 1).tolist() == [[[[7] * 3] * 24] * 16]


def test_a_pil_picture_is_upright_in_rgb_and_stays_as_it_was() -> None:
    photo = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    photo.getexif()[0x0112] = 6  # turned by a quarter
    assert (check_pictures(photo, (8, 4), 1) == 255).all(), "transparency is white"
    assert photo.size == (8, 4)
    assert photo.getexif()[0x0112] == 6
