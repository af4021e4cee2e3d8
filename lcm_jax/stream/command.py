"""`lcm-jax stream`: redraws a video, a folder of pictures, a camera, a screen or noise into a video or a folder."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.runtime.image_io import SUFFIXES, check_picture, read_picture, write_picture
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.progress import progress
from lcm_jax.stream.colours import Converter
from lcm_jax.stream.queues import BackgroundWriter, Latest, prefetch
from lcm_jax.stream.stream import Stream
from lcm_jax.stream.video import Video, restyle, working_size
from lcm_jax.stream.video_reader import decoded
from lcm_jax.stream.video_writer import CONTAINERS, Writer, check_writable

Frame = UInt8[np.ndarray, "h w 3"]
LIVE = {  # for each platform: the default device, and the FFmpeg format that reads it
    "camera": {"linux": ("/dev/video0", "v4l2"), "darwin": ("0", "avfoundation"), "win32": ("video=0", "dshow")},
    "screen": {"linux": (":0.0", "x11grab"), "darwin": ("1", "avfoundation"), "win32": ("desktop", "gdigrab")},
}


def run_stream(
    pipe: Pipeline,
    source: str,
    target: Path,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None,
    count: int,
    seconds: float | None,
    rate: float,
    controls: dict[str, Any],
    sampler: str,
) -> str:
    """Redraw `source` into `target`, and return one line that says what was written.

    source: a video file, a folder of pictures, "camera[:DEVICE]", "screen[:DEVICE]" or "noise". target: a folder, or
    a video file. prompts: one, or several with "noise" alone: the stream then travels from one to the next in equal
    parts. size: (height, width) in pixels; None is the pipeline's own, for a video its area in the video's shape.
    count: pictures from noise. seconds: duration of a camera or a screen; None is until Ctrl-C. rate: frames a second
    of a camera or a screen, and of the video that is made from pictures or noise. controls: see `Controls`. sampler:
    see `Stream`.

    Raise ValueError if source, target and prompts do not fit together or the source cannot be read,
    FileNotFoundError if it does not exist.
    """
    if target.suffix.lower() not in ("", *CONTAINERS):
        raise ValueError(f"--out {target}: name a folder, or a video such as {target.stem}.mp4")
    if rate <= 0:
        raise ValueError(f"--rate {rate:g}: it must be more than 0 frames a second")
    kind, _, device = source.partition(":")
    if kind in LIVE:
        frames: Iterable[Frame] = _live(kind, device, seconds, rate)
        return _redraw(_stream(pipe, prompts, size, controls, sampler), frames, [], target, rate, live=True)
    if kind == "noise":
        stream = _stream(pipe, prompts, size, controls | {"fresh": len(prompts) == 1}, sampler, image=False)
        return _travel(stream, prompts, count, target, rate)
    path = Path(source)
    if path.is_dir():
        files = _listed(path, target)
        stream = _stream(pipe, prompts, size, controls, sampler)
        return _redraw(stream, map(read_picture, files), [file.stem for file in files], target, rate)
    if target.suffix == "":
        raise ValueError(f"--out {target}: a video becomes a video; name a video file such as {target.name}.mp4")
    if target.resolve() == path.resolve():
        raise ValueError(f"--out {target}: is the video to be redrawn; name another file")
    if target.exists():
        print(f"lcm-jax: {target} is replaced", file=sys.stderr)
    video = Video.open(path)
    size = size or working_size(pipe.size, video.size, _factor(pipe))
    stream = _stream(pipe, prompts, size, controls, sampler)
    start = time.perf_counter()
    number = restyle(stream, video, target)
    elapsed = time.perf_counter() - start
    saved = "" if stream.filter is None else f"; {100 * stream.filter.saved:.0f} % of them skipped as still"
    drawn = f"redrawn {size[0]} pixels high and {size[1]} wide"
    return f"{target}: {number} frames, {drawn}, in {elapsed:.0f} s, with compiling{saved}"


def parse_controls(pairs: Sequence[str]) -> dict[str, Any]:
    """Return a stream's controls from KEY=VALUE texts; a value is JSON, or else a text. Raise ValueError without "=".

    >>> parse_controls(["guidance=self", "delta=0.5", "t_index=[10, 30]"])
    {'guidance': 'self', 'delta': 0.5, 't_index': [10, 30]}
    """
    controls = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: give KEY=VALUE, such as feedback=0.2")
        try:
            controls[key] = parse_json(value, finite=True)
        except ValueError:
            controls[key] = value
    return controls


def _factor(pipe: Pipeline) -> int:
    factor: int = pipe.model.vae.config.downsample_factor * getattr(pipe.model.net.config, "patch_size", 1)
    return factor


def _stream(
    pipe: Pipeline,
    prompts: Sequence[str],
    size: tuple[int, int] | None,
    controls: dict[str, Any],
    sampler: str,
    *,
    image: bool = True,
) -> Stream:
    if len(prompts) > 1 and image:
        raise ValueError(
            f"--prompt: {len(prompts)} given, but only a stream from noise travels between prompts; give one"
        )
    return Stream(pipe, prompts[0], size=size, image=image, sampler=sampler, **controls)


def _listed(folder: Path, target: Path) -> list[Path]:
    """Return a folder's pictures in the order of their names, which the redrawn ones in `target` keep."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    if target.resolve() == folder.resolve():
        raise ValueError(f"--out {target}: holds the pictures to be redrawn; name another folder")
    by_stem: dict[str, Path] = {}
    for file in progress(files, "reading", "picture"):
        check_picture(file)
        first = by_stem.setdefault(file.stem, file)
        if first is not file and target.suffix == "":
            raise ValueError(f"{file}: would become {file.stem}.png, as {first.name} would; rename one")
    return files


def _live(kind: str, device: str, seconds: float | None, rate: float) -> Iterator[Frame]:
    """Open a camera or a screen, and return an iterator over its frames, which always gives the newest one."""
    default_device, input_format = LIVE[kind].get(sys.platform, ("", ""))
    device = device or default_device
    try:
        container = av.open(device, format=input_format, options={"framerate": f"{rate:g}"})
    except (FFmpegError, ValueError) as error:
        raise ValueError(
            f"{kind} {device!r} cannot be opened as {input_format} ({error}); name another device as {kind}:DEVICE"
        ) from None
    return _newest(container, seconds)


def _newest(container: Any, seconds: float | None) -> Iterator[Frame]:
    newest: Latest[Frame] = Latest(1)
    end = None if seconds is None else time.monotonic() + seconds
    convert = Converter().to_rgb

    def read() -> Iterator[None]:
        with container:
            for frame in decoded(container, container.streams.video[0], lambda: None):
                newest.put(convert(frame))
                if end is not None and time.monotonic() > end:
                    return
                yield

    for _ in prefetch(read(), 1):
        yield newest.get(10.0)


def _redraw(
    stream: Stream, frames: Iterable[Frame], names: Sequence[str], target: Path, rate: float, *, live: bool = False
) -> str:
    """Redraw frames that do not come from a video file."""
    _prepare(stream, target, rate)
    shown = iter(progress(prefetch(frames), "drawing", "frame", total=len(names) or None, leave=True))
    return f"{target}: {_write(stream.map(shown), stream, names, target, rate, live=live)} pictures"


def _prepare(stream: Stream, target: Path, rate: float) -> None:
    """Try the target and compile the programs, so that the first frame neither fails nor waits."""
    if target.suffix == "":
        target.mkdir(parents=True, exist_ok=True)
    else:
        check_writable(target, stream.size, _fraction(rate))
    stream.rehearse(progress=True)


def _fraction(rate: float) -> Fraction:
    return max(Fraction(rate).limit_denominator(1001), Fraction(1, 1001))


def _travel(stream: Stream, prompts: Sequence[str], count: int, target: Path, rate: float) -> str:
    """Draw pictures from noise, from one prompt to the next."""
    if count < 1:
        raise ValueError(f"--count {count}: it must be at least 1")
    _prepare(stream, target, rate)
    spans = max(len(prompts) - 1, 1)

    def pictures() -> Iterator[Frame]:
        for i in progress(range(count), "drawing", "picture", leave=True):
            position = i / max(count - 1, 1) * spans
            span = min(int(position), spans - 1)
            if len(prompts) > 1:
                share = position - span
                pairs = [(prompts[span], 1.0 - share), (prompts[span + 1], share)]
                stream.set(prompt=[(text, weight) for text, weight in pairs if weight > 0.0])
            yield stream()

    return f"{target}: {_write(pictures(), stream, [], target, rate)} pictures"


def _write(
    pictures: Iterable[Frame], stream: Stream, names: Sequence[str], target: Path, rate: float, *, live: bool = False
) -> int:
    """Write pictures into a folder, or into a video that is renamed when it is complete; return their number.

    live: an interrupt (Ctrl-C) is the end of the source. Any other failure leaves a video of the pictures until then.
    """
    number = 0
    ends = KeyboardInterrupt if live else ()
    if target.suffix == "":
        try:
            for number, picture in enumerate(pictures, 1):
                name = names[number - 1] if names else f"{number:06d}"
                write_picture(target / f"{name}.png", picture)
        except ends:
            pass
        return number
    unfinished, partial = (
        target.with_name(f"{target.stem}.{word}{target.suffix}") for word in ("unfinished", "partial")
    )
    speed = _fraction(rate)
    writer = Writer(unfinished, stream.size, speed, 1 / speed)

    def write(picture: Frame) -> None:
        nonlocal number
        writer.put(number, picture)
        number += 1

    try:
        try:
            with BackgroundWriter(write) as background:
                for picture in pictures:
                    background.put(picture)
        except ends:
            pass
        if not number:
            raise ValueError(f"{target}: nothing was written, as the source gave no frame")
        writer.close()
        unfinished.replace(target)
    except BaseException:
        _keep(writer, number, unfinished, partial)
        raise
    return number


def _keep(writer: Writer, number: int, unfinished: Path, partial: Path) -> None:
    """After a failure, complete the video of the pictures until then, or remove what cannot be completed."""
    try:
        writer.close()
        if number:
            unfinished.replace(partial)
            warnings.warn(f"{partial}: the {number} pictures that were drawn before the failure", stacklevel=2)
    except Exception:  # such as a full disk: the failure itself is reported
        pass
    finally:
        unfinished.unlink(missing_ok=True)
