"""What a scene is judged by: small functions of its frames, and the thresholds that decide.

The frames are samples of a scene, spread over it, in the small size of `segments.find_scenes`. What is measured is
stored beside every clip, so that a data set can be filtered again, more strictly, without a new run.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from lavie_jax.errors import UserError, suggest

DARK = 24  # grays up to this are black bars: video black, and what compression makes of it
BLOCK = 8  # pixels; the side of the squares in which overlaid text is sought
LETTERBOX = ("crop", "drop", "keep")


def _threshold(default: float | str, text: str) -> dataclasses.Field:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is dropped. The first three are the paper's; 0 turns a test off, where nothing else is said."""

    min_words: int = _threshold(3, "drop captions of fewer words")
    min_frames: int = _threshold(16, "drop scenes of fewer frames")
    min_height: int = _threshold(720, "drop clips whose shorter side, without black bars, has fewer pixels")
    cut: float = _threshold(3.0, "how many times its neighbours' change a cut's is (PySceneDetect's AdaptiveDetector)")
    min_brightness: float = _threshold(32.0, "drop scenes with 99 of 100 pixels darker, of 255")
    min_motion: float = _threshold(0.002, "drop scenes in which a smaller share of the pixels changes")
    letterbox: str = _threshold("crop", "what happens to black bars, or to scenes with them")
    max_overlay: float = _threshold(0.004, "drop scenes with a larger share of standing text or marks; 1 turns it off")
    duplicate_bits: int = _threshold(16, "drop clips whose hash differs in at most so many of 256 bits; -1: off")
    min_aesthetic: float = _threshold(0.0, "drop scenes with a lower aesthetic score; 0: none")

    def __post_init__(self):
        if self.letterbox not in LETTERBOX:
            raise UserError(f"unknown --letterbox {self.letterbox!r}{suggest(self.letterbox, LETTERBOX)}")
        if self.cut <= 0:
            raise UserError(f"--cut must be above 0; given {self.cut:g}")
        if not -1 <= self.duplicate_bits <= 64:
            raise UserError(f"--duplicate-bits is -1 to 64 of 256; given {self.duplicate_bits}")
        for name in ("min_words", "min_frames", "min_height", "min_brightness", "min_motion", "max_overlay"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least 0; given {getattr(self, name):g}")


class Bars(NamedTuple):
    """Black rows and columns at the edges, in pixels."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def cut(self, frames: UInt8[np.ndarray, "*t h w 3"]) -> UInt8[np.ndarray, "*t ph pw 3"]:
        """The picture between the bars."""
        height, width = frames.shape[-3:-1]
        return frames[..., self.top : height - self.bottom, self.left : width - self.right, :]


def gray(frames: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w"]:
    """Luma, 0 to 255, float32."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


def brightness(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """The gray that 99 of 100 pixels of all frames stay below, 0 to 255: low where even the lights are dark."""
    return float(np.percentile(gray(frames), 99))


def motion(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """The share of pixels, 0 to 1, whose gray changes from one frame to the next by more than compression would."""
    change = np.abs(np.diff(gray(frames), axis=0))
    return float((change > 8).mean()) if len(change) else 0.0


def bars(frames: UInt8[np.ndarray, "t h w 3"]) -> Bars:
    """The black bars that all frames have.

    A dark edge is a bar where it is at least 2 % of the side and the picture begins at once over half of its length:
    so a bright thing in a black room has none.
    """
    lights = gray(frames)
    top, bottom = _ends(lights)
    inside = lights[:, top : lights.shape[1] - bottom]
    left, right = _ends(rearrange(inside, "t h w -> t w h"))
    return Bars(top, bottom, left, right)


def _ends(lights: Float[np.ndarray, "t rows w"]) -> tuple[int, int]:
    """How many rows at the start and at the end are bars."""
    dark = np.percentile(lights, 98, axis=2).max(axis=0) <= DARK
    if dark.all():
        return 0, 0
    lit = (lights.max(axis=0) > DARK).mean(axis=1) >= 0.5
    first, last = int(np.argmin(dark)), int(np.argmin(dark[::-1]))
    least = max(2, round(0.02 * len(dark)))
    # A scaled edge is a row or two of grays between bar and picture.
    found = [n if n >= least and lit[side[n : n + 3]].any() else 0
             for n, side in ((first, np.arange(len(dark))), (last, np.arange(len(dark))[::-1]))]  # fmt: skip
    return found[0], found[1]


def overlay(frames: UInt8[np.ndarray, "t h w 3"]) -> float | None:
    """The share of the picture, 0 to 1, that is standing text or marks; None where that cannot be told.

    Where a camera moves, edges move along. An edge may also slide along itself and seem to stand, but only in one
    direction: so what counts are squares in which edges in both directions stand in all frames. It can be told only
    where at least half of the picture changes: without, everything stands.
    """
    lights = gray(frames)
    if len(lights) < 4 or min(lights.shape[1:]) < 2 * BLOCK or (np.ptp(lights, axis=0) > 16).mean() < 0.5:
        return None
    both = [_standing(np.diff(lights, axis=axis)) for axis in (1, 2)]
    rows, columns = (side // BLOCK for side in lights.shape[1:])
    marked = np.ones((rows, columns), bool)
    for edges in both:
        edges = np.pad(edges, ((0, 1), (0, 1)))[: rows * BLOCK, : columns * BLOCK]
        blocks = rearrange(edges, "(r i) (c j) -> r c (i j)", i=BLOCK, j=BLOCK)
        marked &= blocks.sum(-1) >= 3
    return float(marked.mean())


def _standing(slope: Float[np.ndarray, "t h w"]) -> np.ndarray:
    """Where all frames have an edge of the same sign."""
    return (slope.min(axis=0) > 12) | (slope.max(axis=0) < -12)
