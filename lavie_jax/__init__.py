"""LaVie (arXiv 2309.15103) in JAX: text to video in three stages, sampled and trained.

    cascade = lavie_jax.load("weights/")
    video = cascade("a red circle moving left", stages=("base", "interpolation", "vsr"), seed=0)
    video.save("out.mp4")  # uint8 (1, T, H, W, 3), with video.fps

The names below load on first use, so that `import lavie_jax` costs nothing and starts no device.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "lavie_jax.cascade",
    "push_to_hub": "lavie_jax.weights.hub.publish",
    "save_video": "lavie_jax.samples.outputs",
    "UserError": "lavie_jax.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lavie_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
