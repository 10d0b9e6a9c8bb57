"""Measures the cost of feeding training: clips per second and core of each source, where the time goes, and memory.

    python benchmarks/data_loading.py                            # all four parts
    python benchmarks/data_loading.py --clips 1 --records 200    # a smoke test

Generates clips of 10 seconds at 24 fps, a panning texture with grain, H.264 crf 23, of 360x640 (close to WebVid's
size) and 720x1280. A training clip is 16 frames at 8 fps of 320x512, without images. Sets of latents hold random
numbers in the shapes of Stable Diffusion's VAE and text encoder. Prints tables for docs/data.md. Needs Linux; the part
`curation` needs the extra of that name.

sources   in one process: CPU seconds per example, and the fractions for decoding and for resizing and cropping; then
          wall time of the whole pipeline with 0, 1 and 2 worker processes (grain)
memory    anonymous memory of the process while it reads that many records once
curation  hours of video per core-hour that `python -m lavie_jax.curation` reports with one worker, for files of four
          scenes, 20 seconds of 720x1280
demand    FLOPs of a training step of configs/base.py (traced, per clip), from pixels and from latents; how many clips
          per second a v5e chip could process at its peak, and how many cores of its host feed it then. Real steps
          are slower, so this is an upper bound.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from memory import anonymous_bytes
from PIL import Image

from lavie_jax.curation import output
from lavie_jax.data import latents, pipeline, shards, transforms, video_files
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.pipeline import Examples
from lavie_jax.errors import Parser, one_line_errors

ROOT = Path(__file__).parents[1]
SIZE, FRAMES, FPS, SECONDS, RATE = (320, 512), 16, 8.0, 10, 24
STORED = {"360p": (360, 640), "720p": (720, 1280)}
LATENTS, TEXT = (SIZE[0] // 8, SIZE[1] // 8, 8), (77, 768)
CHIP, CHIPS_PER_HOST = "v5e", 8  # a host of ct5lp-hightpu-8t has 8 chips and 224 vCPUs
BATCHES = 6  # per measurement of workers


def film(seed: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields frames of a camera that pans over a texture with grain, which is not trivial to encode."""
    rng, (height, width) = np.random.default_rng(seed), size
    spots = rng.integers(0, 256, (height // 30, width // 15, 3), np.uint8)
    land = np.asarray(Image.fromarray(spots).resize((2 * width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 4, (height, width, 1))
    for i in range(SECONDS * RATE):
        view = land[:, 2 * i % width :][:, :width]
        yield np.clip(view + np.roll(grain, 7 * i, axis=1), 0, 255).astype(np.uint8)


def make_clips(folder: Path, count: int, different: int) -> None:
    """Writes `folder/KIND-SIZE` for each kind of storage and size, with `count` captions but only `different` clips."""
    for name, (height, width) in STORED.items():
        files = []
        for seed in range(different):
            path = folder / f"{name}-{seed}.mp4"
            frames = film(seed, (height, width))
            video_files.encode(frames, path, height=height, width=width, fps=RATE, options={"crf": "23", "g": "48"})
            files.append(path.read_bytes())
        rows = [{"video": files[i % len(files)], "caption": f"a landscape, number {i}"} for i in range(count)]
        loose = folder / f"video_folder-{name}"
        loose.mkdir()
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, row in enumerate(rows):
                (loose / f"{i:05d}.mp4").write_bytes(row["video"])
                (loose / f"{i:05d}.txt").write_text(row["caption"])
                for suffix in ("mp4", "txt"):
                    tar.add(loose / f"{i:05d}.{suffix}", f"{i:05d}.{suffix}")
        (folder / f"webdataset-{name}").mkdir()
        shutil.move(folder / f"{name}.tar", folder / f"webdataset-{name}")
        shards.write_shards(rows, folder / f"array_record-{name}")
        shards.write_tfds(folder / f"array_record-{name}", folder / "tfds" / name)


def make_latents(folder: Path, count: int, *, frames: int, size: tuple[int, int], text: tuple[int, int]) -> Path:
    """Writes a set of random latents in the layout of `lavie_jax.curation --latents`."""
    rng, shape = np.random.default_rng(0), (frames, size[0] // 8, size[1] // 8, 8)
    rows = (
        {
            **latents.packed("latents", rng.normal(size=shape).astype(np.float16)),
            **latents.packed("text", rng.normal(size=text).astype(np.float16)),
            "caption": f"a landscape, number {i}",
        }
        for i in range(count)
    )
    paths = shards.write_shards(rows, folder / latents.size_name(size))
    np.save(folder / latents.NULL_TEXT, np.zeros(text, np.float16))
    entry = {
        "format": latents.FORMAT, "medium": "video", "sizes": [[list(size), count]], "fps": FPS, "null_caption": "",
        "weights": {}, "made_from": "random numbers",
    }  # fmt: skip
    files = output.file_hashes(folder, [*paths, folder / latents.NULL_TEXT])
    output.write_manifest(folder, {"latents": entry, "files": files})
    return folder


@contextlib.contextmanager
def timed(module: object, name: str) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the CPU seconds spent so far in a function of a module."""
    real, spent = getattr(module, name), [0.0]

    def counted(*args, **kwargs):
        """Calls the function and adds its CPU seconds to the total."""
        start = time.process_time()
        try:
            return real(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - start

    with mock.patch.object(module, name, counted):
        yield lambda: spent[0]


def measure_source(config: DataConfig, clips: int) -> tuple[float, float, float]:
    """Returns CPU seconds per training clip, and the fractions for decoding and for resizing and cropping."""
    examples = Examples(config, make_source(config))
    examples[0]
    with timed(video_files, "read_window") as decoding, timed(transforms, "resize_crop") as scaling:
        start = time.process_time()
        for i in range(1, clips + 1):
            example = examples[i]
            frames = example.get("video", example.get("video_latents"))
            _ = transforms.to_float(frames) if frames.dtype == np.uint8 else frames.astype(np.float32)
        total = time.process_time() - start
    return total / clips, decoding() / total, scaling() / total


def measure_workers(config: DataConfig, workers: int, batch: int) -> float:
    """Returns clips per second of wall time, after the workers have started and filled their buffers."""
    with contextlib.closing(
        pipeline.batches(pipeline.open_examples(config, batch_size=batch), None, workers=workers)
    ) as rows:
        for _ in range(2 + 2 * workers):
            next(rows)
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(rows)
        return BATCHES * batch / (time.perf_counter() - start)


def sources(folder: Path, clips: int) -> dict[str, float]:
    """Prints the table; returns clips per second and core by row name."""
    count = max(32, clips)
    make_clips(folder, count, min(clips, 4))
    common = {"frames": FRAMES, "fps": FPS, "height": SIZE[0], "width": SIZE[1], "images": 0}
    configs = {
        f"`{kind}`, {name}": DataConfig(source=kind, path=str(path), **common)
        for name in STORED
        for kind, path in (
            *((kind, folder / f"{kind}-{name}") for kind in ("video_folder", "webdataset", "array_record")),
            ("tfds", folder / "tfds" / name / "lavie_clips" / "1.0.0"),
        )
    }
    encoded = make_latents(folder / "latents", count, frames=int(SECONDS * FPS), size=SIZE, text=TEXT)
    configs["`latents`"] = DataConfig(source="latents", path=str(encoded), **common)
    configs["`moving_shapes`"] = DataConfig(**common)
    print("| source | clips/s per core | decode | resize and crop | rest | no workers | 1 worker | 2 workers |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rates = {}
    for name, config in configs.items():
        seconds, decode, scale = measure_source(config, clips)
        rates[name] = 1 / seconds
        shares = " | ".join(f"{share:.0%}" for share in (decode, scale, 1 - decode - scale))
        speeds = " | ".join(f"{measure_workers(config, workers, 2):.1f}" for workers in (0, 1, 2))
        print(f"| {name} | {1 / seconds:.1f} | {shares} | {speeds} |", flush=True)
    return rates


def memory(folder: Path, records: int) -> None:
    """Prints the memory after each tenth of the records, for small clips and for latents."""
    path = folder / "small.mp4"
    frames = (frame[:64, :64] for frame in film(0, (72, 128)))
    video_files.encode(frames, path, height=64, width=64, fps=RATE, options={"crf": "30"})
    rows = ({"video": path.read_bytes(), "caption": f"number {i}"} for i in range(records))
    shards.write_shards(rows, folder / "many")
    many = make_latents(folder / "many-latents", records, frames=4, size=(64, 64), text=(8, 16))
    common = {"frames": 2, "fps": FPS, "height": 64, "width": 64, "images": 1}
    print(f"MB of anonymous memory after each tenth of {records} records")
    for kind, where in (("array_record", folder / "many"), ("latents", many)):
        config, megabytes = DataConfig(source=kind, path=str(where), **common), []
        with contextlib.closing(pipeline.batches(pipeline.open_examples(config, batch_size=4), None)) as batches:
            for step in range(records // 4):
                next(batches)
                if (step + 1) % max(1, records // 40) == 0:
                    megabytes.append(f"{anonymous_bytes(os.getpid()) / 1e6:.0f}")
        print(f"`{kind}`: {', '.join(megabytes)}", flush=True)


def curation(folder: Path, files: int) -> None:
    """Prints the summary of a curation run on generated files, whose scenes are all kept."""
    videos, (height, width) = folder / "videos", STORED["720p"]
    videos.mkdir()
    for i in range(files):
        scenes = (itertools.islice(film(4 * i + k, (height, width)), 5 * RATE) for k in range(4))
        video_files.encode(
            itertools.chain.from_iterable(scenes), videos / f"{i}.mp4", height=height, width=width, fps=RATE,
            options={"crf": "23", "g": "48"},
        )  # fmt: skip
        (videos / f"{i}.txt").write_text(f"a camera pans over a landscape, number {i}")
    command = [sys.executable, "-m", "lavie_jax.curation", "--input", videos, "--out", folder / "out", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    print(done.stdout.strip(), flush=True)


def demand(rates: dict[str, float]) -> None:
    """Prints how many clips a chip can process at most, and the cores that this takes at `rates`."""
    import jax
    import jax.numpy as jnp

    from lavie_jax.flops import count_flops
    from lavie_jax.planner.chips import CHIPS
    from lavie_jax.planner.training import abstract_batch, abstract_init
    from lavie_jax.training import build, optimizer, options
    from lavie_jax.training.state import abstract_params, make_state
    from lavie_jax.training.step import make_update

    sys.path.insert(0, str(ROOT))  # so that configs can import each other
    needs = {}
    for source in ("video_folder", "latents"):
        config = options.load(str(ROOT / "configs/base.py"))
        config.data.source, config.data.image_path = source, None
        task = build.stage_task(config, jnp.bfloat16, abstract_init(config))
        tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
        state = jax.eval_shape(lambda p, task=task, tx=tx: make_state(p, task, tx), abstract_params(task))
        update = make_update(task, tx, ema_decay=config.ema_decay)
        count = count_flops(jax.make_jaxpr(update)(state, task.frozen, abstract_batch(config, 1), jax.random.key(0)))
        needs[source] = CHIPS[CHIP].flops / count
        print(
            f"{source}: {count / 1e12:.1f} TFLOPs, a clip of {config.data.frames} frames, {config.data.images} images; "
            f"a {CHIP} chip at its peak processes {needs[source]:.2f} clips/s",
            flush=True,
        )
    for name, rate in rates.items():
        most = needs["latents" if "latents" in name else "video_folder"]
        print(f"{name}: at most {CHIPS_PER_HOST * most / rate:.1f} cores for {CHIPS_PER_HOST} chips")


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("sources", "memory", "curation", "demand"), help="run only this part")
    parser.add_argument("--clips", type=int, default=40, help="clips per source (default: %(default)s)")
    parser.add_argument(
        "--records", type=int, default=10_000, help="records for the part memory (default: %(default)s)"
    )
    parser.add_argument("--dir", type=Path, help="where to create the temporary folder")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        if args.part in (None, "sources"):
            rates = sources(Path(temporary), args.clips)
        if args.part in (None, "memory"):
            memory(Path(temporary), args.records)
        if args.part in (None, "curation"):
            curation(Path(temporary), 4)
    if args.part in (None, "demand"):
        demand(rates)


if __name__ == "__main__":
    with one_line_errors():
        main()
