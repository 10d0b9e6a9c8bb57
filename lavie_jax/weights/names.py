"""PyTorch parameter names <-> the paths of the Flax parameters, both ways.

The rule is mechanical: a number joins the name before it (`attentions.1` -> `attentions_1`), the other dots separate
modules, and the leaf `weight` becomes `kernel` (with the input and output axes last), `scale` or `embedding`. The
table `DIALECTS` has the exceptions: modules that some files name differently. Buffers (`rotary_emb.freqs`,
`position_ids`) get a path too, but are not parameters of our models.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from lavie_jax.errors import UserError


class Row(NamedTuple):
    """A renaming: a regex and its replacement, from the file's names to ours, and from ours to the file's."""

    theirs: str
    to_ours: str
    ours: str
    to_theirs: str


# part -> dialect -> rows; paths mirror the names of the dialect "diffusers"
DIALECTS: dict[str, dict[str, tuple[Row, ...]]] = {
    "unet": {
        "diffusers": (),  # also LaVie's super-resolution stage
        "lavie": (
            Row(r"\.attn_temp\.", ".attn_temporal.", r"\.attn_temporal\.", ".attn_temp."),
            Row(r"\.norm_temp\.", ".norm_temporal.", r"\.norm_temporal\.", ".norm_temp."),
        ),
    },
    "vae": {
        "diffusers": (),
        "old": (
            Row(r"\.query\.", ".to_q.", r"\.to_q\.", ".query."),
            Row(r"\.key\.", ".to_k.", r"\.to_k\.", ".key."),
            Row(r"\.value\.", ".to_v.", r"\.to_v\.", ".value."),
            Row(r"\.proj_attn\.", ".to_out.0.", r"\.to_out\.0\.", ".proj_attn."),
        ),
    },
    "text_encoder": {
        "diffusers": (),  # transformers from version 5 on
        "text_model": (Row(r"^text_model\.", "", r"^", "text_model."),),
        "embed_tokens": (  # T5 without its decoder, with which it shares the table
            Row(r"^encoder\.embed_tokens\.", "shared.", r"^shared\.", "encoder.embed_tokens."),
        ),
    },
    "clip": {"diffusers": ()},  # transformers' names; `clip.py` renames OpenAI's
}

# Temporal layers that write into the residual stream. They start at zero, so that a video model starts as its image
# model.
ZERO_AT_FIRST = re.compile(
    r"(^|/)(attn_temporal/to_out_0|motion_embedding_temporal/out|(key|known)_frame_embedding_temporal/conv"
    r"|velocity_temporal/out|(key|known)_frame_skip_temporal/matrix|shift_conv|resblock_temporal/conv2)/"
)
BUFFER = re.compile(r"(^|[/._])(rotary_emb[/.]freqs|position_ids)$")
EMBEDDING = re.compile(r"(embedding|relative_attention_bias|^shared)\.weight$")
NUMBER_IN_NAME = re.compile(r"^(linear|wi)_\d+$")  # names with an underscore before the number in PyTorch too
CONVOLUTION_THAT_IS_LINEAR = re.compile(r"^(en|de)coder\.mid_block\.attentions\.0\.to_\w+(\.0)?\.weight$")

# by number of axes: linear (O, I), convolution (O, I, h, w), convolution over time (O, I, t, h, w)
TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


def is_buffer(name_or_path: str) -> bool:
    """Whether this is a constant of a PyTorch module: not a parameter of ours, but kept for the export."""
    return BUFFER.search(name_or_path) is not None


def dialect_of(part: str, names: Iterable[str]) -> str:
    """Returns the dialect of `DIALECTS[part]` that the names of a file are in."""
    names = list(names)
    for dialect, rows in DIALECTS[part].items():
        if any(re.search(row.theirs, name) for row in rows for name in names):
            return dialect
    return "diffusers"


def from_torch(part: str, name: str, array):
    """Returns (path, array) of a PyTorch tensor of the `unet`, `vae` or `text_encoder`, in any dialect.

    `array` is a numpy array or a `Tensor`; a transposed view of it is returned.

    Raises:
        UserError: no layer of ours has a weight with that number of axes.
    """
    for rows in DIALECTS[part].values():
        for row in rows:
            name = re.sub(row.theirs, row.to_ours, name)
    modules, _, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).replace(".", "/").rpartition("/")
    if part == "vae" and array.ndim == 4 and CONVOLUTION_THAT_IS_LINEAR.match(name):
        array = array.reshape(array.shape[:2])  # old files have 1x1 convolutions where the attention has linear layers
    if leaf == "weight":
        if EMBEDDING.search(name) and array.ndim == 2:
            leaf = "embedding"
        elif array.ndim == 1:
            leaf = "scale"
        elif array.ndim in TO_FLAX:
            leaf, array = "kernel", array.transpose(TO_FLAX[array.ndim])
        else:
            raise UserError(f"{name} has {array.ndim} axes, shape {tuple(array.shape)}; a weight has 1, 2, 4 or 5.")
    return f"{modules}/{leaf}" if modules else leaf, array


def to_torch(part: str, path: str, array, dialect: str = "diffusers"):
    """Returns (name, array) in PyTorch's naming and axis order: the inverse of `from_torch`, in the given dialect."""
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        array = array.transpose(TO_TORCH[array.ndim])
    if leaf in ("kernel", "scale", "embedding"):
        leaf = "weight"
    modules = [m if NUMBER_IN_NAME.match(m) else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    name = ".".join([*modules, leaf])
    for row in DIALECTS[part][dialect]:
        name = re.sub(row.ours, row.to_theirs, name)
    return name, array
