"""The networks of the code base: one row for each, with its config, its module and example inputs.

Whatever needs a network, its parameters' shapes or the type of its config asks here, so that a second text encoder
or autoencoder is one more row of `NETWORKS`. A weights folder has one network for each of its parts (`PARTS`); the
first row of a part is its default, which a folder need not name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig

Config = UNetConfig | VAEConfig | CLIPTextConfig


@dataclass(frozen=True)
class Network:
    """A row of the registry.

    Attributes:
        part: the part of a weights folder that the network can be.
        config: the type of its config, a frozen dataclass with `from_dict` and `to_dict`.
        module: its Flax module, whose first two fields are the config and `dtype`.
        example_inputs: the smallest inputs of a config's network, as keyword arguments of its `__call__`.
        shapeless: fields of the config that no parameter's shape depends on, with the value to trace them at.
    """

    part: str
    config: type
    module: type[nn.Module]
    example_inputs: Callable[[Any], dict[str, jax.Array]]
    shapeless: tuple[tuple[str, Any], ...] = ()


def _unet_inputs(config: UNetConfig) -> dict[str, jax.Array]:
    side, rows = 2 ** (len(config.block_out_channels) - 1), jnp.zeros((1,), jnp.int32)
    inputs = {
        "x": jnp.zeros((1, 1, side, side, config.in_channels)),
        "t": rows,
        "text": jnp.zeros((1, 1, config.cross_attention_dim)),
    }
    return inputs if config.num_class_embeds is None else inputs | {"noise_level": rows}


def _vae_inputs(config: VAEConfig) -> dict[str, jax.Array]:
    return {"images": jnp.zeros((1, config.factor, config.factor, config.in_channels))}


def _text_inputs(config: CLIPTextConfig) -> dict[str, jax.Array]:
    return {"tokens": jnp.zeros((1, 1), jnp.int32)}


NETWORKS = {
    "unet": Network("unet", UNetConfig, UNet, _unet_inputs),
    # every checkpoint of a VAE in training has another scaling factor
    "vae": Network("vae", VAEConfig, VAE, _vae_inputs, shapeless=(("scaling_factor", 1.0),)),
    "clip_text": Network("text_encoder", CLIPTextConfig, CLIPText, _text_inputs),
}
PARTS = tuple(dict.fromkeys(row.part for row in NETWORKS.values()))  # unet, vae, text_encoder


def networks_of(part: str) -> dict[str, Network]:
    """The rows that can be a part of a weights folder, its default first."""
    return {name: row for name, row in NETWORKS.items() if row.part == part}


def default_network(part: str) -> str:
    """The name of the network that a part is unless its config.json names another."""
    return next(iter(networks_of(part)))


def config_class(name: str) -> type:
    """The type of a network's config; a part's name stands for its default network."""
    return NETWORKS[name if name in NETWORKS else default_network(name)].config


def network_name(config: Config) -> str:
    """The name of the network that `config` describes."""
    return next(name for name, row in NETWORKS.items() if row.config is type(config))


def module(config: Config, dtype: DTypeLike = jnp.float32, **options: Any) -> nn.Module:
    """Returns the network that `config` describes; `options` are more fields of its module, such as `remat`."""
    return NETWORKS[network_name(config)].module(config, dtype, **options)


def example_inputs(config: Config) -> dict[str, jax.Array]:
    """The smallest inputs of the network, as keyword arguments of its `__call__` (and so of `init`)."""
    return NETWORKS[network_name(config)].example_inputs(config)


def init_params(config: Config, rng: jax.Array) -> dict[str, Any]:
    """Returns freshly initialised float32 parameters, a nested dict. Slow to compile: call it where it has to run."""
    return module(config).init(rng, **example_inputs(config))["params"]


def abstract_params(config: Config) -> dict[str, Any]:
    """Returns the parameters' shapes, a nested dict of `jax.ShapeDtypeStruct`. Traced once per config, not computed."""
    shapeless = dict(NETWORKS[network_name(config)].shapeless)
    traced = _traced_params(replace(config, **shapeless))
    return jax.tree.map(lambda leaf: leaf, traced)  # a copy, so that a caller's changes stay the caller's


@lru_cache(maxsize=16)
def _traced_params(config: Config) -> dict[str, Any]:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
