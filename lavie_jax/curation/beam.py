"""The curation as an Apache Beam pipeline, for data sets that outgrow a machine: `--runner NAME`.

It runs the same functions of parts and clips as the local job and writes the same bytes. All workers must see the same
input and output folders, and have the same packages.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lavie_jax.curation import beam_duplicates, beam_steps, output, pipeline
from lavie_jax.curation.job import CurationJob, Outcome, package_versions
from lavie_jax.errors import UserError, suggest

INSTALL = 'pip install "lavie_jax[curation-beam]", or -e ".[curation-beam]" in a clone'
STAGES = ("cut", "captions", "shards")
# Loggers to which the engine writes the traceback of a step, once for each layer; those of other processes are None.
ENGINE_LOGGERS = ("apache_beam.runners.common", "apache_beam.runners.worker.sdk_worker", None)


def curate(
    folder: Path,
    out: Path,
    job: CurationJob,
    *,
    runner: str,
    options: Sequence[str] = (),
    table: Path | None = None,
    workers: int | None = None,
    shard_clips: int = 1000,
    time_limit: float = pipeline.TIME_LIMIT,
    until: str = STAGES[-1],
) -> Outcome | None:
    """Does what `pipeline.curate` does, by a runner of Apache Beam.

    An interrupted job resumes when called again, with any runner or, if it has no captioner, locally. It ends with the
    same shards.

    Args:
        runner: a name of Beam's, such as DirectRunner or FlinkRunner.
        options: flags of the runner.
        workers: threads of DirectRunner, each with a process; None = one. Other runners have `options` for it.
        until: the last stage to run, one of STAGES. Later ones can run in another job, on other machines.

    Returns:
        The outcome; None if the last stage did not run.

    Raises:
        UserError: before any work, as `pipeline.curate`, or if Beam or the runner is missing.
    """
    make_pipeline = _pipeline_maker(runner, [*options], workers)
    if until not in STAGES:
        raise UserError(f"unknown --until {until!r}{suggest(until, STAGES)}")
    videos, encoder = pipeline.prepare(
        folder.absolute(), out, job, table=table, shard_clips=shard_clips, time_limit=time_limit
    )  # fmt: skip
    latents = {} if encoder is None else {"latents": encoder.settings()}
    settings = job.settings() | latents
    # Stages that can be repeated with other models do not determine the results of those before them.
    of_cuts = settings | {"captioner": job.captioner and "a later stage", "shard_clips": shard_clips}
    with output.open_output(out, of_cuts, repeated=("latents",)) as work:
        run = beam_steps.Run(
            job=job, work=work.absolute(), out=out.absolute(), settings=settings,
            versions=package_versions(), videos=len(videos),
            shard_clips=shard_clips, time_limit=time_limit,
            captions=hashlib.sha256(str(settings["captioner"]).encode()).hexdigest()[:16],
            sizes=() if encoder is None else encoder.sizes,
        )  # fmt: skip
        (work / beam_steps.ERROR).unlink(missing_ok=True)
        _run(make_pipeline, run, list(enumerate(videos)), until)
        if until != STAGES[-1]:
            return None
        outcome = json.loads((work / beam_steps.OUTCOME).read_text(encoding="utf-8"))
    shutil.rmtree(work)
    video_seconds, core_seconds = outcome["cost"]
    return Outcome(
        videos=len(videos), clips=outcome["clips"], dropped=outcome["dropped"],
        video_seconds=video_seconds, core_seconds=core_seconds,
    )  # fmt: skip


def is_direct(runner: str) -> bool:
    """Whether Beam takes `runner`, a name in any case, for its DirectRunner."""
    return runner.lower() in ("direct", "directrunner")


def _pipeline_maker(runner: str, options: list[str], workers: int | None) -> Any:
    """Returns a function that makes an empty pipeline for a runner."""
    direct = is_direct(runner)
    if workers is not None and not direct:
        raise UserError(f"--workers is for the local job and DirectRunner: give {runner} its own options, after --")
    pipeline.check_workers(1 if workers is None else workers)
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import create_runner
    except ImportError as error:
        raise UserError(f"--runner needs Apache Beam: {INSTALL} ({error})") from error
    if direct:
        # A thread for each worker, as the work is done in processes of their own.
        options = [f"--direct_num_workers={workers or 1}", "--direct_running_mode=multi_threading", *options]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):  # argparse prints its usage and exits
            made = create_runner(runner)
            parsed = PipelineOptions([f"--runner={runner}", *options])
            parsed.get_all_options()  # raises for values of other classes of options
    except SystemExit as error:
        raise UserError(f"options of --runner {runner}: {printed.getvalue().rpartition('error: ')[2]}") from error
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner {runner} is not a runner of the installed Apache Beam: {error}") from error
    sys.stderr.write(printed.getvalue())  # warnings of options that no class knows
    return functools.partial(apache_beam.Pipeline, runner=made, options=parsed)


def _run(make_pipeline: Any, run: beam_steps.Run, videos: list, until: str) -> None:
    """Runs the pipeline to its end."""
    failure = None
    marker = run.work / beam_steps.ERROR
    try:
        with _without_tracebacks(marker), make_pipeline() as root:
            build(root, run, videos, until)
    except Exception as error:
        failure = error
    if failure is None:
        return
    if marker.exists():  # raised on its own: the engine's error would be taken for one of the command's disk
        raise UserError(f"{marker.read_text(encoding='utf-8')}; run the same command to resume")
    last = ([type(failure).__name__] + str(failure).strip().splitlines())[-1]
    raise UserError(f"the job of Apache Beam failed ({last}): run the same command to resume") from failure


@contextlib.contextmanager
def _without_tracebacks(marker: Path) -> Iterator[None]:
    """Keeps the engine from logging an error that has left `marker`, because the command says it in one line."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or not marker.exists()

    loggers = [logging.getLogger(name) for name in ENGINE_LOGGERS]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)


def build(root: Any, run: beam_steps.Run, videos: list, until: str) -> None:
    """Adds all steps up to a stage to a pipeline."""
    import apache_beam as beam

    def of(step: Any) -> Any:
        return functools.partial(step, run)

    cuts = (
        root
        | "videos" >> beam.Create(videos)
        | "spread videos" >> beam.Reshuffle()
        | "find parts" >> beam.FlatMapTuple(of(beam_steps.find_parts))
        | "spread parts" >> beam.Reshuffle()
        | "cut" >> beam.MapTuple(of(beam_steps.cut))
    )
    if until == "cut":
        return
    clips = (
        cuts
        | "group parts" >> beam.GroupByKey()
        | "join videos" >> beam.MapTuple(of(beam_steps.join_videos))
        | "spread captions" >> beam.Reshuffle()
        | "caption" >> beam.MapTuple(of(beam_steps.caption))
    )
    if until == "captions":
        return
    marked = _without_duplicates(clips, run)
    costs = cuts | "costs" >> beam.Map(lambda pair: (pair[1][3].video_seconds, pair[1][3].core_seconds))
    costs = costs | "total cost" >> beam.CombineGlobally(beam_steps.total_cost)
    statistics = marked | beam.MapTuple(lambda _, own: beam_steps.count(own)) | beam.CombineGlobally(beam_steps.merged)
    plan = (
        marked
        | "count clips" >> beam.MapTuple(of(beam_steps.clips_per_folder))
        | "counts" >> beam.combiners.ToList()
        | "plan" >> beam.Map(beam_steps.make_plan, len(run.folders))
    )
    plan = beam.pvalue.AsSingleton(plan)
    files = (
        marked
        | "assign" >> beam.FlatMap(lambda pair, whole: beam_steps.assign(run, pair, whole), plan)
        | "group shards" >> beam.GroupByKey()
        | "write shards" >> beam.MapTuple(of(beam_steps.write_shard))
    )
    groups = marked | "write dropped" >> beam.MapTuple(of(beam_steps.write_dropped))
    single, every = beam.pvalue.AsSingleton, beam.pvalue.AsList
    last = root | "end" >> beam.Create([run])
    _ = last | "finish" >> beam.Map(
        beam_steps.finish, single(statistics), single(costs), plan, every(files), every(groups)
    )


def _without_duplicates(clips: Any, run: beam_steps.Run) -> Any:
    """Marks near-duplicates and assigns splits."""
    import apache_beam as beam

    bits = run.job.thresholds.duplicate_bits
    names = clips.pipeline | "no names" >> beam.Create([])
    if bits >= 0:
        prints = clips | "fingerprints" >> beam.FlatMapTuple(beam_steps.fingerprints)
        matches = beam_duplicates.find_duplicates(prints, bits)
        wanted = matches | "by kept" >> beam.FlatMapTuple(beam_steps.by_kept)
        joined = (clips, wanted) | "join kept" >> beam.CoGroupByKey()
        names = joined | "name kept" >> beam.FlatMapTuple(beam_steps.name_kept)
    joined = (clips, names) | "join names" >> beam.CoGroupByKey()
    return joined | "mark" >> beam.MapTuple(functools.partial(beam_steps.mark, run))
