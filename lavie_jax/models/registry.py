"""The networks of the code base: one row for each, with its config, its module and example inputs.

All code that needs a network, the shapes of its parameters or the type of its config uses this registry, so adding a
text encoder or an autoencoder takes one row of `NETWORKS`. A weights folder has one network for each of its parts
(`PARTS`). The first row of a part is its default: folders with other networks name them in the part's config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lavie_jax.models.clip import CLIP, CLIPConfig
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.t5_text import T5Text, T5TextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig

TextEncoder = CLIPText | T5Text
TextConfig = CLIPTextConfig | T5TextConfig
Config = UNetConfig | VAEConfig | TextConfig | CLIPConfig


@dataclass(frozen=True)
class Network:
    """A row of the registry.

    Attributes:
        part: the part of a weights folder that holds the network.
        config: the type of its config, a frozen dataclass with `from_dict` and `to_dict`.
        module: its Flax module, whose first two fields are the config and `dtype`.
        example_inputs: the smallest inputs of a config's network, as keyword arguments of its `__call__`.
        traced_as: {field: value} of fields of the config that do not affect the parameters' shapes, as pairs. Configs
            that differ only in these fields are traced once, with these values.
    """

    part: str
    config: type[Any]
    module: type[nn.Module]
    example_inputs: Callable[[Any], dict[str, jax.Array]]
    traced_as: tuple[tuple[str, Any], ...] = ()


def _unet_inputs(config: UNetConfig) -> dict[str, jax.Array]:
    side, rows = 2 ** (len(config.block_out_channels) - 1), jnp.zeros((1,), jnp.int32)
    inputs = {
        "x": jnp.zeros((1, 1, side, side, config.in_channels)),
        "t": rows,
        "text": jnp.zeros((1, 1, config.text_width)),
    }
    return inputs if config.num_class_embeds is None else inputs | {"noise_level": rows}


def _vae_inputs(config: VAEConfig) -> dict[str, jax.Array]:
    return {"images": jnp.zeros((1, config.factor, config.factor, config.in_channels))}


def _text_inputs(config: TextConfig) -> dict[str, jax.Array]:
    return {"tokens": jnp.zeros((1, 1), jnp.int32)}


def _clip_inputs(config: CLIPConfig) -> dict[str, jax.Array]:
    side = config.vision.image_size
    return {"images": jnp.zeros((1, side, side, 3)), **_text_inputs(config.text)}


NETWORKS = {
    "unet": Network("unet", UNetConfig, UNet, _unet_inputs),
    # the scaling factor changes in every checkpoint of a VAE in training
    "vae": Network("vae", VAEConfig, VAE, _vae_inputs, traced_as=(("scaling_factor", 1.0),)),
    "clip_text": Network("text_encoder", CLIPTextConfig, CLIPText, _text_inputs),
    "t5_text": Network("text_encoder", T5TextConfig, T5Text, _text_inputs, traced_as=(("length", 1),)),
    "clip": Network("clip", CLIPConfig, CLIP, _clip_inputs),  # in folders of its own, for CLIPSIM
}
PARTS = ("unet", "vae", "text_encoder")  # of a stage


def networks_of(part: str) -> dict[str, Network]:
    """Returns the rows of a part of a weights folder, its default first."""
    return {name: row for name, row in NETWORKS.items() if row.part == part}


def default_network(part: str) -> str:
    """Returns the name of a part's network if its config.json does not name one."""
    return next(iter(networks_of(part)))


def config_class(name: str) -> type[Any]:
    """Returns the type of a network's config; the name of a part means its default network."""
    return NETWORKS[name if name in NETWORKS else default_network(name)].config


def network_name(config: Config) -> str:
    """Returns the name of the network that `config` describes."""
    return next(name for name, row in NETWORKS.items() if row.config is type(config))


def module(config: Config, dtype: DTypeLike = jnp.float32, **options: Any) -> nn.Module:
    """Returns the network that `config` describes; `options` are further fields of its module, such as `remat`."""
    return NETWORKS[network_name(config)].module(config, dtype, **options)


def example_inputs(config: Config) -> dict[str, jax.Array]:
    """The smallest inputs of the network, as keyword arguments of its `__call__` (and so of `init`)."""
    return NETWORKS[network_name(config)].example_inputs(config)


def init_params(config: Config, rng: jax.Array) -> dict[str, Any]:
    """Returns randomly initialised float32 parameters, a nested dict. Slow: `abstract_params` is enough for shapes."""
    return module(config).init(rng, **example_inputs(config)).get("params", {})  # a VAE without levels has none


def abstract_params(config: Config) -> dict[str, Any]:
    """Returns the parameters' shapes, a nested dict of `jax.ShapeDtypeStruct`, traced once per config."""
    traced = _traced_params(replace(config, **dict(NETWORKS[network_name(config)].traced_as)))
    return jax.tree.map(lambda leaf: leaf, traced)  # a copy, because callers may modify it


@lru_cache(maxsize=16)
def _traced_params(config: Config) -> dict[str, Any]:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
