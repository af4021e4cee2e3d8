"""Readers of video files: frames as a player shows them, at the times at which it shows them.

A player turns a frame by its display matrix, stretches it by the aspect ratio of its pixels, and converts its colours
by their tags. Whatever is damaged is passed over and counted.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from lcm_jax.stream.colours import HDR, Colours, Converter, has_alpha, is_known

# Containers that are one file. Scripts, playlists and patterns (concat, HLS, DASH, image2) would open others.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "nut", "mpegts", "mpeg", "flv", "ogg", "asf", "mxf", "dv", "rm",
    "wtv", "gif", "apng", "ivf", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "yuv4mpegpipe",
)  # fmt: skip
_ONE_FILE = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file"}
MOST_READ_ERRORS = 100  # in a row, after which a file is taken to have ended
MOST_STRETCH = 16  # an aspect ratio of pixels beyond it is a mistake, and no player follows it
LEAP = Fraction(1)  # seconds; where times go back further, another recording begins


class Turn(NamedTuple):
    """The way a stored frame is turned to be shown: its sides are swapped, then its rows or columns are reversed."""

    swapped: bool = False
    rows: bool = False
    columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> Turn:
        """Return the turn of a frame's display matrix, or the nearest one by right angles."""
        a, b, c, d = _matrix(frame)
        swapped = abs(b) + abs(c) > abs(a) + abs(d)
        return cls(True, b < 0, c < 0) if swapped else cls(False, d < 0, a < 0)

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        """Return a stored picture as it is shown."""
        if self.swapped:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[:: -1 if self.rows else 1, :: -1 if self.columns else 1])


@dataclass(frozen=True, kw_only=True)
class Video:
    """The properties of a video file.

    size: (height, width) in pixels as a player shows it: turned, and with square pixels. rate: frames a second.
    time_base: seconds of one unit of time. frames: their number, estimated if the file does not tell it, 0 if that is
    not possible. audio: whether there is any. colours: the tags of its colours. turn: from the stored frames to those
    that are shown. notes: sentences on what is lost when the video is read.
    """

    path: Path
    size: tuple[int, int]
    rate: Fraction
    time_base: Fraction
    frames: int
    audio: bool
    colours: Colours
    turn: Turn = Turn()
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Video:
        """Read a file's properties. Raise FileNotFoundError if it is missing, ValueError if it is no readable video."""
        with open_container(path) as container:
            video = main_video(container)
            if video is None:
                raise ValueError(f"{path}: no video in it")
            rate = video.average_rate or video.guessed_rate or Fraction(25)
            seconds = float(container.duration or 0) / av.time_base
            number = video.frames or round(seconds * float(rate))
            base, audio = video.time_base or 1 / rate, bool(container.streams.audio)
            stretch, notes = _stretch(video), []
            if stretch is None:
                stretch, notes = Fraction(1), ["its pixels' aspect ratio makes no sense, and is taken as 1"]
            try:
                frame = next(decoded(container, video, lambda: None), None)
            except ValueError as error:  # PyAV's, for a codec without a decoder
                raise ValueError(f"{path}: its video cannot be decoded ({error})") from None
            if frame is None:
                raise ValueError(f"{path}: no frame could be read")
            size, turn = _stretched(frame, stretch), Turn.of(frame)
            if turn.swapped:
                size = size[::-1]
            colours, notes = Colours.of(frame), [*notes, *_lost(frame)]
        return cls(
            path=path, size=size, rate=rate, time_base=base, frames=number, audio=audio, colours=colours, turn=turn,
            notes=tuple(notes),
        )  # fmt: skip

    def read(self) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (time in units of time_base, picture) of every frame, in the order in which they are shown.

        Damaged packets are passed over; a warning at the end says how many they were.
        """
        frames = Frames(self)
        yield from frames
        frames.warn()


class Frames:
    """The frames of a video as a player shows them: an iterable of (time in units of time_base, picture).

    The first frame of a file that starts late comes at 0, as with a player. damaged: packets and frames that could not
    be decoded in full. rescaled: frames of another size than the first. duration: of the last frame, in units of
    time_base. They are complete when the iteration ends.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self.damaged = self.rescaled = 0
        self.duration = max(round(1 / (video.rate * video.time_base)), 1)

    def __iter__(self) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        convert, size, turn = Converter().to_rgb, self.video.size, self.video.turn
        with open_container(self.video.path) as container:
            stream = main_video(container)
            assert stream is not None
            step, base = self.duration, self.video.time_base
            clock, slots = Clock(base), _Slots() if container.format.name == "avi" else None
            start = round(start_of(container) / base)
            first = None
            for frame in decoded(container, stream, self._count, slots):
                time = frame.pts if frame.pts is not None else frame.dts
                if slots is not None:
                    time = slots.take()
                stored = frame.height, frame.width
                first = first or stored
                self.rescaled += stored != first
                self.damaged += bool(frame.is_corrupt)
                # A frame's own side data would keep it in memory: PyAV's two objects refer to one another.
                picture = turn(convert(frame, size[::-1] if turn.swapped else size))
                self.duration = getattr(frame, "duration", 0) or step
                yield clock(None if time is None else time - start, step), picture

    def _count(self) -> None:
        self.damaged += 1

    def warn(self) -> None:
        """Say in a warning how much was damaged or scaled, if anything was."""
        name = self.video.path
        if self.damaged:
            warnings.warn(
                f"{name}: {self.damaged} damaged packets or frames; the film goes on after them", stacklevel=2
            )
        if self.rescaled:
            size = "x".join(map(str, self.video.size))
            warnings.warn(f"{name}: {self.rescaled} frames of another size are scaled to {size}", stacklevel=2)


class Clock:
    """A function from times as a file has them to times that grow, as encoders and containers need them.

    A time that is missing is a step after the last; one that is not later than the last is `least` units after it.
    Where times go back by more than a second, as in a recording that was interrupted, they go on a step after the last.

    >>> clock = Clock(time_base=Fraction(1, 1000))
    >>> [clock(time, step=40) for time in (0, 40, 40, None, 5000, 0, 40)]
    [0, 40, 41, 81, 5000, 5040, 5080]
    """

    def __init__(self, time_base: Fraction, least: int = 1) -> None:
        self._leap, self._least = LEAP / time_base, least
        self._last: int | None = None
        self._offset = 0

    def __call__(self, time: int | None, step: int) -> int:
        last = self._last
        if last is None:
            self._last = 0 if time is None else time
            return self._last
        now = last + step if time is None else time + self._offset
        if now < last - self._leap:
            self._offset += last + step - now
            now = last + step
        self._last = max(now, last + self._least)
        return self._last


class _Slots:
    """The times of a container without presentation times (AVI): packets follow one another, in decoding order.

    The frame that a packet makes the decoder give out has the time of the packet so many earlier as the decoder holds
    back, so a packet that gives none leaves its time empty.
    """

    def __init__(self) -> None:
        self._times: deque[int | None] = deque()
        self._held: int | None = None

    def add(self, time: int | None, frames: int) -> None:
        """Take the time of a packet, and the number of frames that it made the decoder give out."""
        if self._held is None and frames:
            self._held = len(self._times)
        self._times.append(time)
        while self._held is not None and len(self._times) > self._held + 1:
            self._times.popleft()

    def skip(self) -> None:
        """Leave the present time to a frame that was lost, or go to the next one at the end of the file."""
        if self._times:
            self._times.popleft()

    def take(self) -> int | None:
        """Return the time of the frame that was decoded, None if it is not known."""
        return self._times[0] if self._times else None


def open_container(path: Path) -> Any:
    """Open a media file, and nothing that it names.

    Raise FileNotFoundError if it is missing, ValueError if it is none of the containers that are one file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return av.open(str(path.absolute()), options=_ONE_FILE, metadata_errors="replace")
    except (FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path}: not a video that can be read ({reason}); a file such as .mp4, .mkv or .avi is"
        ) from None


def main_video(container: Any) -> Any:
    """Return the video stream that a player shows, None if there is none; a cover picture is no video."""
    best = container.streams.best("video")
    return best if best is None or best.codec_context is not None else None


def start_of(container: Any) -> Fraction:
    """Return the time, in seconds, at which a file begins; a player takes it as 0."""
    if container.format.name == "avi":
        return Fraction(0)
    return Fraction(max(container.start_time or 0, 0), av.time_base)


def demuxed(container: Any, streams: Any, damaged: Callable[[], None]) -> Iterator[Any]:
    """Yield the packets of some streams; call `damaged` for every error of the container, and go on behind it."""
    errors = 0
    while errors < MOST_READ_ERRORS:
        try:
            for packet in container.demux(streams):
                if packet.size:  # an empty packet would end the decoding
                    errors = 0
                    yield packet
            return
        except FFmpegError:
            damaged()
            errors += 1


def decoded(container: Any, stream: Any, damaged: Callable[[], None], slots: _Slots | None = None) -> Iterator[Any]:
    """Yield a stream's frames as they are shown; call `damaged` for every packet that cannot be decoded."""
    stream.thread_type = "SLICE"  # with threads for frames, the good ones beside a damaged one would be lost
    for packet in demuxed(container, stream, damaged):
        try:
            frames = packet.decode()
        except FFmpegError:
            damaged()
            frames = []
        if slots is not None:
            slots.add(packet.dts, len(frames))
        yield from frames
    try:
        rest = stream.codec_context.decode(None)
    except FFmpegError:
        return damaged()
    for frame in rest:
        if slots is not None:
            slots.skip()
        yield frame


def _stretch(video: Any) -> Fraction | None:
    """Return the width of a pixel over its height, None if the file's value makes no sense."""
    ratio = video.sample_aspect_ratio
    if not ratio:
        return Fraction(1)
    return Fraction(ratio) if 1 / Fraction(MOST_STRETCH) <= ratio <= MOST_STRETCH else None


def _stretched(frame: Any, stretch: Fraction) -> tuple[int, int]:
    """Return (height, width) of a frame with square pixels; a pixel's shorter side is stretched, to an even number."""
    height, width = frame.height, frame.width
    if stretch > 1:
        width = 2 * round(width * stretch / 2)
    elif stretch < 1:
        height = 2 * round(height / stretch / 2)
    return height, width


def _matrix(frame: Any) -> list[int]:
    """Return the first two rows and columns of a frame's display matrix (ISO/IEC 14496-12, 8.2.2): a b c d."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return [1, 0, 0, 1]
    numbers = np.frombuffer(bytes(data), np.int32).tolist()
    return [numbers[i] for i in (0, 1, 3, 4)]


def _lost(frame: Any) -> list[str]:
    """Return a sentence on each thing that pixels in RGB and 8 bits do not keep."""
    a, b, c, d = (abs(number) for number in _matrix(frame))
    angled = min(a + d, b + c) > max(a + d, b + c) / 50
    depth = max((component.bits for component in frame.format.components), default=8)
    hdr = HDR.get(int(frame.color_trc))
    sides = {"SPHERICAL": "its sphere of view", "STEREO3D": "its two views"}
    sentences = {
        "it is turned by no right angle; the nearest one is taken": angled,
        f"{depth} bits a colour become 8": depth > 8 and not frame.format.name.startswith("rgb565"),
        f"it is HDR ({hdr}), and the network reads its colours as if it were not": hdr is not None,
        "its colours have a matrix that cannot be followed; the usual one is taken": not is_known(frame),
        "transparent parts become white": has_alpha(frame) and int(frame.to_ndarray(format="rgba")[..., 3].min()) < 255,
        "it is interlaced, and stays combed": frame.interlaced_frame,
    }
    found = [sentence for sentence, holds in sentences.items() if holds]
    return found + [f"{what} is lost" for name, what in sides.items() if frame.side_data.get(name) is not None]
