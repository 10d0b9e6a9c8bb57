"""Videos of the compared systems: their prompts, copies that do not reveal the system, and damaged copies."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from einops import reduce, repeat
from jaxtyping import UInt8

from lavie_jax.data.records import one_line
from lavie_jax.data.video_files import opened, read_clip, save_video, video_info
from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json, read_text

ENDINGS = (".mp4", ".m4v", ".webm")
CODECS = ("h264", "vp8", "vp9", "av1")  # which current browsers play
PIXELS = ("yuv420p", "yuvj420p", "yuva420p")

Key = tuple[str, int]  # a prompt, and the index of the sample among those of this prompt


def find(folder: Path, system: str) -> dict[Key, Path]:
    """Returns the videos of a system: samples of `sample.py`, or files of any tool.

    The prompt is `request.prompt` in `clip.json`, else the text in `clip.txt`, else the file's name without a final
    number (`a red circle-0.mp4`, VBench's names).

    Raises:
        UserError: the folder is missing or has no videos.
    """
    if not folder.is_dir():
        raise UserError(f"--system {system}: {os.fspath(folder)!r} is not a folder")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    if not paths:
        raise UserError(f"--system {system}: {os.fspath(folder)!r} has no videos; allowed are {', '.join(ENDINGS)}")
    found, counts = {}, Counter()
    for path in sorted(paths):
        prompt = _prompt(path)
        found[prompt, counts[prompt]] = path
        counts[prompt] += 1
    return found


def _prompt(path: Path) -> str:
    sidecar, text = path.with_suffix(".json"), path.with_suffix(".txt")
    if sidecar.exists():
        request = read_json(sidecar).get("request")
        if isinstance(request, dict) and isinstance(request.get("prompt"), str):
            return one_line(request["prompt"])
    if text.exists():
        try:
            return one_line(read_text(text))
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8: {error}") from error
    return one_line(re.sub(r"-\d+$", "", path.stem))


def copy(source: Path, folder: Path, name: str) -> Path:
    """Copies the pictures of a video, without its sound and metadata, to `folder/name` with a fitting ending.

    The packets are copied as they are, so that every frame stays the same.

    Raises:
        UserError: it cannot be read, has fewer than two frames, or is in a format that browsers do not play.
    """
    import av  # PyAV is needed only to read or write video files

    with opened(source) as (container, stream):
        codec, pixels = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt
        if codec not in CODECS or pixels not in PIXELS:
            raise UserError(
                f"the video {os.fspath(source)!r} is {codec} {pixels}, which browsers do not play: convert the videos "
                "of all systems alike, e.g. ffmpeg -i clip.mp4 -c:v libx264 -crf 12 -pix_fmt yuv420p converted.mp4"
            )
        path = folder / f"{name}{'.mp4' if codec in ('h264', 'av1') else '.webm'}"
        options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
        with av.open(os.fspath(path), "w", options=options) as output:
            copied = output.add_stream_from_template(stream)
            copied.metadata.clear()
            for packet in container.demux(stream):
                if packet.dts is not None:  # the last one is empty
                    packet.stream = copied
                    output.mux(packet)
    frames = video_info(source).frames
    if frames < 2:
        raise UserError(f"the video {os.fspath(source)!r} has {frames} frame; a study needs at least 2")
    if video_info(path).frames != frames:
        raise UserError(f"the video {os.fspath(source)!r} is damaged: its copy has another number of frames")
    return path


BLOCKS = 24  # of a damaged frame's shorter side
JUMP = 0.15  # of a frame's side


def write_damaged(source: Path, path: Path, seed: int) -> None:
    """Writes a damaged copy of a video, which nobody who looks prefers: coarse, noisy frames that jump about."""
    frames, fps = read_clip(source)
    save_video(damaged(frames, seed), path, fps=fps)


def damaged(frames: UInt8[np.ndarray, "t h w 3"], seed: int) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """Returns frames of large blocks with noise, each shifted at random. Odd sides lose a row or column."""
    rng = np.random.default_rng(seed)
    height, width = (side - side % 2 for side in frames.shape[1:3])
    size = max(1, min(height, width) // BLOCKS)
    rows, columns = -(-height // size), -(-width // size)
    result = np.empty((len(frames), height, width, 3), np.uint8)
    for i, frame in enumerate(frames[:, :height, :width]):
        shift = [round(rng.uniform(-JUMP, JUMP) * side) for side in (height, width)]
        moved = np.roll(frame, shift, axis=(0, 1))
        padded = np.pad(moved, ((0, rows * size - height), (0, columns * size - width), (0, 0)), mode="edge")
        means = reduce(padded.astype(np.float32), "(r y) (c x) d -> r c d", "mean", y=size, x=size)
        noisy = np.clip(means + rng.normal(0, 40, means.shape), 0, 255).astype(np.uint8)
        result[i] = repeat(noisy, "r c d -> (r y) (c x) d", y=size, x=size)[:height, :width]
    return result
