"""Curates all videos of a folder, in parallel and in any order.

The result of a video is a function of that video and the settings. Results stay in OUT/.work until shards are written
from all of them in the order of the videos' names, so a resumed run writes the same shards as an uninterrupted one.
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import logging
from tqdm import tqdm

from lavie_jax.curation import assemble, models, output, report, scenes
from lavie_jax.curation.filters import Thresholds
from lavie_jax.curation.inputs import Video, find_videos
from lavie_jax.curation.job import CurationJob, LatentJob, Outcome
from lavie_jax.curation.models import Captioner, Scorer
from lavie_jax.curation.video import Summary, curate_video, read_result
from lavie_jax.errors import UserError


def curate(
    folder: Path, out: Path, job: CurationJob, *, table: Path | None = None, workers: int = 1, shard_clips: int = 1000
) -> Outcome:
    """Writes shards, lists, manifest and report to `out` from the videos of `folder`.

    An interrupted run resumes when called again, and ends with the same shards.

    Args:
        table: captions, see `inputs.find_videos`.
        workers: number of processes.
        shard_clips: clips per shard.

    Raises:
        UserError: before any work, if something is missing or inconsistent, or if `out` contains a finished set or one
            started with other settings.
    """
    if workers < 1 or shard_clips < 1:
        raise UserError(f"--workers and --shard-clips must be at least 1; given {workers} and {shard_clips}")
    _check_libraries()
    videos = find_videos(folder, table)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {os.fspath(out)!r} lies in the input folder: name one outside")
    output.refuse_finished(out)
    _make_models(job)  # to fail here, once, rather than in every worker
    encoder = None if job.latents is None else _make_encoder(job.latents)
    settings = job.settings() | ({} if encoder is None else {"latents": encoder.settings()})
    with output.open_output(out, settings | {"shard_clips": shard_clips}) as work:
        summaries = _curate_all(videos, work, job, workers)
        bits = job.thresholds.duplicate_bits
        manifest = assemble.write_set(
            videos, work, out, settings=settings, duplicate_bits=bits, shard_clips=shard_clips, encoder=encoder
        )
        report.write(out, manifest, encoder)
        output.write_manifest(out, manifest)
    shutil.rmtree(work)
    return Outcome(
        videos=len(videos),
        clips=manifest["clips"],
        dropped=manifest["dropped"],
        video_seconds=sum(summary.video_seconds for summary in summaries),
        core_seconds=sum(summary.core_seconds for summary in summaries),
    )


def _check_libraries() -> None:
    for name in ("scenedetect", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"curation needs {name}: {scenes.INSTALL} ({error})") from error


def _make_encoder(job: LatentJob) -> assemble.LatentWriter:
    from lavie_jax.curation.latent_encoder import LatentEncoder  # loads jax, which worker processes do not need

    return LatentEncoder(job)


def _curate_all(videos: Sequence[Video], work: Path, job: CurationJob, workers: int) -> list[Summary]:
    """Computes the missing results. The progress bar counts bytes, which predict the time left better than files."""
    missing = [video for video in videos if read_result(work / video.key) is None]
    if len(missing) < len(videos):
        logging.info("resuming: %d of %d videos are done", len(videos) - len(missing), len(videos))
    sizes = {video.key: video.size for video in videos}
    done = sum(sizes.values()) - sum(video.size for video in missing)
    summaries: list[Summary] = []
    with tqdm(total=sum(sizes.values()), initial=done, desc="videos", unit="B", unit_scale=True) as bar:
        for key, summary in _results(missing, work, job, workers):
            summaries.append(summary)
            bar.set_postfix(clips=sum(s.kept for s in summaries), dropped=sum(s.dropped for s in summaries))
            bar.update(sizes[key])
    return summaries


def _results(videos: Sequence[Video], work: Path, job: CurationJob, workers: int) -> Iterator[tuple[str, Summary]]:
    """Yields the key and summary of each video as it is done, in any order."""
    if workers == 1:
        captioner, scorer = _make_models(job)
        for video in videos:
            yield video.key, curate_video(video, work, job.thresholds, captioner=captioner, scorer=scorer)
        return
    keys, remaining = {}, iter(videos)
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by threads of libraries
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,))
    try:
        while True:
            for video in remaining:
                keys[pool.submit(_work, video, work, job.thresholds)] = video.key
                if len(keys) >= 4 * workers:
                    break
            if not keys:
                return
            for future in concurrent.futures.wait(keys, return_when=concurrent.futures.FIRST_COMPLETED).done:
                yield keys.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker died, perhaps for lack of memory: run the same command with fewer --workers to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in the workers ----

_models: tuple[Captioner | None, Scorer | None] = (None, None)  # loaded once per process


def _make_models(job: CurationJob) -> tuple[Captioner | None, Scorer | None]:
    captioner = None if job.captioner is None else models.make_captioner(job.captioner)
    scorer = None if job.aesthetic is None else models.make_scorer(*map(Path, job.aesthetic))
    return captioner, scorer


def _start_worker(job: CurationJob) -> None:
    global _models
    _models = _make_models(job)


def _work(video: Video, work: Path, thresholds: Thresholds) -> Summary:
    captioner, scorer = _models
    return curate_video(video, work, thresholds, captioner=captioner, scorer=scorer)
