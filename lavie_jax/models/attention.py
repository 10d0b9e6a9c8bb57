"""Scaled dot-product attention with a choice of kernel.

Every attention layer of the cascade (spatial, text, temporal, VAE, text encoder) calls `attention`. The kernels
compute the same function and differ in memory and speed:

* `xla`          einsum, softmax, einsum; materializes the scores (B, N, Sq, Sk) in float32.
* `dot_product`  `jax.nn.dot_product_attention` as jax chooses.
* `cudnn`        the same by the flash attention of cuDNN, on NVIDIA GPUs.
* `blockwise`    online softmax over blocks of keys (arXiv 2112.05682); holds one block of scores at a time.
* `flash`        the Pallas TPU kernel; requires sequence lengths that are multiples of 128, and no bias. On several
                 devices, call it with their mesh as the context (`jax.set_mesh`) or inside a `shard_map`.
* `auto`         `flash` on a TPU and `cudnn` on a GPU where they fit, `blockwise` where a device's scores would be
                 large, else `xla`.

This module also has the rotary position embedding and the T5-style relative position bias of temporal attention.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from lavie_jax.models.placement import HEADS_AXIS, batch_axes, can_place, missing_rows, rows_per_device
from lavie_jax.models.precision import accumulator, platform

KERNELS = ("auto", "xla", "dot_product", "cudnn", "blockwise", "flash")
FLASH_BLOCK = 128  # smallest block of the Pallas kernel, which rejects lengths that are not multiples of it
FLASH_LARGEST = 640  # largest block of its forward pass
CUDNN_KEYS = 128  # keys from which `auto` prefers cuDNN; with fewer, the scores are smaller than the features
LARGE_SCORES = 2**30  # bytes of a device's float32 scores above which `auto` does not materialize them
CPU_LOOP = 256  # tokens from which the `xla` kernel processes one head at a time on a CPU
CPU_SCORES = 2**24  # bytes of float32 scores of a head above which it does so for a part of the queries at a time
MOVES_ALONE = "moves_alone"  # name scope of products that only move data, which FLOP counts leave out
BLOCK = 1024  # queries and keys per block in the blockwise kernel


def attention(
    q: Float[Array, "b sq n k"],
    k: Float[Array, "b sk n k"],
    v: Float[Array, "b sk n k"],
    *,
    bias: Float[Array, "#b #n sq sk"] | None = None,
    mask: Bool[Array, "b sk"] | None = None,
    causal: bool = False,
    kernel: str = "auto",
) -> Float[Array, "b sq n k"]:
    """Computes softmax(q k^T / sqrt(K) + bias) v, with the softmax in float32 and the result in q's dtype.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores.
        mask: True for the keys that may be attended to; None for all of them, at no cost. Where every key of a row is
            masked, the result is zero.
        causal: whether query i sees keys 0..i only.
        kernel: one of `KERNELS`.

    Raises:
        ValueError: the kernel is unknown, or does not support a bias or causal attention.
    """
    if kernel not in KERNELS:
        raise ValueError(f"Unknown attention kernel: {kernel!r}. Choose from {', '.join(KERNELS)}.")
    if kernel == "auto":
        plain = bias is None and not causal
        kernel = (
            "cudnn" if plain and mask is None and _fits_cudnn(q, k) else _choose_kernel(q.shape, k.shape, plain=plain)
        )
    if kernel in ("blockwise", "flash") and (bias is not None or causal):
        raise ValueError(
            f"The {kernel} attention kernel supports neither a bias nor causal attention; choose xla or dot_product."
        )
    if kernel == "xla":
        return _xla(q, k, v, bias, mask, causal)
    if kernel in ("dot_product", "cudnn"):
        keys, implementation = None if mask is None else mask[:, None, None, :], "cudnn" if kernel == "cudnn" else None
        options = {"bias": bias, "mask": keys, "is_causal": causal, "implementation": implementation}
        out = jax.nn.dot_product_attention(q, k, v, **options)
        return _zero_where_all_masked(out, mask)
    if kernel == "blockwise":
        return _blockwise(q, k, v, mask)
    return _zero_where_all_masked(_flash(q, k, v, mask), mask)


def _zero_where_all_masked(out: Array, mask: Array | None) -> Array:
    """For kernels that average all values where every key is masked."""
    return out if mask is None else jnp.where(mask.any(-1)[:, None, None, None], out, 0)


def _choose_kernel(q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, plain: bool) -> str:
    batch, sq, heads, _ = q_shape
    sk = k_shape[1]
    if not plain:
        return "xla"
    if platform() == "tpu" and sq % FLASH_BLOCK == 0 and sk % FLASH_BLOCK == 0 and can_place(batch):
        return "flash"
    # Shapes are global here, but a device materializes the scores of its own rows.
    return "blockwise" if 4 * rows_per_device(batch) * heads * sq * sk > LARGE_SCORES else "xla"


def _fits_cudnn(q: Array, k: Array) -> bool:
    """Whether cuDNN's flash attention takes these arrays, forwards and backwards, and this machine has it.

    Heads may have other widths than powers of two, such as Stable Diffusion's 40 and 80; 160 is too wide on most GPUs.
    """
    if platform() not in ("gpu", "cuda") or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if q.shape[-1] % 8 or q.shape[-1] > 128 or q.shape[1] % 2 or k.shape[1] % 2 or k.shape[1] < CUDNN_KEYS:
        return False
    try:
        jax.eval_shape(lambda q, k: jax.nn.dot_product_attention(q, k, k, implementation="cudnn"), q, k)
    except (NotImplementedError, RuntimeError, ValueError):  # no cuDNN, an older one, or an older GPU
        return False
    return True


def _xla(q, k, v, bias, mask, causal):
    q, k, v = (rearrange(x, "b s n k -> b n s k") for x in (q / math.sqrt(q.shape[-1]), k, v))

    def rows(q, k, v):
        """Plain attention for any leading axes, with as few passes as possible over the scores, the largest arrays."""
        scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, jnp.finfo(jnp.float32).min)
        if mask is not None:
            visible = rearrange(mask, "b s -> b 1 1 s")
            scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        if mask is not None:  # for rows without any visible key, whose scores are all the same
            weights = jnp.where(visible, weights, 0)
        out = jnp.einsum("...qs,...sk->...qk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = weights.sum(-1, keepdims=True)
        return (out / (total if mask is None else jnp.where(total == 0, 1, total))).astype(v.dtype)

    plain, longest = bias is None and mask is None and not causal, min(q.shape[2], k.shape[2])
    if plain and longest >= CPU_LOOP and platform() == "cpu":
        # One head at a time fits in a CPU's cache: three times as fast at 640 tokens. With 4096 tokens, a part of the
        # queries at a time is twice as fast, and gives the same bits (benchmarks/cpu_forms.py).
        parts = math.ceil(4 * q.shape[2] * k.shape[2] / CPU_SCORES)
        queries = jnp.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % parts), (0, 0)))
        queries = rearrange(queries, "b n (parts s) k -> (b n) parts s k", parts=parts)
        keys, values = (rearrange(x, "b n s k -> (b n) s k") for x in (k, v))

        def one_head(head):
            """Returns the attention of (parts, s, k) queries."""
            parts, keys, values = head
            return jax.lax.map(lambda part: rows(part, keys, values), parts)

        out = jax.lax.map(one_head, (queries, keys, values))
        return rearrange(out, "(b n) parts s k -> b (parts s) n k", b=q.shape[0])[:, : q.shape[2]]
    return rearrange(rows(q, k, v), "b n s k -> b s n k")


def _blockwise(q, k, v, mask):
    """Online softmax: running maximum m, denominator d and weighted sum of values o over blocks of keys."""
    batch, sq, heads, width = q.shape
    sk = k.shape[1]
    q_block, k_block = min(BLOCK, sq), min(BLOCK, sk)

    def blocks(x, size):  # (B, S, N, K) -> (S/size, B, size, N, K), zeros after the end
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        return rearrange(x, "b (blocks s) n k -> blocks b s n k", s=size)

    key_blocks = (blocks(k, k_block), blocks(v, k_block))
    key_index = jnp.arange(key_blocks[0].shape[0] * k_block).reshape(-1, k_block)
    if mask is None:
        # the first block always has a visible key, so that the maximum is finite from there on
        lowest, visible_blocks = -jnp.inf, key_index
    else:  # finite, so that the difference of two lowest scores is 0 and not NaN
        lowest = jnp.finfo(jnp.float32).min
        padded = jnp.pad(mask, ((0, 0), (0, key_index.size - sk)))
        visible_blocks = rearrange(padded, "b (blocks s) -> blocks b 1 1 s", s=k_block)

    def one_query_block(queries):
        """Returns the attention of a block of queries to all keys, with the softmax accumulated over blocks of keys."""

        @jax.checkpoint  # so that the backward pass recomputes the block's scores instead of keeping them
        def one_key_block(carry, block):
            """Updates the running maximum m, denominator d and output o of the softmax."""
            m, d, o = carry
            keys, values, visible = block
            visible = visible < sk if mask is None else visible
            scores = jnp.einsum("bqnk,bsnk->bnqs", queries, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(visible, scores / math.sqrt(width), lowest)
            m_new = jnp.maximum(m, scores.max(-1))
            shrink = jnp.exp(m - m_new)
            weights = jnp.exp(scores - m_new[..., None])
            if mask is not None:
                weights = jnp.where(visible, weights, 0)
            d = d * shrink + weights.sum(-1)
            wide = accumulator(values.dtype)
            o_block = jnp.einsum("bnqs,bsnk->bnqk", weights.astype(values.dtype), values, preferred_element_type=wide)
            return (m_new, d, o * shrink[..., None] + o_block), None

        rows = (batch, heads, q_block)
        start = (jnp.full(rows, lowest), jnp.zeros(rows), jnp.zeros((*rows, width)))
        (_, d, o), _ = jax.lax.scan(one_key_block, start, (*key_blocks, visible_blocks))
        if mask is not None:
            d = jnp.where(d == 0, 1, d)
        return rearrange(o / d[..., None], "b n q k -> b q n k").astype(q.dtype)

    out = jax.lax.map(one_query_block, blocks(q, q_block))
    return rearrange(out, "blocks b q n k -> b (blocks q) n k")[:, :sq]


def _flash(q, k, v, mask):
    # imported here: not every build of jax has it
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    def on_one_device(q, k, v, mask=None):
        """Calls the kernel, which expects heads before the sequence."""
        # queries see the keys of their own segment: 1, where masked keys are 0
        segments = None if mask is None else SegmentIds(jnp.ones(q.shape[:2], jnp.int32), mask.astype(jnp.int32))
        q, k, v = (rearrange(x, "b s n k -> b n s k") for x in (q, k, v))
        sizes = _flash_blocks(BlockSizes, q.shape[2], k.shape[2])
        out = flash_attention(q, k, v, segment_ids=segments, sm_scale=1 / math.sqrt(q.shape[-1]), block_sizes=sizes)
        return rearrange(out, "b n s k -> b s n k")

    mesh = jax.sharding.get_abstract_mesh()
    masks = () if mask is None else (mask,)
    if not mesh.auto_axes:
        return on_one_device(q, k, v, *masks)
    # The compiler cannot split a Pallas kernel, so every device gets its own rows and heads explicitly.
    split_heads = HEADS_AXIS in mesh.auto_axes and q.shape[2] % mesh.shape[HEADS_AXIS] == 0
    spec = PartitionSpec(batch_axes(mesh), None, HEADS_AXIS if split_heads else None)
    in_specs = (*(spec,) * 3, *(PartitionSpec(batch_axes(mesh)) for _ in masks))
    spread = jax.shard_map(
        on_one_device, in_specs=in_specs, out_specs=spec, axis_names=set(mesh.auto_axes), check_vma=False
    )
    rows, missing = q.shape[0], missing_rows(q.shape[0])
    if not missing:
        return spread(q, k, v, *masks)
    padded = (jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in (q, k, v, *masks))
    return spread(*padded)[:rows]


def _flash_blocks(sizes: Any, queries: int, keys: int) -> Any:
    """Returns the blocks of the Pallas kernel: large ones forwards, and the kernel's own, smallest ones, backwards.

    Instruction bundles that libtpu schedules for all steps of the grid on a v5e, for 8 heads of 40 channels with 2560
    queries and keys: 1.23 M with blocks of 128, 0.57 M with 256, 0.32 M with 512, 0.33 M with 640.
    """
    block_q, block_k = (_largest_block(length) for length in (queries, keys))
    backward = ("q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv", "k_major_dq", "k_dq", "q_dq")
    smallest = {f"block_{name}": FLASH_BLOCK for name in backward}
    return sizes(block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1, **smallest)


def _largest_block(length: int) -> int:
    """The largest block of whole `FLASH_BLOCK`s that divides a length, up to `FLASH_LARGEST`."""
    return max(n for n in range(FLASH_BLOCK, FLASH_LARGEST + 1, FLASH_BLOCK) if length % n == 0)


def rotary_embedding(x: Float[Array, "b t c"], heads: int, rotary_width: int) -> Float[Array, "b t c"]:
    """Rotates the first `rotary_width` channels of every head (RoFormer, arXiv 2104.09864, eq. 34).

    This happens before the heads are split, since the few channels of one head would fill a third of a TPU's lanes.
    Pairs are interleaved, (0, 1), (2, 3), ...; the position is the frame index; theta is 10000.

    Raises:
        ValueError: the heads have an odd width, so that some pair would span two heads.
    """
    length, width = x.shape[1], x.shape[2] // heads
    if width % 2:
        raise ValueError(
            f"Rotary embedding rotates pairs of channels, so the width of a head must be even, not {width}."
        )
    angles = np.arange(length)[:, None] * np.repeat(rotary_frequencies(rotary_width), 2)  # (T, rotary_width)
    kept = ((0, 0), (0, width - rotary_width))
    cos, sin = np.pad(np.cos(angles), kept, constant_values=1), np.pad(np.sin(angles), kept)
    sin[:, 0::2] *= -1
    cos, sin = (np.tile(a, heads).astype(np.float32) for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + _partners(x) * sin).astype(x.dtype)


def _partners(x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
    """Returns x with the two channels of each pair swapped, in float32."""
    if platform() == "tpu":
        # As a matrix product: by the compiler's estimate, swapping lanes would cost a fifth of all temporal attention.
        # The matrix is computed in the program, which would otherwise hold megabytes of constants per layer.
        channel = jnp.arange(x.shape[-1])
        swap = (channel[:, None] == (channel ^ 1)).astype(x.dtype)
        with jax.named_scope(MOVES_ALONE):
            return jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    pairs = rearrange(x, "b t (pairs two) -> b t pairs two", two=2)
    return rearrange(pairs[..., ::-1], "b t pairs two -> b t (pairs two)").astype(jnp.float32)


def rotary_frequencies(rotary_width: int) -> np.ndarray:
    """Returns 1 / 10000^(2i / rotary_width), i = 0 .. rotary_width/2 - 1: `rotary_emb.freqs` of PyTorch checkpoints."""
    return 1.0 / 10000.0 ** (np.arange(0, rotary_width, 2) / rotary_width)


def relative_position_buckets(length: int, *, buckets: int = 32, max_distance: int = 32) -> np.ndarray:
    """Returns the bucket of every distance from query frame i to key frame j, (T, T) int32.

    As in T5 (arXiv 1910.10683, sec. 2.1), bidirectional: half of the buckets are for later keys. In each half, the
    first half of the buckets holds one distance each, and the others grow logarithmically up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # j - i
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    growth = np.log(np.maximum(size, 1) / exact, dtype=np.float32) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)
