"""T5's encoder: parity with transformers on random weights with padding, configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.errors import UserError
from lavie_jax.models.attention import relative_position_buckets
from lavie_jax.models.registry import abstract_params
from lavie_jax.models.t5_text import T5Text, T5TextConfig
from lavie_jax.weights.diffusers_configs import text_config
from lavie_jax.weights.expected import expected_shapes
from lavie_jax.weights.names import from_torch

# Heads narrower together than the model, as in t5-v1_1-small, and distances that reach the last buckets.
SIZES = dict(
    vocab_size=99, d_model=32, d_kv=4, d_ff=48, num_layers=2, num_heads=6, relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)  # fmt: skip


def transformers_encoder(torch, **fields):
    """Returns transformers' encoder with random weights of every kind."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**SIZES, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def our_params(state) -> dict:
    params = {}
    for name, value in state.items():
        if name == "encoder.embed_tokens.weight":  # the same tensor as shared.weight
            continue
        path, array = from_torch("text_encoder", name, value.numpy())
        node = params
        *modules, leaf = path.split("/")
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(array)
    return params


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_matches_transformers_with_padding(feed_forward):
    torch = pytest.importorskip("torch")
    theirs = transformers_encoder(torch, feed_forward_proj=feed_forward)
    tokens = np.random.default_rng(0).integers(0, 99, (3, 21))
    mask = np.arange(21) < np.array([[21], [9], [1]])  # 1: an empty caption
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    config = text_config(theirs.config.to_dict())
    assert config == T5TextConfig(**SIZES, feed_forward_proj=feed_forward)
    params = our_params(theirs.state_dict())
    apply = jax.jit(T5Text(config).apply)
    ours = np.asarray(apply({"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))
    assert np.linalg.norm((ours - wanted)[mask]) < 1e-5 * np.linalg.norm(wanted[mask])
    padded = apply({"params": params}, jnp.asarray(np.where(mask, tokens, 7), jnp.int32), jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(padded)[mask], ours[mask])  # whatever the padding is
    half = T5Text(config, jnp.bfloat16).apply({"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    assert half.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm((half - ours)[mask]) / np.linalg.norm(ours[mask]) < 0.03


def test_position_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(513)
    distances = positions[None, :] - positions[:, None]
    wanted = T5Attention._relative_position_bucket(distances, True, 32, 128).numpy()
    np.testing.assert_array_equal(relative_position_buckets(513, buckets=32, max_distance=128), wanted)


RELEASED = {  # config.json of google/t5-v1_1-large, google/flan-t5-xl and t5-small, and the encoders' sizes in millions
    "t5-v1_1-large": (dict(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"), 341),
    "flan-t5-xl": (dict(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"), 1224),
    "t5-small": (dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8), 35),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * (name != "t5-v1_1-large")) for name in RELEASED]
)
def test_full_size_has_the_tensors_of_transformers(name):
    """Names and shapes, from transformers' module on torch's meta device."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5EncoderModel

    fields, millions = RELEASED[name]
    theirs_config = T5Config(vocab_size=32128, d_kv=64, **fields)
    with torch.device("meta"):
        theirs = T5EncoderModel(theirs_config)
    config = text_config(theirs_config.to_dict())
    given = {}
    for key, value in theirs.state_dict().items():
        if key != "encoder.embed_tokens.weight":
            path, view = from_torch("text_encoder", key, np.broadcast_to(np.float32(0), value.shape))
            given[path] = view.shape
    assert given == expected_shapes(config)
    assert round(sum(x.size for x in jax.tree.leaves(abstract_params(config))) / 1e6) == millions


def test_config_roundtrip_and_errors():
    config = T5TextConfig(**SIZES, feed_forward_proj="gated-gelu", length=20)
    assert T5TextConfig.from_dict(config.to_dict()) == config
    assert (config.width, config.length) == (32, 20)
    with pytest.raises(UserError, match="'gated-silu' is unknown.*did you mean 'gated-gelu'"):
        text_config({"model_type": "t5", "max_length": 20, "feed_forward_proj": "gated-silu"})
    with pytest.raises(UserError, match="text encoder of type 'umt5'.*clip_text_model, mt5, t5"):
        text_config({"model_type": "umt5"})
    with pytest.raises(UserError, match="multiple of 4"):
        T5TextConfig(relative_attention_num_buckets=6)
    with pytest.raises(UserError, match="d_kv must be at least 1"):
        T5TextConfig(d_kv=0)
