"""Readers and writers of video files: a restyled video keeps frame times, audio and size, and a killed job resumes.

A video is cut into independent segments: each begins with a cold stream, and is renamed when it is complete, so that a
resumed job makes only the missing ones. At the end the segments' packets are joined with the unchanged audio packets.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image as PILImage
from tqdm import tqdm

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.stream.queues import BackgroundWriter, prefetch
from lcm_jax.stream.stream import Stream
from lcm_jax.weights.safetensors_files import read_json

SEGMENT = 240  # frames
RUN_IN = 8  # frames before a segment that a stream with feedback, motion or memory is given first
CODEC = {"crf": "18", "preset": "veryfast", "bf": "0"}  # without B-frames, the packets of segments can be joined


@dataclass(frozen=True, kw_only=True)
class Video:
    """The properties of a video file.

    size: (height, width) in pixels as shown. rate: frames a second. time_base: seconds of one unit of time. frames:
    their number, estimated if the file does not tell it, 0 if that is not possible. audio: whether there is any.
    """

    path: Path
    size: tuple[int, int]
    rate: Fraction
    time_base: Fraction
    frames: int
    audio: bool

    @classmethod
    def open(cls, path: Path) -> Video:
        """Read a file's properties. Raise FileNotFoundError if it is missing, ValueError if it is no readable video."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{path}: no video in it")
                video = container.streams.video[0]
                rate = video.average_rate or video.guessed_rate or Fraction(25)
                seconds = float(container.duration or 0) / av.time_base
                frames = video.frames or round(seconds * float(rate))
                size = (video.codec_context.height, video.codec_context.width)
                base, audio = video.time_base or 1 / rate, bool(container.streams.audio)
        except FFmpegError as error:
            raise ValueError(f"{path}: not a video that can be read ({error})") from None
        return cls(path=path, size=size, rate=rate, time_base=base, frames=frames, audio=audio)

    def read(self) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (time in units of time_base, picture) of every frame, in the order in which they are shown."""
        with av.open(str(self.path)) as container:
            video = container.streams.video[0]
            video.thread_type = "AUTO"
            step, last = round(1 / (self.rate * self.time_base)), None
            for frame in container.decode(video):
                time = frame.pts if frame.pts is not None else (0 if last is None else last + step)
                if last is not None and time <= last:
                    time = last + 1  # some files repeat a time, which encoders refuse
                last = time
                yield time, frame.to_ndarray(format="rgb24")


class Writer:
    """A writer of H.264 video files, which takes frames with their times.

    size: (height, width) in pixels; an odd side loses a line. rate: frames a second. time_base: seconds of one unit of
    time. form: the container, by default that of the path's suffix.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], rate: Fraction, time_base: Fraction, form: str | None = None
    ) -> None:
        self._container = av.open(str(path), "w", format=form)
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=CODEC)
        # yuv420p has colours at half the resolution, and so even sides
        self._stream.height, self._stream.width = (side - side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = self._stream.time_base = time_base
        self._base = time_base

    def put(self, time: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write a picture at a time, which has to be later than the last, in units of time_base."""
        part = np.ascontiguousarray(picture[: self._stream.height, : self._stream.width])
        # Converted here and in one thread: with the encoder's conversion and threads, one file in ten differed.
        frame = av.VideoFrame.from_ndarray(part, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = time, self._base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the frames that the encoder still holds, and close the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


def working_size(stream_side: tuple[int, int], size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return (height, width) with about the area of `stream_side` and the shape of `size`, in multiples of `factor`.

    >>> working_size((512, 512), (1080, 1920), 8)
    (384, 680)
    """
    area = stream_side[0] * stream_side[1]
    scale = (area / (size[0] * size[1])) ** 0.5
    height, width = (max(round(side * scale / factor), 1) * factor for side in size)
    return height, width


def restyle(stream: Stream, video: Video, target: Path, *, segment: int = SEGMENT, progress: bool = True) -> int:
    """Redraw every frame of a video into the file `target`, and return their number.

    The segments, of `segment` frames each, are kept in the folder TARGET.parts until all are complete. Raise ValueError
    if that folder is of another video or of other controls, or no frame can be read.
    """
    parts = target.with_name(target.name + ".parts")
    _check_parts(parts, stream, video, segment)
    frames = prefetch(video.read())
    number = 0
    before: list[UInt8[np.ndarray, "h w 3"]] = []
    done = segment * len(list(parts.glob("*.nut")))  # by an earlier run: no part of the bar's rate
    with tqdm(total=video.frames or None, initial=done, unit="frame", disable=not progress) as bar:
        for index in range(10**9):
            batch = list(islice(frames, segment))
            if not batch:
                break
            path = parts / f"{index:06d}.nut"
            if not path.is_file():
                _make_segment(stream, video, batch, before, path, bar)
            number, before = number + len(batch), [picture for _, picture in batch[-RUN_IN:]]
            if len(batch) < segment:
                break
    if not number:
        raise ValueError(f"{video.path}: no frame could be read")
    _join(sorted(parts.glob("*.nut")), video, target)
    shutil.rmtree(parts)
    return number


def _check_parts(parts: Path, stream: Stream, video: Video, segment: int) -> None:
    """Raise ValueError if the folder holds the segments of another job; otherwise record this job in it."""
    stat = video.path.stat()
    job = [str(video.path.resolve()), stat.st_size, stat.st_mtime_ns, segment, stream.size, repr(stream.controls)]
    job += [str(stream.pipe.model), sorted(stream.loras)]
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    file = parts / "job.json"
    if file.is_file() and read_json(file)["digest"] != digest:
        raise ValueError(f"{parts}: parts of another job; delete the folder, or repeat the arguments of that job")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(file, {"digest": digest, "video": str(video.path), "controls": repr(stream.controls)})


def _make_segment(stream: Stream, video: Video, batch: list[Any], before: list[Any], path: Path, bar: Any) -> None:
    """Draw one segment with a cold stream, which is given the frames `before` it if its controls use earlier ones."""
    stream.reset()
    if stream.filter is not None:
        stream.filter.restart()
    controls = stream.controls
    if controls.feedback or controls.motion or controls.remember:
        for picture in before:
            stream(picture)
    unfinished = path.with_suffix(".tmp")

    def write(item: tuple[int, UInt8[np.ndarray, "h w 3"]]) -> None:
        time, picture = item
        height, width = video.size
        writer.put(time, np.asarray(PILImage.fromarray(picture).resize((width, height), PILImage.Resampling.LANCZOS)))

    # Closed on an interrupt too: else its last frames would be written when it is collected, into its successor's file.
    with (
        closing(Writer(unfinished, video.size, video.rate, video.time_base, "nut")) as writer,
        BackgroundWriter(write) as background,
    ):
        pictures = stream.map(picture for _, picture in batch)
        for (time, _), picture in zip(batch, pictures, strict=True):
            background.put((time, picture))
            bar.update()
    unfinished.replace(path)


def _join(segments: list[Path], video: Video, target: Path) -> None:
    """Write the packets of all segments, and the unchanged ones of the audio, into a file that is then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}.tmp{target.suffix}")
    with av.open(str(unfinished), "w") as out, av.open(str(segments[0])) as first:
        video_out = out.add_stream_from_template(first.streams.video[0])
        packets: list[Iterator[Any]] = [_packets(segments, video_out)]
        if video.audio:
            source = av.open(str(video.path))
            audio_out = out.add_stream_from_template(source.streams.audio[0])
            packets.append(_retarget(audio_out, source.demux(source.streams.audio[0])))
        for packet in _by_time(packets):
            out.mux(packet)
        if video.audio:
            source.close()
    unfinished.replace(target)


def _packets(segments: list[Path], stream: Any) -> Iterator[Any]:
    for path in segments:
        with av.open(str(path)) as container:
            yield from _retarget(stream, container.demux(container.streams.video[0]))


def _retarget(stream: Any, packets: Iterable[Any]) -> Iterator[Any]:
    """Assign packets of another file to a stream of this one."""
    for packet in packets:
        if packet.pts is not None:  # the last, empty one has none
            packet.stream = stream
            if packet.dts is None:  # some files have none; without B-frames the two are equal
                packet.dts = packet.pts
            yield packet


def _by_time(streams: list[Iterator[Any]]) -> Iterator[Any]:
    """Merge the packets of several streams in the order of their decoding times, as a file needs them."""
    heads = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        times = [float("inf") if head is None else float(head.dts * head.time_base) for head in heads]
        i = times.index(min(times))
        yield heads[i]
        heads[i] = next(streams[i], None)
