"""Which parameters a configuration has, and the strict comparison of a file with them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

import lavie_jax
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.weights.names import is_buffer

CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}


def expected_shapes(config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter of the model that `config` describes; nothing is computed."""
    if isinstance(config, VAEConfig):  # it changes no shape, and a VAE in training has another at every checkpoint
        config = dataclasses.replace(config, scaling_factor=1.0)
    return _traced_shapes(config)


@lru_cache(maxsize=16)
def _traced_shapes(config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    rng = jax.random.key(0)
    if isinstance(config, UNetConfig):
        side = 2 ** (len(config.block_out_channels) - 1)
        noise_level = None if config.num_class_embeds is None else jnp.zeros((1,), jnp.int32)
        shapes = jax.eval_shape(
            lambda: UNet(config).init(
                rng, jnp.zeros((1, 1, side, side, config.in_channels)), jnp.zeros((1,), jnp.int32),
                jnp.zeros((1, 1, config.cross_attention_dim)), noise_level=noise_level,
            )
        )  # fmt: skip
    elif isinstance(config, VAEConfig):
        images = jnp.zeros((1, config.factor, config.factor, config.in_channels))
        shapes = jax.eval_shape(lambda: VAE(config).init(rng, images))
    else:
        shapes = jax.eval_shape(lambda: CLIPText(config).init(rng, jnp.zeros((1, 1), jnp.int32)))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes["params"], sep="/").items()}


def seal(config: UNetConfig | VAEConfig | CLIPTextConfig, given: Mapping[str, tuple[int, ...]]) -> str:
    """What a part's config.json keeps when its tensors were compared with the configuration and found to fit.

    A file that still has its seal needs no second comparison, for which the model is traced: a second or two for a
    small UNet, four for a released one. Another version of this library knows no seal of this one.
    """
    facts = [lavie_jax.__version__, config.to_dict(), sorted((path, list(shape)) for path, shape in given.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def our_name(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a weights folder's file names a parameter."""
    return path.replace("/", "."), shape


def compare(
    what: str,
    config: UNetConfig | VAEConfig | CLIPTextConfig,
    given: Mapping[str, tuple[int, ...]],
    shown: Callable[[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = our_name,
) -> list[str]:
    """Every difference between the shapes of a file, {path: shape}, and those that `config` needs, a line each.

    `what` is the file's name, and `shown` says how the file itself names and shapes a parameter. Buffers are no
    difference.
    """
    expected = expected_shapes(config)
    lines = []
    for path, shape in expected.items():
        name, needed = shown(path, shape)
        if path not in given:
            lines.append(f"{what}: missing {name} {list(needed)}")
        elif tuple(given[path]) != shape:
            lines.append(f"{what}: {name} has shape {list(shown(path, given[path])[1])}, not {list(needed)}")
    for path, shape in given.items():
        if path not in expected and not is_buffer(path):
            name, found = shown(path, shape)
            lines.append(f"{what}: unexpected {name} {list(found)}")
    return lines


def refuse(lines: list[str]) -> None:
    """Raises one UserError with all `lines`, when there are any."""
    if lines:
        count = "1 tensor does" if len(lines) == 1 else f"{len(lines)} tensors do"
        raise UserError(f"{count} not fit; nothing was written:\n  " + "\n  ".join(lines))
