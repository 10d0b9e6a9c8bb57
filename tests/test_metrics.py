"""FVD, measures of frame pairs and CLIPSIM as commands: sets of videos, knobs, caches, result files, refusals."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lavie_jax.data import video_files
from lavie_jax.errors import UserError
from lavie_jax.evaluation import clipsim, commands, fidelity, frame_measures, i3d_features, result_files, videos
from lavie_jax.evaluation.__main__ import main
from lavie_jax.evaluation.i3d_features import ClipFeatures, prepared
from lavie_jax.evaluation.protocols import PROTOCOLS, ClipKnobs, ClipsimKnobs, FVDKnobs, PairKnobs, make_knobs
from lavie_jax.evaluation.videos import find_videos


def refusal(main, arguments, capsys):
    """Checks that a command ends with exit code 2 and one line below its progress bars, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    *_, line, end = capsys.readouterr().err.split("\n")
    assert stopped.value.code == 2 and line.startswith("error: ") and not end
    return line


def noise(frames=16, height=32, width=32, seed=0):
    """A slowly changing random clip."""
    rng = np.random.default_rng(seed)
    start, end = rng.uniform(0, 255, (2, height, width, 3))
    weights = np.linspace(0, 1, frames)[:, None, None, None]
    return ((1 - weights) * start + weights * end).astype(np.uint8)


def write_set(folder, count, *, frames=16, fps=8.0, seed=0, change=lambda clip: clip):
    for i in range(count):
        clip = change(noise(frames, seed=seed + i))
        video_files.save_as(clip, folder / f"clip{i}", "npz", fps=fps)
    return str(folder)


class Extractor(i3d_features.Extractor):
    """A stand-in for I3D: random projections of the clip. Counts what it computes."""

    devices = 2

    def __init__(self, *_):
        self.computed = 0

    def __call__(self, clips):
        self.computed += len(clips)
        flat = clips.reshape(len(clips), -1)[:, :300].astype(np.float32) / 255
        weights = np.random.default_rng(1).normal(size=(flat.shape[1], 1424)).astype(np.float32)
        features = flat @ weights
        moving = np.abs(np.diff(clips.astype(np.float32), axis=1)).mean((1, 2, 3, 4))
        return ClipFeatures(features[:, :400], features[:, 400:], moving.astype(np.float32))


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the network and its weights; returns the extractors that were made."""
    made = []

    def make(*args):
        made.append(Extractor())
        return made[-1]

    monkeypatch.setattr(commands, "Extractor", make)
    monkeypatch.setattr(commands, "load_weights", lambda *_: {})
    return made


# ---- sets of videos ----


def test_folders_of_any_tool_are_found_in_natural_order(tmp_path, monkeypatch):
    for name in ("clip2", "clip10", "sub/clip1"):
        video_files.save_as(noise(4), tmp_path / name, "npz", fps=8)
    video_files.save_video(noise(4), tmp_path / "clip9.mp4", fps=8)
    frames = tmp_path / "frames" / "of a clip"
    frames.mkdir(parents=True)
    clip = noise(11)
    for i in range(11):
        Image.fromarray(clip[i]).save(frames / f"{i}.png")
    Image.fromarray(clip[0]).save(tmp_path / "contact-sheet.png")  # beside videos: not a clip
    Image.fromarray(clip[0]).save(tmp_path / "contact-sheet-2.png")
    (tmp_path / "one").mkdir()
    Image.fromarray(clip[0]).save(tmp_path / "one" / "3².png")
    left_out = []
    monkeypatch.setattr(videos.LeftOut, "warn", lambda self, total: left_out.append((str(self), total)))
    found = find_videos(str(tmp_path), "--samples")
    assert [v.name for v in found] == ["clip2", "clip9", "clip10", "frames/of a clip", "sub/clip1"]
    assert left_out == [("2 are images beside videos, 1 are single images", 18)]
    assert sorted(["10²", "9²"], key=videos.natural) == ["9²", "10²"]
    np.testing.assert_array_equal(found[3].read(), clip)  # frame 10 after frame 9
    assert found[3].rate() is None and found[0].rate() == 8


def test_clips_start_where_the_knobs_say(tmp_path):
    clip = noise(30)
    video_files.save_as(clip, tmp_path / "a", "npz", fps=24)
    video = find_videos(str(tmp_path), "--samples")[0]
    for start, first in (("first", 0), ("middle", 7)):
        np.testing.assert_array_equal(video.clip(ClipKnobs(start=start), 0), clip[first : first + 16])
    by_rate = video.clip(ClipKnobs(frames=10, fps=8), 0)
    np.testing.assert_array_equal(by_rate, clip[:30:3])
    ends = [video.clip(ClipKnobs(clips_per_video=2), part)[0] for part in (0, 1)]
    np.testing.assert_array_equal(ends, clip[[0, 14]])
    random = [video.clip(ClipKnobs(start="random", seed=seed), 0) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(random[0], random[1])
    assert any(not np.array_equal(random[0], other) for other in random[2:])
    two = [video.clip(ClipKnobs(start="random", seed=seed, frames=29), 0)[0] for seed in range(20)]
    for frame in clip[:2]:  # both possible starts
        assert sum(np.array_equal(frame, one) for one in two) > 4
    video.check(ClipKnobs(clips_per_video=15))
    with pytest.raises(UserError, match="16 frames at 8 fps are needed, and it has 30 at 24 fps"):
        video.check(ClipKnobs(fps=8))
    with pytest.raises(UserError, match="has 15 different clips of 16 frames, and --clips-per-video asks for 16"):
        video.check(ClipKnobs(clips_per_video=16))
    video_files.save_video(clip, tmp_path / "a.mp4", fps=24)
    (tmp_path / "a.npz").unlink()
    encoded = find_videos(str(tmp_path), "--samples")[0].clip(ClipKnobs(start="middle"), 0)
    right = fidelity.psnr(encoded, clip[7:23])
    assert right > max(fidelity.psnr(encoded, clip[i : i + 16]) for i in (5, 6, 8, 9))


def test_a_clip_has_the_same_frames_in_every_format(tmp_path):
    ramp = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 16 * 16 * 3).reshape(30, 16, 16, 3)
    picked = {}
    for format in ("npz", "mp4", "gif"):
        video_files.save_as(ramp, tmp_path / format / "a", format, fps=25)
        video = find_videos(str(tmp_path / format), "--samples")[0]
        knobs = [ClipKnobs(start=start, fps=7, frames=8, seed=2) for start in ("first", "middle", "random")]
        picked[format] = [(video.clip(k, 0).mean((1, 2, 3)) / 8).round().tolist() for k in knobs]
    assert picked["npz"] == picked["mp4"] == picked["gif"]


def test_moving_shapes_is_a_set_and_bad_sets_are_refused(tmp_path):
    true = find_videos("moving_shapes:val:3", "--reference")
    assert len(true) == 3 and true[0].read().shape == (16, 64, 64, 3) and true[0].digest() != true[1].digest()
    for source, message in (
        ("moving_shapes:vall:3", "unknown split 'vall'; did you mean 'val'"),
        ("moving_shapes:val", "write moving_shapes:val:COUNT"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path), "has no videos"),
    ):
        with pytest.raises(UserError, match=message):
            find_videos(source, "--reference")


def test_pixels_are_cropped_and_scaled_by_the_knobs():
    clip = noise(2, 40, 60)
    square = prepared(clip, FVDKnobs())
    np.testing.assert_array_equal(square, clip[:, :, 10:50])
    np.testing.assert_array_equal(prepared(clip, FVDKnobs(crop_pixels=20)), clip[:, 10:30, 20:40])
    assert prepared(clip, FVDKnobs(crop="none")).shape == clip.shape
    assert prepared(clip, FVDKnobs(resolution=16)).shape == (2, 16, 16, 3)
    assert prepared(clip, FVDKnobs(crop_pixels=270)).shape == square.shape  # larger than the frame


def test_protocols_are_the_defaults_with_named_differences():
    knobs = make_knobs(FVDKnobs, {"clips": 64, "fps": None}, "styleganv")
    assert (knobs.clips, knobs.ddof, knobs.resolution, knobs.frames) == (64, 0, 256, 16)
    for protocol in PROTOCOLS:
        make_knobs(FVDKnobs, {}, protocol)
    assert make_knobs(FVDKnobs, {"crop": "none"}, "paper").crop_pixels is None
    with pytest.raises(UserError, match="--crop-pixels has no effect with --crop none"):
        make_knobs(FVDKnobs, {"crop": "none", "crop_pixels": 100})
    with pytest.raises(UserError, match="did you mean 'styleganv'"):
        make_knobs(FVDKnobs, {}, "stylegan-v")
    with pytest.raises(UserError, match="--frames must be at least 10, not 8"):
        make_knobs(FVDKnobs, {"frames": 8})
    with pytest.raises(UserError, match="--clips-per-video must be at least 1, not 0"):  # the flag's own name
        make_knobs(FVDKnobs, {"clips_per_video": 0})
    with pytest.raises(UserError, match="--filter: unknown value 'box'"):
        make_knobs(FVDKnobs, {"filter": "box"})


# ---- FVD ----


def test_fvd_prints_and_stores_every_number_and_resumes(tmp_path, capsys, stand_in):
    samples = write_set(tmp_path / "samples", 6, seed=50, change=lambda c: c // 2)
    reference = write_set(tmp_path / "real", 14)
    flags = ["--samples", samples, "--reference", reference, "--out", str(tmp_path / "run"), "--batch-size", "4"]
    flags += ["--resamples", "10", "--splits", "3"]
    for part in ("0/2", "1/2"):
        main(["fvd", *flags, "--part", part])
    assert [e.computed for e in stand_in] == [10, 10]  # each host its half of 6 + 14
    capsys.readouterr()
    main(["fvd", *flags, "--json", str(tmp_path / "a.json")])
    assert stand_in[-1].computed == 0  # all features are stored
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fvd", "kvd", "motion"]
    assert "n 6 against 6; real against real" in lines[0] and "reference" in lines[2]
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["numbers"]["fvd"]["real_against_real"]["n"] == 6
    low, high = result["numbers"]["fvd"]["interval"]
    assert low < result["numbers"]["fvd"]["value"] < high
    assert (
        result["knobs"] == dataclasses.asdict(FVDKnobs(resamples=10, splits=3))
        and result["versions"]["jax"]
        and result["rates"]
    )
    assert result["numbers"]["motion"]["value"] == pytest.approx(result["numbers"]["motion"]["reference"] / 2, rel=0.3)

    # The same videos elsewhere, in another order of names, give the same value.
    moved = tmp_path / "moved"
    moved.mkdir()
    for i in range(6):
        (tmp_path / "samples" / f"clip{i}.npz").rename(moved / f"{9 - i}.npz")
    flags[1] = str(moved)
    main(["fvd", *flags, "--json", str(tmp_path / "b.json")])
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["numbers"]["fvd"]["value"] == pytest.approx(result["numbers"]["fvd"]["value"])
    assert again["samples_sha256"] == result["samples_sha256"] and stand_in[-1].computed == 0


def test_a_file_of_features_is_a_reference_of_its_own_protocol_only(tmp_path, capsys, stand_in):
    real, samples = write_set(tmp_path / "real", 8), write_set(tmp_path / "samples", 4, seed=30)
    stored, plain = str(tmp_path / "real.npz"), tmp_path / "plain.json"
    main(["features", "--samples", real, "--to", stored])
    cheap = ["--resamples", "0", "--splits", "2"]
    main(["fvd", "--samples", samples, "--reference", stored, "--json", str(tmp_path / "a.json"), *cheap])
    main(["fvd", "--samples", samples, "--reference", real, "--json", str(plain), *cheap])
    a, b = (json.loads(path.read_text()) for path in (tmp_path / "a.json", plain))
    assert a["numbers"]["fvd"] == b["numbers"]["fvd"] and a["reference_sha256"] == b["reference_sha256"]
    main(["compare", str(tmp_path / "a.json"), str(plain)])
    assert "comparable\n  fvd" in capsys.readouterr().out
    for flags, message in (
        (["--resolution", "16"], "another protocol: resolution None instead of 16"),
        (["--clips-per-video", "2"], "another protocol: clips_per_video 1 instead of 2"),
        (
            ["--start", "random", "--seed", "1"],
            "another protocol: start 'first' instead of 'random', seed 0 instead of 1",
        ),
        (["--clips", "9"], "--reference has 8 clips, and --clips asks for 9"),
    ):
        many = real if "9" in flags else samples
        if "9" in flags:
            write_set(tmp_path / "real", 9)
        assert message in refusal(main, ["fvd", "--samples", many, "--reference", stored, *flags], capsys)
    fast = write_set(tmp_path / "fast", 4, fps=24)
    assert "--reference: 8; --samples: 24 fps" in refusal(
        main, ["fvd", "--samples", fast, "--reference", stored], capsys
    )
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 nothing")
    assert "is not a file of features" in refusal(
        main, ["fvd", "--samples", samples, "--reference", str(damaged)], capsys
    )


def test_damaged_features_are_computed_again(tmp_path, stand_in):
    samples, real = write_set(tmp_path / "samples", 2, seed=9), write_set(tmp_path / "real", 2)
    flags = ["fvd", "--samples", samples, "--reference", real, "--out", str(tmp_path / "run"), "--resamples", "0"]
    main(flags)
    next((tmp_path / "run" / "cache").rglob("*.npz")).write_bytes(b"half")
    main(flags)
    assert [e.computed for e in stand_in] == [4, 1]
    features = ["features", "--samples", samples, "--out", str(tmp_path / "other"), "--to", str(tmp_path / "f.npz")]
    main([*features, "--part", "1/2"])
    assert stand_in[-1].computed == 1 and not (tmp_path / "f.npz").exists()
    main(features)
    assert stand_in[-1].computed == 1 and (tmp_path / "f.npz").exists()


def test_fvd_refuses_what_would_mislead(tmp_path, capsys, stand_in):
    samples, real = write_set(tmp_path / "samples", 3, fps=8), write_set(tmp_path / "real", 4, fps=24)
    base = ["fvd", "--samples", samples, "--reference", real, "--resamples", "0", "--splits", "2"]
    assert "different rates (--samples: 8; --reference: 24 fps): give --fps" in refusal(main, base, capsys)
    main([*base, "--mixed-rates"])
    assert "AT n 2: the reference has too few clips for n 3" in capsys.readouterr().out
    assert "has 3 clips, and --clips asks for 4" in refusal(main, [*base, "--mixed-rates", "--clips", "4"], capsys)
    assert "2048" in refusal(main, [*base, "--protocol", "tats"], capsys)
    assert "--frames must be at least 10" in refusal(main, [*base, "--frames", "9"], capsys)
    short = write_set(tmp_path / "short", 2, frames=9)
    error = refusal(main, ["fvd", "--samples", short, "--reference", samples], capsys)
    assert "clip0.npz is too short: 16 frames are needed, and it has 9" in error
    (tmp_path / "short" / "clip1.npz").rename(tmp_path / "samples" / "last.npz")
    assert "last.npz is too short" in refusal(main, [*base, "--mixed-rates"], capsys)
    assert stand_in[-1].computed == 0  # refused before the others are computed
    (tmp_path / "samples" / "last.npz").unlink()
    assert "whose files are read as videos" in refusal(main, [*base, "--out", samples], capsys)
    one = write_set(tmp_path / "one", 1)
    assert "FVD needs at least 2" in refusal(main, ["fvd", "--samples", one, "--reference", samples], capsys)
    assert "part must be I/N with I from 0 to N-1" in refusal(
        main, [*base, "--out", str(tmp_path), "--part", "2/2"], capsys
    )
    assert "unknown metric or command 'fdv'; did you mean 'fvd'" in refusal(main, ["fdv"], capsys)
    main(["--help"])
    assert "clipsim" in capsys.readouterr().out


def test_features_of_the_network_are_those_of_scaled_clips(monkeypatch):
    """The extractor pads a batch to the devices, scales, and measures motion at the network's input."""

    class Small:
        def apply(self, variables, x):
            return x.mean((1, 2, 3)) @ variables["params"]["w"], x[:, 0].reshape(len(x), -1)[:, :1024]

    monkeypatch.setattr(i3d_features, "I3D", Small)
    clips = np.stack([noise(10, 32, 32, seed) for seed in range(3)])
    extract = i3d_features.Extractor({"w": np.ones((3, 400), np.float32)}, FVDKnobs(round=True))
    features = extract(clips)
    assert features.logits.shape == (3, 400) and extract.devices == 8
    wanted = (clips.astype(np.float64) / 127.5 - 1).mean((1, 2, 3)).sum(-1)
    np.testing.assert_allclose(features.logits[:, 0], wanted, atol=0.02)
    assert features.motion[0] == pytest.approx(np.abs(np.diff(clips[0].astype(float), axis=0)).mean(), rel=0.5)


# ---- compare ----


def result_of(**changes):
    numbers = {"fvd": {"value": 600.0, "n": 64, "n_reference": 64, "interval": [560.0, 640.0]}}
    knobs = dataclasses.asdict(FVDKnobs(clips=64))
    return {"kind": "evaluation", "metric": "fvd", "knobs": knobs, "numbers": numbers, "reference_sha256": "r",
            "weights_sha256": "w", **changes}  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"metric": "kvd"}, "metric fvd and kvd"),
        ({"knobs": {**dataclasses.asdict(FVDKnobs(clips=64)), "filter": "bicubic"}}, "filter 'bilinear' and 'bicubic'"),
        ({"reference_sha256": "s"}, "the reference videos differ"),
        ({"weights_sha256": "x"}, "the networks differ"),
        ({"numbers": {"fvd": {"value": 600.0, "n": 256, "n_reference": 64}}}, "n is 64 and 256.*FVD is biased by it"),
    ],
)
def test_results_that_must_not_be_compared_are_named(change, reason):
    reasons = result_files.differences(result_of(), result_of(**change))
    assert len(reasons) == 1
    assert __import__("re").search(reason, reasons[0]), reasons


def test_the_seed_of_a_bootstrap_alone_does_not_matter():
    a, b = (result_of(knobs=dataclasses.asdict(PairKnobs(seed=seed))) for seed in (0, 1))
    assert not result_files.differences(a, b)
    a, b = (result_of(knobs=dataclasses.asdict(FVDKnobs(seed=seed))) for seed in (0, 1))
    assert "seed 0 and 1" in result_files.differences(a, b)[0]


def test_compare_exits_with_1_and_says_why(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    other = result_of(numbers={"fvd": {"value": 700.0, "n": 64, "n_reference": 64, "interval": [660.0, 740.0]}})
    for path, result in zip(paths, (result_of(), other, result_of(reference_sha256="s"))):
        path.write_text(json.dumps(result))
    main(["compare", str(paths[0]), str(paths[1])])
    assert "fvd: 600 and 700, difference +100; the intervals are apart" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(paths[0]), str(paths[2])])
    assert stopped.value.code == 1 and "not comparable:\n  reference_sha256" in capsys.readouterr().out
    for damage in ({"knobs": []}, {"numbers": {"fvd": 600.0}}, {"numbers": {"fvd": {"value": "600"}}}, {"kind": "x"}):
        paths[1].write_text(json.dumps(result_of(**damage)))
        assert "is not a result" in refusal(main, ["compare", str(paths[0]), str(paths[1])], capsys)


# ---- frames with a truth ----


def test_ssim_is_that_of_the_formula_and_equal_clips_have_one():
    a, b = noise(2, 13, 12, 3), noise(2, 13, 12, 4)
    luma = [x.astype(float) @ (0.299, 0.587, 0.114) for x in (a, b)]
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for t in range(2):
        for y in range(3):
            for x in range(2):
                p, q = (image[t, y : y + 11, x : x + 11] for image in luma)
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                c = (window * p * q).sum() - mp * mq
                values.append(
                    (2 * mp * mq + 6.5025) * (2 * c + 58.5225) / (mp**2 + mq**2 + 6.5025) / (vp + vq + 58.5225)
                )
    assert fidelity.ssim(a, b) == pytest.approx(np.mean(values), rel=1e-6)
    assert fidelity.ssim(a, a) == pytest.approx(1)
    with pytest.raises(UserError, match="at least 11 pixels"):
        fidelity.ssim(a[:, :10], b[:, :10])


def test_pairs_are_measured_by_name_with_medians(tmp_path, capsys):
    true = write_set(tmp_path / "true", 3)
    darker = write_set(tmp_path / "darker", 3, change=lambda c: np.maximum(c, 10) - 10)
    main(["psnr", "--samples", darker, "--reference", true, "--json", str(tmp_path / "psnr.json")])
    assert "psnr" in capsys.readouterr().out
    result = json.loads((tmp_path / "psnr.json").read_text())
    assert result["numbers"]["psnr"]["median"] == pytest.approx(20 * np.log10(25.5), abs=0.3)
    assert result["paired_by"] == "name"
    for i in range(3):
        (tmp_path / "darker" / f"clip{i}.npz").rename(tmp_path / "darker" / f"mine{i}.npz")
    main(["psnr", "--samples", darker, "--reference", true, "--json", str(tmp_path / "psnr.json")])
    assert json.loads((tmp_path / "psnr.json").read_text())["paired_by"] == "position"
    assert result["numbers"]["psnr"]["n"] == 3 and result["videos"]["psnr"].keys() == {"clip0", "clip1", "clip2"}
    main(["psnr", "--samples", true, "--reference", true, "--json", str(tmp_path / "same.json")])
    assert json.loads((tmp_path / "same.json").read_text())["numbers"]["psnr"]["value"] is None  # infinite
    assert "psnr inf dB" in capsys.readouterr().out
    other = write_set(tmp_path / "other", 2, frames=12)
    assert "1 samples have no reference" in refusal(main, ["ssim", "--samples", true, "--reference", other], capsys)
    error = refusal(main, ["ssim", "--samples", other, "--reference", true], capsys)
    assert "clip0 and its reference clip0 differ: 12 frames of 32x32 and 16 frames" in error and "--frames N" in error
    main(["ssim", "--samples", other, "--reference", true, "--frames", "1"])


def test_known_frames_are_left_out_and_summaries_have_intervals(monkeypatch):
    clip = noise(9)
    video = videos.Video("a", None, 0, "val")
    monkeypatch.setattr(videos.Video, "read", lambda self, frames: clip)
    seen = []
    measure = {"m": lambda a, b: seen.append(a) or 1.0}
    measure["flicker"] = measure["m"]
    frame_measures.compare_pairs([(video, video)], measure, PairKnobs(leave_out_every=4))
    np.testing.assert_array_equal(seen[0], clip[[1, 2, 3, 5, 6, 7]])
    np.testing.assert_array_equal(seen[1], clip)  # flicker is of consecutive frames
    with pytest.raises(UserError, match="a is too short: 17 frames are needed, and it has 16"):
        frame_measures.compare_pairs([(video, video)], measure, PairKnobs(frames=17))
    values = {str(i): float(x) for i, x in enumerate(np.random.default_rng(0).normal(size=50))}
    cell = frame_measures.summary(values, resamples=400, seed=0)
    assert cell["interval"][0] < cell["value"] < cell["interval"][1]
    assert cell["interval"][1] - cell["interval"][0] == pytest.approx(2 * 1.96 * cell["sd"], rel=0.15)


def test_lpips_refuses_small_frames(monkeypatch):
    monkeypatch.setattr(frame_measures, "load_weights", lambda *_: {})
    with pytest.raises(UserError, match="at least 31 pixels a side; given 30x64"):
        frame_measures.Lpips(None, spatial=False)(
            np.zeros((1, 30, 64, 3), np.uint8), np.zeros((1, 30, 64, 3), np.uint8)
        )


# ---- CLIPSIM ----


def test_clips_preprocessing_rounds_as_its_two_implementations():
    frame = noise(1, 40, 57)[0]  # scaled to 224 x 319: the longer side is rounded down
    whole = np.asarray(Image.fromarray(frame).resize((319, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(clipsim.preprocess(frame, 224, "floor"), whole[:, 47:271])
    np.testing.assert_array_equal(clipsim.preprocess(frame, 224, "nearest"), whole[:, 48:272])
    tall = noise(1, 56, 40)[0]
    assert clipsim.preprocess(tall, 20, "floor").shape == (20, 20, 3)


class Scorer(clipsim.Scorer):
    """Frames and texts with known cosines: a frame's red level against the number in the text."""

    hash = "h"

    def __init__(self):
        pass

    def embed_frames(self, frames, rounding):
        angle = np.array([frame[0, 0, 0] / 100 for frame in frames])
        return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)

    def embed_text(self, text):
        return np.array([np.cos(float(text)), np.sin(float(text))], np.float32)


def test_clipsim_is_the_mean_over_frames_then_videos(tmp_path):
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    clip[0, ..., 0], clip[1, ..., 0] = 100, 200
    for name in "ab":
        video_files.save_as(clip, tmp_path / name, "npz", fps=8)
    (tmp_path / "a.json").write_text(json.dumps({"request": {"prompt": "1"}}))  # as sample.py writes
    (tmp_path / "b.txt").write_text("2\n")
    found = find_videos(str(tmp_path), "--samples")
    values = clipsim.clipsim(found, None, ClipsimKnobs(), Scorer())
    assert values == pytest.approx({"a": (1 + np.cos(1)) / 2, "b": (1 + np.cos(1)) / 2})
    values = clipsim.clipsim(found, {"a": "2", "b": "1"}, ClipsimKnobs(frames=1), Scorer())
    assert values["a"] == pytest.approx(np.cos(1)) and values["b"] == pytest.approx(1)
    with pytest.raises(UserError, match="no caption for the video 'b'"):
        clipsim.clipsim(found, {"a": "2"}, ClipsimKnobs(), Scorer())
    for content, message in (("\ufeff2".encode(), None), ("né".encode("latin1"), "cannot be read as text"),
                             (b" \n", "has no caption")):  # fmt: skip
        (tmp_path / "b.txt").write_bytes(content)
        if message is None:
            assert clipsim.caption_of(found[1], None) == "2"  # without the byte order mark
        else:
            with pytest.raises(UserError, match=message):
                clipsim.caption_of(found[1], None)
    for request in (None, [], {"prompt": " "}):
        (tmp_path / "b.json").write_text(json.dumps({"request": request}))
        with pytest.raises(UserError, match="has no caption"):
            clipsim.caption_of(found[1], None)
    (tmp_path / "v1. a cat").mkdir()
    (tmp_path / "v1. a cat.txt").write_text("a cat")
    assert clipsim.caption_of(videos.Video("v1. a cat", tmp_path / "v1. a cat"), None) == "a cat"
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match="b.npz has no caption: give --captions"):
        clipsim.clipsim(found, None, ClipsimKnobs(), Scorer())


def test_clipsims_of_other_captions_are_not_comparable(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "Scorer", lambda folder: Scorer())
    write_set(tmp_path / "samples", 2, frames=2)
    for run in "ab":
        for i in range(2):
            (tmp_path / "samples" / f"clip{i}.txt").write_text(f"{i}" if run == "a" else "7")
        main(["clipsim", "--samples", str(tmp_path / "samples"), "--clip", "clip", "--json", str(tmp_path / run)])
    assert json.loads((tmp_path / "a").read_text())["drawn_captions"] == {"clip0": "0", "clip1": "1"}
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "the captions differ" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_one_caption_a_video_is_drawn_by_the_seed():
    captions = {f"video{i}": [f"{i} {k}" for k in range(20)] for i in range(30)}
    drawn = clipsim.draw_captions(captions, 0)
    assert drawn == clipsim.draw_captions(captions, 0) != clipsim.draw_captions(captions, 1)
    assert all(drawn[name] in own for name, own in captions.items())
    assert len({text.split()[1] for text in drawn.values()}) > 5
