"""CLIP text encoder: parity with transformers on random weights, causality, configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.weights.diffusers_configs import clip_text_config

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=20,
)


def flax_params(state: dict) -> dict:
    """Maps a torch state dict to our paths, independently of the converter."""
    params = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        *path, leaf = name.removeprefix("text_model.").replace("layers.", "layers_").split(".")
        if leaf == "weight" and "embedding" in path[-1]:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, value = ("kernel", value.T) if value.ndim == 2 else ("scale", value)
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value.numpy())
    return params


def small_text(dtype=jnp.float32):
    """Returns the compiled forward pass of a small encoder, random parameters, and tokens."""
    model = CLIPText(CLIPTextConfig(**SIZES), dtype)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 99, (2, 11)), jnp.int32)

    def fill(leaf):
        mean, scale = (0.5, 0.2) if len(leaf.shape) == 1 else (0, leaf.shape[0] ** -0.5)
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return jax.jit(model.apply), jax.tree.map(fill, shapes), tokens


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_matches_transformers(hidden_act):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextConfig as TorchConfig
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    config = TorchConfig(**SIZES, hidden_act=hidden_act, bos_token_id=0, eos_token_id=98)
    theirs = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = np.random.default_rng(0).integers(0, 99, (2, 11))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens)).last_hidden_state.numpy()
    config = clip_text_config(theirs.config.to_dict())
    assert config == CLIPTextConfig(**SIZES, hidden_act=hidden_act)
    params = flax_params(theirs.state_dict())
    ours = jax.jit(CLIPText(config).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_is_causal():
    apply, variables, tokens = small_text()
    whole = apply(variables, tokens)
    assert whole.shape == (2, 11, 32)
    np.testing.assert_allclose(apply(variables, tokens[:, :6]), whole[:, :6], atol=1e-5)
    other = apply(variables, tokens.at[:, 5].set(7 - tokens[:, 5] % 2))
    np.testing.assert_allclose(other[:, :5], whole[:, :5], atol=1e-5)
    assert np.abs(other[:, 5:] - whole[:, 5:]).max() > 1e-2


def test_bfloat16_computes_near_float32():
    apply, variables, tokens = small_text()
    half = small_text(jnp.bfloat16)[0](variables, tokens)
    whole = apply(variables, tokens)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm(half - whole) / np.linalg.norm(whole) < 0.03


def test_config_roundtrip_and_errors():
    config = CLIPTextConfig(**SIZES, hidden_act="gelu")
    assert CLIPTextConfig.from_dict(config.to_dict()) == config
    assert clip_text_config({"text_config": SIZES}) == CLIPTextConfig(**SIZES)
    with pytest.raises(UserError, match="hidden_act.*'gelu_new'"):
        clip_text_config(SIZES | {"hidden_act": "gelu_new"})
    with pytest.raises(UserError, match="num_attention_heads = 5"):
        CLIPTextConfig(**SIZES | {"num_attention_heads": 5})
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        CLIPTextConfig.from_dict({"hiden_size": 32})
    with pytest.raises(UserError, match="vocab_size must be of type int"):
        CLIPTextConfig.from_dict({"vocab_size": "many"})


def test_a_mask_is_refused():
    """CLIP attends to padding, as `takes_mask` states."""
    apply, variables, tokens = small_text()
    assert not CLIPText.takes_mask
    with pytest.raises(ValueError, match="no padding mask"):
        apply(variables, tokens, jnp.ones(tokens.shape, bool))


def test_too_many_tokens_are_refused():
    apply, variables, _ = small_text()
    with pytest.raises(UserError, match="20 positions"):
        apply(variables, jnp.zeros((1, 21), jnp.int32))
