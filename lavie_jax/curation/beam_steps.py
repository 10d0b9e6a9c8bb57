"""The steps of the curation in an Apache Beam pipeline: functions that any worker may call, also several times.

Clips and results do not travel through the engine: they lie in the work folder, which all workers see. Steps pass on
the measurements, as lists of the clips of a group of videos.
"""

import contextlib
import dataclasses
import functools
import json
import os
import queue
import shutil
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavie_jax.curation import assemble, models, output, pipeline, report
from lavie_jax.curation.beam_duplicates import SCENES, VIDEOS, Matches
from lavie_jax.curation.duplicates import Fingerprints
from lavie_jax.curation.inputs import Video
from lavie_jax.curation.isolation import Worker
from lavie_jax.curation.job import CurationJob, package_versions
from lavie_jax.curation.statistics import Statistics
from lavie_jax.curation.video import LATER, Part, Segment, Summary, join_parts, read_part, with_caption
from lavie_jax.data import shards
from lavie_jax.data.buckets import Size, nearest, size_name
from lavie_jax.disk import file_hash, is_full
from lavie_jax.errors import UserError

ERROR, OUTCOME, LISTS, CAPTIONS = "error.txt", "outcome.json", "lists", "captions"  # in the work folder
BATCH = 16  # scenes per call of a captioner


class Clip(NamedTuple):
    """A segment with its number, video * SCENES + scene, which orders the set."""

    id: int
    video: Video
    segment: Segment


Clips = list[Clip]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What all steps need; it must be the same on all workers.

    Attributes:
        settings: of the manifest, with the versions of libraries.
        versions: of the packages that all workers must have.
        videos: number of videos.
        captions: name of the folder of this captioner's captions in the work folder.
        sizes: of the frames of latents; () = encoded clips.
    """

    job: CurationJob
    work: Path
    out: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    videos: int
    shard_clips: int
    time_limit: float
    captions: str
    sizes: tuple[Size, ...]

    @property
    def folders(self) -> list[str]:
        """Folders of the shards, in the order of the list of clips."""
        return [size_name(size) for size in self.sizes] or ["."]

    def folder_of(self, segment: Segment) -> int:
        """Returns the number of the folder to which a clip belongs."""
        return nearest((segment.height, segment.width), self.sizes) if self.sizes else 0


@contextlib.contextmanager
def errors_in(work: Path) -> Iterator[None]:
    """Leaves the message of a UserError or a full disk for the command, which sees only the engine's own errors."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else ""
        if is_full(error):
            text = f"the disk of the worker {socket.gethostname()} is full: free some space"
        if text:
            with contextlib.suppress(OSError):
                _write(work / ERROR, text)  # never an empty message, should that disk be full
        raise


# ---- cutting ----


def find_parts(run: Run, number: int, video: Video) -> list[tuple[int, Part]]:
    """Returns the parts of a video."""
    with errors_in(run.work), _worker(run.job) as worker:
        _check_worker(run, video)
        return [(number, part) for part in pipeline.read_parts(worker, video, run.time_limit)]


def cut(run: Run, number: int, part: Part) -> tuple[int, tuple[int, Part, list[Segment], Summary]]:
    """Curates a part unless its result exists; returns the result under the group of its video."""
    with errors_in(run.work):
        _check_worker(run, part.video)
        result, summary = read_part(run.work, part.name), Summary(0.0, 0.0, 0, 0)
        if result is None:
            with _worker(run.job) as worker:
                summary = pipeline.work_on(worker, part, run.work, run.job.thresholds, run.time_limit)
            result = read_part(run.work, part.name)
        if result is None:
            raise UserError(f"{os.fspath(run.work)!r} is not the same folder on all workers: mount it on all of them")
        return number // VIDEOS, (number, part, result[1], summary)


def _check_worker(run: Run, video: Video) -> None:
    """Raises UserError where a video would be taken for unreadable, or be cut in another way than by other workers."""
    if not video.path.is_file():
        raise UserError(
            f"the worker {socket.gethostname()} has no file {os.fspath(video.path)!r}: mount the input folder on all "
            "workers, under the same path"
        )
    here = package_versions()
    for name, version in run.versions.items():
        if here[name] != version:
            raise UserError(
                f"the worker {socket.gethostname()} has {name} {here[name]}, the command {version}: use the same "
                "packages on all workers"
            )


_WORKERS: dict[str, queue.SimpleQueue[Worker]] = {}  # free ones of this process, by their models
_LOCK = threading.Lock()


@contextlib.contextmanager
def _worker(job: CurationJob) -> Iterator[Worker]:
    """Yields a process that no other thread uses, and keeps it for later calls."""
    job = dataclasses.replace(job, captioner=job.captioner and LATER, latents=None)
    with _LOCK:
        free = _WORKERS.setdefault(repr((job.captioner, job.aesthetic)), queue.SimpleQueue())
    try:
        worker = free.get_nowait()
    except queue.Empty:
        worker = Worker(pipeline.start_worker, job)
    try:
        yield worker
    finally:
        free.put(worker)


def join_videos(run: Run, group: int, results: Iterable[tuple[int, Part, list[Segment], Summary]]) -> tuple[int, Clips]:
    """Returns the segments of a group of videos, in order, from those of their parts."""
    by_video: dict[int, dict[int, tuple[Part, list[Segment]]]] = {}
    for number, part, segments, _ in results:
        by_video.setdefault(number, {})[part.index] = (part, segments)
    clips = []
    for number, parts in sorted(by_video.items()):
        video = parts[0][0].video
        joined = join_parts([parts[index][1] for index in range(len(parts))])
        clips += [Clip(number * SCENES + scene, video, segment) for scene, segment in enumerate(joined)]
    return group, clips


# ---- captions ----


@functools.lru_cache(maxsize=1)
def _captioner(captioner: Any) -> models.BatchCaptioner:
    return models.make_batch_captioner(captioner)


def caption(run: Run, group: int, clips: Clips) -> tuple[int, Clips]:
    """Captions the clips that wait for it. Captions of an earlier run by the same captioner are kept."""
    waiting = [clip for clip in clips if clip.segment.samples]
    if not waiting:
        return group, clips
    with errors_in(run.work):
        path = run.work / CAPTIONS / run.captions / f"{group:08d}.json"
        captions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing = [clip for clip in waiting if clip.segment.samples not in captions]
        for first in range(0, len(missing), BATCH):
            names = [clip.segment.samples for clip in missing[first : first + BATCH]]
            with _LOCK:  # a model is loaded once, and runs one batch at a time
                texts = _captioner(run.job.captioner)([np.load(run.work / name) for name in names])
            captions |= dict(zip(names, texts))
        if missing:
            _write(path, json.dumps(captions))
    thresholds = run.job.thresholds
    return group, [
        clip._replace(segment=with_caption(clip.segment, captions[clip.segment.samples], thresholds))
        if clip.segment.samples
        else clip
        for clip in clips
    ]


def _write(path: Path, text: str) -> None:
    """Writes a file that appears when it is complete, whichever machines write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- near-duplicates ----


def fingerprints(group: int, clips: Clips) -> Iterator[tuple[int, Fingerprints]]:
    """Yields the hashes of the clips that are not dropped yet."""
    kept = [(clip.id, clip.segment.perceptual_hash) for clip in clips if not clip.segment.reason]
    if kept:
        yield group, Fingerprints.of(*zip(*kept))


def by_kept(group: int, matches: Matches) -> Iterator[tuple[int, Matches]]:
    """Yields matches under the group of the clip that is kept."""
    groups = matches[1] // (SCENES * VIDEOS)
    for each in np.unique(groups).tolist():
        yield each, (matches[0][groups == each], matches[1][groups == each])


def name_kept(group: int, values: tuple[Iterable[Clips], Iterable[Matches]]) -> Iterator[tuple[int, tuple[int, str]]]:
    """Yields (dropped clip, name of the kept one) under the group of the former."""
    wanted = [*values[1]]
    if wanted:
        clips = {clip.id: clip for each in values[0] for clip in each}
        for dropped, kept in zip(*(np.concatenate([each[i] for each in wanted]).tolist() for i in (0, 1))):
            yield dropped // (SCENES * VIDEOS), (dropped, assemble.clip_name(*clips[kept][1:]))


def mark(run: Run, group: int, values: tuple[Iterable[Clips], Iterable[tuple[int, str]]]) -> tuple[int, Clips]:
    """Returns the clips of a group with near-duplicates dropped and splits assigned."""
    names, marked = dict(values[1]), []
    for clip in (clip for each in values[0] for clip in each):
        segment = clip.segment
        if clip.id in names:
            segment = assemble.mark_duplicate(segment, names[clip.id])
        marked.append(clip._replace(segment=assemble.held_out(clip.video, segment, run.job.hold_out)))
    return group, marked


# ---- statistics and plan ----


def count(clips: Clips) -> Statistics:
    """Returns the statistics of a group."""
    statistics = Statistics()
    for clip in clips:
        assemble.count(statistics, divmod(clip.id, SCENES), clip.video, clip.segment)
    return statistics


def merged(many: Iterable[Statistics]) -> Statistics:
    """Returns the statistics of all groups, a combiner."""
    total = Statistics()
    for each in many:
        total.merge(each)
    return total


def total_cost(many: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Returns the sums of seconds of video and of CPU, a combiner."""
    pairs = [*many]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which clip goes where: its rank in the set's order, by the numbers of clips before its group.

    Attributes:
        starts: {group: rank of its first clip in each folder}.
        totals: clips in each folder.
    """

    starts: dict[int, list[int]]
    totals: list[int]

    def positions(self, ranks: Sequence[int], shard_clips: int) -> list[tuple[int, int, int]]:
        """Returns (folder, shard, index) of clips by their ranks in the list of clips."""
        positions = []
        for rank in ranks:
            folder = 0
            while rank >= self.totals[folder]:
                rank, folder = rank - self.totals[folder], folder + 1
            positions.append((folder, *divmod(rank, shard_clips)))
        return positions


def make_plan(counts: Iterable[tuple[int, list[int]]], folders: int) -> Plan:
    """Returns the plan for the numbers of clips that each group has in each folder."""
    starts, totals = {}, [0] * folders
    for group, each in sorted(counts):
        starts[group] = totals
        totals = [total + own for total, own in zip(totals, each)]
    return Plan(starts, totals)


def clips_per_folder(run: Run, group: int, clips: Clips) -> tuple[int, list[int]]:
    """Returns how many clips of a group go to each folder."""
    counts = Counter(run.folder_of(clip.segment) for clip in clips if not clip.segment.reason)
    return group, [counts[folder] for folder in range(len(run.folders))]


def assign(run: Run, pair: tuple[int, Clips], plan: Plan) -> Iterator[tuple[tuple[int, int], Clips]]:
    """Yields the kept clips of a group under (folder, shard)."""
    group, clips = pair
    ranks, shards_of = list(plan.starts[group]), {}
    for clip in clips:
        if not clip.segment.reason:
            folder = run.folder_of(clip.segment)
            shards_of.setdefault((folder, ranks[folder] // run.shard_clips), []).append(clip)
            ranks[folder] += 1
    yield from shards_of.items()


# ---- writing ----


def shard_name(run: Run, folder: int, number: int) -> str:
    """Returns the path of a shard relative to the set's folder."""
    return os.path.normpath(f"{run.folders[folder]}/{assemble.NAME}-{number:05d}{shards.SUFFIX}")


def write_shard(run: Run, key: tuple[int, int], parts: Iterable[Clips]) -> tuple[str, dict[str, Any]]:
    """Writes a shard and its part of the list of clips; returns its name, size and hash."""
    clips = sorted((clip for part in parts for clip in part), key=lambda clip: clip.id)
    pairs, name = [clip[1:] for clip in clips], shard_name(run, *key)
    path = run.out / name
    with errors_in(run.work):
        if run.job.latents is None:
            rows = _write_clips(run, pairs, path)
        else:
            encoder = _encoder(run.job)
            records = [assemble.pending(*pair, run.work, encoder) for pair in pairs]
            with _LOCK:
                rows = encoder.write_shard(records, path, run.out, lambda clips: None)
        _write_list(run, "clips", "{:03d}-{:06d}".format(*key), rows)
        return name, {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _encoder(job: CurationJob) -> assemble.LatentWriter:
    with _LOCK:
        return _loaded_encoder(job.latents)


_loaded_encoder = functools.lru_cache(maxsize=1)(pipeline.make_encoder)


def _write_clips(run: Run, pairs: Sequence[tuple[Video, Segment]], path: Path) -> list[dict]:
    digests: list[str] = []
    folder = run.work / f".{uuid.uuid4().hex[:12]}-shard"
    try:
        shards.write_shard(assemble.clip_records(pairs, run.work, digests), folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [assemble.clip_row(path.name, i, digests[i], *pair) for i, pair in enumerate(pairs)]


def write_dropped(run: Run, group: int, clips: Clips) -> int:
    """Writes the part of a group in the list of what was dropped."""
    with errors_in(run.work):
        rows = [assemble.dropped_row(*clip[1:]) for clip in clips if clip.segment.reason]
        _write_list(run, "dropped", f"{group:08d}", rows)
    return group


def _write_list(run: Run, kind: str, name: str, rows: Iterable[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(run.work / LISTS / kind / f"{name}.jsonl", lines)


def finish(
    run: Run, statistics: Statistics, cost: tuple[float, float], plan: Plan, files: list[tuple[str, dict]],
    groups: list[int],
) -> None:  # fmt: skip
    """Joins the lists, writes the report, and last the manifest."""
    with errors_in(run.work):
        _join(run, output.DROPPED, "dropped", [f"{group:08d}" for group in sorted(groups)])
        assemble.check_clips(statistics, run.videos, run.job.hold_out, run.out)
        written = [(folder, number) for folder, total in enumerate(plan.totals)
                   for number in range(-(-total // run.shard_clips))]  # fmt: skip
        _join(run, output.CLIPS, "clips", ["{:03d}-{:06d}".format(*key) for key in written])
        names = [shard_name(run, *key) for key in written]
        for stale in {*run.out.glob(f"*{shards.SUFFIX}"), *run.out.glob(f"*/*{shards.SUFFIX}")}:
            if stale.relative_to(run.out).as_posix() not in names:
                stale.unlink()  # of a run that was killed and had other videos
        encoder, latents, more = None, {}, [run.out / output.CLIPS, run.out / output.DROPPED]
        if run.job.latents is not None:
            encoder = _encoder(run.job)
            sizes = dict(zip(run.folders, plan.totals))
            latents = {"latents": encoder.manifest("video", sizes)}
            more.insert(0, encoder.write_null_text(run.out))
        by_name = dict(files)
        hashes = {name: by_name[name] for name in names} | output.file_hashes(run.out, more)
        manifest = assemble.make_manifest(statistics, run.videos, run.settings, hashes, latents)
        positions = plan.positions(report.sample_ranks(statistics.clips), run.shard_clips)
        samples = [(shard_name(run, folder, number), index) for folder, number, index in positions]
        report.write(run.out, manifest, statistics, samples, run.work, encoder)
        output.index_shards(run.out, manifest)
        outcome = {"clips": statistics.clips, "dropped": manifest["dropped"], "cost": cost}
        _write(run.work / OUTCOME, json.dumps(outcome))
        output.write_manifest(run.out, manifest)


def _join(run: Run, target: str, kind: str, names: Iterable[str]) -> None:
    """Joins the parts of a list in order."""
    folder = run.work / f".{uuid.uuid4().hex[:12]}-list"
    folder.mkdir()
    with (folder / target).open("wb") as whole:
        for name in names:
            with (run.work / LISTS / kind / f"{name}.jsonl").open("rb") as part:
                shutil.copyfileobj(part, whole)
    os.replace(folder / target, run.out / target)
    folder.rmdir()
