"""Clips of one frame rate from frames at any times."""

import numpy as np
from jaxtyping import Float, Int

_MAX_RATE, _MAX_REPEATS = 60, 8  # of resampled clips: frames per second, and times a frame is repeated on average
_STANDARD_RATES = (24 / 1.001, 24.0, 25.0, 30 / 1.001, 30.0, 50.0, 60 / 1.001, 60.0)
_JITTER = 0.2  # frames: time stamps are rounded, often to milliseconds


def constant_rate(
    times: Float[np.ndarray, "n"],  # noqa: F821
    end: float,
    rate: float,
) -> tuple[Int[np.ndarray, " m"], float]:
    """Finds a constant rate for frames that start at `times`, in seconds.

    Args:
        times: when each frame appears.
        end: when the last one disappears.
        rate: by the header.

    Returns:
        (indices of the frames to show, frames per second). All frames, once, where their times are those of a constant
        rate; else the frame on screen at each time, at a rate with room for every frame where there is one.
    """
    times, count = np.maximum.accumulate(times - times[0]), len(times)
    end = max(end, times[-1])
    if count < 2 or not times[-1]:
        return np.arange(count), rate
    if np.abs(times * rate - np.arange(count)).max() <= _JITTER:
        return np.arange(count), rate
    fit = (count - 1) / times[-1]
    if np.abs(times * fit - np.arange(count)).max() <= _JITTER:
        return np.arange(count), float(fit)
    steps = np.diff(times)
    steps = steps[steps > 0]
    usual = np.median(steps)
    nominal = 1 / steps[np.abs(steps / usual - 1) <= 0.25].mean()
    most = min(_MAX_RATE / nominal, _MAX_REPEATS * count / (end * nominal))
    for fold in range(1, max(1, int(most)) + 1):
        rate = float(np.round(times[-1] * nominal * fold) / times[-1])  # more exact: over the whole length
        positions = times * rate
        if len(np.unique(np.round(positions))) == count and np.abs(positions - np.round(positions)).max() <= _JITTER:
            break
    else:
        rate = float(nominal)
    standard = min(_STANDARD_RATES, key=lambda known: abs(rate / known - 1))
    rate = standard if abs(rate / standard - 1) < 5e-4 else rate
    moments = np.arange(max(round(end * rate), round(times[-1] * rate) + 1)) / rate
    return np.searchsorted(times, moments + _JITTER / rate, side="right") - 1, rate
