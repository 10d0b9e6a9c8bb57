"""Contact sheets: overviews of the samples of a run, with the stages of a cascade below each other."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from einops import repeat
from jaxtyping import UInt8

from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.samples.provenance import GENERATED

COLUMNS = 7
SIDE = 256  # maximum side of a frame in pixels: a sheet of large frames would fill the host's memory
DETAIL = 512  # maximum side of an upscaled frame, which is cropped to the middle instead of scaled down
EMPTY = 250  # the sheet's background, shown where a clip has no frame


class ContactSheets:
    """Writes `OUT/{stem}.png`, with a row for each sample or each of its stages, and a new page after `ROWS` rows."""

    ROWS = 24

    def __init__(self, folder: Path, stem: str = "contact-sheet"):
        self.folder, self.stem, self.count, self.rows = folder, stem, 0, []

    @property
    def first(self) -> Path:
        """The first page."""
        return self.folder / f"{self.stem}.png"

    def add(self, clips: Mapping[str, UInt8[np.ndarray, "_t _h _w 3"]], prompt: str) -> None:
        """Adds a sample: {name: frames} of its clips, from the input clip to the last stage's output.

        A single clip becomes a row under its prompt, several become a row each, at the same moments (`compared`).
        """
        if len(clips) > 1:
            first, *others = compared(clips)
            self.rows += [(first[0], f"{prompt}\n{first[1]}"), *others]
        else:
            (frames,) = clips.values()
            self.rows.append((thinned(frames[evenly(len(frames), COLUMNS)]), prompt))
        if len(self.rows) >= self.ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rows."""
        if self.rows:
            self.count += 1
            path = self.first if self.count == 1 else self.folder / f"{self.stem}-{self.count}.png"
            videos, captions = zip(*self.rows)
            contact_sheet(videos, captions, path, columns=COLUMNS, metadata=GENERATED)
            self.rows = []


def compared(clips: Mapping[str, UInt8[np.ndarray, "_t _h _w 3"]]) -> list[tuple[np.ndarray, str]]:
    """Returns (frames, caption) of each clip, at the same moments and enlarged by whole factors to the largest size.

    The sides of the clips are multiples of the smallest's. A row is empty at moments without a frame of its clip.
    """
    times = moments([len(clip) for clip in clips.values()])
    small, large = ([pick(sides) for sides in zip(*(c.shape[1:3] for c in clips.values()))] for pick in (min, max))
    most = large[0] // small[0]
    size = [min(side, DETAIL // most) if most > 1 else side for side in small]
    start = [(side - kept) // 2 for side, kept in zip(small, size)]
    rows = []
    for name, clip in clips.items():
        scale = clip.shape[1] // small[0]
        zoom = most // scale
        rows_of, columns_of = (slice(scale * a, scale * (a + n)) for a, n in zip(start, size))
        caption = f"{name}: {len(clip)} frames of {clip.shape[1]}x{clip.shape[2]}"
        if size != small:
            caption += f", the middle {scale * size[0]}x{scale * size[1]}"
        if zoom > 1:
            caption += f", shown {zoom} times as large"
        cells = np.full((len(times), scale * size[0], scale * size[1], 3), EMPTY, np.uint8)
        numbers = [time * (len(clip) - 1) for time in times]
        for cell, number in zip(cells, numbers):
            if number.denominator == 1:
                cell[:] = clip[int(number), rows_of, columns_of]
        if any(number.denominator > 1 for number in numbers):
            caption += "; empty where it has no frame"
        enlarged = repeat(cells, "t h w c -> t (h zh) (w zw) c", zh=zoom, zw=zoom)
        rows.append((enlarged if most > 1 else thinned(enlarged), caption))
    return rows


def moments(lengths: Sequence[int]) -> list[Fraction]:
    """Returns the moments, from 0 (first frame) to 1 (last), at which clips of these lengths are compared.

    They alternate between frames of the shortest clip and frames of a longer one in between.
    """
    few, many = min(lengths), max(lengths)
    if few == many or few == 1:
        return [Fraction(int(number), max(many - 1, 1)) for number in evenly(many, COLUMNS)]
    keys = [int(number) for number in evenly(few, (COLUMNS + 1) // 2)]
    between = [(a + b) // 2 + Fraction(1, 2) for a, b in zip(keys, keys[1:])]
    return [Fraction(number) / (few - 1) for number in sorted([*keys, *between])]


def evenly(length: int, count: int) -> np.ndarray:
    """Returns the indices of up to `count` of `length` frames, evenly spaced from the first to the last."""
    return np.unique(np.round(np.linspace(0, length - 1, count)).astype(int))


def thinned(frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t _h _w 3"]:
    """Subsamples frames to at most SIDE pixels per side."""
    step = -(-max(frames.shape[1:3]) // SIDE)
    return frames[:, ::step, ::step].copy()
