"""Detectors, measures of generated videos, and the commands that report them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from lavie_jax.data import moving_shapes as world
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.evaluation import cascade, fidelity, noise_levels, prediction
from lavie_jax.evaluation import moving_shapes as evaluation
from lavie_jax.evaluation.cascade import moving_samples
from lavie_jax.evaluation.detectors import detect
from lavie_jax.stages.settings import PredictionSettings
from tests.tiny import make_cascade, make_stage


def samples(split, count):
    return evaluation.true_samples(split, count, evaluation.DEFAULTS)


def accuracies(clips, of, fps=8.0):
    table = evaluation.score([detect(clip, fps=fps) for clip in clips], [s.attributes for s in of])
    return {row: cell["accuracy"] for row, cell in table.items()}


def refusal(main, arguments, capsys):
    """Checks that a command ends with exit code 2 and one line, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("split", evaluation.SPLITS)
def test_detectors_are_right_on_true_clips(split):
    true = samples(split, 150)
    right = accuracies([s.pixels for s in true], true)
    assert ("direction" in right) == (split != "image")
    assert right.pop("all") >= 0.97 and right.pop("shape") >= 0.97
    assert all(accuracy >= 0.99 for accuracy in right.values()), right


def blurred(clip):
    """Softens edges and adds noise, as a small autoencoder does."""
    soft = clip.astype(np.float32)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    noise = np.random.default_rng(0).normal(0, 8, clip.shape)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


def test_detectors_are_right_on_blurred_and_noisy_clips():
    true = samples("val", 100)
    right = accuracies([blurred(s.pixels) for s in true], true)
    assert right["shape"] >= 0.95 and min(v for k, v in right.items() if k not in ("shape", "all")) >= 0.99, right


@pytest.mark.parametrize("height, width, frames, fps", [(96, 64, 16, 8), (64, 112, 61, 32), (128, 128, 8, 4)])
def test_detectors_work_at_other_sizes_and_rates(height, width, frames, fps):
    size = {"height": height, "width": width, "frames": frames, "fps": fps}
    true = evaluation.true_samples("val", 40, size)
    assert accuracies([s.pixels for s in true], true, fps=fps)["all"] == 1


def clip_of(**change):
    a = world.Attributes(**{"shape": "star", "colour": "red", "size": "large", "background": "green",
                            "motion": "left", **change})  # fmt: skip
    return world.render(a, 0.3, 0.6, frames=16, fps=8, height=64, width=64)


@pytest.mark.parametrize(
    "attribute, value",
    [("shape", "ring"), ("colour", "cyan"), ("size", "small"), ("background", "black"), ("motion", "down")],
)
def test_changing_one_attribute_changes_only_that_detection(attribute, value):
    before, after = detect(clip_of()), detect(clip_of(**{attribute: value}))
    assert getattr(after, attribute) == value
    for name in ("shape", "colour", "size", "background", "motion"):
        assert name == attribute or getattr(before, name) == getattr(after, name)


def test_time_reversed_and_mirrored_clips_move_the_other_way():
    clip = clip_of(shape="circle", motion="up left")
    assert detect(clip[::-1]).motion == "down right"
    assert detect(clip[:, :, ::-1]).motion == "up right"
    assert detect(np.repeat(clip[5:6], 16, 0)).motion == "still"


def test_a_slow_drift_does_not_count_as_motion():
    a = world.Attributes("circle", "red", "small", "blue", "right")
    full = world.render(a, 0.5, 0.5, frames=64, fps=32, height=64, width=64)
    assert detect(full[:16]).motion == "still"  # a quarter of the usual path


def test_an_empty_clip_shows_nothing():
    actual = detect(np.full((16, 64, 64, 3), world.RGB["gray"], np.uint8))
    assert (actual.shape, actual.colour, actual.motion, actual.background) == ("nothing", "nothing", "nothing", "gray")
    assert detect(np.random.default_rng(0).integers(120, 136, (4, 64, 64, 3), dtype=np.uint8)).shape == "nothing"


def test_scores_have_standard_errors_and_chance_level_for_other_captions():
    true = samples("val", 60)
    attributes = [s.attributes for s in true]
    shifted = attributes[1:] + attributes[:1]  # compares every clip with another clip's attributes
    table = evaluation.score(shifted, attributes)
    assert table["all"]["accuracy"] == 0 and table["shape"]["accuracy"] < 0.45
    for cell in table.values():
        assert cell["n"] == 60
        p = cell["accuracy"]
        assert cell["stderr"] == pytest.approx((p * (1 - p) / 60) ** 0.5)


def test_mistakes_are_counted_by_kind():
    clip = clip_of(motion="up")
    attributes = [dataclasses.replace(detect(clip), motion=motion) for motion in ("left", "up", "down", "left")]
    wrong = evaluation.mistakes([detect(clip)] * 4, attributes)
    assert list(wrong["direction"].items()) == [("up, not left", 2), ("up, not down", 1)]
    assert not any(wrong[row] for row in wrong if row != "direction")


def test_the_command_writes_its_result_and_contact_sheets(tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    evaluation.main(["--truth", "--samples", "20", "--split", "val", "--json", str(out), "--sheets", str(tmp_path)])
    result = json.loads(out.read_text())
    assert result["what"] == "truth" and result["splits"]["val"]["direction"]["accuracy"] == 1
    assert (tmp_path / "val.png").is_file()
    assert "| val | 20 | 100.0 ± 0.0 |" in capsys.readouterr().out
    evaluation.main(["--truth", "--samples", "10", "--split", "image", "--json", str(out)])  # replaces its own file
    assert list(json.loads(out.read_text())["splits"]) == ["image"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--truth", "--split", "vall"], "did you mean 'val'"),
        (["--truth", "--samples", "0"], "--samples must be at least 1"),
        (["--truth", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--truth", "--seed", "-1"], "--seed must be from 0 to"),
        (["--truth", "--seed", str(2**32)], "--seed must be from 0 to"),
        (["--weights", "no such folder"], "no such folder"),
        (["--vae", "--weights", "no such folder"], "no such folder"),
    ],
)
def test_the_command_refuses_wrong_input_in_one_line(arguments, message, capsys):
    assert message in refusal(evaluation.main, arguments, capsys)


def test_the_command_overwrites_only_its_own_files(tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"kind": "diary"}')
    for arguments in (
        ["--json", str(tmp_path / "mine.json")],
        ["--sheets", str(tmp_path / "mine.json" / "x")],
    ):
        with pytest.raises(SystemExit):
            evaluation.main(["--truth", "--samples", "1", *arguments])
    assert (tmp_path / "mine.json").read_text() == '{"kind": "diary"}'


def test_score_refuses_unequal_lists():
    with pytest.raises(UserError, match="as many clips as attributes"):
        evaluation.score([], [])


# ---- interpolation and super-resolution against the true frames ----


def test_fidelity_of_the_true_clip_and_of_known_degradations():
    true = world.clip("val", 1, frames=9, fps=8, height=64, width=64).pixels
    assert fidelity.psnr(true, true) == float("inf") and fidelity.sharpness(true, true) == 1
    assert fidelity.flicker(true, true) == 0
    darker = np.maximum(true, 10) - 10
    assert fidelity.psnr(darker, np.maximum(true, 10)) == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    assert fidelity.flicker(darker, np.maximum(true, 10)) == 0  # wrong, but constant over time
    flickering = darker.copy()
    flickering[::2] = np.maximum(true[::2], 10)
    assert fidelity.flicker(flickering, np.maximum(true, 10)) == pytest.approx(10)
    blurred = cascade.bicubic(cascade.downscaled(true))
    assert blurred.shape == true.shape and 0.1 < fidelity.sharpness(blurred, true) < 0.8


def test_the_box_of_an_object_contains_it_with_a_margin():
    true = world.clip("val", 1, frames=9, fps=8, height=64, width=64).pixels
    box = fidelity.object_box(true)
    background = true[0, 0, 0].astype(int)
    differs = np.abs(true.astype(int) - background).max(-1) > fidelity.MIN_CONTRAST
    assert box[differs].all() and 0.01 < box.mean() < 0.6
    assert not fidelity.object_box(np.full((2, 8, 8, 3), 7, np.uint8)).any()


def test_key_frames_are_repeated_or_blended():
    """For a ramp over time, linear blending restores the ramp and repeating gives a staircase."""
    ramp = np.broadcast_to(np.arange(0, 34, 2, dtype=np.uint8)[:, None, None, None], (17, 4, 4, 3))
    np.testing.assert_array_equal(cascade.blended(ramp[::4]), ramp)
    assert cascade.repeated(ramp[::4])[:, 0, 0, 0].tolist() == [0] * 3 + [8] * 4 + [16] * 4 + [24] * 4 + [32] * 2


def test_only_moving_objects_are_measured():
    actual = cascade.moving_samples("held_out", 12, frames=2, fps=1, height=16, width=16)
    assert len(actual) == 12 and all(sample.attributes.motion != "still" for sample in actual)


@pytest.mark.heavy
def test_both_later_stages_are_measured(tmp_path, capsys, monkeypatch):
    """With random weights, every row and column is present, and the baselines win."""
    monkeypatch.setattr(cascade, "FEW_FRAMES", 5)  # both lengths share one compiled program
    out = tmp_path / "result.json"
    words = ["--clips", "1", "--vsr-frames", "3", "--json", str(out)]
    for stage in ("interpolation", "vsr"):
        folder = make_stage(tmp_path / stage, stage, frames=5, height=32, width=32)
        words += [f"--{stage}-weights", str(folder)]
    cascade.main(words)
    result = json.loads(out.read_text())
    assert result["kind"] == "cascade" and set(result["models"]) == {"interpolation", "vsr"}
    tables = result["tables"]
    assert len(tables) == 3 and set(tables["vsr"]["bicubic"]) == {"psnr", "psnr_in_box", "sharpness", "flicker"}
    assert tables["vsr"]["bicubic"]["psnr"] > tables["vsr"]["model"]["psnr"]
    assert "| bicubic |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--stages", "vrs"], "did you mean 'vsr'"), (["--clips", "0"], "--clips must be at least 1"),
     (["--split", "train"], "unknown split"), (["--vsr-weights", "nowhere", "--stages", "vsr"], "nowhere")],
)  # fmt: skip
def test_the_cascade_command_refuses_wrong_input_in_one_line(arguments, message, capsys):
    assert message in refusal(cascade.main, arguments, capsys)


def test_outputs_of_later_stages_are_reduced_to_what_the_base_generated():
    base = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
    longer = np.zeros((13, 6, 8, 3), np.uint8)
    longer[::4] = base
    large = repeat(longer, "t h w c -> t (h a) (w b) c", a=4, b=4)
    for video, stages in ((longer, ("base", "interpolation")), (large, ("base", "interpolation", "vsr"))):
        np.testing.assert_array_equal(evaluation._as_from_base(video, stages), base)


@pytest.mark.parametrize("words", [["--stages", "base,vsr", "--truth"], ["--stages", "base,vsr", "--split", "image"]])
def test_later_stages_need_sampled_videos(words, capsys):
    assert "later stages need sampled videos" in refusal(evaluation.main, words, capsys)


@pytest.mark.parametrize("stages", ["base", pytest.param("base,interpolation,vsr", marks=pytest.mark.heavy)])
def test_the_samples_of_a_cascade_are_scored(stages, tmp_path):
    """With random weights, all stages are sampled and every row is scored."""
    folder, out = make_cascade(tmp_path / "cascade"), tmp_path / "result.json"
    words = ["--weights", str(folder), "--stages", stages, "--samples", "3", "--batch-size", "2"]
    evaluation.main([*words, "--split", "val", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["splits"]["val"]["all"]["n"] == 3 and result["stages"] == stages.split(",")


# ---- noise levels ----


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_least_loss_is_a_lower_bound(prediction):
    """With x0 from a few images: the loss is 0 for x0, larger for their weighted mean, largest for the likeliest."""
    schedule, rng = Schedule(prediction=prediction), np.random.default_rng(0)
    candidates = rng.standard_normal((5, 2, 2, 1)).astype(np.float32)
    least, likeliest = [], []
    for i in range(60):
        x0, eps = candidates[i % 5][None], rng.standard_normal((1, 2, 2, 1)).astype(np.float32)
        assert noise_levels.least_loss(schedule, 600, x0, eps, x0) < 1e-8
        least.append(noise_levels.least_loss(schedule, 600, x0, eps, candidates))
        x_t = np.asarray(schedule.add_noise(jnp.asarray(x0), jnp.asarray(eps), jnp.array([600])))
        near = np.square(x_t - schedule.alphas_cumprod[600] ** 0.5 * candidates).sum(axis=(1, 2, 3)).argmin()
        likeliest.append(noise_levels.least_loss(schedule, 600, x0, eps, candidates[near][None]))
    assert 0 < np.mean(least) < np.mean(likeliest)


@pytest.mark.parametrize("name", noise_levels.WORDS)
def test_a_replaced_word_makes_sense(name):
    for i, sample in enumerate(samples("val", 40)):
        caption = noise_levels.replace_word(sample, name, i)
        assert caption != sample.caption
        assert len(set(caption.split()) ^ set(sample.caption.split())) <= 5
        a = sample.attributes
        if name in ("colour", "background"):
            assert f"{a.colour} {a.shape}" not in caption or f"over a {a.background}" not in caption
            words = caption.split()
            assert words[-2] not in words[:-2]  # a shape of the background's colour would be invisible


@pytest.mark.heavy
def test_noise_levels_of_a_model(tmp_path, capsys, monkeypatch):
    """The loss of an untrained model is far above the lower bound."""
    monkeypatch.setattr(noise_levels, "POSITIONS", 6)
    monkeypatch.setattr(noise_levels, "LEVELS", (300, 700))
    folder, out = make_stage(tmp_path / "base", "base", height=16, width=16), tmp_path / "levels.json"
    noise_levels.main(["--weights", str(folder), "--samples", "2", "--json", str(out)])
    levels = json.loads(out.read_text())["levels"]
    assert list(map(int, levels)) == list(noise_levels.LEVELS)
    for row in levels.values():
        assert 0 < row["least"] < row["image"] and set(noise_levels.WORDS) < set(row)
    assert "| t | image | least | clip |" in capsys.readouterr().out
    assert "--samples must be at least 1" in refusal(noise_levels.main, ["--samples", "0"], capsys)


# ---- prediction ----


def test_the_prediction_stage_is_measured_and_written(tmp_path, capsys):
    folder = make_stage(tmp_path / "prediction", "prediction", frames=3, steps=2, sampler="ddim")
    words = ["--weights", folder, "--samples", 2, "--segments", 3, "--json", tmp_path / "r.json"]
    prediction.main([str(word) for word in [*words, "--sheets", tmp_path / "sheets", "--plot", tmp_path / "plot.png"]])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["kind"] == "prediction" and list(result["tables"]) == list(prediction.MEASURES)
    assert list(result["tables"]["segments"]["accuracy"]) == ["1", "2", "3"]
    assert result["tables"]["transition"]["arrives"]["n"] == 2
    assert (tmp_path / "plot.png").exists() and len(list((tmp_path / "sheets").iterdir())) == 3
    table = capsys.readouterr().out
    assert "| segments 3 | 2 |" in table and "| image to video: first frame psnr of vae |" in table


class TrueModel(prediction.Model):
    """In place of the model: returns true clips, whose object turns around after each segment."""

    def __init__(self, samples):
        self.samples, self.vae = samples, lambda clip: clip // 8 * 8
        self.settings = PredictionSettings(
            sampler="ddim", steps=1, guidance=1.0, frames=16, height=64, width=64, fps=8, known_frames=1
        )

    def sample(self, prompts, known, segments=1):
        for i, frames in enumerate(known):
            assert all(np.array_equal(picture, self.samples[i].pixels[j]) for j, picture in frames.items())
        assert all(len(text.split(" | ")) == segments for text in prompts)
        return [self._long(s.pixels // 2 * 2, segments) for s in self.samples]

    def _long(self, pixels, segments):
        return np.concatenate([pixels, *[(pixels[::-1] if i % 2 else pixels)[1:] for i in range(1, segments)]])

    def parts(self, video, segments):
        return [video[15 * i : 15 * i + 16] for i in range(segments)]


def test_true_clips_are_right_in_every_measure_of_prediction():
    samples = moving_samples("val", 4)
    model = TrueModel(samples)
    pictures, _ = prediction.image_to_video(model, samples)
    assert pictures["accuracy"]["all"]["accuracy"] == 1
    assert pictures["first_frame"]["psnr"]["mean"] > pictures["first_frame"]["psnr_of_vae"]["mean"] > 30
    ends, _ = prediction.transition(model, samples)
    assert ends["arrives"]["mean"] == 1 and ends["distance_half_way"]["mean"] < 0.01
    turning, videos = prediction.segments(model, samples, 3)
    assert [turning["accuracy"][str(i)]["direction"]["accuracy"] for i in (1, 2, 3)] == [1, 1, 1]
    assert videos[0].shape[0] == 46
    others = TrueModel([dataclasses.replace(s, pixels=s.pixels[::-1]) for s in samples])
    assert prediction._distances(others.samples[0].pixels, samples[0].pixels)[15] > 0.3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--measure", "segment"], "did you mean 'segments'"),
        (["--split", "train"], "unknown split 'train'"),
        (["--segments", "0"], "--segments must be at least 1"),
        (["--plot", "plot.txt"], "must end in .png"),
        (["--plot", "plot.png", "--measure", "transition"], "add --measure segments"),
        (["--plot", "/dev/null/plot.png"], "/dev/null is a file, not a folder"),
    ],
)
def test_wrong_arguments_of_the_prediction_measurement_are_refused(words, message, capsys):
    assert message in refusal(prediction.main, words, capsys)
