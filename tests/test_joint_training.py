"""The measurement of the three regimes of fine-tuning, `benchmarks/joint_training.py`."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import joint_training
from benchmarks.joint_training import Run
from lavie_jax import results
from lavie_jax.data.moving_shapes import Attributes
from lavie_jax.errors import UserError
from lavie_jax.evaluation.moving_shapes import true_samples

ROOT = Path(__file__).parents[1]
TINY = "configs/moving_shapes/fine_tuning.py:tiny"


def test_each_regime_has_every_seed_and_a_variant_changes_one_number():
    runs = joint_training.planned(2, 4, (1, 8), (3.0,))
    assert [(r.regime, r.seed) for r in runs[:6]] == [(g, s) for s in (0, 1) for g in joint_training.REGIMES]
    assert all(run.images == 4 * (run.regime == "joint") for run in runs[:6])
    assert [(r.images, r.alpha) for r in runs[6:]] == [(1, 1.0), (8, 1.0), (4, 3.0)]
    assert len({run.name for run in runs}) == len(runs)
    assert joint_training.planned(2, 4, (1, 4, 8, 8), (1.0, 3.0)) == runs  # runs of the regimes count once


def test_only_the_attribute_that_images_alone_have_counts_as_the_concept():
    heart, pink = Attributes("heart", "red", "small", "blue", "up"), Attributes("star", "pink", "large", "gray", "left")
    other = {"size": "large", "background": "white", "motion": "still"}
    assert joint_training.concept(dataclasses.replace(heart, colour="white", **other), heart)
    assert not joint_training.concept(dataclasses.replace(heart, shape="circle"), heart)
    assert joint_training.concept(dataclasses.replace(pink, shape="circle", **other), pink)
    assert not joint_training.concept(dataclasses.replace(pink, colour="red"), pink)


def test_accuracies_of_detected_attributes():
    shape = {"height": 16, "width": 16, "frames": 2, "fps": 1.0}
    true = {split: true_samples(split, 8, shape) for split, _ in joint_training.MEASURES.values()}
    detected = {split: [sample.attributes for sample in samples] for split, samples in true.items()}
    detected["image"] = [dataclasses.replace(a, motion="still") for a in detected["image"]]  # as `detect` returns it
    detected["val"] = [dataclasses.replace(a, motion="nothing") for a in detected["val"][:2]] + detected["val"][2:]
    table = joint_training.accuracies(detected, true)
    assert {name: cell["mean"] for name, cell in table["measures"].items()} == {
        "concept": 1,
        "motion": 0.75,
        "image": 1,
    }
    assert table["measures"]["motion"]["stderr"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert table["splits"]["val"]["direction"]["accuracy"] == 0.75


def cells(*means: float) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "stderr": 0.5, "n": 4} for name, mean in zip(joint_training.MEASURES, means)}


def test_several_runs_have_the_standard_error_of_their_mean_and_one_run_its_own():
    runs = [Run("joint", 0, 4), Run("joint", 1, 4), Run("video_only", 0)]
    start = cells(0.5, 0.125, 1.0)
    ends = [cells(1.0, 0.5, 0.5), cells(0.5, 0.5, 1.0), cells(0.25, 0.75, 0.0)]
    table = {run.name: {0: start, 20: end} for run, end in zip(runs, ends)}
    groups = joint_training.summary(runs, table)
    assert list(groups) == ["joint-M4-alpha1", "video_only"]
    joint = groups["joint-M4-alpha1"][20]
    assert joint["concept"] == {"mean": 0.75, "stderr": np.std([1, 0.5], ddof=1) / 2**0.5, "n": 8, "runs": 2}
    assert joint["motion"]["stderr"] == 0
    assert groups["joint-M4-alpha1"][0]["concept"] == {"mean": 0.5, "stderr": 0.5, "n": 4, "runs": 2}  # shared
    assert groups["video_only"][20]["motion"] == {"mean": 0.75, "stderr": 0.5, "n": 4, "runs": 1}
    lines = joint_training.markdown(groups).splitlines()
    assert lines[3:] == [
        "| joint, M = 4, alpha = 1 | 2 | 20 | 75.0 ± 25.0 | 50.0 ± 0.0 | 75.0 ± 25.0 |",
        "| video only | 1 | 20 | 25.0 ± 50.0 | 75.0 ± 50.0 | 0.0 ± 50.0 |",
    ]


def test_a_measurement_is_kept_unless_the_number_of_samples_differs(tmp_path, monkeypatch):
    path, made = tmp_path / "run" / "measured-5.json", []
    monkeypatch.setattr(joint_training, "measure", lambda weights, n: {"samples": n, "measures": made.append(n) or {}})
    for samples in (4, 4, 8, 8):
        joint_training.kept(path, samples, lambda: None)
    assert made == [4, 8]


def test_what_is_complete_is_shown_and_a_run_beyond_the_wanted_step_is_refused(tmp_path, capsys):
    out, run = tmp_path / "out", tmp_path / "out" / "video_only-0"
    words = ["--out", str(out), "--steps", "20", "--seeds", "1"]
    with pytest.raises(SystemExit):
        joint_training.main([*words, "--so-far"])
    assert "no measurement is complete" in capsys.readouterr().err
    results.write(run / "measured-10.json", {"kind": joint_training.KIND, "measures": cells(0.25, 0.75, 0.0)})
    other = {"kind": joint_training.KIND, "config": "base.py", "weights_hash": "0"}
    results.write(out / "experiment.json", other)
    with pytest.raises(SystemExit):
        joint_training.main(words)
    assert "has runs with another config and weights_hash: give another --out" in capsys.readouterr().err
    (out / "experiment.json").unlink()
    joint_training.main([*words, "--so-far"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[2:] == ["| video only | 1 | 10 | 25.0 ± 50.0 | 75.0 ± 50.0 | 0.0 ± 50.0 |"]
    (run / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(UserError, match="is at step 20, beyond the wanted 10"):
        joint_training.train(Run("video_only", 0), 10, argparse.Namespace(out=out))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--images", "0"], "at least 1 image"),
        (["--plot", "plot.txt"], "must end in .png"),
        (["--alphas", "-1"], "invalid list of numbers value"),
        (["--alphas", "3,nan"], "invalid list of numbers value"),
        (["--weights", "nowhere"], "nowhere"),
        (["--config", "nothing.py"], "nothing.py does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_training(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        joint_training.main(["--out", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_the_regimes_are_trained_measured_and_not_repeated(tmp_path, monkeypatch):
    """With random weights, the whole command writes its table and figure, and the second time only reads."""
    first = [sys.executable, "train.py", "--config", TINY, "--workdir", tmp_path / "base", "--config.steps=1"]
    subprocess.run([str(word) for word in first], cwd=ROOT, check=True)
    monkeypatch.chdir(ROOT)
    words = ["--out", tmp_path / "out", "--weights", tmp_path / "base" / "weights", "--config", TINY, "--images=",
             "--alphas=3", "--seeds", 1, "--steps", 2, "--samples", 2, "--json", tmp_path / "r.json",
             "--plot", tmp_path / "r.png"]  # fmt: skip
    joint_training.main([str(word) for word in words])
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["groups"]) == ["joint-M1-alpha1", "video_only", "temporal_only", "joint-M1-alpha3"]
    assert all(list(steps) == ["0", "1", "2"] for steps in result["runs"].values()) and (tmp_path / "r.png").exists()

    def refuse(*_):
        raise UserError("repeated")

    monkeypatch.setattr(joint_training.subprocess, "run", refuse)
    monkeypatch.setattr(joint_training, "measure", refuse)
    joint_training.main([str(word) for word in words])
    assert json.loads((tmp_path / "r.json").read_text()) == result
