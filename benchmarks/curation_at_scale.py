"""Measures the curation and reading of large sets: duplicates, statistics, opening of shards, many hosts.

    python benchmarks/curation_at_scale.py duplicates --clips 10000 100000 --local-clips 1000000 --plot duplicates.png
    python benchmarks/curation_at_scale.py statistics --clips 1000000 --out statistics
    python benchmarks/curation_at_scale.py opening --shards 10000 --sets 5
    python benchmarks/curation_at_scale.py hosts --hosts 256 --clips 200000 --sets 5

All data are synthetic. `duplicates` and `statistics` run on Beam's DirectRunner in one process (extra curation-beam),
and print CPU seconds, so that other work on the machine does not count. DirectRunner keeps all shuffled data in memory,
30 kB for each clip: numbers of `--local-clips` are measured without it. Results are in docs/data.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lavie_jax.curation import beam_duplicates, beam_steps, report
from lavie_jax.curation.duplicates import MAX_COLOUR_DIFFERENCE, Fingerprints
from lavie_jax.curation.statistics import Statistics
from lavie_jax.data import mixture, shard_index, shards
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.records import name_hash
from lavie_jax.data.sources import permutation
from lavie_jax.errors import Parser, one_line_errors

BITS = 16
PLANTED = 0.1  # fraction of clips that are near-duplicates of others
SCENES = 32  # of a synthetic video


# ---- near-duplicates ----


def synthetic_clips(clips: int, seed: int = 0) -> tuple[Fingerprints, np.ndarray]:
    """Returns fingerprints, and which are planted: copies of an earlier clip, also of a copy, with changed bits."""
    rng = np.random.default_rng(seed)
    bits, colours = rng.bytes(32 * clips), rng.bytes(192 * clips)
    bits = np.frombuffer(bits, np.uint8).reshape(clips, 32).copy()
    colours = np.frombuffer(colours, np.uint8).reshape(clips, 192).copy()
    planted = np.flatnonzero(rng.random(clips) < PLANTED)
    planted = planted[planted > 0]
    for i in planted:
        of = int(rng.integers(i))
        flipped = np.zeros(256, np.uint8)
        flipped[rng.choice(256, rng.integers(BITS + 1), replace=False)] = 1
        bits[i] = bits[of] ^ np.packbits(flipped)
        noise = rng.integers(-MAX_COLOUR_DIFFERENCE, MAX_COLOUR_DIFFERENCE + 1, 192)
        colours[i] = np.clip(colours[of].astype(int) + noise, 0, 255)
    video, scene = np.divmod(np.arange(clips), SCENES)
    return Fingerprints(video * beam_duplicates.SCENES + scene, bits.view(np.uint64), colours), planted


def find(prints: Fingerprints) -> beam_duplicates.Matches:
    """Returns what the pipeline drops of the clips, and for which others."""
    import apache_beam as beam

    with tempfile.TemporaryDirectory() as folder:

        def store(pair: tuple) -> None:
            np.save(f"{folder}/{pair[0]}-{time.time_ns()}.npy", np.array(pair[1]))

        with beam.Pipeline() as root:
            batches = root | beam.Create(beam_duplicates.by_group(prints))
            _ = beam_duplicates.find_duplicates(batches, BITS) | beam.Map(store)
        return beam_duplicates.least([tuple(np.load(path)) for path in Path(folder).glob("*.npy")])


def largest_bucket(prints: Fingerprints) -> int:
    """Returns the rows that a worker compares at a time, at most."""
    rows: Counter = Counter()
    for start in range(0, len(prints), 4096):
        batch = prints[np.arange(start, min(start + 4096, len(prints)))]
        for bucket, own in beam_duplicates.scatter(batch, len(prints), BITS, 3):
            rows[bucket] += len(own.keys)
    return max(rows.values())


def measure_duplicates(clips: int, *, runner: bool) -> dict:
    """Returns recall, cost and memory for a number of clips, with the runner or by the local job alone."""
    prints, planted = synthetic_clips(clips)
    began = time.process_time()
    # A copy of a copy may be too far from the first clip to be dropped: then it is kept, by the rule.
    expected = beam_duplicates.settle_in_order([prints], BITS)[2]
    row = {"clips": clips, "planted": len(planted), "dropped": len(expected[0])}
    row["local_cpu_seconds"] = time.process_time() - began
    row["local_gib"] = peak_gib()
    row["rows_at_a_time"] = largest_bucket(prints)
    if runner:
        began = time.process_time()
        ids, sources = find(prints)
        row["cpu_seconds"] = time.process_time() - began
        row["runner_gib"] = peak_gib()
        order = np.argsort(expected[0])
        row["equals_local"] = bool(
            np.array_equal(ids, expected[0][order]) and np.array_equal(sources, expected[1][order])
        )
        row["recall"] = float(np.isin(expected[0], ids).mean())
    return row


def peak_gib() -> float:
    """Returns the largest memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def duplicates(args: argparse.Namespace) -> None:
    """Prints a row for each number of clips, each measured in a process of its own, and plots them."""
    rows = []
    for what, clips in [("one", n) for n in args.clips] + [("local", n) for n in args.local_clips]:
        line = [sys.executable, __file__, what, "--clips", str(clips)]
        done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if args.plot:
        plot_duplicates(rows, args.plot)


def plot_duplicates(rows: list[dict], path: Path) -> None:
    """Plots time and memory against the number of clips; rows without the runner come last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = [row["clips"] for row in rows]
    seconds = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    left.loglog(n[: len(seconds)], seconds, "o-", label="Beam, DirectRunner")
    left.loglog(n, [row["local_cpu_seconds"] for row in rows], "s--", label="local job")
    left.set(xlabel="clips", ylabel="CPU seconds")
    left.legend()
    right.loglog(n, [row["rows_at_a_time"] for row in rows], "o-")
    right.set(xlabel="clips", ylabel="rows that a worker holds", ylim=(1e3, 1e6))
    figure.savefig(path, dpi=110)


# ---- statistics ----


def synthetic_rows(group: int, rows: int) -> Iterator[tuple[tuple[int, int], dict]]:
    """Yields (order, fields) of clips."""
    rng = np.random.default_rng(group)
    for i in range(rows):
        frames = int(rng.integers(16, 2000))
        yield (group, i), {
            "source": f"{group}.mp4", "start": 0.0, "end": frames / 24, "caption": "word " * int(rng.integers(3, 30)),
            "category": f"category {rng.integers(20)}", "frames": frames, "fps": 24.0, "height": 720,
            "width": int(rng.choice([1280, 960, 720])), "aesthetic": float(rng.normal(5, 0.7)),
        }  # fmt: skip


def statistics_of(group: int, rows: int) -> Statistics:
    """Returns the statistics of some synthetic clips."""
    result = Statistics()
    for order, row in synthetic_rows(group, rows):
        result.add_clip(order, row)
    return result


def statistics(args: argparse.Namespace) -> None:
    """Counts rows in groups of 1000 by a combiner, and plots figures 8 and 9."""
    import apache_beam as beam

    args.out.mkdir(parents=True, exist_ok=True)

    def plot(total: Statistics) -> None:
        before = time.process_time()
        report.plot(total, lambda name, title: (args.out / f"{name}.png", title))
        print(f"{total.clips} rows, {total.hours:.0f} hours; figures in {time.process_time() - before:.1f} s of CPU")

    began = time.process_time()
    with beam.Pipeline() as root:
        groups = root | beam.Create(range(args.clips[0] // 1000))
        counted = groups | beam.Map(statistics_of, 1000) | beam.CombineGlobally(beam_steps.merged)
        _ = counted | beam.Map(plot)
    print(f"in all {time.process_time() - began:.1f} s of CPU, with making the rows")


# ---- opening ----


def write_many_shards(folder: Path, number: int, records: int) -> None:
    """Writes one shard under many names, and the index that the curation would store for it."""
    folder.mkdir(parents=True)
    one = folder / "one"
    shards.write_shard([{"video": b"clip", "caption": f"clip {i}"} for i in range(records)], one)
    paths = [folder / f"clips-{i:05d}{shards.SUFFIX}" for i in range(number)]
    for path in paths:
        os.link(one, path)
    one.unlink()
    (folder / shards.LIST).write_text("")  # the index has what the list would
    videos = np.array([name_hash(f"{i}.mp4") for i in range(number * records // SCENES + 1)], np.uint64)
    hashes = np.repeat(videos, SCENES)[: number * records]
    sizes = np.full((number * records, 2), 720, np.int32)
    index = shard_index.ShardIndex(("caption", "video"), np.full(number, records), hashes, sizes)
    shard_index.write_index(folder, shards.LIST, paths, index)


def opening(args: argparse.Namespace) -> None:
    """Opens a set with and without its index, and a mixture of several such sets."""
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        folders = [Path(place) / f"set{i}" for i in range(args.sets)]
        for folder in folders:
            write_many_shards(folder, args.shards, args.records)
        for text in ("with its index", "without"):
            if text == "without":
                (folders[0] / shard_index.NAME).unlink()
                (folders[0] / shards.LIST).unlink()
            began, cpu = time.monotonic(), time.process_time()
            records = shards.ShardRecords(folders[0], medium="video")
            used = time.process_time() - cpu
            seconds = time.monotonic() - began
            print(f"{args.shards} shards, {len(records)} records, {text}: {seconds:.1f} s, CPU {used:.1f} s")
        parts = tuple(f"array_record:{folder}" for folder in folders[1:])
        config = DataConfig(source="mixture", videos=parts, images=0, frames=1, fps=8.0, height=64, width=64)
        began, cpu = time.monotonic(), time.process_time()
        source = make_source(config, batch_size=1024)
        assert isinstance(source, mixture.Mixture)
        source.video_order(0)
        for i, each in enumerate(source.videos):
            permutation(len(each), "video", config.seed, i)
        used = time.process_time() - cpu
        print(
            f"mixture of {len(parts)} sets, {len(source)} records, with the order of an epoch: "
            f"{time.monotonic() - began:.1f} s, CPU {used:.1f} s"
        )


# ---- hosts ----


def hosts(args: argparse.Namespace) -> None:
    """Lets each host compute which records it reads, as training does, until every part is read once."""
    rng, sets = np.random.default_rng(0), args.sets
    batch, weights = args.batch, tuple(float(i + 1) for i in range(sets))  # sets of different sizes, in proportion
    sizes = [args.clips * (i + 1) for i in range(sets)]
    bytes_of = [rng.lognormal(13.8, 0.6, size) for size in sizes]  # clips of about a megabyte
    order = mixture.Order(((0, weights),), batch, seed=0)
    orders = [permutation(size, "video", 0, 0) for size in sizes]
    steps = -(-sum(sizes) // batch) + 1  # parts end an epoch within a step of each other
    rows_of_host = np.array_split(np.arange(batch), args.hosts)
    times_read = [np.zeros(size, np.int32) for size in sizes]
    records, content = np.zeros(args.hosts, np.int64), np.zeros(args.hosts)
    host_of_row = np.repeat(np.arange(args.hosts), [len(rows) for rows in rows_of_host])
    for step in range(steps):
        for row in range(batch):
            part, number = order(step * batch + row)
            if number < sizes[part]:  # of the first epoch
                record = orders[part][number]
                times_read[part][record] += 1
                records[host_of_row[row]] += 1
                content[host_of_row[row]] += bytes_of[part][record]
    once = all((times == 1).all() for times in times_read)
    share, bytes_share = records.max() / records.mean(), content.max() / content.mean()
    print(
        f"{sum(sizes)} records of {sets} sets, {args.hosts} hosts, batch {batch}: each read once: {once}; the busiest "
        f"host reads {share:.4f} of its share of records, {bytes_share:.4f} of its share of bytes"
    )


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["duplicates", "one", "local", "statistics", "opening", "hosts"])
    parser.add_argument("--clips", type=int, nargs="+", default=[100_000])
    parser.add_argument("--local-clips", type=int, nargs="+", default=[], help="larger numbers, without Beam")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, default=Path("statistics"))
    parser.add_argument("--dir", type=Path, help="where to make files for `opening`")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=1000, help="of a shard")
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048)
    args = parser.parse_args()
    if args.what in ("one", "local"):
        print(json.dumps(measure_duplicates(args.clips[0], runner=args.what == "one")))
        return
    if args.what == "hosts":
        args.clips = args.clips[0]
    {"duplicates": duplicates, "statistics": statistics, "opening": opening, "hosts": hosts}[args.what](args)


if __name__ == "__main__":
    with one_line_errors():
        main()
