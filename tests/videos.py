"""Real video files for tests: textures that move as under a panning camera, in many formats."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 96, 160


def pan(seed, frames=24, *, height=HEIGHT, width=WIDTH, speed=3):
    """Returns frames of a camera that pans over a landscape, uint8 (T, H, W, 3). Every seed has different colours."""
    rng = np.random.default_rng(seed)
    wide = width + speed * frames
    spots = rng.integers(0, 256, (max(2, height // 12), wide // 12, 3), np.uint8)
    tint = np.array([(seed * 71 + 40) % 200, (seed * 113 + 90) % 200, (seed * 29 + 150) % 200])
    land = np.asarray(Image.fromarray(spots).resize((wide, height), Image.Resampling.BICUBIC))
    land = (0.5 * land + 0.5 * tint).astype(np.uint8)
    return np.stack([land[:, speed * i : speed * i + width] for i in range(frames)])


def barred(frames, *, rows=16):
    """Adds black bars."""
    return np.pad(frames, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def lettered(frames, text="SAMPLE (C) 2023"):
    """Adds static text."""
    sheet = Image.new("L", (frames.shape[2], frames.shape[1]))
    ImageDraw.Draw(sheet).text((10, frames.shape[1] // 2), text, fill=255, font_size=16)
    mask = np.asarray(sheet)[..., None] / 255
    return (frames * (1 - mask) + 255 * mask).astype(np.uint8)


def encode(path, frames, rate=24, *, codec="libx264", times=None, sound=False, crf="14", options=None):
    """Writes frames at `times`, in seconds; by default one every 1 / `rate`. Odd sides are stored as 4:4:4."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options={"crf": crf} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        odd = stream.height % 2 or stream.width % 2
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"
        stream.thread_count = 1
        if codec != "libx264":
            stream.bit_rate = 2_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            tone = (0.1 * np.sin(np.arange(16000) / 8)).astype(np.float32)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def turned(content):
    """Returns the bytes of an mp4 with a clockwise rotation in its header; the frames are unchanged."""
    one, zero, last = (value.to_bytes(4, "big") for value in (0x10000, 0, 0x40000000))
    identity = one + zero * 3 + one + zero * 3 + last
    clockwise = zero + one + zero + (0xFFFF0000).to_bytes(4, "big") + zero * 4 + last
    header = content.index(b"tkhd")
    assert content.count(identity, header) == 1
    return content[:header] + content[header:].replace(identity, clockwise)


def write_wild(folder):
    """Writes a realistic folder. Returns {file name: (caption, reason for dropping it, or "" for kept files)}."""
    folder.mkdir(parents=True)
    expected = {}

    def add(name, content, reason="", caption=None):
        if isinstance(content, bytes):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        caption = f"the land of {name.partition('.')[0].replace('_', ' ')}" if caption is None else caption
        if caption:
            (folder / name).with_suffix(".txt").write_text(caption)
        expected[name] = (caption, reason)

    add("two_scenes.mp4", encode(folder / "two_scenes.mp4", np.concatenate([pan(1, 30), pan(2, 20)])))
    add("film_25.mov", encode(folder / "film_25.mov", pan(3), 25, sound=True))
    odd = pan(4, height=97, width=141)
    add("odd_ntsc.mp4", encode(folder / "odd_ntsc.mp4", odd, Fraction(30000, 1001)))
    times = np.cumsum(np.resize([0.02, 0.06, 0.04], 30))
    add("varying.mkv", encode(folder / "varying.mkv", pan(5, 30), times=times))
    upright = encode(folder / "turned.mp4", pan(6)).read_bytes()
    add("turned.mp4", turned(upright))
    add("web.webm", encode(folder / "web.webm", pan(7), 30, codec="libvpx"))
    add("old.avi", encode(folder / "old.avi", pan(8), 12, codec="mpeg4"))
    add("wide_bars.mp4", encode(folder / "wide_bars.mp4", barred(pan(9))))
    (folder / "deep").mkdir()
    add("deep/within.mp4", encode(folder / "deep/within.mp4", pan(10), 30))

    add("still.mp4", encode(folder / "still.mp4", np.repeat(pan(11, 1), 24, axis=0)), "static")
    add("night.mp4", encode(folder / "night.mp4", pan(12) // 12), "near-black")
    add("brief.mp4", encode(folder / "brief.mp4", pan(13, 15)), "too few frames")
    add("tiny.mp4", encode(folder / "tiny.mp4", pan(14, height=64)), "low resolution")
    again = np.stack([np.asarray(Image.fromarray(f).resize((240, 144))) for f in pan(3)])
    add("web_copy.mp4", encode(folder / "web_copy.mp4", again, 25, crf="26"), "near-duplicate")
    add("marked.mp4", encode(folder / "marked.mp4", lettered(pan(15))), "overlaid text")
    add("silent.mp4", encode(folder / "silent.mp4", pan(16)), "no caption", "")
    add("terse.mp4", encode(folder / "terse.mp4", pan(17)), "short caption", "a land")
    start = encode(folder / "cut.mp4", pan(18), options={"movflags": "faststart"}).read_bytes()
    add("cut.mp4", start[: len(start) * 2 // 3], "unreadable")
    end = encode(folder / "headless.mp4", pan(19)).read_bytes()
    add("headless.mp4", end[: len(end) // 2], "unreadable")
    add("empty.mp4", b"", "unreadable")
    add("words.mp4", b"not a video at all", "unreadable")
    png = io.BytesIO()
    Image.fromarray(pan(20, 1)[0]).save(png, "png")
    add("picture.mp4", png.getvalue(), "unreadable")
    jpeg = io.BytesIO()
    Image.fromarray(pan(20, 1)[0]).save(jpeg, "jpeg")
    add("photo.mp4", jpeg.getvalue(), "unreadable")
    return expected
