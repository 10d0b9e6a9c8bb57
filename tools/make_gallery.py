"""Makes docs/gallery.md: clips of the included models, with the command that made each.

    python -m tools.make_gallery

Samples every clip with sample.py, into a temporary folder, and writes docs/images/gallery-*.gif. `page` is the text,
which tests/test_docs.py compares with the committed file.
"""

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import sample
from lavie_jax.data.video_files import read_clip

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
SIDE = 128  # pixels on the page of clips that are smaller
MOST_FRAMES = 16  # of a GIF; longer clips are thinned out, at the same speed

ABOUT = """# Gallery

Clips of the included models, which draw Moving Shapes, each with the command that made it. No seed was selected by its
result. `python -m tools.make_gallery` regenerates this page. Its clips are GIFs of at most 16 frames, thinned out from
longer clips, and clips of 64 pixels are shown at twice their size.
"""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of the gallery: the name of its file, what it shows, the options of sample.py, whether it is large."""

    name: str
    title: str
    options: tuple[str, ...]
    large: bool = False


CLIPS = (
    Clip("base", "Text to video", ("--prompt", "a small red circle moving left over a blue background")),
    Clip(
        "seed",
        "The same prompt with another seed",
        ("--prompt", "a small red circle moving left over a blue background", "--seed", "1"),
    ),
    Clip(
        "cascade",
        "All three stages: 61 frames of 256x256",
        ("--prompt", "a large yellow ring moving right", "--stages", "base,interpolation,vsr"),
        large=True,
    ),
    Clip(
        "long",
        "A long video with two prompts",
        (
            "--stages",
            "base,prediction",
            "--segments",
            "2",
            "--prompt",
            "a red square moving left | a red square moving right",
        ),
    ),
    Clip("fast", "A preset that saves work", ("--preset", "fast", "--prompt", "a blue cross moving down")),
)


def page() -> str:
    """Returns the text of docs/gallery.md."""
    parts = [ABOUT]
    for clip in CLIPS:
        command = " ".join(["python sample.py", *map(shlex.quote, clip.options)])
        size = "" if clip.large else f' width="{SIDE}"'
        image = f'<img src="images/gallery-{clip.name}.gif" alt="{clip.title}"{size}>'
        parts.append(f"## {clip.title}\n\n{image}\n\n    {command}\n")
    return "\n".join(parts)


def write_gif(frames: np.ndarray, fps: float, path: Path) -> None:
    """Writes frames as a GIF of at most MOST_FRAMES frames."""
    step = -(-len(frames) // MOST_FRAMES)
    pages = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames[::step]]
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=round(1000 * step / fps), loop=0, optimize=True
    )


def make(options: Sequence[str], folder: Path) -> tuple[np.ndarray, float]:
    """Samples with sample.py and returns the frames and their rate."""
    if sample.main([*options, "--format=npz", "--no-contact-sheet", f"--out={folder}"]):
        sys.exit("sample.py failed")
    (path,) = folder.glob("*.npz")
    return read_clip(path, max_bytes=2**31, warn=print)


def main() -> None:
    """Samples all clips, and writes the page with its pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        for clip in CLIPS:
            frames, fps = make(clip.options, Path(scratch) / clip.name)
            target = PAGE.parent / "images" / f"gallery-{clip.name}.gif"
            write_gif(frames, fps, target)
            print(f"{target}: {len(frames)} frames, {target.stat().st_size / 1000:.0f} kB")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
