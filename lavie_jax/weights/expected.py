"""Which parameters a configuration has, and the strict comparison of a file with them."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.unet import UNet, UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.weights.names import is_buffer

CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}


@lru_cache(maxsize=16)
def expected_shapes(config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter of the model that `config` describes; nothing is computed or allocated."""
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


def compare(what: str, config, given: Mapping[str, tuple[int, ...]], *, shown: Callable[[str], str] = str) -> list[str]:
    """Every difference between the shapes of a file, {path: shape}, and those that `config` needs, one line each.

    `what` names the file, `shown(path)` is how its reader knows a parameter. Buffers are no difference.
    """
    expected = expected_shapes(config)
    lines = [f"{what}: missing {shown(path)} {list(shape)}" for path, shape in expected.items() if path not in given]
    for path, shape in given.items():
        if path not in expected and not is_buffer(path):
            lines.append(f"{what}: unexpected {shown(path)} {list(shape)}")
        elif path in expected and tuple(shape) != expected[path]:
            lines.append(f"{what}: {shown(path)} has shape {list(shape)}, the configuration needs {list(expected[path])}")
    return lines


def refuse(lines: list[str]) -> None:
    """Raises one UserError with all `lines`, when there are any."""
    if lines:
        more = "".join(f"\n  {line}" for line in lines)
        raise UserError(f"{len(lines)} tensors do not fit; nothing was written." + more)
