"""Finds lines of text in frames, whatever the words, the script or the font.

A line of text is a row of strokes: many edges from left to right, about as far apart as the line is high, in a long
flat region whose margins above and below are empty. Grass, leaves and walls have strokes too, but not the margins.
Letters of any height are found at one of a few scales, because a large letter is a small one in a smaller frame.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SCALES = (1, 2, 4)  # lines of 3 to 96 rows, in frames of `scenes.SIDE`
_HEIGHTS = (3, 24)  # rows of a line at its scale
_GAP = 7  # pixels between two strokes of a line, at most
_MIN_STROKES = 6


class _Kind(NamedTuple):
    """What counts as a line.

    Attributes:
        edge: change of luma over two pixels from which there is an edge.
        filled: fraction of the line's bounding box that strokes and the gaps between them cover, at least.
        margin: fraction of the pixels in a margin that are edges, at most.
    """

    edge: float
    filled: float
    margin: float


# Pale letters, as in credits, are told from the picture's own edges by their margins. Those of subtitles over a busy
# picture are not empty, but few edges of a picture are as strong as a subtitle's.
_KINDS = (_Kind(12, 0.45, 0.2), _Kind(60, 0.35, 0.3))


def text_share(luma: Float[np.ndarray, "t h w"]) -> float:
    """Returns the fraction of frames, luma from 0 to 255, that show at least one line of text."""
    return float(np.mean([any(has_text(frame, scale) for scale in SCALES) for frame in luma]))


def has_text(luma: Float[np.ndarray, "h w"], scale: int = 1) -> bool:
    """Returns whether a frame, made `scale` times smaller, shows a line of text."""
    import cv2  # extra `curation`

    if min(luma.shape) < scale * _HEIGHTS[1]:
        return False
    size = luma.shape[1] // scale, luma.shape[0] // scale
    small = cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
    across, down = np.zeros_like(small), np.zeros_like(small)
    across[:, 1:-1] = small[:, 2:] - small[:, :-2]
    down[1:-1] = small[2:] - small[:-2]
    for kind in _KINDS:
        strokes = np.abs(across) > kind.edge
        regions = cv2.morphologyEx(strokes.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, _GAP), np.uint8))
        regions = cv2.morphologyEx(regions, cv2.MORPH_OPEN, np.ones((2, _GAP + 2), np.uint8))
        boxes = cv2.connectedComponentsWithStats(regions, connectivity=4)[2][1:]  # the first is the background
        edges = strokes | (np.abs(down) > kind.edge)
        if any(map(functools.partial(_is_line, across > kind.edge, edges, kind), boxes)):
            return True
    return False


def _is_line(rising: Bool[np.ndarray, "h w"], edges: Bool[np.ndarray, "h w"], kind: _Kind, box: np.ndarray) -> bool:
    """Returns whether the region in `box` (left, top, width, height, pixels) is a line of text."""
    left, top, width, height, pixels = map(int, box)
    if not _HEIGHTS[0] <= height <= _HEIGHTS[1] or width < 2.5 * height or pixels < kind.filled * width * height:
        return False
    if left == 0 or left + width == rising.shape[1]:  # text ends before the picture does, leaves do not
        return False
    columns, bottom = slice(left, left + width), top + height
    inside = rising[top:bottom, columns]
    strokes = np.median((inside[:, 1:] & ~inside[:, :-1]).sum(axis=1))
    if strokes < max(_MIN_STROKES, width / (2 * max(height, 4))):
        return False
    rows = max(2, height // 3)  # of a margin, beyond one row that may be blurred
    above, below = (
        edges[max(0, top - 1 - rows) : max(0, top - 1), columns],
        edges[bottom + 1 : bottom + 1 + rows, columns],
    )
    return all(bool(margin.size) and margin.mean() <= kind.margin for margin in (above, below))
