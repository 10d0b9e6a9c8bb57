"""sample.py: from the command line to files, and bad input that it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import lavie_jax
import sample
from lavie_jax import cascade, parallel
from lavie_jax.cascade import Cascade, denoising
from lavie_jax.data.video_files import read_clip, read_video, video_info
from lavie_jax.errors import UserError
from lavie_jax.samples import outputs
from lavie_jax.samples.outputs import Output, slug
from lavie_jax.samples.prompts import Prompt, read_prompts
from lavie_jax.samples.sheets import compared
from lavie_jax.samples.stage_cache import StageCache
from lavie_jax.stages.settings import complete

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture
def run(folder, tmp_path):
    """Returns a function that runs sample.py with the tiny model and returns the exit code."""

    def run(*args, out=tmp_path / "out", weights=folder):
        return sample.main([*args, "--weights", str(weights), "--out", str(out)])

    return run


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def state(out: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


def test_a_run_writes_video_json_and_contact_sheet_and_the_next_skips_it(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run("--prompt", PROMPT, "--fps", "5") == 0
    assert names(out) == {f"0000-a-red-circle-moving-left-0.{e}" for e in ("mp4", "json")} | {"contact-sheet.png"}
    assert read_video(out / "0000-a-red-circle-moving-left-0.mp4").shape == (4, 16, 24, 3)
    assert video_info(out / "0000-a-red-circle-moving-left-0.mp4").fps == 5
    shown = capsys.readouterr()
    assert "0000-a-red-circle-moving-left-0.mp4" in shown.out
    assert "3/3" in shown.err and "step" in shown.err

    before = state(out)
    monkeypatch.setattr(
        Cascade, "__init__", lambda *a, **k: pytest.fail("nothing is to be made, but a model was loaded")
    )
    assert run("--prompt", PROMPT, "--fps", "5", "--no-metadata") == 0
    shown = capsys.readouterr()
    assert state(out) == before and "1 of 1 samples exist in" in shown.out
    assert "no-metadata: files of existing samples stay as they are" in shown.err


def test_the_json_is_enough_to_make_the_sample_again(run, folder, tmp_path):
    args = ("--seed", "11", "--steps", "2", "--negative-prompt", "a square", "--format", "npz")
    args += ("--guidance-rescale", "0.7")
    assert run("--prompt", PROMPT, *args) == 0
    sidecar = json.loads((tmp_path / "out" / "0000-a-red-circle-moving-left-11.json").read_text())
    request, made_with = sidecar["request"], sidecar["made_with"]
    assert {"lavie_jax", "jax", "flax", "python", "dtype", "device", "weights"} <= set(made_with)
    assert len(request["weights_sha256"]) == 64
    settings = ("seed", "negative_prompt", "frames", "height", "width", "sampler", "steps", "guidance")
    settings += ("guidance_rescale",)
    video = lavie_jax.load(made_with["weights"])(request["prompt"], **{name: request[name] for name in settings})
    with np.load(tmp_path / "out" / "0000-a-red-circle-moving-left-11.npz") as arrays:
        np.testing.assert_array_equal(arrays["video"], video[0])
    del request["guidance_rescale"]
    without = lavie_jax.load(made_with["weights"])(request["prompt"], **{n: request[n] for n in settings[:-1]})
    assert (without != video).any()


def test_a_sample_older_than_a_setting_has_its_default(run, tmp_path, capsys):
    assert run("--prompt", PROMPT) == 0
    path = tmp_path / "out" / "0000-a-red-circle-moving-left-0.json"
    sidecar = json.loads(path.read_text())
    assert sidecar["request"].pop("guidance_rescale") == 0.0
    path.write_text(json.dumps(sidecar))
    assert run("--prompt", PROMPT) == 0
    assert "1 of 1 samples exist in" in capsys.readouterr().out
    assert run("--prompt", PROMPT, "--guidance-rescale", "0.7") == 2
    assert "guidance_rescale = 0.0, not 0.7 as requested now" in capsys.readouterr().err


def test_another_request_with_the_same_name_is_refused_by_field(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--prompt", PROMPT) == 0
    before = state(out)
    capsys.readouterr()
    assert run("--prompt", PROMPT, "--steps", "2") == 2
    error = capsys.readouterr().err
    assert "steps = 3, not 2 as requested now" in error and "--overwrite" in error
    assert state(out) == before
    assert run("--prompt", PROMPT, "--steps", "2", "--overwrite") == 0
    assert json.loads((out / "0000-a-red-circle-moving-left-0.json").read_text())["request"]["steps"] == 2


def test_a_file_without_a_json_is_never_overwritten(run, tmp_path, capsys):
    mine = tmp_path / "out" / "0000-a-red-circle-moving-left-0.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert run("--prompt", PROMPT) == 2
    assert "without a JSON" in capsys.readouterr().err and mine.read_bytes() == b"mine"


def test_overwriting_leaves_nothing_of_another_request(tmp_path, monkeypatch):
    """Otherwise an old video next to the new JSON would be mistaken for the new one and skipped."""
    video = np.zeros((2, 16, 16, 3), np.uint8)

    def output(steps, *formats):
        request = {"prompt": "a", "seed": 0, "stages": ["base"], "frames": 2, "fps": 8, "steps": steps}
        return Output(folder=tmp_path, index=0, formats=formats, request=complete(request))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    output(3, "npz", "gif", "png").write(video, ("npz", "gif", "png"), {})
    assert output(2, "npz").to_make(overwrite=True) == ("npz",)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "save_as", killed)
        output(2, "npz").write(video, ("npz",), {})
    assert names(tmp_path) == {"0000-a-0.json"}
    assert output(2, "npz").to_make(overwrite=False) == ("npz",)
    output(2, "npz").write(video, ("npz",), {})
    output(2, "gif").write(video, ("gif",), {})  # of the same request: both are kept
    assert names(tmp_path) == {f"0000-a-0.{ending}" for ending in ("json", "npz", "gif")}


def test_a_run_generates_only_missing_samples(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--prompt", PROMPT, "--num-videos", "2", "--seed", "4", "--format", "npz,gif,png") == 0
    stems = [f"0000-a-red-circle-moving-left-{seed}" for seed in (4, 5)]
    assert {f"{s}.{e}" for s in stems for e in ("npz", "gif", "json")} | {*stems, "contact-sheet.png"} == names(out)
    frames = sorted((out / stems[0]).iterdir())
    with np.load(out / f"{stems[0]}.npz") as arrays:
        np.testing.assert_array_equal(arrays["video"], np.stack([np.asarray(Image.open(f)) for f in frames]))
    (out / f"{stems[1]}.npz").unlink()  # as after a kill at this point
    (out / "contact-sheet.png").unlink()
    before = state(out)
    assert run("--prompt", PROMPT, "--num-videos", "2", "--seed", "4", "--format", "npz,gif") == 0
    after = state(out)
    assert set(after) - set(before) == {out / f"{stems[1]}.npz", out / "contact-sheet.png"}
    assert {path: after[path] for path in before if path.suffix != ".json"} == {
        path: before[path] for path in before if path.suffix != ".json"
    }


def test_parts_make_up_the_whole_and_a_sheet_needs_no_model(run, tmp_path, monkeypatch, capsys):
    args = ("--prompt", PROMPT, "--prompt", "a blue square", "--num-videos", "2", "--format", "npz")
    assert run(*args, "--part", "1/2", "--no-contact-sheet") == 0
    stems = [f"{i:04d}-{name}-{seed}" for i, name in enumerate((slug(PROMPT), "a-blue-square")) for seed in (0, 1)]
    assert names(tmp_path / "out") == {f"{stem}.{ending}" for stem in stems[1::2] for ending in ("npz", "json")}
    assert run(*args, "--part", "0/2") == 0
    assert names(tmp_path / "out") == {f"{s}.{e}" for s in stems for e in ("npz", "json")} | {
        "contact-sheet-part-0.png"
    }
    monkeypatch.setattr(
        Cascade, "__init__", lambda *a, **k: pytest.fail("nothing is to be made, but a model was loaded")
    )
    (tmp_path / "out" / f"{stems[0]}.npz").write_bytes(b"damaged since")
    capsys.readouterr()
    assert run(*args) == 0
    assert f"{stems[0]}.npz cannot be read: delete it" in capsys.readouterr().err
    sheet = np.asarray(Image.open(tmp_path / "out/contact-sheet.png"))
    part = np.asarray(Image.open(tmp_path / "out/contact-sheet-part-0.png"))
    assert sheet.shape[1] == part.shape[1] and sheet.shape[0] > part.shape[0]  # three rows, two


def test_prompt_files_bring_their_own_seeds_and_negative_prompts(run, folder, tmp_path):
    lines = [{"prompt": PROMPT, "seed": 9, "negative_prompt": "a square"}, {"prompt": "a blue square"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    args = ("--prompt", "red", "--prompt-file", str(file), "--frames", "1", "--seed", "2", "--format", "png,npz")
    assert run(*args, "--no-contact-sheet") == 0
    stems = ("0000-red-2", "0001-a-red-circle-moving-left-9", "0002-a-blue-square-2")
    assert names(tmp_path / "out") == {f"{stem}.{e}" for stem in stems for e in ("png", "npz", "json")}
    pipe = lavie_jax.load(folder)
    expected = pipe(PROMPT, seed=9, negative_prompt="a square", frames=1)[0]
    with np.load(tmp_path / "out" / f"{stems[1]}.npz") as arrays:
        np.testing.assert_array_equal(arrays["video"], expected)


def test_unknown_words_and_truncated_ends_are_named(run, capsys):
    assert run("--prompt", "a dragon moving left", "--prompt", f"{PROMPT} right left") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2 and "'left'" in warnings[0] and "dragon" in warnings[1] and "circle" in warnings[1]


# ---- several stages, and a user's clip ----


@pytest.fixture(scope="module")
def stages_folder(tmp_path_factory):
    return tiny.make_cascade(tmp_path_factory.mktemp("weights") / "cascade")


@pytest.fixture
def cascaded(stages_folder, tmp_path):
    """Run sample.py with the tiny cascade: key frames to super-resolution, in windows of 2 frames."""

    def run(*args, stages="base,vsr", out=tmp_path / "out"):
        args = ["--prompt", PROMPT, *args, "--stages", stages, "--weights", str(stages_folder), "--out", str(out)]
        windows = ["--vsr-window-frames", "2", "--vsr-overlap-frames", "1"]
        return sample.main([*args, *windows, "--format", "npz"])

    return run


def counted(monkeypatch) -> list[str]:
    """The stage of every UNet call from now on."""
    calls, predict = [], denoising.predict_rows

    def count(*args, unet, **kwargs):
        calls.append({4: "base", 8: "interpolation", 7: "vsr"}[unet.config.in_channels])
        return predict(*args, unet=unet, **kwargs)

    monkeypatch.setattr(denoising, "predict_rows", count)
    return calls


def video_in(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["video"]


def test_a_killed_cascade_resumes_at_its_stage_and_step(cascaded, tmp_path, monkeypatch, capsys):
    stem, out = "0000-a-red-circle-moving-left-0", tmp_path / "out"
    assert cascaded(out=tmp_path / "whole") == 0
    monkeypatch.setattr(denoising, "SAVE_EVERY", 1)
    save = StageCache.save_state

    def killed(self, stage, step, state):
        save(self, stage, step, state)
        if stage == "vsr" and step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageCache, "save_state", killed)
        assert cascaded() == 130
    cache = out / "stages" / stem
    assert names(cache) == {"base.json", "base.npy", "vsr.json", "vsr.state.npz"} and names(out) == {"stages"}

    capsys.readouterr()
    assert cascaded("--vsr-steps", "2") == 2
    error = capsys.readouterr().err
    assert "vsr.json was made with vsr = " in error and error.count("\n") == 1

    calls = counted(monkeypatch)
    assert cascaded() == 0
    assert set(calls) == {"vsr"} and len(calls) == 1  # the last of 3 steps; its 3 windows share one call on 8 devices
    np.testing.assert_array_equal(video_in(out / f"{stem}.npz"), video_in(tmp_path / "whole" / f"{stem}.npz"))
    assert names(cache) == {"base.json", "base.npy", "vsr.json", "vsr.npy"}
    np.testing.assert_array_equal(np.load(cache / "vsr.npy"), video_in(out / f"{stem}.npz"))
    assert np.load(cache / "base.npy").shape == (4, 16, 24, 3)

    request = json.loads((out / f"{stem}.json").read_text())["request"]
    assert request["stages"] == ["base", "vsr"] and request["steps"] == request["vsr"]["steps"] == 3
    assert len({request["weights_sha256"], request["vsr"]["weights_sha256"]}) == 2
    before = state(out)
    assert cascaded() == 0
    assert state(out) == before
    (out / f"{stem}.npz").unlink()
    calls.clear()
    assert cascaded() == 0 and not calls, "the lossless frames are still cached"
    assert cascaded("--vsr-steps", "2", "--overwrite", out=out) == 0 and calls == ["base"] * 3 + ["vsr"] * 2
    assert cascaded("--overwrite", out=out) == 0 and calls[5:] == ["base"] * 3 + ["vsr"] * 3
    np.testing.assert_array_equal(video_in(out / f"{stem}.npz"), video_in(tmp_path / "whole" / f"{stem}.npz"))


def test_a_killed_run_of_the_base_stage_resumes_and_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(denoising, "SAVE_EVERY", 1)
    save = StageCache.save_state

    def killed(self, stage, step, state):
        save(self, stage, step, state)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageCache, "save_state", killed)
        assert run("--prompt", PROMPT, "--format", "npz") == 130
    calls = counted(monkeypatch)
    assert run("--prompt", PROMPT, "--format", "npz", "--overwrite") == 0
    assert calls == ["base"], "--overwrite resumes its own unfinished work"
    stem = "0000-a-red-circle-moving-left-0"
    assert names(tmp_path / "out") == {f"{stem}.npz", f"{stem}.json", "contact-sheet.png"}
    assert run("--prompt", PROMPT, "--format", "npz", out=tmp_path / "whole") == 0
    np.testing.assert_array_equal(
        video_in(tmp_path / "out" / f"{stem}.npz"), video_in(tmp_path / "whole" / f"{stem}.npz")
    )


def test_a_user_clip_is_upscaled_at_its_own_rate(cascaded, tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)
    path = lavie_jax.save_video(clip, tmp_path / "blue-square.mp4", fps=5)
    assert cascaded("--input", str(path), stages="vsr") == 0
    stem = "0000-a-red-circle-moving-left-0"  # from the prompt, not from the file's name
    with np.load(tmp_path / "out" / f"{stem}.npz") as arrays:
        assert arrays["video"].shape == (4, 64, 96, 3) and arrays["fps"] == 5
    sidecar = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert len(sidecar["request"]["input_sha256"]) == 64 and sidecar["made_with"]["input"] == str(path)
    assert "steps" not in sidecar["request"] and sidecar["request"]["vsr"]["fps"] == 5


@pytest.mark.heavy
def test_the_contact_sheet_of_a_cascade_has_a_row_for_each_stage(cascaded, tmp_path):
    assert cascaded(stages="base,interpolation,vsr") == 0
    cache = tmp_path / "out" / "stages" / "0000-a-red-circle-moving-left-0"
    rows = compared({stage: np.load(cache / f"{stage}.npy") for stage in ("base", "interpolation", "vsr")})
    height, width, gap = 128, 192, 4  # shown at twice their size, below a line of caption
    with Image.open(tmp_path / "out" / "contact-sheet.png") as image:
        pixels = np.asarray(image)
    for number, (frames, _) in enumerate(reversed(rows)):
        bottom = len(pixels) - 2 * gap - number * (height + 2 * gap + 20)
        for i, frame in enumerate(frames.repeat(2, 1).repeat(2, 2)):
            assert frame.shape == (height, width, 3)
            left = gap + i * (width + gap)
            np.testing.assert_array_equal(pixels[bottom - height : bottom, left : left + width], frame)


def test_the_contact_sheet_shows_a_user_clip_beside_the_result(cascaded, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sample.ContactSheets, "add", lambda self, clips, prompt: shown.append(clips))
    clip = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    path = lavie_jax.save_video(clip, tmp_path / "clip.npz", fps=5)
    assert cascaded("--input", str(path), stages="vsr") == 0
    assert list(shown[0]) == ["input", "vsr"] and shown[0]["vsr"].shape == (2, 64, 96, 3)
    np.testing.assert_array_equal(shown[0]["input"], clip)


def test_without_weights_the_shipped_cascade_is_sampled(stages_folder, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "base").symlink_to(stages_folder / "base")
    monkeypatch.setattr(cascade, "SHIPPED", shipped)
    args = ["--prompt", PROMPT, "--out", str(tmp_path / "out"), "--no-contact-sheet"]
    assert sample.main([*args, "--stages", "base,vsr"]) == 2
    error = capsys.readouterr().err
    assert error == "error: stage vsr has no weights; available stages: base. Give --vsr-weights\n"
    (shipped / "vsr").symlink_to(stages_folder / "vsr")
    assert sample.main([*args, "--stages", "base,vsr"]) == 0
    made_with = json.loads((tmp_path / "out" / "0000-a-red-circle-moving-left-0.json").read_text())["made_with"]
    assert made_with["weights"] == str(shipped / "base") and made_with["vsr_weights"] == str(shipped / "vsr")


def video_without_frames(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")):
            container.mux(packet)


BAD_CASCADE = {
    "order": (["--stages", "vsr,base"], "cannot be run in this order"),
    "stage": (["--stages", "base,vrs"], "did you mean 'vsr'"),
    "no clip": (["--stages", "vsr"], "vsr needs a clip"),
    "clip for base": (["--input", "{clip}"], "a clip for base needs strength"),
    "strength 0": (["--input", "{clip}", "--strength", "0"], "leaves none to run"),
    "strength without a clip": (["--strength", "0.5"], "give an input clip"),
    "no clip there": (["--stages", "vsr", "--input", "nowhere.mp4"], "'nowhere.mp4' does not exist"),
    "no video": (["--stages", "vsr", "--input", "{file}"], "cannot read the video"),
    "no frames": (["--stages", "vsr", "--input", "{empty}"], "empty.mp4"),
    "key latents": (
        ["--stages", "base,interpolation", "--interpolation-key-latents", "median"],
        "key_latents: unknown",
    ),
    "noise level": (
        ["--stages", "base,vsr", "--vsr-noise-level", "351"],
        "noise_level must be from 0 to 350",
    ),
    "noise level below": (["--stages", "base,vsr", "--vsr-noise-level", "-1"], "noise_level must be from 0"),
    "steps": (["--stages", "base,vsr", "--vsr-steps", "0"], "vsr stage: steps"),
    "sampler": (["--stages", "base,vsr", "--vsr-sampler", "eulr"], "did you mean 'euler'"),
    "of no stage": (["--vsr-steps", "3"], "steps is given for vsr, which is not among the stages base"),
    "of base": (["--stages", "vsr", "--input", "{clip}", "--steps", "3"], "steps is given for base"),
    "no weights": (["--stages", "base,vsr", "--weights", "{base}"], "vsr has no weights; available stages: base"),
    "weights of another": (["--stages", "base,vsr", "--vsr-weights", "{base}"], "'base', but 'vsr' is needed"),
    "image": (["--stages", "base,interpolation", "--frames", "1"], "at least 2 key frames"),
    "prompt": (["--stages", "vsr", "--input", "{clip}", "--prompt", " "], "prompt: an empty prompt"),
}


@pytest.mark.parametrize("case", BAD_CASCADE)
def test_bad_input_of_a_cascade_is_one_line_and_nothing_is_written(case, stages_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("no video")
    video_without_frames(tmp_path / "empty.mp4")
    lavie_jax.save_video(np.zeros((2, 16, 24, 3), np.uint8), tmp_path / "clip.npz", fps=8)
    places = {"file": "file", "empty": "empty.mp4", "clip": "clip.npz"}
    places = {name: str(tmp_path / file) for name, file in places.items()} | {"base": str(stages_folder / "base")}
    args, message = BAD_CASCADE[case]
    before = state(tmp_path)
    start = ["--prompt", PROMPT, "--weights", str(stages_folder), "--out", str(tmp_path / "out")]
    assert sample.main([*start, *(arg.format(**places) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert state(tmp_path) == before and not (tmp_path / "out").exists()


def test_the_error_for_a_clip_longer_than_memory_explains_how_to_split_it(tmp_path):
    path = lavie_jax.save_video(np.zeros((20, 16, 24, 3), np.uint8), tmp_path / "clip.mp4", fps=2)
    with pytest.raises(UserError, match="ffmpeg -i .*clip.mp4 -f segment -segment_time 2 "):
        read_clip(path, max_bytes=8.5 * 16 * 24 * 3)


def test_odd_sides_are_written_as_pngs(run, stages_folder, tmp_path, capsys):
    path = lavie_jax.save_video(np.zeros((4, 15, 22, 3), np.uint8), tmp_path / "clip.npz", fps=8)
    args = ("--prompt", PROMPT, "--stages", "interpolation", "--input", str(path))
    assert run(*args, weights=stages_folder) == 0
    frames = sorted((tmp_path / "out" / "0000-a-red-circle-moving-left-0").iterdir())
    assert len(frames) == 13 and np.asarray(Image.open(frames[0])).shape == (15, 22, 3)
    assert "padded to 16x24" in capsys.readouterr().err


BAD = {
    "odd side": (["--height", "18"], "height: 18 is not a multiple of 4"),
    "frames": (["--frames", "0"], "frames"),
    "steps": (["--steps", "0"], "steps"),
    "too many steps": (["--steps", "2000"], "steps"),
    "num-videos": (["--num-videos", "0"], "num-videos must be at least 1"),
    "guidance": (["--guidance", "nan"], "guidance must be finite"),
    "rescaled guidance": (
        ["--guidance-rescale", "1.5"],
        "guidance_rescale must be from 0 to 1",
    ),
    "fps": (["--fps", "0"], "fps"),
    "fps that no encoder takes": (["--fps", "1e-5"], "fps must be from 0.01 to 1000"),
    "bytes that are not text": (["--prompt", "\udcff"], "prompt: not valid Unicode"),
    "seed": (["--seed", "1.5"], "seed must be a whole number"),
    "last seed": (["--seed", "4294967295", "--num-videos", "2"], "last seed"),
    "not a number": (["--steps", "many"], "--steps: invalid int value: 'many'"),
    "flag": (["--step", "3"], "--step"),
    "sampler": (["--sampler", "eulr"], "did you mean 'euler'"),
    "format": (["--format", "mp4,gfi"], "did you mean 'gif'"),
    "video of one frame": (["--frames", "1", "--format", "mp4"], "png or npz"),
    "empty prompt": (["--prompt", " "], "prompt"),
    "prompt file": (["--prompt-file", "nowhere.txt"], "nowhere.txt does not exist"),
    "weights": (["--weights", "nowhere"], "nowhere does not exist"),
    "out": (["--out", "{file}/below"], "is a file"),
    "a bucket of an unknown kind": (["--out", "az://bucket/samples"], "az://"),
    "part": (["--part", "2/2"], "part must be I/N with I from 0 to N-1"),
    "PyTorch file for a folder": (["--weights", "{file}"], "Convert PyTorch files with convert_torch.py import"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    args, message = BAD[case]
    args = [arg.format(file=tmp_path / "file") for arg in args]
    before = state(tmp_path)
    base = ["--prompt", PROMPT, "--weights", str(folder), "--out", str(tmp_path / "out")]
    assert sample.main([*base, *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert state(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["incomplete", "other stage"])
def test_weights_that_cannot_be_sampled_are_refused(case, folder, run, tmp_path, capsys):
    weights = shutil.copytree(folder, tmp_path / "weights")
    if case == "incomplete":
        (weights / "unet" / "model.safetensors").unlink()
    else:
        config = json.loads((weights / "config.json").read_text())
        (weights / "config.json").write_text(json.dumps({**config, "stage": "interpolation"}))
    assert run("--prompt", PROMPT, weights=weights) == 2
    error = capsys.readouterr().err
    expected = "unet/model.safetensors is missing" if case == "incomplete" else "'base' is needed"
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_settings_are_checked_before_weights_are_read(folder, run, tmp_path, capsys):
    weights = shutil.copytree(folder, tmp_path / "weights")
    file = weights / "unet" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    assert run("--prompt", PROMPT, "--sampler", "eulr", weights=weights) == 2
    assert "did you mean 'euler'" in capsys.readouterr().err
    assert run("--prompt", PROMPT, weights=weights) == 2
    error = capsys.readouterr().err
    assert "has NaN" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_system_errors_are_one_line(monkeypatch, capsys):
    def run(args):
        raise OSError(28, "No space left on device", "samples/contact-sheet.png")

    monkeypatch.setattr(sample, "run", run)
    assert sample.main(["--prompt", PROMPT]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'samples/contact-sheet.png'\n"


def test_no_prompt_at_all_is_refused(capsys):
    assert sample.main([]) == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "\ufeffa cat\n\n  a dog \n", [Prompt(text="a cat"), Prompt(text="a dog")]),
        ("p.csv", 'prompt,seed\n"a cat, red",3\na dog,\n', [Prompt(text="a cat, red", seed=3), Prompt(text="a dog")]),
        ("p.csv", 'prompt,seed\n"a red circle\nmoving left",1\n', [Prompt(text="a red circle moving left", seed=1)]),
        ("p.txt", "a cat\u2028and a dog\n", [Prompt(text="a cat and a dog")]),
        ("p.csv", "\ufeffPrompt;Seed\r\na cat, red;3\r\n;\r\n\r\na dog;42.0\r\n;\r\n",
         [Prompt(text="a cat, red", seed=3), Prompt(text="a dog", seed=42)]),
        ("p.csv", "prompt\tseed\na, b\t4\n", [Prompt(text="a, b", seed=4)]),
        ("p.tsv", 'prompt\tseed\n"Hello" she said\t1\nfive " wide\t2\n"all ""red"""\t3\n',
         [Prompt(text=text, seed=i) for i, text in enumerate(('"Hello" she said', 'five " wide', 'all "red"'), 1)]),
        ("p.csv", "sep=;\nprompt;seed;;\na;1;;\n", [Prompt(text="a", seed=1)]),
        ("P.TXT", "\ufeffa cat\r\n\r\n", [Prompt(text="a cat")]),
        ("p.jsonl", '\ufeff{"prompt": "a", "seed": 42.0}', [Prompt(text="a", seed=42)]),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": ""}\n\n{"prompt": "b", "seed": 0}',
         [Prompt(text="a", negative=""), Prompt(text="b", seed=0)]),
    ],
)  # fmt: skip
def test_prompt_files_are_read(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "contains no prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.md", b"a cat", ".txt, .csv, .tsv, .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", b'"a"', "line 1 must be an object"),
        ("p.jsonl", b'{"prompt": "a", "sede": 1}', "line 1: unknown field 'sede'; did you mean 'seed'"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "line 1, seed"),
        ("p.jsonl", b'{"prompt": ""}', "line 1: the prompt is empty"),
        ("p.jsonl", rb'{"prompt": "a \ud800"}', "line 1: not valid Unicode"),
        ("p.csv", b'"prompt\na\n', "not CSV: unexpected end"),
        ("p.csv", b"prompt,seed\na,1\nb,x\n", "line 3, seed"),
        ("p.csv", b"prompt,seed\na, red,1\n", "line 2 has more fields than the 2 columns .*: put texts with commas in"),
        ("p.csv", b"text\na\n", "header: unknown field 'text'"),
        ("p.csv", b"prompt,prompt\na,b\n", "header: a field is named twice"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_prompt_files_are_refused_with_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_file_names_are_plain_and_short():
    assert slug("A Café, on Mars!") == "a-cafe-on-mars"
    assert slug("赤い円") == "prompt"
    assert len(slug("very " * 100)) <= 48 and not slug("very " * 100).endswith("-")
    request = {"prompt": "../../etc", "seed": 3, "stages": ["base"], "frames": 2}
    output = Output(folder=Path("out"), index=12, formats=("mp4",), request=request)
    assert output.path("mp4") == Path("out/0012-etc-3.mp4")


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_wrong_arguments_fail_before_jax_is_imported():
    program = """
import sys, sample
assert sample.main(["--prompt", "x", "--frames", "0"]) == 2
assert "jax" not in sys.modules
"""
    done = command("-c", program)
    assert done.returncode == 0, done.stderr


def test_programs_are_cached_before_anything_is_compiled(run, tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parallel, "keep_compiled_programs", full)
    assert run("--prompt", PROMPT) == 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.heavy  # test_paths.py tests which folder is the cache
def test_compiled_programs_are_cached(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    args = ("sample.py", "--prompt", PROMPT, "--frames", "1", "--weights", str(folder), "--out", str(tmp_path / "out"))
    done = command(*args, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "0000-a-red-circle-moving-left-0.png").exists()
    assert any((tmp_path / "cache" / "lavie_jax" / "xla").iterdir())
