"""Video files: frame times, audio and size are kept; a killed job goes on to the same file; bad input is named."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from lcm_jax.stream import Stream  # noqa: E402
from lcm_jax.stream.command import parse_controls, run_stream  # noqa: E402
from lcm_jax.stream.video import Video, Writer, restyle, working_size  # noqa: E402

Pipe = Any
RATE = Fraction(30000, 1001)


def make(path: Path, frames: int = 23, *, audio: bool = True, size: tuple[int, int] = (36, 64)) -> Path:
    """A video whose frames change, at a rate that is no whole number, with a tone."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=RATE, options={"crf": "10"})
        video.height, video.width = size
        video.pix_fmt = "yuv420p"
        sound = out.add_stream("aac", rate=44100) if audio else None
        for _ in range(frames):
            blocks = random.integers(0, 256, (size[0] // 4, size[1] // 4, 3), np.uint8)
            picture = np.kron(blocks, np.ones((4, 4, 1), np.uint8))
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
        if sound is not None:
            tone = (np.sin(np.arange(44100) / 20.0) * 8000).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate = 44100
            out.mux(sound.encode(frame))
            out.mux(sound.encode())
    return path


def times(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def made(pipe: Pipe, **controls: Any) -> Stream:
    return Stream(pipe, "red heart", size=(12, 20), steps=3, strength=0.8, **controls)


def test_a_restyled_video_keeps_times_audio_and_size(light_pipe: Pipe, tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4")
    video = Video.open(source)
    assert (video.size, video.rate, video.frames, video.audio) == ((36, 64), RATE, 23, True)
    assert restyle(made(light_pipe), video, tmp_path / "out.mp4", segment=8, progress=False) == 23
    out = Video.open(tmp_path / "out.mp4")
    assert (out.size, out.rate, out.frames, out.audio) == ((36, 64), RATE, 23, True)
    np.testing.assert_allclose(times(tmp_path / "out.mp4"), times(source), atol=1e-6)
    assert packets(tmp_path / "out.mp4") == packets(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_its_frames_are_the_streams(light_pipe: Pipe, tmp_path: Path) -> None:
    """In order, none lost and none twice, across the borders of segments."""
    video = Video.open(make(tmp_path / "in.mp4", audio=False))
    alone = made(light_pipe, batch=False)
    wanted = [alone(picture).astype(float) for _, picture in video.read()]
    restyle(made(light_pipe), video, tmp_path / "out.mp4", segment=8, progress=False)
    found = [picture.astype(float) for _, picture in Video.open(tmp_path / "out.mp4").read()]
    assert len(found) == len(wanted)
    means = np.array([picture.mean((0, 1)) for picture in found]), np.array([p.mean((0, 1)) for p in wanted])
    assert np.abs(means[0] - means[1]).max() < 6.0
    assert np.ptp(means[1], axis=0).max() > 8.0, "frames differ, or this would show nothing"


@pytest.mark.parametrize("controls", [{}, {"similarity": 0.98}, {"feedback": 0.3, "motion": 0.5}], ids=str)
def test_a_killed_job_goes_on_to_the_same_file(
    light_pipe: Pipe, tmp_path: Path, controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, given = Writer.put, {}

    def record(writer: Writer, time: int, picture: np.ndarray) -> None:
        given[time] = picture.copy()
        put(writer, time, picture)

    monkeypatch.setattr(Writer, "put", record)
    video = Video.open(make(tmp_path / "in.mp4"))
    restyle(made(light_pipe, **controls), video, tmp_path / "whole.mp4", segment=8, progress=False)
    uninterrupted = dict(given)
    given.clear()

    stream, calls = made(light_pipe, **controls), 0
    prepare = stream.prepare

    def killed(frame: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 14:
            raise KeyboardInterrupt
        return prepare(frame)

    stream.prepare = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        restyle(stream, video, tmp_path / "out.mp4", segment=8, progress=False)
    assert not (tmp_path / "out.mp4").exists()
    parts = sorted((tmp_path / "out.mp4.parts").glob("*.nut"))
    assert parts
    stamp = parts[0].stat().st_mtime_ns
    restyle(made(light_pipe, **controls), video, tmp_path / "out.mp4", segment=8, progress=False)
    assert not (tmp_path / "out.mp4.parts").exists()
    assert stamp
    a, b = (list(Video.open(tmp_path / name).read()) for name in ("whole.mp4", "out.mp4"))
    assert [time for time, _ in a] == [time for time, _ in b]
    assert list(given) == list(uninterrupted)
    assert all(np.array_equal(given[time], picture) for time, picture in uninterrupted.items())
    # x264 does not give the same bytes for the same frames every time: a level or two apart on the average.
    assert all(np.abs(x.astype(float) - y).mean() < 4 for (_, x), (_, y) in zip(a, b, strict=True))


def test_parts_of_another_job_are_refused(light_pipe: Pipe, tmp_path: Path) -> None:
    video = Video.open(make(tmp_path / "in.mp4"))
    stream = made(light_pipe)
    stream.prepare = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        restyle(stream, video, tmp_path / "out.mp4", segment=8, progress=False)
    with pytest.raises(ValueError, match="parts of another job"):
        restyle(made(light_pipe, scale=2.0), video, tmp_path / "out.mp4", segment=8, progress=False)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4: no such file"):
        Video.open(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video that can be read"):
        Video.open(tmp_path / "text.mp4")


def test_working_size_has_the_models_area_and_the_videos_shape() -> None:
    assert working_size((512, 512), (1080, 1920), 8) == (384, 680)
    assert working_size((64, 64), (100, 100), 8) == (64, 64)
    height, width = working_size((1024, 1024), (1920, 1080), 16)
    assert height % 16 == width % 16 == 0
    assert height > width


def call(pipe: Pipe, source: str, target: Path, *prompts: str, **changes: Any) -> str:
    options: dict[str, Any] = {"size": None, "count": 5, "seconds": None, "rate": 10.0, "sampler": "lcm"}
    options |= {"controls": {"steps": 2}} | changes
    return run_stream(pipe, source, target, prompts or ("red heart",), **options)


def test_folders_and_noise(light_pipe: Pipe, pictures: Path, tmp_path: Path) -> None:
    """A folder of pictures becomes a folder under the same names, or a video; noise travels through prompts."""
    call(light_pipe, str(pictures), tmp_path / "folder")
    assert {path.stem for path in (tmp_path / "folder").iterdir()} == {path.stem for path in pictures.glob("*.png")}
    call(light_pipe, str(pictures), tmp_path / "film.mp4")
    assert Video.open(tmp_path / "film.mp4").frames == len(list(pictures.glob("*.png")))
    said = call(light_pipe, "noise", tmp_path / "noise.mp4", "red heart", "dog face", "cat face")
    assert "5 pictures" in said
    assert Video.open(tmp_path / "noise.mp4").frames == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "folder", "noise.mp4"]


def test_a_film_is_never_written_over_itself(light_pipe: Pipe, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"the only copy")
    with pytest.raises(ValueError, match=r"--out .*film\.mp4: is the video to be redrawn; name another file"):
        call(light_pipe, str(film), tmp_path / "." / "film.mp4")
    assert film.read_bytes() == b"the only copy"


def test_a_folder_is_looked_through_beforehand(light_pipe: Pipe, pictures: Path, tmp_path: Path) -> None:
    """What cannot be read, and what would be written over another, is told before anything is drawn."""
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(pictures, folder)
    first, last = (sorted(folder.glob("*.png"))[i] for i in (0, -1))
    with pytest.raises(ValueError, match="holds the pictures to be redrawn"):
        call(light_pipe, str(folder), folder)
    again = first.with_suffix(".jpg")
    again.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{first.name}: would become {first.stem}.png, as {again.name} would"):
        call(light_pipe, str(folder), out)
    again.unlink()
    last.write_bytes(last.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{last.name}: not a readable picture"):
        call(light_pipe, str(folder), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("source", "target", "prompts", "words"),
    [
        ("in.mp4", "out.gif", ["a"], r"name a folder, or a video such as out\.mp4"),
        ("in.mp4", "out", ["a"], "a video becomes a video"),
        ("absent.mp4", "out.mp4", ["a"], "no such file"),
        (".", "out.mp4", ["a"], "no pictures in it"),
        ("camera:/dev/video99", "out.mp4", ["a"], "cannot be opened"),
        ("in.mp4", "out.mp4", ["a", "b"], "only a stream from noise travels"),
    ],
)
def test_bad_arguments(
    light_pipe: Pipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    target: str,
    prompts: Any,
    words: str,
) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "in.mp4", 3, audio=False)
    monkeypatch.chdir(tmp_path / "empty" if source == "." else tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        call(light_pipe, source, tmp_path / target, *prompts)
    assert not (tmp_path / target).exists()


def test_controls_on_the_command_line() -> None:
    assert parse_controls(["guidance=self", "delta=0.5", "t_index=[10,30]", "fresh=true"]) == {
        "guidance": "self",
        "delta": 0.5,
        "t_index": [10, 30],
        "fresh": True,
    }
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_controls(["feedback"])
