"""The attention kernels agree, and the position encodings match their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from lavie_jax import parallel
from lavie_jax.models import attention as attention_module
from lavie_jax.models.attention import attention, relative_position_buckets, rotary_embedding


def qkv(sq, sk, heads=2, width=8):
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=(2, s, heads, width)), jnp.float32)  # noqa: E731
    return draw(sq), draw(sk), draw(sk)


def plain(q, k, v, bias=0.0):
    """The definition of attention, in float64 numpy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqnk,bsnk->bnqs", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqs,bsnk->bqnk", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("lavie_jax.models.attention.BLOCK", 32)


@pytest.mark.parametrize("kernel", ["xla", "dot_product", "blockwise", "auto"])
@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (16, 77), (70, 50), (32, 64)])
def test_kernels_agree_with_the_definition(kernel, sq, sk, small_blocks):
    q, k, v = qkv(sq, sk)
    np.testing.assert_allclose(attention(q, k, v, kernel=kernel), plain(q, k, v), atol=2e-6)


@pytest.mark.parametrize("parts", [2, 3])
def test_queries_are_taken_in_parts_on_a_cpu(parts, monkeypatch):
    """Where the scores of a head are large: the same bits."""
    q, k, v = qkv(300, 256)
    whole = attention(q, k, v, kernel="xla")
    monkeypatch.setattr(attention_module, "CPU_SCORES", 4 * 300 * 256 // parts)
    text = jax.jit(lambda *x: attention(*x, kernel="xla")).lower(q, k, v).as_text()
    assert f"tensor<{300 // parts}x256xf32>" in text and "tensor<300x256xf32>" not in text
    np.testing.assert_array_equal(attention(q, k, v, kernel="xla"), whole)
    np.testing.assert_allclose(whole, plain(q, k, v), rtol=1e-5, atol=1e-5)


def test_blockwise_gradients(small_blocks):
    q, k, v = qkv(50, 70, heads=1)
    loss = lambda args, kernel: jnp.square(attention(*args, kernel=kernel)).sum()  # noqa: E731
    grads = lambda kernel: jax.jit(jax.grad(loss), static_argnums=1)((q, k, v), kernel)  # noqa: E731
    for ours, theirs in zip(grads("blockwise"), grads("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_flash_runs_on_the_interpreter():
    q, k, v = qkv(128, 256, heads=1, width=16)
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(attention(q, k, v, kernel="flash"), plain(q, k, v), atol=1e-5)


def lowered_for_tpu(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("length", "block"), [(128, 128), (640, 640), (2560, 640), (512, 512), (1408, 128)])
def test_blocks_of_flash_attention_divide_the_sequence(length, block):
    assert attention_module._largest_block(length) == block


def lowered_for_cuda(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cudnn(monkeypatch):
    """Traces as on a Hopper GPU with cuDNN, without one."""
    from jax._src.cudnn import fused_attention_stablehlo as stablehlo

    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)


def arrays(sq, sk, width, dtype):
    return [jax.ShapeDtypeStruct((2, length, 8, width), dtype) for length in (sq, sk, sk)]


@pytest.mark.parametrize(
    ("sq", "sk", "width", "dtype", "fused"),
    [
        (2560, 2560, 40, jnp.bfloat16, True),
        (640, 1280, 80, jnp.float16, True),
        (2560, 2560, 40, jnp.float32, False),
        (160, 160, 160, jnp.bfloat16, False),  # Stable Diffusion's deepest level
        (2560, 77, 40, jnp.bfloat16, False),  # text
        (2560, 2560, 36, jnp.bfloat16, False),
    ],
)
def test_on_a_gpu_auto_calls_cudnn_where_it_applies(sq, sk, width, dtype, fused, cudnn):
    loss = lambda *qkv: attention(*qkv).astype(jnp.float32).sum()  # noqa: E731
    for f in (attention, jax.grad(loss)):
        assert ("__cudnn$fmha" in lowered_for_cuda(f, *arrays(sq, sk, width, dtype))) == fused


def test_a_gpu_without_cudnn_or_with_a_mask_uses_the_other_kernels(cudnn, monkeypatch):
    args = arrays(256, 256, 40, jnp.bfloat16)
    masked = lambda q, k, v: attention(q, k, v, mask=jnp.ones((2, 256), bool))  # noqa: E731
    assert "__cudnn" not in lowered_for_cuda(masked, *args)
    monkeypatch.undo()
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    assert "custom_call" not in lowered_for_cuda(attention, *args)


@pytest.mark.parametrize(("batch", "heads"), [(8, 2), (8, 3), (3, 2)])
def test_flash_on_a_mesh_is_split_by_rows_and_heads(batch, heads, monkeypatch):
    """Lowering fails for a Pallas kernel, or its gradient, that the compiler would have to partition."""
    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")  # which `auto` calls
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    x = jax.ShapeDtypeStruct((batch, 128, heads, 64), jnp.bfloat16, sharding=parallel.replicated(mesh))
    grad = jax.grad(lambda x: attention(x, x, x).astype(jnp.float32).sum())
    with jax.set_mesh(mesh):
        text = lowered_for_tpu(grad, x)
    fits = batch % 4 == 0
    assert ("tpu_custom_call" in text) == fits
    # the shape on one device, heads first
    assert (f"tensor<{batch // 4}x{1 if heads == 2 else heads}x128x64xbf16>" in text) == fits
    assert "tpu_custom_call" not in lowered_for_tpu(grad, x)  # without a mesh, the sharding of rows is unknown


def test_the_kernel_is_chosen_by_the_rows_of_a_device():
    """Text attention of the full-size base at 40x64 latents: 16 frames, 8 heads, 77 tokens, 12 MiB of scores a clip."""

    def chosen(clips):
        return attention_module._choose_kernel((clips * 16, 2560, 8, 40), (clips * 16, 77, 8, 40), plain=True)

    assert chosen(10) == "xla" and chosen(11) == "blockwise"
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=4)):
        assert chosen(80) == "xla" and chosen(88) == "blockwise"
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=2, tensor=2)):
        assert chosen(40) == "xla" and chosen(44) == "blockwise"

    def inside(x):
        return jnp.full_like(x, chosen(11) == "blockwise")

    # where the shapes are those of a device
    mesh = parallel.make_mesh(data=8)
    split = jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.jit(split)(jnp.zeros(8)).all()


def test_flash_on_a_mesh_is_right():
    q, k, v = (jnp.concatenate([x, 2 * x]) for x in qkv(128, 128))
    mesh, mask = parallel.make_mesh(data=4, tensor=2), jnp.arange(128) < jnp.array([128, 5, 0, 70])[:, None]
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(mesh):
        masked = jax.jit(lambda *x, mask: attention(*x, mask=mask, kernel="flash"))(q, k, v, mask=mask)
        out = jax.jit(lambda *x: attention(*x, kernel="flash"))(q, k, v)
    np.testing.assert_allclose(out, plain(q, k, v), atol=1e-5)
    np.testing.assert_allclose(masked, attention(q, k, v, mask=mask, kernel="xla"), atol=1e-5)


def test_bias_and_causal_mask():
    q, k, v = qkv(6, 6)
    bias = np.random.default_rng(1).normal(size=(1, 2, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(attention(q, k, v, bias=jnp.asarray(bias)), plain(q, k, v, bias), atol=1e-5)
    mask = np.where(np.tril(np.ones((6, 6))), 0.0, -1e30)
    np.testing.assert_allclose(attention(q, k, v, causal=True), plain(q, k, v, mask), atol=1e-5)


KEY_MASK = np.arange(70) < np.array([70, 33, 0])[:, None]  # all keys, some blocks of them, none


@pytest.mark.parametrize("kernel", ["xla", "dot_product", "blockwise", "auto"])
def test_masked_keys_are_as_if_absent(kernel, small_blocks):
    """Output and gradients of each row equal those of its visible keys alone; without any, they are zero."""
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(3, s, 2, 8)), jnp.float32) for s in (40, 70, 70, 40))

    @jax.jit
    def run(args, mask, weights):
        def weighted(args):
            out = attention(*args, mask=mask, kernel=kernel)
            return (out * weights).sum(), out

        gradients, out = jax.grad(weighted, has_aux=True)(args)
        return out, gradients

    out, (dq, dk, dv) = run((q, k, v), jnp.asarray(KEY_MASK), weights)
    for row, visible in enumerate(KEY_MASK.sum(1)):
        if not visible:
            assert not any(np.any(x[row]) for x in (out, dq, dk, dv))
            continue
        alone = tuple(x[None, row] for x in (q, k[:, :visible], v[:, :visible]))
        expected, gradients = run(alone, None, weights[None, row])
        np.testing.assert_allclose(out[row], expected[0], atol=1e-5)
        for ours, theirs in zip((dq, dk[:, :visible], dv[:, :visible]), gradients, strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], atol=1e-5)
        assert not any(np.any(x[row, visible:]) for x in (dk, dv))


@pytest.mark.heavy
def test_masked_keys_are_as_if_absent_in_flash_attention():
    q, k, v = qkv(128, 256, heads=1, width=16)
    mask = jnp.arange(256) < jnp.array([100, 0])[:, None]

    def loss(args, mask, kernel):
        out = attention(*args, mask=mask, kernel=kernel)
        return jnp.square(out).sum(), out

    run = jax.value_and_grad(loss, has_aux=True)
    (_, wanted), wanted_gradients = run((q, k, v), mask, "xla")
    with pltpu.force_tpu_interpret_mode():
        (_, out), gradients = run((q, k, v), mask, "flash")
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert np.any(out[0]) and not np.any(out[1])
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_mask_and_a_bias_apply_together():
    q, k, v = qkv(6, 6)
    bias = np.random.default_rng(1).normal(size=(1, 2, 6, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([4, 6])[:, None]
    expected = plain(q, k, v, bias + np.where(mask, 0, -1e30)[:, None, None])
    for kernel in ("xla", "dot_product", "auto"):
        out = attention(q, k, v, bias=jnp.asarray(bias), mask=jnp.asarray(mask), kernel=kernel)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_unknown_or_unfit_kernels_are_refused():
    q, k, v = qkv(4, 4)
    with pytest.raises(ValueError, match="Choose from auto"):
        attention(q, k, v, kernel="fast")
    with pytest.raises(ValueError, match="neither a bias"):
        attention(q, k, v, causal=True, kernel="blockwise")


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.broadcast_to(jnp.asarray(rng.normal(size=80), jnp.float32), (1, 9, 80)) for _ in range(2))
    q, k = (rearrange(rotary_embedding(x, 2, 32), "b t (n k) -> b t n k", n=2) for x in (q, k))
    scores = np.einsum("bqnk,bsnk->qs", q, k)
    for distance in range(-4, 5):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, np.full(len(diagonal), diagonal[0]), rtol=1e-4, atol=1e-4)
    assert np.ptp(scores[0]) > 0.1
    np.testing.assert_array_equal(q[..., 32:], jnp.broadcast_to(q[:, :1, :, 32:], (1, 9, 2, 8)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_embedding_is_the_same_on_a_tpu(dtype, monkeypatch):
    """The first pair of each head rotates by the frame index in radians, bit-identically on a TPU."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 24)), dtype)
    result = rotary_embedding(x, 2, 8)
    pair = np.asarray(x, np.float64)[..., [0, 12]] + 1j * np.asarray(x, np.float64)[..., [1, 13]]
    pair *= np.exp(1j * np.arange(5))[:, None]
    wanted = np.stack([pair.real, pair.imag], -1)
    given = np.asarray(result, np.float64)[..., [0, 1, 12, 13]].reshape(wanted.shape)
    np.testing.assert_allclose(given, wanted, atol=1e-6 if dtype == jnp.float32 else 2e-2)
    monkeypatch.setattr("lavie_jax.models.attention.platform", lambda: "tpu")
    np.testing.assert_array_equal(rotary_embedding(x, 2, 8), result)
    with pytest.raises(ValueError, match="must be even, not 3"):
        rotary_embedding(x[..., :6], 2, 2)


def test_relative_position_buckets():
    buckets = relative_position_buckets(64)
    assert buckets.min() == 0 and buckets.max() == 31
    assert (np.diag(buckets) == 0).all()
    later = buckets[0]  # keys after frame 0: exact up to 7, then wider and wider, monotonic
    assert later[:9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert (np.diff(later[1:]) >= 0).all() and later[33:].tolist() == [31] * 31
    assert (buckets[:, 0] == np.where(later > 0, later - 16, 0)).all()
