"""Measures how FVD and KVD react to known distortions of a real film, Big Buck Bunny.

    python benchmarks/fvd_on_film.py --film bbb.mp4 --out runs/fvd [--clips 16] [--unpaired 64]

The film is in the source package moviepy==2.2.1 (docs/evaluation.md). Clips are windows of 16 frames at 8 fps in a
shot, the central square scaled to 64x64 or 224x224 pixels. Three series of distortions, each in three strengths:

* blur: Gaussian, sigma 0.5, 1, 2 pixels of 64 (3.5 times that at 224);
* noise: Gaussian, sigma 5, 15, 40 of 255;
* shuffle: neighbouring frames swapped; order random within groups of 4; order random.

"paired" compares `--clips` clips with their own distorted versions. "unpaired" compares `--unpaired` clips of 64x64
with the strongest distortions of as many others, minus the value without distortion. Features are kept in --out, so an
interrupted run resumes.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from lavie_jax.data.video_files import each_frame
from lavie_jax.disk import new_file
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.evaluation.distances import frechet_distance, kernel_distance, real_against_real
from lavie_jax.evaluation.i3d_features import Extractor
from lavie_jax.evaluation.protocols import FVDKnobs
from lavie_jax.weights.metric_weights import I3D_WEIGHTS, load_weights

FRAMES, STRIDE = 16, 3  # 16 frames at 8 of the film's 24 frames per second
SPAN = STRIDE * (FRAMES - 1) + 1
FIRST, LAST = 48 * 24, 485 * 24  # without titles and credits
CUT = 18.0  # of 255: mean difference of the thumbnails of consecutive frames in different shots
DARK = 12.0
SERIES = ("blur", "noise", "shuffle")


def square(frame: np.ndarray, side: int) -> np.ndarray:
    """Scales the central square, antialiased bicubic."""
    height, width = frame.shape[:2]
    left = (width - height) // 2
    picture = Image.fromarray(frame[:, left : left + height])
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def windows(film: Path, wanted: int) -> np.ndarray:
    """Returns (n, 16, 224, 224, 3): consecutive windows without a cut and not dark, chosen evenly over the film."""
    found, frames, thumbnail = [], [], None
    for i, frame in enumerate(tqdm(each_frame(film, first=FIRST), total=LAST - FIRST, desc="film", unit="frame")):
        if FIRST + i >= LAST:
            break
        small = frame[8::16, 8::16].astype(np.float32).mean(-1)
        if (thumbnail is not None and np.abs(small - thumbnail).mean() > CUT) or small.mean() < DARK:
            frames, start = [], i + 1
        elif not frames:
            start = i
        thumbnail = small
        if (i - start) % STRIDE == 0 and small.mean() >= DARK:
            frames.append(square(frame, 224))
        if len(frames) == FRAMES:
            found.append(np.stack(frames))
            frames = []
    order = np.random.default_rng(0).permutation(len(found))[:wanted]
    print(f"{len(found)} windows, {len(order)} of them used")
    return np.stack([found[k] for k in order])


def distorted(clips: np.ndarray, series: str, strength: int) -> np.ndarray:
    """Returns uint8 clips (n, t, h, w, 3), distorted with strength 1, 2 or 3."""
    rng = np.random.default_rng([SERIES.index(series), strength])
    if series == "blur":
        sigma = (0.5, 1, 2)[strength - 1] * clips.shape[2] / 64
        return gaussian_filter(clips.astype(np.float32), (0, 0, sigma, sigma, 0)).round().clip(0, 255).astype(np.uint8)
    if series == "noise":
        noise = rng.normal(0, (5, 15, 40)[strength - 1], clips.shape)
        return (clips + noise).round().clip(0, 255).astype(np.uint8)
    if strength == 1:
        return clips[:, np.arange(FRAMES) ^ 1]
    group = 4 if strength == 2 else FRAMES
    orders = [
        np.concatenate([start + rng.permutation(group) for start in range(0, FRAMES, group)]) for _ in range(len(clips))
    ]
    return np.stack([clip[order] for clip, order in zip(clips, orders)])


def store(path: Path, array: np.ndarray) -> None:
    """Writes an array in one piece, so that an interrupted run can resume."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def main() -> None:
    """Extracts features, and prints and stores the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the features and of results.json")
    parser.add_argument("--clips", type=int, default=16, help="clips of the paired series (default: %(default)s)")
    parser.add_argument("--sizes", default="64,224", help="sides of the paired series (default: %(default)s)")
    parser.add_argument("--unpaired", type=int, default=0, help="clips on each side of the unpaired table")
    parser.add_argument("--i3d", type=Path, help="the archive or file of the weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source, needed = args.out / "windows.npy", max(args.clips, 2 * args.unpaired)
    if not source.exists() or len(np.load(source, mmap_mode="r")) < needed:  # of an earlier run with fewer clips
        store(source, windows(args.film, needed))
    large = np.load(source, mmap_mode="r")
    if len(large) < needed:
        raise UserError(f"the film has {len(large)} windows, and --clips and --unpaired need {needed}")
    extract = Extractor(load_weights(I3D_WEIGHTS, args.i3d), FVDKnobs())
    cost = []

    def features(name: str, clips: np.ndarray) -> np.ndarray:
        """Returns the logits of clips, a stored array as far as it goes."""
        path = args.out / f"{name}.npy"
        done = np.load(path) if path.exists() else np.zeros((0, 400), np.float32)
        for i in tqdm(range(len(done), len(clips)), desc=name, unit="clip", disable=len(done) >= len(clips)):
            began = time.process_time()
            done = np.concatenate([done, extract(clips[i : i + 1]).logits])
            cost.append(time.process_time() - began)
            store(path, done)
        return done[: len(clips)]

    result: dict = {"paired": {}, "n": args.clips}
    small = np.stack([np.stack([square(f, 64) for f in clip]) for clip in large])
    for side in map(int, args.sizes.split(",")):
        clips = small[: args.clips] if side == 64 else np.asarray(large[: args.clips])
        true = features(f"true-{side}", clips)
        for series in SERIES:
            rows = [features(f"{series}{k}-{side}", distorted(clips, series, k)) for k in (1, 2, 3)]
            result["paired"][f"{series} {side}"] = {
                "fvd": [frechet_distance(true, x) for x in rows], "kvd": [kernel_distance(true, x) for x in rows]
            }  # fmt: skip
            print(side, series, result["paired"][f"{series} {side}"], flush=True)
    if args.unpaired:
        n = args.unpaired
        true = features("true-64", small[: 2 * n])
        a, b = true[n:], true[:n]
        floor = frechet_distance(a, b)
        result["unpaired"] = {"n": n, "floor": floor} | {
            "random splits": real_against_real(frechet_distance, true, clips=n, splits=20, seed=0)
        }
        for series in SERIES:
            x = features(f"{series}3-64", distorted(small[:n], series, 3))
            result["unpaired"][series] = frechet_distance(a, x) - floor
        print(result["unpaired"])
    if len(cost) > 4:
        result["cpu_seconds_a_clip"] = float(np.median(cost))
    (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    with one_line_errors():
        main()
