"""A film is written as it was: colours, sides, tracks, durations; what a container cannot hold is told beforehand."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from lcm_jax.stream import Stream  # noqa: E402
from lcm_jax.stream import video as module  # noqa: E402
from lcm_jax.stream.colours import Colours  # noqa: E402
from lcm_jax.stream.command import run_stream  # noqa: E402
from lcm_jax.stream.video import Video, Writer, restyle  # noqa: E402
from lcm_jax.stream.video_reader import Frames  # noqa: E402
from lcm_jax.stream.video_writer import CONTAINERS, Output  # noqa: E402
from tests.lcm_jax.stream.test_video_reader import blocks, damage, decoded_by_hand, film, middles, seconds  # noqa: E402

Pipe = Any


def made(pipe: Pipe, **controls: Any) -> Stream:
    return Stream(pipe, "red heart", size=(12, 20), steps=3, strength=0.8, **controls)


def with_tracks(path: Path, *codecs: str, frames: int = 12, subtitles: bool = False) -> Path:
    """A film with a track of sound for each codec: the first in German, the second in French."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"crf": "10"})
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        sounds = [out.add_stream(codec, rate=48000) for codec in codecs]
        for sound, language in zip(sounds, ("ger", "fre"), strict=False):
            sound.metadata["language"] = language
        out.metadata["title"] = "A film"
        second = {"id": 1, "start": 200, "end": 400, "time_base": Fraction(1, 1000), "metadata": {"title": "Second"}}
        out.set_chapters([second | {"id": 0, "start": 0, "end": 200, "metadata": {"title": "First"}}, second])
        for picture in blocks(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
        for i, sound in enumerate(sounds):
            tone = (np.sin(np.arange(frames * 1920) / (20.0 + 9 * i)) * 8000).astype(np.int16).repeat(2)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
            frame.sample_rate = 48000
            out.mux(sound.encode(frame))
            out.mux(sound.encode())
    return path


def sounds(path: Path) -> list[tuple[str, str | None, list[bytes]]]:
    """Codec, language and packets of every track of sound."""
    with av.open(str(path)) as container:
        tracks = container.streams.audio
        found: dict[int, list[bytes]] = {track.index: [] for track in tracks}
        for packet in container.demux(tracks):
            if packet.size:
                found[packet.stream.index].append(bytes(packet))
        return [(track.codec_context.name, track.language, found[track.index]) for track in tracks]


def test_an_hd_picture_keeps_its_colours_there_and_back(tmp_path: Path) -> None:
    """It was untagged BT.601, which a player shows as BT.709: greens by 20 levels off."""
    (picture,) = blocks(1, 720, 1280)
    writer = Writer(tmp_path / "hd.mp4", (720, 1280), Fraction(25), Fraction(1, 25))
    writer.put(0, picture)
    writer.close()
    with av.open(str(tmp_path / "hd.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_range, context.color_primaries, context.color_trc
    assert tags == (1, 1, 1, 1)
    ((_, found),) = Video.open(tmp_path / "hd.mp4").read()
    assert np.abs(middles(found) - middles(picture)).max() < 8
    assert np.abs(middles(found) - decoded_by_hand(tmp_path / "hd.mp4", Colours(1))).max() <= 3


@pytest.mark.parametrize("suffix", [suffix for suffix in CONTAINERS if suffix != ".nut"])
def test_a_source_keeps_its_own_tags_in_every_container(tmp_path: Path, suffix: str) -> None:
    colours = Colours(1, primaries=1, transfer=1)
    source = film(tmp_path / "in.mp4", blocks(3), setup=lambda stream: tag(stream, colours), colours=colours)
    output = Output.of(Video.open(source), tmp_path / f"out{suffix}")
    assert not output.notes
    part = tmp_path / "0.nut"
    writer = output.writer(part)
    for time, picture in output.video.read():
        writer.put(time, picture)
    writer.close()
    output.join([part], Fraction(1, 25))
    assert Video.open(output.target).colours[:2] == colours[:2]
    found = [picture for _, picture in Video.open(output.target).read()]
    assert all(np.abs(middles(a) - middles(b)).max() < 12 for a, b in zip(found, blocks(3), strict=True))
    np.testing.assert_allclose(seconds(output.target), np.arange(3) / 25, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.nut", "in.mp4", output.target.name]


def tag(stream: Any, colours: Colours) -> None:
    context = stream.codec_context
    context.colorspace, context.color_range = colours.matrix, 1
    context.color_primaries, context.color_trc = colours.primaries, colours.transfer


def test_odd_sides_keep_every_line(tmp_path: Path) -> None:
    (picture,) = blocks(1, 32, 48)
    odd = picture[:31, :47]
    writer = Writer(tmp_path / "odd.mp4", (31, 47), Fraction(10), Fraction(1, 10))
    writer.put(0, odd)
    writer.close()
    video = Video.open(tmp_path / "odd.mp4")
    assert video.size == (32, 48)
    ((_, found),) = video.read()
    assert np.abs(found[:31, :47].astype(int) - odd).mean() < 6
    assert np.abs(found[31].astype(int) - found[30]).mean() < 6
    assert np.abs(middles(found) - middles(picture)).max() < 12
    source = film(tmp_path / "in.webm", [odd], encoder="libvpx-vp9")
    assert Output.of(Video.open(source), tmp_path / "out.mp4").notes == (
        "31x47 has an odd side, which gets its last line twice",
    )


def test_a_film_of_a_phone_is_upright_and_keeps_both_tracks(light_pipe: Pipe, tmp_path: Path) -> None:
    source = with_tracks(tmp_path / "in.mp4", "aac", "ac3")
    turned = film(tmp_path / "turned.mp4", blocks(12), setup=lambda stream: stream.set_display_rotation(90))
    restyle(made(light_pipe), Video.open(turned), tmp_path / "upright.mp4", progress=False)
    out = Video.open(tmp_path / "upright.mp4")
    assert out.size == Video.open(turned).size == (48, 32)
    with av.open(str(out.path)) as container:
        assert {frame.rotation for frame in container.decode(video=0)} == {0}
    restyle(made(light_pipe), Video.open(source), tmp_path / "out.mp4", progress=False)
    assert sounds(tmp_path / "out.mp4") == sounds(source)
    assert [language for _, language, _ in sounds(source)] == ["ger", "fre"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.metadata["title"] == "A film"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["First", "Second"]
    assert Output.of(Video.open(source), tmp_path / "out.avi").notes == ("chapters are left out",)


def test_sound_stays_beside_its_pictures_when_a_film_starts_late(light_pipe: Pipe, tmp_path: Path) -> None:
    source = with_tracks(tmp_path / "in.ts", "mp2")

    def starts(path: Path) -> list[float]:
        with av.open(str(path)) as container:
            first: dict[str, float] = {}
            for packet in container.demux():
                if packet.size:
                    time = float(packet.pts * packet.time_base)
                    first[packet.stream.type] = min(time, first.get(packet.stream.type, time))
            return [first["video"], first["audio"]]

    video, audio = starts(source)
    assert min(video, audio) > 0.05
    restyle(made(light_pipe), Video.open(source), tmp_path / "out.mkv", progress=False)
    found = starts(tmp_path / "out.mkv")
    np.testing.assert_allclose(found, [video - min(video, audio), audio - min(video, audio)], atol=2e-3)


@pytest.mark.parametrize(
    ("codec", "suffix", "other"),
    [
        ("aac", ".mkv", None),
        ("libopus", ".webm", None),
        ("libopus", ".mp4", None),
        ("aac", ".avi", None),
        ("aac", ".webm", ".mp4"),
        ("pcm_mulaw", ".mp4", ".mov"),
        ("libopus", ".m4v", ".mp4"),
    ],
)
def test_sound_that_does_not_fit_is_told_before_the_first_frame(
    light_pipe: Pipe, tmp_path: Path, codec: str, suffix: str, other: str | None
) -> None:
    """And a container that holds it is named."""
    source = with_tracks(tmp_path / "in.nut", codec)
    target = tmp_path / f"out{suffix}"
    stream = made(light_pipe)
    if other is None:
        assert restyle(stream, Video.open(source), target, progress=False) == 12
        assert [packets for _, _, packets in sounds(target)] == [packets for _, _, packets in sounds(source)]
        np.testing.assert_allclose(seconds(target), np.arange(12) / 25, atol=1e-3)
    else:
        stream.prepare = None  # type: ignore[assignment]  # nothing is drawn
        with pytest.raises(ValueError, match=rf"out\{suffix}: cannot hold in\.nut .*; name out{other}") as caught:
            restyle(stream, Video.open(source), target, progress=False)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["in.nut"]


def subtitled(path: Path) -> Path:
    """A film with a track of subtitles, which FFmpeg reads from a text."""
    text = path.with_suffix(".srt")
    text.write_text("1\n00:00:00,000 --> 00:00:00,200\nHello\n\n2\n00:00:00,200 --> 00:00:00,400\nworld\n")
    plain = film(path.with_name("plain.mkv"), blocks(12))
    with av.open(str(path), "w") as out, av.open(str(plain)) as video, av.open(str(text)) as words:
        pairs = [(stream, out.add_stream_from_template(stream)) for stream in (video.streams[0], words.streams[0])]
        for stream, copy in pairs:
            for packet in stream.container.demux(stream):
                if packet.size:
                    packet.stream = copy
                    out.mux(packet)
    plain.unlink(), text.unlink()
    return path


def test_subtitles_are_kept_or_said(light_pipe: Pipe, tmp_path: Path) -> None:
    source = subtitled(tmp_path / "in.mkv")
    restyle(made(light_pipe), Video.open(source), tmp_path / "out.mkv", progress=False)

    def texts(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(subtitles=0) if packet.size]

    assert texts(tmp_path / "out.mkv") == texts(source) != []
    with pytest.warns(UserWarning, match=r"in\.mkv: subtitles \(.*\) are left out"):
        restyle(made(light_pipe), Video.open(source), tmp_path / "out.mp4", progress=False)


def durations(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.duration) / av.time_base


def gif(path: Path, delays: list[int]) -> Path:
    from PIL import Image

    pictures = [Image.fromarray(picture) for picture in blocks(len(delays))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_the_last_delay_of_a_gif_is_kept(light_pipe: Pipe, tmp_path: Path, suffix: str) -> None:
    source = gif(tmp_path / "in.gif", [100, 200, 50, 700])
    restyle(made(light_pipe), Video.open(source), tmp_path / f"out{suffix}", progress=False)
    np.testing.assert_allclose(seconds(tmp_path / f"out{suffix}"), [0, 0.1, 0.3, 0.35], atol=1e-3)
    assert durations(tmp_path / f"out{suffix}") == pytest.approx(1.05, abs=2e-3)


def test_an_avi_gets_times_on_an_even_grid(light_pipe: Pipe, tmp_path: Path) -> None:
    """Times that are multiples of a unit are kept; others are moved by what is said."""
    source = gif(tmp_path / "in.gif", [100, 200, 50, 700])
    with pytest.warns(UserWarning, match=r"out\.avi: AVI does not keep the 0\.70 s of the last frame"):
        restyle(made(light_pipe), Video.open(source), tmp_path / "out.avi", progress=False)
    np.testing.assert_allclose(seconds(tmp_path / "out.avi"), [0, 0.1, 0.3, 0.35], atol=1e-6)
    times = [0, 33, 67, 100, 140, 177, 200, 233]
    source = film(tmp_path / "in.mp4", blocks(8), times=times)
    with pytest.warns(UserWarning, match=r"AVI has even times: frames move by up to \d+ ms"):
        restyle(made(light_pipe), Video.open(source), tmp_path / "uneven.avi", progress=False)
    found = seconds(tmp_path / "uneven.avi")
    np.testing.assert_allclose(found, np.array(times) / 1000, atol=0.01)
    assert len(set(found)) == 8


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size, which the writer learns as with a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_full_disk_leaves_no_broken_file_and_the_work(light_pipe: Pipe, tmp_path: Path, suffix: str) -> None:
    """The target is as it was; what is drawn is there for the next run, which draws nothing again."""
    target = tmp_path / f"out{suffix}"
    target.write_bytes(b"what was there")
    source = with_tracks(tmp_path / "in.mkv", "aac", frames=24)
    stream = made(light_pipe)
    stream.rehearse()
    sizes: list[int] = []
    join = Output.join

    def cramped(output: Output, segments: Any, duration: Any) -> Any:
        sizes.append(sum(path.stat().st_size for path in segments))
        with full_disk(sizes[0] // 2):
            return join(output, segments, duration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "join", cramped)
        with pytest.raises(OSError, match="File too large"):
            restyle(stream, Video.open(source), target, segment=8, progress=False)
    assert target.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.mkv", target.name, f"{target.name}.parts"])
    stream = made(light_pipe)
    stream.prepare = None  # type: ignore[assignment]
    assert restyle(stream, Video.open(source), target, segment=8, progress=False) == 24
    assert len(seconds(target)) == 24


def test_a_full_disk_leaves_no_broken_part(light_pipe: Pipe, tmp_path: Path) -> None:
    source = film(tmp_path / "in.mp4", blocks(24, 160, 240))
    stream = made(light_pipe)
    stream.rehearse()
    with full_disk(9000), pytest.raises(OSError, match="File too large"):
        restyle(stream, Video.open(source), tmp_path / "out.mp4", segment=12, progress=False)
    assert [path.name for path in (tmp_path / "out.mp4.parts").iterdir()] == ["job.json"]


def test_a_damaged_film_is_redrawn_to_its_end_and_again(
    light_pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun goes on, and does not stop at the same place."""
    source = damage(film(tmp_path / "in.avi", blocks(24), encoder="mjpeg"), [10, 11, 20], byte=255)
    video = Video.open(source)
    with pytest.warns(UserWarning, match=r"in\.avi: 3 damaged packets or frames"):
        assert restyle(made(light_pipe), video, tmp_path / "whole.mp4", segment=8, progress=False) == 21
    times = [i / 25 for i in range(24) if i not in (10, 11, 20)]
    np.testing.assert_allclose(seconds(tmp_path / "whole.mp4"), times, atol=1e-4)
    make, calls = module._make_segment, []

    def killed(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(module, "_make_segment", killed)
    with pytest.raises(KeyboardInterrupt):
        restyle(made(light_pipe), video, tmp_path / "out.mp4", segment=8, progress=False)
    with pytest.warns(UserWarning, match="3 damaged packets"):
        assert restyle(made(light_pipe), video, tmp_path / "out.mp4", segment=8, progress=False) == 21
    assert seconds(tmp_path / "out.mp4") == seconds(tmp_path / "whole.mp4")


def test_sound_that_is_damaged_does_not_stop_the_end(light_pipe: Pipe, tmp_path: Path) -> None:
    """Packets out of order, as after a damage: a container refuses times that go back."""
    source = with_tracks(tmp_path / "in.ts", "mp2")
    data = source.read_bytes()
    source.write_bytes(data + data)  # a recording that was interrupted: all times begin again
    assert restyle(made(light_pipe), Video.open(source), tmp_path / "out.mp4", progress=False) == 24
    assert len(sounds(tmp_path / "out.mp4")[0][2]) == len(sounds(source)[0][2])


def test_few_frames_are_held(light_pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a segment is: those that wait to be drawn, those in flight, those that wait to be written."""
    read, written, most = 0, 0, 0
    decode, put = Frames.__iter__, Writer.put

    def counted(frames: Frames) -> Iterator[Any]:
        nonlocal read, most
        for frame in decode(frames):
            read += 1
            most = max(most, read - written)
            yield frame

    def counting(writer: Writer, *arguments: Any) -> None:
        nonlocal written
        put(writer, *arguments)
        written += 1

    monkeypatch.setattr(Frames, "__iter__", counted)
    monkeypatch.setattr(Writer, "put", counting)
    source = film(tmp_path / "in.mp4", blocks(120))
    assert restyle(made(light_pipe), Video.open(source), tmp_path / "out.mp4", progress=False) == written == 120
    assert most <= 2 * module.MOST_AHEAD + 8
    assert module.ahead((2160, 3840)) * 2160 * 3840 * 3 <= module.BYTES_AHEAD


def call(pipe: Pipe, source: str, target: Path, **changes: Any) -> str:
    options: dict[str, Any] = {"size": None, "count": 6, "seconds": None, "rate": 10.0, "sampler": "lcm"}
    options |= {"controls": {"steps": 2}} | changes
    return run_stream(pipe, source, target, ["red heart"], **options)


@pytest.mark.parametrize("suffix", list(CONTAINERS))
def test_pictures_become_every_kind_of_film(light_pipe: Pipe, tmp_path: Path, suffix: str) -> None:
    call(light_pipe, "noise", tmp_path / f"a{suffix}")
    assert len(seconds(tmp_path / f"a{suffix}")) == 6
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_a_late_failure_leaves_a_film_of_what_was_drawn(
    light_pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = Stream.__call__, []

    def failing(stream: Stream, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return draw(stream, *arguments)

    monkeypatch.setattr(Stream, "__call__", failing)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        pytest.warns(UserWarning, match=r"a\.partial\.mp4: the 4 pictures that were drawn before the failure"),
    ):
        call(light_pipe, "noise", tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(seconds(tmp_path / "a.partial.mp4")) == 4
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        call(light_pipe, "noise", tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]


@pytest.mark.parametrize("target", ["a.mp4", "folder"])
def test_an_interrupt_is_the_end_of_a_camera(
    light_pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    prepare, calls = Stream.prepare, []

    def interrupted(stream: Stream, frame: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return prepare(stream, frame)

    monkeypatch.setattr(Stream, "prepare", interrupted)
    monkeypatch.setattr("lcm_jax.stream.command._live", lambda *_: iter(np.zeros((9, 16, 16, 3), np.uint8)))
    assert "3 pictures" in call(light_pipe, "camera", tmp_path / target)
    found = len(seconds(tmp_path / target)) if target == "a.mp4" else len(list((tmp_path / target).iterdir()))
    assert found == 3


def test_phases_are_named_and_lines_in_a_log(
    light_pipe: Pipe,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lcm_jax.runtime.progress.LINE_SECONDS", 1e-6)
    for source in (str(pictures), str(film(tmp_path / "in.mp4", blocks(6)))):
        call(light_pipe, source, tmp_path / "out.mp4")
        said = capsys.readouterr().err
        assert "compiling: 2/2 program" in said
        assert "drawing: 6/6 frame" in said
        assert "\r" not in said
        assert ("reading: 6/6 picture" in said) == (source == str(pictures))


@pytest.mark.parametrize("rate", [0.0, -5.0])
def test_a_rate_is_more_than_nothing(light_pipe: Pipe, tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match="--rate"):
        call(light_pipe, "noise", tmp_path / "a.mp4", rate=rate)
