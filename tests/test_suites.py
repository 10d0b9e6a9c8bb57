"""Published benchmarks end to end at tiny scale: prompts, names and layout, sampling, resuming, tables."""

import csv
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from lavie_jax.data import video_files
from lavie_jax.errors import UserError
from lavie_jax.evaluation import clipsim, commands, i3d_features, suite_command, suites
from lavie_jax.evaluation.__main__ import main
from lavie_jax.evaluation.i3d_features import ClipFeatures
from lavie_jax.evaluation.suites import SUITES, checked
from lavie_jax.weights import load_folder
from tests import tiny

SIZE = ["--frames", "16", "--height", "16", "--width", "24", "--steps", "2"]


def names(suite, source, seed=0):
    return [item.name for item in checked(SUITES[suite].items(source, seed))]


class Extractor(i3d_features.Extractor):
    devices = 1

    def __init__(self, *_):
        pass

    def __call__(self, clips):
        flat = clips.reshape(len(clips), -1)[:, :50].astype(np.float32)
        return ClipFeatures(np.resize(flat, (len(clips), 400)), np.resize(flat, (len(clips), 1024)), flat[:, 0])


# ---- prompts and names ----


def test_ucf101_has_100_videos_of_each_class_with_its_words_as_prompt(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 YoYo\r\n3 TaiChi\n4 BasketballDunk\n")
    items = checked(SUITES["ucf101"].items(tmp_path / "classInd.txt", 0))
    assert len(items) == 400 and items[0] == ("apply eye makeup", "ApplyEyeMakeup/000")
    assert items[-1] == ("basketball dunk", "BasketballDunk/099")
    for name in ("Archery", "YoYo"):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert names("ucf101", tmp_path / "data")[100] == "YoYo/000"


def test_msrvtt_draws_one_caption_a_test_video(tmp_path):
    content = {
        "videos": [{"video_id": f"video{i}", "split": "test" if i else "train"} for i in range(5)],
        "sentences": [{"video_id": f"video{i}", "caption": f"{i} {k}"} for i in range(5) for k in range(9)],
    }
    (tmp_path / "msrvtt.json").write_text(json.dumps(content))
    items = checked(SUITES["msrvtt"].items(tmp_path / "msrvtt.json", 0))
    assert [item.name for item in items] == ["video1", "video2", "video3", "video4"]
    assert all(item.prompt.split()[0] == item.name[5:] for item in items)
    assert items != checked(SUITES["msrvtt"].items(tmp_path / "msrvtt.json", 1))


def test_vbench_names_videos_by_dimension_prompt_and_index(tmp_path):
    (tmp_path / "color.txt").write_text("a red bird\na blue car\n")
    (tmp_path / "temporal_flickering.txt").write_text("a laptop, frozen in time\n")
    found = names("vbench", tmp_path)
    assert found[:5] == [f"color/a red bird-{i}" for i in range(5)]
    assert found[10:] == [f"temporal_flickering/a laptop, frozen in time-{i}" for i in range(25)]
    (tmp_path / "all_dimension.txt").write_text("a red bird\na laptop, frozen in time\n")
    assert names("vbench", tmp_path) == found  # in some versions, all prompts once more
    (tmp_path / "color.txt").write_text("a red/blue bird\n")
    with pytest.raises(UserError, match="has a slash"):
        names("vbench", tmp_path)


def test_the_other_suites_number_their_videos_as_their_tools_do(tmp_path):
    (tmp_path / "prompt700.txt").write_text("a cat\n\na dog\n")
    assert names("evalcrafter", tmp_path / "prompt700.txt") == ["0000", "0001"]
    folder = tmp_path / "compbench"
    folder.mkdir()
    (folder / "1_consistent_attr.txt").write_text("a cat\na dog\n")
    (folder / "7_numeracy.txt").write_text("two cats\n")
    assert names("t2v-compbench", folder) == ["consistent_attr/0001", "consistent_attr/0002", "numeracy/0001"]
    (tmp_path / "phy.csv").write_text('video_url,caption,sa\nx,"water, poured",1\ny,"water, poured",0\nz,a ball,1\n')
    items = checked(SUITES["videophy"].items(tmp_path / "phy.csv", 0))
    assert items == [("water, poured", "0000"), ("a ball", "0001")]
    (tmp_path / "phy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column `caption`"):
        names("videophy", tmp_path / "phy.csv")
    with pytest.raises(UserError, match="is not T2V-CompBench's folder"):
        names("t2v-compbench", tmp_path / "none")


@pytest.mark.parametrize("name", ["../video1", "/etc/video1", "a//b", ".hidden", "a\0b", "a /b", "x" * 300])
def test_names_that_leave_the_folder_or_hide_are_refused(name, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({name: "a cat"}))
    with pytest.raises(UserError, match="cannot name a file"):
        names("msrvtt", tmp_path / "captions.json")


@pytest.mark.parametrize(
    "content",
    [{"video1": 3}, {"video1": {"caption": "a cat"}}, {"video1": []}, {"sentences": ["a cat"]},
     {"sentences": [{"caption": "a cat"}]}, {"sentences": [{"video_id": "v", "caption": " "}]},
     {"videos": [{"video_id": "v", "split": "train"}], "sentences": [{"video_id": "v", "caption": "a cat"}]}],
)  # fmt: skip
def test_other_files_than_msrvtts_are_refused(content, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="must be MSR-VTT's file|no video of the split test"):
        names("msrvtt", tmp_path / "captions.json")


def test_vbenchs_commands_measure_all_16_dimensions(tmp_path):
    (tmp_path / "run 1").mkdir()
    folders = sorted(set(suites.VBENCH_FOLDERS.values()))
    assert len(folders) == 11 and len(suites.VBENCH_FOLDERS) == 16
    tool = "#!/bin/sh\necho $2 $3 $5 $7 >> log\n"  # stands for vbench evaluate
    (tmp_path / "vbench").write_text(tool)
    (tmp_path / "vbench").chmod(0o755)
    command = suites.vbench_commands(folders, tmp_path / "run 1" / "videos", tmp_path / "run 1")[-1]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, check=True)
    at = f"{tmp_path}/run 1"
    log = (tmp_path / "log").read_text().splitlines()
    assert len(log) == 15  # temporal flickering is apart
    assert f"--dimension motion_smoothness {at}/videos/subject_consistency {at}/results" in log
    assert suites.vbench_commands(["color"], tmp_path, tmp_path, ["color"]) == []
    assert "--mode=custom_input" in suites.vbench_commands(["mine"], tmp_path, tmp_path)[0]


# ---- sampling to the table ----


def stub(folder, stages):
    """A cascade of the folder's settings whose videos depend on the seed alone: the real one compiles for long."""

    def videos(requests, settings, batch_size):
        own = settings["base"]
        for request in requests:
            rng = np.random.default_rng(request.seed)
            yield rng.integers(0, 255, (own.frames, own.height, own.width, 3), dtype=np.uint8)

    weights = {"base": load_folder(folder, params=False)}
    return SimpleNamespace(weights=weights, devices=[None], videos=videos)


@pytest.mark.parametrize("sampler", ["stub", pytest.param("real", marks=pytest.mark.heavy)])
def test_ucf101_goes_from_class_names_to_the_table_and_resumes(sampler, tmp_path, monkeypatch, capsys):
    if sampler == "stub":
        monkeypatch.setattr(suite_command.cascade, "load", stub)
    monkeypatch.setattr(commands, "Extractor", Extractor)
    monkeypatch.setattr(commands, "load_weights", lambda *_: {})
    weights, out = tiny.make_base(tmp_path / "base"), tmp_path / "run"
    (tmp_path / "classes.txt").write_text("1 RedCircle\n")
    flags = ["ucf101", "--classes", str(tmp_path / "classes.txt"), "--reference", "moving_shapes:val:3"]
    flags += ["--weights", str(weights), "--out", str(out), "--limit", "3", *SIZE]
    main([*flags, "--part", "1/2"])
    assert sorted(path.name for path in out.rglob("*.mp4")) == ["001.mp4"]
    main(flags)
    printed = capsys.readouterr().out
    assert "| fvd |" in printed and "526.3" in printed
    table = json.loads((out / "table.json").read_text())
    assert table["published"] == {"fvd": 526.3} and not table["complete"] and table["sampling"]["steps"] == 2
    assert table["numbers"]["fvd"]["n"] == 3 and table["knobs"]["crop_pixels"] == 270 and table["reference_sha256"]
    assert len(list((out / "cache").rglob("*.npz"))) == 6
    before = (out / "videos" / "RedCircle" / "000.mp4").stat().st_mtime_ns
    main(flags)
    assert (out / "videos" / "RedCircle" / "000.mp4").stat().st_mtime_ns == before
    other = tmp_path / "other.txt"
    other.write_text("1 BlueCircle\n")
    for more, message in (
        (["--seed", "7"], "has videos of other settings (seed)"),
        (["--classes", str(other)], "has videos of other prompts"),
        (["--limit", "2"], "has 1 videos besides the 2 to be measured, such as RedCircle/002"),
        (["--guidance", "2"], "has videos of other settings (guidance)"),
        (["--no-sampling", "--part", "0/2"], "give one of them"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--clips", "0"], "--clips must be at least 2"),
    ):
        assert message in refused([*flags, *more], capsys)
    assert "has videos of other settings (steps)" in refused(flags[:-2], capsys)  # which were given before
    # What would fail after sampling is refused before, and leaves nothing.
    fresh = [*flags, "--out", str(tmp_path / "fresh")]
    for more, message in (
        (["--frames", "0"], "frames"),
        (["--steps", "0"], "steps"),
        (["--reference", str(tmp_path / "none")], "does not exist"),
        (["--clips", "4"], "has 3 clips, and --clips asks for 4"),
    ):
        assert message in refused([*fresh, *more], capsys)
    assert not (tmp_path / "fresh").exists()
    ready(tmp_path / "fresh", ["RedCircle/000"])
    assert "1 videos that were not sampled here" in refused(fresh, capsys)
    # Tables of the same prompts and reference are comparable, whatever the model; of other prompts, not.
    limited, model = tmp_path / "limited.json", tmp_path / "model.json"
    limited.write_text(json.dumps({**table, "prompts_sha256": "x"}))
    model.write_text(json.dumps({**table, "sampling": {**table["sampling"], "weights_sha256": "x"}}))
    main(["compare", str(out / "table.json"), str(model)])
    assert "comparable\n  fvd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(out / "table.json"), str(limited)])
    assert "the prompts, or how many of them, differ" in capsys.readouterr().out


def test_msrvtt_measures_clipsim_with_the_drawn_captions(tmp_path, monkeypatch, capsys):
    class Scorer(clipsim.Scorer):
        hash = "h"

        def __init__(self, folder):
            pass

        def embed_frames(self, frames, rounding):
            return np.ones((len(frames), 1), np.float32)

        def embed_text(self, text):
            return np.full(1, float(text), np.float32)

    monkeypatch.setattr(commands, "Scorer", Scorer)
    (tmp_path / "captions.json").write_text(json.dumps({"video7": ["0.5"], "video9": "0.25"}))
    out = tmp_path / "run"
    ready(out, ["video7", "video9"])
    flags = ["--captions", str(tmp_path / "captions.json"), "--clip", "clip", "--out", str(out), "--no-sampling"]
    main(["msrvtt", *flags])
    assert "| clipsim | 0.375 | 0.2949 |" in capsys.readouterr().out
    result = json.loads((out / "clipsim.json").read_text())
    assert result["videos"] == {"video7": 0.5, "video9": 0.25} and result["weights_sha256"] == "h"
    given = out / "captions.json"
    assert f"{given} would be overwritten" in refused(["msrvtt", *flags, "--captions", str(given)], capsys)


def refused(arguments, capsys):
    """Checks that a command ends with exit code 2, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def ready(folder, found):
    """Writes a short video under each name, as another program would."""
    for i, name in enumerate(found):
        clip = np.random.default_rng(i).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
        video_files.save_video(clip, folder / "videos" / f"{name}.mp4", fps=8)


def test_vbench_prints_its_command_measures_flickering_and_reads_results_back(tmp_path, capsys):
    source, out = tmp_path / "prompts", tmp_path / "run"
    source.mkdir()
    (source / "color.txt").write_text("a red bird\n")
    flags = ["vbench", "--prompts", str(source), "--out", str(out), "--no-sampling"]
    with pytest.raises(SystemExit):
        main(flags)
    assert "lacks 5 of 5 videos, such as color/a red bird-0.mp4" in capsys.readouterr().err
    ready(out, names("vbench", source))
    main(flags)
    printed = capsys.readouterr().out
    assert "for x in color:color; do vbench evaluate" in printed and f"--videos_path {out}/videos/" in printed
    assert "| temporal_flickering |" in printed and "78.78" in printed
    results = out / "results"
    results.mkdir()
    content = {name: [1.0, []] for name in suites.QUALITY | suites.SEMANTIC}
    (results / "run_eval_results.json").write_text(json.dumps(content | {"scene": [0.8222, []]}))
    main(flags)
    assert "| total | 1" in capsys.readouterr().out
    for value in ("NaN", "61.9", "true", '"0.5"'):
        (results / "more_eval_results.json").write_text(f'{{"color": [{value}, []]}}')
        with pytest.raises(UserError, match="color is not VBench's .value from 0 to 1"):
            suites.read_vbench_results(results)
    (results / "more_eval_results.json").write_text(json.dumps({"color": [0.5, []]}))
    with pytest.raises(UserError, match="color in several files"):
        suites.read_vbench_results(results)


def test_vbenchs_arithmetic_is_that_of_its_scripts():
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1], clip[2, :2] = 51, 51
    assert suites.temporal_flickering(clip) == pytest.approx((255 - (51 + 25.5) / 2) / 255)
    lowest = {name: low for name, (low, *_) in (suites.QUALITY | suites.SEMANTIC).items()}
    assert suites.vbench_scores(lowest) == pytest.approx({"quality": 0, "semantic": 0, "total": 0})
    moving = {**lowest, "dynamic_degree": 1.0}  # has half the weight of the other six
    assert suites.vbench_scores(moving)["quality"] == pytest.approx(100 * 0.5 / 6.5)
    assert suites.vbench_scores({**moving, "color": 1.0})["total"] == pytest.approx((4 * 100 / 13 + 100 / 9) / 5)
    assert suites.vbench_scores({"color": 1.0}) == {}


def test_videophy_gets_the_table_that_its_tool_reads(tmp_path, capsys):
    (tmp_path / "phy.txt").write_text("water is poured\na ball falls\n")
    out = tmp_path / "run"
    ready(out, ["0000", "0001"])
    main(["videophy", "--prompts", str(tmp_path / "phy.txt"), "--out", str(out), "--no-sampling"])
    with (out / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == ["water is poured", "a ball falls"]
    assert all(row["videopath"].endswith(".mp4") and row["videopath"].startswith("/") for row in rows)
    assert "15.7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["videophy", "--prompts", str(tmp_path / "none.txt"), "--out", str(out)])
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_shipped_model_is_measured_by_a_suite(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    main(["vbench", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run"), "--limit", "2",
          "--height", "64", "--width", "64"])  # fmt: skip
    assert "| temporal_flickering | 9" in capsys.readouterr().out
