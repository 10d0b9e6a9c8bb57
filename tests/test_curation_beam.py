"""The curation on Apache Beam writes the same bytes as the local job, whatever fails: `make beam-test`."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest

from lavie_jax.curation import __main__ as command
from lavie_jax.curation import beam, beam_duplicates, beam_steps, duplicates, filters, pipeline, video
from lavie_jax.curation.job import CurationJob
from lavie_jax.errors import UserError
from tests import misbehaving, videos

apache_beam = pytest.importorskip("apache_beam", reason="needs the extra curation-beam: make beam-test")
pytestmark = pytest.mark.filterwarnings("ignore")  # Beam and its protobufs warn

JOB = CurationJob(thresholds=filters.Thresholds(min_height=80))
DIRECT = {"runner": "DirectRunner", "workers": 2}


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Videos of all kinds, and one of three parts whose scenes lie across their borders."""
    folder = tmp_path_factory.mktemp("wild") / "in"
    videos.write_wild(folder)
    film = np.concatenate([videos.pan(300 + i, n) for i, n in enumerate((700, 900, 40, 1300, 900, 500))])
    videos.encode(folder / "film.mp4", film)
    (folder / "film.txt").write_text("a film in several parts")
    return folder


@pytest.fixture(scope="module")
def local(wild, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    pipeline.curate(wild, out, JOB, shard_clips=4)
    return out


def digests_of(out):
    """Returns the hashes of all files, those of the report too."""
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def rows_of(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options", [("--direct_running_mode=multi_threading",), ("--direct_running_mode=multi_processing",)]
)
def test_beam_writes_the_same_bytes_as_the_local_job(wild, local, tmp_path, options):
    outcome = beam.curate(wild, tmp_path / "out", JOB, **DIRECT, options=options, shard_clips=4)
    assert digests_of(tmp_path / "out") == digests_of(local)
    assert outcome.clips == 16 and outcome.videos == 24 and outcome.core_seconds > 0
    assert {row["source"] for row in rows_of(tmp_path / "out", "clips")} >= {"film.mp4", "two_scenes.mp4"}


def test_a_job_that_failed_resumes_with_beam_or_locally_and_writes_the_same_bytes(wild, local, tmp_path, monkeypatch):
    """It fails as workers on a full disk do, while cutting and while writing shards."""
    for stage, resume in (("work_on", beam.curate), ("write_clips", pipeline.curate)):
        out, calls = tmp_path / stage, []
        module, name = {"work_on": (pipeline, "work_on"), "write_clips": (beam_steps, "_write_clips")}[stage]
        real = getattr(module, name)

        def failing(*args, real=real, calls=calls):
            calls.append(args)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(UserError, match="the disk of the worker .* is full: free some space; run the same"):
                beam.curate(wild, out, JOB, **DIRECT, shard_clips=4)
        assert not (out / "manifest.json").exists()
        results = {path: path.stat().st_mtime_ns for path in out.glob(".work/*/result.json")}
        assert len(results) >= 2
        resume(wild, out, JOB, shard_clips=4, **({"runner": "DirectRunner"} if resume is beam.curate else {}))
        assert digests_of(out) == digests_of(local)


def test_a_file_that_crashes_or_hangs_is_dropped_by_name_and_the_others_are_kept(wild, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("film_25.mov", "film_25.txt", "web.webm", "web.txt", "silent.mp4"):
        shutil.copy(wild / name, folder)
    monkeypatch.setattr(pipeline, "_curate", misbehaving.curate)
    beam.curate(folder, out, JOB, **DIRECT, time_limit=20.0)
    assert [row["source"] for row in rows_of(out, "clips")] == ["film_25.mov"]
    assert [(row["source"], row["reason"], row["detail"]) for row in rows_of(out, "dropped")] == [
        ("silent.mp4", "unreadable", "the process for part 1 of 1 took longer than 20 s"),
        ("web.webm", "unreadable", "the process for part 1 of 1 was killed by SIGABRT"),
    ]


def caption_with_mean_colour(frames):
    """A captioner whose captions are too short for some clips."""
    red, green, _ = frames.mean((0, 1, 2)).round().astype(int)
    return f"a land of {green}" if red > 110 else "land"


def test_captions_are_a_stage_of_their_own_that_runs_later_or_again(wild, tmp_path, monkeypatch):
    folder, calls = tmp_path / "in", []
    folder.mkdir()
    for name in ("two_scenes.mp4", "film_25.mov", "film_25.txt", "silent.mp4", "web.webm", "old.avi", "brief.mp4"):
        shutil.copy(wild / name, folder)
    job = CurationJob(thresholds=JOB.thresholds, captioner=caption_with_mean_colour)
    pipeline.curate(folder, tmp_path / "local", job)
    assert {row["reason"] for row in rows_of(tmp_path / "local", "dropped")} == {"short caption", "too few frames"}

    out, real = tmp_path / "out", beam_steps.models.make_batch_captioner
    loaded = []
    monkeypatch.setattr(beam_steps.models, "make_batch_captioner", lambda name: loaded.append(name) or real(name))
    assert beam.curate(folder, out, job, **DIRECT, until="cut") is None
    assert not loaded and not (out / ".work/captions").exists()
    monkeypatch.setattr(pipeline, "work_on", lambda *args: calls.append(args))  # everything is cut
    assert beam.curate(folder, out, job, **DIRECT, until="captions") is None
    beam_steps._captioner.cache_clear()
    other = CurationJob(thresholds=JOB.thresholds, captioner="tests.test_curation_beam:short")
    beam.curate(folder, out, other, **DIRECT, until="captions")
    assert len(loaded) == 2 and not calls
    beam.curate(folder, out, job, **DIRECT)
    assert digests_of(out) == digests_of(tmp_path / "local") and len(loaded) == 2 and not calls


def short(frames):
    """Another captioner."""
    return "some other text"


def test_latents_are_the_same_bytes_also_after_a_job_with_others(wild, tmp_path, monkeypatch):
    from tests.tiny import make_base

    weights, words = make_base(tmp_path / "base"), ["--input", str(tmp_path / "in"), "--min-height", "80"]
    (tmp_path / "in").mkdir()
    for name in ("two_scenes.mp4", "two_scenes.txt", "film_25.mov", "film_25.txt", "turned.mp4", "turned.txt"):
        shutil.copy(wild / name, tmp_path / "in")
    words += ["--latents", str(weights), "--latent-sizes", "16x24,24x16", "--latent-fps", "8", "--shard-clips", "2"]
    command.main([*words, "--workers", "1", "--out", str(tmp_path / "local")])
    words += ["--workers", "2", "--out", str(tmp_path / "out"), "--runner", "direct"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # latents of another rate are there already
        patch.setattr(beam_steps, "finish", lambda *args: 1 / 0)
        command.main([*words, "--latent-fps", "4"])
    assert list((tmp_path / "out").glob("*/*.array_record"))
    command.main(words)
    assert digests_of(tmp_path / "out") == digests_of(tmp_path / "local")
    assert len(list((tmp_path / "out").glob("*/*.array_record"))) == 3


# ---- near-duplicates ----


def chains(clips, seed):
    """Fingerprints of which many are near others, in chains, and some are equal to others."""
    rng = np.random.default_rng(seed)
    bits, colours = rng.integers(0, 2, (clips, 256), np.uint8), rng.integers(0, 256, (clips, 192), np.uint8)
    for i in range(1, clips):
        if rng.random() < 0.5:
            near = int(rng.integers(max(0, i - 40), i))
            bits[i] = bits[near]
            bits[i, rng.choice(256, rng.integers(0, 22), replace=False)] ^= 1
            noise = rng.integers(-18, 19, 192) * (rng.random() < 0.9)
            colours[i] = np.clip(colours[near].astype(int) + noise, 0, 255)
            if rng.random() < 0.2:
                bits[i], colours[i] = bits[near], colours[near]
    ids = np.arange(clips) // 3 * beam_duplicates.SCENES + np.arange(clips) % 3
    return duplicates.Fingerprints(ids, np.packbits(bits, axis=1).view(np.uint64), colours)


@pytest.mark.parametrize("max_bits, rows", [(16, 65536), (16, 60), (2, 65536)])
def test_chains_of_near_duplicates_are_settled_as_by_the_local_job(max_bits, rows, tmp_path, monkeypatch):
    """In any order of arrival, in one bucket or many, also when a bucket does not fit into memory."""
    monkeypatch.setattr(beam_duplicates, "ROWS", rows)
    prints = chains(400, seed=max_bits)
    kept, dropped, expected = beam_duplicates.settle_in_order([prints], max_bits)
    brute = []
    for i in range(len(prints)):
        near = [k for k in brute if duplicates.are_near(prints.bits[[k]], prints.bits[[i]], prints.colours[[k]],
                                                        prints.colours[[i]], max_bits)[0]]  # fmt: skip
        brute += [] if near else [i]
    assert kept.ids.tolist() == prints.ids[brute].tolist() and 20 < len(dropped) < 350
    with apache_beam.Pipeline() as root:
        order = np.random.default_rng(0).permutation(len(prints))
        batches = root | apache_beam.Create([(7, prints[own]) for own in np.array_split(order, 9)])
        found = beam_duplicates.find_duplicates(batches, max_bits)
        _ = found | apache_beam.Map(lambda pair: np.save(tmp_path / f"{uuid.uuid4()}.npy", np.array(pair[1])))
    found = beam_duplicates.least([tuple(np.load(path)) for path in tmp_path.glob("*.npy")])
    assert found[0].tolist() == expected[0].tolist() and found[1].tolist() == expected[1].tolist()


# ---- bad input ----


@pytest.mark.parametrize(
    "words, message",
    [
        (("--runner", "SomeRunner"), "--runner SomeRunner is not a runner of the installed Apache Beam"),
        (("--runner", "FlinkRunner", "--", "--flink_job_server_jar=none.jar"), "run the same command to resume"),
        (("--runner", "DirectRunner", "--images", "folder:in"), "--runner is for --input"),
        (("--runner", "DirectRunner", "--workers", "0"), "--workers must be at least 1; given 0"),
        (
            ("--runner", "DirectRunner", "--", "--direct_running_mode=none"),
            "options of --runner DirectRunner: argument --",
        ),
        (("--runner", "FlinkRunner", "--workers", "2"), "--workers is for the local job and DirectRunner"),
        (("--runner", "DirectRunner", "--min-words", "9"), "was started with other settings (min_words was 3, now 9)"),
        (("--runner", "DirectRunner", "--captioner", "os:abort"), "captioner was None, now a later stage"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, wild, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("film_25.mov", "film_25.txt"):
        shutil.copy(wild / name, "in")
    beam.curate(Path("in"), Path("out"), JOB, **DIRECT, until="cut")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--input", "in", "--out", "out", "--min-height", "80", *words])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line
    assert not Path("out/manifest.json").exists()


def test_workers_with_other_packages_are_refused(wild, tmp_path, monkeypatch, caplog):
    other = beam_steps.package_versions() | {"av": "1.0"}
    monkeypatch.setattr(beam_steps, "package_versions", lambda: other)
    with pytest.raises(UserError, match="the worker .* has av 1.0, the command .*: use the same packages on all"):
        beam.curate(wild, tmp_path / "out", JOB, **DIRECT)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]  # the engine's tracebacks
    assert not list(tmp_path.glob("out/.work/*/" + video.RESULT)) and not (tmp_path / "out/manifest.json").exists()
