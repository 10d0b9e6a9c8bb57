"""Curation from video files to shards for training, on small videos in many codecs, intact and damaged."""

import ast
import contextlib
import csv
import dataclasses
import errno
import graphlib
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.curation import __main__ as command
from lavie_jax.curation import (
    beam_steps,
    duplicates,
    filters,
    inputs,
    isolation,
    pipeline,
    scenes,
    text_lines,
    video,
)
from lavie_jax.curation.inputs import Caption, HeldOut, caption_of, find_videos
from lavie_jax.curation.job import CurationJob, package_versions
from lavie_jax.data import pipeline as data_pipeline
from lavie_jax.data import shard_readers, shards, sources, video_files
from lavie_jax.data.config import DataConfig
from lavie_jax.errors import UserError
from lavie_jax.stages.clips import pixels_to_float
from lavie_jax.training import optimizer
from lavie_jax.training.state import make_state
from lavie_jax.training.step import Task, make_update
from tests import misbehaving, videos

ROOT = Path(__file__).parents[1]
SMALL = ("--min-height", "80", "--workers", "1")  # the tests' videos have 96 rows
STEPS = 30  # of training


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Returns a folder of videos and {file: (caption, reason for dropping it)}."""
    folder = tmp_path_factory.mktemp("wild") / "in"
    return folder, videos.write_wild(folder)


@pytest.fixture(scope="module")
def curated(wild, tmp_path_factory):
    """Curates `wild` in one uninterrupted run and one process."""
    out = tmp_path_factory.mktemp("curated") / "out"
    command.main(["--input", str(wild[0]), "--out", str(out), *SMALL, "--shard-clips", "4"])
    return out


def rows_of(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def digests_of(out):
    """Returns the hashes of all files but the report: they must depend only on the input."""
    paths = [p for p in out.iterdir() if p.suffix in (".array_record", ".jsonl", ".json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def records_of(out):
    """Returns the fields of every record, in order."""
    readers = shard_readers.Readers(sorted(out.glob("*.array_record")))
    return [msgpack.unpackb(readers[i]) for i in range(readers.starts[-1])]


def clip_of(record, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(record["video"])
    return video_files.read_clip(path)


# ---- kept and dropped scenes ----


def test_every_file_is_kept_or_dropped_for_its_own_reason(wild, curated):
    dropped = {row["source"]: row["reason"] for row in rows_of(curated, "dropped")}
    assert dropped == {name: reason for name, (_, reason) in wild[1].items() if reason}
    kept = {row["source"] for row in rows_of(curated, "clips")}
    assert kept == {name for name, (_, reason) in wild[1].items() if not reason}
    manifest = json.loads((curated / "manifest.json").read_text())
    assert sum(manifest["dropped"].values()) == len(dropped) and manifest["clips"] == len(kept) + 1


def test_every_clip_has_its_own_frames_caption_rate_and_times(curated, tmp_path):
    """For every codec, the first and last frame equal those of the source and differ from its other frames."""
    # The seeds in `videos.write_wild`.
    truth = {"film_25": 3, "odd_ntsc": 4, "varying": 5, "turned": 6, "web": 7, "old": 8, "wide_bars": 9, "within": 10}
    records = records_of(curated)
    assert len(records) == 10
    for record in records:
        frames, rate = clip_of(record, tmp_path)
        stem = Path(record["source"]).stem
        assert record["caption"] == f"the land of {record['source'].partition('.')[0].replace('_', ' ')}"
        assert rate == pytest.approx(record["fps"], rel=1e-3) and frames.shape[0] == record["frames"]
        assert frames.shape[1:3] == (record["height"], record["width"])
        assert record["end"] - record["start"] == pytest.approx(record["frames"] / record["fps"])
        if stem == "two_scenes":
            first, seed, count = (0, 1, 30) if record["start"] == 0 else (0, 2, 20)
        else:
            first, seed, count = 0, truth[stem], 30 if stem == "varying" else 24
        height, width = {"odd_ntsc": (97, 141)}.get(stem, (videos.HEIGHT, videos.WIDTH))
        land = videos.pan(seed, count, height=height, width=width)
        if stem == "turned":
            land = np.rot90(land, -1, axes=(1, 2))
        if stem == "wide_bars":  # a row next to each bar is cropped too
            land = land[:, 1:-1]
        land = land[:, : record["height"], : record["width"]]
        for mine, theirs in ((frames[0], land[first]), (frames[-1], land[-1])):
            assert np.abs(mine.astype(int) - theirs).mean() < 12, record["source"]
            assert np.abs(mine.astype(int) - land[len(land) // 2]).mean() > 20  # the measure distinguishes frames


def test_a_cut_is_found_at_the_exact_frame(curated):
    times = [(row["start"], row["end"]) for row in rows_of(curated, "clips") if row["source"] == "two_scenes.mp4"]
    assert times == [(0.0, 30 / 24), (30 / 24, 50 / 24)]


@pytest.mark.parametrize("lengths", [(1, 20), (20, 1), (3, 3, 4, 14), (24,)])
def test_scenes_of_any_length_end_at_the_cut_and_have_samples_of_their_own(lengths, tmp_path):
    lands = [videos.pan(30 + i, n) for i, n in enumerate(lengths)]
    path = videos.encode(tmp_path / "a.mp4", np.concatenate(lands), crf="8")
    result = list(scenes.find_scenes(path, threshold=3.0))
    assert [scene.last - scene.first for scene in result] == list(lengths)
    for scene, land in zip(result, lands):
        assert np.abs(scene.samples[0].astype(int) - land[0]).mean() < 8
        assert len(scene.samples) == len(land) if len(land) <= scenes.SAMPLES else len(scene.samples) >= 8


@pytest.mark.parametrize("frames", [13, 30, 70])
def test_the_scenes_of_the_parts_are_those_of_the_whole(frames, tmp_path):
    """Also where frames repeat, where a part has no cut, and where one begins a frame before or after a cut."""
    lengths = (29, 2, 30, 9, 80)
    film = np.concatenate([videos.pan(60 + i, n) for i, n in enumerate(lengths)])
    film[100:125] = film[100]  # a still, longer than frames are withheld
    path = videos.encode(tmp_path / "a.mp4", film, crf="8", options={})
    whole = list(scenes.find_scenes(path, threshold=3.0))
    ends = [*range(frames, len(film), frames), sys.maxsize]
    parts = [
        scene
        for part in zip([0, *ends], ends)
        for scene in scenes.find_scenes(path, threshold=3.0, part=part)
    ]  # fmt: skip
    assert [(s.first, s.last) for s in parts] == [(s.first, s.last) for s in whole] and len(whole) >= 4
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(parts, whole))
    short = [
        s for part in zip([0, *ends], ends) for s in scenes.find_scenes(path, threshold=3.0, part=part, max_frames=20)
    ]
    assert {s.first for s in whole} < {s.first for s in short} and all(s.last - s.first <= 20 for s in short)
    assert [s.last for s in short[:-1]] == [s.first for s in short[1:]] and short[-1].last == len(film)


def test_a_long_scene_has_a_bounded_number_of_evenly_spaced_samples():
    samples = scenes._Samples()
    for i in range(1000):
        samples.add(np.full((1, 1, 3), i % 251, np.uint8))
    kept = samples.stack()[:, 0, 0, 0]
    assert 8 <= len(kept) <= 16 and kept.tolist() == [i % 251 for i in range(0, 1000, 64)]


def test_repeated_frames_do_not_make_motion_look_like_a_cut(tmp_path):
    """Every third frame is shown twice, as in telecined film."""
    land = videos.pan(40, 40)
    shown = np.sort(np.concatenate([np.arange(40), np.arange(0, 40, 3)]))
    path = videos.encode(tmp_path / "a.mp4", land[shown], crf="8")
    assert len(list(scenes.find_scenes(path, threshold=3.0))) == 1


# ---- filters ----


def test_bars_are_detected_at_the_exact_row_and_not_in_a_dark_room():
    land = videos.pan(50, 8)
    assert filters.bars(videos.barred(land, rows=12)) == (12, 12, 0, 0)
    assert filters.bars(np.pad(land, ((0, 0), (9, 0), (20, 14), (0, 0)))) == (9, 0, 20, 14)
    assert filters.bars(land) == (0, 0, 0, 0)
    room = np.zeros_like(land)
    room[:, 40:60, 70:90] = land[:, 40:60, 70:90]
    assert filters.bars(room) == (0, 0, 0, 0)
    assert filters.bars(np.zeros_like(land)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "want, reason, size",
    [
        ({"letterbox": "crop"}, "", (94, 160)),
        ({"letterbox": "keep"}, "", (128, 160)),
        ({"letterbox": "drop"}, "letterbox", (0, 0)),
        ({"letterbox": "crop", "min_height": 100}, "low resolution", (0, 0)),  # without the bars
        ({"letterbox": "keep", "min_height": 100}, "", (128, 160)),
    ],
)
def test_black_bars_are_cropped_kept_or_a_reason_to_drop(wild, tmp_path, want, reason, size):
    (one,) = [v for v in find_videos(wild[0], None) if v.name == "wide_bars.mp4"]
    thresholds = filters.Thresholds(**{"min_height": 80, **want})
    video.curate_part(video.Part(one), tmp_path, thresholds, captioner=None, scorer=None)
    (result,) = video.read_result(one, tmp_path)
    assert (result.reason, (result.height, result.width)) == (reason, size)
    (tmp_path / video.Part(one).name / "result.json").write_text("[{")  # an incomplete result counts as missing
    assert video.read_result(one, tmp_path) is None


def test_bars_at_full_size_cover_the_measured_ones_and_leave_even_sides():
    rng = np.random.default_rng(0)
    for _ in range(100):
        small, zoom = rng.integers(60, 400, 2), rng.uniform(1, 9, 2)
        full = np.round(small * zoom).astype(int)
        seen = filters.Bars(*(int(n) for n in rng.integers(0, 12, 4)))
        bars = video._at_full_size(seen, tuple(small.tolist()), tuple(full.tolist()))
        height, width = filters.Bars(*bars).cut(np.empty((*full, 3), np.uint8)).shape[:2]
        assert height % 2 == width % 2 == 0
        for mine, theirs, scale in zip(bars, seen, np.repeat(full / small, 2)):
            assert (mine >= theirs * scale and mine <= (theirs + 1) * scale + 2) if theirs else mine <= 1


def test_a_small_moving_object_counts_as_motion_and_noise_does_not():
    still = np.repeat(videos.pan(51, 1), 12, axis=0)
    rng = np.random.default_rng(0)
    grain = np.clip(still + rng.normal(0, 1.5, still.shape), 0, 255).astype(np.uint8)
    assert filters.motion(grain) < 0.002
    for i in range(12):
        still[i, 20:26, 10 * i : 10 * i + 6] = 255
    assert filters.motion(still) > 0.002


def test_static_text_is_distinguished_from_stripes_that_slide_along_themselves():
    land = videos.pan(52, 12, height=120, width=240)
    land[:, ::12] //= 3  # stripes along the pan: their edges are static
    assert filters.overlay(land) == 0
    assert filters.overlay(videos.lettered(land)) > 0.004
    assert filters.overlay(np.repeat(videos.lettered(land[:1]), 12, axis=0)) is None  # everything is static


def test_frames_of_any_size_can_be_judged():
    """Squares of 8x8 pixels and windows of text need not divide the sides, nor their sides less one."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 8, 15, 16, 17, 23, 24, 31, 33):
        for frames in (rng.integers(256, size=(12, *shape, 3), dtype=np.uint8) for shape in ((size, 64), (64, size))):
            assert filters.bars(frames) == (0, 0, 0, 0)
            assert 0.8 < filters.motion(frames) <= 1 and filters.brightness(frames) > 100
            assert (filters.overlay(frames) == 0) == (size >= 16)
            assert text_lines.text_share(filters.gray(frames)) in (0, None)


def test_the_scene_before_a_camera_that_stands_is_no_mark():
    """However much moves in it, as a large animal before grass."""
    grass = np.repeat(videos.lettered(videos.pan(53, 1, height=120, width=240)), 12, axis=0)
    grass[:, :, :160] = videos.pan(52, 12, height=120, width=160)
    assert filters.overlay(grass) is None
    assert filters.overlay(videos.lettered(videos.pan(52, 12, height=120, width=240))) > 0.004


@pytest.mark.parametrize("size", [10, 16, 40, 64])
@pytest.mark.parametrize("colour", ["white", "#404040"])
def test_text_that_rolls_or_stands_is_found_and_textures_are_not(size, colour):
    rng = np.random.default_rng(size)
    land = videos.pan(54, 6, height=224, width=398)
    grass = np.clip(land + rng.normal(0, 40, land.shape), 0, 255).astype(np.uint8)
    fence = np.where(np.arange(398)[None, None, :, None] // 3 % 2, land, 0).astype(np.uint8)
    for scene in (land, grass, fence):
        assert text_lines.text_share(filters.gray(scene)) == 0
    sky, font = Image.new("RGB", (398, 224), "#8090a0"), ImageFont.load_default(size)
    frames = []
    for step in range(6):
        frame = sky.copy()
        ImageDraw.Draw(frame).text((20, 140 - 20 * step), "Written and directed by nobody"[: 700 // size], colour, font)
        frames.append(np.asarray(frame))
    assert text_lines.text_share(filters.gray(np.stack(frames))) >= 5 / 6


def test_a_near_duplicate_is_found_among_many_and_others_are_not():
    """Looking up parts of the hashes gives the same answers as comparing with every clip."""
    index = duplicates.HashIndex(16)
    hashes = [duplicates.perceptual_hash(videos.pan(seed, 8)) for seed in range(60, 100)]
    assert [index.find_or_add(one) for one in hashes] == [None] * 40
    noisy = np.clip(videos.pan(77, 8).astype(int) + np.random.default_rng(0).normal(0, 6, (8, 96, 160, 3)), 0, 255)
    assert index.find_or_add(duplicates.perceptual_hash(noisy.astype(np.uint8))) == 17
    flat = [np.full((8, 32, 32, 3), colour, np.uint8) for colour in (60, 160)]  # with equal difference hashes
    assert [index.find_or_add(duplicates.perceptual_hash(one)) for one in flat] == [None, None]


# ---- captions ----


def test_a_scene_gets_the_caption_that_covers_it():
    early, late = Caption("early", start=0, end=4), Caption("late", start=4, end=9)
    assert caption_of((early, late), start=0, end=5) == early
    assert caption_of((early, late), start=3, end=9) == late
    assert caption_of((early,), start=3.5, end=6) is None
    assert caption_of((), start=0, end=1) is None


def test_a_table_captions_parts_of_a_video_and_gives_categories(wild, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("two_scenes.mp4", "film_25.mov", "web.webm"):
        shutil.copy(wild[0] / name, folder)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption", "start", "end", "category"])
        rows.writerow(["in/two_scenes.mp4", "the first land of all", 0, 1.2, "lands"])
        rows.writerow(["in/two_scenes.mp4", "then comes another one", 1.2, "", "others"])
        rows.writerow(["in/film_25.mov", "it has been filmed", "", "", "lands"])
        rows.writerow(["in/nowhere.mp4", "this is not there", "", "", ""])
    command.main(["--input", str(folder), "--out", str(tmp_path / "out"), "--captions", str(tmp_path / "table.csv"),
                  *SMALL])  # fmt: skip
    rows = rows_of(tmp_path / "out", "clips")
    assert [(row["source"], row["start"], row["caption"], row["category"]) for row in rows] == [
        ("film_25.mov", 0.0, "it has been filmed", "lands"),
        ("two_scenes.mp4", 0.0, "the first land of all", "lands"),
        ("two_scenes.mp4", 1.25, "then comes another one", "others"),
    ]
    assert [row["reason"] for row in rows_of(tmp_path / "out", "dropped")] == ["no caption"]
    assert (tmp_path / "out/report/categories.png").stat().st_size > 1000


def caption_with_mean_colour(frames):
    """A captioner whose captions can be checked against the frames."""
    return "a land of colour {} {} {}".format(*frames.mean((0, 1, 2)).round().astype(int))


def test_a_captioner_captions_each_scene_without_a_given_caption(wild, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("two_scenes.mp4", "silent.mp4", "film_25.mov", "film_25.txt"):
        shutil.copy(wild[0] / name, folder)
    command.main(["--input", str(folder), "--out", str(tmp_path / "out"), *SMALL,
                  "--captioner", "tests.test_curation:caption_with_mean_colour"])  # fmt: skip
    for record in records_of(tmp_path / "out"):
        if record["source"] == "film_25.mov":
            assert record["caption"] == "the land of film 25"
            continue
        captioned = [int(word) for word in record["caption"].split()[-3:]]
        actual = clip_of(record, tmp_path)[0].mean((0, 1, 2))
        assert np.abs(captioned - actual).max() < 4
    assert len(records_of(tmp_path / "out")) == 4


# ---- reproducible after interruptions ----


@pytest.mark.heavy  # the next test curates the same videos in pieces
def test_more_workers_write_the_same_bytes(wild, curated, tmp_path):
    out = tmp_path / "out"
    command.main(["--input", str(wild[0]), "--out", str(out), "--min-height", "80", "--workers", "3",
                  "--shard-clips", "4"])  # fmt: skip
    assert digests_of(out) == digests_of(curated)


def test_a_killed_run_resumes_and_writes_the_same_bytes(wild, curated, tmp_path, monkeypatch):
    """Killed between videos; then stopped within one, between two, while writing shards, and before the manifest."""
    out = tmp_path / "out"
    words = ["--input", str(wild[0]), "--out", str(out), *SMALL, "--shard-clips", "4"]
    line = [sys.executable, "-m", "lavie_jax.curation", *words]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".work/[0-9a-f]*/result.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.parent: path.stat().st_mtime_ns for path in out.glob(".work/[0-9a-f]*/result.json")}
    assert 3 <= len(done) < 23 and [path.name for path in out.iterdir()] == [".work"]

    stop = RuntimeError("stopped")
    for module, name, after in (
        (video.video_files, "encode", 2),
        (pipeline, "curate_part", 3),
        (pipeline.assemble, "fields_of", 29),  # in the second shard
        (pipeline.report, "write", 0),
        (pipeline.output, "write_manifest", 0),
    ):
        calls, real = itertools.count(), getattr(module, name)

        def stopping(*args, calls=calls, after=after, real=real, **kwargs):
            if next(calls) == after:
                raise stop
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopping)
            with pytest.raises(RuntimeError, match="stopped"):
                command.main(words)
        assert not (out / "manifest.json").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in
               ((folder / "result.json", when) for folder, when in done.items()))  # fmt: skip
    (out / ".123-clips-00001.array_record").write_bytes(b"half")  # as a kill within a shard leaves it
    command.main(words)
    assert digests_of(out) == digests_of(curated)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in curated.iterdir())


def test_other_settings_a_second_run_and_a_finished_set_are_refused(wild, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("film_25.mov", "film_25.txt"):
        shutil.copy(wild[0] / name, folder)
    words = ["--input", str(folder), "--out", str(tmp_path / "out"), *SMALL]

    def refused(*more):
        with pytest.raises(SystemExit) as stopped:
            command.main([*words, *more])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.report, "write", lambda *args: refused_within.append(refused()) or 1 / 0)
        refused_within = []
        with pytest.raises(ZeroDivisionError):
            command.main(words)
    assert "another run is writing to" in refused_within[0]
    assert "min_frames was 16, now 8" in refused("--min-frames", "8")
    command.main(words)
    before = digests_of(tmp_path / "out")
    assert "contains a finished set" in refused()
    assert digests_of(tmp_path / "out") == before


def test_the_folder_of_a_killed_job_is_reopened_with_settings_of_a_stage_that_is_repeated(tmp_path):
    out, shard = tmp_path / "out", tmp_path / "out/16x24/clips-00000.array_record"
    first = {"min_height": 80, "latents": {"fps": 8}}
    with pipeline.output.open_output(out, first) as work:
        shard.parent.mkdir()
        shard.write_bytes(b"latents of 8 frames per second")
        (work / ".0123456789ab-outcome.json").write_text("half")
    for settings, change in (({"min_height": 80}, "now None"), ({**first, "latents": {"fps": 4}}, "now {'fps': 4}")):
        with pytest.raises(UserError, match=f"latents was {{'fps': 8}}, {change}"):
            with pipeline.output.open_output(out, settings):
                pass
    with pipeline.output.open_output(out, first, repeated=("latents",)) as work:
        assert shard.exists() and not list(work.glob(".*-*"))
    with pipeline.output.open_output(out, {**first, "latents": {"fps": 4}}, repeated=("latents",)):
        assert not shard.exists()
    with pytest.raises(UserError, match="latents was {'fps': 4}, now {'fps': 8}"):
        with pipeline.output.open_output(out, first):
            pass


def test_a_full_disk_and_a_dead_worker_are_reported_in_one_line_and_lose_no_work(wild, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("film_25.mov", "film_25.txt", "web.webm", "web.txt"):
        shutil.copy(wild[0] / name, folder)
    job = CurationJob(thresholds=filters.Thresholds(min_height=80))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(video.video_files, "encode", full)
        with pytest.raises(UserError, match="is full: free some space and run the same command to resume"):
            pipeline.curate(folder, out, job)
    killer = dataclasses.replace(job, captioner="os:abort")
    (folder / "web.txt").unlink()
    with pytest.raises(UserError, match="captioner was None, now os:abort"):
        pipeline.curate(folder, out, killer)
    (folder / "web.txt").write_text("the land of web")
    assert pipeline.curate(folder, out, job).clips == 2


def test_a_full_disk_leaves_no_half_message_for_the_command_of_beam(tmp_path, monkeypatch):
    def write(path, text, encoding):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(OSError), beam_steps.errors_in(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not (tmp_path / beam_steps.ERROR).exists()


def test_a_worker_of_beam_that_does_not_see_the_input_ends_the_job(tmp_path):
    """Or else its videos would be dropped as unreadable."""
    job, gone = CurationJob(), inputs.Video(tmp_path / "gone.mp4", "gone.mp4", 0, (), "key")
    run = beam_steps.Run(
        job=job, work=tmp_path, out=tmp_path, settings=job.settings(), versions=package_versions(), videos=1,
        shard_clips=1, time_limit=1.0, captions="", sizes=(),
    )  # fmt: skip
    with pytest.raises(UserError, match="has no file .*gone.mp4': mount the input folder on all workers"):
        beam_steps.find_parts(run, 0, gone)
    assert "gone.mp4" in (tmp_path / beam_steps.ERROR).read_text()


def test_a_file_that_crashes_or_hangs_is_dropped_by_name_and_the_others_are_kept(wild, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("film_25.mov", "film_25.txt", "web.webm", "silent.mp4"):
        shutil.copy(wild[0] / name, folder)
    monkeypatch.setattr(pipeline, "_curate", misbehaving.curate)  # in worker processes: the name is sent to them
    job = CurationJob(thresholds=filters.Thresholds(min_height=80))
    assert pipeline.curate(folder, out, job, workers=2, time_limit=15.0).clips == 1
    assert [row["source"] for row in rows_of(out, "clips")] == ["film_25.mov"]
    assert [(row["source"], row["reason"], row["detail"]) for row in rows_of(out, "dropped")] == [
        ("silent.mp4", "unreadable", "the process for part 1 of 1 took longer than 15 s"),
        ("web.webm", "unreadable", "the process for part 1 of 1 was killed by SIGABRT"),
    ]


def test_a_worker_that_is_killed_once_loses_nothing(tmp_path):
    """Whoever kills it: the call is repeated in another process."""
    worker, marker = isolation.Worker(misbehaving.nothing), tmp_path / "killed"
    part = video.Part(inputs.Video(tmp_path / "none.mp4", "none.mp4", 0, (), "key"))
    try:
        with pytest.raises(isolation.Interrupted, match="SIGKILL, perhaps for lack of memory"):
            worker(misbehaving.die_once, marker)
        assert worker(misbehaving.die_once, marker, seconds=math.inf) == "alive"
        with pytest.raises(UserError, match="its own"):
            worker(misbehaving.raise_error, "its own")
        assert pipeline.work_on(worker, part, tmp_path, filters.Thresholds(), 0.0).dropped == 1
    finally:
        worker.close()


def test_clips_can_be_held_out_by_time_small_and_short(wild, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("two_scenes", "film_25", "marked"):
        for path in wild[0].glob(f"{name}.*"):
            shutil.copy(path, folder)
    words = ["--input", str(folder), "--out", str(out), *SMALL]
    command.main([*words, "--hold-out", "two*:0-1", "none.mp4", "--max-height", "48", "--max-seconds", "0.7"])
    rows = rows_of(out, "clips")
    assert {(row["height"], row["width"]) for row in rows} == {(48, 80)}
    assert [(row["source"], row["start"], row["frames"], row["split"]) for row in rows] == [
        ("film_25.mov", 0.0, 18, "train"),
        ("two_scenes.mp4", 0.0, 17, "val"),
        ("two_scenes.mp4", 30 / 24, 17, "train"),
    ]
    for split, count in (("train", 2), ("val", 1)):
        records = shards.ShardRecords(out, medium="video", split=split)
        assert len(records) == count and {records.fields(i)[1]["split"] for i in range(count)} == {split}
    page = (out / "report.html").read_text()
    assert "Longest clip" in page and "dropped-overlaid-text.png" in page
    with Image.open(out / "report/dropped-overlaid-text.png") as picture:
        assert np.asarray(picture).std() > 20
    for given, message in (("nothing.mp4", "no clip that --hold-out covers is left"), ("*", "only clips that")):
        held_out = (HeldOut.parse(given),)
        job = CurationJob(thresholds=filters.Thresholds(min_height=80), hold_out=held_out)
        with pytest.raises(UserError, match=message):
            pipeline.curate(folder, tmp_path / f"out-{len(given)}", job)


# ---- training reads it ----


def test_training_steps_on_the_shards(curated):
    """Uses training's data pipeline and update step, with a tiny model that predicts each frame from the previous one.

    It must beat a constant prediction, which shows that it was trained on clips.
    """

    def loss(params, frozen, batch, rng):
        video = pixels_to_float(batch["video"])
        guess = video[:, :-1] @ params["kernel"] + params["bias"]
        return jnp.square(guess - video[:, 1:]).mean(), {"spread": video.var()}

    start = {"kernel": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)}
    task = Task(
        init=lambda rng: start, start=None, frozen={}, loss=loss, held_out=loss, export=lambda *_: None
    )  # fmt: skip
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=0.1, warmup=0), STEPS)
    state, update = make_state(start, task, tx), jax.jit(make_update(task, tx, ema_decay=0.9))
    config = DataConfig(source="array_record", path=str(curated), frames=8, fps=12.0, height=48, width=64)
    with contextlib.closing(data_pipeline.batches(data_pipeline.open_examples(config, batch_size=4), None)) as rows:
        for _, batch in zip(range(STEPS), rows):
            state, result = update(state, task.frozen, batch, jax.random.key(0))
    assert np.isfinite(result["loss"]) and result["loss"] < 0.5 * result["spread"]


def test_training_can_read_every_clip_of_the_shards(curated):
    """All kept clips have enough frames."""
    window = video_files.ClipWindow(frames=16)
    records = sources.open_records(
        "array_record", str(curated), medium="video", split="train", window=window, val_fraction=0.0
    )
    source = sources.RecordSource(clips=records, window=window, height=32, width=32)
    items = [source.video(i, np.random.default_rng(i)) for i in range(len(source))]
    assert sorted(item.caption for item in items) == sorted(row["caption"] for row in rows_of(curated, "clips"))
    assert not any(item.skipped for item in items)


# ---- report ----


def test_the_report_shows_what_was_written(curated):
    page = (curated / "report.html").read_text()
    for name in ("durations", "captions", "resolutions", "dropped", "samples"):
        assert f'src="report/{name}.png"' in page
        with Image.open(curated / f"report/{name}.png") as image:
            assert np.asarray(image.convert("RGB")).std() > 10
    assert "aesthetic.png" not in page and "categories.png" not in page  # neither was given
    for row in rows_of(curated, "dropped"):
        assert f"<td>{row['reason']}</td>" in page


def test_the_manifest_has_the_hashes_of_the_files_it_lists(curated):
    manifest = json.loads((curated / "manifest.json").read_text())
    names = {p.name for p in curated.iterdir() if p.suffix in (".array_record", ".jsonl")}
    assert set(manifest["files"]) == names and len(names) == 5
    for name, entry in manifest["files"].items():
        content = (curated / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    clips = rows_of(curated, "clips")
    for record, row in zip(records_of(curated), clips, strict=True):
        assert row.pop("sha256") == hashlib.sha256(record.pop("video")).hexdigest()
        assert {key: value for key, value in row.items() if key not in ("shard", "index")} == record


# ---- structure ----


def test_modules_import_each_other_in_one_direction():
    """No module of the package imports itself through others; imports inside functions count too."""
    folder = ROOT / "lavie_jax/curation"
    imports = {}
    for path in folder.glob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        names = [name for n in nodes for name in (n.module, *(f"{n.module}.{alias.name}" for alias in n.names))]
        result = {name.split(".")[2] for name in names if name.startswith("lavie_jax.curation.")}
        imports[path.stem] = {name for name in result if (folder / f"{name}.py").is_file()}
    sorter = graphlib.TopologicalSorter(imports)
    assert len(list(sorter.static_order())) == len(imports) > 10  # raises CycleError


# ---- bad input ----


@pytest.mark.parametrize(
    "words, message",
    [
        (("--input", "nowhere"), "--input 'nowhere' is not a folder"),
        (("--input", "bare"), "no video (.mp4, .webm, .mkv, .mov, .avi, ...) in 'bare'"),
        (("--captions", "none.csv"), "no table 'none.csv'"),
        (("--captions", "wrong.csv"), "has the columns film, words; it needs a file"),
        (("--captions", "times.csv"), "start must be a number of seconds; given 'noon'"),
        (("--out", "in/out"), "lies in the input folder"),
        (("--out", "full"), "is not empty (it contains file)"),
        (("--out", "full/file"), "--out 'full/file'"),
        (("--workers", "0"), "--workers must be at least 1"),
        (("--until", "cut"), "--until and options of a runner need --runner NAME"),
        (("--time-limit", "-1"), "--time-limit must be at least 0 seconds"),
        (("--letterbox", "corp"), "did you mean 'crop'"),
        (("--min-frames", "-1"), "--min-frames must be at least 0"),
        (("--max-seconds", "inf"), "--max-seconds must be at least 0 and finite; given inf"),
        (("--cut", "nan"), "--cut must be above 0 and finite; given nan"),
        (("--latents", "base", "--latent-fps", "inf"), "--latent-fps must be above 0 and finite; given inf"),
        (("--captioner", "nowhere"), "--captioner must be a folder or 'module:function'"),
        (("--captioner", "json:nothing"), "cannot be imported"),
        (("--captioner", "bare"), "is not a model folder: config.json is missing"),
        (("--min-aesthetic", "5"), "--min-aesthetic needs --aesthetic-clip"),
        (("--aesthetic-clip", "bare"), "must be given together"),
        (("--hold-out", "film:9-3"), "the start must be before the end"),
        (("--hold-out", "film:9-1.2.3"), "--hold-out takes NAME or NAME:START-END in seconds"),
        (("--max-text", "nan"), "--max-text must be at least 0"),
        (("--min-words", "99"), "no clip is left of 1 videos: 1 short caption"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, wild, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in", "bare", "full"):
        Path(name).mkdir()
    for name in ("film_25.mov", "film_25.txt"):
        shutil.copy(wild[0] / name, "in")
    Path("full/file").write_text("mine")
    Path("wrong.csv").write_text("film,words\na,b\n")
    Path("times.csv").write_text("path,caption,start\nin/film_25.mov,a b c,noon\n")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--input", "in", "--out", "out", *SMALL, *words])
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line and not out
    assert Path("full/file").read_text() == "mine" and not list(Path(".").glob("out/*.array_record"))


def test_missing_libraries_are_reported_before_any_work(wild, tmp_path, monkeypatch):
    for name in ("scenedetect", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf"curation needs {name}: pip install .*lavie_jax\[curation\]"):
                pipeline.curate(wild[0], tmp_path / "out", CurationJob())
    assert not os.path.exists(tmp_path / "out")


def test_thresholds_that_are_off_drop_nothing(wild, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("still", "night", "brief", "tiny", "marked", "terse", "web_copy")
    for name in names:
        shutil.copy(wild[0] / f"{name}.mp4", folder)
        shutil.copy(wild[0] / f"{name}.txt", folder)
    shutil.copy(wild[0] / "film_25.mov", folder)
    shutil.copy(wild[0] / "film_25.txt", folder)
    off = dataclasses.replace(
        filters.Thresholds(), min_words=0, min_frames=0, min_height=0, min_brightness=0, min_motion=0, letterbox="keep",
        max_overlay=1, max_text=1, duplicate_bits=-1,
    )  # fmt: skip
    outcome = pipeline.curate(folder, tmp_path / "out", CurationJob(thresholds=off))
    assert outcome.clips == len(names) + 1 and not outcome.dropped
