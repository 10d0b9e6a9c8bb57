"""Pixel measures of a clip against the true one, both uint8 (T, H, W, 3): error, structure, sharpness, flicker."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from lavie_jax.errors import UserError

MIN_CONTRAST = 40.0  # of 255, between a pixel of the object and the background
BOX_MARGIN = 1 / 16  # of the shorter side; includes the surroundings, where a misplaced object would be visible

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # of the Gaussian window, 11x11
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LUMA = (0.299, 0.587, 0.114)

Clip = UInt8[np.ndarray, "t h w 3"]


def psnr(clip: Clip, true: Clip, where: Bool[np.ndarray, "t h w"] | None = None) -> float:
    """Returns the peak signal-to-noise ratio in dB over all pixels, or those in `where`; inf if they are equal."""
    error = np.square(clip.astype(np.float32) - true)
    mean = float((error if where is None else error[where]).mean())
    return float(10 * np.log10(255.0**2 / mean)) if mean else float("inf")


def ssim(clip: Clip, true: Clip) -> float:
    """Returns the structural similarity of the luma, the mean over frames (Wang et al., 2004).

    A Gaussian window of 11x11 pixels with sigma 1.5, without the frame's margin of 5 pixels.

    Raises:
        UserError: the frames are smaller than the window.
    """
    side = 2 * SSIM_RADIUS + 1
    if min(clip.shape[1:3]) < side:
        raise UserError(f"SSIM needs frames of at least {side} pixels a side; given {clip.shape[1]}x{clip.shape[2]}")
    window = np.exp(-0.5 * np.square(np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA))
    window /= window.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = np.lib.stride_tricks.sliding_window_view(x, side, axis) @ window
        return x

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
        return float((luminance * (2 * covariance + SSIM_C2) / (var_a + var_b + SSIM_C2)).mean())

    return float(np.mean([similarity(a @ LUMA, b @ LUMA) for a, b in zip(clip.astype(float), true.astype(float))]))


def object_box(true: Clip) -> Bool[np.ndarray, "t h w"]:
    """Returns a mask of the box, with a margin, around all that differs from the uniform background in each frame."""
    edge = np.concatenate([true[:, 0], true[:, -1], true[:, :, 0], true[:, :, -1]], axis=1)
    background = np.median(edge.reshape(-1, 3), axis=0)
    differs = np.abs(true.astype(np.float32) - background).max(-1) > MIN_CONTRAST
    margin = max(1, round(BOX_MARGIN * min(true.shape[1:3])))
    box = np.zeros(true.shape[:3], bool)
    for frame, object_pixels in zip(box, differs):
        rows, columns = np.flatnonzero(object_pixels.any(1)), np.flatnonzero(object_pixels.any(0))
        if len(rows):
            top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
            frame[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1] = True
    return box


def sharpness(clip: Clip, true: Clip) -> float:
    """Returns how steep a clip is at the true clip's edges, relative to them: 1 = as sharp, less = blurred.

    Edges are the 10 % of pixels with the largest gradient in the true clip, among those with any. The result is the
    ratio of the mean gradients there.
    """
    gradient, reference = _gradient(clip), _gradient(true)
    edges = reference >= np.quantile(reference[reference > 1], 0.9) if (reference > 1).any() else reference >= 0
    return float(gradient[edges].mean() / max(float(reference[edges].mean()), 1e-6))


def _gradient(clip: Clip) -> Float[np.ndarray, "t h-1 w-1"]:
    """Returns the norm of the gradient of the mean over colours, by differences of neighbouring pixels."""
    gray = clip.astype(np.float32).mean(-1)
    return np.hypot(np.diff(gray, axis=1)[:, :, :-1], np.diff(gray, axis=2)[:, :-1])


def flicker(clip: Clip, true: Clip) -> float:
    """Returns the RMS error of frame-to-frame differences, 0 to 255; 0 = all changes over time are the true ones."""
    change, reference = (np.diff(c.astype(np.float32), axis=0) for c in (clip, true))
    return float(np.sqrt(np.square(change - reference).mean()))
