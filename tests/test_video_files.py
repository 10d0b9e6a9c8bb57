"""Video files: writing, reading by time, and contact sheets."""

import itertools

import av
import numpy as np
import pytest
from PIL import Image

from lavie_jax.data import moving_shapes, video_files
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.errors import UserError
from tests import videos


def ramp(frames=12, height=32, width=48):
    """Returns frames of one gray level each, which can be told apart after compression."""
    gray = np.linspace(20, 235, frames).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(gray[:, None, None, None], (frames, height, width, 3)))


def numbers(frames, of):
    """Returns the index in `of` of each frame."""
    distance = np.abs(frames.mean((1, 2, 3))[:, None] - of.mean((1, 2, 3))[None])
    return distance.argmin(1).tolist()


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return video_files.save_video(ramp(), tmp_path_factory.mktemp("video") / "deep" / "ramp.mp4", fps=12)


@pytest.mark.parametrize(("codec", "options"), [("mpeg4", {"bf": "2"}), ("libx264", {"bf": "3", "g": "8"})])
def test_an_avi_with_b_frames_shows_every_frame_at_its_time(codec, options, tmp_path):
    """AVI does not store presentation times, and the decoder's estimates are wrong by several frames."""
    path, clip = tmp_path / "a.avi", ramp()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options=options)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert numbers(video_files.read_video(path), clip) == list(range(12))
    assert numbers(video_files.read_video(path, start=0.75, frames=3), clip) == [9, 10, 11]
    assert numbers(np.stack(list(video_files.each_frame(path, first=5))), clip) == list(range(5, 12))


def test_an_mp4_has_the_frames_and_the_rate_it_was_written_with(video):
    assert video_files.video_info(video) == video_files.VideoInfo(12, 12.0)
    frames = video_files.read_video(video)
    assert frames.shape == (12, 32, 48, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - ramp()).max() <= 6


def test_colours_are_neither_darker_nor_brighter_after_a_file(tmp_path):
    """Random colours, one a square: the mean error of a channel is far below a level, scaled down or not."""
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = video_files.save_video(colours.repeat(16, 0).repeat(16, 1)[None].repeat(2, 0), tmp_path / "a.mp4", fps=8)
    for step, frame in (
        (16, video_files.read_clip(path)[0][0]),
        (8, next(video_files.each_frame(path, shorter_side=128))),
    ):
        error = frame[step // 2 :: step, step // 2 :: step].astype(int) - colours
        assert np.abs(error.mean((0, 1))).max() < 0.4 and np.abs(error).mean() < 1.0, error.mean((0, 1))


def test_shapes_survive_compression(tmp_path):
    clip = moving_shapes.clip("train", 1, height=64, width=96).pixels
    frames = video_files.read_video(video_files.save_video(clip, tmp_path / "a.mp4", fps=7.5))
    assert np.abs(frames.astype(int) - clip).mean() < 4
    assert video_files.video_info(tmp_path / "a.mp4").fps == pytest.approx(7.5)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"frames": 3}, [0, 1, 2]),
        ({"frames": 3, "fps": 4}, [0, 3, 6]),
        ({"frames": 2, "fps": 6, "start": 0.5}, [6, 8]),
        ({"frames": 4, "fps": 24, "start": 0.25}, [3, 3, 4, 4]),
        ({"fps": 3}, [0, 4, 8]),
        ({"start": 10 / 12}, [10, 11]),
        ({"frames": 1, "start": 11 / 12}, [11]),
    ],
)
def test_reading_by_time(video, arguments, expected):
    assert numbers(video_files.read_video(video, **arguments), ramp()) == expected


def test_frames_read_one_by_one_equal_those_read_by_time(tmp_path):
    path = video_files.save_video(np.tile(ramp(), (22, 1, 1, 1)), tmp_path / "long.mp4", fps=30)  # two key frames
    for first in (0, 240, 249, 250, 260):
        part = np.stack(list(itertools.islice(video_files.each_frame(path, first=first), 5)))
        np.testing.assert_array_equal(part, video_files.read_video(path, frames=min(5, 264 - first), start=first / 30))
    assert list(video_files.each_frame(path, first=264)) == []
    small = next(video_files.each_frame(path, shorter_side=8))
    assert small.shape == (8, 12, 3) and video_files.shown_size(path) == (32, 48)
    assert next(video_files.each_frame(path, shorter_side=64)).shape == (32, 48, 3)  # never enlarged


def test_frames_of_a_variable_rate_keep_their_durations(tmp_path):
    """Ten frames in 1.2 seconds, the fourth of 0.4 seconds: at the mean rate it is repeated."""
    times = np.array([0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1])
    path = videos.encode(tmp_path / "a.mkv", ramp(10), 10, times=times)
    rate = video_files.video_info(path).fps
    due = np.searchsorted(times, np.arange(round(1.1 * rate)) / rate + 0.5 / rate, side="right") - 1
    got = numbers(np.stack(list(video_files.each_frame(path))), ramp(10))
    assert got[: len(due)] == due.tolist() and got.count(3) > 2 and sorted(got) == got
    for first in (0, 5):
        part = np.stack(list(video_files.each_frame(path, first=first)))
        assert numbers(part, ramp(10)) == got[first:]


def test_a_seek_into_a_long_video_is_exact(tmp_path):
    long = video_files.save_video(np.tile(ramp(), (40, 1, 1, 1)), tmp_path / "long.mp4", fps=30)
    whole = video_files.read_video(long)
    for first in (0, 249, 250, 333, 470):
        part = video_files.read_video(long, frames=5, start=first / 30)
        np.testing.assert_array_equal(part, whole[first : first + 5])


def test_a_clip_with_rotation_in_its_header_is_read_upright(tmp_path):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 200  # the left half, which becomes the upper one
    path = video_files.save_video(frames, tmp_path / "a.mp4", fps=8)
    (tmp_path / "turned.mp4").write_bytes(videos.turned(path.read_bytes()))
    for turned in (video_files.read_video(tmp_path / "turned.mp4"), video_files.read_clip(tmp_path / "turned.mp4")[0]):
        assert turned.shape == (3, 48, 32, 3)
        assert turned[:, :20].min() > 180 and turned[:, 28:].max() < 20


def test_files_that_are_too_short_or_not_videos_are_refused(video, tmp_path):
    with pytest.raises(UserError, match="too short for 20 frames at 12 fps"):
        video_files.read_video(video, frames=20)
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "text.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(UserError, match="cannot read the video"):
            video_files.read_video(path)


def test_a_truncated_file_is_refused(video, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-200])
    with pytest.raises(UserError):
        video_files.read_video(tmp_path / "cut.mp4")


def test_npz_and_png_are_exact_and_a_gif_keeps_frames_and_duration(tmp_path):
    clip = moving_shapes.clip("train", 2, frames=9).pixels
    with np.load(video_files.save_as(clip, tmp_path / "v", "npz", fps=8)) as arrays:
        np.testing.assert_array_equal(arrays["video"], clip)
        assert arrays["fps"] == 8
    folder = video_files.save_as(clip, tmp_path / "v", "png", fps=8)
    np.testing.assert_array_equal([pixels_of(path) for path in sorted(folder.iterdir())], clip)
    video_files.save_as(clip[:4], tmp_path / "v", "png", fps=8)
    assert len(list(folder.iterdir())) == 4  # frames of the longer clip are removed
    image = video_files.save_as(clip[:1], tmp_path / "image", "png", fps=8)
    np.testing.assert_array_equal(pixels_of(image), clip[0])
    with Image.open(video_files.save_as(clip, tmp_path / "v", "gif", fps=8)) as gif:
        assert gif.n_frames == 9
        durations = []
        for i in range(9):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert abs(sum(durations) - 9 * 125) <= 10


def test_dots_in_a_name_are_kept(tmp_path):
    assert video_files.save_as(ramp(), tmp_path / "v1.5-x", "npz", fps=8).name == "v1.5-x.npz"


@pytest.mark.parametrize(
    "frames, format, fps, message",
    [
        (ramp(height=31), "mp4", 8, "even sides; given 12 of 31x48"),
        (ramp(), "mp4", 0, "fps must be above 0"),
        (ramp(), "mp5", 8, "did you mean 'mp4'"),
    ],
)
def test_clips_that_a_format_cannot_hold_are_refused(tmp_path, frames, format, fps, message):
    with pytest.raises(UserError, match=message):
        video_files.save_as(frames, tmp_path / "v", format, fps=fps)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_existing_file(video, tmp_path, monkeypatch):
    path = tmp_path / "v.npz"
    path.write_text("before")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(video_files.np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        video_files.save_as(ramp(), tmp_path / "v", "npz", fps=8)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a folder above it is a file"):
        video_files.save_video(ramp(), tmp_path / "file" / "v.mp4", fps=8)


def test_a_contact_sheet_has_one_row_per_video(tmp_path):
    videos = [moving_shapes.clip("train", i).pixels for i in range(3)]
    captions = [
        "first",
        "second, with a caption that is so long that it needs several lines " * 4,
        "ünïcödé 😀",
    ]
    heights = []
    for n in (1, 2, 3):
        with Image.open(contact_sheet(videos[:n], captions[:n], tmp_path / f"{n}.png")) as sheet:
            heights.append(sheet.height)
    assert heights[1] - heights[0] > heights[2] - heights[1] >= heights[0] - 10
    with Image.open(tmp_path / "1.png") as image:
        sheet = np.asarray(image)
    first, last = videos[0][0].repeat(2, 0).repeat(2, 1), videos[0][-1].repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(sheet[-136:-8, 4:132], first)
    np.testing.assert_array_equal(sheet[-136:-8, -132:-4], last)
    with pytest.raises(UserError, match="one caption per video; given 3 videos and 2 captions"):
        contact_sheet(videos, captions[:2], tmp_path / "sheet.png")


def test_encoding_the_same_frames_always_gives_the_same_bytes(tmp_path):
    """x264's code for AVX-512 reads uninitialised memory; the encoder disables it."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (25, 45, 3), np.uint8).repeat(5, 0).repeat(5, 1)
    frames = [picture[i : i + 96, 2 * i : 2 * i + 160] for i in range(24)]
    result = set()
    for _ in range(20):
        junk = [np.full(rng.integers(100, 200_000), rng.integers(256), np.uint8) for _ in range(30)]
        del junk
        video_files.encode(frames, tmp_path / "clip.mp4", height=96, width=160, fps=24, options={"crf": "18"})
        video_files.read_clip(tmp_path / "clip.mp4")
        result.add((tmp_path / "clip.mp4").read_bytes())
    assert len(result) == 1
