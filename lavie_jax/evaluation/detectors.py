"""Reads off the pixels what a clip of Moving Shapes shows: no network, no training, some milliseconds a clip.

The background is the median of the frame's edge, the object what differs from it. Its area gives the size,
its centre's straight-line fit over time the motion, and its picture, centred, brought to unit area and
averaged over the frames, the shape. Made for blurred and noisy clips too: everything is a median, a fit or
an average. `python -m lavie_jax.evaluation.moving_shapes --truth` measures these detectors.
"""

import functools

import numpy as np
from jaxtyping import UInt8

from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Attributes

_FAINT = 25.0  # of 255: an object that differs less from its background is none
_GRID = 33  # samples a side of the centred picture, which is 4 object radii wide


def _nearest(colour: np.ndarray, names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(moving_shapes.RGB[name]))))


def _edge(clip: np.ndarray) -> np.ndarray:
    """Median colour of the two outermost pixels of all frames."""
    parts = clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in parts]), axis=0)


def _mask(clip: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(how much of each pixel is the object (T, H, W), its colour), None when nothing stands out."""
    apart = clip - background
    distance = np.sqrt(np.einsum("thwc,thwc->thw", apart, apart))
    # The smallest object covers 5 % of a square frame; edges and outliers are the rest of the percentiles.
    strong = np.quantile(distance, 1 - 0.03 * min(clip.shape[1:3]) / max(clip.shape[1:3]))
    if strong < _FAINT:
        return None
    colour = np.median(clip[distance > 0.75 * strong], axis=0)
    axis = colour - background
    alpha = np.einsum("thwc,c->thw", apart, axis / max(float(axis @ axis), 1.0))
    # Steeper around one half: noise of the background adds up to no area, that of the object to no hole.
    return np.clip((alpha - 0.15) / 0.7, 0, 1), colour


def _centres(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(areas (T,), centres (T, 2) as (x, y)), in pixels; the centre of pixel 0 is at 0.5."""
    area = mask.sum((1, 2))
    safe = np.maximum(area, 1e-6)
    x = mask.sum(1) @ (np.arange(mask.shape[2]) + 0.5) / safe
    y = mask.sum(2) @ (np.arange(mask.shape[1]) + 0.5) / safe
    return area, np.stack([x, y], -1)


def _motion(centres: np.ndarray, seconds: np.ndarray) -> str:
    """Direction of the straight line through the centres (T, 2), in shorter sides."""
    if len(centres) < 2:
        return "still"
    slope = np.polyfit(seconds, centres, 1)[0]
    duration = seconds[-1] - seconds[0]
    travel = slope * duration
    # Half way between standing still and what moves; a long clip's path is bounded by the frame.
    if np.hypot(*travel) < 0.45 * min(moving_shapes.SPEED * duration, 0.36):
        return "still"
    return max(moving_shapes.MOTIONS, key=lambda name: float(np.dot(moving_shapes.MOTIONS[name], travel)))


def _picture(mask: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """The object (_GRID, _GRID), centred and with unit radius, averaged over frames: bilinear samples."""
    frames, height, width = mask.shape
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    steps = np.linspace(-2, 2, _GRID) * radius

    def corners(centre: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        place = np.clip(centre[:, None] + steps + 0.5, 0, size + 0.999)
        low = place.astype(int)
        return low, place - low

    x, fx = corners(centres[:, 0], width)
    y, fy = corners(centres[:, 1], height)
    t = np.arange(frames)[:, None, None]
    x, fx, y, fy = x[:, None, :], fx[:, None, :], y[:, :, None], fy[:, :, None]
    top = padded[t, y, x] * (1 - fx) + padded[t, y, x + 1] * fx
    bottom = padded[t, y + 1, x] * (1 - fx) + padded[t, y + 1, x + 1] * fx
    return (top * (1 - fy) + bottom * fy).mean(0)


@functools.lru_cache(maxsize=64)
def _templates(radius: float) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, unit-norm pictures (N, _GRID * _GRID)) of all shapes at a radius in pixels."""
    names, side = tuple(moving_shapes.VIDEO_SHAPES + moving_shapes.IMAGE_SHAPES), int(5 * radius)
    axis = (np.arange(side) + 0.5 - side / 2).astype(np.float32)
    pictures = []
    for name in names:
        mask = moving_shapes.coverage(name, radius, axis[None, :], axis[:, None])[None]
        area, centres = _centres(mask)
        pictures.append(_unit(_picture(mask, centres, float(np.sqrt(area[0] / np.pi)))))
    return names, np.stack(pictures)


def _unit(picture: np.ndarray) -> np.ndarray:
    flat = picture.ravel() - picture.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-6)


def detect(clip: UInt8[np.ndarray, "t h w 3"], *, fps: float = 8.0) -> Attributes:
    """What the clip shows; all but the background are "nothing" where nothing stands out."""
    pixels = clip.astype(np.float32)
    background = _edge(pixels)
    ground = _nearest(background, moving_shapes.BACKGROUNDS)
    found = _mask(pixels, background)
    if found is None:
        return Attributes("nothing", "nothing", "nothing", ground, "nothing")
    mask, rgb = found
    area, centres = _centres(mask)
    usual = float(np.median(area))
    clear = area > 0.4 * usual  # frames in which the object is there
    if usual < 4 or not clear.any():
        return Attributes("nothing", "nothing", "nothing", ground, "nothing")
    shorter = min(clip.shape[1:3])
    radius = float(np.sqrt(usual / np.pi))
    limit = shorter * float(np.sqrt(np.prod(list(moving_shapes.SIZES.values()))))
    size = "small" if radius < limit else "large"
    names, templates = _templates(moving_shapes.SIZES[size] * shorter)
    picture = _unit(_picture(mask[clear], centres[clear], radius))
    return Attributes(
        shape=names[int(np.argmax(templates @ picture))],
        colour=_nearest(rgb, (*moving_shapes.VIDEO_COLOURS, *moving_shapes.IMAGE_COLOURS)),
        size=size,
        background=ground,
        motion=_motion(centres[clear] / shorter, np.flatnonzero(clear) / fps),
    )
