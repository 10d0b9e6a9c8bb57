"""Frames that are given to the prediction stage: pictures, the end of a clip, and the segments of a long video."""

import contextlib
import dataclasses
import gc
import json
import warnings
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import lavie_jax
import sample
from lavie_jax import cascade, parallel
from lavie_jax.cascade import Cascade, denoising, running
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.prompts import prompt_of, stage_prompts
from lavie_jax.data.sources import read_picture
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError
from lavie_jax.samples.stage_cache import MemoryCache, StageCache
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo, fitted, fitting_note
from lavie_jax.stages.settings import BaseSettings, PredictionSettings, parse_stages
from lavie_jax.stages.stage import Segment, guidance_of
from lavie_jax.weights import Part, load_folder

PROMPT = "a red circle"
STAGE = STAGES["prediction"]
SIZE = (16, 24)
PICTURES = np.random.default_rng(1).integers(0, 256, (4, *SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "cascade"
    for stage in ("base", "prediction"):
        tiny.make_stage(folder / stage, stage)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    """On one device."""
    return lavie_jax.load(folder, devices=jax.devices()[:1])


def settings_of(**given) -> PredictionSettings:
    return PredictionSettings(**{**tiny.SAMPLING, "known_frames": 2, **given})


def clip_info(frames=4, own=True, height=16, width=24) -> ClipInfo:
    return ClipInfo(frames=frames, height=height, width=width, fps=5.0, own=own)


def predicted(pipe, prompt=PROMPT, *, seed=3, clip=None, known=None, **given) -> np.ndarray:
    return pipe(prompt, stages="prediction", seed=seed, clip=clip, known=known, prediction=given)[0]


# ---- what is given ----


def test_segments_cover_the_output_without_gaps():
    settings = settings_of(frames=16, known_frames=4, segments=3)
    assert settings.output_frames == 40
    assert STAGE.segments(settings) == [
        Segment(), Segment(index=1, start=12, repeated=4), Segment(index=2, start=24, repeated=4)
    ]  # fmt: skip
    after_base = dataclasses.replace(settings, clip_frames=10)
    assert after_base.output_frames == 34
    assert STAGE.segments(after_base) == [
        Segment(index=1, start=6, repeated=4), Segment(index=2, start=18, repeated=4)
    ]  # fmt: skip


def test_a_segment_starts_from_the_frames_before_and_from_pictures():
    settings, before = (
        settings_of(segments=2),
        np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, *SIZE, 3), np.uint8),
    )
    known = {0: PICTURES[0], 3: PICTURES[1], 5: PICTURES[2]}
    first, second = STAGE.segments(settings)
    assert {i: p[0, 0].tolist() for i, p in STAGE.segment_input(settings, first, None, known).known.items()} == {
        0: PICTURES[0, 0, 0].tolist(), 3: PICTURES[1, 0, 0].tolist()
    }  # fmt: skip
    given = STAGE.segment_input(settings, second, before, known)  # frame 3 is a frame of the segment before
    assert {i: p[0, 0, 0] for i, p in given.known.items()} == {0: 3, 1: 4, 3: PICTURES[2, 0, 0, 0]}
    assert given.index == 1


def test_pictures_are_cropped_and_scaled_but_never_distorted():
    disc = np.hypot(*(np.mgrid[:60, :200] - np.array([30, 100])[:, None, None])) < 20
    picture = np.repeat(np.uint8(255 * disc)[..., None], 3, axis=-1)
    inside = fitted(picture, 48, 64)[..., 0] > 127
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 1, "a disc stays a disc"
    assert (
        fitting_note("a.png", (60, 200), 48, 64) == "a.png: 60x200 is cropped to its middle 60x80 and scaled to 48x64"
    )
    assert fitting_note("a.png", (48, 80), 48, 64) == "a.png: 48x80 is cropped to its middle 48x64"
    assert fitting_note("a.png", (96, 128), 48, 64) == "a.png: 96x128 is scaled to 48x64"
    assert fitting_note("a.png", (48, 64), 48, 64) is None
    np.testing.assert_array_equal(fitted(PICTURES[0], *SIZE), PICTURES[0])
    assert fitted(np.zeros((5000, 1, 3), np.uint8), 48, 64).shape == (48, 64, 3)


def test_one_prompt_holds_for_each_segment():
    settings = {"base": BaseSettings(**tiny.SAMPLING), "prediction": settings_of(segments=3, clip_frames=4)}
    prompts = stage_prompts(settings, "a | b")
    assert prompts == {"base": [("a", 4)], "prediction": [("a", 4), ("b", 2), ("b", 2)]}
    assert stage_prompts({"base": settings["base"]}, "a | b") == {"base": [("a | b", 1)]}
    parts = prompts["prediction"]  # 8 frames, and 29 after interpolation
    assert [prompt_of(range(i, i + 1), 8, parts) for i in range(8)] == ["a"] * 4 + ["b"] * 4
    assert [prompt_of(range(i, i + 9), 29, parts) for i in (0, 9, 10, 20)] == ["a", "a", "b", "b"]
    for prompt, message in (("a | b | c | d", "4 prompts, .* for 3 segments"), ("a | | b", "two | is empty")):
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            stage_prompts(settings, prompt)


def test_size_and_rate_of_a_continued_clip(folder):
    weights = load_folder(folder / "prediction", params=False)
    own = STAGE.resolve(weights, {}, clip_info(9, height=300, width=200))
    assert (own.height, own.width, own.fps, own.segments, own.output_frames) == (16, 24, 5, 1, 4)
    after = STAGE.resolve(weights, {}, clip_info(9, own=False, height=8, width=8))
    assert (after.height, after.width, after.segments, after.output_frames) == (8, 8, 2, 11)
    assert dataclasses.replace(after, segments=10**15).output_frames == 9 + 2 * (10**15 - 1)  # without a list of them
    assert parse_stages("base,prediction,interpolation,vsr", own_clip=False)
    assert parse_stages("prediction", own_clip=False) == parse_stages("prediction", own_clip=True) == ("prediction",)


BAD = {
    "shorter clip": (clip_info(1), {}, {}, "the clip has 1 frame, fewer than known_frames = 2"),
    "all known": (clip_info(), {"known_frames": 4}, {}, "known_frames must be below frames = 4"),
    "all known of a segment": (None, {"known_frames": 4, "segments": 2}, {}, "known_frames must be below frames = 4"),
    "size of a stage before": (clip_info(own=False), {"height": 32}, {}, "height is determined by the input clip"),
    "one segment": (clip_info(own=False), {"segments": 1}, {}, "segments must be at least 2"),
    "odd side": (None, {"height": 18}, {}, "18 is not a multiple of 4"),
    "beyond": (None, {"segments": 2}, {6: PICTURES[0]}, "known frame 6 is beyond the clip, whose frames are 0 to 5"),
    "negative": (None, {}, {-1: PICTURES[0]}, "known frame -1 is beyond"),
    "twice": (clip_info(), {}, {1: PICTURES[0]}, "known frame 1 is given twice.*: pictures can be frames 2 to 3"),
    "floats": (None, {}, {0: PICTURES[0] / 255}, r"known frame 0 must be an array of uint8 \(H, W, 3\)"),
    "a clip": (None, {}, {0: PICTURES}, r"known frame 0 must be"),
    "empty": (None, {}, {0: PICTURES[0, :0]}, "known frame 0 is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_known_frames_are_refused(case, folder):
    clip, given, known, message = BAD[case]
    weights = load_folder(folder / "prediction", params=False)
    with pytest.raises(UserError, match=message):
        settings = STAGE.resolve(weights, given, clip)
        cascade.check_known({"prediction": settings}, clip, known)


def test_a_setting_of_the_program_itself_cannot_be_given(folder):
    weights = {"prediction": load_folder(folder / "prediction", params=False)}
    with pytest.raises(UserError, match="prediction stage: sampling settings: unknown 'clip_frames'"):
        cascade.resolve_settings(weights, ["prediction"], {"prediction": {"clip_frames": 3, "segments": 2}})


def test_pictures_of_other_stages_are_refused(pipe):
    with pytest.raises(UserError, match="which base cannot take: put prediction among the stages"):
        pipe(PROMPT, known={0: PICTURES[0]})
    with pytest.raises(UserError, match="known frame 0 is given twice"):
        pipe(PROMPT, stages="base,prediction", known={0: PICTURES[0]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gif", "animation of 2 frames"),
        ("a.mp4", "is a video"),
        ("a.npz", "is a video"),
        ("no.png", "does not exist"),
        ("a.png", "cannot read"),
    ],
)
def test_a_file_that_is_not_a_picture_is_refused(name, message, tmp_path):
    lavie_jax.save_video(PICTURES[:2], tmp_path / "a.gif", fps=8)
    (tmp_path / "a.mp4").write_bytes(b"some video")
    lavie_jax.save_video(PICTURES[:2], tmp_path / "a.npz", fps=8)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=message):
        read_picture(tmp_path / name)


def test_a_picture_is_read_as_it_is_shown(tmp_path, monkeypatch):
    picture = Image.fromarray(PICTURES[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", PICTURES[0, ..., 0].size * 2 // 3
    )  # a large one, by Pillow's measure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.rot90(PICTURES[0], -1))


# ---- sampling ----


def test_known_frames_enter_the_result_and_can_be_kept(pipe, monkeypatch):
    warnings = []
    monkeypatch.setattr(cascade.logging, "warning", lambda text, *args: warnings.append(text % args))
    known = {0: PICTURES[0], 3: np.repeat(PICTURES[1], 2, axis=0)}
    video = predicted(pipe, known=known)
    assert warnings == ["known frame 3: 32x24 is cropped to its middle 16x24"]
    assert video.shape == (4, *SIZE, 3) and video.dtype == np.uint8
    others = [known | {0: PICTURES[2]}, known | {3: PICTURES[2]}, {0: PICTURES[0]}, {}]
    results = [video, *(predicted(pipe, known=other) for other in others)]
    assert len({result.tobytes() for result in results}) == len(results)
    kept = predicted(pipe, known=known, keep_known_frames=True)
    np.testing.assert_array_equal(kept[1:3], video[1:3])
    np.testing.assert_array_equal(kept[0], PICTURES[0])
    np.testing.assert_array_equal(kept[3], known[3][8:24])
    assert (video[0] != PICTURES[0]).any()


def prepared(pipe, known, seed=3, **given):
    """(model, settings, the clip before its first step)."""
    settings = cascade.resolve_settings(pipe.weights, ["prediction"], {"prediction": given})["prediction"]
    request = cascade.Request(prompt=PROMPT, seed=seed, known=known)
    (ready,) = running._prepared(
        pipe.model("prediction"), settings, [running.Sample(request, MemoryCache(), None, settings.output_frames)]
    )
    return pipe.model("prediction"), settings, ready


def test_every_frame_of_the_masked_clip_is_a_sample_of_its_own_posterior(pipe):
    model, _, ready = prepared(pipe, {1: PICTURES[0]})
    images = np.zeros((4, *SIZE, 3), np.float32)
    images[1] = PICTURES[0] / np.float32(127.5) - 1
    key = jax.random.key(3, impl="threefry2x32")
    for word in (STAGE.noise_number, np.uint32(2**32 - 1)):
        key = jax.random.fold_in(key, word)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), (4, 6, 4)) for i in range(4)])
    np.testing.assert_array_equal(ready.concat[..., 0].mean((1, 2)), [1, 0, 1, 1])
    np.testing.assert_allclose(ready.concat[..., 1:], model.encode(images, noise), atol=1e-5)
    _, _, modes = prepared(pipe, {1: PICTURES[0]}, known_latents="mode")
    np.testing.assert_allclose(modes.concat[..., 1:], model.encode(images), atol=1e-5)
    assert np.abs(modes.concat - ready.concat).max() > 1e-3


def latents_of(pipe, known, **given) -> np.ndarray:
    model, settings, ready = prepared(pipe, known, **given)
    windows = STAGE.windows(ready.shape, settings)
    sampler = make_sampler(settings.sampler, settings.steps, model.weights.schedule)
    plan = denoising.DenoisingPlan(
        sampler=sampler, guidance=guidance_of(settings), windows=windows, rows=model.mesh.size
    )
    denoising.denoise(model, [ready], plan)
    return ready.state["x"]


def test_exact_predictions_keep_the_latents_of_known_frames(pipe):
    known, given = {0: PICTURES[0], 2: PICTURES[1]}, {"known_prediction": "exact", "sampler": "dpm++2m"}
    own = prepared(pipe, known, **given)[2].concat[..., 1:]
    latents = latents_of(pipe, known, **given)
    np.testing.assert_allclose(latents[[0, 2]], own[[0, 2]], atol=1e-4)
    assert np.abs(latents[[1, 3]] - own[[1, 3]]).max() > 0.1


@pytest.mark.heavy
def test_one_device_and_eight_agree(pipe, folder):
    one = latents_of(pipe, {0: PICTURES[0]})
    eight = latents_of(lavie_jax.load(folder, stages=["prediction"]), {0: PICTURES[0]})
    assert np.linalg.norm(eight - one) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.heavy
def test_untrained_channels_answer_as_the_base(folder, pipe, monkeypatch):
    """A model that was inflated from the base, before training, with the base's noise and settings."""
    base, own = load_folder(folder / "base"), load_folder(folder / "prediction")
    params = dict(base.unet.params)
    kernel = params["conv_in"]["kernel"]
    params["conv_in"] = params["conv_in"] | {"kernel": np.pad(kernel, [(0, 0), (0, 0), (0, 5), (0, 0)])}
    inflated = dataclasses.replace(own, unet=Part(own.unet.config, params))
    untrained = Cascade({"prediction": inflated}, devices=pipe.devices)
    monkeypatch.setattr(STAGE, "noise_number", STAGES["base"].noise_number, raising=False)
    settings = cascade.resolve_settings({"base": base}, ["base"], {})["base"]
    monkeypatch.setattr(STAGE, "noise", lambda model, _, *rest: STAGES["base"].noise(model, settings, *rest))
    video = predicted(untrained, known={0: PICTURES[0]}, sampler="ddim", steps=3)
    assert np.abs(video.astype(int) - pipe(PROMPT, seed=3)[0]).max() <= 1


@contextlib.contextmanager
def noise_of_the_first_segment(monkeypatch):
    frame_noise = StageModel.frame_noise
    with monkeypatch.context() as patch:
        patch.setattr(
            StageModel, "frame_noise",
            lambda self, seed, stream, frames, shape: frame_noise(self, seed, stream, [f % 4 for f in frames], shape),
        )  # fmt: skip
        yield


def alive_clips(monkeypatch) -> list[int]:
    """The number of clips in memory whenever another one is made, from now on."""
    made, alive = [], []

    class Counted(denoising.Clip):
        def __init__(self, **fields):
            super().__init__(**fields)
            gc.collect()
            made.append(weakref.ref(self))
            alive.append(sum(ref() is not None for ref in made))

    monkeypatch.setattr(running, "Clip", Counted)
    return alive


@pytest.mark.heavy
def test_segments_equal_clips_that_are_continued_one_by_one(pipe, monkeypatch):
    known, prompts = {0: PICTURES[0], 7: PICTURES[1]}, ("a red circle", "a blue square", "a blue square")
    alive = alive_clips(monkeypatch)
    with noise_of_the_first_segment(monkeypatch):
        long = predicted(pipe, " | ".join(prompts[:2]), known=known, segments=3)
        first = predicted(pipe, prompts[0], known={0: PICTURES[0]})
        second = predicted(pipe, prompts[1], clip=first)
        third = predicted(pipe, prompts[2], clip=second, known={3: PICTURES[1]})
    assert long.shape == (8, *SIZE, 3)
    np.testing.assert_array_equal(long, np.concatenate([first, second[2:], third[2:]]))
    own = predicted(pipe, " | ".join(prompts[:2]), known=known, segments=4)
    np.testing.assert_array_equal(own[:4], long[:4])
    assert max(alive) <= 2, "the latents of finished segments are freed"
    assert (own[4:6] != long[4:6]).any(), "each segment has its own noise"


def test_a_stage_before_makes_the_first_segment(pipe):
    """The frames of the base stage are in the cache, so that only the second stage runs."""
    cache = cache_of(PICTURES)
    settings = cascade.resolve_settings(pipe.weights, ["base", "prediction"], {"prediction": {"segments": 3}})
    request = cascade.Request(prompt="a square | a circle", seed=3, known={7: PICTURES[1]})
    (video,) = pipe.videos([request], settings, caches=[cache])
    np.testing.assert_array_equal(video[:4], PICTURES)
    assert len(video) == 8 and set(cache.frames) == {"base", "prediction"}
    settings = settings | {"prediction": dataclasses.replace(settings["prediction"], segments=2)}
    (shorter,) = pipe.videos([dataclasses.replace(request, known={})], settings, caches=[cache_of(PICTURES)])
    np.testing.assert_array_equal(shorter, video[:6])


def cache_of(frames) -> MemoryCache:
    cache = MemoryCache()
    cache.put("base", frames.shape, [frames])
    return cache


def test_kept_frames_are_the_next_segments_known_ones(pipe):
    clip = predicted(pipe)
    video = predicted(pipe, clip=clip, segments=2, keep_known_frames=True)
    np.testing.assert_array_equal(video[:2], clip[2:])
    again = predicted(pipe, clip=clip, segments=2)
    assert (video[:2] != again[:2]).any()


# ---- sample.py ----


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Returns a function that runs sample.py with the tiny models, on one device, and returns the exit code."""
    monkeypatch.setattr(parallel, "local_devices", lambda: jax.devices()[:1])
    Image.fromarray(PICTURES[0]).resize((64, 30)).save(tmp_path / "a.png")
    Image.fromarray(PICTURES[1]).save(tmp_path / "b.png")
    lavie_jax.save_video(PICTURES, tmp_path / "clip.npz", fps=5)
    lavie_jax.save_video(PICTURES[:1], tmp_path / "short.npz", fps=5)
    lavie_jax.save_video(PICTURES, tmp_path / "clip.mp4", fps=5)

    def run(*args, out="out", stages="prediction"):
        words = [str(tmp_path / arg) if (tmp_path / arg).is_file() else arg for arg in args]
        prompt = [] if "--prompt" in args else ["--prompt", PROMPT]
        fixed = ["--stages", stages, "--weights", str(folder), "--out", str(tmp_path / out), "--format", "npz"]
        return sample.main([*prompt, *words, *fixed])

    return run


def files(folder: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def video_in(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["video"]


def test_pictures_are_part_of_the_request(run, tmp_path, capsys, monkeypatch):
    shown = []
    add = sample.ContactSheets.add
    monkeypatch.setattr(
        sample.ContactSheets, "add", lambda self, clips, text: (shown.append(clips), add(self, clips, text))
    )
    args = ("--first-frame", "a.png", "--last-frame", "b.png", "--keep-known-frames")
    assert run(*args) == 0
    assert f"warning: {tmp_path / 'a.png'}: 30x64 is cropped to its middle 30x45 and" in capsys.readouterr().err
    sidecar = json.loads((tmp_path / "out" / "0000-a-red-circle-0.json").read_text())
    assert set(sidecar["request"]["known_sha256"]) == {"0", "3"}
    assert sidecar["made_with"]["first_frame"] == str(tmp_path / "a.png")
    video = video_in(tmp_path / "out" / "0000-a-red-circle-0.npz")
    np.testing.assert_array_equal(video[3], PICTURES[1])
    assert list(shown[0]) == ["given, white where generated", "prediction"]
    np.testing.assert_array_equal(shown[0]["given, white where generated"][3], PICTURES[1])
    before = files(tmp_path / "out")
    assert run(*args) == 0
    assert "1 of 1 samples exist" in capsys.readouterr().out
    assert run("--first-frame", "b.png", "--last-frame", "b.png", "--keep-known-frames") == 2
    assert "was made with known_sha256 = " in capsys.readouterr().err
    assert run("--keep-known-frames") == 2
    assert files(tmp_path / "out") == before


def test_a_killed_run_resumes_at_its_segment_and_step(run, tmp_path, monkeypatch, capsys):
    args = ("--prompt", "a red circle | a blue square", "--segments", "3")
    stem = "0000-a-red-circle-a-blue-square-0"
    assert run(*args, out="whole") == 0
    assert "12/12" in capsys.readouterr().err, "one progress bar for the three segments"
    monkeypatch.setattr(denoising, "SAVE_EVERY", 1)
    save = StageCache.save_state

    def killed(self, stage, step, state):
        save(self, stage, step, state)
        if stage == "prediction.1" and step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageCache, "save_state", killed)
        assert run(*args) == 130
    cache = tmp_path / "out" / "stages" / stem
    names = {"prediction.json", "prediction.0.npy", "prediction.1.state.npz"}
    assert {path.name for path in cache.iterdir()} == names
    calls, predict = [], denoising.predict_rows
    monkeypatch.setattr(
        denoising, "predict_rows", lambda *args, **kwargs: (calls.append(1), predict(*args, **kwargs))[1]
    )
    assert run(*args, "--segments", "4") == 2
    assert run(*args) == 0
    assert len(calls) == 2 + 4  # the last steps of the second segment, and the third
    video = video_in(tmp_path / "out" / f"{stem}.npz")
    assert len(video) == 4 + 2 * 2
    np.testing.assert_array_equal(video, video_in(tmp_path / "whole" / f"{stem}.npz"))
    assert {path.name for path in cache.iterdir()} == {"prediction.json", "prediction.npy"}


BAD_COMMANDS = {
    "a video for a picture": (["--first-frame", "clip.mp4"], "clip.mp4' is a video, where a picture is needed"),
    "no file": (["--last-frame", "nowhere.png"], "last-frame: the picture 'nowhere.png' does not exist"),
    "picture and clip": (["--first-frame", "a.png", "--input", "clip.npz"], "first-frame: the first frames are"),
    "picture for base": (["--first-frame", "a.png", "--stages", "base"], "base cannot start from pictures; use"),
    "picture after base": (["--first-frame", "a.png", "--stages", "base,prediction"], "it is the first frame of base"),
    "short clip": (["--input", "short.npz"], "the clip has 1 frame, fewer than known_frames = 2"),
    "too many known": (["--input", "clip.npz", "--known-frames", "4"], "known_frames must be below frames = 4, so"),
    "no known": (["--input", "clip.npz", "--known-frames", "0"], "known_frames must be at least 1"),
    "segments of base": (["--segments", "3", "--stages", "base"], "segments is given for prediction, which is not"),
    "no segments": (["--segments", "0"], "segments must be at least 1"),
    "prompts": (["--prompt", "a | b | a", "--segments", "2"], "3 prompts, separated by |, are given for 2 segments"),
    "prompts of one": (["--prompt", "a | b"], "2 prompts, separated by |, are given for 1 segment:"),
    "twice": (["--stages", "prediction,prediction"], "prediction is given twice"),
    "weights": (["--weights", "{base}", "--segments", "2"], "'base', but 'prediction' is needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_nothing_is_written(case, run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Cascade, "__init__", lambda *a, **k: pytest.fail("weights are loaded"))
    words, message = BAD_COMMANDS[case]
    words = [
        str(tmp_path / word) if (tmp_path / word).is_file() else word.format(base=folder / "base") for word in words
    ]
    fixed = ["--stages", "prediction", "--weights", str(folder), "--out", str(tmp_path / "out")]
    prompt = [] if "--prompt" in words else ["--prompt", PROMPT]
    before = files(tmp_path)
    assert sample.main([*prompt, *fixed, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.heavy
def test_a_long_video_goes_through_the_later_stages(tmp_path):
    pipe = lavie_jax.load(tiny.make_cascade(tmp_path / "cascade"), devices=jax.devices()[:1])
    video = pipe("a red circle | a blue square", stages="base,prediction,interpolation,vsr", prediction={"segments": 5})
    assert video.shape == (1, 4 * 11 + 1, 64, 96, 3)
