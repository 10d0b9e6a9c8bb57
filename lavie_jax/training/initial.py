"""The parameters that a stage's training starts from, read from the folders that its config names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from lavie_jax import weights
from lavie_jax.data import moving_pairs, moving_shapes, tokens
from lavie_jax.errors import UserError, user_path
from lavie_jax.models import registry
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.training import diffusion, lora, optimizer, perceptual
from lavie_jax.training.config import init_folder
from lavie_jax.training.diffusion import Models
from lavie_jax.training.distillation import NONE, TEACHER
from lavie_jax.training.step import check_same
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
        teacher_presets: its presets.
    """

    start: Any
    frozen: Mapping[str, Any]
    scaling_factor: float
    tokenizer: Path
    teacher_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher_presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def load(config: Any, models: Models, scratch: Path, resumed: Path | None = None) -> InitialWeights:
    """Reads the folders of `init_from`, `vae_from` and `text_from`, and builds a small tokenizer if none has one.

    Args:
        config: the ConfigDict of a run.
        models: the networks that it describes.
        scratch: an existing folder for the tokenizer.
        resumed: the weights folder that a run with a checkpoint has exported. A UNet that is trained as a whole is then
            not read: `start` has its shapes.
    """
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
    of_teacher = {}
    if config.distill.kind != NONE:
        teacher = weights.load_part(config.init_from, "unet", dtype=np.float32)  # again, also when a run resumes
        check_same(teacher.config, models.unet.config, config.init_from)
        frozen[TEACHER] = teacher.params
        of_teacher = read_config(user_path(config.init_from), config.stage)
    if config.loss.perceptual:
        frozen[perceptual.FROZEN] = perceptual.load()
    if not config.train_text_encoder:
        frozen["text_encoder"] = text
    elif start is not None:
        start["text_encoder"] = text
    if start is not None and (settings := lora.of_config(config)):
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
        teacher_sampling=of_teacher.get("sampling", {}), teacher_presets=of_teacher.get("presets", {}),
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
    return not optimizer.split(params, regime=config.regime, images_only=config.data.frames == 0)[1]


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
