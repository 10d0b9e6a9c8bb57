"""Measurements of a scene and the thresholds that decide whether it is kept.

Functions take sample frames spread over a scene, in the small size of `scenes.find_scenes`. The measurements are stored
with every clip, so a data set can be filtered more strictly later without another run.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, UInt8

from lavie_jax.errors import UserError, suggest

DARK = 24  # grays up to this belong to black bars: video black is 16, and compression adds noise
BLOCK = 8  # pixels; side of the squares in which static marks are detected
CHANGES_AROUND = 0.9  # of the pixels outside static marks, at least
LETTERBOX = ("crop", "drop", "keep")


def _threshold(default: float | str, text: str) -> dataclasses.Field:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of the filters. The first three defaults are the paper's. 0 turns a test off unless noted."""

    min_words: int = _threshold(3, "drop captions with fewer words")
    min_frames: int = _threshold(16, "drop scenes with fewer frames")
    min_height: int = _threshold(720, "drop clips whose shorter side, without black bars, has fewer pixels")
    cut: float = _threshold(3.0, "cut where a frame's change exceeds its neighbours' by this factor (AdaptiveDetector)")
    min_brightness: float = _threshold(32.0, "drop scenes whose 99th percentile of gray, 0 to 255, is lower")
    min_motion: float = _threshold(0.002, "drop scenes in which a smaller fraction of the pixels changes")
    letterbox: str = _threshold("crop", "crop black bars, drop scenes with them, or keep both")
    max_overlay: float = _threshold(0.004, "drop scenes with a larger fraction of static text or marks; 1: off")
    max_text: float = _threshold(0.125, "drop scenes in which a larger fraction of the frames shows text; 1: off")
    duplicate_bits: int = _threshold(16, "drop clips whose hash differs in at most this many of 256 bits; -1: off")
    min_aesthetic: float = _threshold(0.0, "drop scenes with a lower aesthetic score; 0: off")
    max_seconds: float = _threshold(0.0, "cut longer scenes into clips of this length; 0: off")
    max_height: int = _threshold(0, "scale clips down until the shorter side has at most so many pixels; 0: off")

    def __post_init__(self):
        if self.letterbox not in LETTERBOX:
            raise UserError(f"unknown --letterbox {self.letterbox!r}{suggest(self.letterbox, LETTERBOX)}")
        if not 0 < self.cut < math.inf:
            raise UserError(f"--cut must be above 0 and finite; given {self.cut:g}")
        if not -1 <= self.duplicate_bits <= 64:
            raise UserError(f"--duplicate-bits must be from -1 to 64; given {self.duplicate_bits}")
        for name in (
            "min_words", "min_frames", "min_height", "min_brightness", "min_motion", "max_overlay", "max_text",
            "max_seconds", "max_height",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least 0 and finite; given {getattr(self, name):g}"
                )


class Bars(NamedTuple):
    """Numbers of black rows and columns at the edges."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def cut(self, frames: UInt8[np.ndarray, "*t h w 3"]) -> UInt8[np.ndarray, "*t ph pw 3"]:
        """Returns the picture between the bars."""
        height, width = frames.shape[-3:-1]
        return frames[..., self.top : height - self.bottom, self.left : width - self.right, :]


def gray(frames: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w"]:
    """Returns luma, 0 to 255, float32."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


def brightness(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Returns the 99th percentile of luma over all frames, 0 to 255. It is low if even the brightest parts are dark."""
    return float(np.percentile(gray(frames), 99))


def motion(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Returns the fraction of pixels whose luma changes between consecutive samples by more than compression noise."""
    change = np.abs(np.diff(gray(frames), axis=0))
    return float((change > 8).mean()) if len(change) else 0.0


def bars(frames: UInt8[np.ndarray, "t h w 3"]) -> Bars:
    """Returns the black bars that all frames share.

    A dark edge is a bar if it covers at least 2 % of the side and the picture begins abruptly along at least half of
    its length. The dark surroundings of a bright object are therefore not mistaken for bars.
    """
    luma = gray(frames)
    top, bottom = _dark_ends(luma)
    inside = luma[:, top : luma.shape[1] - bottom]
    left, right = _dark_ends(rearrange(inside, "t h w -> t w h"))
    return Bars(top, bottom, left, right)


def _dark_ends(luma: Float[np.ndarray, "t rows w"]) -> tuple[int, int]:
    """Returns the numbers of bar rows at the start and at the end."""
    dark = np.percentile(luma, 98, axis=2).max(axis=0) <= DARK
    if dark.all():
        return 0, 0
    lit = (luma.max(axis=0) > DARK).mean(axis=1) >= 0.5
    least = max(2, round(0.02 * len(dark)))

    def length(dark: Bool[np.ndarray, " rows"], lit: Bool[np.ndarray, " rows"]) -> int:
        n = int(np.argmin(dark))
        # Scaling leaves a row or two of intermediate grays between bar and picture.
        return n if n >= least and lit[n : n + 3].any() else 0

    return length(dark, lit), length(dark[::-1], lit[::-1])


def overlay(frames: UInt8[np.ndarray, "t h w 3"]) -> float | None:
    """Returns the fraction of the picture covered by static text or marks; None if it cannot be determined.

    When the camera moves, edges of the scene move too. An edge may slide along itself and appear static, but only in
    one direction. The measure therefore counts squares in which edges in both directions are static in all frames. It
    requires that nearly all of the other squares change: before a camera that stands, the scene itself is static.
    """
    luma = gray(frames)
    if len(luma) < 4 or min(luma.shape[1:]) < 2 * BLOCK:
        return None
    padding = ((0, 1), (0, 0)), ((0, 0), (0, 1))  # differences are a row or a column fewer than pixels
    edges = [np.pad(_static_edges(np.diff(luma, axis=1 + i)), padding[i]) for i in range(2)]
    marked = np.logical_and.reduce([_squares(each).sum(-1) >= 3 for each in edges])
    changing = _squares(np.ptp(luma, axis=0) > 16).mean(-1)
    if marked.all() or changing[~marked].mean() < CHANGES_AROUND:
        return None
    return float(marked.mean())


def _squares(pixels: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "r c n"]:
    """Returns the pixels of each whole square."""
    rows, columns = (side // BLOCK for side in pixels.shape)
    whole = pixels[: rows * BLOCK, : columns * BLOCK]
    return rearrange(whole, "(r i) (c j) -> r c (i j)", i=BLOCK, j=BLOCK)


def _static_edges(slope: Float[np.ndarray, "t h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns where all frames have an edge of the same sign."""
    return (slope.min(axis=0) > 12) | (slope.max(axis=0) < -12)
