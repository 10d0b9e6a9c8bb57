"""Sharding of parameters and batches over 8 virtual devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lavie_jax import parallel
from lavie_jax.errors import UserError
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.training import diffusion

SPLIT = (
    "import jax; from lavie_jax import parallel; print(parallel.split_cpu(), jax.device_count(), parallel.split_cpu())"
)


@pytest.mark.parametrize(
    ("variables", "cores", "expected"),
    [
        ({}, 2, "True 2 True"),
        ({}, 1, "False 1 False"),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 2, "False 3 False"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 2, "False 4 False"),
    ],
)
def test_a_cpu_of_several_cores_is_split_into_two_devices(variables, cores, expected):
    """Unless the number of devices is given, or devices are in use."""
    code = f"import os; os.sched_getaffinity = lambda _: range({cores}); {SPLIT}"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert out.stdout.strip() == expected, out.stderr


def test_minus_one_means_the_remaining_devices():
    mesh = parallel.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"fsdp": 16}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"data": -1, "fsdp": 3}]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes):
    with pytest.raises(UserError, match="mesh data="):
        parallel.make_mesh(**axes)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/unet/mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel", (8, 8), P("fsdp", "tensor")),
        ("opt_state/1/0/mu/unet/mid_block/attn1/to_out_0/kernel", (8, 8), P("tensor", "fsdp")),
        ("ema/unet/down_blocks_0/resnets_0/conv1/kernel", (3, 3, 8, 16), P(None, None, None, "fsdp")),
        ("params/unet/conv_out/kernel", (3, 3, 8, 3), P(None, None, "fsdp", None)),  # 3 channels cannot be split
        ("params/unet/conv_in/kernel", (3, 3, 5, 3), P(None, None, None, None)),
        ("params/unet/ff/net_0/proj/kernel", (5, 8), P(None, "tensor")),  # no axis is left for fsdp
        ("params/unet/conv_in/bias", (16,), P(None)),
        ("step", (), P()),
    ],
)
def test_rules_match_paths(path, shape, expected):
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    assert parallel.spec(path, shape, mesh) == expected


def test_every_kind_of_large_kernel_is_split_by_fsdp():
    """A rule that misses a kind of layer would silently replicate it on every device."""
    config = UNetConfig(
        block_out_channels=(32, 64), attention_levels=(True, True), attention_heads=(2, 2),
        only_cross_attention=(False, False), cross_attention_dim=32, temporal_attention="before_ff",
        temporal_position=True,
    )  # fmt: skip
    inputs = jnp.zeros((1, 1, 4, 4, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 2, 32))
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)["params"]
    mesh = parallel.make_mesh(data=1, fsdp=8)
    placed = parallel.shardings({"params": params}, mesh)
    total, local = 0, 0
    for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        total += np.prod(x.shape)
        local += np.prod(s.shard_shape(x.shape))
    assert local / total < 0.16  # an eighth, plus biases and norms


def temporary_bytes(f, params, inputs, **axes) -> int:
    """Returns the bytes of temporaries of `f(params, inputs)` on one of 8 devices."""
    mesh = parallel.make_mesh(**axes)
    compiled = jax.jit(
        f, in_shardings=(parallel.shardings({"params": params}, mesh)["params"], parallel.batch_sharding(mesh)),
        compiler_options={"xla_backend_optimization_level": 0},
    )  # fmt: skip
    with jax.set_mesh(mesh):
        return compiled.lower(params, inputs).compile().memory_analysis().temp_size_in_bytes


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.heavy  # the next test is of the same kind
def test_sharded_weights_leave_every_row_on_its_device():
    """The compiler must gather weights, not the batch. Without constraints it splits the channels of all rows, which
    multiplies the memory by the number of devices."""
    config = UNetConfig(
        block_out_channels=(32, 64), attention_levels=(False, True), attention_heads=(2, 2), layers_per_block=1,
        only_cross_attention=(False, False), cross_attention_dim=32, norm_num_groups=8, temporal_attention="before_ff",
    )  # fmt: skip
    unet, inputs = UNet(config), (zeros(8, 3, 48, 48, 4), zeros(8, dtype=jnp.int32), zeros(8, 2, 32))
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]

    def predict(params, inputs):
        return unet.apply({"params": params}, *inputs)

    assert temporary_bytes(predict, params, inputs, fsdp=8) < 1.3 * temporary_bytes(predict, params, inputs, data=8)


def test_frames_are_encoded_on_the_devices_of_their_rows(monkeypatch):
    """Frames are encoded in parts, all rows at the same time, so that no device gathers rows of others."""
    vae, frames = VAE(VAEConfig(block_out_channels=(16,), norm_num_groups=4, patch_size=2)), zeros(8, 6, 32, 32, 3)
    params = jax.eval_shape(vae.init, jax.random.key(0), zeros(8, 32, 32, 3))["params"]

    def encode(params, frames):
        return diffusion.encode_frames(vae, params, frames)

    monkeypatch.setattr(diffusion, "VAE_PIXELS", 2 * 32 * 32)
    in_parts = temporary_bytes(encode, params, frames, fsdp=8)
    monkeypatch.setattr(diffusion, "VAE_PIXELS", 6 * 32 * 32)
    assert in_parts < 0.6 * temporary_bytes(encode, params, frames, data=8)


def test_the_tensor_axis_does_not_split_the_frames_to_encode(monkeypatch):
    """Each of its devices has all rows: eight devices, two of which share the rows, encode two frames at a time."""
    vae, frames = VAE(VAEConfig(block_out_channels=(16,), norm_num_groups=4, patch_size=2)), zeros(8, 6, 32, 32, 3)
    params = jax.eval_shape(vae.init, jax.random.key(0), zeros(8, 32, 32, 3))["params"]
    monkeypatch.setattr(diffusion, "VAE_PIXELS", 8 * 32 * 32)
    with jax.set_mesh(parallel.make_mesh(data=2, tensor=4)):
        program = str(
            jax.make_jaxpr(lambda params, frames: diffusion.encode_frames(vae, params, frames))(params, frames)
        )
    assert "length=3" in program


def test_put_and_gather_are_inverse_under_any_sharding():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    tree = {"a": {"kernel": np.arange(64.0, dtype=np.float32).reshape(4, 16)}, "b": np.float32(3)}
    placed = parallel.put(tree, parallel.shardings(tree, mesh))
    assert not placed["a"]["kernel"].is_fully_replicated
    back = parallel.gather(placed)
    np.testing.assert_array_equal(back["a"]["kernel"], tree["a"]["kernel"])
    assert back["b"] == 3


def test_batch_is_split_over_data_and_fsdp():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    batch = parallel.put_batch({"video": np.zeros((8, 2, 4, 4, 3), np.float32)}, mesh)
    assert batch["video"].addressable_shards[0].data.shape == (1, 2, 4, 4, 3)


def test_a_host_loads_the_rows_of_its_devices():
    assert parallel.local_rows(16, parallel.make_mesh(data=2, fsdp=4)) == list(range(16))
    half = jax.sharding.NamedSharding(parallel.make_mesh(data=2, fsdp=4), P(("data", "fsdp")))
    rows_of = {s.device: s.index[0] for s in jax.device_put(jnp.arange(16), half).addressable_shards}
    assert sorted((rows.start, rows.stop) for rows in rows_of.values()) == [(i, i + 2) for i in range(0, 16, 2)]


def test_hosts_that_differ_get_an_error_with_the_field(monkeypatch):
    """The other host's digests are simulated; tests/test_train.py has two real hosts."""
    ours, theirs = {"config.seed": 0, "code": "a", "data": "x"}, {"config.seed": 1, "code": "a", "data": "y"}
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", lambda x: sent.append(x) or np.stack([x, x]))
    parallel.check_hosts_are_consistent(theirs)
    others = iter(list(sent))
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", lambda x: np.stack([x, next(others)]))
    with pytest.raises(UserError, match=r"differ in config.seed, data; on host 0: config.seed = 0, data = x"):
        parallel.check_hosts_are_consistent(ours)
    others = iter(list(sent))
    with pytest.raises(UserError, match="differ in the fields of their configs"):
        parallel.check_hosts_are_consistent({**ours, "config.more": 1})


@pytest.mark.parametrize(("batch", "accumulate"), [(12, 1), (8, 2), (0, 1), (8, 0)])
def test_batch_that_the_devices_do_not_divide_is_refused(batch, accumulate):
    mesh = parallel.make_mesh(data=2, fsdp=4)
    with pytest.raises(UserError, match=f"batch={batch}"):
        parallel.check_batch(batch, mesh, accumulate=accumulate)


def test_hosts_that_would_share_rows_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    parallel.check_batch(8, parallel.make_mesh(data=2, fsdp=2, tensor=2))
    with pytest.raises(UserError, match="multiple of the 4 hosts"):
        parallel.check_batch(8, parallel.make_mesh(data=2, tensor=4))
