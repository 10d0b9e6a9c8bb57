"""Video files of many kinds are read as players show them: length, seeking, shape, colours, frame times."""

import io
import itertools
from fractions import Fraction

import av
import numpy as np
import pytest

from lavie_jax.data import video_files
from lavie_jax.data.decoding import ClipWindow, info_of, numbered_frames, opened
from lavie_jax.data.display import UnusableVideo
from lavie_jax.errors import UserError
from tests import videos


def moving(count, height=64, width=96):
    """Returns frames with a moving dark bar and rising brightness, all of which differ."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        frames[i] = 40 + 1.6 * i  # without jumps, at which encoders insert key frames
        left = (5 * i) % (width - 12)
        frames[i, :, left : left + 12] = (200, 20, (i * 11) % 255)
    return frames


def write(frames, format="mp4", codec="libx264", *, rate=25, pix="yuv420p", options=None, muxer=None, **settings):
    """Returns the bytes of a video. `settings`: aspect, matrix, range, transfer, times, sound (seconds)."""
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix
        context = stream.codec_context
        if "aspect" in settings:
            context.sample_aspect_ratio = settings["aspect"]
        context.colorspace, context.color_range = settings.get("matrix", 2), settings.get("range", 0)
        context.color_trc = settings.get("transfer", 2)
        if "times" in settings:
            context.time_base = Fraction(1, 1000)
        sound = (
            container.add_stream("aac" if format == "mov" else "libopus", rate=48000, layout="mono")
            if "sound" in settings
            else None
        )
        for i, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            colours = {"dst_colorspace": settings.get("matrix", 5), "dst_color_range": settings.get("range", 1)}
            if not pix.startswith(("rgb", "bgr", "gbr")):
                rgb = rgb.reformat(format=pix, **colours)
            frame = rgb.reformat(format=pix)
            if "times" in settings:
                frame.pts, frame.time_base = round(1000 * settings["times"][i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            tone = np.zeros((1, 48000), np.float32)
            for i in range(settings["sound"]):
                samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 48000, i * 48000
                container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return file.getvalue()


def trimmed(content, first, last, fps=25):
    """Returns an mp4 whose edit list shows only frames `first` to `last` - 1."""
    place = content.index(b"elst") + 4
    timescale = int.from_bytes(content[(at := content.index(b"mdhd") + 16) : at + 4], "big")
    movie = int.from_bytes(content[(at := content.index(b"mvhd") + 16) : at + 4], "big")
    assert content[place] == 0 and content.count(b"elst") == 1
    old = int.from_bytes(content[place + 12 : place + 16], "big")
    duration, media = round((last - first) / fps * movie), old + round(first / fps * timescale)
    return content[: place + 8] + duration.to_bytes(4, "big") + media.to_bytes(4, "big") + content[place + 16 :]


def indices(frames, of):
    """Returns the index in `of` of each frame."""
    small, whole = (x[:, ::8, ::4].astype(int).reshape(len(x), -1) for x in (frames, of))
    return [int(np.abs(whole - row).mean(1).argmin()) for row in small]


# ---- length and rate ----


@pytest.mark.parametrize(("first", "last"), [(0, 30), (33, 60), (50, 120)])
def test_an_edit_list_decides_what_is_shown(first, last):
    clip = moving(120)
    content = trimmed(write(clip, options={"g": "25", "bf": "2", "crf": "10"}), first, last)
    info = video_files.video_info(content)
    assert info == video_files.VideoInfo(last - first, 25.0)
    window = ClipWindow(frames=4)
    assert indices(video_files.read_window(content, window, place=0.0), clip) == list(range(first, first + 4))
    assert indices(video_files.read_window(content, window, place=1.0), clip) == list(range(last - 4, last))
    assert ClipWindow(frames=last - first + 1).room(info) < 0


@pytest.mark.parametrize("format", ["matroska", "webm", "mp4", "mov"])
def test_sound_longer_than_the_video_adds_no_frames(format):
    codec = "libvpx" if format == "webm" else "libx264"
    content = write(moving(20), format, codec, sound=3)
    assert video_files.video_info(content) == video_files.VideoInfo(20, 25.0)


@pytest.mark.parametrize("frames", [2, 6, 30])
@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mpegts"])
@pytest.mark.parametrize("fps", [7.5, 25, 29.97, 240])
def test_length_and_rate_are_read_for_any_format(format, fps, frames, tmp_path):
    if format == "mpegts" and frames == 2:
        pytest.skip("FFmpeg does not seek in so short transport streams")
    path, lines = tmp_path / "a.mp4", []
    path.write_bytes(write(moving(frames), format, rate=Fraction(30000, 1001) if fps == 29.97 else Fraction(fps)))
    info = video_files.video_info(path)
    assert info.frames == frames and info.fps == pytest.approx(fps, rel=1e-3)
    clip, rate = video_files.read_clip(path, warn=lines.append)
    assert len(clip) == frames and rate == pytest.approx(fps, rel=1e-3) and not lines


def test_a_gif_has_the_rate_it_was_written_with(tmp_path):
    """GIF stores durations in hundredths of a second, here alternately 12 and 13."""
    path = video_files.save_as(moving(24), tmp_path / "a", "gif", fps=8)
    assert video_files.video_info(path) == video_files.VideoInfo(24, 8.0)
    frames, rate = video_files.read_clip(path)
    assert len(frames) == 24 and rate == 8


@pytest.mark.parametrize("sound", [0, 2])
def test_a_browser_recording_without_a_rate_gets_that_of_its_frames(sound):
    times = np.arange(40) / 30 + np.random.default_rng(0).integers(-3, 4, 40) / 1000
    times[0] = 0
    more = {"sound": sound} if sound else {}
    content = write(moving(40), "webm", "libvpx", rate=1000, times=times, muxer={"live": "1"}, **more)
    info = video_files.video_info(content)
    assert info.frames == 40 and info.fps == pytest.approx(30, rel=0.01)


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_a_truncated_file_has_the_length_of_the_remaining_frames(format, tmp_path):
    muxer = {"movflags": "faststart"} if format == "mp4" else {}
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", format=format, options=muxer) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for pixels in moving(100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    content = content[: len(content) * 2 // 3]
    info = video_files.video_info(content)
    assert 40 < info.frames < 80 and info.fps == 25
    assert len(video_files.read_window(content, ClipWindow(frames=4), place=1.0)) == 4


def test_a_stream_that_starts_between_key_frames_starts_at_the_first(tmp_path):
    clip = moving(60)
    file = io.BytesIO()
    with av.open(io.BytesIO(write(clip, "matroska", options={"g": "20", "bf": "0", "sc_threshold": "0"}))) as source:
        with av.open(file, "w", format="matroska") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in itertools.islice(source.demux(video=0), 7, 60):
                packet.stream = stream
                target.mux(packet)
    info = video_files.video_info(file.getvalue())
    assert info.frames == 40
    assert indices(video_files.read_window(file.getvalue(), ClipWindow(frames=3), place=0.0), clip) == [20, 21, 22]


def test_a_cover_picture_is_not_the_video():
    clip, file = moving(10), io.BytesIO()
    cover = write(moving(1, 32, 32), "mjpeg", "mjpeg", pix="yuvj420p")
    with av.open(io.BytesIO(write(clip))) as source, av.open(file, "w", format="mp4") as target:
        art = target.add_stream("mjpeg", rate=1)
        art.height, art.width, art.pix_fmt = 32, 32, "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        stream = target.add_stream_from_template(source.streams.video[0])
        packet = av.Packet(cover)
        packet.pts = packet.dts = 0
        packet.stream = art
        target.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert video_files.shown_size(file.getvalue()) == (64, 96)
    assert video_files.video_info(file.getvalue()).frames == 10


# ---- seeking ----

CODECS = {
    "hevc open gop": ("mp4", "libx265", {"x265-params": "open-gop=1:keyint=25:bframes=4:log-level=none"}),
    "hevc open gop mkv": ("matroska", "libx265", {"x265-params": "open-gop=1:keyint=25:bframes=4:log-level=none"}),
    "h264 open gop": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=25:min-keyint=10:bframes=4:b-adapt=0"}),
    "h264 open gop mkv": ("matroska", "libx264", {"x264-params": "open-gop=1:keyint=25:bframes=4:b-adapt=0"}),
    "h264 intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "h264": ("mov", "libx264", {"g": "30", "bf": "3"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
    "vp8": ("webm", "libvpx", {"g": "30", "deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1": ("mp4", "libsvtav1", {"g": "30", "preset": "12"}),
    "mpeg4": ("mp4", "mpeg4", {"g": "20", "bf": "2", "b": "2M"}),
    "mpeg4 avi": ("avi", "mpeg4", {"g": "20", "bf": "2", "b": "2M"}),
    "mpeg2": ("matroska", "mpeg2video", {"g": "15", "bf": "2", "b": "2M"}),
    "mpeg2 ps": ("mpeg", "mpeg2video", {"g": "15", "bf": "2", "b": "2M"}),
    "h264 ts": ("mpegts", "libx264", {"x264-params": "open-gop=1:keyint=25:bframes=4:b-adapt=0"}),
    "flv": ("flv", "libx264", {"g": "20", "bf": "2"}),
    "wmv": ("asf", "wmv2", {"g": "20", "b": "2M"}),
    "mxf": ("mxf", "mpeg2video", {"g": "15", "bf": "2", "b": "2M"}),
    "3gp": ("3gp", "mpeg4", {"g": "15", "b": "2M"}),
    "gif": ("gif", "gif", {}),
    "mpeg1": ("mpeg", "mpeg1video", {"g": "15", "bf": "2", "b": "2M"}),
    "ffv1": ("avi", "ffv1", {}),
    "fragmented": ("mp4", "libx264", {"g": "20", "bf": "2"}),
}


# 7 has no factor in common with the distances between key frames.
@pytest.mark.parametrize("starts", [range(1, 100, 7), pytest.param(range(100), marks=pytest.mark.heavy)], ids=len)
@pytest.mark.parametrize("name", CODECS)
def test_seeking_to_any_frame_equals_decoding_in_order(name, starts):
    format, codec, options = CODECS[name]
    clip = moving(100)
    muxer = {"movflags": "frag_keyframe+empty_moov"} if name == "fragmented" else {}
    content = write(clip, format, codec, options=options, muxer=muxer, pix="bgr8" if name == "gif" else "yuv420p")
    with av.open(io.BytesIO(content)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(whole) == 100
    info = video_files.video_info(content)
    assert info == video_files.VideoInfo(100, 25.0)
    wrong = []
    with opened(content) as (container, stream):
        info = info_of(container, stream, name)
        for start in starts:
            frames = numbered_frames(container, stream, info, first=start, what=name)
            frame = next(frame for number, frame in frames if number >= start)
            if not np.array_equal(frame.to_ndarray(format="rgb24"), whole[start]):
                wrong.append(start)
    assert not wrong


def test_windows_and_curated_clips_of_an_open_gop_are_exact(tmp_path):
    format, codec, options = CODECS["hevc open gop"]
    clip, path = moving(100), tmp_path / "a.mp4"
    path.write_bytes(write(clip, format, codec, options=options))
    whole = video_files.read_video(path)
    for start in range(0, 96, 3):
        part = video_files.read_video(path, start=start / 25, frames=4)
        np.testing.assert_array_equal(part, whole[start : start + 4])
        part = np.stack(list(itertools.islice(video_files.each_frame(path, first=start), 4)))
        np.testing.assert_array_equal(part, whole[start : start + 4])


def test_a_record_that_fails_at_many_times_is_counted_once(tmp_path, caplog, monkeypatch):
    """Its messages differ, since they contain the random start."""
    from lavie_jax.data import pipeline, shards, sources
    from lavie_jax.data.config import DataConfig

    read, messages = video_files.read_window, set()

    def read_window(content, window, *, place, name):
        if content[-1:] == b"!":
            messages.add(text := f"{name} has no frame at {place}")
            raise UserError(text)
        return read(content, window, place=place, name=name)

    monkeypatch.setattr(sources.video_files, "read_window", read_window)
    good = write(moving(40))
    rows = [{"video": good + b"!" * (i > 5), "caption": f"clip {i}"} for i in range(8)]
    shards.write_shards(rows, tmp_path)
    config = DataConfig(source="array_record", path=str(tmp_path), frames=4, height=16, width=16, max_unreadable=2)
    stream = pipeline.batches(pipeline.open_examples(config, batch_size=4), None)
    for _ in range(20):
        next(stream)
    stream.close()
    assert len(messages) > 4
    assert "skipped record 2: " in caplog.text and "skipped record 3: " not in caplog.text


def test_a_sidecar_nested_too_deep_is_skipped():
    import json

    from lavie_jax.data.records import Record
    from lavie_jax.data.sources import Item, first_readable

    class Deep(list):
        def __getitem__(self, index):
            return json.loads("[" * 100_000) if index else super().__getitem__(index)

    records = Deep([Record("good", "a clip", b"")] * 2)
    for index in range(2):
        item = first_readable(records, index, lambda record: Item(np.zeros(0), record.caption), kind="video", seed=0)
        assert item.caption == "a clip"


# ---- shape and colours ----


def circle(aspect, size=96, frames=4):
    """Returns a disc as stored with pixels of this aspect ratio: narrower by that factor."""
    width = round(size / aspect)
    y, x = np.mgrid[:size, :width]
    inside = ((x + 0.5) * aspect - size / 2) ** 2 + (y + 0.5 - size / 2) ** 2 < (size / 3) ** 2
    return np.repeat(np.where(inside[..., None], 230, 30).astype(np.uint8).repeat(3, -1)[None], frames, 0)


def width_over_height(frames):
    bright = frames[0].mean(-1) > 128
    return bright.any(0).sum() / bright.any(1).sum()


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(4, 3), Fraction(3, 4), Fraction(1, 2)])
@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_a_circle_stays_a_circle_where_pixels_are_not_square(aspect, format, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(write(circle(aspect), format, aspect=aspect))
    assert video_files.shown_size(path) == (96, 96)
    small = next(video_files.each_frame(path, shorter_side=48))
    assert small.shape == (48, 48, 3) and abs(width_over_height(small[None]) - 1) < 0.05
    for frames in (
        video_files.read_window(path, ClipWindow(frames=2), place=0.0), video_files.read_clip(path)[0],
        video_files.read_video(path), np.stack(list(video_files.each_frame(path))),
    ):  # fmt: skip
        assert frames.shape[1:] == (96, 96, 3) and abs(width_over_height(frames) - 1) < 0.05


def test_curated_clips_have_square_pixels(tmp_path):
    from lavie_jax.curation.filters import Thresholds
    from lavie_jax.curation.inputs import find_videos
    from lavie_jax.curation.video import Part, curate_part, read_result

    clip = videos.pan(1, 24, height=96, width=96)
    (tmp_path / "a.mp4").write_bytes(write(clip, aspect=Fraction(2)))
    (tmp_path / "a.txt").write_text("a land of many colours")
    (video,) = find_videos(tmp_path, None)
    thresholds = Thresholds(min_height=90)
    curate_part(Part(video), tmp_path / "work", thresholds, captioner=None, scorer=None)
    (segment,) = read_result(video, tmp_path / "work")
    assert (segment.reason, segment.height, segment.width) == ("", 96, 192)


@pytest.mark.parametrize("reason", ["HDR", "interlaced"])
def test_curation_counts_unusable_videos_by_reason(reason, tmp_path):
    from lavie_jax.curation.filters import Thresholds
    from lavie_jax.curation.inputs import find_videos
    from lavie_jax.curation.video import REASONS, Part, curate_part, read_result

    clip = videos.pan(1, 24, height=96, width=96)
    quiet = {"x265-params": "log-level=none"}
    made = {
        "HDR": lambda: write(clip, "mp4", "libx265", matrix=9, transfer=16, options=quiet),
        "interlaced": lambda: write(clip, "mp4", "mpeg4", options={"flags": "+ildct+ilme"}),
    }
    (tmp_path / "a.mp4").write_bytes(made[reason]())
    (tmp_path / "a.txt").write_text("a land of many colours")
    (video,) = find_videos(tmp_path, None)
    curate_part(Part(video), tmp_path / "work", Thresholds(min_height=90), captioner=None, scorer=None)
    (segment,) = read_result(video, tmp_path / "work")
    assert segment.reason == reason and reason in REASONS and "'a.mp4'" in segment.detail


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_rotated_and_mirrored_videos_are_read_upright(degrees, hflip):
    clip = np.zeros((3, 64, 96, 3), np.uint8)
    clip[:, :32, :48], clip[:, :32, 48:], clip[:, 32:, :48] = 240, 160, 80
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(degrees, hflip=hflip)
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    upright = np.rot90(clip[0], degrees // 90)
    upright = upright[:, ::-1] if hflip else upright
    shown = video_files.read_window(file.getvalue(), ClipWindow(frames=1), place=0.0)[0]
    assert video_files.shown_size(file.getvalue()) == shown.shape[:2] == upright.shape[:2]
    assert np.abs(shown.astype(int) - upright).mean() < 6


COLOUR = (200, 40, 60)


def coloured(height=64, width=96):
    return np.full((4, height, width, 3), COLOUR, np.uint8)


@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
@pytest.mark.parametrize("range", [1, 2])
@pytest.mark.parametrize("pix", ["yuv420p", "yuv420p10le", "yuv444p"])
def test_colours_are_those_of_the_declared_matrix_and_range(matrix, range, pix):
    content = write(coloured(), matrix=5 if matrix == 6 else matrix, range=range, pix=pix, options={"crf": "4"})
    shown = video_files.read_window(content, ClipWindow(frames=1), place=0.0)
    assert np.abs(shown.astype(int) - COLOUR).max() <= 3


@pytest.mark.parametrize(("height", "matrix"), [(480, 5), (720, 1)])
def test_untagged_videos_have_the_matrix_that_players_assume(height, matrix):
    content = write(coloured(height, 64), options={"crf": "4"})
    with av.open(io.BytesIO(content)) as container:
        planes = next(container.decode(video=0)).reformat(format="yuv420p").planes
        assert bytes(planes[0])[0] == 93  # BT.601
    shown = video_files.read_window(content, ClipWindow(frames=1), place=0.0)[0, 0, 0]
    right = np.abs(shown.astype(int) - COLOUR).max() <= 3
    assert right == (matrix == 5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (720, 1280)])
def test_written_videos_declare_their_colours(height, width, tmp_path):
    path = video_files.save_video(coloured(height, width), tmp_path / "a.mp4", fps=8)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
        y, u, v = (float(bytes(plane)[0]) for plane in frame.planes)
        y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
        red, blue = y + 1.5748 * v, y + 1.8556 * u  # BT.709
        player = 255 * np.array([red, (y - 0.2126 * red - 0.0722 * blue) / 0.7152, blue])
    assert np.abs(player - COLOUR).max() <= 2
    assert b"nclx" in path.read_bytes()
    shown = video_files.read_clip(path)[0]
    assert np.abs(shown.astype(int) - COLOUR).max() <= 2


@pytest.mark.parametrize(
    ("format", "codec", "pix"),
    [
        ("matroska", "ffv1", "gray"),
        ("matroska", "ffv1", "gray16le"),
        ("matroska", "ffv1", "bgr0"),
        ("mov", "png", "rgb24"),
        ("mov", "png", "rgb48be"),
        ("matroska", "libx264rgb", "rgb24"),
        ("mov", "qtrle", "rgb24"),
    ],
)
def test_grey_and_rgb_videos_keep_their_values(format, codec, pix):
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    clip = np.ascontiguousarray(np.broadcast_to(ramp[None, None, :, None], (3, 64, 96, 3)))
    content = write(
        clip, format, codec, pix=pix, range=2 if "gray" in pix else 0, options={"crf": "0"} if "264" in codec else {}
    )
    shown = video_files.read_window(content, ClipWindow(frames=2), place=0.0)
    assert np.abs(shown.astype(int) - ramp[:, None]).max() <= 2


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(transfer, name):
    content = write(coloured(), "mp4", "libx265", matrix=9, transfer=transfer, pix="yuv420p10le", range=1,
                    options={"x265-params": "log-level=none"})  # fmt: skip
    for read in (video_files.video_info, video_files.shown_size):
        with pytest.raises(UnusableVideo, match=rf"is HDR \({name}\)") as error:
            read(content)
        assert error.value.reason == "HDR"


@pytest.mark.parametrize(
    ("format", "codec", "options"),
    [
        ("mp4", "libx264", {"x264-params": "tff=1"}),
        ("mp4", "mpeg4", {"flags": "+ildct+ilme"}),
        ("matroska", "mpeg2video", {"flags": "+ildct+ilme"}),
        ("mov", "prores_ks", {"flags": "+ildct"}),
    ],
)
def test_interlaced_videos_are_refused_by_name(format, codec, options):
    content = write(
        moving(10), format, codec, options=options, pix="yuv422p10le" if codec == "prores_ks" else "yuv420p"
    )
    with pytest.raises(UnusableVideo, match="is interlaced") as error:
        video_files.read_window(content, ClipWindow(frames=2), place=0.0)
    assert error.value.reason == "interlaced"


def test_unusable_videos_are_left_out_with_a_reason(tmp_path, caplog):
    from lavie_jax.data.sources import open_records

    good = write(moving(10))
    interlaced = write(moving(10), options={"x264-params": "tff=1"})
    unflagged = write(moving(10), "mp4", "mpeg4", options={"flags": "+ildct+ilme"})
    hdr = write(moving(10), "mp4", "libx265", matrix=9, transfer=18, options={"x265-params": "log-level=none"})
    short = trimmed(write(moving(10), options={"bf": "2"}), 3, 6)
    files = {"good": good, "a": interlaced, "b": unflagged, "hdr": hdr, "short": short}
    for name, content in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text("a clip")
    window = ClipWindow(frames=4)
    found = open_records("video_folder", str(tmp_path), medium="video", split="train", window=window, val_fraction=0.0)
    assert [path.stem for path, _ in found.rows] == ["good"]
    assert "2 of 5 are interlaced" in caplog.text and "1 of 5 are HDR" in caplog.text
    assert "1 of 5 are shorter than 4 frames" in caplog.text


# ---- transparency and bit depth ----


def half_clear(count=3):
    """Returns frames that are red on the left, and fully transparent over green on the right."""
    clip = np.zeros((count, 64, 96, 4), np.uint8)
    clip[:, :, :48], clip[:, :, 48:] = (220, 30, 30, 255), (0, 255, 0, 0)
    return clip


@pytest.mark.parametrize(
    ("format", "codec", "pix"),
    [
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("matroska", "ffv1", "bgra"),
        ("webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_transparent_videos_are_shown_over_white(format, codec, pix, tmp_path):
    path = tmp_path / "a.mov"
    path.write_bytes(write(half_clear(), format, codec, pix=pix, options={"b": "4M"} if "vpx" in codec else {}))
    for shown in (video_files.read_clip(path)[0], video_files.read_window(path, ClipWindow(frames=2), place=0.5)):
        assert np.abs(shown[:, :, 60:].astype(int) - 255).max() <= 4
        assert np.abs(shown[:, :, 4:36].astype(int) - (220, 30, 30)).max() <= 12


def pictures():
    """Returns {name: (image, the pixels that viewers show)}."""
    from PIL import Image

    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    grey = np.round(ramp / 257).astype(np.uint8)[..., None].repeat(3, -1)
    clear = half_clear(1)[0]
    white = clear[..., :3].copy()
    white[:, 48:] = 255
    palette = Image.fromarray(clear[..., :3]).quantize(4)
    palette.info["transparency"] = palette.getpixel((95, 0))
    light = np.full((8, 8, 2), (100, 128), np.uint8)
    return {
        "16 bits": (Image.fromarray(ramp), grey),
        "alpha": (Image.fromarray(clear), white),
        "palette": (palette, white),
        "half": (Image.fromarray(light, "LA"), np.full((8, 8, 3), 177, np.uint8)),
        "plain": (Image.fromarray(white), white),
    }


@pytest.mark.parametrize("name", ["16 bits", "alpha", "palette", "half", "plain"])
def test_16_bit_and_transparent_images_are_read_as_viewers_show_them(name, tmp_path):
    from lavie_jax.data.records import Record
    from lavie_jax.data.sources import read_image

    picture, expected = pictures()[name]
    picture.save(tmp_path / "a.png", **picture.info)
    (shown,) = read_image(Record("a.png", "a picture", tmp_path / "a.png"))
    assert shown.dtype == np.uint8 and np.abs(shown.astype(int) - expected).max() <= 1


def test_the_colour_profile_of_an_image_is_applied(tmp_path):
    """The profile has gamma 1.0, in which 55 is a medium grey."""
    from PIL import Image, ImageCms

    from lavie_jax.data.display import picture_pixels

    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    curve = content.index(b"para") + 12  # g, a, b, c, d of (a x + b) ^ g, or c x below d
    straight = b"".join(round(65536 * x).to_bytes(4, "big") for x in (1, 1, 0, 1, 0))
    linear = content[:curve] + straight + content[curve + 20 :]
    for encoding in ("ascii", "utf-16-be"):  # the profile's name
        linear = linear.replace("sRGB".encode(encoding), "lRGB".encode(encoding))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(linear))
    picture = Image.fromarray(np.full((8, 8, 3), 55, np.uint8))
    picture.save(tmp_path / "a.png", icc_profile=linear)
    expected = np.asarray(ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB")))
    assert np.abs(expected.astype(int) - 55).max() > 20
    with Image.open(tmp_path / "a.png") as opened_picture:
        np.testing.assert_array_equal(picture_pixels(opened_picture), expected)
    picture.save(tmp_path / "b.png", icc_profile=b"not a profile")
    with Image.open(tmp_path / "b.png") as opened_picture:
        assert (picture_pixels(opened_picture) == 55).all()


# ---- clips for --input ----


def test_input_frames_are_those_on_screen_at_their_times(tmp_path):
    clip, lines = moving(30), []
    for name, steps in {"a": [0.02, 0.06, 0.04], "b": [1 / 30] * 9 + [4 / 30], "c": [0.1, 0.5]}.items():
        times = np.cumsum(np.resize(steps, 30)) - steps[0]
        path = tmp_path / f"{name}.mkv"
        path.write_bytes(write(clip, "matroska", times=times, rate=30))
        frames, rate = video_files.read_clip(path, warn=lines.append)
        moments = (np.arange(len(frames)) + 0.5) / rate
        moments = moments[moments < times[-1]]
        due = np.searchsorted(times, moments, side="right") - 1
        assert indices(frames[: len(due)], clip) == due.tolist()
        assert len(frames) / rate == pytest.approx(times[-1], rel=0.05)
        assert f"the frame times of {str(path)!r} vary" in lines[-1]


def test_gaps_of_dropped_frames_are_filled_by_repetition(tmp_path):
    clip, kept, lines = moving(60), np.delete(np.arange(60), [7, 23, 24, 41]), []
    path = tmp_path / "a.mp4"
    path.write_bytes(write(clip[kept], times=kept / 30, rate=30))
    frames, rate = video_files.read_clip(path, warn=lines.append)
    shown = np.array([max(kept[kept <= i]) for i in range(60)])
    assert rate == 30 and indices(frames, clip) == shown.tolist()
    assert "left out" not in lines[0]


def test_frames_lost_to_a_constant_rate_are_counted(tmp_path):
    steps = np.resize([0.04] * 6 + [0.003], 30)
    path, lines = tmp_path / "a.mkv", []
    path.write_bytes(write(moving(30), "matroska", times=np.cumsum(steps) - steps[0], rate=30))
    video_files.read_clip(path, warn=lines.append)
    assert "4 of its 30 frames are shown too briefly" in lines[0]


def test_clips_of_a_constant_rate_are_kept_without_warnings(tmp_path):
    clip, lines = moving(20), []
    for format, times in (("mp4", None), ("webm", np.round(np.arange(20) / 29.97, 3))):
        path = tmp_path / f"a.{format}"
        more = {} if times is None else {"times": times}
        path.write_bytes(write(clip, format, "libvpx" if format == "webm" else "libx264", **more))
        frames, rate = video_files.read_clip(path, warn=lines.append)
        assert len(frames) == 20 and rate == pytest.approx(25 if times is None else 29.97, rel=0.01)
    assert not lines


def test_lost_sound_is_reported(tmp_path):
    path, lines = tmp_path / "a.mp4", []
    path.write_bytes(write(moving(10), sound=1))
    assert len(video_files.read_clip(path, warn=lines.append)[0]) == 10
    assert lines == [f"the sound of {str(path)!r} is not kept"]


def test_the_command_warns_about_lost_sound(tmp_path, capsys):
    import sample

    path = tmp_path / "a.mp4"
    path.write_bytes(write(moving(10), sound=1))
    frames, clip, _ = sample.read_input(path)
    assert len(frames) == clip.frames == 10 and clip.fps == 25
    assert capsys.readouterr().err == f"warning: the sound of {str(path)!r} is not kept\n"


def test_an_array_too_large_for_memory_is_refused_before_it_is_read(tmp_path):
    path = video_files.save_as(moving(10), tmp_path / "a", "npz", fps=8)
    assert len(video_files.read_clip(path, max_bytes=10 * 64 * 96 * 3)[0]) == 10
    with pytest.raises(UserError, match="does not fit into memory: store fewer frames"):
        video_files.read_clip(path, max_bytes=10 * 64 * 96 * 3 - 1)
