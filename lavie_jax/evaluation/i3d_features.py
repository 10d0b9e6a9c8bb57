"""Features of clips by the I3D of FVD, and how much the clips move."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from lavie_jax import parallel
from lavie_jax.evaluation.protocols import FILTERS, FVDKnobs
from lavie_jax.models.i3d import I3D


class ClipFeatures(NamedTuple):
    """What FVD needs of some clips.

    Attributes:
        logits: of the Kinetics-400 classes, averaged over time.
        pool: the averaged features before the classifier.
        motion: mean absolute difference of consecutive frames, of 255, at the network's input.
    """

    logits: Float32[np.ndarray, "n 400"]
    pool: Float32[np.ndarray, "n 1024"]
    motion: Float32[np.ndarray, " n"]


class Extractor:
    """Computes features of clips, split over this process's devices."""

    def __init__(self, params: dict[str, Any], knobs: FVDKnobs):
        self.knobs = knobs
        self.mesh = parallel.make_mesh(devices=parallel.local_devices())
        self.params = parallel.put(params, parallel.replicated(self.mesh))

    @property
    def devices(self) -> int:
        """Number of devices, of which a batch is best a multiple."""
        return self.mesh.size

    def __call__(self, clips: UInt8[np.ndarray, "n t h w 3"]) -> ClipFeatures:
        """Returns the features of clips that `prepared` has made."""
        padding = -len(clips) % self.devices
        padded = np.concatenate([clips, np.repeat(clips[-1:], padding, axis=0)])
        batch = jax.device_put(padded, parallel.batch_sharding(self.mesh))
        outputs = _features(
            self.params, batch, self.knobs.side, self.knobs.filter, self.knobs.antialias, self.knobs.round
        )
        return ClipFeatures(*(np.asarray(x)[: len(clips)] for x in outputs))


def prepared(clip: UInt8[np.ndarray, "t h w 3"], knobs: FVDKnobs) -> UInt8[np.ndarray, "t _H _W 3"]:
    """Crops a clip, and scales it to `knobs.resolution`."""
    if knobs.crop == "center":
        side = min(*clip.shape[1:3], knobs.crop_pixels or min(clip.shape[1:3]))
        top, left = ((n - side) // 2 for n in clip.shape[1:3])
        clip = clip[:, top : top + side, left : left + side]
    if knobs.resolution and clip.shape[1:3] != (knobs.resolution, knobs.resolution):
        size = knobs.resolution, knobs.resolution
        clip = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in clip])
    return np.ascontiguousarray(clip)


@functools.partial(jax.jit, static_argnames=("side", "filter", "antialias", "round"))
def _features(
    params: Any, clips: UInt8[Array, "n t h w 3"], side: int, filter: str, antialias: bool, round: bool
) -> tuple[Float[Array, "n 400"], Float[Array, "n 1024"], Float[Array, " n"]]:
    """Scales clips to the network's input and returns its logits, its features, and the clips' motion."""
    x = clips.astype(jnp.float32)
    if x.shape[2:4] != (side, side):
        shape = (*x.shape[:2], side, side, 3)
        x = jax.image.resize(x, shape, FILTERS[filter], antialias=antialias, precision=jax.lax.Precision.HIGHEST)
    if round:
        x = jnp.clip(jnp.round(x), 0, 255)
    motion = reduce(jnp.abs(jnp.diff(x, axis=1)), "n t h w c -> n", "mean")
    return *I3D().apply({"params": params}, x / 127.5 - 1), motion
