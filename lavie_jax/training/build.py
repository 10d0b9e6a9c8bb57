"""Builds the task that a config (`configs/`) describes: models, initial parameters, loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from lavie_jax import weights
from lavie_jax.data import moving_pairs, moving_shapes, tokens
from lavie_jax.data.config import DataConfig, check_buckets, latent_paths
from lavie_jax.data.latents import LatentSet, open_set
from lavie_jax.diffusion import chain_warning, make_sampler
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError, suggest, user_path
from lavie_jax.models import registry
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.stage import check_cache_depth, guidance_of
from lavie_jax.training import diffusion, latents, lora, optimizer, perceptual
from lavie_jax.training.autoencoder import AutoencoderLoss, make_autoencoder_task
from lavie_jax.training.config import init_folder, text_network
from lavie_jax.training.diffusion import DiffusionLoss, Models
from lavie_jax.training.distillation import NONE, TEACHER, DistillConfig
from lavie_jax.training.distillation import SAMPLING as STUDENT_SAMPLING
from lavie_jax.training.step import Task, check_same
from lavie_jax.weights.folder import part_dir, read_config
from lavie_jax.weights.inflate import copied, copies_temporal, inflate
from lavie_jax.weights.safetensors_io import as_tensor
from lavie_jax.weights.tokenizer_files import check_tokenizer, copy_tokenizer

# vae_from: an untrained VAE, for tiny runs that only test the code; text_from: an untrained text encoder
RANDOM = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The parameters that a stage's training starts from, in numpy.

    Attributes:
        start: {"unet": ..., "text_encoder": ... if trained}; None = random.
        frozen: {"vae": ..., "text_encoder": ... if not trained}, and what the loss needs: see `diffusion.StageLoss`.
        scaling_factor: of the VAE in `frozen`.
        tokenizer: the tokenizer's folder.
        teacher_sampling: sampling settings of the teacher in `frozen`, if there is one.
    """

    start: Any
    frozen: Mapping[str, Any]
    scaling_factor: float
    tokenizer: Path
    teacher_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    init = load_init(config, scratch, resumed)
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
    lora_config(config)  # raises for settings that are out of range
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


def _check_latents(sets: Sequence[LatentSet], config: Any, init: InitialWeights) -> None:
    """Refuses sets of latents that were not encoded by the models of `init`."""
    models = make_models(config, jnp.float32, init.scaling_factor)
    vae = weights.Part(models.vae.config, init.frozen["vae"])
    text_encoder = weights.Part(models.text_encoder.config, init.frozen["text_encoder"])
    identity = latents.identity(vae, text_encoder, init.tokenizer)
    for one in sets:
        latents.check_made_by(one, identity)


def stage_task(config: Any, dtype: DTypeLike, init: InitialWeights) -> Task:
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
        adapter=lora_config(config),
        distillation=settings.distillation(teacher, models.schedule, models.text_encoder.config, init.tokenizer),
    )
    return diffusion.make_diffusion_task(
        losses,
        regime=config.regime,
        start=init.start,
        frozen=init.frozen,
        sampling=sampling_defaults(config, init.teacher_sampling),
        tokenizer=init.tokenizer,
    )


def lora_config(config: Any) -> lora.LoraConfig | None:
    """Returns the settings of the adapter that a config trains, or None."""
    return lora.LoraConfig(**_plain(config.lora)) if config.regime == optimizer.ADAPTER else None


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


def load_init(config: Any, scratch: Path, resumed: Path | None = None) -> InitialWeights:
    """Reads the folders of `init_from`, `vae_from` and `text_from`, and builds a small tokenizer if none has one.

    With `resumed`, see `make_task`, a UNet that is trained as a whole is not read: `start` has its shapes.
    """
    models = make_models(config, jnp.float32, 1.0)
    where = config.text_from or (config.init_from if resumed is None else "")
    if where and where != RANDOM:
        _check_tokenizer(where, models.text_encoder.config)
    start_weights = None
    if config.init_from and resumed is not None and _trains_all(config, models):
        start_weights = _load_frozen(config, models, resumed)
    elif config.init_from:
        start_weights = _load_start(config, models)
    text, tokenizer = _load_text(config, models, start_weights)
    vae = _load_vae(config, models, start_weights)
    start, frozen = None if start_weights is None else {"unet": start_weights.unet.params}, {"vae": vae.params}
    teacher_sampling = {}
    if config.distill.kind != NONE:
        teacher = weights.load_part(config.init_from, "unet", dtype=np.float32)  # again, also when a run resumes
        check_same(teacher.config, models.unet.config, config.init_from)
        frozen[TEACHER] = teacher.params
        teacher_sampling = read_config(user_path(config.init_from), config.stage)["sampling"]
    if config.loss.perceptual:
        frozen[perceptual.FROZEN] = perceptual.load()
    if not config.train_text_encoder:
        frozen["text_encoder"] = text
    elif start is not None:
        start["text_encoder"] = text
    if start is not None and (settings := lora_config(config)):
        start[optimizer.ADAPTER] = lora.start(start["unet"], settings, config.seed)
    if tokenizer is not None:  # a copy, because exports need it even if the original folder is gone by then
        tokenizer = copy_tokenizer(tokenizer, scratch / "initial tokenizer")
    else:
        tokenizer, settings = scratch / "tokenizer", models.text_encoder.config
        save = tokens.save_small_t5_tokenizer if models.text_encoder.takes_mask else tokens.save_small_tokenizer
        world = moving_pairs if config.data.objects == 2 else moving_shapes
        save(tokenizer, world.vocabulary(), length=settings.length)
        size = len(tokens.load_tokenizer(tokenizer))
        if size > settings.vocab_size:
            raise UserError(
                f"text_encoder.vocab_size = {settings.vocab_size} is too small: the tokenizer has {size} tokens."
            )
    return InitialWeights(
        start=start, frozen=frozen, scaling_factor=vae.config.scaling_factor, tokenizer=tokenizer,
        teacher_sampling=teacher_sampling,
    )  # fmt: skip


def _check_tokenizer(where: str, text: registry.TextConfig) -> None:
    """Refuses a folder whose tokenizer returns tokens that its text encoder does not have, before weights are read."""
    folder = part_dir(where, "tokenizer")
    if folder.is_dir():
        check_tokenizer(folder, text, owner=where)


def _load_start(config: Any, models: Models) -> weights.Weights:
    """Loads `init_from`; with `inflate`, converts its UNet to this stage's (LaVie sections 3.1, 3.3)."""
    where, wanted = config.init_from, models.unet.config
    stage = STAGES[config.stage]
    inflates = stage.inflates if config.inflate else None
    loaded = weights.load_folder(where, stage=inflates or config.stage, dtype=np.float32)
    if stage.low_res_schedule and loaded.low_res_schedule and loaded.low_res_schedule != stage.low_res_schedule:
        raise UserError(
            f"{where} has the low_res_schedule {loaded.low_res_schedule}, but the stage {config.stage} is trained with "
            f"{stage.low_res_schedule}: start from a folder that has this one."
        )
    unet, params = loaded.unet.config, loaded.unet.params
    if inflates:
        same = (unet, wanted) if copies_temporal(stage) else (unet.image_config(), wanted.image_config())
        check_same(*same, where, ignore=("in_channels", "known_frames_around"))  # inflation adds them
        tensors = {path: as_tensor(value) for path, value in flatten_dict(params, sep="/").items()}
        inflated = inflate(copied(stage, tensors), wanted, seed=config.seed)
        params = unflatten_dict({k: v.read() for k, v in inflated.items()}, sep="/")
    else:
        check_same(unet, wanted, where)
        params = diffusion.image_as_video(params) if config.inflate else params
    if loaded.schedule != models.schedule:
        logging.warning("%s was trained with %s, this run uses %s", where, loaded.schedule, models.schedule)
    return dataclasses.replace(loaded, unet=weights.Part(wanted, params))


def _trains_all(config: Any, models: Models) -> bool:
    """Returns whether the run trains every parameter of the UNet."""
    if config.regime == optimizer.ADAPTER:
        return False
    params = {"unet": registry.abstract_params(models.unet.config)}
    return not optimizer.split(params, regime=config.regime, images_only=data_config(config).frames == 0)[1]


def _load_frozen(config: Any, models: Models, resumed: Path) -> "_Start":
    """Loads from `init_from` what a resumed run needs beside its checkpoint."""
    folder = init_folder(config.init_from, resumed)
    if folder != Path(config.init_from):
        logging.warning("init_from = %s does not exist: frozen models are read from %s", config.init_from, folder)
    return _Start(
        weights.Part(models.unet.config, registry.abstract_params(models.unet.config)),
        weights.load_part(folder, "text_encoder", dtype=np.float32),
        part_dir(folder, "tokenizer"),
        weights.load_part(folder, "vae", dtype=np.float32) if not config.vae_from else None,
    )


class _Start(NamedTuple):
    """The parts of `weights.Weights` that training starts from."""

    unet: weights.Part
    text_encoder: weights.Part
    tokenizer_dir: Path
    vae: weights.Part | None


def _load_text(config: Any, models: Models, start: weights.Weights | _Start | None) -> tuple[Any, Path | None]:
    """Loads the text encoder of `text_from` or `init_from`.

    Returns:
        Its parameters and its tokenizer's folder; None for those of one that is trained from scratch.
    """
    if config.text_from == RANDOM:
        if not config.train_text_encoder:
            raise UserError("text_from = 'random' is an untrained text encoder: set train_text_encoder=True.")
        if start is None:
            return None, None
        params = registry.init_params(models.text_encoder.config, jax.random.key(config.seed))
        return jax.tree.map(np.asarray, params), None
    if config.text_from:
        if start is not None or config.train_text_encoder:
            raise UserError("text_from is for a frozen text encoder, without init_from: remove one of the settings.")
        part, tokenizer = weights.load_part(config.text_from, "text_encoder"), part_dir(config.text_from, "tokenizer")
    elif start is not None:
        part, tokenizer = start.text_encoder, start.tokenizer_dir
    elif config.train_text_encoder:
        return None, None
    else:
        raise UserError("train_text_encoder=False needs init_from or text_from: a folder with a trained text encoder.")
    check_same(part.config, models.text_encoder.config, config.text_from or config.init_from)
    return part.params, tokenizer


def _load_vae(config: Any, models: Models, start: weights.Weights | _Start | None) -> weights.Part:
    """Loads the VAE of `vae_from`, or else of `init_from`."""
    if config.vae_from == RANDOM:
        logging.warning("vae_from = 'random': the VAE is untrained, which is only useful for testing the code")
        return weights.Part(dataclasses.replace(models.vae.config, scaling_factor=1.0), _random(models.vae.config))
    if not config.vae_from and not models.vae.config.block_out_channels:
        return weights.Part(dataclasses.replace(models.vae.config, scaling_factor=1.0), {})
    if not config.vae_from and start is None:
        raise UserError("a VAE is needed: set vae_from to a weights folder (configs/moving_shapes/vae.py trains one).")
    part = weights.load_part(config.vae_from, "vae") if config.vae_from else start.vae
    check_same(part.config, models.vae.config, config.vae_from or config.init_from, ignore=("scaling_factor",))
    return part


def _random(config: VAEConfig) -> dict[str, Any]:
    """Returns parameters of an untrained VAE, by numpy: compiling its `init` would take longer than a tiny run."""
    rng = np.random.default_rng(0)

    def fill(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        """Returns the initial value of one parameter: normal for kernels, 1 for scales, else 0."""
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=x.shape, scale=np.prod(x.shape[:-1]) ** -0.5).astype(np.float32)
        return np.full(x.shape, name == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(fill, registry.abstract_params(config))


def _plain(group: Any) -> dict[str, Any]:
    """Returns a group of a config as a dict of plain values."""
    return group.to_dict() if hasattr(group, "to_dict") else dict(group)
