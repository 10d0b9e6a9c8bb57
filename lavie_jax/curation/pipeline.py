"""All videos of a folder, in parallel and in any order; what is done stays done when the run is stopped.

Each video's result is a function of the video and of the settings. It lies in OUT/.work until the shards are written
from all of them in the order of the videos' names, so that they depend on nothing else.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import importlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import logging
from tqdm import tqdm

from lavie_jax.curation import assemble, models, report, segments
from lavie_jax.curation.filters import Thresholds
from lavie_jax.curation.inputs import Video, find_videos
from lavie_jax.curation.models import Captioner
from lavie_jax.curation.video import Summary, curate_video, read_result
from lavie_jax.data.buckets import Size
from lavie_jax.disk import is_full
from lavie_jax.errors import UserError

WORK = ".work"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentJob:
    """What latents are made with.

    Attributes:
      weights: the weights folder whose VAE and text encoder make them.
      sizes: (height, width) of frames; each clip is brought to the one that is nearest to its shape. () = the size
        that the weights sample.
      fps: frames of a second of a clip that are kept; 0 = as many as the weights sample.
    """

    weights: str
    sizes: tuple[Size, ...] = ()
    fps: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is done to every video; it goes to the workers.

    Attributes:
      captioner: for scenes that no given caption covers: a model's folder, "module:function", or a function of sample
        frames, uint8 (T, H, W, 3), that can be pickled.
      aesthetic: (folder of CLIP, file of its head), or None.
      latents: what latents are made with, which are written in the clips' place; None = the clips.
    """

    thresholds: Thresholds = Thresholds()
    captioner: str | Captioner | None = None
    aesthetic: tuple[str, str] | None = None
    latents: LatentJob | None = None

    def settings(self) -> dict[str, object]:
        """What decides the results, for JSON."""
        captioner = self.captioner
        if callable(captioner):
            captioner = f"{captioner.__module__}:{captioner.__qualname__}"
        return {
            **dataclasses.asdict(self.thresholds),
            "captioner": captioner,
            "aesthetic": list(self.aesthetic) if self.aesthetic else None,
            "versions": {name: importlib.import_module(name).__version__ for name in ("av", "scenedetect", "PIL")},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run made. Seconds are of the videos that this run decoded, and of the cores that worked on them."""

    videos: int
    clips: int
    dropped: dict[str, int]
    video_seconds: float
    core_seconds: float


def curate(
    folder: Path, out: Path, job: Job, *, table: Path | None = None, workers: int = 1, shard_clips: int = 1000
) -> Outcome:
    """Makes shards, lists, manifest and report in `out` from the videos of `folder`.

    Stopped at any moment, the same call goes on and ends with the same shards. `table` is of captions, see
    `inputs.find_videos`.

    Raises:
      UserError: before any work, for what is missing or does not go together, and when `out` holds a finished set or
        the beginning of one with other settings.
    """
    if workers < 1 or shard_clips < 1:
        raise UserError(f"--workers and --shard-clips are at least 1; given {workers} and {shard_clips}")
    _check_libraries()
    videos = find_videos(folder, table)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {os.fspath(out)!r} lies in the input folder: name one outside")
    refuse_finished(out)
    _make_tools(job)  # fails here, once, rather than in every worker
    encoder = None if job.latents is None else _make_encoder(job.latents)
    settings = job.settings() | ({} if encoder is None else {"latents": encoder.settings()})
    with started(out, settings | {"shard_clips": shard_clips}) as work, full_disk_told(out):
        summaries = _curate_all(videos, work, job, workers)
        bits = job.thresholds.duplicate_bits
        manifest = assemble.write(
            videos, work, out, settings=settings, duplicate_bits=bits, shard_clips=shard_clips, encoder=encoder
        )
        report.write(out, manifest, encoder)
        assemble.finish(out, manifest)
    shutil.rmtree(work)
    return Outcome(
        videos=len(videos),
        clips=manifest["clips"],
        dropped=manifest["dropped"],
        video_seconds=sum(summary.video_seconds for summary in summaries),
        core_seconds=sum(summary.core_seconds for summary in summaries),
    )


def _make_encoder(job: LatentJob) -> assemble.Encoder:
    from lavie_jax.curation.latents import Encoder  # here: the workers, who import this file, need no jax

    return Encoder(job)


def refuse_finished(out: Path) -> None:
    """UserError where a whole set is already."""
    if (out / assemble.MANIFEST).exists():
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a run that was stopped in its last moment
        raise UserError(f"{os.fspath(out)!r} holds a finished set: name another --out, or remove it")


@contextlib.contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Around what writes to `out`: a full disk becomes a UserError."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(f"the disk of {os.fspath(out)!r} is full: make room, and the same command goes on") from error


def _check_libraries() -> None:
    for name in ("scenedetect", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"curation needs {name}: {segments.INSTALL} ({error})") from error


@contextlib.contextmanager
def started(out: Path, settings: dict[str, object]) -> Iterator[Path]:
    """The folder for results, which this run holds alone. Raises UserError if one with other settings has begun."""
    work = out / WORK
    try:
        found = [p.name for p in out.iterdir() if p.name != WORK] if out.exists() else []
        if found and not work.exists():
            raise UserError(f"--out {os.fspath(out)!r} is not empty (it has {found[0]}): name a new folder")
        work.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {os.fspath(out)!r}: {error.strerror or 'is no folder'}") from error
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {os.fspath(out)!r}") from error
        _same_settings(work / "settings.json", json.loads(json.dumps(settings)))
        for half in work.glob(".*-*"):  # of a run that was killed
            shutil.rmtree(half)
        yield work


def _same_settings(path: Path, settings: dict[str, object]) -> None:
    if path.exists():
        before = json.loads(path.read_text())
        other = [f"{k} was {before.get(k)}, now {settings[k]}" for k in settings if before.get(k) != settings[k]]
        if other:
            raise UserError(
                f"{os.fspath(path.parents[1])!r} was begun with other settings ({'; '.join(other)}): "
                "use those, or name another --out"
            )
        return
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(settings))
    temporary.replace(path)


# ---- workers ----

_tools: tuple = ()


def _make_tools(job: Job) -> tuple:
    captioner = None if job.captioner is None else models.make_captioner(job.captioner)
    scorer = None if job.aesthetic is None else models.make_scorer(*map(Path, job.aesthetic))
    return captioner, scorer


def _start_worker(job: Job) -> None:
    global _tools  # models are loaded once a process
    _tools = _make_tools(job)


def _work(video: Video, work: Path, thresholds: Thresholds) -> Summary:
    captioner, scorer = _tools
    return curate_video(video, work, thresholds, captioner=captioner, scorer=scorer)


def _curate_all(videos: Sequence[Video], work: Path, job: Job, workers: int) -> list[Summary]:
    """Makes the results that are missing; the bar counts bytes, which tell the time that is left better than files."""
    missing = [video for video in videos if read_result(work / video.key) is None]
    if len(missing) < len(videos):
        logging.info("going on: %d of %d videos are done", len(videos) - len(missing), len(videos))
    sizes = {video.key: video.size for video in videos}
    done = sum(sizes.values()) - sum(video.size for video in missing)
    summaries: list[Summary] = []
    with tqdm(total=sum(sizes.values()), initial=done, desc="videos", unit="B", unit_scale=True) as bar:
        for key, summary in _results(missing, work, job, workers):
            summaries.append(summary)
            bar.set_postfix(clips=sum(s.kept for s in summaries), dropped=sum(s.dropped for s in summaries))
            bar.update(sizes[key])
    return summaries


def _results(videos: Sequence[Video], work: Path, job: Job, workers: int) -> Iterator[tuple[str, Summary]]:
    if workers == 1:
        captioner, scorer = _make_tools(job)
        for video in videos:
            yield video.key, curate_video(video, work, job.thresholds, captioner=captioner, scorer=scorer)
        return
    waiting, left = {}, iter(videos)
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of libraries' threads
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,))
    try:
        while True:
            for video in left:
                waiting[pool.submit(_work, video, work, job.thresholds)] = video.key
                if len(waiting) >= 4 * workers:
                    break
            if not waiting:
                return
            for future in concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker died, perhaps for lack of memory; the same command, with fewer --workers, goes on"
                        ) from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)
