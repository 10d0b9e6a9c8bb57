"""FVD (arXiv 1812.01717) and KVD of a set of videos against a reference, with the values needed to interpret them.

Beside the distances stand the number of clips, a bootstrap interval, the value of real clips against other real clips
(FVD is mostly bias when there are few clips), and the motion of both sets, because FVD hardly minds a frozen video.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm.auto import tqdm

from lavie_jax.disk import new_file
from lavie_jax.errors import UserError
from lavie_jax.evaluation.distances import (
    bootstrap_deviation,
    frechet_distance,
    kernel_bootstrap_deviation,
    kernel_distance,
    real_against_real,
)
from lavie_jax.evaluation.i3d_features import ClipFeatures, Extractor, prepared
from lavie_jax.evaluation.protocols import FVDKnobs
from lavie_jax.evaluation.videos import Video, check_clips, check_rates, choose, too_few

NORMAL_95 = 1.96  # standard deviations of a 95 % interval
# Knobs that change a clip's features; the others only change which clips are taken, or what is computed from them.
OF_FEATURES = ("frames", "fps", "start", "crop", "crop_pixels", "resolution", "side", "filter", "antialias", "round")
OF_CLIPS = ("clips_per_video", "seed")  # `seed` matters for random starts only

Clips = Sequence[tuple[Video, int]]


class FeatureCache:
    """Features by the content of the file, the clip in it and the knobs; in a folder, or nowhere.

    Several processes may fill one folder.
    """

    def __init__(self, folder: Path | None, knobs: FVDKnobs, weights: str):
        self._folder, self._knobs = folder, knobs
        self._facts = {name: getattr(knobs, name) for name in OF_FEATURES} | {"weights": weights}

    def path(self, video: Video, part: int) -> Path | None:
        """Returns the file of a clip's features, which may not exist yet; None without a folder."""
        if self._folder is None:
            return None
        facts = self._facts | {"video": video.digest(), "part": part, "clips_per_video": self._knobs.clips_per_video}
        if self._knobs.start == "random":
            facts |= {
                "seed": self._knobs.seed,
                "name": video.name,
                "starts": "all",
            }  # earlier versions left out the last
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / key[:2] / f"{key[2:34]}.npz"

    def read(self, path: Path | None) -> ClipFeatures | None:
        """Returns stored features of one clip; None if they are missing or damaged."""
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return ClipFeatures(*(arrays[name] for name in ClipFeatures._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logging.warning("%s is damaged and is computed again", path)
            return None

    def write(self, path: Path | None, features: ClipFeatures) -> None:
        """Stores the features of one clip."""
        if path is not None:
            with new_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **features._asdict())


def compute_features(
    clips: Clips, knobs: FVDKnobs, extract: Extractor, cache: FeatureCache, *, batch_size: int, what: str
) -> ClipFeatures:
    """Returns the features of clips in their order, computing those that are not in the cache."""
    found: dict[int, ClipFeatures] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, Path | None, np.ndarray]]] = {}  # by shape: one program for each

    def flush(shape: tuple[int, ...]) -> None:
        """Computes and stores the features of the waiting clips of one shape."""
        rows = waiting.pop(shape)
        features = extract(np.stack([pixels for _, _, pixels in rows]))
        for k, (index, path, _) in enumerate(rows):
            found[index] = ClipFeatures(*(x[k : k + 1] for x in features))
            cache.write(path, found[index])
        bar.update(len(rows))

    with tqdm(total=len(clips), desc=what, unit="clip") as bar:
        for index, (video, part) in enumerate(clips):
            path = cache.path(video, part)
            if (stored := cache.read(path)) is not None:
                found[index] = stored
                bar.update(1)
                continue
            pixels = prepared(video.clip(knobs, part), knobs)
            waiting.setdefault(pixels.shape, []).append((index, path, pixels))
            if len(waiting[pixels.shape]) == batch_size:
                flush(pixels.shape)
        for shape in list(waiting):
            flush(shape)
    return ClipFeatures(*(np.concatenate([found[i][k] for i in range(len(clips))]) for k in range(3)))


def fvd(samples: ClipFeatures, reference: ClipFeatures, pool: ClipFeatures, knobs: FVDKnobs) -> dict[str, Any]:
    """Returns FVD and KVD with their intervals and real-against-real values, and the motion of both sets.

    Args:
        samples: features of the samples.
        reference: features of the reference clips that they are compared with.
        pool: features of all reference clips, of which disjoint halves give the real-against-real value.
        knobs: the settings.
    """
    ours, theirs, real = (getattr(features, knobs.features) for features in (samples, reference, pool))

    def frechet(a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(a, b, ddof=knobs.ddof)

    result: dict[str, Any] = {"n": len(ours), "n_reference": len(theirs)}
    deviations = {"fvd": functools.partial(bootstrap_deviation, frechet), "kvd": kernel_bootstrap_deviation}
    for name, distance in (("fvd", frechet), ("kvd", kernel_distance)):
        value = distance(ours, theirs)
        cell: dict[str, Any] = {"value": value}
        if knobs.resamples:
            deviation = deviations[name](ours, theirs, resamples=knobs.resamples, seed=knobs.seed)
            cell |= {"sd": deviation, "interval": [value - NORMAL_95 * deviation, value + NORMAL_95 * deviation]}
        if len(real) >= 4:
            cell["real_against_real"] = real_against_real(
                distance, real, clips=max(len(ours), len(theirs)), splits=knobs.splits, seed=knobs.seed
            )
        result[name] = cell
    moving, true = float(samples.motion.mean()), float(reference.motion.mean())
    result["motion"] = {"samples": moving, "reference": true, "ratio": moving / true if true else None}
    return result


def choose_reference(reference: Sequence[Video], count: int, knobs: FVDKnobs) -> Clips:
    """Returns the reference clips that `count` samples are compared with: as many, if there are more."""
    if knobs.clips is not None:
        return choose(reference, knobs, "--reference")
    every = choose(reference, knobs, "--reference")
    if len(every) <= count:
        return every
    return choose(reference, dataclasses.replace(knobs, clips=count), "--reference")


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """Features of a reference set in a file, with the knobs that they were computed with."""

    features: ClipFeatures
    facts: dict[str, Any]


def write_features(path: Path, features: ClipFeatures, knobs: FVDKnobs, facts: dict[str, Any]) -> None:
    """Stores the features of a set, which `--reference FILE` reads."""
    own = facts | {"knobs": {name: getattr(knobs, name) for name in (*OF_FEATURES, *OF_CLIPS)}}
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(own)), **features._asdict())


def read_features(path: Path, knobs: FVDKnobs, weights: str) -> StoredFeatures:
    """Reads the features of a set. Raises UserError if they are of another protocol or other weights."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            features = ClipFeatures(*(arrays[name] for name in ClipFeatures._fields))
            facts = json.loads(str(arrays["facts"]))
            theirs = {name: facts["knobs"][name] for name in OF_FEATURES}
            theirs |= {name: facts["knobs"][name] for name in OF_CLIPS if name in facts["knobs"]}
            if len({len(x) for x in features}) != 1 or features.logits.ndim != 2 or "videos_sha256" not in facts:
                raise ValueError(f"arrays of {', '.join(str(x.shape) for x in features)}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path} is not a file of features, or is damaged: {error}") from error
    ours = {name: getattr(knobs, name) for name in theirs if name != "seed" or knobs.start == "random"}
    if different := [name for name in ours if theirs[name] != ours[name]]:
        listed = ", ".join(f"{name} {theirs[name]!r} instead of {ours[name]!r}" for name in different)
        raise UserError(f"--reference {path} was computed by another protocol: {listed}")
    if facts.get("weights") != weights:
        raise UserError(f"--reference {path} was computed with other weights")
    return StoredFeatures(features, facts)


def measure(
    samples: list[Video],
    reference: list[Video] | Path,
    knobs: FVDKnobs,
    extract: Extractor,
    *,
    weights: str,
    cache: Path | None,
    batch_size: int,
    own_part: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Measures FVD and KVD of videos.

    Args:
        samples: the videos.
        reference: the videos that they are compared with, or a file of their features.
        knobs: the settings.
        extract: the network.
        weights: hash of its weights.
        cache: folder of stored features.
        batch_size: clips that are computed at once.
        own_part: (i, n): compute and store every n-th clip from the i-th on, and no distances.

    Returns:
        The fields of the result file, or None with `own_part`.
    """
    store = FeatureCache(cache, knobs, weights)
    options = {"batch_size": batch_size}
    chosen = choose(samples, knobs, "--samples")
    stored = read_features(reference, knobs, weights) if isinstance(reference, Path) else None
    sets = {"--samples": samples} | ({} if stored else {"--reference": reference})
    rates = check_rates(sets, knobs, {"--reference": stored.facts.get("rates", [])} if stored else None)
    pool = [] if stored else [(video, part) for video in reference for part in range(knobs.clips_per_video)]
    for flag, clips in (("--samples", chosen), ("--reference", pool)):
        if len(clips) < 2 and not (stored and flag == "--reference"):
            raise UserError(f"{flag} has {len(clips)} clip, and FVD needs at least 2; few clips bias it upwards")
    if stored and (have := len(stored.features.logits)) < (knobs.clips or 0):
        raise too_few("--reference", have, knobs.clips)
    compared = [] if stored else choose_reference(reference, len(chosen), knobs)
    check_clips([*chosen, *pool], knobs)
    if own_part is not None:
        index, parts = own_part
        for what, clips in (("samples", chosen), ("reference", pool)):
            if own := clips[index::parts]:
                compute_features(own, knobs, extract, store, what=what, **options)
        return None
    ours = compute_features(chosen, knobs, extract, store, what="samples", **options)
    if stored:
        real, count = stored.features, knobs.clips or len(chosen)
        order = np.random.default_rng(knobs.seed).permutation(len(real.logits))[:count]
        theirs = ClipFeatures(*(x[np.sort(order)] for x in real))
    else:
        real = compute_features(pool, knobs, extract, store, what="reference", **options)
        position = {key: i for i, key in enumerate(pool)}
        rows = np.array([position[key] for key in compared])
        theirs = ClipFeatures(*(x[rows] for x in real))
    facts = {
        "samples_sha256": set_hash([video for video, _ in chosen]),
        "reference_sha256": stored.facts["videos_sha256"] if stored else set_hash(reference),
        "rates": {flag.removeprefix("--"): own for flag, own in rates.items()},
        "weights_sha256": weights,
    }
    return fvd(ours, theirs, real, knobs) | facts


def set_hash(videos: Sequence[Video]) -> str:
    """Returns a hash of the contents of a set of videos, whatever their names and order."""
    digests = sorted({video.name: video.digest() for video in videos}.values())
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def stored_kind(path: str) -> bool:
    """Whether a reference is a file of features."""
    return path.endswith(".npz") and os.path.isfile(path)
