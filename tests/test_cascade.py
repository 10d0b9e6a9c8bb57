"""From prompts to frames: a sample depends on its prompt, seed and settings, and on nothing else."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lavie_jax
from lavie_jax import cascade, parallel
from lavie_jax.cascade import Cascade, Request, running
from lavie_jax.cascade import model as stage_model
from lavie_jax.cascade.denoising import DenoisingPlan, denoise
from lavie_jax.data import tokens
from lavie_jax.diffusion import Schedule, make_sampler, sample
from lavie_jax.errors import UserError
from lavie_jax.samples.stage_cache import MemoryCache
from lavie_jax.stages import STAGES
from lavie_jax.stages.settings import BaseSettings
from lavie_jax.stages.stage import guidance_of
from lavie_jax.weights import load_folder

PROMPT = "a red circle moving left"
SETTINGS = BaseSettings(**tiny.SAMPLING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="module")
def pipe(folder):
    """Returns the tiny base on all 8 devices."""
    return lavie_jax.load(folder)


@pytest.fixture(scope="module")
def single(folder):
    """Returns the tiny base on one device."""
    return lavie_jax.load(folder, devices=jax.devices()[:1])


def latents_of(pipe, requests, settings) -> np.ndarray:
    """Returns the latents of all requests, denoised together."""
    model, shape = pipe.base, STAGES["base"].latent_shape(pipe.base.weights, settings)
    sampler = make_sampler(settings.sampler, settings.steps, model.weights.schedule)
    clips = running._prepared(
        model, settings, [running.Sample(request, MemoryCache(), None, settings.output_frames) for request in requests]
    )
    windows = STAGES["base"].windows(shape, settings)
    denoise(
        model,
        clips,
        DenoisingPlan(sampler=sampler, guidance=guidance_of(settings), windows=windows, rows=len(requests)),
    )
    return np.stack([clip.state["x"] for clip in clips])


@pytest.mark.parametrize("shape", [(4, 4, 6, 4), (3, 5, 7, 3)], ids=str)
def test_noise_depends_only_on_the_seed_bit_for_bit(pipe, single, shape):
    seeds = [7, 0, 2**32 - 1]
    noises = [np.asarray(pipe.base.noise(seed, 2, shape)) for seed in seeds]
    for seed, noise in zip(seeds, noises):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0), 2)
        np.testing.assert_array_equal(noise, jax.random.normal(key, shape))
        np.testing.assert_array_equal(noise, single.base.noise(seed, 2, shape))
    assert len({noise.tobytes() for noise in noises}) == len(seeds)


OTHER_CONFIG = {
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 5,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@contextlib.contextmanager
def configured(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def test_every_setting_of_jax_that_is_reset_is_tested():
    assert OTHER_CONFIG.keys() == parallel.CONFIG.keys()
    assert not any(OTHER_CONFIG[name] == value for name, value in parallel.CONFIG.items())


def test_noise_does_not_depend_on_the_process_wide_configuration_of_jax(single):
    default = np.asarray(single.base.noise(3, 1, (2, 3, 5, 4)))
    for name in ("jax_threefry_partitionable", "jax_default_prng_impl", "jax_random_seed_offset"):
        with configured(name, OTHER_CONFIG[name]):
            np.testing.assert_array_equal(single.base.noise(3, 1, (2, 3, 5, 4)), default)


@pytest.mark.parametrize("frames", [1, pytest.param(4, marks=pytest.mark.heavy)])
def test_samples_do_not_depend_on_the_process_wide_configuration_of_jax(frames, folder, single):
    expected = single("a red circle", steps=2, seed=3, frames=frames)
    with contextlib.ExitStack() as stack:  # all at once: each compiles everything again
        for name, value in OTHER_CONFIG.items():
            stack.enter_context(configured(name, value))
        again = lavie_jax.load(folder, devices=single.devices)
        np.testing.assert_array_equal(again("a red circle", steps=2, seed=3, frames=frames), expected)


def test_a_frames_noise_is_the_same_however_the_clip_is_cut(pipe, single):
    together = np.asarray(pipe.base.frame_noise(5, 1, range(6), (4, 6, 4)))
    np.testing.assert_array_equal(together[2:5], single.base.frame_noise(5, 1, range(2, 5), (4, 6, 4)))
    assert len({frame.tobytes() for frame in together}) == 6


def test_noise_is_standard_normal_and_new_at_every_step(single):
    start, first, second = (np.asarray(single.base.noise(5, i, (16, 32, 32, 4))).ravel() for i in range(3))
    for a, b in ((start, first), (first, second), (start, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(start.mean()) < 0.02 and abs(start.std() - 1) < 0.02


def test_one_device_and_eight_agree_for_any_batch(pipe, single):
    settings = dataclasses.replace(SETTINGS, sampler="ddpm")
    words = ("left", "right", "red", "blue")
    requests = [Request(prompt=f"a circle {words[i % 4]}", seed=i, negative_prompt="") for i in range(8)]
    together = latents_of(pipe, requests, settings)
    for i in (0, 5):
        alone = latents_of(single, requests[i : i + 1], settings)[0]
        assert np.linalg.norm(together[i] - alone) <= 1e-4 * np.linalg.norm(alone)
    assert np.linalg.norm(together[0] - together[4]) > 0.1 * np.linalg.norm(together[0])


def test_split_weights_make_the_same_samples(folder, single):
    two = lavie_jax.load(folder, devices=jax.devices()[:2], fsdp=2)
    leaves = (jax.tree.leaves(pipe.base.unet_params) for pipe in (two, single))
    held = [sum(x.addressable_shards[0].data.nbytes for x in arrays) for arrays in leaves]
    assert held[0] < 0.6 * held[1]  # norms and biases are replicated
    requests = [Request(prompt=f"a circle {word}", seed=3, negative_prompt="") for word in ("left", "right")]
    together = latents_of(two, requests, SETTINGS)
    for request, result in zip(requests, together):
        alone = latents_of(single, [request], SETTINGS)[0]
        assert np.linalg.norm(result - alone) <= 1e-4 * np.linalg.norm(alone)
    frames = (np.concatenate(list(pipe.base.decode(together[0]))) for pipe in (two, single))
    assert np.abs(np.subtract(*(f.astype(int) for f in frames))).max() <= 1


def test_fsdp_that_does_not_divide_the_devices_is_refused(folder):
    with pytest.raises(UserError, match="fsdp=3, tensor=1 does not fit 8 devices"):
        lavie_jax.load(folder / "nowhere", fsdp=3)  # before anything is read


def test_a_sample_equals_a_plain_loop_with_separate_guidance_halves(single):
    """Compares the jitted, sharded, batched loop with a few independent lines."""
    model, sampler = single.base, make_sampler("ddim", 3, Schedule())
    cond, uncond = (jnp.asarray(model.encode_text([text]).hidden) for text in (PROMPT, "a blue square"))
    unet = jax.jit(lambda x, t, text: model.unet.apply({"params": model.unet_params}, x, t, text))

    def denoise(x, t):
        with_prompt, without = unet(x, t, cond), unet(x, t, uncond)
        return without + 4.0 * (with_prompt - without)

    x0 = sample(sampler, denoise, model.noise(3, 0, (4, 4, 6, 4))[None])
    decode = jax.jit(lambda z: model.vae.apply({"params": model.vae_params}, z, method="decode"))
    images = decode(x0 / 0.18215)
    expected = np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255)
    video = single(PROMPT, seed=3, negative_prompt="a blue square")
    assert np.abs(video.astype(float) - expected).max() <= 1


def test_a_call_gives_uint8_videos_in_the_order_of_the_requests(single, pipe):
    videos = pipe([PROMPT, "a blue square", PROMPT], seed=[1, 1, 2])
    assert videos.shape == (3, 4, 16, 24, 3) and videos.dtype == np.uint8
    np.testing.assert_array_equal(videos, pipe([PROMPT, "a blue square", PROMPT], seed=[1, 1, 2]))
    # a batch of 2 leaves one sample, which is padded
    pairs = single([PROMPT, "a blue square", PROMPT], seed=[1, 1, 2], batch_size=2)
    assert np.abs(pairs.astype(int) - videos).max() <= 1
    assert not np.array_equal(videos[0], videos[2]), "another seed must give another video"
    same_noise = single(PROMPT, seed=1, guidance=1.0), single("a blue square", seed=1, guidance=1.0)
    assert not np.array_equal(*same_noise), "the prompt must matter"


def test_guidance_scale_one_ignores_the_negative_prompt(single):
    plain = single(PROMPT, guidance=1.0)
    np.testing.assert_array_equal(plain, single(PROMPT, guidance=1.0, negative_prompt="a blue square"))
    assert not np.array_equal(single(PROMPT), single(PROMPT, negative_prompt="a blue square"))


def test_one_frame_takes_the_image_path_without_temporal_attention(folder):
    weights = load_folder(folder)

    def without_temporal(path, leaf):
        return leaf * 0 if "temporal" in jax.tree_util.keystr(path) else leaf

    still = jax.tree_util.tree_map_with_path(without_temporal, weights.unet.params)
    other = dataclasses.replace(weights, unet=dataclasses.replace(weights.unet, params=still))
    one, two = (Cascade({"base": w}, devices=jax.devices()[:1]) for w in (weights, other))
    image = one(PROMPT, frames=1)
    assert image.shape == (1, 1, 16, 24, 3)
    np.testing.assert_array_equal(image, two(PROMPT, frames=1))
    assert not np.array_equal(one(PROMPT), two(PROMPT)), "a video must go through temporal attention"


def test_decoding_a_few_frames_at_a_time_changes_nothing(single, pipe, monkeypatch):
    latents = np.asarray(single.base.noise(0, 0, (4, 4, 6, 4)))
    (whole,) = single.base.decode(latents)
    spread = np.concatenate(list(pipe.base.decode(latents)))  # a frame a device, and 4 devices repeat the last
    monkeypatch.setattr(stage_model, "VAE_PIXELS", 3 * 16 * 24)  # 3 frames, then one and two copies of it
    pieces = list(single.base.decode(latents))
    assert [len(piece) for piece in pieces] == [3, 1]
    for frames in (np.concatenate(pieces), spread):
        assert np.abs(frames.astype(int) - whole).max() <= 1


def test_latents_that_are_not_finite_are_refused(single):
    with pytest.raises(UserError, match="guidance"):
        list(single.base.decode(np.full((2, 4, 6, 4), np.nan, np.float32)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 18}, "18 is not a multiple of 4"),
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"steps": 1001}, "1001"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"guidance": float("inf")}, "guidance must be finite"),
        ({"seed": -1}, "seed must .* 0 to 4294967295"),
        ({"seed": [1, 2, 3]}, "'prompt': 2, 'seed': 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(single, given, message):
    with pytest.raises(UserError, match=message):
        single([PROMPT, PROMPT], **given)


@pytest.mark.parametrize(
    "clip", [np.zeros((1, 4, 16, 16, 3), np.uint8), np.zeros((4, 16, 16, 3)), np.zeros((0, 16, 16, 3), np.uint8)]
)
def test_a_clip_of_another_type_is_refused(clip):
    with pytest.raises(UserError, match=r"clip must be uint8 of shape \(frames, H, W, 3\)"):
        cascade._check_clip(clip)  # called directly, because in tests the type check of the call would fail first


def test_truncated_and_unknown_words_are_named(single):
    tokenizer = single.base.tokenizer
    assert tokens.text_warnings(tokenizer, [PROMPT]) == []
    long, unknown = tokens.text_warnings(tokenizer, [f"{PROMPT} right left", "a dragon moving left"])
    assert "8 tokens" in long and "'left'" in long
    assert "ignored: dragon." in unknown and "circle" in unknown


def test_settings_of_a_call_are_those_of_the_stages(single):
    with pytest.raises(UserError, match="unknown 'step'; did you mean 'steps'"):
        single(PROMPT, step=3)
    with pytest.raises(UserError, match="steps is given for vsr, which is not among the stages to run: base"):
        single(PROMPT, vsr={"steps": 3})


def test_a_cascade_shows_its_stages(single, folder):
    line, stage = repr(single).splitlines()
    assert line.startswith("Cascade(1 stages, float32, ") and stage.endswith(str(folder))
    assert "base: 4 frames of 16x24 at 8 fps, ddim, 3 steps; " in stage


def test_the_result_of_a_call_can_be_saved(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 24, 3), np.uint8)
    with np.load(lavie_jax.save_video(video, tmp_path / "out.npz", fps=8)) as arrays:
        np.testing.assert_array_equal(arrays["video"], video[0])
    assert lavie_jax.save_video(video[0], str(tmp_path / "out.mp4"), fps=8) == tmp_path / "out.mp4"
    assert (tmp_path / "out.mp4").stat().st_size > 0
    with pytest.raises(UserError, match="unknown ending '.mpeg'"):
        lavie_jax.save_video(video, tmp_path / "out.mpeg", fps=8)


def test_the_package_offers_its_names_lazily():
    assert {"load", "push_to_hub", "save_video", "__version__"} <= set(dir(lavie_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lavie_jax.lode


def test_out_of_memory_is_one_line_with_advice(single, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 20.00GiB.")

    monkeypatch.setattr(running, "denoise", full)
    with pytest.raises(UserError, match="smaller batch size"):
        single(PROMPT)


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(single, monkeypatch):
    ids = np.full((1, 3), 10**6, np.int32)
    monkeypatch.setattr(stage_model.tokens, "tokenize_with_mask", lambda _, texts: (ids, None))
    with pytest.raises(UserError, match="belongs to another model"):
        single.base.encode_text([PROMPT])
