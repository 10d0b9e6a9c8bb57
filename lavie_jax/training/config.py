"""The configuration of a training run: every field with its default, built from the dataclasses that use the fields.

A run has top-level fields (`RunConfig`) and groups, one for each dataclass: `data`, `optimizer`, `loss`, `mesh`, the
networks, and `sampling`. Config files (`configs/`) start from `defaults` and change what differs.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavie_jax import weights
from lavie_jax.data.config import DataConfig
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import MAX_SEED, check_rules, convert, expanded, field, settable, types_of
from lavie_jax.models import registry
from lavie_jax.models.attention import KERNELS
from lavie_jax.models.unet import REMAT
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages.settings import AUTO, DTYPES, STAGE_INFO
from lavie_jax.training.autoencoder import AutoencoderLoss
from lavie_jax.training.diffusion import DiffusionLoss
from lavie_jax.training.distillation import DistillConfig
from lavie_jax.training.lora import LoraConfig
from lavie_jax.training.optimizer import REGIMES, OptimizerConfig

VAE_STAGE = "vae"
NETWORKS = ("unet", "text_encoder", "vae")  # groups that None reads from a weights folder
TEXT_NETWORKS = tuple(registry.networks_of("text_encoder"))
# Fields that do not belong to a run: the VAE's scaling factor is measured, and frozen VAEs bring their own.
HIDDEN = {"vae": ("scaling_factor",)}
RENAMED = {"data": {"stills": "image_parts", "still_weights": "image_weights", "clip_stills": "images_from_clips"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices on each axis of the mesh; -1 takes all that remain."""

    data: int = field("devices that split the batch", default=-1, low=-1)
    fsdp: int = field("devices that split the batch, the parameters and the optimizer state", default=1, low=-1)
    tensor: int = field("devices that split the heads and channels of each layer", default=1, low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The top-level fields of every run."""

    stage: str = field("the model that is trained", choices=(VAE_STAGE, *STAGE_INFO))
    steps: int = field("number of updates", low=1)
    batch: int = field("examples per update, over all devices", low=1)
    seed: int = field("seed of the initial parameters and of the noise", default=0, low=0, high=MAX_SEED)
    init_from: str = field(
        "weights folder to start from, or hub:OWNER/NAME[/STAGE]; empty starts from random weights",
        default="",
        path=True,
    )

    accumulate: int = field("parts that a batch is processed in, one after the other", default=1, low=1)
    dtype: str = field(
        "dtype of the computation; auto is bfloat16 on accelerators and float32 on CPUs",
        default=AUTO,
        choices=DTYPES,
    )
    remat: str = field(
        "saves memory: block recomputes each block in the backward pass, full each layer as well; offload keeps the "
        "activations between layers in host memory and recomputes the rest once",
        default="none",
        choices=REMAT,
    )
    attention_kernel: str = field(
        "implementation of attention",
        default="auto",
        choices=tuple(name for name in KERNELS if name != "flash"),  # does not support the 77 tokens of a text
    )
    regime: str = field("parameters and data that are trained (paper, appendix D)", default="joint", choices=REGIMES)
    ema_decay: float = field("decay of the average of the parameters", default=0.9999, low=0, below=1)
    skip_limit: int = field("consecutive steps with a non-finite loss that stop the run", default=10, low=1)

    cpu_devices: int = field("devices that a CPU is split into; 2 are faster than 1 on 2 cores", default=0, low=0)
    distributed: bool = field("train on all hosts of a pod together", default=False)
    workers: int = field("processes that prepare data; 0 uses a thread", default=0, low=0)
    peak_tflops: float = field("peak TFLOP/s of a device, to log utilization; 0 looks up TPUs", default=0.0, low=0)

    log_every: int = field("steps between lines of metrics.jsonl", default=50, low=1)
    held_out_every: int = field("steps between measurements of the held-out loss", default=500, low=1)
    held_out_batches: int = field("batches of the held-out loss", default=4, low=1)
    checkpoint_every: int = field("steps between checkpoints, each with a weights folder", default=500, low=1)
    keep_checkpoints: int = field("newest checkpoints that are kept", default=2, low=1)
    keep_best: int = field("checkpoints with the lowest held-out loss that are also kept", default=1, low=0)
    keep_every: int = field("checkpoints at multiples of this step are kept; 0 keeps none", default=0, low=0)
    sample_every: int = field("steps between sample grids, a multiple of checkpoint_every", default=500, low=1)
    prompts: tuple[str, ...] = field("prompts of the sample grids; empty writes no grids", default=())
    metrics: tuple[str, ...] = field(
        "where metrics go in addition to metrics.jsonl: any of tensorboard, wandb, module:function", default=()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRunConfig(RunConfig):
    """The top-level fields of a stage's run."""

    inflate: bool = field(
        "init_from contains an image model, or, for prediction and interpolation, a base model, to start from",
        default=False,
    )
    vae_from: str = field(
        "weights folder with the VAE; empty uses init_from, random an untrained VAE", default="", path=True
    )
    text_from: str = field(
        "weights folder with the frozen text encoder; empty uses init_from, random trains a new one, with a tokenizer "
        "of Moving Shapes",
        default="",
        path=True,
    )
    text_network: str = field(
        "the text encoder; the fields of text_encoder follow from it", default=TEXT_NETWORKS[0], choices=TEXT_NETWORKS
    )
    train_text_encoder: bool = field("train the text encoder with the UNet", default=False)


def run_class(stage: str) -> type[RunConfig]:
    """The dataclass of the top-level fields of a stage's run, or of the VAE's."""
    return RunConfig if stage == VAE_STAGE else StageRunConfig


def text_network(values: Any) -> str:
    """Returns the name of the text encoder in a run's config; those of older runs and of the VAE do not have it.

    Raises:
        UserError: the text encoder is unknown.
    """
    name = values.get("text_network", TEXT_NETWORKS[0])
    if name not in TEXT_NETWORKS:
        raise UserError(f"config field 'text_network': unknown value {name!r}{suggest(str(name), TEXT_NETWORKS)}")
    return name


def group_classes(stage: str, text: str = TEXT_NETWORKS[0]) -> dict[str, type]:
    """{group: dataclass of its fields} of a stage with a text encoder of this name, or of the VAE.

    Raises:
        UserError: the stage is unknown.
    """
    shared = {"data": DataConfig, "optimizer": OptimizerConfig, "mesh": MeshConfig, "vae": VAEConfig}
    if stage == VAE_STAGE:
        return {**shared, "loss": AutoencoderLoss}
    if stage not in STAGE_INFO:
        raise UserError(f"unknown stage {stage!r}{suggest(stage, (VAE_STAGE, *STAGE_INFO))}")
    networks = {"unet": UNetConfig, "text_encoder": registry.NETWORKS[text].config, "schedule": Schedule}
    return {
        **shared,
        **networks,
        "lora": LoraConfig,
        "distill": DistillConfig,
        "loss": DiffusionLoss,
        "sampling": STAGE_INFO[stage].settings,
        **STAGE_INFO[stage].training,
    }


def field_types(stage: str, text: str = TEXT_NETWORKS[0]) -> dict[str, dict[str, Any]]:
    """{group: {field: type}} of a stage with a text encoder of this name; the top-level fields are group "".

    Sampling settings are optional: None is the default of the stage, or follows from the training data.
    """
    types = {"": {name: types_of(run_class(stage))[name] for name in settable(run_class(stage))}}
    for group, cls in group_classes(stage, text).items():
        names = [name for name in settable(cls) if name not in HIDDEN.get(group, ())]
        types[group] = {name: types_of(cls)[name] for name in names}
    if "sampling" in types:
        types["sampling"] = {name: kind | None for name, kind in types["sampling"].items()}
    return types


def defaults(stage: str, text: str = TEXT_NETWORKS[0]) -> dict[str, Any]:
    """The fields of a run of `stage` with their defaults; `steps` and `batch` have none and are absent.

    `text` is the name of the text encoder.
    """
    values: dict[str, Any] = {"stage": stage}
    for group, kinds in field_types(stage, text).items():
        cls = group_classes(stage, text)[group] if group else run_class(stage)
        given = {name: None if group == "sampling" else settable(cls)[name].default for name in kinds}
        given = {name: value for name, value in given.items() if value is not dataclasses.MISSING}
        if group:
            values[group] = given
        else:
            values |= given
    return values | ({"text_network": text} if "text_network" in values else {})


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the recorded config of an older run to today's format.

    Fields that the older version did not have get their defaults, and renamed fields their new names. Only groups that
    are present are completed, and the config of an unknown stage is returned unchanged.
    """
    values = dict(values)
    for group, names in RENAMED.items():
        if isinstance(values.get(group), Mapping):
            values[group] = {names.get(name, name): value for name, value in values[group].items()}
    stage = values.get("stage")
    if stage != VAE_STAGE and stage not in STAGE_INFO:
        return values
    for group, fields in defaults(stage, text_network(values)).items():
        if isinstance(fields, dict) and isinstance(values.get(group), Mapping):
            values[group] = fields | dict(values[group])
    return values


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a config file with their types converted, and defaults for absent fields.

    Raises:
        UserError: a field is unknown, missing, or of another type.
    """
    stage = values.get("stage")
    if not isinstance(stage, str):
        raise UserError("the config does not set `stage`.")
    text = text_network(values)
    types, filled = field_types(stage, text), defaults(stage, text)
    for name, value in values.items():
        if name not in types and name not in types[""]:
            raise UserError(f"unknown config field {name!r}{suggest(name, [*types[''], *filter(None, types)])}")
        if name not in types:
            value = convert(f"config field {name!r}", value, types[""][name])
            filled[name] = expanded(settable(run_class(stage))[name], value)
        elif value is None and name in NETWORKS:
            filled[name] = None
        else:
            if not isinstance(value, Mapping):
                raise UserError(f"config field {name!r} is a group of fields, not {value!r}.")
            for inner, one in value.items():
                full = f"{name}.{inner}"
                if inner not in types[name]:
                    raise UserError(f"unknown config field {full!r}{suggest(inner, types[name])}")
                one = convert(f"config field {full!r}", one, types[name][inner])
                filled[name][inner] = expanded(settable(group_classes(stage, text)[name])[inner], one)
    for name in types[""]:
        if name not in filled:
            raise UserError(f"the config does not set {name!r}.")
    return filled


def check_values(values: Mapping[str, Any]) -> None:
    """Raises UserError for the first top-level or mesh field that is out of range."""
    check_rules(run_class(values["stage"]), values)
    check_rules(MeshConfig, values["mesh"], "config field 'mesh.{}'")


def init_folder(folder: str, resumed: Path) -> Path:
    """Returns the weights folder that a run starts from, or, if it is gone, the one that it has exported."""
    return resumed if not Path(folder).is_dir() and resumed.is_dir() else Path(folder)


def read_networks(config: Any, resumed: Path) -> None:
    """Replaces each network group that is None by the architecture in the weights folder that the run starts from.

    `resumed` is the folder that the run has exported if it is not new; it is read if `init_from` is gone.

    Raises:
        UserError: no folder is given for the network, or the UNet in it is to be inflated.
    """
    for name, source in (("unet", ""), ("text_encoder", "text_from"), ("vae", "vae_from")):
        if name not in config or config[name] is not None:
            continue
        folder = (config.get(source) if source else "") or config.init_from
        if not folder or folder == "random":
            raise UserError(f"{name}=None reads the architecture from a weights folder: set init_from.")
        if name == "unet" and config.inflate:
            raise UserError("unet=None reads the architecture from init_from, which inflate=True changes: set unet.")
        if folder == config.init_from:
            folder = init_folder(folder, resumed)
        network = weights.load_part(folder, name, params=False).config
        if name == "text_encoder":
            config.text_network = registry.network_name(network)
        architecture, kinds = network.to_dict(), field_types(config.stage, text_network(config))[name]
        values = {key: convert(f"{folder}: {name}.{key}", architecture[key], kind) for key, kind in kinds.items()}
        config[name] = type(config)(values)
