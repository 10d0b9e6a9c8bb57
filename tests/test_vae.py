"""VAE: parity with a PyTorch reference on random weights, shapes, patches, kernels, dtypes, configs."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.vae import VAE, SpatialAttention, VAEConfig, sample_posterior
from lavie_jax.weights.diffusers_configs import vae_config

SMALL = VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)


def random_vae(config=SMALL, dtype=jnp.float32, seed=0):
    """Returns a VAE with random parameters throughout: initial biases of zero would hide mistakes."""
    vae = VAE(config, dtype)
    shapes = registry.abstract_params(config)  # traced once for all tests
    rng = np.random.default_rng(seed)

    def fill(leaf):
        scale = 0.2 if len(leaf.shape) == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(0.5 if len(leaf.shape) == 1 else 0, scale, leaf.shape), jnp.float32)

    return vae, {"params": jax.tree.map(fill, shapes)}


@cache
def compiled(vae, method):
    """`vae.apply` as one compiled program; op by op, the tests would take much longer."""
    return jax.jit(partial(vae.apply, method=method))


def run(vae, params, x, method="__call__"):
    return compiled(vae, method)(params, x)


def shapes_of(vae, params, x, method="__call__"):
    return jax.tree.map(lambda y: y.shape, jax.eval_shape(partial(vae.apply, method=method), params, x))


def random_images(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)), jnp.float32)


class TorchVAE:
    """diffusers' AutoencoderKL for `SMALL`, in torch functions over our parameters, channels first."""

    def __init__(self, torch, params):
        self.torch, self.f = torch, torch.nn.functional
        flat = flatten_dict(params["params"], sep="/")
        self.p = {path: torch.from_numpy(np.array(value)) for path, value in flat.items()}

    def conv(self, x, name, **options):
        kernel = self.p[name + "/kernel"].permute(3, 2, 0, 1)
        return self.f.conv2d(x, kernel, self.p[name + "/bias"], **options)

    def linear(self, x, name):
        return self.f.linear(x, self.p[name + "/kernel"].T, self.p[name + "/bias"])

    def norm(self, x, name):
        scale, bias = self.p[name + "/scale"], self.p[name + "/bias"]
        return self.f.group_norm(x, SMALL.norm_num_groups, scale, bias, 1e-6)

    def resnet(self, x, name):
        h = self.conv(self.f.silu(self.norm(x, name + "/norm1")), name + "/conv1", padding=1)
        h = self.conv(self.f.silu(self.norm(h, name + "/norm2")), name + "/conv2", padding=1)
        return h + (self.conv(x, name + "/conv_shortcut") if name + "/conv_shortcut/kernel" in self.p else x)

    def attention(self, x, name):
        y = self.norm(x, name + "/group_norm").flatten(2).transpose(1, 2)
        q, k, v = (self.linear(y, f"{name}/{part}") for part in ("to_q", "to_k", "to_v"))
        y = self.torch.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, -1) @ v
        return x + self.linear(y, name + "/to_out_0").transpose(1, 2).reshape(x.shape)

    def mid(self, x, half):
        x = self.attention(self.resnet(x, half + "/mid_block/resnets_0"), half + "/mid_block/attentions_0")
        return self.resnet(x, half + "/mid_block/resnets_1")

    def encode(self, x):
        x = self.resnet(self.conv(x, "encoder/conv_in", padding=1), "encoder/down_blocks_0/resnets_0")
        x = self.conv(self.f.pad(x, (0, 1, 0, 1)), "encoder/down_blocks_0/downsamplers_0/conv", stride=2)
        x = self.mid(self.resnet(x, "encoder/down_blocks_1/resnets_0"), "encoder")
        x = self.conv(self.f.silu(self.norm(x, "encoder/conv_norm_out")), "encoder/conv_out", padding=1)
        mean, logvar = self.conv(x, "quant_conv").chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        x = self.mid(self.conv(self.conv(z, "post_quant_conv"), "decoder/conv_in", padding=1), "decoder")
        for i in range(2):
            x = self.resnet(x, f"decoder/up_blocks_0/resnets_{i}")
        x = self.f.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.conv(x, "decoder/up_blocks_0/upsamplers_0/conv", padding=1)
        for i in range(2):
            x = self.resnet(x, f"decoder/up_blocks_1/resnets_{i}")
        return self.conv(self.f.silu(self.norm(x, "decoder/conv_norm_out")), "decoder/conv_out", padding=1)


def relative(ours, wanted):
    return np.linalg.norm(np.asarray(ours) - wanted) / np.linalg.norm(wanted)


def test_matches_pytorch():
    torch = pytest.importorskip("torch")
    vae, params = random_vae()
    reference = TorchVAE(torch, params)
    images = random_images(2, 8, 12)
    latents = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 6, 4)), jnp.float32)
    wanted = reference.encode(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))
    for ours, theirs in zip(run(vae, params, images, "encode"), wanted, strict=True):
        assert relative(ours, theirs.permute(0, 2, 3, 1).numpy()) < 1e-5
    decoded = reference.decode(torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2))
    assert relative(run(vae, params, latents, "decode"), decoded.permute(0, 2, 3, 1).numpy()) < 1e-5


def test_leading_axes_are_independent_images():
    vae, params = random_vae()
    images = random_images(2, 3, 8, 8)
    mean, logvar = run(vae, params, images, "encode")
    assert mean.shape == logvar.shape == (2, 3, 4, 4, 4)
    alone = run(vae, params, images[1, 2], "encode")[0]
    np.testing.assert_allclose(mean[1, 2], alone, atol=1e-5)
    assert shapes_of(vae, params, mean, "decode") == images.shape


@pytest.mark.parametrize("patch_size, widths, side", [(2, (16, 32), 4), (4, (16,), 4), (1, (8, 16, 16), 4)])
def test_factor_is_the_downsampling_of_latents(patch_size, widths, side):
    config = VAEConfig(block_out_channels=widths, norm_num_groups=8, patch_size=patch_size)
    vae, params = random_vae(config)
    images = random_images(1, 16, 16)
    assert config.factor == 16 // side
    mean, _ = shapes_of(vae, params, images, "encode")
    assert mean == (1, side, side, 4)
    assert shapes_of(vae, params, images) == images.shape


def test_patches_keep_their_positions():
    """A change in one corner of the image changes the latents of that corner most."""
    vae, params = random_vae(VAEConfig(block_out_channels=(8,), norm_num_groups=8, patch_size=4))
    images = random_images(1, 32, 32)
    before = run(vae, params, images, "encode")[0]
    after = run(vae, params, images.at[:, :4, -4:].multiply(-1), "encode")[0]
    change = np.abs(after - before).sum(-1)[0]
    assert np.unravel_index(change.argmax(), change.shape)[0] <= 2
    assert np.unravel_index(change.argmax(), change.shape)[1] >= 5


def test_patches_must_divide_the_sides():
    vae, params = random_vae(VAEConfig(block_out_channels=(8,), norm_num_groups=8, patch_size=4))
    with pytest.raises(UserError, match="30x32"):
        run(vae, params, random_images(1, 30, 32), "encode")


def test_logvar_is_clamped():
    vae, params = random_vae()
    params["params"]["quant_conv"]["bias"] = jnp.asarray([0.0] * 4 + [1e3, -1e3, 0, 0], jnp.float32)
    _, logvar = run(vae, params, random_images(1, 8, 8), "encode")
    assert np.all(logvar[..., 0] == 20) and np.all(logvar[..., 1] == -30)


def test_bfloat16_computes_near_float32():
    vae, params = random_vae()
    images = random_images(1, 16, 16)
    half = run(VAE(SMALL, jnp.bfloat16), params, images)
    assert half.dtype == jnp.float32
    assert 1e-5 < relative(half, run(vae, params, images)) < 0.05


def test_mid_block_attention_is_the_same_blockwise():
    # more positions than fit in one block
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 36, 32, 32)), jnp.float32)
    plain, blockwise = (SpatialAttention(SMALL, jnp.float32, kernel) for kernel in ("xla", "blockwise"))
    params = jax.jit(plain.init)(jax.random.key(0), x)
    wanted = jax.jit(plain.apply)(params, x)
    assert relative(wanted, x) > 1e-2
    assert relative(jax.jit(blockwise.apply)(params, x), wanted) < 1e-6


def test_sample_posterior_has_its_mean_and_variance():
    mean, logvar = jnp.full((1, 64, 64, 4), 3.0), jnp.full((1, 64, 64, 4), np.log(0.25), jnp.float32)
    sample = sample_posterior(mean, logvar, jax.random.key(0))
    assert abs(float(sample.mean()) - 3) < 0.02 and abs(float(sample.std()) - 0.5) < 0.02
    np.testing.assert_array_equal(sample, sample_posterior(mean, logvar, jax.random.key(0)))


def test_config_roundtrip_and_errors():
    assert VAEConfig.from_dict(SMALL.to_dict()) == SMALL
    sd = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }
    config = vae_config(sd)
    assert config.factor == 8 and config.layers_per_block == 2 and config.norm_num_groups == 32
    for change, message in [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"block_out_channels": [100]}, "block_out_channels"),
        ({"layers_per_blok": 2}, "did you mean 'layers_per_block'"),
        ({"latent_channels": 0}, "latent_channels"),
    ]:
        with pytest.raises(UserError, match=message):
            vae_config({"block_out_channels": [64]} | change)


def test_without_levels_latents_are_folded_pixels_and_nothing_is_lost():
    config = VAEConfig(block_out_channels=(), patch_size=4, latent_channels=48)
    vae, images = VAE(config), random_images(2, 8, 12)
    assert config.factor == 4 and registry.init_params(config, jax.random.key(0)) == {}
    mean, logvar = vae.apply({}, images, method="encode")
    assert mean.shape == (2, 2, 3, 48) and bool((mean[:, 1, 2, :3] == images[:, 4, 8]).all())
    assert bool((sample_posterior(mean, logvar, jax.random.key(0)) == mean).all())
    assert bool((vae.apply({}, mean, method="decode") == images).all())
    with pytest.raises(UserError, match="at least one width.*latent_channels must be 48"):
        VAEConfig(block_out_channels=(), patch_size=4)
