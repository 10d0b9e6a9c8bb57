"""Removes what trainers add to a model's tensors: wrappers and a prefix of names, averages, schedule buffers.

Each function returns the tensors under plain names, and notes for the user on what it did.
"""

import re
from collections.abc import Mapping

from lavie_jax.weights.safetensors_io import Tensor

Tensors = dict[str, Tensor]

# Names of which every file of a part has one. What comes before it is the prefix of all names.
ANCHORS = {
    "unet": ("time_embedding.linear_1.weight",),
    "vae": ("encoder.conv_in.weight",),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "shared.weight",
        "encoder.embed_tokens.weight",  # T5
    ),  # fmt: skip
    "compvis": ("model.diffusion_model.input_blocks.0.0.weight",),
    "compvis vae": ("encoder.down.0.block.0.conv1.weight",),
}
# Modules of torch.compile, FSDP and DeepSpeed, which can be anywhere in a name.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# Other modules of a whole pipeline, by the requested part.
OTHER_MODULES = {
    "unet": ("vae.", "first_stage_model.", "text_encoder.", "cond_stage_model."),
    "vae": ("loss.",),  # the discriminator that trained it
    "text_encoder": (
        "vision_model.",
        "visual_projection.",
        "text_projection.",
        "logit_scale",
        "decoder.",
        "lm_head.",
    ),
    "compvis vae": ("loss.",),
}
T5_TABLE = "encoder.embed_tokens.weight"
# Constants of the diffusion process, and counters of trainers.
BUFFER = re.compile(
    r"(ddim_\w+|betas|alphas|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev|_next)?|sqrt_\w+|log_\w+"
    r"|posterior_\w+|lvlb_weights|logvar|p2_loss_weight|loss_weights?|scale_factor|sigmas|log_sigmas|timesteps"
    r"|num_timesteps|global_step|step|epoch|initted|decay|num_updates|v_posterior|snr|zero_terminal_snr)"
)
AVERAGES = re.compile(r"^(model_ema|ema_model|ema|averaged_model|unet_ema|ema_unet)\.(?:(?:module|model|shadow)\.)?")
RAW = re.compile(r"^(?:module\.)?(?:online_model|model|unet)\.")


def unwrap(part: str, tensors: Mapping[str, Tensor], *, ema: bool = True) -> tuple[Tensors, list[str]]:
    """Returns the tensors of a part under the names that the part has by itself, and notes.

    Args:
        part: a key of `ANCHORS`.
        tensors: the file's tensors.
        ema: whether moving averages beside the weights take their place.
    """
    unwrapped, notes = _without_wrappers(tensors)
    unwrapped, more = choose_averages(unwrapped, ema=ema)
    notes += more
    prefix = _prefix(part, unwrapped)
    if prefix:
        count = sum(name.startswith(prefix) for name in unwrapped)
        plain = {name.removeprefix(prefix): tensor for name, tensor in unwrapped.items()}
        if len(plain) == len(unwrapped):
            unwrapped = plain
            notes.append(f"took the prefix {prefix!r} off {count} names")
    levels = (
        [prefix[: dot + 1] for dot in (-1, *(m.start() for m in re.finditer(r"\.", prefix or "")))] if prefix else [""]
    )
    others = tuple(level + module for level in levels for module in OTHER_MODULES.get(part, ()))
    left_out = [] if prefix is None else [name for name in unwrapped if name.startswith(others)]
    if left_out:
        modules = sorted({name.split(".")[0] for name in left_out})
        notes.append(f"ignored {len(left_out)} tensors of other models in it: {', '.join(modules)}")
    if part == "text_encoder" and {"shared.weight", T5_TABLE} <= unwrapped.keys():  # one tensor under two names
        left_out.append(T5_TABLE)
    skipped = {*left_out, *(name for name in unwrapped if BUFFER.fullmatch(name.rpartition("diffusion.")[2]))}
    return {name: tensor for name, tensor in unwrapped.items() if name not in skipped}, notes


def _without_wrappers(tensors: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    wrapped = [name for name in tensors if WRAPPERS.search(name)]
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if not wrapped or len(plain) != len(tensors):
        return dict(tensors), []
    words = sorted({match[1] for name in wrapped for match in WRAPPERS.finditer(name)})
    return plain, [f"took {', '.join(words)} off {len(wrapped)} names"]


def _prefix(part: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the prefix under which most names are, "" for none, or None when no name fits the part."""
    found = {
        name.removesuffix(anchor)
        for anchor in ANCHORS[part]
        for name in tensors
        if name == anchor or name.endswith(f".{anchor}")
    }
    if part == "text_encoder":  # whose own names may begin with text_model
        found = {prefix.removesuffix("text_model.") for prefix in found}
    if "" in found or not found:
        return "" if found else None
    return max(sorted(found), key=lambda prefix: sum(name.startswith(prefix) for name in tensors))


def choose_averages(tensors: Mapping[str, Tensor], *, ema: bool) -> tuple[Tensors, list[str]]:
    """Replaces weights by their moving averages, stored beside them under names like `model_ema.*`.

    Stable Diffusion's original code removes the dots from the averages' names, so names are compared without dots.
    """
    averages = {name: tensor for name, tensor in tensors.items() if AVERAGES.match(name)}
    raw = {name: tensor for name, tensor in tensors.items() if name not in averages}
    if not averages or not any(tensor.ndim for tensor in raw.values()):
        return dict(tensors), []
    by_key = {AVERAGES.sub("", name).replace(".", ""): name for name in averages}
    matched = {}
    for name, tensor in raw.items():
        other = by_key.get(RAW.sub("", name).replace(".", ""))
        if other is not None and averages[other].shape == tensor.shape:
            matched[name] = other
    prefix = next(iter(averages)).split(".")[0]
    if not ema:
        note = f"used the weights themselves, not the {len(matched)} moving averages beside them ({prefix}.*)"
        return raw, [note] if matched else []
    notes = []
    if matched:
        notes.append(
            f"used the {len(matched)} moving averages ({prefix}.*) instead of the weights beside them (--no-ema)"
        )
    unused = [
        n for n, t in averages.items() if n not in matched.values() and not BUFFER.fullmatch(n.rpartition(".")[2])
    ]
    if unused:
        notes.append(f"ignored {len(unused)} moving averages that match no weight, such as {unused[0]}")
    return raw | {name: averages[other] for name, other in matched.items()}, notes
