"""Builds the task that a config (`configs/`) describes: models, initial parameters, loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from jax.typing import DTypeLike

from lavie_jax import weights
from lavie_jax.data.config import DataConfig, check_buckets, latent_paths
from lavie_jax.data.latents import LatentSet, open_set
from lavie_jax.diffusion import chain_warning, make_sampler
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError, suggest
from lavie_jax.models import registry
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.stage import check_cache_depth, guidance_of
from lavie_jax.training import diffusion, initial, latents, lora, optimizer, perceptual
from lavie_jax.training.autoencoder import AutoencoderLoss, make_autoencoder_task
from lavie_jax.training.config import text_network
from lavie_jax.training.diffusion import DiffusionLoss, Models
from lavie_jax.training.distillation import SAMPLING as STUDENT_SAMPLING
from lavie_jax.training.distillation import DistillConfig, student_presets
from lavie_jax.training.step import Task


def make_task(config: Any, dtype: DTypeLike, scratch: Path, resumed: Path | None = None) -> tuple[Task, Path | None]:
    """Makes the task of a config.

    Args:
        config: the ConfigDict of a run.
        dtype: dtype of the computation.
        scratch: an existing folder for the tokenizer.
        resumed: the weights folder that a run with a checkpoint has exported. Parameters that the checkpoint has are
            not read again, and frozen models are read from there if `init_from` is gone. None = a new run.

    Returns:
        The task, and its tokenizer's folder (None for a VAE).

    Raises:
        UserError: fields that contradict each other; folders that are missing or contain another model.
    """
    if config.stage == "vae":
        if latent_paths(data_config(config)):
            raise UserError("a VAE is trained on pixels: set data.source to a source of videos, not 'latents'")
        return (
            make_autoencoder_task(
                VAEConfig.from_dict(_plain(config.vae)),
                AutoencoderLoss(**_plain(config.loss)),
                side=(config.data.height, config.data.width),
                dtype=dtype,
                init_from="" if resumed else config.init_from,
            ),
            None,
        )
    if config.stage not in STAGES:
        raise UserError(f"unknown stage {config.stage!r}{suggest(config.stage, ('vae', *STAGES))}")
    check_stage(config)
    sets = [open_set(path) for path in latent_paths(data_config(config))]  # refused before weights are read
    init = initial.load(config, make_models(config, jnp.float32, 1.0), scratch, resumed)
    if sets:
        _check_latents(sets, config, init)
    return stage_task(config, dtype, init), init.tokenizer


def check_stage(config: Any) -> None:
    """Refuses fields of a stage's config that contradict each other, before any file is read."""
    data, models = data_config(config), make_models(config, jnp.float32, 1.0)
    if data.buckets:
        check_buckets(data)
    if latent_paths(data):
        latents.check_stage(config.stage, train_text_encoder=config.train_text_encoder)
        latents.check_text(models.text_encoder)
    STAGES[config.stage].check_training_frames(data.frames)
    if data.frames < 0 or data.images < 0 or data.frames + data.images < 1:
        raise UserError(
            f"data.frames = {data.frames} and data.images = {data.images}: one of them must be positive, none negative."
        )
    lora.of_config(config)  # raises for settings that are out of range
    loss, steps = DiffusionLoss(**_plain(config.loss)), models.schedule.steps
    if not all(0 <= t < steps for t in loss.held_out_timesteps):
        raise UserError(f"loss.held_out_timesteps {loss.held_out_timesteps} must be from 0 to {steps - 1}.")
    if loss.perceptual:
        perceptual.check(models.vae.config, models.schedule, data)
    distill_config(config).check(config, latents=bool(latent_paths(data)))
    if config.regime not in ("joint", optimizer.ADAPTER) and not data.frames:
        raise UserError(f"regime {config.regime!r} needs videos: data.frames is 0.")
    if config.regime == "video_only" and data.images:
        raise UserError(f"regime 'video_only' takes no images: set data.images=0 (given {data.images}).")
    try:
        settings = STAGES[config.stage].info.settings.make(sampling_defaults(config), {})
        sampler = make_sampler(settings.sampler, settings.steps, models.schedule, settings.spacing)
        guidance_of(settings).plan(sampler.timesteps)
        check_cache_depth(settings, models.unet.config)
    except UserError as error:
        raise UserError(f"config group 'sampling': {error}") from None
    chosen = any(config.sampling.get(name) is not None for name in ("sampler", "steps", "spacing"))
    if chosen and (warning := chain_warning(sampler)):
        logging.warning("config group 'sampling': %s", warning)
    factor = models.vae.config.factor
    for height, width in data.sizes:
        if height % factor or width % factor:
            raise UserError(f"frames of {height}x{width} are not multiples of the VAE's factor {factor}.")


def _check_latents(sets: Sequence[LatentSet], config: Any, init: initial.InitialWeights) -> None:
    """Refuses sets of latents that were not encoded by the models of `init`."""
    models = make_models(config, jnp.float32, init.scaling_factor)
    vae = weights.Part(models.vae.config, init.frozen["vae"])
    text_encoder = weights.Part(models.text_encoder.config, init.frozen["text_encoder"])
    identity = latents.identity(vae, text_encoder, init.tokenizer)
    for one in sets:
        latents.check_made_by(one, identity)


def stage_task(config: Any, dtype: DTypeLike, init: initial.InitialWeights) -> Task:
    """Makes the task of a stage; the parameters in `init` may be ShapeDtypeStructs."""
    data, models = data_config(config), make_models(config, dtype, init.scaling_factor)
    settings, teacher = distill_config(config), {**STAGES[config.stage].sampling, **init.teacher_sampling}
    losses = diffusion.StageLoss(
        stage=STAGES[config.stage],
        models=models,
        loss=DiffusionLoss(**_plain(config.loss)),
        frames=data.frames,
        images=data.images,
        train_text_encoder=config.train_text_encoder,
        options={group: cls(**_plain(config[group])) for group, cls in STAGES[config.stage].info.training.items()},
        adapter=lora.of_config(config),
        distillation=settings.distillation(teacher, models.schedule, models.text_encoder.config, init.tokenizer),
    )
    return diffusion.make_diffusion_task(
        losses,
        regime=config.regime,
        start=init.start,
        frozen=init.frozen,
        sampling=sampling_defaults(config, init.teacher_sampling),
        presets=student_presets(config.distill.kind, init.teacher_presets),
        tokenizer=init.tokenizer,
    )


def distill_config(config: Any) -> DistillConfig:
    """Returns the settings of distillation of a config."""
    return DistillConfig(**_plain(config.distill))


def sampling_defaults(config: Any, teacher: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the default sampling settings of a model of this config: size and rate as in training.

    Those of a distilled model are its teacher's, in fewer evaluations.
    """
    data = data_config(config)
    height, width = data.whole
    as_trained = {"height": height, "width": width, "frames": max(data.frames, 1)}
    if data.fps is not None:  # None: clips keep their own rates, and the stage's default applies to samples
        as_trained["fps"] = data.fps
    given = {name: value for name, value in config.sampling.items() if value is not None}
    distilled = STUDENT_SAMPLING.get(config.distill.kind, {})
    return {**STAGES[config.stage].sampling, **as_trained, **(teacher or {}), **distilled, **given}


def data_config(config: Any) -> DataConfig:
    """Returns the data settings of a config; dropped captions become the null caption of its stage."""
    stage = STAGES.get(config.stage)  # None for the VAE, which does not read captions
    return DataConfig(**_plain(config.data), null_caption=stage.null_caption if stage else "")


def held_out_data(data: DataConfig) -> DataConfig:
    """Returns the settings of the held-out data: full captions of clips that training does not see.

    Under a curriculum, held-out clips are mixed as at its end, throughout the run.
    """
    fields = ("video_weights", "image_weights")
    at_end = {name: tuple((0, row) for _, row in getattr(data, name)[-1:]) for name in fields}
    return dataclasses.replace(data, split="val", caption_drop=0.0, detail_drop=0.0, seed=data.seed + 1, **at_end)


def make_models(config: Any, dtype: DTypeLike, scaling_factor: float) -> Models:
    """Makes the networks of a stage's config. Refuses configs of networks that do not fit each other."""
    unet = UNetConfig.from_dict(_plain(config.unet))
    text = registry.NETWORKS[text_network(config)].config.from_dict(_plain(config.text_encoder))
    if unet.text_width != text.width:
        name = "cross_attention_dim" if unet.encoder_hid_dim is None else "encoder_hid_dim"
        raise UserError(
            f"unet.{name} = {unet.text_width} must be the text encoder's width {text.width}. unet.encoder_hid_dim = "
            f"{text.width} adds a layer that maps it to cross_attention_dim."
        )
    vae = dataclasses.replace(VAEConfig.from_dict(_plain(config.vae)), scaling_factor=scaling_factor)
    if unet.out_channels != vae.latent_channels:
        raise UserError(f"unet.out_channels = {unet.out_channels} must be vae.latent_channels = {vae.latent_channels}.")
    return Models(
        unet=registry.module(unet, dtype, attention_kernel=config.attention_kernel, remat=config.remat),
        text_encoder=registry.module(text, dtype),
        vae=registry.module(vae, dtype, attention_kernel=config.attention_kernel),
        schedule=Schedule(**_plain(config.schedule)),
    )


def _plain(group: Any) -> dict[str, Any]:
    """Returns a group of a config as a dict of plain values."""
    return group.to_dict() if hasattr(group, "to_dict") else dict(group)
