"""A film is read as a player shows it: turned, with square pixels, in its colours and times, past what is damaged."""

from __future__ import annotations

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from av.video.reformatter import VideoReformatter  # noqa: E402

from lcm_jax.stream.colours import Colours, Converter  # noqa: E402
from lcm_jax.stream.video_reader import Frames, Video  # noqa: E402

LUMA = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}


def blocks(number: int, height: int = 32, width: int = 48, seed: int = 0) -> list[np.ndarray]:
    """Pictures of blocks of 16 x 16 pixels, whose middles no compression of colours touches."""
    random = np.random.default_rng(seed)
    colours = random.integers(40, 216, (number, height // 16, width // 16, 3), np.uint8)
    return [np.kron(picture, np.ones((16, 16, 1), np.uint8)) for picture in colours]


def film(
    path: Path,
    pictures: list[np.ndarray],
    *,
    encoder: str = "libx264",
    setup: Callable[[Any], Any] = lambda stream: None,
    times: list[int] | None = None,
    colours: Colours | None = None,
    **options: str,
) -> Path:
    """Write pictures with PyAV alone, nearly without loss; times in milliseconds."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=25, options=({"crf": "4"} if encoder == "libx264" else {}) | options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        setup(stream)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if colours is not None:
                frame = Converter().from_rgb(picture, colours)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def shown(path: Path) -> list[np.ndarray]:
    return [picture for _, picture in Video.open(path).read()]


def seconds(path: Path) -> list[float]:
    video = Video.open(path)
    return [float(time * video.time_base) for time, _ in video.read()]


def middles(picture: np.ndarray) -> np.ndarray:
    return picture[8::16, 8::16].astype(int)


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)], ids=["plain", "across", "down"])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_the_display_matrix_turns_a_film(tmp_path: Path, degrees: int, flips: tuple[bool, bool]) -> None:
    """As phones record: the pixels lie, the matrix says how they stand. All eight orientations."""
    stored = blocks(2)
    path = film(tmp_path / "a.mp4", stored, setup=lambda stream: stream.set_display_rotation(degrees, *flips))
    with av.open(str(path)) as container:
        assert any(flips) or {abs(frame.rotation) for frame in container.decode(video=0)} == {abs(degrees)}
    wanted = [np.rot90(picture, degrees // 90) for picture in stored]
    wanted = [picture[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1] for picture in wanted]
    assert Video.open(path).size == wanted[0].shape[:2]
    for found, picture in zip(shown(path), wanted, strict=True):
        assert np.abs(middles(found) - middles(picture)).max() < 8


def test_no_frame_outlives_its_turn(tmp_path: Path) -> None:
    """A decoded frame of 4K has 12 MB, and a cycle of references would keep it until a collection."""
    frames = iter(Frames(Video.open(film(tmp_path / "a.mp4", blocks(30)))))
    gc.collect()
    gc.disable()
    try:
        for _ in frames:
            pass
        alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive < 5


def test_an_angle_that_is_no_right_one_is_said(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", blocks(1), setup=lambda stream: stream.set_display_rotation(80))
    video = Video.open(path)
    assert video.size == (48, 32)
    assert video.notes == ("it is turned by no right angle; the nearest one is taken",)


@pytest.mark.parametrize(
    ("ratio", "degrees", "size"),
    [
        ((4, 3), 0, (32, 64)),
        ((3, 4), 0, (42, 48)),
        ((4, 3), 90, (64, 32)),
        ((1, 1), 0, (32, 48)),
        ((20, 1), 0, (32, 48)),
    ],
)
def test_pixels_become_square(tmp_path: Path, ratio: tuple[int, int], degrees: int, size: tuple[int, int]) -> None:
    """As FFmpeg's own scaling by the sample aspect ratio, before the turn; a senseless ratio is said."""

    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(*ratio)
        stream.set_display_rotation(degrees)

    path = film(tmp_path / "a.mp4", blocks(1), setup=setup)
    video = Video.open(path)
    assert video.size == size
    assert bool(video.notes) == (ratio == (20, 1))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    height, width = size[::-1] if degrees else size
    scaled = VideoReformatter().reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    assert np.abs(np.rot90(scaled, degrees // 90).astype(int) - shown(path)[0]).mean() < 4


def decoded_by_hand(path: Path, colours: Colours) -> np.ndarray:
    """The middles of a film's first picture, from its stored numbers by the equations of a matrix."""
    with av.open(str(path)) as container:
        planes = (
            next(container.decode(video=0)).to_ndarray(format="yuvj420p" if colours.full else "yuv420p").astype(float)
        )
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    y = planes[:height]
    u, v = (part.reshape(height // 2, width // 2).repeat(2, 0).repeat(2, 1) for part in np.split(planes[height:], 2))
    y, u, v = (
        (y, u - 128, v - 128) if colours.full else ((y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224)
    )
    red, blue = LUMA[colours.matrix]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return middles(np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1).clip(0, 255).round())


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", sorted(LUMA))
def test_conversions_follow_the_matrix_and_the_range(matrix: int, full: bool) -> None:
    """Each of the matrices of ISO/IEC 23091-2, from RGB and back, against its equations."""
    colours, convert = Colours(matrix, full), Converter()
    (picture,) = blocks(1)
    frame = convert.from_rgb(picture, colours)
    assert Colours.of(frame) == colours
    y = frame.to_ndarray()[:32][8::16, 8::16].astype(float)
    y = y if full else (y - 16) * 255 / 219
    red, blue = LUMA[matrix]
    assert np.abs(middles(picture) @ np.array([red, 1 - red - blue, blue]) - y).max() < 1.5
    assert np.abs(middles(convert.to_rgb(frame)) - middles(picture)).max() <= 3


@pytest.mark.parametrize(
    ("side", "stored", "tagged", "wanted"),
    [
        (720, Colours(1), False, Colours(1)),  # HD without tags
        (720, Colours(6, primaries=6, transfer=6), True, Colours(6, primaries=6, transfer=6)),
        (32, Colours(6, primaries=2, transfer=2), False, Colours(6, primaries=2, transfer=2)),
        (32, Colours(1), True, Colours(1)),
        (32, Colours(9, primaries=9, transfer=14), True, Colours(9, primaries=9, transfer=14)),
        (32, Colours(1, full=True), True, Colours(1, full=True)),
    ],
    ids=["hd", "hd-601", "sd", "sd-709", "sd-2020", "full"],
)
def test_colours_are_those_of_the_tags(
    tmp_path: Path, side: int, stored: Colours, tagged: bool, wanted: Colours
) -> None:
    (picture,) = blocks(1, height=side // 16 * 16)

    def setup(stream: Any) -> None:
        if tagged:
            context = stream.codec_context
            context.colorspace, context.color_range = stored.matrix, 2 if stored.full else 1
            context.color_primaries, context.color_trc = stored.primaries, stored.transfer

    def untagged(frame: Any) -> Any:
        frame.colorspace = frame.color_primaries = frame.color_trc = 2
        frame.color_range = 0
        return frame

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        setup(stream)
        frame = Converter().from_rgb(picture, stored)
        out.mux(stream.encode(frame if tagged else untagged(frame)))
        out.mux(stream.encode())
    assert Video.open(path).colours == wanted
    found = middles(shown(path)[0])
    assert np.abs(found - middles(picture)).max() < 6
    assert np.abs(found - decoded_by_hand(path, wanted)).max() <= 3


def test_what_pixels_do_not_keep_is_said(tmp_path: Path) -> None:
    def deep(stream: Any) -> None:
        stream.pix_fmt = "yuv420p10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = 16, 9
        stream.codec_context.colorspace = 9

    notes = " ".join(Video.open(film(tmp_path / "a.mp4", blocks(1), setup=deep)).notes)
    assert "10 bits a colour become 8" in notes
    assert "HDR (PQ)" in notes
    assert not Video.open(film(tmp_path / "b.mp4", blocks(1))).notes


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    from PIL import Image

    pictures = [Image.new("RGBA", (48, 32), (200, 0, 0, 0)) for _ in range(2)]
    for i, picture in enumerate(pictures):
        picture.paste((0, 80 + i, 0, 255), (0, 0, 24, 32))
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    assert Video.open(tmp_path / "a.gif").notes == ("transparent parts become white",)
    first = shown(tmp_path / "a.gif")[0]
    assert (first[:, 30:] == 255).all()
    assert first[0, 0].tolist() == [0, 80, 0]


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_avi_has_even_times(tmp_path: Path, encoder: str) -> None:
    """Its packets bear no presentation times, and with B-frames the guessed ones go back and forth."""
    path = film(tmp_path / "a.avi", blocks(12), encoder=encoder, bf="2")
    np.testing.assert_allclose(seconds(path), np.arange(12) / 25)


@pytest.mark.parametrize("encoder", ["libx264", "mjpeg"])
def test_a_gap_of_an_avi_stays(tmp_path: Path, encoder: str) -> None:
    """A frame that is not there is an empty packet, which shows the last one for longer."""
    numbers = [0, 1, 2, 5, 6, 9]
    intact = film(tmp_path / "whole.avi", blocks(10), encoder=encoder, **({"bf": "0"} if encoder == "libx264" else {}))
    path = film(tmp_path / "a.avi", blocks(6), encoder=encoder, times=[40 * i for i in numbers], setup=even)
    assert len(shown(intact)) == 10
    np.testing.assert_allclose(seconds(path), np.array(numbers) / 25)


def even(stream: Any) -> None:
    stream.codec_context.time_base = stream.time_base = Fraction(1, 25)
    if stream.codec_context.name == "libx264":
        stream.codec_context.options = {"bf": "0", "crf": "4"}


def test_uneven_times_and_late_starts(tmp_path: Path) -> None:
    times = [0, 40, 80, 100, 180, 220, 300, 500]
    np.testing.assert_allclose(seconds(film(tmp_path / "a.mp4", blocks(8), times=times)), np.array(times) / 1000)
    path = film(tmp_path / "a.ts", blocks(8))
    with av.open(str(path)) as container:
        assert container.start_time > 0
    np.testing.assert_allclose(seconds(path), np.arange(8) / 25, atol=1e-4)


def damage(path: Path, packets: list[int], byte: int = 0) -> Path:
    """Overwrite whole packets of a film's video."""
    with av.open(str(path)) as container:
        stored = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    for i in packets:
        assert data.count(stored[i]) == 1
        data = data.replace(stored[i], bytes([byte]) * len(stored[i]))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "encoder"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.avi", "mjpeg"), ("a.mkv", "libx264")]
)
def test_damaged_packets_are_passed_over(tmp_path: Path, name: str, encoder: str) -> None:
    """The frames before and after are read, at their own times, every time anew, and the damage is counted."""
    options = {"bf": "0", "g": "1"} if encoder == "libx264" else {} if encoder == "mjpeg" else {"g": "1"}
    pictures = blocks(12)
    path = film(tmp_path / name, pictures, encoder=encoder, **options)
    sound = [float(time) for time in seconds(path)]
    damage(path, [5, 6])
    video = Video.open(path)
    frames = Frames(video)
    found = {round(float(time * video.time_base), 3): picture for time, picture in frames}
    assert frames.damaged >= 2
    good = [i for i in range(12) if i not in (5, 6)]
    assert {round(sound[i], 3) for i in good} <= set(found)
    assert len(found) <= 12
    for i in good:
        assert np.abs(middles(found[round(sound[i], 3)]) - middles(pictures[i])).max() < 24
    with pytest.warns(UserWarning, match=rf"{name}: {frames.damaged} damaged packets or frames; the film goes on"):
        again = {round(float(time * video.time_base), 3): picture for time, picture in video.read()}
    assert list(again) == list(found)
    assert all(np.array_equal(again[time], found[time]) for time in found)


def test_a_file_that_is_cut_off_gives_its_beginning(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", blocks(12), bf="0", g="1")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 1 <= len(seconds(path)) <= 9
    text = tmp_path / "none.mkv"
    text.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"none\.mkv: "):
        Video.open(text)


def test_frames_of_another_size_are_scaled(tmp_path: Path) -> None:
    parts = [film(tmp_path / f"{i}.ts", blocks(3, *size)) for i, size in enumerate([(32, 48), (64, 96)])]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = Frames(Video.open(path))
    found = list(frames)
    assert {picture.shape for _, picture in found} == {(32, 48, 3)}
    assert frames.rescaled == 3
    times = [time for time, _ in found]
    assert times == sorted(set(times))
    with pytest.warns(UserWarning, match=r"3 frames of another size are scaled to 32x48"):
        frames.warn()


SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{name}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{name}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1" mimeType="video/mp4"><BaseURL>{name}</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "vobsub": "# VobSub index file, v7\nsize: 720x480\n",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_opens_no_other_file(tmp_path: Path, kind: str) -> None:
    """Whatever its name says: FFmpeg would follow it."""
    film(tmp_path / "secret.mp4", blocks(2))
    path = tmp_path / "film.mp4"
    path.write_text(SCRIPTS[kind].format(name="secret.mp4"))
    with pytest.raises(ValueError, match=r"film\.mp4: not a video that can be read") as caught:
        Video.open(path)
    assert "\n" not in str(caught.value)


def test_a_name_with_a_pattern_or_a_protocol_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "plain.mp4", blocks(2))
    (tmp_path / "concat:plain.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match="not a video that can be read"):
        Video.open(Path("concat:plain.mp4"))
    (tmp_path / "plain.mp4").rename(tmp_path / "100%03d.mp4")
    assert len(shown(Path("100%03d.mp4"))) == 2


def test_sound_alone_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "song.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"song\.mkv: no video in it"):
        Video.open(path)
