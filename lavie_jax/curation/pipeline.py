"""Curates all videos of a folder, in parallel and in any order.

The unit of work is a part of a video, so that one long film keeps all workers busy. The result of a part is a function
of that video and the settings. Results stay in OUT/.work until shards are written from all of them in the order of the
videos' names, so a resumed run writes the same shards as an uninterrupted one.
"""

import concurrent.futures
import contextlib
import importlib
import itertools
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from lavie_jax.curation import assemble, models, output, report, scenes
from lavie_jax.curation.filters import Thresholds
from lavie_jax.curation.inputs import Video, find_videos
from lavie_jax.curation.isolation import Interrupted, OutOfTime, Worker
from lavie_jax.curation.job import CurationJob, LatentJob, Outcome
from lavie_jax.curation.models import Captioner, Scorer
from lavie_jax.curation.video import LATER, Part, Summary, curate_part, drop_part, parts_of, read_part
from lavie_jax.errors import UserError, check_folder

TIME_LIMIT = 3600.0  # of a part of about a minute


def curate(
    folder: Path,
    out: Path,
    job: CurationJob,
    *,
    table: Path | None = None,
    workers: int = 1,
    shard_clips: int = 1000,
    time_limit: float = TIME_LIMIT,
) -> Outcome:
    """Writes shards, lists, manifest and report to `out` from the videos of `folder`.

    An interrupted run resumes when called again, and ends with the same shards.

    Args:
        table: captions, see `inputs.find_videos`.
        workers: number of processes.
        shard_clips: clips per shard.
        time_limit: seconds after which a worker process gives up a part of a video, which is then unreadable; 0 = none.

    Raises:
        UserError: before any work, if something is missing or inconsistent, or if `out` contains a finished set or one
            started with other settings.
    """
    check_workers(workers)
    if workers == 1 and time_limit not in (0, TIME_LIMIT):
        logging.warning("--time-limit has no effect with one worker, which is this process: give two or more --workers")
    videos, encoder = prepare(folder, out, job, table=table, shard_clips=shard_clips, time_limit=time_limit)
    settings = job.settings() | ({} if encoder is None else {"latents": encoder.settings()})
    with output.open_output(out, settings | {"shard_clips": shard_clips}) as work:
        summaries = _curate_all(videos, work, job, workers, time_limit)
        bits = job.thresholds.duplicate_bits
        manifest, statistics, clips = assemble.write_set(
            videos, work, out, settings=settings, duplicate_bits=bits, shard_clips=shard_clips,
            hold_out=job.hold_out, encoder=encoder,
        )  # fmt: skip
        samples = [clips[rank] for rank in report.sample_ranks(len(clips))]
        report.write(out, manifest, statistics, samples, work, encoder)
        output.index_shards(out, manifest)
        output.write_manifest(out, manifest)
    shutil.rmtree(work)
    return Outcome(
        videos=len(videos),
        clips=manifest["clips"],
        dropped=manifest["dropped"],
        video_seconds=sum(summary.video_seconds for summary in summaries),
        core_seconds=sum(summary.core_seconds for summary in summaries),
    )


def check_workers(workers: int) -> None:
    """Raises UserError for a number of workers below 1."""
    if workers < 1:
        raise UserError(f"--workers must be at least 1; given {workers}")


def prepare(
    folder: Path, out: Path, job: CurationJob, *, table: Path | None, shard_clips: int, time_limit: float
) -> tuple[list[Video], assemble.LatentWriter | None]:
    """Checks all settings and loads the models once, before any work; returns the videos and the encoder of latents.

    Raises:
        UserError: something is missing or inconsistent, or `out` contains a finished set.
    """
    if shard_clips < 1:
        raise UserError(f"--shard-clips must be at least 1; given {shard_clips}")
    if not time_limit >= 0:
        raise UserError(f"--time-limit must be at least 0 seconds; given {time_limit:g}")
    _check_libraries()
    check_folder(out, f"--out {os.fspath(out)!r}")
    videos = find_videos(folder, table)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {os.fspath(out)!r} lies in the input folder: name one outside")
    output.refuse_finished(out)
    _make_models(job)  # to fail here, once, rather than in every worker
    return videos, None if job.latents is None else make_encoder(job.latents)


def _check_libraries() -> None:
    for name in ("scenedetect", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"curation needs {name}: {scenes.INSTALL} ({error})") from error


def make_encoder(job: LatentJob) -> assemble.LatentWriter:
    """Loads the frozen models of a stage."""
    from lavie_jax.curation.latent_encoder import LatentEncoder  # loads jax, which worker processes do not need

    return LatentEncoder(job)


def _curate_all(
    videos: Sequence[Video], work: Path, job: CurationJob, workers: int, time_limit: float
) -> list[Summary]:
    """Computes the missing results. The progress bar counts seconds of video."""
    summaries: list[Summary] = []
    with _pool(job, workers) as run:
        found = run(read_parts, [(video, time_limit) for video in videos])
        parts = [part for _, each in tqdm(found, "reading headers", len(videos), unit="video") for part in each]
        # Long ones first: at the end, no worker then waits for another's whole minute. The order changes no result.
        missing = sorted((p for p in parts if read_part(work, p.name) is None), key=lambda part: -part.seconds)
        if len(missing) < len(parts):
            logging.info("resuming: %d of %d parts of videos are done", len(parts) - len(missing), len(parts))
        total = sum(part.seconds for part in parts)
        done = total - sum(part.seconds for part in missing)
        with tqdm(total=round(total), initial=round(done), desc="curating", unit="s of video") as bar:
            for (part, *_), summary in run(work_on, [(part, work, job.thresholds, time_limit) for part in missing]):
                summaries.append(summary)
                done += part.seconds
                bar.set_postfix(clips=sum(s.kept for s in summaries), dropped=sum(s.dropped for s in summaries))
                bar.update(round(done) - bar.n)
    return summaries


Run = Callable[[Callable, Sequence[tuple]], Iterator[tuple[tuple, Any]]]


@contextlib.contextmanager
def _pool(job: CurationJob, workers: int) -> Iterator[Run]:
    """Yields a function that applies a function to (worker, *arguments), and yields (arguments, result).

    Results come as they are done, in any order. One worker is this process, passed as None.
    """
    if workers == 1:
        start_worker(job)
        yield lambda function, arguments: ((each, function(None, *each)) for each in arguments)
        return
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    processes = [Worker(start_worker, job) for _ in range(workers)]
    for worker in processes:
        free.put(worker)
    pool = concurrent.futures.ThreadPoolExecutor(workers)

    def call(function: Callable, each: tuple) -> Any:
        worker = free.get()
        try:
            return function(worker, *each)
        finally:
            free.put(worker)

    def run(function: Callable, arguments: Sequence[tuple]) -> Iterator[tuple[tuple, Any]]:
        """Keeps a few calls for each worker submitted, not all: there may be millions."""
        running, remaining = {}, iter(arguments)
        while True:
            for each in itertools.islice(remaining, 4 * workers - len(running)):
                running[pool.submit(call, function, each)] = each
            if not running:
                return
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    try:
        yield run
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in processes:
            worker.close()
        pool.shutdown()


ATTEMPTS = 3  # at a part whose process dies: it may have been killed for the memory that another one took


def read_parts(worker: Worker | None, video: Video, time_limit: float) -> list[Part]:
    """Returns `parts_of` a video, computed in a worker; a single part if its process dies, whose result says why."""
    if worker is None:
        return parts_of(video)
    for _ in range(ATTEMPTS):
        try:
            return worker(parts_of, video, seconds=time_limit)
        except OutOfTime:
            break
        except Interrupted:
            continue
    return [Part(video)]


def work_on(worker: Worker | None, part: Part, work: Path, thresholds: Thresholds, time_limit: float) -> Summary:
    """Curates a part in a worker. A file that kills its processes, or takes too long, is dropped as unreadable."""
    if worker is None:
        return _curate(part, work, thresholds)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return worker(_curate, part, work, thresholds, seconds=time_limit)
        except Interrupted as error:
            detail = f"the process for part {part.index + 1} of {part.count} {error}"
            logging.warning("%s: %s", part.video.name, detail)
            if isinstance(error, OutOfTime) or attempt == ATTEMPTS:
                return drop_part(part, work, detail)
    raise AssertionError("the last attempt returns")


# ---- in the workers ----

_models: tuple[Captioner | str | None, Scorer | None] = (None, None)  # loaded once per process


def _make_models(job: CurationJob) -> tuple[Captioner | str | None, Scorer | None]:
    captioner = job.captioner if job.captioner in (None, LATER) else models.make_captioner(job.captioner)
    scorer = None if job.aesthetic is None else models.make_scorer(*map(Path, job.aesthetic))
    return captioner, scorer


def start_worker(job: CurationJob) -> None:
    """Loads the models of this process."""
    global _models
    _models = _make_models(job)


def _curate(part: Part, work: Path, thresholds: Thresholds) -> Summary:
    captioner, scorer = _models
    return curate_part(part, work, thresholds, captioner=captioner, scorer=scorer)
