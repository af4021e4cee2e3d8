"""Colours of video: the tags by which a player turns YUV into RGB, and the conversions that follow them.

Frames without tags are read as players read them: BT.709 from 720 lines or 1280 columns on, BT.601 below.
"""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import UInt8

# Numbers of ISO/IEC 23091-2, as FFmpeg has them
RGB, BT709, UNSPECIFIED, BT601 = 0, 1, 2, 6
HDR = {16: "PQ", 18: "HLG"}  # transfer functions
# From a matrix of the standard to the number of swscale's coefficients, those that it has
_COEFFICIENTS = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_EXACT = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
_LIMITED, _FULL = int(ColorRange.MPEG), int(ColorRange.JPEG)


class Colours(NamedTuple):
    """The colour tags of a video, as numbers of ISO/IEC 23091-2; 2 is unspecified.

    matrix: from RGB to YUV. full: luma from 0 to 255 rather than from 16 to 235. primaries, transfer: what the RGB
    numbers mean; they are carried along.
    """

    matrix: int
    full: bool = False
    primaries: int = BT709
    transfer: int = BT709

    @classmethod
    def default(cls, height: int, width: int) -> Colours:
        """Return the tags of pictures of this size that come without any.

        >>> Colours.default(1080, 1920).matrix, Colours.default(480, 640).matrix
        (1, 6)
        """
        return cls(BT709 if height >= 720 or width >= 1280 else BT601)

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Colours:
        """Return a decoded frame's own tags, those that are missing as players fill them in."""
        default = cls.default(frame.height, frame.width)
        name = frame.format.name
        primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
        grey = name.startswith("gray")
        if frame.format.is_rgb or frame.format.has_palette or grey or frame.colorspace == RGB:
            full = grey and frame.color_range != _LIMITED
            tags = (default.primaries if primaries == UNSPECIFIED else primaries,
                    default.transfer if transfer == UNSPECIFIED else transfer)  # fmt: skip
            return cls(default.matrix, full, *tags)
        full = frame.color_range == _FULL or name.startswith("yuvj")
        matrix = int(frame.colorspace)
        if matrix == UNSPECIFIED and default.matrix == BT709:
            primaries, transfer = (BT709 if tag == UNSPECIFIED else tag for tag in (primaries, transfer))
        return cls(matrix if matrix in _COEFFICIENTS else default.matrix, full, primaries, transfer)


def is_known(frame: av.VideoFrame) -> bool:
    """Return whether a frame's matrix is none, or one that can be followed."""
    return frame.format.is_rgb or frame.colorspace in (RGB, UNSPECIFIED, *_COEFFICIENTS)


class Converter:
    """Conversions of frames from and to RGB; one object is for one thread."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def to_rgb(self, frame: av.VideoFrame, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """Return a frame's pixels by its own tags, transparent ones over white, scaled to `size` (height, width)."""
        colours, clear = Colours.of(frame), has_alpha(frame)
        height, width = size or (frame.height, frame.width)
        if not frame.format.is_rgb and not frame.format.has_palette:
            frame.colorspace = colours.matrix
            frame.color_range = _FULL if colours.full else _LIMITED
        converted = self._reformatter.reformat(
            frame, width, height, "rgba" if clear else "rgb24", interpolation=_EXACT,
            src_color_range=frame.color_range, dst_color_range=_FULL,
        )  # fmt: skip
        pixels = converted.to_ndarray()
        if not clear:
            return pixels
        alpha = pixels[..., 3:].astype(np.uint16)
        over_white = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return over_white.astype(np.uint8)

    def from_rgb(self, picture: UInt8[np.ndarray, "h w 3"], colours: Colours) -> av.VideoFrame:
        """Return a picture as a yuv420p frame with these colours and their tags."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        color_range = _FULL if colours.full else _LIMITED
        converted = self._reformatter.reformat(
            frame, format="yuv420p", interpolation=_EXACT, dst_colorspace=_COEFFICIENTS[colours.matrix],
            src_color_range=_FULL, dst_color_range=color_range,
        )  # fmt: skip
        tag(converted, colours)
        return converted


def tag(target: av.VideoFrame | av.VideoCodecContext, colours: Colours) -> None:
    """Set the colour tags of a frame or of an encoder."""
    target.colorspace = colours.matrix
    target.color_range = _FULL if colours.full else _LIMITED
    target.color_primaries, target.color_trc = colours.primaries, colours.transfer


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether a frame's format has transparency."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
