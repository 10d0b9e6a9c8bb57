"""Scaled dot-product attention, in one place, with a choice of kernel.

Every attention of the cascade (spatial, text, temporal, VAE, text encoder) calls `attention`. The kernels
compute the same function and differ in memory and speed:

* `xla`          einsum, softmax, einsum; holds the scores (B, N, Sq, Sk) in float32.
* `dot_product`  `jax.nn.dot_product_attention`, which may pick a fused kernel on a GPU.
* `blockwise`    online softmax over blocks of keys (arXiv 2112.05682); never holds more than one block of scores.
* `flash`        the Pallas TPU kernel; wants sequence lengths that are multiples of 128, no bias. On several
                 devices it must be called with their mesh as the context (`jax.set_mesh`) or in a `shard_map`.
* `auto`         `flash` on a TPU where it fits, `blockwise` where the scores would be large, else `xla`.

Rotary position embedding and the T5-style relative position bias of the temporal attention are here too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lavie_jax.models.placement import HEADS_AXIS, batch_axes, can_place

KERNELS = ("auto", "xla", "dot_product", "blockwise", "flash")
FLASH_BLOCK = 128  # the Pallas kernel's smallest block; other lengths are refused by it
LARGE_SCORES = 2**30  # bytes of float32 scores above which `auto` no longer holds them all
CPU_LOOP = 256  # tokens from which the `xla` kernel takes one head after the other on a CPU
MOVES_ALONE = "moves_alone"  # the name scope of products that compute nothing, which no count of operations shall have
BLOCK = 1024  # queries and keys per block in the blockwise kernel


def attention(
    q: Float[Array, "b sq n k"],
    k: Float[Array, "b sk n k"],
    v: Float[Array, "b sk n k"],
    *,
    bias: Float[Array, "#b #n sq sk"] | None = None,
    causal: bool = False,
    kernel: str = "auto",
) -> Float[Array, "b sq n k"]:
    """softmax(q k^T / sqrt(K) + bias) v, with the softmax in float32 and the result in q's dtype.

    `causal` lets query i see keys 0..i. Raises ValueError for an unknown kernel, or one that cannot take a bias
    or mask.
    """
    if kernel not in KERNELS:
        raise ValueError(f"Unknown attention kernel: {kernel!r}. Choose from {', '.join(KERNELS)}.")
    if kernel == "auto":
        kernel = _choose_kernel(q.shape, k.shape, plain=bias is None and not causal)
    if kernel in ("blockwise", "flash") and (bias is not None or causal):
        raise ValueError(f"The {kernel} attention kernel takes no bias and no causal mask; choose xla or dot_product.")
    if kernel == "xla":
        return _xla(q, k, v, bias, causal)
    if kernel == "dot_product":
        return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=causal)
    return _blockwise(q, k, v) if kernel == "blockwise" else _flash(q, k, v)


def _choose_kernel(q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, plain: bool) -> str:
    batch, sq, heads, _ = q_shape
    sk = k_shape[1]
    if not plain:
        return "xla"
    if _platform() == "tpu" and sq % FLASH_BLOCK == 0 and sk % FLASH_BLOCK == 0 and can_place(batch):
        return "flash"
    return "blockwise" if 4 * batch * heads * sq * sk > LARGE_SCORES else "xla"


def _platform() -> str:
    """What the program is traced for: the devices of the mesh in context, which need not be there, or jax's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _xla(q, k, v, bias, causal):
    q, k, v = (rearrange(x, "b s n k -> b n s k") for x in (q / math.sqrt(q.shape[-1]), k, v))

    def rows(q, k, v):  # of any leading axes: the largest arrays are touched as rarely as can be
        scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("...qs,...sk->...qk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    plain, longest = bias is None and not causal, min(q.shape[2], k.shape[2])
    if plain and longest >= CPU_LOOP and _platform() == "cpu":
        # One head at a time stays in a CPU's cache: three times as fast at 640 tokens.
        heads = [rearrange(x, "b n s k -> (b n) s k") for x in (q, k, v)]
        out = jax.lax.map(lambda head: rows(*head), heads)
        return rearrange(out, "(b n) s k -> b s n k", b=q.shape[0])
    return rearrange(rows(q, k, v), "b n s k -> b s n k")


def _blockwise(q, k, v):
    """Online softmax: running maximum m, denominator d and weighted sum of values o over blocks of keys."""
    batch, sq, heads, width = q.shape
    sk = k.shape[1]
    q_block, k_block = min(BLOCK, sq), min(BLOCK, sk)

    def blocks(x, size):  # (B, S, N, K) -> (S/size, B, size, N, K), zeros after the end
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        return rearrange(x, "b (blocks s) n k -> blocks b s n k", s=size)

    key_blocks = (blocks(k, k_block), blocks(v, k_block))
    key_index = jnp.arange(key_blocks[0].shape[0] * k_block).reshape(-1, k_block)

    def one_query_block(queries):
        @jax.checkpoint  # so that the backward pass recomputes the block's scores instead of keeping them
        def one_key_block(carry, block):
            m, d, o = carry
            keys, values, index = block
            scores = jnp.einsum("bqnk,bsnk->bnqs", queries, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(index < sk, scores / math.sqrt(width), -jnp.inf)
            m_new = jnp.maximum(m, scores.max(-1))
            shrink = jnp.exp(m - m_new)
            weights = jnp.exp(scores - m_new[..., None])
            d = d * shrink + weights.sum(-1)
            o_block = jnp.einsum("bnqs,bsnk->bnqk", weights.astype(values.dtype), values)
            return (m_new, d, o * shrink[..., None] + o_block), None

        rows = (batch, heads, q_block)
        start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, width)))
        (_, d, o), _ = jax.lax.scan(one_key_block, start, (*key_blocks, key_index))
        return rearrange(o / d[..., None], "b n q k -> b q n k").astype(q.dtype)

    out = jax.lax.map(one_query_block, blocks(q, q_block))
    return rearrange(out, "blocks b q n k -> b (blocks q) n k")[:, :sq]


def _flash(q, k, v):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention  # importable on a TPU build alone

    def on_one_device(q, k, v):
        heads_first = "b s n k -> b n s k"
        out = flash_attention(*(rearrange(x, heads_first) for x in (q, k, v)), sm_scale=1 / math.sqrt(q.shape[-1]))
        return rearrange(out, "b n s k -> b s n k")

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return on_one_device(q, k, v)
    # The compiler cannot split a Pallas kernel: every device is handed its own rows and heads.
    split_heads = HEADS_AXIS in mesh.auto_axes and q.shape[2] % mesh.shape[HEADS_AXIS] == 0
    spec = PartitionSpec(batch_axes(mesh), None, HEADS_AXIS if split_heads else None)
    return jax.shard_map(on_one_device, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def rotary_embedding(x: Float[Array, "b t c"], heads: int, rotary_width: int) -> Float[Array, "b t c"]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) of the first `rotary_width` channels of
    every head, before the heads are split: so few channels would fill a third of a TPU's lanes.

    Pairs are interleaved, (0, 1), (2, 3), ...; the position is the frame index; theta is 10000. Raises ValueError for
    heads of an odd width, whose pairs would not lie within them.
    """
    length, width = x.shape[1], x.shape[2] // heads
    if width % 2:
        raise ValueError(f"Rotary embedding turns pairs of channels; heads of {width} have one too many.")
    angles = np.arange(length)[:, None] * np.repeat(rotary_frequencies(rotary_width), 2)  # (T, rotary_width)
    kept = ((0, 0), (0, width - rotary_width))
    cos, sin = np.pad(np.cos(angles), kept, constant_values=1), np.pad(np.sin(angles), kept)
    sin[:, 0::2] *= -1
    cos, sin = (np.tile(a, heads).astype(np.float32) for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + _partners(x) * sin).astype(x.dtype)


def _partners(x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
    """The other channel of each pair, in float32."""
    if _platform() == "tpu":
        # As a product: by the compiler's estimate, swapping lanes costs a fifth of all temporal attention.
        # The matrix is made within the program, which would hold megabytes of constants for each layer otherwise.
        channel = jnp.arange(x.shape[-1])
        swap = (channel[:, None] == (channel ^ 1)).astype(x.dtype)
        with jax.named_scope(MOVES_ALONE):
            return jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    pairs = rearrange(x, "b t (pairs two) -> b t pairs two", two=2)
    return rearrange(pairs[..., ::-1], "b t pairs two -> b t (pairs two)").astype(jnp.float32)


def rotary_frequencies(rotary_width: int) -> np.ndarray:
    """1 / 10000^(2i / rotary_width), i = 0 .. rotary_width/2 - 1: what PyTorch checkpoints store as
    `rotary_emb.freqs`.
    """
    return 1.0 / 10000.0 ** (np.arange(0, rotary_width, 2) / rotary_width)


def relative_position_buckets(length: int, *, buckets: int = 32, max_distance: int = 32) -> np.ndarray:
    """(T, T) int32: which bias query frame i uses for key frame j; T5 (arXiv 1910.10683, sec. 2.1), bidirectional.

    Half of the buckets are for keys that come later. In each half the first half of the buckets is exact, the
    rest grow logarithmically up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # j - i
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    growth = np.log(np.maximum(size, 1) / exact, dtype=np.float32) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)
