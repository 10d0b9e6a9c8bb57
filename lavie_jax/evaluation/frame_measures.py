"""PSNR, SSIM, LPIPS and flicker of videos with a truth: one value a video, and statistics over the videos."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8
from tqdm.auto import tqdm

from lavie_jax import parallel
from lavie_jax.data.transforms import to_float
from lavie_jax.errors import UserError
from lavie_jax.evaluation.fidelity import flicker, psnr, ssim
from lavie_jax.evaluation.protocols import PairKnobs
from lavie_jax.evaluation.videos import Video, batches
from lavie_jax.models.lpips import LPIPS, MIN_SIDE
from lavie_jax.weights.metric_weights import LPIPS_WEIGHTS, load_weights

BATCH = 8  # pairs of frames per device
INTERVAL = (2.5, 97.5)  # percentiles

Clip = UInt8[np.ndarray, "t h w 3"]
Measure = Callable[[Clip, Clip], float]


class Lpips:
    """LPIPS of two clips, the mean over their frames; on this process's devices."""

    def __init__(self, weights: Path | None, *, spatial: bool):
        self.mesh = parallel.make_mesh(devices=parallel.local_devices())
        self.params = parallel.put(load_weights(LPIPS_WEIGHTS, weights), parallel.replicated(self.mesh))
        self.spatial = spatial

    def __call__(self, clip: Clip, true: Clip) -> float:
        """Returns the distance. Raises UserError for frames that are too small."""
        if min(clip.shape[1:3]) < MIN_SIDE:
            raise UserError(
                f"LPIPS needs frames of at least {MIN_SIDE} pixels a side; given {clip.shape[1]}x{clip.shape[2]}"
            )
        values, size = [], BATCH * self.mesh.size
        for rows in batches(np.arange(len(clip)), size):
            padded = np.resize(rows, size)  # repeats rows, so that one program serves all
            pair = rearrange([to_float(clip[padded]), to_float(true[padded])], "pair b h w c -> b pair h w c")
            batch = jax.device_put(pair, parallel.batch_sharding(self.mesh))
            values.append(np.asarray(_distance(self.params, batch, self.spatial))[: len(rows)])
        return float(np.concatenate(values).mean())


@functools.partial(jax.jit, static_argnames="spatial")
def _distance(params: Any, pair: Float[Array, "b 2 h w 3"], spatial: bool) -> Float[Array, " b"]:
    return LPIPS(spatial).apply({"params": params}, pair[:, 0], pair[:, 1])[0]


def measures(names: Sequence[str], knobs: PairKnobs, lpips: Path | None) -> dict[str, Measure]:
    """Returns the measures of these names."""
    plain: dict[str, Measure] = {"psnr": psnr, "ssim": ssim, "flicker": flicker}
    return {name: plain[name] if name in plain else Lpips(lpips, spatial=knobs.spatial) for name in names}


def compare_pairs(
    pairs: Sequence[tuple[Video, Video]], by_name: Mapping[str, Measure], knobs: PairKnobs
) -> dict[str, dict[str, float]]:
    """Returns {measure: {video: value}}.

    Flicker is of consecutive frames, and so of all of them, also those that `knobs.leave_out_every` leaves out.

    Raises:
        UserError: a pair differs in size or length.
    """
    for pair in pairs:
        for video in pair:
            video.check_length(knobs.frames)
    values: dict[str, dict[str, float]] = {name: {} for name in by_name}
    for sample, reference in tqdm(pairs, desc="pairs", unit="video"):
        clip, true = sample.read(knobs.frames), reference.read(knobs.frames)
        if clip.shape != true.shape:
            sizes = " and ".join("{} frames of {}x{}".format(*x.shape[:3]) for x in (clip, true))
            hint = "; --frames N compares the first N" if clip.shape[1:] == true.shape[1:] else ""
            raise UserError(f"{sample.name} and its reference {reference.name} differ: {sizes}{hint}")
        whole = clip, true
        if knobs.leave_out_every is not None:
            between = np.arange(len(clip)) % knobs.leave_out_every != 0
            clip, true = clip[between], true[between]
        if not len(clip):
            raise UserError(f"{sample.name} has no frame between those that are left out")
        for name, measure in by_name.items():
            if name == "flicker" and len(whole[0]) < 2:
                raise UserError(f"{sample.name} has one frame, and flicker needs at least 2")
            values[name][sample.name] = measure(*(whole if name == "flicker" else (clip, true)))
    return values


def summary(values: Mapping[str, float], *, resamples: int, seed: int) -> dict[str, Any]:
    """Returns mean, median, standard error and the bootstrap interval of the mean over videos.

    The PSNR of equal clips is infinite, and so is then the mean; JSON stores None for both.
    """
    numbers = np.array(list(values.values()))
    result: dict[str, Any] = {"value": float(numbers.mean()), "median": float(np.median(numbers)), "n": len(numbers)}
    if len(numbers) > 1 and resamples and np.isfinite(numbers).all():
        rng = np.random.default_rng(seed)
        means = numbers[rng.integers(len(numbers), size=(resamples, len(numbers)))].mean(1)
        result["sd"] = float(numbers.std(ddof=1) / len(numbers) ** 0.5)
        result["interval"] = [float(x) for x in np.percentile(means, INTERVAL)]
    return result
