"""Interpolation and super-resolution with tiny random models, from their input to their output."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lavie_jax
from lavie_jax import cascade
from lavie_jax.cascade import running
from lavie_jax.cascade.denoising import DenoisingPlan, denoise
from lavie_jax.diffusion import Schedule, make_sampler, sample
from lavie_jax.errors import UserError
from lavie_jax.samples.stage_cache import MemoryCache
from lavie_jax.stages import STAGES, clips
from lavie_jax.stages import settings as stage_settings
from lavie_jax.stages.clips import ClipInfo
from lavie_jax.stages.stage import guidance_of
from lavie_jax.stages.vsr import TILE
from lavie_jax.text_files import read_json
from lavie_jax.weights import load_folder
from lavie_jax.weights.expected import compare, fingerprint
from lavie_jax.weights.folder import part_dir, read_part

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_cascade(tmp_path_factory.mktemp("weights") / "cascade")


@pytest.fixture(scope="module")
def single(folder):
    """On one device."""
    return lavie_jax.load(folder, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def weights(folder):
    return {stage: load_folder(folder / stage, params=False) for stage in tiny.UNETS}


def clip(frames=4, height=16, width=24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def info(frames, height=16, width=24, fps=5.0) -> ClipInfo:
    return ClipInfo(frames=frames, height=height, width=width, fps=fps, own=True)


def prepared(pipe, stage, frames, seed=0, **given):
    """(model, settings, the clip before its first step)."""
    settings = cascade.resolve_settings(pipe.weights, [stage], {stage: given}, info(*frames.shape[:3]))[stage]
    model = pipe.model(stage)
    sample = running.Sample(cascade.Request(prompt=PROMPT, seed=seed), MemoryCache(), frames, len(frames))
    (ready,) = running._prepared(model, settings, [sample])
    return model, settings, ready


def encoded(model, images):
    """Returns the mean and log-variance of the posterior, from one compiled program."""
    return jax.jit(partial(model.vae.apply, method="encode"))({"params": model.vae_params}, images)


def latents_of(pipe, stage, frames, **given) -> np.ndarray:
    model, settings, ready = prepared(pipe, stage, frames, **given)
    sampler = make_sampler(settings.sampler, settings.steps, model.weights.schedule)
    windows = STAGES[stage].windows(ready.shape, settings)
    denoise(
        model,
        [ready],
        DenoisingPlan(sampler=sampler, guidance=guidance_of(settings), windows=windows, rows=model.mesh.size),
    )
    return ready.state["x"]


@pytest.mark.heavy
def test_one_call_equals_one_call_per_stage(single):
    video = single(PROMPT, stages=("base", "interpolation", "vsr"), seed=1)
    assert video.shape == (1, 13, 64, 96, 3) and video.dtype == np.uint8
    (key_frames,) = single(PROMPT, seed=1)
    (frames,) = single(PROMPT, stages="interpolation", clip=key_frames, seed=1)
    assert frames.shape == (13, 16, 24, 3)
    np.testing.assert_array_equal(video, single(PROMPT, stages=["vsr"], clip=frames, seed=1))


@pytest.mark.heavy  # test_cascade.py has the base stage
@pytest.mark.parametrize("stage", ["vsr", "interpolation"])
def test_one_device_and_eight_agree(stage, single, folder):
    """With several windows: 18 key frames, and 7 frames in windows of 4 and tiles of 8."""
    frames = clip(18, 8, 8) if stage == "interpolation" else clip(7, 8, 12)
    given = {"steps": 2} | ({"window_frames": 4, "tile": 8} if stage == "vsr" else {})
    one = latents_of(single, stage, frames, **given)
    eight = latents_of(lavie_jax.load(folder, stages=[stage]), stage, frames, **given)
    assert one.shape == ((69, 2, 2, 4) if stage == "interpolation" else (7, 8, 12, 4))
    assert np.linalg.norm(eight - one) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.parametrize("stage", [pytest.param("interpolation", marks=pytest.mark.heavy), "vsr"])
def test_a_sample_equals_a_plain_loop(stage, single):
    """Compared with a few independent lines, from noise to latents."""
    frames = clip(4 if stage == "interpolation" else 8)  # one window, whose programs are compiled already
    model, settings, ready = prepared(single, stage, frames, seed=3)
    images = jnp.asarray(frames / np.float32(127.5) - 1)
    length = 13 if stage == "interpolation" else 8
    level = jnp.array([settings.noise_level]) if stage == "vsr" else None

    def normal(stream, i, shape):
        key = jax.random.key(3, impl="threefry2x32")
        for word in (STAGES[stage].noise_number, stream, i):
            key = jax.random.fold_in(key, np.uint32(word))
        return jax.random.normal(key, shape)

    side = (4, 6) if stage == "interpolation" else (16, 24)
    own = [normal(2**32 - 1, i, (*side, 4 if stage == "interpolation" else 3)) for i in range(len(frames))]
    if stage == "interpolation":
        mean, logvar = encoded(model, images)
        keys = (mean + jnp.exp(logvar / 2) * jnp.stack(own)) * model.vae.config.scaling_factor
        concat = keys[np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3])]
    else:
        signal = np.sqrt(STAGES["vsr"].low_res_schedule.alphas_cumprod[50])
        concat = signal * images + np.sqrt(1 - signal**2) * jnp.stack(own)
    np.testing.assert_allclose(ready.concat, concat, atol=2e-4)

    texts = model.encode_text([PROMPT + settings.prompt_suffix, settings.negative_prompt]).hidden
    unet = jax.jit(lambda x, t, text: model.unet.apply({"params": model.unet_params}, x, t, text, noise_level=level))

    def answer(x, t):
        x = jnp.concatenate([x, jnp.asarray(ready.concat)[None]], axis=-1)
        with_prompt, without = (unet(x, t, jnp.asarray(text)[None]) for text in texts)
        return without + 4.0 * (with_prompt - without)

    sampler = make_sampler(settings.sampler, 3, STAGES[stage].schedule)
    x0 = sample(sampler, answer, jnp.stack([normal(0, i, (*side, 4)) for i in range(length)])[None])
    result = latents_of(single, stage, frames, seed=3)
    assert np.linalg.norm(result - x0[0]) <= 1e-3 * np.linalg.norm(result)


def test_key_frames_can_be_the_modes_of_their_posteriors(single):
    frames = clip(4)
    model, settings, ready = prepared(single, "interpolation", frames, key_latents="mode")
    assert settings.key_latents == "mode"
    images = jnp.asarray(frames / np.float32(127.5) - 1)
    mean, _ = encoded(model, images)
    np.testing.assert_allclose(ready.concat[::4], mean * model.vae.config.scaling_factor, atol=2e-4)
    assert np.abs(prepared(single, "interpolation", frames)[2].concat - ready.concat).max() > 1e-3


def test_key_frames_can_be_kept(single):
    key_frames = clip(4)
    video = single(PROMPT, stages="interpolation", clip=key_frames)[0]
    kept = single(PROMPT, stages="interpolation", clip=key_frames, interpolation={"keep_key_frames": True})[0]
    np.testing.assert_array_equal(kept[::4], key_frames)
    others = np.arange(13) % 4 != 0
    np.testing.assert_array_equal(kept[others], video[others])
    assert not np.array_equal(video[::4], key_frames)


@pytest.mark.parametrize("start", range(5))
def test_kept_key_frames_are_at_the_right_positions_of_any_piece(start):
    decoded = np.zeros((6, 4, 4, 3), np.uint8)
    frames = np.arange(1, 9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    settings = stage_settings.InterpolationSettings(**{**tiny.SAMPLING, "height": 4, "width": 4}, keep_key_frames=True)
    result = STAGES["interpolation"].finish(decoded, start, settings, frames)[:, 0, 0, 0]
    expected = [i // 4 + 1 if i % 4 == 0 else 0 for i in range(start, start + 6)]
    assert result.tolist() == expected


def test_odd_sides_are_padded_and_cropped_back(single, weights):
    frames = clip(4, 15, 22)
    video = single(PROMPT, stages="interpolation", clip=frames)
    assert video.shape == (1, 13, 15, 22, 3)
    even = np.pad(frames, [(0, 0), (0, 1), (0, 2), (0, 0)], mode="edge")
    np.testing.assert_array_equal(video, single(PROMPT, stages="interpolation", clip=even)[:, :, :15, :22])
    settings = cascade.resolve_settings(weights, ["interpolation"], {}, info(4, 15, 22))
    (note,) = cascade.padding_notes(weights, settings, info(4, 15, 22))
    assert "15x22" in note and "padded to 16x24" in note


def test_low_resolution_sides_are_padded_to_multiples_that_the_unet_can_halve(weights):
    config = dataclasses.replace(
        tiny.UNETS["vsr"], block_out_channels=(16,) * 4, attention_levels=(True,) * 4, attention_heads=(2,) * 4,
        only_cross_attention=(False,) * 4,
    )  # fmt: skip
    large = dataclasses.replace(weights["vsr"], unet=dataclasses.replace(weights["vsr"].unet, config=config))
    settings = cascade.resolve_settings({"vsr": large}, ["vsr"], {}, info(3, 33, 40))["vsr"]
    assert (settings.height, settings.width) == (132, 160)
    assert STAGES["vsr"].latent_shape(large, settings) == (3, 40, 40, 4)


def test_size_and_rate_follow_the_clip(weights):
    settings = cascade.resolve_settings(
        weights, ["interpolation", "vsr"], {"vsr": {"steps": 7}}, info(6, 16, 20, fps=5.0)
    )
    first, last = settings["interpolation"], settings["vsr"]
    assert (first.frames, first.height, first.width, first.fps) == (21, 16, 20, 20.0), "the duration is unchanged"
    assert (last.frames, last.height, last.width, last.fps) == (21, 64, 80, 20.0)
    assert (first.steps, last.steps, last.noise_level, last.negative_prompt) == (3, 7, 50, "blue")
    after_base = cascade.resolve_settings(weights, ["base", "interpolation"], {})
    assert after_base["interpolation"].fps == 24, "the weights' own"


def test_large_frames_are_tiled_by_default(weights):
    assert cascade.resolve_settings(weights, ["vsr"], {}, info(2, 320, 512))["vsr"].tile == 0
    assert cascade.resolve_settings(weights, ["vsr"], {}, info(2, 480, 640))["vsr"].tile == TILE
    assert cascade.resolve_settings(weights, ["vsr"], {"vsr": {"tile": 0}}, info(2, 480, 640))["vsr"].tile == 0


def test_the_low_resolution_schedule_comes_from_the_folder(single):
    frames = clip(1)
    _, _, released = prepared(single, "vsr", frames)
    linear = dataclasses.replace(single.weights["vsr"], low_res_schedule=Schedule())
    _, _, other = prepared(cascade.Cascade({"vsr": linear}, devices=jax.devices()[:1]), "vsr", frames)
    images = frames / 127.5 - 1

    def noise(clip_state, schedule):
        abar = schedule.alphas_cumprod[50]
        return (clip_state.concat - np.sqrt(abar) * images) / np.sqrt(1 - abar)

    np.testing.assert_allclose(noise(released, STAGES["vsr"].low_res_schedule), noise(other, Schedule()), atol=1e-4)


BAD = {
    "noise level": (["vsr"], {"vsr": {"noise_level": 351}}, "noise_level must be from 0 to 350"),
    "noise level of the model": (
        ["vsr"],
        {"vsr": {"noise_level": 300}},
        "noise_level must be from 0 to 299 for",
    ),
    "overlap": (["vsr"], {"vsr": {"overlap_frames": 8}}, "overlap_frames must be below window_frames = 8"),
    "windows": (["vsr"], {"vsr": {"windows": "oficial"}}, "did you mean 'official'"),
    "tile": (["vsr"], {"vsr": {"tile": 4}}, "tile must be at least 8, or 0, not 4"),
    "sampler": (["vsr"], {"vsr": {"sampler": "eulr"}}, "vsr stage: unknown sampler 'eulr'"),
    "setting": (["vsr"], {"vsr": {"step": 3}}, "did you mean 'steps'"),
    "of no stage": (["vsr"], {"base": {"steps": 3}}, "steps is given for base"),
    "one key frame": (["interpolation"], {}, "at least 2 key frames"),
    "no weights": (["vsr"], None, "vsr has no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_settings_are_refused(case, weights):
    stages, given, message = BAD[case]
    have = {"base": weights["base"]} if given is None else weights
    with pytest.raises(UserError, match=message):
        cascade.resolve_settings(have, stages, given or {}, info(1))


def test_a_clip_that_exceeds_memory_is_refused_with_advice(weights, monkeypatch):
    monkeypatch.setattr(clips, "free_memory", lambda: 1e6)
    cascade.resolve_settings(weights, ["vsr"], {}, info(10))
    with pytest.raises(UserError, match=r"1000 frames of 16x24 .* at most 41 frames .* -segment_time 8 "):
        cascade.resolve_settings(weights, ["vsr"], {}, info(1000))


@pytest.mark.parametrize(
    ("stages", "own", "message"),
    [
        ("vsr,base", False, "cannot be run in this order"),
        ("base,base", False, "cannot be run in this order"),
        ("vsr,interpolation", True, "cannot be run in this order"),
        ("", False, "none given"),
        ("vsr", False, "vsr needs a clip"),
        ("base,upscale", False, "unknown 'upscale'"),
    ],
)
def test_impossible_stages_are_refused(stages, own, message):
    with pytest.raises(UserError, match=message):
        stage_settings.parse_stages(stages, own_clip=own)


def test_possible_stages_are_accepted():
    for names in ("base", "base,interpolation", "base, vsr", "base,interpolation,vsr"):
        assert stage_settings.parse_stages(names, own_clip=False) == tuple(names.replace(" ", "").split(","))
    for names in ("base,vsr", "interpolation", "vsr", "interpolation,vsr"):
        assert stage_settings.parse_stages(names.split(","), own_clip=True) == tuple(names.split(","))


def test_every_stage_has_settings_that_hold_its_released_defaults():
    assert list(stage_settings.STAGE_INFO) == list(STAGES)
    for stage in STAGES.values():
        settings = stage.info.settings.make(stage.sampling, {})
        assert stage.sampling.items() <= settings.to_dict().items()


def test_no_two_stages_share_their_noise():
    assert len({stage.noise_number for stage in STAGES.values()}) == len(STAGES)


def test_a_cascades_folder_gives_its_stages(folder, tmp_path):
    assert cascade.stage_folders(folder) == {stage: folder / stage for stage in tiny.UNETS}
    assert cascade.stage_folders(folder / "vsr") == {"vsr": folder / "vsr"}
    elsewhere = cascade.stage_folders(folder, {"vsr": tmp_path})
    assert elsewhere["vsr"] == tmp_path and elsewhere["base"] == folder / "base"
    assert cascade.stage_folders(None, {"vsr": tmp_path}) == {"vsr": tmp_path}
    with pytest.raises(UserError, match="'base', but 'vsr' is needed"):
        lavie_jax.load(folders={"vsr": folder / "base"})


def test_a_stage_that_a_folder_lacks_is_refused(folder):
    with pytest.raises(UserError, match="stage vsr has no weights; available stages: base. Give --vsr-weights"):
        lavie_jax.load(stages=["base", "vsr"], folders={"base": folder / "base"})


def test_without_a_path_the_shipped_cascade_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(cascade, "SHIPPED", folder)
    assert set(lavie_jax.load().weights) == set(tiny.UNETS)
    assert set(lavie_jax.load(stages=["vsr"]).weights) == {"vsr"}


def test_some_of_the_shipped_stages_may_be_missing(folder, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(folder / "base")
    monkeypatch.setattr(cascade, "SHIPPED", tmp_path)
    pipe = lavie_jax.load(devices=jax.devices()[:1])
    assert set(pipe.weights) == {"base"}
    with pytest.raises(UserError, match="stage vsr has no weights; available stages: base. Give --vsr-weights"):
        pipe(PROMPT, stages="base,vsr")


def test_the_shipped_models_can_be_loaded():
    result = cascade.stage_folders()
    assert list(result) == list(STAGES)
    for stage, folder in result.items():
        assert load_folder(folder, params=False).stage == stage
        for part in ("unet", "vae", "text_encoder"):
            config, tensors, _ = read_part(folder, part)
            shapes = {path: tensor.shape for path, tensor in tensors.items()}
            assert compare(part, config, shapes) == []
            assert read_json(part_dir(folder, part) / "config.json")["fits"] == fingerprint(config, shapes), (
                "ship it again"
            )


def test_only_a_chosen_chain_that_starts_late_is_warned_of(weights, monkeypatch):
    warnings = []
    monkeypatch.setattr(cascade.logging, "warning", lambda text, *args: warnings.append(text % args))
    own = weights["vsr"].sampling | {"sampler": "ddim", "steps": 2, "spacing": None}
    vsr = {"vsr": dataclasses.replace(weights["vsr"], sampling=own)}
    clip = ClipInfo(frames=3, height=16, width=16, fps=8)
    cascade.resolve_settings(vsr, ("vsr",), {}, clip)
    cascade.resolve_settings(vsr, ("vsr",), {"vsr": {"steps": 2}}, clip)
    assert not warnings
    cascade.resolve_settings(vsr, ("vsr",), {"vsr": {"steps": 501}}, clip)
    assert len(warnings) == 1 and "stage vsr: ddim with 501 steps" in warnings[0]
