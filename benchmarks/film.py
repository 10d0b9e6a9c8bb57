"""Measures the models of real film on shots that training did not see, beside methods without learning.

    python tools/real_film.py --out data/film
    python benchmarks/film.py --data data/film --out runs/film-measures [--weights DIR] [--tasks vsr,live]

A run is the first 33 frames of a held-out shot of Big Buck Bunny, the central square at 256x256. The tasks:

* vsr: every second frame of a run, 16 in all, from the mean of 4x4 pixels;
* interpolation: every second frame (17) and every fourth (9) of a run, of which every fourth is given. Only the frames
  between are measured;
* live: super-resolution of live-action clips, the 8 middle frames of each;
* times: wall and CPU seconds per output frame, for sizes from 360p to 1440p.

Means are over shots, with the interval of the paired difference to the best method without learning (2000 resamples of
the shots). Writes results.json, and sheets and videos side by side. LPIPS needs `python tools/metric_weights.py`.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import lavie_jax
from lavie_jax.data.video_files import each_frame, read_clip
from lavie_jax.disk import new_file
from lavie_jax.errors import Parser, UserError, one_line_errors, user_location
from lavie_jax.evaluation.fidelity import flicker, psnr, ssim
from lavie_jax.evaluation.frame_measures import Lpips

LENGTH, SIDE, FACTOR, SPACING = 33, 256, 4, 4
LPIPS_EVERY = 2  # of the measured frames, one in so many is measured by LPIPS, which takes the most time
TASKS = ("vsr", "interpolation", "live", "times")
FILTERS = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
HIGHER = {"psnr": True, "ssim": True, "lpips": False, "flicker": False}
LIVE = ("bikes.mp4", "cityCC0.mpg", "carphone_pristine.mp4")
SIZES = {"360p": (360, 640), "480p": (480, 848), "720p": (720, 1280), "1080p": (1080, 1920), "1440p": (1440, 2560)}

Clip = np.ndarray  # uint8 (T, H, W, 3)


def square(frame: np.ndarray) -> np.ndarray:
    """Scales the central square, antialiased bicubic."""
    height, width = frame.shape[:2]
    left = (width - height) // 2
    return np.asarray(Image.fromarray(frame[:, left : left + height]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def runs(data: Path, most: int) -> dict[str, Clip]:
    """Returns the run of each shot that is long enough, cached in the data folder."""
    cache = data / "runs.npz"
    if not cache.exists():
        held = json.loads((data / "held_out.json").read_text())
        found: dict[str, list] = {}
        starts = {}
        for shot, (first, last) in enumerate(held["frames"]):
            if last - first >= LENGTH:
                starts[f"{shot:02d}"] = first
        end = max(starts.values()) + LENGTH
        for index, frame in enumerate(tqdm(each_frame(data / "videos" / held["film"]), total=end, desc="film")):
            if index >= end:
                break
            for name, start in starts.items():
                if start <= index < start + LENGTH:
                    found.setdefault(name, []).append(square(frame))
        with new_file(cache) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: np.stack(frames) for name, frames in found.items()})
    stored = np.load(cache)
    return {name: stored[name] for name in list(stored)[:: -(-len(stored) // most)]}  # evenly over the film


def shrunk(clip: Clip) -> Clip:
    """Returns the mean of squares of 4x4 pixels."""
    t, h, w, c = clip.shape
    means = clip.reshape(t, h // FACTOR, FACTOR, w // FACTOR, FACTOR, c).astype(np.float32).mean((2, 4))
    return (means + 0.5).astype(np.uint8)


def enlargements(low: Clip) -> Iterator[tuple[str, Clip]]:
    """Yields the enlargements by fixed filters."""
    size = (low.shape[2] * FACTOR, low.shape[1] * FACTOR)
    for name, kind in FILTERS.items():
        yield name, np.stack([np.asarray(Image.fromarray(frame).resize(size, kind)) for frame in low])


def inbetweens(keys: Clip) -> Iterator[tuple[str, Clip]]:
    """Yields 4 (K - 1) + 1 frames by repeating and by cross-fading key frames, and by optical flow if it is there."""
    at = np.arange(SPACING * (len(keys) - 1) + 1)
    yield "repeat", keys[(at + 1) // SPACING]
    before, after = at // SPACING, -(-at // SPACING)
    share = (at % SPACING / SPACING)[:, None, None, None].astype(np.float32)
    yield "blend", ((1 - share) * keys[before] + share * keys[after] + 0.5).astype(np.uint8)
    try:
        import cv2
    except ImportError:
        return
    shares = (at % SPACING / SPACING).tolist()
    yield "flow", np.stack([flowed(cv2, keys[b], keys[a], share) for share, b, a in zip(shares, before, after)])


def flowed(cv2: Any, before: np.ndarray, after: np.ndarray, tau: float) -> np.ndarray:
    """Returns the frame at `tau` by DIS optical flow in both directions, warped and cross-faded."""
    if not tau:
        return before
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (before, after)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rows, columns = np.mgrid[: before.shape[0], : before.shape[1]].astype(np.float32)

    def warped(image: np.ndarray, source: int, share: float) -> np.ndarray:
        field = flow.calc(grey[source], grey[1 - source], None)
        at = columns - share * field[..., 0], rows - share * field[..., 1]
        return cv2.remap(image.astype(np.float32), *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    mixed = (1 - tau) * warped(before, 0, tau) + tau * warped(after, 1, 1 - tau)
    return (mixed + 0.5).clip(0, 255).astype(np.uint8)


def table(
    clips: dict[str, Clip],
    made: Callable[[Clip], Iterator[tuple[str, Clip]]],
    measured: np.ndarray,
    lpips: Lpips | None,
) -> dict[str, Any]:
    """Returns the means and medians of each method, and the paired differences between the model and the others.

    Args:
        clips: the true clips.
        made: yields (method, clip) for a true clip; the last one is the model's.
        measured: which frames count for all measures but flicker.
        lpips: LPIPS; None leaves it out.
    """
    values: dict[str, dict[str, dict[str, float]]] = {}
    for name, true in tqdm(clips.items(), unit="clip"):
        for method, clip in made(true):
            one = {"psnr": psnr(clip[measured], true[measured]), "ssim": ssim(clip[measured], true[measured])}
            one["flicker"] = flicker(clip, true)
            if lpips:
                one["lpips"] = lpips(clip[measured][::LPIPS_EVERY], true[measured][::LPIPS_EVERY])
            values.setdefault(method, {})[name] = one
    names = list(next(iter(values.values())).values())[0]
    result: dict[str, Any] = {"clips": len(clips), "methods": {}, "paired": {}, "each": values}
    for method, by_clip in values.items():
        columns = {m: np.array([one[m] for one in by_clip.values()]) for m in names}
        result["methods"][method] = {m: [float(x.mean()), float(np.median(x))] for m, x in columns.items()}
    *others, model = values
    for m in names:
        mean = {method: result["methods"][method][m][0] for method in others}
        best = max(mean, key=mean.get) if HIGHER[m] else min(mean, key=mean.get)
        shots = np.array([values[model][name][m] - values[best][name][m] for name in values[model]])
        draws = np.random.default_rng(0).integers(len(shots), size=(2000, len(shots)))
        low, high = np.percentile(shots[draws].mean(1), (2.5, 97.5))
        result["paired"][m] = {"against": best, "difference": float(shots.mean()), "interval": [low, high]}
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a table: mean (median)."""
    for method, columns in result["methods"].items():
        print(f"{method:10}", *(f"{m} {mean:7.3f} ({median:.3f})" for m, (mean, median) in columns.items()))
    for m, pair in result["paired"].items():
        low, high = pair["interval"]
        print(f"{m} against {pair['against']}: {pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")


def times(cascade: Any) -> dict[str, Any]:
    """Returns wall and CPU seconds per output frame, without compilation, by stage and size of the output."""
    result: dict[str, Any] = {}
    for name, (height, width) in SIZES.items():
        for stage, count, factor in (("vsr", 2, FACTOR), ("interpolation", 2, 1)):
            rows, columns = (side // factor // 2 * 2 for side in (height, width))
            clip = np.random.default_rng(0).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)
            cascade("clip", stages=stage, clip=clip)  # compiles
            wall, cpu = time.perf_counter(), time.process_time()
            frames = len(cascade("clip", stages=stage, clip=clip)[0])
            seconds = [(time.perf_counter() - wall) / frames, (time.process_time() - cpu) / frames]
            result.setdefault(stage, {})[name] = seconds
            print(f"{stage} {name}: {seconds[0]:.2f} s a frame, {seconds[1]:.2f} s of CPU", flush=True)
    return result


def sheet(path: Path, columns: list[tuple[str, Clip]], frames: list[int]) -> None:
    """Writes a picture with a row for each of `frames` and a column for each clip."""
    Image.fromarray(np.concatenate([np.concatenate([clip[i] for _, clip in columns], 1) for i in frames])).save(path)
    print(f"{path}: {', '.join(name for name, _ in columns)}")


def main() -> None:
    """Runs the tasks, and prints and stores the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of tools/real_film.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and the pictures")
    parser.add_argument("--weights", type=user_location, default="film", help="weights folder (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=1000, help="most runs that are measured (default: all)")
    parser.add_argument("--steps", type=int, default=1, help="steps of sampling (default: 1)")
    parser.add_argument("--no-lpips", action="store_true", help="leave out LPIPS")
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        raise UserError(f"--tasks: unknown {', '.join(sorted(unknown))}. Allowed: {', '.join(TASKS)}")
    if args.runs < 1 or args.steps < 1:
        raise UserError(f"--runs and --steps must be at least 1; given {args.runs} and {args.steps}")
    if not (args.data / "held_out.json").is_file():
        raise UserError(f"{args.data} is not a folder of tools/real_film.py: it has no held_out.json")
    if "live" in tasks and (missing := [name for name in LIVE if not (args.data / "live" / name).is_file()]):
        raise UserError(
            f"{args.data / 'live'} has no {', '.join(missing)}: run tools/real_film.py, or leave out `live`"
        )
    if "interpolation" in tasks and importlib.util.find_spec("cv2") is None:
        print("Flow is left out, because opencv-python is not installed.")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    lpips = None if args.no_lpips else Lpips(None, spatial=False)
    cascade = lavie_jax.load(args.weights)

    def larger(true: Clip) -> Iterator[tuple[str, Clip]]:
        low = shrunk(true)
        yield from enlargements(low)
        yield "model", cascade("clip", stages="vsr", clip=low, vsr={"steps": args.steps})[0]

    def smoother(true: Clip) -> Iterator[tuple[str, Clip]]:
        keys = true[::SPACING]
        yield from inbetweens(keys)
        yield "model", cascade("clip", stages="interpolation", clip=keys, interpolation={"steps": args.steps})[0]

    def store(name: str, result: Any) -> None:
        results[name] = result
        file.write_text(json.dumps(results, indent=1) + "\n")

    clips = runs(args.data, args.runs) if {"vsr", "interpolation"} & set(tasks) else {}
    if "vsr" in tasks:
        true = {name: clip[:-1:2] for name, clip in clips.items()}
        store("vsr", table(true, larger, np.ones(16, bool), lpips))
        for name in list(true)[:: max(1, len(true) // 4)]:
            shown = [one for one in larger(true[name]) if one[0] in ("nearest", "lanczos", "model")]
            sheet(args.out / f"vsr-{name}.png", [*shown, ("true", true[name])], [0, 8])
            columns = np.concatenate([clip for _, clip in [*shown, ("true", true[name])]], axis=2)
            lavie_jax.save_video(columns, args.out / f"vsr-{name}.mp4", fps=12)
    if "interpolation" in tasks:
        for every in (2, 4):
            true = {name: clip[::every] for name, clip in clips.items()}
            between = np.arange(len(next(iter(true.values())))) % SPACING != 0
            task = f"interpolation, every {every}"
            store(task, table(true, smoother, between, lpips))
            for name in list(true)[:: max(1, len(true) // 4)]:
                columns = [*smoother(true[name]), ("true", true[name])]
                sheet(args.out / f"interpolation-{every}-{name}.png", columns, [1, 2, 3])
    if "live" in tasks:
        for name in LIVE:
            frames, _ = read_clip(args.data / "live" / name)
            middle = len(frames) // 2
            height, width = (side // FACTOR * FACTOR for side in frames.shape[1:3])
            true = {name: frames[middle - 4 : middle + 4, :height, :width]}
            print(name)
            store(name, table(true, larger, np.ones(8, bool), lpips))
    if "times" in tasks:
        store("seconds per frame", times(cascade))


if __name__ == "__main__":
    with one_line_errors():
        main()
