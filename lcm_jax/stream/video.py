"""Redrawing of video files: times, sound, size and colours stay what a player shows; a killed job resumes.

A video is cut into independent segments: each begins with a cold stream, and is renamed when it is complete, so that a
resumed job makes only the missing ones. At the end the segments' packets are joined with the unchanged audio packets.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PILImage

from lcm_jax.runtime.atomic_files import write_json, written_aside
from lcm_jax.runtime.progress import progress as progress_of
from lcm_jax.stream.queues import BackgroundWriter, prefetch
from lcm_jax.stream.stream import Stream, fit
from lcm_jax.stream.video_reader import Frames, Video
from lcm_jax.stream.video_writer import ENCODERS, Output, Writer, warn
from lcm_jax.weights.safetensors_files import read_json

__all__ = ["Video", "Writer", "restyle", "working_size"]

SEGMENT = 240  # frames
RUN_IN = 8  # frames before a segment that a stream with feedback, motion or memory is given first
BYTES_AHEAD = 2**26  # of frames that wait to be drawn, and of pictures that wait to be written
MOST_AHEAD = 8  # frames

Timed = tuple[int, UInt8[np.ndarray, "h w 3"]]  # time in units of the video's time_base, picture


def working_size(stream_side: tuple[int, int], size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return (height, width) with about the area of `stream_side` and the shape of `size`, in multiples of `factor`.

    >>> working_size((512, 512), (1080, 1920), 8)
    (384, 680)
    """
    area = stream_side[0] * stream_side[1]
    scale = (area / (size[0] * size[1])) ** 0.5
    height, width = (max(round(side * scale / factor), 1) * factor for side in size)
    return height, width


def ahead(size: tuple[int, int]) -> int:
    """Return how many pictures of a size (height, width) may wait in a queue.

    >>> ahead((512, 512)), ahead((2160, 3840))
    (8, 2)
    """
    return max(1, min(MOST_AHEAD, BYTES_AHEAD // (3 * size[0] * size[1])))


def restyle(stream: Stream, video: Video, target: Path, *, segment: int = SEGMENT, progress: bool = True) -> int:
    """Redraw every frame of a video into the file `target`, and return their number.

    The segments, of `segment` frames each, are kept in the folder TARGET.parts until all are complete. Container,
    encoder and sound are tried before the first frame. Damaged places of the video are passed over. What is damaged or
    cannot be kept is said in a warning.

    Raise ValueError if the target cannot hold the video or its sound, if that folder is of another video or of other
    controls, or if no frame can be read.
    """
    output = Output.of(video, target)
    warn(video.path, output.notes)
    parts = target.with_name(target.name + ".parts")
    _check_parts(parts, stream, output, segment)
    source = Frames(video)
    # Frames wait in the stream's size: in their own, a few of 8K are a gigabyte.
    frames = prefetch(((time, fit(picture, stream.size)) for time, picture in source), ahead(stream.size))
    before: deque[Timed] = deque(maxlen=RUN_IN)
    finished = segment * next(index for index in count() if not _part(parts, index).is_file())
    with closing(frames):
        number = 0
        with progress_of(finished, "reading", "frame", disable=not (progress and finished)) as bar:
            for item in islice(frames, finished):
                before.append(item)
                number += 1
                bar.update()
        first = next(frames, None)
        if first is not None:
            stream.rehearse(progress=progress)
        with progress_of(
            video.frames or None, "drawing", "frame", initial=number, leave=True, disable=not progress
        ) as bar:
            for index in count(finished // segment):
                if first is None:
                    break
                given = chain([first], islice(frames, segment - 1))
                number += _make_segment(stream, output, given, before, _part(parts, index), bar)
                first = next(frames, None)
    if not number:
        raise ValueError(f"{video.path}: no frame could be read")
    source.warn()
    warn(target, output.join(sorted(parts.glob("*.nut")), source.duration * video.time_base))
    shutil.rmtree(parts)
    return number


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:06d}.nut"


def _check_parts(parts: Path, stream: Stream, output: Output, segment: int) -> None:
    """Raise ValueError if the folder holds the segments of another job; otherwise record this job in it."""
    video = output.video
    stat = video.path.stat()
    job = [str(video.path.resolve()), stat.st_size, stat.st_mtime_ns, segment, stream.size, repr(stream.controls)]
    job += [str(stream.pipe.model), sorted(stream.loras)]
    job += [video.size, video.colours, output.encoder, ENCODERS[output.encoder]]
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    file = parts / "job.json"
    if file.is_file() and read_json(file)["digest"] != digest:
        raise ValueError(f"{parts}: parts of another job; delete the folder, or repeat the arguments of that job")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(file, {"digest": digest, "video": str(video.path), "controls": repr(stream.controls)})


def _make_segment(
    stream: Stream, output: Output, frames: Iterable[Timed], before: deque[Timed], path: Path, bar: Any
) -> int:
    """Draw one segment with a cold stream, and return the number of its frames.

    before: the frames before it, which the stream is given first if its controls use earlier ones; at the end, those
    before the next segment.
    """
    stream.reset()
    if stream.filter is not None:
        stream.filter.restart()
    controls = stream.controls
    if controls.feedback or controls.motion or controls.remember:
        for _, picture in before:
            stream(picture)
    height, width = output.video.size
    times: deque[int] = deque()  # of the frames that the stream has taken
    number = 0

    def given() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for time, picture in frames:
            before.append((time, picture))
            times.append(time)
            yield picture

    def write(item: Timed) -> None:
        time, picture = item
        writer.put(time, np.asarray(PILImage.fromarray(picture).resize((width, height), PILImage.Resampling.LANCZOS)))

    # Closed on an interrupt too: else its last frames would be written when it is collected, into its successor's file.
    with (
        written_aside(path) as (unfinished,),
        closing(output.writer(unfinished)) as writer,
        BackgroundWriter(write, ahead(stream.size)) as background,
    ):
        for picture in stream.map(given()):
            background.put((times.popleft(), picture))
            number += 1
            bar.update()
    return number
