"""Writers of video files: an encoder, what a container takes of a source's sound, and the joining of segments."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Discard
from jaxtyping import UInt8

from lcm_jax.runtime.atomic_files import written_aside
from lcm_jax.stream.colours import Colours, Converter, tag
from lcm_jax.stream.video_reader import Clock, Video, demuxed, open_container, start_of

# Neither encoder makes B-frames or looks ahead, so that the packets of segments can be joined.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "veryfast", "bf": "0"},
    "libvpx-vp9": {
        "crf": "24",
        "b": "0",
        "cpu-used": "5",
        "deadline": "good",
        "lag-in-frames": "0",
        "auto-alt-ref": "0",
    },
}
CONTAINERS = {  # of each suffix: FFmpeg's muxer, and the encoder
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("ipod", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".nut": ("nut", "libx264"),
    ".avi": ("avi", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
TRIAL_PACKETS, TRIAL_READ = 4, 4000  # of each track that is tried; packets that are read to find them
AVI_FINEST = 240  # frames a second: a file has an entry for each of them, whether there is a frame or not
AVI_RATES = (Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, Fraction(60000, 1001), 60, 120, AVI_FINEST)
MILLISECOND = Fraction(1, 1000)
_TECHNICAL = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration", "handler_name", "vendor_id"}


class Writer:
    """A writer of video files, which takes frames with their times.

    size: (height, width) in pixels; an odd side gets its last line twice, as colours at half the resolution need even
    ones. rate: frames a second. time_base: seconds of one unit of time. form: the container, by default that of the
    path's suffix. colours: by default those of pictures of this size. encoder: one of ENCODERS, by default that of
    the path's suffix. Raise ValueError if this build of FFmpeg has no such encoder.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
        form: str | None = None,
        *,
        colours: Colours | None = None,
        encoder: str | None = None,
    ) -> None:
        known_form, known_encoder = CONTAINERS.get(path.suffix.lower(), (None, "libx264"))
        encoder = encoder or known_encoder
        self.size, self.colours = size, colours or Colours.default(*size)
        self._container = av.open(str(path), "w", format=form or known_form)
        add_stream: Callable[..., Any] = self._container.add_stream
        try:
            self._stream = add_stream(encoder, rate=rate, options=dict(ENCODERS[encoder]))
        except (FFmpegError, ValueError) as error:
            self._container.close()
            raise ValueError(f"{path}: {encoder} cannot be used ({error})") from None
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = self._stream.time_base = time_base
        tag(self._stream.codec_context, self.colours)
        self._base, self._convert = time_base, Converter().from_rgb

    def put(self, time: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write a picture at a time, which has to be later than the last, in units of time_base."""
        height, width = self.size
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._encode(time, even)

    def try_out(self) -> None:
        """Write one black frame, which shows whether the encoder works."""
        self._encode(0, np.zeros((self._stream.height, self._stream.width, 3), np.uint8))

    def _encode(self, time: int, even: UInt8[np.ndarray, "h w 3"]) -> None:
        # Converted here and in one thread: with the encoder's conversion and threads, one file in ten differed.
        frame = self._convert(even, self.colours)
        frame.pts, frame.time_base = time, self._base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the frames that the encoder still holds, and close the file."""
        try:
            self._container.mux(self._stream.encode())
        finally:
            self._container.close()


@dataclass(frozen=True, kw_only=True)
class Output:
    """The plan of a redrawn video: the file `target`, with some of the source's tracks, which are copied unchanged.

    tracks: indices of the source's streams. notes: sentences on what is not kept.
    """

    video: Video
    target: Path
    tracks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    form: str = field(init=False)
    encoder: str = field(init=False)

    def __post_init__(self) -> None:
        for name, value in zip(("form", "encoder"), CONTAINERS[self.target.suffix.lower()], strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, video: Video, target: Path) -> Output:
        """Try container, encoder and tracks beside the target, with one frame and a few packets.

        Sound has to be kept; subtitles are if the container takes them. Raise ValueError if it cannot be written, so
        that no frame is drawn in vain.
        """
        if target.suffix.lower() not in CONTAINERS:
            raise ValueError(f"{target}: name a video such as {target.stem}.mp4 ({', '.join(CONTAINERS)})")
        sound, subtitles, others = _tracks(video, CONTAINERS[target.suffix.lower()][0])
        odd = [f"{height}x{width} has an odd side, which gets its last line twice"
               for height, width in [video.size] if height % 2 or width % 2]  # fmt: skip
        for copied in [subtitles, {}] if subtitles else [{}]:
            lost = (
                [] if copied else [f"subtitles ({codec}) are left out" for codec in dict.fromkeys(subtitles.values())]
            )
            notes = (*video.notes, *odd, *lost, *others)
            output = cls(video=video, target=target, tracks=(*sound, *copied), notes=notes)
            try:
                output._try()
            except (FFmpegError, ValueError) as error:
                reason = error
            else:
                return output
        if isinstance(reason, OSError) and not isinstance(reason, ValueError):
            raise reason  # the folder, not the container
        raise ValueError(
            f"--out {target}: cannot hold {video.path.name} redrawn by {output.encoder} with its sound "
            f"({', '.join(sound.values()) or 'none'}): {getattr(reason, 'strerror', None) or reason}"
            f"{cls._advice(video, target, tuple(sound))}"
        )

    @classmethod
    def _advice(cls, video: Video, target: Path, tracks: tuple[int, ...]) -> str:
        """Return words that name a container which holds these tracks."""
        for suffix in CONTAINERS:
            other = cls(video=video, target=target.with_suffix(suffix), tracks=tracks)
            with suppress(FFmpegError, ValueError):
                other._try()
                return f"; name {other.target.name}"
        return ""

    def _try(self) -> None:
        with _trial_folder(self.target) as folder:
            part, trial = folder / "0.nut", folder / f"trial{self.target.suffix}"
            with closing(self.writer(part)) as writer:
                writer.try_out()
            self._write(trial, [part], 1 / self.video.rate, TRIAL_PACKETS)

    def writer(self, part: Path) -> Writer:
        """Return a writer of one segment."""
        video = self.video
        return Writer(part, video.size, video.rate, video.time_base, "nut", colours=video.colours, encoder=self.encoder)

    def join(self, segments: Sequence[Path], duration: Fraction) -> list[str]:
        """Write the packets of all segments and of the copied tracks into the target, which appears complete.

        duration: of the last frame, in seconds. Return sentences on what the container does not
        keep.
        """
        with written_aside(self.target) as (temporary,):
            return self._write(temporary, segments, duration, None)

    def _write(self, path: Path, segments: Sequence[Path], duration: Fraction, most: int | None) -> list[str]:
        """Write a file with at most `most` packets of each copied track, None writes all."""
        with ExitStack() as stack:
            source = stack.enter_context(open_container(self.video.path))
            first = stack.enter_context(open_container(segments[0]))
            out = stack.enter_context(av.open(str(path), "w", format=self.form))
            out.metadata.update(_described(source))
            out.set_chapters(source.chapters())
            template = first.streams.video[0]
            times, last, base, notes = _grid(segments, duration, template.time_base, self.form)
            video = out.add_stream_from_template(template)
            video.time_base = video.codec_context.time_base = base
            tag(video.codec_context, self.video.colours)
            copies = {}
            for index in self.tracks:
                track = source.streams[index]
                copies[index] = copy = out.add_stream_from_template(track)
                copy.metadata.update(_described(track))
                copy.disposition = track.disposition
            packets = [_drawn(segments, video, times, last, base)]
            if copies:
                packets.append(_copied(source, copies, most))
            for packet in _by_time(packets):
                out.mux(packet)
        return notes


def check_writable(target: Path, size: tuple[int, int], rate: Fraction) -> None:
    """Raise ValueError or OSError if no video of this size (height, width) can be written to a target."""
    with _trial_folder(target) as folder, closing(Writer(folder / target.name, size, rate, 1 / rate)) as writer:
        writer.try_out()


@contextmanager
def _trial_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target for files that are thrown away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


def _described(thing: Any) -> dict[str, str]:
    """Return what a file or a track says of its content: titles, languages; not how it was made."""
    return {key: value for key, value in thing.metadata.items() if key.lower() not in _TECHNICAL}


def _tracks(video: Video, form: str) -> tuple[dict[int, str], dict[int, str], list[str]]:
    """Return the codecs of sound and of subtitles by the index of their stream, and sentences on what is left out."""
    sound: dict[int, str] = {}
    subtitles: dict[int, str] = {}
    others: list[str] = []
    with open_container(video.path) as container:
        main = container.streams.best("video")
        for stream in container.streams:
            context = stream.codec_context
            if stream.index == main.index or stream.discard == Discard.all:  # the latter holds the texts of chapters
                continue
            if context is not None and stream.type in ("audio", "subtitle"):
                (sound if stream.type == "audio" else subtitles)[stream.index] = context.name
            else:
                kind = "a second video or picture" if stream.type == "video" else f"a track of {stream.type}"
                others.append(f"{kind} is left out")
        if container.chapters() and form == "avi":
            others.append("chapters are left out")
    return sound, subtitles, list(dict.fromkeys(others))


def _grid(
    segments: Sequence[Path], seconds: Fraction, time_base: Fraction, form: str
) -> tuple[list[int], int, Fraction, list[str]]:
    """Return the times of all frames, the duration of the last, their unit in seconds, and sentences on what is lost.

    seconds: the duration of the last frame. time_base: the unit of time of the segments.

    AVI alone has even times: its unit is the largest that all times are multiples of, or the one that moves them least.
    """
    times: list[int] = []
    for path in segments:
        with open_container(path) as container:
            times += [packet.pts for packet in demuxed(container, container.streams.video[0], _broken(path))]
    duration = max(round(seconds / time_base), 1)
    if form != "avi":
        return times, duration, time_base, []
    unit = math.gcd(*(time - times[0] for time in times[1:])) or duration
    candidates = [unit * time_base]
    if 1 / candidates[0] > AVI_FINEST:
        mean = (times[-1] - times[0]) * time_base / (len(times) - 1)
        candidates = [mean, *(1 / Fraction(rate) for rate in AVI_RATES)]
    tried = [(base, _even(times, time_base, base)) for base in candidates]
    base, even = min(tried, key=lambda pair: _farthest(times, time_base, *pair))
    moved = float(_farthest(times, time_base, base, even))
    notes = (
        [f"AVI has even times: frames move by up to {1000 * moved:.0f} ms; .mkv keeps them"] if moved > 0.001 else []
    )
    if seconds > 2 * max(base, (times[-1] - times[0]) * time_base / max(len(times) - 1, 1)):
        notes.append(f"AVI does not keep the {float(seconds):.2f} s of the last frame; .mkv does")
    return even, 1, base, notes


def _even(times: Sequence[int], time_base: Fraction, base: Fraction) -> list[int]:
    """Return the nearest places in units of `base`, each later than the one before it."""
    ticks: list[int] = []
    for time in times:
        tick = round(time * time_base / base)
        ticks.append(max(tick, ticks[-1] + 1) if ticks else tick)
    return ticks


def _farthest(times: Sequence[int], time_base: Fraction, base: Fraction, ticks: Sequence[int]) -> Fraction:
    return max(abs(time * time_base - tick * base) for time, tick in zip(times, ticks, strict=True))


def _broken(path: Path) -> Any:
    def fail() -> None:
        raise ValueError(f"{path}: a damaged part; delete it and run again")

    return fail


def _drawn(
    segments: Sequence[Path], stream: Any, times: Sequence[int], duration: int, time_base: Fraction
) -> Iterator[Any]:
    """Yield the packets of the segments at these times; `duration` is that of the last one."""
    following = pairwise([*times, times[-1] + duration])
    for path in segments:
        with open_container(path) as container:
            for packet in demuxed(container, container.streams.video[0], _broken(path)):
                time, end = next(following)
                packet.stream, packet.time_base = stream, time_base
                packet.pts = packet.dts = time  # without B-frames the two are equal
                packet.duration = end - time
                yield packet


def _copied(source: Any, copies: dict[int, Any], most: int | None) -> Iterator[Any]:
    """Yield the packets of a source's tracks, assigned to their copies; damaged places are passed over.

    most: packets of each track to try, None for all.
    """
    tracks = [source.streams[index] for index in copies]
    starts = {track.index: round(start_of(source) / track.time_base) for track in tracks}
    # A millisecond is the coarsest unit of a container: two packets less apart could not be told from one another.
    clocks = {track.index: Clock(track.time_base, math.ceil(MILLISECOND / track.time_base)) for track in tracks}
    missing = {track.index: most for track in tracks}
    latest: dict[int, int] = {}
    packets: Iterable[Any] = demuxed(source, tracks, lambda: None)
    for packet in packets if most is None else islice(packets, TRIAL_READ):
        index = packet.stream_index
        left = missing[index]
        if left is not None:
            if not any(missing.values()):
                return
            if not left:
                continue
            missing[index] = left - 1
        decoded = packet.dts if packet.dts is not None else packet.pts
        shown = packet.pts if packet.pts is not None else decoded
        time = clocks[index](None if decoded is None else decoded - starts[index], packet.duration or 1)
        packet.pts = time if decoded is None or shown is None else time + max(shown - decoded, 0)
        if not packet.duration and copies[index].type == "audio" and index in latest:
            packet.duration = time - latest[index]  # else a file's last packet would end when it begins
        packet.dts, packet.stream, latest[index] = time, copies[index], time
        yield packet


def _by_time(streams: list[Iterator[Any]]) -> Iterator[Any]:
    """Merge the packets of several streams in the order of their decoding times, as a file needs them."""
    heads = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        times = [float("inf") if head is None else float(head.dts * head.time_base) for head in heads]
        i = times.index(min(times))
        yield heads[i]
        heads[i] = next(streams[i], None)


def warn(source: Path, notes: Iterable[str]) -> None:
    """Say in one line what is not kept of a video."""
    sentences = list(notes)
    if sentences:
        warnings.warn(f"{source}: {'; '.join(sentences)}", stacklevel=2)
