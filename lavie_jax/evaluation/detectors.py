"""Detects the attributes of a Moving Shapes clip from its pixels, without a network, in a few milliseconds.

The background is the median colour of the frame's edge, and the object is what differs from it. Its area gives the
size, a straight line fitted to its centre over time gives the motion, and its mask, centred, scaled to unit area and
averaged over the frames, gives the shape. Every step is a median, a fit or an average, and thus robust to blur and
noise. `python -m lavie_jax.evaluation.moving_shapes --truth` measures the accuracy of the detectors.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8

from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Attributes

_MIN_CONTRAST = 25.0  # of 255, between an object and its background
_GRID = 33  # samples per side of the centred mask, which is 4 object radii wide


def _nearest(colour: np.ndarray, names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(moving_shapes.RGB[name]))))


def edge_colour(clip: np.ndarray) -> np.ndarray:
    """Returns the median colour of the two outermost rows and columns of all frames."""
    parts = clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in parts]), axis=0)


def _mask(
    clip: Float[np.ndarray, "t h w 3"], background: np.ndarray
) -> tuple[Float[np.ndarray, "t h w"], np.ndarray] | None:
    """Returns how much of each pixel the object covers, and its colour; None if nothing stands out."""
    difference = clip - background
    distance = np.sqrt(np.einsum("thwc,thwc->thw", difference, difference))
    # The smallest object covers 5 % of a square frame. The quantile leaves out its soft edges and outliers.
    strong = np.quantile(distance, 1 - 0.03 * min(clip.shape[1:3]) / max(clip.shape[1:3]))
    if strong < _MIN_CONTRAST:
        return None
    colour = np.median(clip[distance > 0.75 * strong], axis=0)
    axis = colour - background
    alpha = np.einsum("thwc,c->thw", difference, axis / max(float(axis @ axis), 1.0))
    # Clipping both ends keeps noise from adding area to the background or holes to the object.
    return np.clip((alpha - 0.15) / 0.7, 0, 1), colour


def _centres(mask: Float[np.ndarray, "t h w"]) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, "t 2"]]:
    """Returns areas and centres as (x, y), in pixels; the centre of pixel 0 is at 0.5."""
    area = mask.sum((1, 2))
    safe = np.maximum(area, 1e-6)
    x = mask.sum(1) @ (np.arange(mask.shape[2]) + 0.5) / safe
    y = mask.sum(2) @ (np.arange(mask.shape[1]) + 0.5) / safe
    return area, np.stack([x, y], -1)


def _motion(centres: np.ndarray, seconds: np.ndarray) -> str:
    """Returns the direction of a straight line fitted to the centres (T, 2), which are in units of the shorter side."""
    if len(centres) < 2:
        return "still"
    slope = np.polyfit(seconds, centres, 1)[0]
    duration = seconds[-1] - seconds[0]
    travel = slope * duration
    # Half way between no motion and the expected path. The frame bounds the path of a long clip.
    if np.hypot(*travel) < 0.45 * min(moving_shapes.SPEED * duration, 0.36):
        return "still"
    return max(moving_shapes.MOTIONS, key=lambda name: float(np.dot(moving_shapes.MOTIONS[name], travel)))


def _centred(mask: Float[np.ndarray, "t h w"], centres: np.ndarray, radius: float) -> Float[np.ndarray, "grid grid"]:
    """Returns the mask centred, scaled to unit radius and averaged over frames, by bilinear sampling."""
    frames, height, width = mask.shape
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    steps = np.linspace(-2, 2, _GRID) * radius

    def corners(centre: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.clip(centre[:, None] + steps + 0.5, 0, size + 0.999)
        low = position.astype(int)
        return low, position - low

    x, fx = corners(centres[:, 0], width)
    y, fy = corners(centres[:, 1], height)
    t = np.arange(frames)[:, None, None]
    x, fx, y, fy = x[:, None, :], fx[:, None, :], y[:, :, None], fy[:, :, None]
    top = padded[t, y, x] * (1 - fx) + padded[t, y, x + 1] * fx
    bottom = padded[t, y + 1, x] * (1 - fx) + padded[t, y + 1, x + 1] * fx
    return (top * (1 - fy) + bottom * fy).mean(0)


@functools.lru_cache(maxsize=64)
def _templates(radius: float) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns names and unit-norm templates (N, _GRID * _GRID) of all shapes at a radius in pixels."""
    names, side = tuple(moving_shapes.VIDEO_SHAPES + moving_shapes.IMAGE_SHAPES), int(5 * radius)
    axis = (np.arange(side) + 0.5 - side / 2).astype(np.float32)
    templates = []
    for name in names:
        mask = moving_shapes.coverage(name, radius, axis[None, :], axis[:, None])[None]
        area, centres = _centres(mask)
        templates.append(_unit(_centred(mask, centres, float(np.sqrt(area[0] / np.pi)))))
    return names, np.stack(templates)


def _unit(image: np.ndarray) -> np.ndarray:
    """Returns the image flattened, with zero mean and unit norm."""
    flat = image.ravel() - image.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-6)


def object_centres(clip: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t 2"] | None:
    """Returns the object's centre (x, y) in each frame, in shorter sides; None if nothing stands out."""
    pixels = clip.astype(np.float32)
    masked = _mask(pixels, edge_colour(pixels))
    return None if masked is None else _centres(masked[0])[1] / min(clip.shape[1:3])


def detect(clip: UInt8[np.ndarray, "t h w 3"], *, fps: float = 8.0) -> Attributes:
    """Returns the attributes that a clip shows. Without an object, all except the background are "nothing"."""
    pixels = clip.astype(np.float32)
    background = edge_colour(pixels)
    background_name = _nearest(background, moving_shapes.BACKGROUNDS)
    nothing = Attributes("nothing", "nothing", "nothing", background_name, "nothing")
    masked = _mask(pixels, background)
    if masked is None:
        return nothing
    mask, rgb = masked
    area, centres = _centres(mask)
    median_area = float(np.median(area))
    present = area > 0.4 * median_area  # frames that show the object
    if median_area < 4 or not present.any():
        return nothing
    shorter = min(clip.shape[1:3])
    radius = float(np.sqrt(median_area / np.pi))
    limit = shorter * float(np.sqrt(np.prod(list(moving_shapes.SIZES.values()))))
    size = "small" if radius < limit else "large"
    names, templates = _templates(moving_shapes.SIZES[size] * shorter)
    image = _unit(_centred(mask[present], centres[present], radius))
    return Attributes(
        shape=names[int(np.argmax(templates @ image))],
        colour=_nearest(rgb, (*moving_shapes.VIDEO_COLOURS, *moving_shapes.IMAGE_COLOURS)),
        size=size,
        background=background_name,
        motion=_motion(centres[present] / shorter, np.flatnonzero(present) / fps),
    )
