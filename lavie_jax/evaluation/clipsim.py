"""CLIPSIM (arXiv 2104.14806): how well the frames of videos fit their captions, by CLIP's image and text encoders.

The cosine of each frame and the caption, averaged over the frames of a video, then over the videos; neither clamped nor
times 100.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image
from tqdm.auto import tqdm

from lavie_jax import parallel
from lavie_jax.data.tokens import load_tokenizer, tokenize
from lavie_jax.errors import UserError
from lavie_jax.evaluation.protocols import ClipsimKnobs
from lavie_jax.evaluation.videos import Video, batches
from lavie_jax.models.clip import CLIP, CLIPConfig
from lavie_jax.text_files import read_json, read_text
from lavie_jax.weights import folder_hash, load_part
from lavie_jax.weights.folder import part_dir

BATCH = 16  # frames per device
# Per-channel mean and deviation of CLIP's training images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(
    frame: UInt8[np.ndarray, "h w 3"], side: int, rounding: str = "floor"
) -> UInt8[np.ndarray, "side side 3"]:
    """Scales the shorter side to `side` and cuts the centre, as CLIP's own preprocessing does.

    Bicubic with antialiasing; the longer side is rounded down. An odd remainder of the crop is rounded down by
    transformers ("floor"), and to the nearest even by torchvision ("nearest"), which OpenAI uses.
    """
    picture = Image.fromarray(np.ascontiguousarray(frame))
    width, height = picture.size
    short = min(width, height)
    size = tuple(side if n == short else int(side * n / short) for n in (width, height))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((n - side) / 2)) if rounding == "nearest" else (n - side) // 2 for n in size)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


class Scorer:
    """CLIP from a weights folder, on this process's devices."""

    def __init__(self, folder: Path):
        part = load_part(folder, "clip", dtype=np.float32)
        self.config: CLIPConfig = part.config
        self.hash = folder_hash(folder)
        self.tokenizer = load_tokenizer(part_dir(folder, "tokenizer"))
        self.mesh = parallel.make_mesh(devices=parallel.local_devices())
        self.params = parallel.put(part.params, parallel.replicated(self.mesh))

    def embed_frames(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]], rounding: str) -> Float32[np.ndarray, "t d"]:
        """Returns the unit vectors of frames."""
        side, size, parts = self.config.vision.image_size, BATCH * self.mesh.size, []
        for some in batches(frames, size):
            pixels = np.zeros((size, side, side, 3), np.uint8)
            pixels[: len(some)] = [preprocess(frame, side, rounding) for frame in some]
            batch = jax.device_put(pixels, parallel.batch_sharding(self.mesh))
            parts.append(np.asarray(_image_vectors(self.params, batch, self.config))[: len(some)])
        return np.concatenate(parts)

    def embed_text(self, text: str) -> Float32[np.ndarray, " d"]:
        """Returns the unit vector of a text, which is truncated to CLIP's context length."""
        return np.asarray(_text_vectors(self.params, tokenize(self.tokenizer, [text]), self.config))[0]


@functools.partial(jax.jit, static_argnames="config")
def _image_vectors(params: Any, pixels: UInt8[Array, "b h w 3"], config: CLIPConfig) -> Float[Array, "b d"]:
    images = (pixels.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    with jax.default_matmul_precision("highest"):
        return _unit(CLIP(config).apply({"params": params}, images, method="embed_images"))


@functools.partial(jax.jit, static_argnames="config")
def _text_vectors(params: Any, tokens: Array, config: CLIPConfig) -> Float[Array, "n d"]:
    with jax.default_matmul_precision("highest"):
        return _unit(CLIP(config).apply({"params": params}, tokens, method="embed_texts"))


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def draw_captions(captions: Mapping[str, Sequence[str]], seed: int) -> dict[str, str]:
    """Draws one caption for each video, which depends on the seed and the position of the video alone."""
    return {
        name: own[int(np.random.default_rng([seed, i]).integers(len(own)))]
        for i, (name, own) in enumerate(captions.items())
    }


def caption_of(video: Video, captions: Mapping[str, str] | None) -> str:
    """Returns the caption of a video: from `captions`, or of the .json or .txt beside the file.

    Raises:
        UserError: there is none.
    """
    if captions is not None:
        if video.name in captions:
            return captions[video.name]
        example = next(iter(captions), "")
        raise UserError(f"there is no caption for the video {video.name!r}; captions are of names such as {example!r}")
    if video.path is not None:
        # The name of a folder of frames has no ending: what follows a dot is part of the prompt.
        stem = video.path.name if video.path.is_dir() else video.path.stem
        sidecar, beside = (video.path.with_name(f"{stem}.{ending}") for ending in ("json", "txt"))
        if sidecar.is_file():
            content = read_json(sidecar)
            request = content.get("request")
            texts = [content.get("caption"), content.get("prompt")]
            texts += [request.get("prompt")] if isinstance(request, dict) else []
            if text := next((text for text in texts if isinstance(text, str) and text.strip()), None):
                return text
        if beside.is_file():
            try:
                text = read_text(beside).strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{beside} cannot be read as text: {error}") from error
            if text:
                return text
    raise UserError(f"{video.path or video.name} has no caption: give --captions FILE, or {video.name}.txt beside it")


def clipsim(
    videos: Sequence[Video], captions: Mapping[str, str] | None, knobs: ClipsimKnobs, scorer: Scorer
) -> dict[str, float]:
    """Returns the mean cosine of the frames and the caption of each video, by name."""
    texts = {video.name: caption_of(video, captions) for video in videos}
    for video in videos:
        video.check_length(knobs.frames)
    values = {}
    for video in tqdm(videos, desc="clipsim", unit="video"):
        frames = scorer.embed_frames(video.read(knobs.frames), knobs.rounding)
        values[video.name] = float((frames @ scorer.embed_text(texts[video.name])).mean())
    return values
