"""LoRA training (arXiv 2106.09685): low-rank changes of a UNet's spatial layers, with everything else frozen.

The loss sees W + (alpha / r) down . up. `down` and `up` are kernels of one layer after the other, (..., inputs, r) and
(r, outputs), so that `down @ up` has the shape of the kernel, for linear layers and convolutions alike. `up` starts at
zero. Temporal layers are never changed: motion stays as the base model learned it (LaVie sec. 4.4, personalised video).

The parameters are a tree of their own beside the networks', {"unet": ..., "lora": {"unet": {layer: {down, up}}}}, of
which the regime "lora" trains only the second, so that checkpoints and exports contain nothing else.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lavie_jax.disk import new_folder
from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import check_rules, field
from lavie_jax.training.optimizer import ADAPTER
from lavie_jax.weights.lora_files import FOLDER_FILE, Factors, write_lora

_BLOCK = r"transformer_blocks_\d+"
TARGETS = {  # layers by kind
    "attention": rf"/{_BLOCK}/attn[12]/to_(q|k|v|out_0)$",
    "feed_forward": rf"/{_BLOCK}/ff/(net_0/proj|net_2)$",
    "convolutions": r"/(proj_in|proj_out|conv1|conv2|conv_shortcut|(down|up)samplers_\d+/conv)$",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of the regime "lora". The defaults are usual for Stable Diffusion."""

    rank: int = field("rank of the changes", default=8, low=1)
    alpha: float = field("the changes are scaled by alpha / rank; 0 means rank", default=0.0, low=0)
    targets: tuple[str, ...] = field(
        f"spatial layers of the UNet that are changed: {', '.join(TARGETS)}", default=("attention",)
    )

    def __post_init__(self):
        check_rules(LoraConfig, dataclasses.asdict(self), "config field 'lora.{}'")
        for name in self.targets:
            if name not in TARGETS:
                raise UserError(f"config field 'lora.targets': unknown {name!r}{suggest(name, TARGETS)}")
        if not self.targets:
            raise UserError(f"config field 'lora.targets' is empty: name some of {', '.join(TARGETS)}.")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return (self.alpha or self.rank) / self.rank


def of_config(config: Any) -> LoraConfig | None:
    """Returns the settings of the adapter that a run's config trains, or None."""
    return LoraConfig(**dict(config.lora)) if config.regime == ADAPTER else None


def layers(unet: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path of a layer: shape of its kernel} of the layers that are changed. Raises UserError for none."""
    pattern = "|".join(TARGETS[name] for name in config.targets)
    shapes = {path: x.shape for path, x in flatten_dict(unet, sep="/").items() if path.endswith("/kernel")}
    found = {
        path.removesuffix("/kernel"): shape
        for path, shape in shapes.items()
        if re.search(pattern, path.removesuffix("/kernel")) and "temporal" not in path and len(shape) in (2, 4)
    }
    if not found:
        raise UserError(f"lora.targets = {config.targets}: the UNet has none of these layers.")
    return found


def start(unet: Mapping[str, Any], config: LoraConfig, seed: int) -> dict[str, Any]:
    """Returns the tree of a new run in numpy."""
    rng = np.random.default_rng([seed, config.rank])
    return _new_factors(unet, config, lambda shape, bound: rng.uniform(-bound, bound, shape).astype(np.float32))


def initial(unet: Mapping[str, Any], config: LoraConfig, rng: jax.Array) -> dict[str, Any]:
    """Returns the same as `start` in jax, for networks that are also initialised at random."""
    keys = iter(jax.random.split(rng, len(layers(unet, config))))
    return _new_factors(
        unet, config, lambda shape, bound: jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)
    )


def _new_factors(
    unet: Mapping[str, Any], config: LoraConfig, uniform: Callable[[tuple[int, ...], float], Any]
) -> dict[str, Any]:
    """Returns the tree of a new adapter: `down` as PyTorch initialises linear layers, `up` zero.

    `uniform(shape, bound)` returns random numbers from -bound to bound.
    """
    flat = {}
    for path, shape in sorted(layers(unet, config).items()):
        flat[f"{path}/down"] = uniform((*shape[:-1], config.rank), np.prod(shape[:-1]) ** -0.5)
        flat[f"{path}/up"] = np.zeros((config.rank, shape[-1]), np.float32)
    return {"unet": unflatten_dict(flat, sep="/")}


def with_lora(params: Mapping[str, Any], config: LoraConfig) -> Any:
    """Returns the UNet's parameters with the changes in `params`."""
    flat, changes = flatten_dict(params["unet"], sep="/"), flatten_dict(params[ADAPTER]["unet"], sep="/")
    for path in [path.removesuffix("/down") for path in changes if path.endswith("/down")]:
        # full precision: TPUs would round both factors to bfloat16
        product = jnp.matmul(changes[f"{path}/down"], changes[f"{path}/up"], precision="highest")
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + config.scale * product
    return unflatten_dict(flat, sep="/")


def export(folder: Path, params: Mapping[str, Any], config: LoraConfig) -> None:
    """Writes the folder of an adapter, which `sample.py --lora` and diffusers read, in place of an older one."""
    flat = flatten_dict(params[ADAPTER]["unet"], sep="/")
    factors = {
        path.removesuffix("/down"): Factors(np.asarray(x), np.asarray(flat[path.removesuffix("down") + "up"]))
        for path, x in flat.items()
        if path.endswith("/down")
    }
    with new_folder(folder) as new:
        write_lora(new / FOLDER_FILE, factors, alpha=config.scale * config.rank, names="diffusers")
