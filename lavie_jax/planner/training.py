"""The training step of a config, as train.py compiles it, from shapes alone."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lavie_jax import parallel
from lavie_jax.data.config import latent_paths
from lavie_jax.errors import UserError, suggest
from lavie_jax.models.vae import VAEConfig
from lavie_jax.planner.programs import Program, cast, mesh_of, placed
from lavie_jax.stages import STAGES
from lavie_jax.training import build, optimizer
from lavie_jax.training.diffusion import Models
from lavie_jax.training.step import make_state, make_update


def training_program(config: Any, devices: list[jax.Device], per_chip_batch: int) -> Program:
    """The update of a stage's config with `per_chip_batch` rows for every chip that the mesh splits the batch over.

    Raises:
      UserError: a stage without a UNet, a mesh that does not fit the devices, a batch that does not divide.
    """
    if config.stage not in STAGES:
        raise UserError(f"the planner knows the cascade's stages, not {config.stage!r}{suggest(config.stage, STAGES)}")
    build.check_stage(config)
    mesh = mesh_of(config, devices)
    batch = per_chip_batch * mesh.shape["data"] * mesh.shape["fsdp"]
    parallel.check_batch(batch, mesh, accumulate=config.accumulate)
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    task = build.stage_task(config, dtype, abstract_origin(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    shapes = jax.eval_shape(lambda rng: make_state(task.init(rng), task, tx), jax.random.key(0))
    shardings = parallel.shardings(shapes, mesh)
    state = placed(shapes, shardings)
    frozen = {} if latent_paths(build.data_config(config)) else cast(task.frozen, dtype)
    frozen = placed(frozen, parallel.shardings(frozen, mesh))
    rows = placed(abstract_batch(config, batch), parallel.batch_sharding(mesh))
    update = make_update(
        task, tx, seed=config.seed, ema_decay=config.ema_decay, accumulate=config.accumulate,
        skip_limit=config.skip_limit,
    )  # fmt: skip
    data = config.data
    return Program(
        name="training step",
        function=jax.jit(update, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh))),
        arguments=(state, frozen, rows),
        mesh=mesh,
        context=True,
        held={
            "parameters": state["params"],
            "optimizer": state["opt_state"],
            "ema": state["ema"],
            "frozen": frozen,
            "batch": rows,
        },
        note=f"{batch} x ({data.frames} frames + {data.images} images) of {data.height}x{data.width}",
    )


def abstract_origin(config: Any) -> build.Origin:
    """Where a config's parameters would come from, as shapes: from random numbers, which changes no shape."""
    models = build.make_models(config, jnp.float32, VAEConfig().scaling_factor)
    frozen = abstract_frozen(models)
    if config.train_text_encoder:
        del frozen["text_encoder"]
    return build.Origin(
        start=None, frozen=frozen, scaling_factor=models.vae.config.scaling_factor, tokenizer=Path("tokenizer")
    )


def abstract_frozen(models: Models) -> dict[str, Any]:
    """Parameters of VAE and text encoder, as shapes."""
    rng, side = jax.random.key(0), models.vae.config.factor
    return {
        "vae": jax.eval_shape(models.vae.init, rng, jnp.zeros((1, side, side, 3)))["params"],
        "text_encoder": jax.eval_shape(models.text_encoder.init, rng, jnp.zeros((1, 2), jnp.int32))["params"],
    }


def abstract_batch(config: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the config's size, as shapes: of pixels and tokens, or of latents and encoded captions."""
    data, length = config.data, config.text_encoder.max_position_embeddings
    if latent_paths(build.data_config(config)):
        vae, width = VAEConfig.from_dict(config.vae.to_dict()), config.text_encoder.hidden_size
        frame = (data.height // vae.factor, data.width // vae.factor, 2 * vae.latent_channels)
        found = {
            "video_latents": (rows, data.frames, *frame),
            "text": (rows, length, width),
            "image_latents": (rows, data.images, *frame),
            "image_text": (rows, data.images, length, width),
        }
        there = (["video_latents", "text"] if data.frames else []) + (
            ["image_latents", "image_text"] if data.images else []
        )
        return {name: jax.ShapeDtypeStruct(found[name], jnp.float32) for name in there}
    shapes = {
        "video": ((rows, data.frames, data.height, data.width, 3), jnp.float32),
        "images": ((rows, data.images, data.height, data.width, 3), jnp.float32),
        "tokens": ((rows, length), jnp.int32),
        "image_tokens": ((rows, data.images, length), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
