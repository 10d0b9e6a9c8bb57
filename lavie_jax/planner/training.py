"""The training step and the held-out losses of a config as train.py compiles them, described by shapes only."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lavie_jax import parallel
from lavie_jax.data.config import latent_paths
from lavie_jax.errors import UserError, suggest
from lavie_jax.models import registry
from lavie_jax.models.vae import VAEConfig
from lavie_jax.planner.programs import Program, mesh_of, placed
from lavie_jax.stages import STAGES
from lavie_jax.training import build, initial, optimizer, perceptual
from lavie_jax.training.distillation import NONE, TEACHER
from lavie_jax.training.state import abstract_frozen, abstract_state
from lavie_jax.training.step import Task, make_held_out, make_update


class _Run(NamedTuple):
    """Shared by both programs of a run: its task, and the shapes that are on the devices all the time."""

    task: Task
    tx: optax.GradientTransformation
    mesh: Mesh
    state: dict[str, Any]
    frozen: dict[str, Any]
    rows: dict[str, jax.ShapeDtypeStruct]
    note: str


def training_program(config: Any, devices: list[jax.Device], per_chip_batch: int) -> Program:
    """Describes the update of a stage's config with `per_chip_batch` rows per chip that the mesh splits the batch over.

    Raises:
        UserError: a stage without a UNet, a mesh that does not fit the devices, a batch that does not divide.
    """
    run = _run(config, devices, per_chip_batch)
    update = make_update(
        run.task, run.tx, ema_decay=config.ema_decay, accumulate=config.accumulate, skip_limit=config.skip_limit
    )
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    return Program(
        name="training step",
        function=jax.jit(update, donate_argnums=0, out_shardings=(shardings, parallel.replicated(run.mesh))),
        arguments=(run.state, run.frozen, run.rows, _key(run)),
        mesh=run.mesh,
        context=True,
        held=_held(run),
        beside=(run.rows,) * config.held_out_batches,
        note=run.note,
    )


def held_out_program(config: Any, devices: list[jax.Device], per_chip_batch: int) -> Program:
    """Describes the held-out losses of one batch, beside the state of the run and the other held-out batches.

    Raises:
        UserError: as `training_program`.
    """
    run = _run(config, devices, per_chip_batch)
    function = make_held_out(run.task, accumulate=config.accumulate)
    return Program(
        name="held-out losses",
        function=jax.jit(function, out_shardings=parallel.replicated(run.mesh)),
        arguments=(run.state["ema"], run.frozen, run.rows, _key(run)),
        mesh=run.mesh,
        context=True,
        held=_held(run),
        beside=(run.state["params"], run.state["opt_state"], *(run.rows,) * (config.held_out_batches - 1)),
        note=run.note,
    )


def _key(run: _Run) -> Any:
    """Returns the shape of a random key, on every device."""
    return placed(jax.eval_shape(lambda: jax.random.key(0)), parallel.replicated(run.mesh))


def _held(run: _Run) -> dict[str, Any]:
    return {
        "parameters": run.state["params"],
        "optimizer": run.state["opt_state"],
        "ema": run.state["ema"],
        "frozen": run.frozen,
        "batch": run.rows,
    }


def _run(config: Any, devices: list[jax.Device], per_chip_batch: int) -> _Run:
    if config.stage not in STAGES:
        raise UserError(
            f"the planner supports the cascade's stages, not {config.stage!r}{suggest(config.stage, STAGES)}"
        )
    build.check_stage(config)
    mesh = mesh_of(config, devices)
    batch = per_chip_batch * mesh.shape["data"] * mesh.shape["fsdp"]
    parallel.check_batch(batch, mesh, accumulate=config.accumulate)
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    task = build.stage_task(config, dtype, abstract_init(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    state = abstract_state(task, tx, mesh)
    frozen = abstract_frozen(task, mesh, dtype, models=not latent_paths(build.data_config(config)))
    rows = placed(abstract_batch(config, batch), parallel.batch_sharding(mesh))
    data = config.data
    note = f"{batch} x ({data.frames} frames + {data.images} images) of {data.height}x{data.width}"
    return _Run(task, tx, mesh, state, frozen, rows, note)


def abstract_init(config: Any) -> initial.InitialWeights:
    """Returns the shapes of a config's initial weights, as if they were random, which changes no shape."""
    models = build.make_models(config, jnp.float32, VAEConfig().scaling_factor)
    names = ["vae"] if config.train_text_encoder else ["vae", "text_encoder"]
    frozen = {name: registry.abstract_params(getattr(models, name).config) for name in names}
    if config.distill.kind != NONE:
        frozen[TEACHER] = registry.abstract_params(models.unet.config)
    if config.loss.perceptual:
        frozen[perceptual.FROZEN] = perceptual.abstract()
    return initial.InitialWeights(
        start=None,
        frozen=frozen,
        scaling_factor=models.vae.config.scaling_factor,
        tokenizer=Path("tokenizer"),
    )


def abstract_batch(config: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a config's batch: pixels and tokens, or latents and encoded captions."""
    data, text = config.data, build.make_models(config, jnp.float32, 1.0).text_encoder
    length = text.config.length
    if latent_paths(build.data_config(config)):
        vae, width = VAEConfig.from_dict(config.vae.to_dict()), text.config.width
        frame = (data.height // vae.factor, data.width // vae.factor, 2 * vae.latent_channels)
        video = {"video_latents": (rows, data.frames, *frame), "text": (rows, length, width)}
        images = {"image_latents": (rows, data.images, *frame), "image_text": (rows, data.images, length, width)}
        shapes = (video if data.frames else {}) | (images if data.images else {})
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    pixels, ids = jnp.uint8, jnp.int32
    shapes = {
        "video": ((rows, data.frames, data.height, data.width, 3), pixels),
        "images": ((rows, data.images, data.height, data.width, 3), pixels),
        "tokens": ((rows, length), ids),
        "image_tokens": ((rows, data.images, length), ids),
    }
    if text.takes_mask:
        shapes["token_mask"] = ((rows, length), jnp.bool)
        shapes["image_token_mask"] = ((rows, data.images, length), jnp.bool)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
