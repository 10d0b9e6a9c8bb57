"""Contact sheets: pictures with frames of several videos."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.data.embedded import Metadata
from lavie_jax.data.video_files import save_png
from lavie_jax.errors import UserError


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "_t _h _w 3"]],
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int = 6,
    metadata: Metadata | None = None,
) -> Path:
    """Writes a PNG with a row for each video: its caption above up to `columns` of its frames, first to last.

    Line breaks in captions are kept, and long lines are wrapped.
    """
    if not videos or len(videos) != len(captions):
        given = f"{len(videos)} videos and {len(captions)} captions"
        raise UserError(f"a contact sheet needs one caption per video; given {given}")
    strips = []
    for video in videos:
        picks = np.unique(np.round(np.linspace(0, len(video) - 1, columns)).astype(int))
        frames = [Image.fromarray(video[i]) for i in picks]
        zoom = max(1, -(-96 // min(frames[0].size)))  # small frames are enlarged, with visible pixels
        strips.append([f.resize((f.width * zoom, f.height * zoom), Image.Resampling.NEAREST) for f in frames])
    gap, font = 4, ImageFont.load_default(size=14)
    width = max(sum(f.width + gap for f in strip) for strip in strips) + gap
    wrap_at = max(16, width // 8)
    texts = [
        [line for line_of_caption in caption.splitlines() for line in textwrap.wrap(line_of_caption, wrap_at)] or [""]
        for caption in captions
    ]
    heights = [20 * len(text) + strip[0].height + 2 * gap for text, strip in zip(texts, strips)]
    sheet = Image.new("RGB", (width, sum(heights) + gap), (250, 250, 250))
    draw, y = ImageDraw.Draw(sheet), gap
    for text, strip, height in zip(texts, strips, heights):
        for i, line in enumerate(text):
            draw.text((gap, y + 20 * i), line, fill=(20, 20, 20), font=font)
        x = gap
        for frame in strip:
            sheet.paste(frame, (x, y + 20 * len(text)))
            x += frame.width + gap
        y += height
    path = Path(path)
    save_png(sheet, path, metadata)
    return path
