"""Training inputs of the stages, initial weights, and learning from video files."""

import contextlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lavie_jax import weights
from lavie_jax.data import moving_shapes, pipeline, video_files
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.errors import UserError
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import ConditionSetup, EncodedClips
from lavie_jax.stages.prediction import draw_masks
from lavie_jax.stages.settings import MAX_NOISE_LEVEL, KnownFrames
from lavie_jax.training import build, checkpoint, diffusion, initial, optimizer, options
from lavie_jax.training.state import abstract_params, make_state
from lavie_jax.training.step import make_update
from lavie_jax.weights.names import ZERO_AT_FIRST
from tests.tiny import make_base, make_stage, random_params

ROOT = Path(__file__).parents[1]
VAE_CONFIG = VAEConfig(latent_channels=2, scaling_factor=0.5, patch_size=2)
GREY = EncodedClips(None, jnp.full((1, 1, 4, 2, 2), 9.0), jnp.full((1, 1, 4, 2, 2), -30.0))
SETUP = ConditionSetup(VAE_CONFIG, GREY, {"known": KnownFrames()})


def clips(*lead: int, logvar: float = -30.0) -> EncodedClips:
    """Returns random frames of 8x4 and a random posterior of 4x2."""
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.uniform(-1, 1, (*lead, 8, 4, 3)), jnp.float32)
    mean = jnp.asarray(rng.normal(size=(*lead, 4, 2, 2)), jnp.float32)
    return EncodedClips(pixels, mean, jnp.full_like(mean, logvar))


# ---- inputs ----


def test_every_fourth_frame_is_a_key_frame_of_its_neighbours():
    clip = clips(2, 9)
    inputs = STAGES["interpolation"].training_inputs(clip, SETUP, jax.random.key(0), jax.random.key(1))
    assert inputs["key_latents"].shape == (2, 3, 4, 2, 2)
    shown = STAGES["interpolation"].condition(inputs).concat
    np.testing.assert_allclose(shown, 0.5 * clip.mean[:, [0, 0, 0, 4, 4, 4, 4, 8, 8]], atol=1e-5)
    blurred = clips(2, 9, logvar=0.0)
    keys = STAGES["interpolation"].training_inputs(blurred, SETUP, jax.random.key(0), jax.random.key(1))
    targets = blurred.sample(jax.random.key(2), VAE_CONFIG)[:, ::4]
    assert float(jnp.abs(keys["key_latents"] - targets).min()) > 0  # the target's own sample is not in the input


def test_samples_without_variance_are_the_mean():
    blurred = clips(2, 9, logvar=0.0)
    zero = blurred.without_variance().sample(jax.random.key(2), VAE_CONFIG)
    np.testing.assert_array_equal(zero, 0.5 * blurred.mean)
    assert not np.array_equal(blurred.sample(jax.random.key(2), VAE_CONFIG), zero)


@pytest.mark.parametrize("frames", [4, 6, 16])
def test_interpolation_trains_on_whole_gaps(frames):
    STAGES["base"].check_training_frames(frames)
    STAGES["interpolation"].check_training_frames(4 * frames + 1)
    with pytest.raises(UserError, match="begin and end with a key frame"):
        STAGES["interpolation"].check_training_frames(frames)


def test_low_resolution_frames_are_means_of_squares_with_a_noise_level_per_row():
    clip = clips(400, 2)
    inputs = STAGES["vsr"].training_inputs(clip, SETUP, jax.random.key(0), jax.random.key(1))
    np.testing.assert_allclose(inputs["low_res"][3, 1, 2, 1], clip.pixels[3, 1, 4:6, 2:4].mean((0, 1)), atol=1e-6)
    level = np.asarray(inputs["noise_level"])
    assert level.shape == (400,) and level.min() < 20 and 330 < level.max() <= MAX_NOISE_LEVEL
    assert 25 < np.median(level) < 65  # low levels, as in sampling
    shown = STAGES["vsr"].condition(inputs)
    signal = np.sqrt(STAGES["vsr"].low_res_schedule.alphas_cumprod[level])[:, None, None, None, None]
    rest = (shown.concat - signal * inputs["low_res"]) / np.sqrt(1 - signal**2)
    np.testing.assert_allclose([rest.mean(), rest.std()], [0, 1], atol=0.03)


def test_masks_are_drawn_by_the_weights_of_their_modes():
    """In clips of 8 frames; the mask is 0 at known frames."""

    def known(**weights):
        none = dict.fromkeys(("first", "first_and_last", "share", "uniform", "none"), 0)
        return 1 - np.asarray(draw_masks(jax.random.key(0), 300, 8, KnownFrames(**{**none, **weights})))

    first, both, share, uniform = (known(**{m: 2.0}) for m in ("first", "first_and_last", "share", "uniform"))
    assert (np.diff(first) <= 0).all() and set(first.sum(1)) == {1, 2, 3, 4}
    assert (first.sum(1) == 1).mean() == pytest.approx(0.5, abs=0.1)  # few known frames are the most frequent
    assert (both == both[:, ::-1]).all() and both[:, 0].all() and set(both.sum(1)) == {2, 4}
    assert set(share.sum(1)) == {1, 2, 3, 4} and (share.mean(0) > 0.1).all()
    assert set(uniform.sum(1)) == set(range(9))
    assert not known(none=1.0).any()
    mixed = known(first=1.0, none=3.0)
    assert mixed.any(1).mean() == pytest.approx(0.25, abs=0.08)
    with pytest.raises(UserError, match="all weights are 0"):
        known()


def test_unknown_frames_are_grey_and_noise_is_on_the_latents_only():
    clip = clips(40, 5)
    inputs = STAGES["prediction"].training_inputs(clip, SETUP, jax.random.key(0), jax.random.key(1))
    mask = np.asarray(inputs["mask"])
    assert mask.shape == (40, 5) and 0 < mask.mean() < 1
    shown = np.where(mask[..., None, None, None] == 1, 0.5 * 9.0, 0.5 * clip.mean)
    np.testing.assert_allclose(inputs["masked_latents"], shown, atol=1e-5)
    pair = STAGES["prediction"].training_pair(0.5 * clip.mean, inputs, jax.random.key(2))
    np.testing.assert_array_equal(pair.condition.concat[..., 0], np.broadcast_to(mask[..., None, None], (40, 5, 4, 2)))
    np.testing.assert_array_equal(pair.condition.concat[..., 1:], inputs["masked_latents"])
    assert pair.x_t.shape == pair.target.shape == (40, 5, 4, 2, 2)
    blurred = clips(40, 5, logvar=0.0)
    other = STAGES["prediction"].training_inputs(blurred, SETUP, jax.random.key(0), jax.random.key(1))
    np.testing.assert_array_equal(other["mask"], mask)
    errors = (other["masked_latents"] - shown)[mask == 0]
    assert float(errors.std()) == pytest.approx(0.5, rel=0.2)  # a sample of each known frame's own posterior


@pytest.mark.parametrize("stage", ["prediction", "interpolation", "vsr"])
def test_images_beside_a_clip_have_their_own_conditions(stage):
    """Each image is a clip of one frame, and a row has one noise level."""
    video, images = clips(2, 5), clips(2, 3, 1)
    rng, level_rng = jax.random.key(0), jax.random.key(1)
    make = STAGES[stage].training_inputs
    latents = jnp.concatenate([video.mean, images.mean[:, :, 0]], axis=1)
    image_inputs = make(images, SETUP, rng, level_rng)
    pair = STAGES[stage].training_pair(
        latents, make(video, SETUP, rng, level_rng), rng, images=3, image_inputs=image_inputs
    )
    assert pair.condition.concat.shape[:2] == (2, 8)
    images_alone = STAGES[stage].training_pair(latents[:, 5:], None, rng, images=3, image_inputs=image_inputs)
    np.testing.assert_array_equal(images_alone.condition.concat, pair.condition.concat[:, 5:])
    if stage == "interpolation":
        np.testing.assert_allclose(pair.condition.concat[:, 5:], 0.5 * images.mean[:, :, 0], atol=1e-5)
    elif stage == "prediction":  # nothing of an image is known
        assert (pair.condition.concat[:, 5:, ..., 0] == 1).all()
        np.testing.assert_allclose(pair.condition.concat[:, 5:, ..., 1:], 4.5, atol=1e-5)
    else:
        assert pair.condition.noise_level.shape == (2,)
        np.testing.assert_array_equal(images_alone.condition.noise_level, pair.condition.noise_level)


def test_large_batches_are_encoded_a_few_frames_at_a_time(monkeypatch):
    config = VAEConfig(block_out_channels=(8,), norm_num_groups=4, patch_size=4)
    vae, frames = VAE(config), jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 5, 8, 8, 3)), jnp.float32)
    params = random_params(config)
    whole = jax.jit(lambda x: diffusion.encode_frames(vae, params, x))(frames)
    monkeypatch.setattr(diffusion, "VAE_PIXELS", 2 * 2 * 8 * 8 // jax.device_count())  # two frames of both rows
    assert "scan" in str(jax.make_jaxpr(lambda x: diffusion.encode_frames(vae, params, x))(frames))
    parts = jax.jit(lambda x: diffusion.encode_frames(vae, params, x))(frames)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


# ---- initial weights ----


def small_config(stage: str, base: Path | None = None):
    """Returns the stage's tiny config with the network of `tests/tiny.py`, or one as small."""
    config = options.load(str(ROOT / f"configs/moving_shapes/{stage}.py:tiny"))
    with config.unlocked():
        config.unet.attention_levels = (False,)
        config.unet.norm_num_groups = 8
        config.data.frames = {"base": 3, "prediction": 3, "interpolation": 5, "vsr": 3}[stage]
    if base is not None:
        loaded = weights.load_folder(base)
        config.init_from, config.vae_from, config.train_text_encoder = str(base), "", False
        config.vae.update({k: v for k, v in loaded.vae.config.to_dict().items() if k in config.vae})
        config.text_encoder.update(
            {k: v for k, v in loaded.text_encoder.config.to_dict().items() if k in config.text_encoder}
        )
        config.unet.cross_attention_dim = loaded.unet.config.cross_attention_dim
        if stage == "interpolation":
            config.unet.caption_modulation = loaded.unet.config.caption_modulation
    return config


def same_tokenizer(folder, base):
    """Returns whether the tokenizer is a copy, so that exports do not need the original folder."""
    files = [sorted((p.name, p.read_bytes()) for p in where.iterdir()) for where in (folder, base / "tokenizer")]
    return folder != base / "tokenizer" and files[0] == files[1]


def test_interpolation_takes_the_spatial_weights_of_a_base(tmp_path):
    base = make_base(tmp_path / "base")
    before = weights.load_folder(base).unet.params
    task, tokenizer = build.make_task(small_config("interpolation", base), jnp.float32, tmp_path)
    after = task.start["unet"]
    np.testing.assert_array_equal(after["conv_in"]["kernel"][:, :, :4], before["conv_in"]["kernel"])
    assert not after["conv_in"]["kernel"][:, :, 4:].any()  # the key frames' channels
    block, old = (tree["mid_block"]["attentions_0"]["transformer_blocks_0"] for tree in (after, before))
    np.testing.assert_array_equal(block["attn1"]["to_q"]["kernel"], old["attn1"]["to_q"]["kernel"])
    assert not np.array_equal(block["attn_temporal"]["to_q"]["kernel"], old["attn_temporal"]["to_q"]["kernel"])
    assert not block["attn_temporal"]["to_out_0"]["kernel"].any()
    assert set(task.frozen) == {"vae", "text_encoder"} and same_tokenizer(tokenizer, base)


def test_prediction_takes_all_weights_of_a_base(tmp_path):
    base = make_base(tmp_path / "base")
    loaded, config = weights.load_folder(base), small_config("prediction", base)
    config.unet.motion_embedding, config.unet.caption_modulation = False, False
    task, _ = build.make_task(config, jnp.float32, tmp_path)
    after, before = (flatten_dict(tree, sep="/") for tree in (task.start["unet"], loaded.unet.params))
    kernel = after.pop("conv_in/kernel")
    np.testing.assert_array_equal(kernel[:, :, :4], before.pop("conv_in/kernel"))
    assert kernel.shape[2] == 9 and not kernel[:, :, 4:].any()
    assert all(np.array_equal(after[path], value) for path, value in before.items())
    new = {path for path in after if path not in before}
    assert {path.split("/")[0] for path in new} == {
        "known_frame_embedding_temporal", "known_frame_skip_temporal", "velocity_temporal"
    }  # fmt: skip
    assert not any(after[path].any() for path in new if not path.startswith("velocity_temporal/text/"))


def test_super_resolution_takes_the_text_encoder_of_a_base(tmp_path):
    base = make_base(tmp_path / "base")
    config = small_config("vsr", base)
    config.init_from, config.text_from, config.vae_from = "", str(base), str(base)
    task, tokenizer = build.make_task(config, jnp.float32, tmp_path)
    assert task.start is None and set(task.frozen) == {"vae", "text_encoder"} and same_tokenizer(tokenizer, base)
    for change, message in (({"text_from": ""}, "needs init_from or text_from"),
                            ({"train_text_encoder": True}, "text_from is for"),
                            ({"text_from": "nowhere"}, "nowhere does not exist")):  # fmt: skip
        wrong = config.copy_and_resolve_references()
        wrong.update(change)
        with pytest.raises(UserError, match=message):
            build.make_task(wrong, jnp.float32, tmp_path)


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(tmp_path):
    """Otherwise such captions give NaN, and their steps are skipped."""
    base = make_base(tmp_path / "base")
    config = small_config("interpolation", base)
    (base / "tokenizer/added_tokens.json").write_text(f'{{"<new>": {config.text_encoder.vocab_size}}}')
    with pytest.raises(UserError, match=f"tokens, but the text encoder of .* has {config.text_encoder.vocab_size}"):
        build.make_task(config, jnp.float32, tmp_path)


def test_a_copied_tokenizer_has_no_other_files(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "tokenizer/.git").mkdir()
    (base / "tokenizer/.git/config").write_text("x")
    (base / "tokenizer/model.bin").write_text("x")
    config = small_config("vsr", base)
    config.init_from, config.text_from, config.vae_from = "", str(base), str(base)
    tokenizer = initial.load(config, build.make_models(config, jnp.float32, 1.0), tmp_path).tokenizer
    assert {p.name for p in tokenizer.iterdir()} == {"vocab.json", "merges.txt", "tokenizer_config.json"}


def test_super_resolution_starts_from_its_own_noise_schedule_only(tmp_path):
    folder = make_stage(tmp_path / "vsr", "vsr")
    config = small_config("vsr", folder)
    config.unet.update({k: v for k, v in weights.load_folder(folder).unet.config.to_dict().items() if k in config.unet})
    initial._load_start(config, build.make_models(config, jnp.float32, 1.0))
    file = folder / "low_res_scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace("0.02", "0.015"))
    with pytest.raises(UserError, match="low_res_schedule .*beta_end=0.015.* but the stage vsr is trained"):
        initial._load_start(config, build.make_models(config, jnp.float32, 1.0))


def test_a_resumed_run_reads_only_frozen_models_and_its_first_folder_may_be_gone(tmp_path):
    """The UNet, which is trained as a whole, is in the checkpoint; the rest is in the weights that the run exported."""
    base, exported = make_base(tmp_path / "base"), tmp_path / "run" / "weights"
    config, scratch = small_config("interpolation", base), [tmp_path / name for name in ("new", "again")]
    for folder in scratch:
        folder.mkdir()
    new, _ = build.make_task(config, jnp.float32, scratch[0])
    shutil.copytree(base, exported)
    for file in (base / "unet", exported / "unet"):
        shutil.rmtree(file)  # nobody reads them
    for gone in (False, True):
        if gone:
            shutil.rmtree(base)
        again, tokenizer = build.make_task(config, jnp.float32, scratch[1], resumed=exported)
        assert abstract_params(again) == abstract_params(new)
        assert checkpoint.identity({}, again) == checkpoint.identity({}, new)
        assert same_tokenizer(tokenizer, exported)
    config.regime, config.data.images = "temporal_only", 0
    with pytest.raises(UserError, match="base does not exist"):  # spatial parameters are not in the checkpoint
        build.make_task(config, jnp.float32, scratch[1], resumed=exported)


@pytest.mark.parametrize("stage", ["base", "prediction", "interpolation", "vsr"])
def test_dropped_captions_become_the_null_caption_of_the_stage(stage):
    config = options.load(str(ROOT / f"configs/{stage}.py"))
    assert "null_caption" not in config.data
    assert build.data_config(config).null_caption == STAGES[stage].null_caption


# ---- learning ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes eight encoded videos with captions: shapes over a texture, unlike Moving Shapes."""
    path = tmp_path_factory.mktemp("videos")
    texture = np.random.default_rng(0).integers(0, 60, (48, 64, 3), dtype=np.uint8)
    for i in range(8):
        sample = moving_shapes.clip("train", i, frames=12, fps=16, height=48, width=64)
        video_files.save_video(np.minimum(sample.pixels, 195) + texture, path / f"{i}.mp4", fps=16)
        (path / f"{i}.txt").write_text(sample.caption)
    return path


STEPS = 40


def started(task) -> dict:
    """Returns initial parameters from numpy: compiling the initialisation takes longer than the training."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("scale", "bias")):
            return np.full(x.shape, name.endswith("scale"), np.float32)
        zero = "conv_out" in name or ZERO_AT_FIRST.search(name)
        scale = 0 if zero else np.prod(x.shape[:-1]) ** -0.5
        return (scale * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(task))


@pytest.mark.heavy  # test_curation.py trains on video files, test_crash.py a VAE, test_configs.py a base stage
@pytest.mark.parametrize("stage", ["vsr", "base", "prediction", "interpolation"])
def test_each_stage_learns_from_video_files(stage, folder, tmp_path, monkeypatch):
    """The loss on held-out clips falls."""
    monkeypatch.chdir(ROOT)
    config = small_config(stage)
    config.data.source, config.data.path, config.data.fps = "video_folder", str(folder), 16.0
    if stage == "interpolation":
        config.data.slowest_fps = 0.0  # the files have one frame rate
    config.data.images, config.batch = 1 if stage == "base" else 0, 4
    config.vae_from, config.vae = str(ROOT / "lavie_jax/assets/base"), options.load("configs/moving_shapes/vae.py").vae
    config.loss.held_out_timesteps = (300, 700)
    task, tokenizer = build.make_task(config, jnp.float32, tmp_path)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=2e-3, warmup=0), STEPS)
    state, frozen = make_state(started(task), task, tx), task.frozen
    update, held_out = jax.jit(make_update(task, tx, ema_decay=0.9)), jax.jit(task.held_out)
    data, ids = build.data_config(config), load_tokenizer(tokenizer)
    with contextlib.closing(
        pipeline.batches(pipeline.open_examples(build.held_out_data(data), batch_size=4), ids)
    ) as rows:
        unseen = next(rows)
    before = held_out(state["params"], frozen, unseen, jax.random.key(0))["video_loss"]
    with contextlib.closing(pipeline.batches(pipeline.open_examples(data, batch_size=4), ids)) as rows:
        for _, batch in zip(range(STEPS), rows):
            state, losses = update(state, frozen, batch, jax.random.key(0))
    after = held_out(state["params"], frozen, unseen, jax.random.key(0))["video_loss"]
    assert np.isfinite(losses["loss"]) and after < 0.8 * before, (before, after)
