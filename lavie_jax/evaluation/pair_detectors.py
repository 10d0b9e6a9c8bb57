"""Detects two objects in a clip of `data.moving_pairs`, and finds out whether their attributes are swapped.

Objects never touch and move less than their size between frames, so that each is a connected region of the clip's
(time, row, column). Everything but one object is painted over with the background, and `detectors.detect` measures what
is left.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from lavie_jax.data.moving_shapes import Attributes
from lavie_jax.evaluation.detectors import detect, edge_colour, object_centres

CONTRAST = 45.0  # of 255, from which a pixel belongs to an object: any two colours are at least 100 apart
MIN_AREA = 0.008  # of a frame, on average over time: a fifth of a true object
NEAR = 2  # pixels around a region that belong to its object: its soft edge

OUTCOMES = ("colours", "shapes", "bound", "swapped", "motions", "all")


class Found(NamedTuple):
    """An object: its attributes, and its centre (x, y) in the first and the last frame, in shorter sides."""

    attributes: Attributes
    first: tuple[float, float]
    last: tuple[float, float]


def detect_pair(clip: UInt8[np.ndarray, "t h w 3"], *, fps: float = 8.0) -> tuple[Found, ...]:
    """Returns the objects of a clip, from left to right in the first frame: two, or fewer if they merge or are absent.

    Of more than two, the largest two are returned.
    """
    pixels = clip.astype(np.float32)
    background = edge_colour(pixels)
    distance = np.linalg.norm(pixels - background, axis=-1)
    labels, count = regions(distance > CONTRAST)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    largest = [i + 1 for i in np.argsort(-sizes)[:2] if sizes[i] >= MIN_AREA * labels.size]
    found = []
    for label in largest:
        others = grown((labels > 0) & (labels != label), NEAR) & ~grown(labels == label, NEAR)
        alone = np.where(others[..., None], np.rint(background).astype(np.uint8), clip)
        centres = object_centres(alone)
        if centres is not None:
            first, last = (tuple(float(x) for x in centres[i]) for i in (0, -1))
            found.append(Found(detect(alone, fps=fps), first, last))
    return tuple(sorted(found, key=lambda one: one.first))


def regions(mask: Bool[np.ndarray, "t h w"]) -> tuple[Int[np.ndarray, "t h w"], int]:
    """Labels the connected regions of a mask, over time, rows and columns, from 1; returns labels and their count."""
    from scipy import ndimage  # which jax needs too

    return ndimage.label(mask)


def grown(mask: Bool[np.ndarray, "t h w"], pixels: int) -> Bool[np.ndarray, "t h w"]:
    """Adds the pixels around a mask within each frame, in rows and then in columns."""
    height, width = mask.shape[1:]
    rows = np.pad(mask, ((0, 0), (pixels, pixels), (0, 0)))
    mask = np.any([rows[:, i : i + height] for i in range(2 * pixels + 1)], axis=0)
    columns = np.pad(mask, ((0, 0), (0, 0), (pixels, pixels)))
    return np.any([columns[:, :, i : i + width] for i in range(2 * pixels + 1)], axis=0)


def outcome(found: Sequence[Found], objects: tuple[Attributes, Attributes]) -> dict[str, bool] | None:
    """Compares what a clip shows with its caption; None if it does not show two objects.

    Returns:
        `colours`, `shapes`: both are those of the caption, whichever object has which; `bound`: each shape has its
        colour; `swapped`: colours and shapes are the caption's, but each shape has the other one's colour; `motions`
        (of clips): each object, known by its shape, moves as its own words say; `all`: everything but swapped.
    """
    if len(found) != 2:
        return None
    shown = [one.attributes for one in found]

    def same(*names: str) -> bool:
        def sets(pair):
            return sorted(tuple(getattr(a, name) for name in names) for a in pair)

        return sets(shown) == sets(objects)

    result = {"colours": same("colour"), "shapes": same("shape"), "bound": same("shape", "colour")}
    result["swapped"] = result["colours"] and result["shapes"] and not result["bound"]
    if objects[0].motion is not None:
        result["motions"] = same("shape", "motion")
    return result | {"all": result["bound"] and result.get("motions", True)}
