"""From a config (`configs/`) to the task that it describes: models, their first parameters, the loss."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from lavie_jax import weights
from lavie_jax.data import moving_shapes, tokens
from lavie_jax.data.config import DataConfig, check_buckets, latent_paths
from lavie_jax.data.latents import LatentSet, open_set
from lavie_jax.diffusion.samplers import make_sampler
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError, suggest
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.training import diffusion, latents
from lavie_jax.training.autoencoder import AutoencoderLoss, make_autoencoder_task
from lavie_jax.training.diffusion import DiffusionLoss, Models
from lavie_jax.training.step import Task, check_same
from lavie_jax.weights.folder import part_dir
from lavie_jax.weights.inflate import TEMPORAL, inflate
from lavie_jax.weights.safetensors_io import as_tensor

RANDOM = "random"  # vae_from: an untrained VAE, for tiny runs that only show that the code works


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a stage's parameters come from, all in numpy.

    Attributes:
      start: {"unet": ..., "text_encoder": ... if trained} to start from; None = random.
      frozen: {"vae": ..., "text_encoder": ... if not trained}.
      scaling_factor: of the VAE in `frozen`.
      tokenizer: the tokenizer's folder.
    """

    start: Any
    frozen: Mapping[str, Any]
    scaling_factor: float
    tokenizer: Path


def make_task(config: Any, dtype: DTypeLike, scratch: Path) -> tuple[Task, Path | None]:
    """The task of a config, and the folder of its tokenizer (None for a VAE), which may be made in `scratch`.

    Raises:
      UserError: fields that do not go together; folders that are missing or hold another model.
    """
    if config.stage == "vae":
        if latent_paths(data_config(config)):
            raise UserError("a VAE is trained on pixels: data.source='latents' is what a trained one makes of them")
        return (
            make_autoencoder_task(
                VAEConfig.from_dict(_plain(config.vae)),
                AutoencoderLoss(**_plain(config.loss)),
                side=(config.data.height, config.data.width),
                dtype=dtype,
                init_from=config.init_from,
            ),
            None,
        )
    if config.stage not in STAGES:
        raise UserError(f"unknown stage {config.stage!r}{suggest(config.stage, ('vae', *STAGES))}")
    check_stage(config)
    sets = [open_set(path) for path in latent_paths(data_config(config))]  # refused before weights are read
    origin = load_origin(config, scratch)
    if sets:
        _check_latents(sets, config, origin)
    return stage_task(config, dtype, origin), origin.tokenizer


def check_stage(config: Any) -> None:
    """Refuses, before any file is read, fields of a stage's config that do not go together."""
    data, models = data_config(config), make_models(config, jnp.float32, 1.0)
    if data.buckets:
        check_buckets(data)
    if latent_paths(data):
        latents.check_stage(config.stage, train_text_encoder=config.train_text_encoder)
    STAGES[config.stage].check_training_frames(data.frames)
    if data.frames < 0 or data.images < 0 or data.frames + data.images < 1:
        raise UserError(f"data.frames = {data.frames} and data.images = {data.images} leave nothing to train on.")
    if config.regime != "joint" and not data.frames:
        raise UserError(f"regime {config.regime!r} needs videos: data.frames is 0.")
    if config.regime == "video_only" and data.images:
        raise UserError(f"regime 'video_only' takes no images: set data.images=0 (given {data.images}).")
    try:
        settings = STAGES[config.stage].info.settings.make(sampling_defaults(config), {})
        make_sampler(settings.sampler, settings.steps, models.schedule, settings.spacing)
    except UserError as error:
        raise UserError(f"config group 'sampling': {error}") from None
    factor = models.vae.config.factor
    for height, width in data.sizes:
        if height % factor or width % factor:
            raise UserError(f"frames of {height}x{width} are not multiples of the VAE's factor {factor}.")


def _check_latents(sets: Sequence[LatentSet], config: Any, origin: Origin) -> None:
    """UserError unless the models of `origin` made all these sets."""
    models = make_models(config, jnp.float32, origin.scaling_factor)
    vae = weights.Part(models.vae.config, origin.frozen["vae"])
    text_encoder = weights.Part(models.text_encoder.config, origin.frozen["text_encoder"])
    identity = latents.identity(vae, text_encoder, origin.tokenizer)
    for found in sets:
        latents.check_made_by(found, identity)


def stage_task(config: Any, dtype: DTypeLike, origin: Origin) -> Task:
    """The task of a stage whose parameters come from `origin`; they may be ShapeDtypeStructs."""
    data, models = data_config(config), make_models(config, dtype, origin.scaling_factor)
    losses = diffusion.StageLoss(
        stage=STAGES[config.stage],
        models=models,
        loss=DiffusionLoss(**_plain(config.loss)),
        frames=data.frames,
        images=data.images,
        train_text_encoder=config.train_text_encoder,
    )
    return diffusion.make_diffusion_task(
        losses,
        size=(data.height, data.width),
        regime=config.regime,
        start=origin.start,
        frozen=origin.frozen,
        sampling=sampling_defaults(config),
        tokenizer=origin.tokenizer,
    )


def sampling_defaults(config: Any) -> dict[str, Any]:
    """The settings that a model of this config is sampled with when nobody says otherwise: as it was trained."""
    data = data_config(config)
    height, width = data.whole
    as_trained = {"height": height, "width": width, "frames": max(data.frames, 1)}
    if data.fps is not None:  # clips at their own rates say nothing of the rate of samples
        as_trained["fps"] = data.fps
    given = {name: value for name, value in config.sampling.items() if value is not None}
    return {**STAGES[config.stage].sampling, **as_trained, **given}


def data_config(config: Any) -> DataConfig:
    """What the batches of a config hold; dropped captions become its stage's own null caption."""
    stage = STAGES.get(config.stage)  # none is the VAE's, which reads no captions
    return DataConfig(**_plain(config.data), null_caption=stage.null_caption if stage else "")


def held_out_data(data: DataConfig) -> DataConfig:
    """What the held-out loss is measured on: whole captions of clips that training does not see.

    Those of a curriculum are mixed as at its end, in the whole run.
    """
    fields = ("video_weights", "image_weights")
    at_end = {name: tuple((0, row) for _, row in getattr(data, name)[-1:]) for name in fields}
    return dataclasses.replace(data, split="val", caption_drop=0.0, detail_drop=0.0, seed=data.seed + 1, **at_end)


def make_models(config: Any, dtype: DTypeLike, scaling_factor: float) -> Models:
    """The networks of a stage's config."""
    unet = UNetConfig.from_dict(_plain(config.unet))
    text = CLIPTextConfig.from_dict(_plain(config.text_encoder))
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"unet.cross_attention_dim = {unet.cross_attention_dim} must be "
            f"text_encoder.hidden_size = {text.hidden_size}."
        )
    vae = dataclasses.replace(VAEConfig.from_dict(_plain(config.vae)), scaling_factor=scaling_factor)
    if unet.out_channels != vae.latent_channels:
        raise UserError(f"unet.out_channels = {unet.out_channels} must be vae.latent_channels = {vae.latent_channels}.")
    return Models(
        unet=UNet(unet, dtype=dtype, attention_kernel=config.attention_kernel, remat=config.remat),
        text_encoder=CLIPText(text, dtype=dtype),
        vae=VAE(vae, dtype=dtype, attention_kernel=config.attention_kernel),
        schedule=Schedule(**_plain(config.schedule)),
    )


def load_origin(config: Any, scratch: Path) -> Origin:
    """Reads the folders that `init_from`, `vae_from` and `text_from` name; makes the small tokenizer where none is."""
    models = make_models(config, jnp.float32, 1.0)
    found = _load_start(config, models) if config.init_from else None
    text, tokenizer = _load_text(config, models, found)
    vae = _load_vae(config, models, found)
    start, frozen = None if found is None else {"unet": found.unet.params}, {"vae": vae.params}
    if not config.train_text_encoder:
        frozen["text_encoder"] = text
    elif start is not None:
        start["text_encoder"] = text
    if tokenizer is not None:  # every export writes it, whatever becomes of the folder that it came from
        tokenizer = shutil.copytree(tokenizer, scratch / "tokenizer of origin", dirs_exist_ok=True)
    else:
        tokenizer, settings = scratch / "tokenizer", models.text_encoder.config
        tokens.save_small_tokenizer(tokenizer, moving_shapes.vocabulary(), length=settings.max_position_embeddings)
        known = len(tokens.load_tokenizer(tokenizer))
        if known > settings.vocab_size:
            raise UserError(
                f"text_encoder.vocab_size = {settings.vocab_size} is too small: the tokenizer has {known} tokens."
            )
    return Origin(start=start, frozen=frozen, scaling_factor=vae.config.scaling_factor, tokenizer=tokenizer)


def _load_start(config: Any, models: Models) -> weights.Weights:
    """What `init_from` holds; with `inflate`, its UNet made into this stage's (LaVie sections 3.1, 3.3)."""
    where, wanted = config.init_from, models.unet.config
    from_base = config.inflate and config.stage == "interpolation"
    found = weights.load_folder(where, stage="base" if from_base else config.stage, dtype=np.float32)
    unet, params = found.unet.config, found.unet.params
    if from_base:
        check_same(unet.image_config(), wanted.image_config(), where, ignore="in_channels")  # inflating adds some
        spatial = {k: as_tensor(v) for k, v in flatten_dict(params, sep="/").items() if not TEMPORAL.search(k)}
        inflated = inflate(spatial, wanted, seed=config.seed)
        params = unflatten_dict({k: v.read() for k, v in inflated.items()}, sep="/")
    else:
        check_same(unet, wanted, where)
        params = diffusion.image_as_video(params) if config.inflate else params
    if found.schedule != models.schedule:
        logging.warning("%s was trained with %s; now %s", where, found.schedule, models.schedule)
    return dataclasses.replace(found, unet=weights.Part(wanted, params))


def _load_text(config: Any, models: Models, found: weights.Weights | None) -> tuple[Any, Path | None]:
    """(parameters of the text encoder, its tokenizer's folder) of `text_from` or `init_from`; without either, None."""
    if config.text_from:
        if found is not None or config.train_text_encoder:
            raise UserError("text_from is for a text encoder that is not trained, and only without init_from.")
        part, tokenizer = weights.load_part(config.text_from, "text_encoder"), part_dir(config.text_from, "tokenizer")
    elif found is not None:
        part, tokenizer = found.text_encoder, found.tokenizer_dir
    elif config.train_text_encoder:
        return None, None
    else:
        raise UserError("train_text_encoder=False needs init_from or text_from: a folder with a trained text encoder.")
    check_same(part.config, models.text_encoder.config, config.text_from or config.init_from)
    return part.params, tokenizer


def _load_vae(config: Any, models: Models, found: weights.Weights | None) -> weights.Part:
    """The VAE of `vae_from`, or else of `init_from`."""
    if config.vae_from == RANDOM:
        logging.warning("vae_from = 'random': an untrained VAE, for trying out the code only")
        return weights.Part(dataclasses.replace(models.vae.config, scaling_factor=1.0), _random(models.vae))
    if not config.vae_from and found is None:
        raise UserError("a VAE is needed: set vae_from to a weights folder (configs/moving_shapes/vae.py trains one).")
    part = weights.load_part(config.vae_from, "vae") if config.vae_from else found.vae
    check_same(part.config, models.vae.config, config.vae_from or config.init_from, ignore="scaling_factor")
    return part


def _random(vae: VAE) -> dict[str, Any]:
    """Parameters of an untrained VAE, by numpy: compiling `vae.init` would take longer than a tiny run."""
    rng = np.random.default_rng(0)
    images = jnp.zeros((1, vae.config.factor, vae.config.factor, vae.config.in_channels))

    def fill(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=x.shape, scale=np.prod(x.shape[:-1]) ** -0.5).astype(np.float32)
        return np.full(x.shape, name == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(vae.init, jax.random.key(0), images)["params"])


def _plain(group: Any) -> dict[str, Any]:
    """A group of a config as a dict of plain values."""
    return group.to_dict() if hasattr(group, "to_dict") else dict(group)
