"""How near a clip is to the true one: error, sharpness of edges, steadiness. Pixels only, uint8 (T, H, W, 3)."""

import numpy as np
from jaxtyping import Bool, UInt8

STANDS_OUT = 40.0  # of 255: how much a pixel of the object differs from the background
BOX_MARGIN = 1 / 16  # of the shorter side, around the object: where a wrongly placed one would show

Clip = UInt8[np.ndarray, "t h w 3"]


def psnr(made: Clip, true: Clip, where: Bool[np.ndarray, "t h w"] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, of all pixels together or of those in `where`; infinite without error."""
    error = np.square(made.astype(np.float32) - true)
    mean = float((error if where is None else error[where]).mean())
    return float(10 * np.log10(255.0**2 / mean)) if mean else float("inf")


def object_box(true: Clip) -> Bool[np.ndarray, "t h w"]:
    """In each frame the box around what differs from the clip's background, which is plain, with a margin."""
    edge = np.concatenate([true[:, 0], true[:, -1], true[:, :, 0], true[:, :, -1]], axis=1)
    background = np.median(edge.reshape(-1, 3), axis=0)
    differs = np.abs(true.astype(np.float32) - background).max(-1) > STANDS_OUT
    margin = max(1, round(BOX_MARGIN * min(true.shape[1:3])))
    box = np.zeros(true.shape[:3], bool)
    for frame, seen in zip(box, differs):
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        if len(rows):
            top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
            frame[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1] = True
    return box


def sharpness(made: Clip, true: Clip) -> float:
    """Steepness of the true clip's edges in the made one: 1 is as steep, less is blurred.

    The mean gradient over those tenth of the pixels with a gradient where the true clip's is largest, over the
    latter's.
    """
    mine, theirs = _gradient(made), _gradient(true)
    edges = theirs >= np.quantile(theirs[theirs > 1], 0.9) if (theirs > 1).any() else theirs >= 0
    return float(mine[edges].mean() / max(float(theirs[edges].mean()), 1e-6))


def _gradient(clip: Clip) -> np.ndarray:
    """Length of the gradient of the mean of the colours, (T, H - 1, W - 1), by differences of neighbours."""
    gray = clip.astype(np.float32).mean(-1)
    return np.hypot(np.diff(gray, axis=1)[:, :, :-1], np.diff(gray, axis=2)[:, :-1])


def flicker(made: Clip, true: Clip) -> float:
    """Root mean square of how much a frame-to-frame difference differs from the true one, in 0..255; 0 is steady."""
    mine, theirs = (np.diff(clip.astype(np.float32), axis=0) for clip in (made, true))
    return float(np.sqrt(np.square(mine - theirs).mean()))
