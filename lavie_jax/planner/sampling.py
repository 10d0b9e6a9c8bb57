"""The programs that a chip runs to sample a stage, as `cascade/` compiles them, described by shapes only."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavie_jax import parallel
from lavie_jax.cascade.denoising import adapted, predict_rows, sequential_guidance
from lavie_jax.cascade.dtypes import default_dtype
from lavie_jax.cascade.layout import layout, shares_windows
from lavie_jax.cascade.model import decode_rows, encode_rows, networks, pieces
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError, suggest
from lavie_jax.models import registry
from lavie_jax.models.placement import CLIP_AXIS
from lavie_jax.planner.programs import Program, cast, placed
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import Condition, Prompts
from lavie_jax.stages.settings import Settings
from lavie_jax.stages.stage import Stage
from lavie_jax.training import build
from lavie_jax.weights import Part, Weights


def program_names(stage: Stage) -> tuple[str, ...]:
    """Returns the names of the programs that sampling a stage runs."""
    return ("guided step", "VAE decode", *(("VAE encode",) if stage.encodes_clip else ()))


def sampling_programs(config: Any, stage: str, devices: list[jax.Device], rows: int | None = 1) -> list[Program]:
    """Describes a guided denoising step and the VAE's programs of a stage at its default settings.

    Weights are replicated on every chip, as in `cascade.StageModel`. `rows` are clips or windows per chip; None for the
    windows of one clip, on all chips.

    Raises:
        UserError: the stage is unknown, or the config is of another stage.
    """
    if stage not in STAGES:
        raise UserError(f"--sample: unknown stage {stage!r}{suggest(stage, STAGES)}")
    if config.stage != stage:
        raise UserError(f"--sample {stage}: the config is for the stage {config.stage}; use configs/{stage}.py")
    weights = abstract_weights(config)
    mesh, dtype = parallel.make_mesh(devices=devices), default_dtype(devices)
    unet, text_encoder, vae = networks(weights, dtype)
    everywhere = parallel.replicated(mesh)
    params = {
        name: placed(cast(part.params, model.dtype), everywhere)
        for name, part, model in (
            ("unet", weights.unet, unet),
            ("text_encoder", weights.text_encoder, text_encoder),
            ("vae", weights.vae, vae),
        )
    }
    settings = STAGES[stage].resolve(weights, {}, STAGES[stage].default_clip(weights))
    step = _guided_step(weights, settings, (unet, text_encoder), params, mesh, rows)
    return [step, *_vae_programs(weights, settings, vae, params, mesh)]


def sampling_program(config: Any, stage: str, name: str, devices: list[jax.Device], rows: int | None = 1) -> Program:
    """Returns the program of `sampling_programs` with this name."""
    return next(program for program in sampling_programs(config, stage, devices, rows) if program.name == name)


def _guided_step(
    weights: Weights, settings: Settings, models: tuple, params: dict, mesh: jax.sharding.Mesh, rows: int | None
) -> Program:
    unet, text_encoder = models
    stage = STAGES[weights.stage]
    shape = stage.latent_shape(weights, settings)
    windows = stage.windows(shape, settings)
    window = max(windows, key=lambda w: np.prod(w.shape))
    sampler = make_sampler(settings.sampler, settings.steps, weights.schedule, settings.spacing)
    total = (rows or 1) * mesh.size
    if rows is None and (shared := layout(mesh, len(windows), halves=2, frames=window.shape[0])):
        mesh, total = shared
    sharding = parallel.replicated(mesh) if shares_windows(mesh) else parallel.batch_sharding(mesh)
    channels = unet.config.in_channels - unet.config.out_channels

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((total, *shape), dtype, sharding=sharding)

    state = jax.eval_shape(sampler.init, jax.ShapeDtypeStruct((*window.shape, shape[-1]), jnp.float32))
    x_t, t = jax.eval_shape(sampler.model_input, state, jax.ShapeDtypeStruct((), jnp.int32))
    ids = jax.ShapeDtypeStruct((1, text_encoder.config.length), jnp.int32)
    text = jax.eval_shape(text_encoder.apply, {"params": params["text_encoder"]}, ids)
    mask = array(text.shape[1], dtype=bool) if text_encoder.takes_mask else None
    prompts = Prompts(array(*text.shape[1:], dtype=text.dtype), mask)
    condition = Condition(
        concat=array(*window.shape, channels) if channels else None,
        noise_level=array(dtype=jnp.int32) if unet.config.num_class_embeds else None,
    )
    sequential = sequential_guidance(total, window, mesh)
    halves = "one after the other" if sequential else "together"
    sides = "x".join(str(n) for n in window.shape)
    if shares_windows(mesh):
        note = f"{total} x {sides} latents on all chips, frames divided by {mesh.shape[CLIP_AXIS]}"
    else:
        note = f"{total // mesh.size} x {sides} latents per chip, guidance halves {halves}"
    return Program(
        name="guided step",
        function=predict_rows,
        arguments=(params["unet"], array(*x_t.shape), array(dtype=t.dtype), prompts, prompts, condition),
        static={
            "unet": adapted(unet, stage.attention_windows(settings), stage.free_u(settings)),
            "guidance": float(settings.guidance), "rescale": float(settings.guidance_rescale), "image": False,
            "sequential_guidance": sequential, "mesh": mesh,
        },
        mesh=mesh,
        held={"parameters": params["unet"]},
        beside=(params["text_encoder"], params["vae"]),
        note=f"{note}; windows per clip: {len(windows)}",
    )  # fmt: skip


def _vae_programs(weights: Weights, settings: Settings, vae, params: dict, mesh: jax.sharding.Mesh) -> list[Program]:
    stage = STAGES[weights.stage]
    factor, channels = weights.vae.config.factor, weights.vae.config.latent_channels
    sharding = parallel.batch_sharding(mesh)
    beside = (params["unet"], params["text_encoder"])

    def program(name, count, height, width, function, arguments):
        """Returns the program that en- or decodes one piece of a clip of `count` frames."""
        _, size = pieces(count, height, width, devices=mesh.size)[0]
        note = f"{size // mesh.size} frames of {height}x{width} per chip, {jnp.dtype(vae.dtype).name}"
        arrays = [jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding) for shape, dtype in arguments]
        return Program(
            name=name, function=function, arguments=(params["vae"], *arrays), static={"vae": vae, "mesh": mesh},
            mesh=mesh, held={"parameters": params["vae"]}, beside=beside, note=note,
        )  # fmt: skip

    height, width = (factor * side for side in stage.latent_shape(weights, settings)[1:3])
    latents = ((height // factor, width // factor, channels), jnp.float32)
    programs = [program("VAE decode", settings.frames, height, width, decode_rows, [latents])]
    if stage.encodes_clip:
        clip = stage.default_clip(weights)  # without one, the stage encodes its own clip, of which frames are known
        dtype, count = (jnp.float32, settings.frames) if clip is None else (jnp.uint8, clip.frames)
        frames = ((height, width, 3), dtype)
        programs.append(program("VAE encode", count, height, width, encode_rows, [frames, latents]))
    return programs


def abstract_weights(config: Any) -> Weights:
    """Returns the weights that training with `config` exports, with shapes in place of the float32 parameters."""
    models = build.make_models(config, jnp.float32, 1.0)
    configs = {name: getattr(models, name).config for name in ("unet", "vae", "text_encoder")}
    parts = {name: Part(part, registry.abstract_params(part)) for name, part in configs.items()}
    return Weights(
        path=Path(config.stage),
        stage=config.stage,
        sampling=build.sampling_defaults(config),
        tokenizer_dir=None,
        schedule=models.schedule,
        low_res_schedule=None,
        **parts,
    )
