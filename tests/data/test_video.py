import builtins
import fractions
import json
import os

import numpy as np
import pytest

from jax_instructblip.data import video
from jax_instructblip.data.video import VideoError, read_frames, sample_indices

INDICES = [
    ("uniform", 9, 3, (0, 3, 6)),
    ("middle", 9, 3, (1, 4, 7)),
    ("headtail", 9, 3, (0, 4, 8)),
    ("uniform", 10, 4, (0, 2, 5, 7)),
    ("middle", 10, 4, (1, 3, 6, 8)),
    ("headtail", 10, 4, (0, 3, 6, 9)),
    ("headtail", 11, 4, (0, 3, 6, 10)),
    ("uniform", 325, 4, (0, 81, 162, 243)),
    ("middle", 7, 1, (3,)),
    ("headtail", 7, 1, (0,)),
    ("headtail", 7, 2, (0, 6)),
]


@pytest.mark.parametrize(("how", "count", "wanted", "indices"), INDICES)
def test_indices(how, count, wanted, indices):
    assert sample_indices(count, wanted, how) == indices


@pytest.mark.parametrize("how", ["uniform", "middle", "headtail"])
def test_indices_rise_and_stay_inside(how):
    for count in range(1, 40):
        for wanted in range(1, count + 1):
            indices = sample_indices(count, wanted, how)
            assert len(indices) == wanted
            assert indices == tuple(sorted(set(indices)))
            assert 0 <= indices[0] <= indices[-1] < count
    assert sample_indices(5, 5, how) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("count", [1, 4, 7, 325, 1000])
def test_uniform_is_the_released_rule(count):
    """LAVIS: np.arange(0, n, n / 4).astype(int)."""
    for wanted in (1, 2, 4):
        if wanted <= count:
            released = np.arange(0, count, count / wanted).astype(int)
            assert sample_indices(count, wanted) == tuple(released)


def test_bad_sampling():
    with pytest.raises(ValueError, match="3 frames, but 4 are wanted: ask for 1 to 3"):
        sample_indices(3, 4)
    with pytest.raises(ValueError, match="5 frames, but 0 are wanted"):
        sample_indices(5, 0)
    with pytest.raises(ValueError, match="'random', expected 'uniform', 'middle' or 'headtail'"):
        sample_indices(5, 2, "random")


@pytest.fixture
def clip(tmp_path):
    """`clip("x.mp4", "mpeg4")`: ten frames a second, each brighter than the one before."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")

    def write(name, codec, count=12, **options):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=10, options=options)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for number in range(count):
                pixels = np.full((48, 64, 3), 20 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return tmp_path / name

    return write


CONTAINERS = [
    ("a.mp4", "mpeg4", {}),
    ("a.mkv", "mpeg4", {}),
    ("a.webm", "libvpx", {}),
    ("a.gif", "gif", {}),
    ("a.avi", "mpeg4", {"bf": "2"}),  # whose first frame is not at zero
]


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS)
def test_frames_and_times(clip, name, codec, options):
    images, times = read_frames(clip(name, codec, **options), 4)
    assert times == pytest.approx((0.0, 0.3, 0.6, 0.9))
    assert [(image.mode, image.size) for image in images] == [("RGB", (64, 48))] * 4
    # GIF has 256 colours: 8 shades of red and green, 4 of blue.
    shades = [np.asarray(image)[24, 32, 0] for image in images]
    assert np.abs(np.array(shades, int) - (0, 60, 120, 180)).max() <= (40 if codec == "gif" else 4)


def test_the_way_of_taking_frames(clip):
    path = clip("a.mp4", "mpeg4")
    assert read_frames(path, 3, "headtail")[1] == pytest.approx((0.0, 0.6, 1.1))
    images, times = read_frames(str(path), 2, "middle")
    assert times == pytest.approx((0.3, 0.9))
    assert np.asarray(images[1])[0, 0, 0] == pytest.approx(180, abs=4)


def golden_times(shared, stream):
    """The recorded times of all frames of one of the two video streams."""
    path = shared / "data" / "videos" / f"nasa_13013.mp4.stream{stream}.all_frames_info.json"
    return [float(frame["pts_time"]) for frame in json.loads(path.read_text())]


def test_recorded_times_of_the_best_stream(shared):
    pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    golden = golden_times(shared, 3)
    images, times = read_frames(shared / "data" / "videos" / "nasa_13013.mp4", len(golden))
    assert len(times) == 390
    assert times == pytest.approx(golden, abs=1e-6)
    assert images[0].size == (480, 270)
    with pytest.raises(VideoError, match=r"nasa_13013\.mp4: 390 frames, but 391 are wanted"):
        read_frames(shared / "data" / "videos" / "nasa_13013.mp4", 391)


def test_recorded_times_of_the_other_stream(shared, tmp_path):
    """Copied out of the file, it is the best stream of its own."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    golden = golden_times(shared, 0)
    path = tmp_path / "stream0.mp4"
    source = str(shared / "data" / "videos" / "nasa_13013.mp4")
    with av.open(source) as container, av.open(str(path), "w") as copy:
        stream = container.streams.video[0]
        target = copy.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.stream = target
                copy.mux(packet)
    chosen = sample_indices(len(golden), 4)
    images, times = read_frames(path, 4)
    assert len(golden) == 325
    assert times == pytest.approx([golden[index] for index in chosen], abs=1e-6)
    assert images[0].size == (320, 180)


# Frames and size of each as `INFO.json` records them.
@pytest.mark.parametrize("name", ["av1_video.mkv", "flipping_a_pancake.mkv", "realshort.mp4"])
def test_real_videos(shared, name):
    pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    folder = shared / "data" / "videos"
    info = json.loads((folder / "INFO.json").read_text())[name]
    images, times = read_frames(folder / name, 4)
    assert {image.size for image in images} == {(info["w"], info["h"])}
    length = float(info["frames"] / fractions.Fraction(info["fps"]))
    assert times == pytest.approx([0, length / 4, length / 2, length * 3 / 4], abs=0.05)
    with pytest.raises(VideoError, match=f"{info['frames']} frames, but 1000 are wanted"):
        read_frames(folder / name, 1000)


def test_damaged_video(shared):
    pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    path = shared / "data" / "videos" / "corrupted.mp4"
    with pytest.raises(VideoError, match=r"corrupted\.mp4 cannot be read after 28 frames: Invalid"):
        read_frames(path, 4)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\ngood.mp4\n#EXT-X-ENDLIST\n"


def test_a_file_that_is_no_video(clip, tmp_path):
    clip("good.mp4", "mpeg4")
    (tmp_path / "text.mp4").write_text("hello")
    # A playlist would open other files, or addresses.
    (tmp_path / "list.m3u8").write_text(PLAYLIST)
    for name, reason in (
        ("text.mp4", "Invalid data"),
        ("list.m3u8", "Invalid argument"),
        ("none.mp4", "No such file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(VideoError, match=f"cannot be read after 0 frames: {reason}"):
            read_frames(tmp_path / name, 1)


def test_no_pictures(tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"sound\.mp4 holds no video"):
        read_frames(path, 1)


def test_too_large(clip, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="frames of 64 x 48 pixels, expected at most 3071"):
        read_frames(clip("a.mp4", "mpeg4"), 1)


def test_without_the_library(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *arguments, **named):
        if name.partition(".")[0] == "av":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(VideoError, match=r"videos need PyAV: pip install -e \.\[video\]"):
        read_frames(tmp_path / "a.mp4", 1)


def test_a_video_of_many_questions_is_decoded_once(clip, monkeypatch):
    decoded, real = [], video.read_frames
    monkeypatch.setattr(
        video, "read_frames", lambda path, wanted: decoded.append(path) or real(path, wanted)
    )
    path = clip("a.mp4", "mpeg4")
    found = [video.encode_frames(path, 3, quality=95) for _ in range(30)]
    assert decoded == [str(path)] and found == [found[0]] * 30
    assert len(video.encode_frames(path, 2, quality=95)[0]) == 2
    path.write_bytes(b"no video")  # another file of that name is another video
    for _ in range(3):
        with pytest.raises(VideoError, match="cannot be read after 0 frames"):
            video.encode_frames(path, 3, quality=95)
    assert len(decoded) == 3  # three frames, two, and once the damaged file


def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"a\.mp4 is a pipe, expected a regular file"):
        read_frames(tmp_path / "a.mp4", 1)
    with pytest.raises(VideoError, match=r"a\.mp4 is a pipe, expected a regular file"):
        video.encode_frames(tmp_path / "a.mp4", 1, quality=9)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.MOV", "mpeg4"), ("a.flv", "flv"), ("a.wmv", "wmv2"), ("a.ts", "mpeg4")],
)
def test_other_containers_are_read(clip, name, codec):
    images, times = read_frames(clip(name, codec), 2)
    assert len(images) == 2 and times[0] == 0.0
