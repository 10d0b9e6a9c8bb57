"""Frames as players show them: upright, with square pixels, in the colours that the file declares.

Frames that would look wrong are refused: HDR, which would need tone mapping, and interlaced ones.
"""

import functools
import io
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.errors import UserError

BACKGROUND = 255  # transparent pixels are shown over white, as on a web page

# FFmpeg's numbers. Colour matrices that libswscale converts; 0 is RGB, 2 unspecified, 5 and 6 both BT.601.
BT709, _BT601, UNSPECIFIED = 1, 5, 2
LIMITED, FULL = 1, 2  # ranges of the sample values
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 12: "chromaticity-derived", 14: "ICtCp", 15: "IPT-C2"}
_HDR = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 16: "PQ", 17: "SMPTE 428", 18: "HLG"}
_PROGRESSIVE = 0, 1  # field orders; 0 is unknown
_ALWAYS_PROGRESSIVE = ("vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "gif", "hevc", "png")
_WIDEST = 8  # only damaged headers have wider or taller pixels


class UnusableVideo(UserError):
    """A readable video that would look wrong; `reason` is one of REASONS."""

    REASONS = ("HDR", "interlaced")

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # worker processes pickle it
        return type(self), (str(self), self.reason)


def check_header(stream: Any, what: str) -> None:
    """Raises UserError if, according to its header, a stream would look wrong."""
    context = stream.codec_context
    _check_transfer(context.color_trc, what)
    if context.colorspace in _OTHER_MATRICES:
        raise UserError(f"the video {what} has an unsupported colour matrix: {_OTHER_MATRICES[context.colorspace]}")
    if context.field_order not in _PROGRESSIVE:
        raise _interlaced(what)
    pixel_aspect(stream, what)


def declares_field_order(stream: Any) -> bool:
    """Whether the header states if frames are interlaced, or the codec has progressive frames only."""
    return bool(stream.codec_context.field_order) or stream.codec_context.name in _ALWAYS_PROGRESSIVE


def check_frame(frame: Any, what: str) -> None:
    """Raises UserError if a decoded frame would look wrong, which not every header states."""
    _check_transfer(frame.color_trc, what)
    if frame.interlaced_frame:
        raise _interlaced(what)


def _check_transfer(transfer: int, what: str) -> None:
    if transfer in _HDR:
        raise UnusableVideo(
            f"the video {what} is HDR ({_HDR[transfer]}), which would come out grey: tone-map it first, e.g. "
            "with ffmpeg's filters zscale and tonemap",
            "HDR",
        )


def _interlaced(what: str) -> UnusableVideo:
    return UnusableVideo(
        f"the video {what} is interlaced: deinterlace it first, e.g. with ffmpeg's filter bwdif", "interlaced"
    )


def pixel_aspect(stream: Any, what: str) -> Fraction:
    """Width over height of a pixel. 1 if the file does not contain it."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, _WIDEST) <= aspect <= _WIDEST:
        raise UserError(f"the video {what} has pixels {float(aspect):g} times as wide as high: its header is damaged")
    return Fraction(aspect)


class Screen:
    """Converts the frames of a stream to pixels as they are shown, all in the size of the first.

    Frames are resized in width to get square pixels. Quarter turns and flips in the metadata are applied.

    Args:
        stream: the video stream.
        what: names the video in messages.
        shorter_side: frames are scaled down until the shorter side has this many pixels; 0 keeps their size.
    """

    def __init__(self, stream: Any, what: str, *, shorter_side: int = 0):
        self.aspect, self.what, self.shorter_side = pixel_aspect(stream, what), what, shorter_side
        self.size: tuple[int, int] | None = None  # (height, width), before rotation
        self.zoom = 1.0

    def _fix_size(self, frame: Any) -> tuple[int, int]:
        if self.size is None:
            height, width = frame.height, max(1, round(frame.width * self.aspect))
            if self.shorter_side:
                self.zoom = min(1.0, self.shorter_side / min(height, width))
            self.size = round(height * self.zoom), round(width * self.zoom)
        return self.size

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """(height, width) of the pixels of a frame, upright."""
        check_frame(frame, self.what)
        height, width = self._fix_size(frame)
        return (width, height) if _turn(frame)[0] else (height, width)

    def __call__(self, frame: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the pixels of a frame."""
        check_frame(frame, self.what)
        height, width = self._fix_size(frame)
        pixels = _rgb(frame, height, width, self.zoom < 1)
        transposed, flip_x, flip_y = _turn(frame)
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _rgb(frame: Any, height: int, width: int, smaller: bool) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a frame to RGB by its own matrix and range, over BACKGROUND where it is transparent."""
    from av.video.reformatter import Interpolation

    # Without these FFmpeg truncates: frames come back 1 to 1.5 of 255 darker each time that they are written and read.
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    stretched = (height, width) != (frame.height, frame.width) and not smaller
    see_through = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    pixels = frame.to_ndarray(
        format="rgba" if see_through else "rgb24",
        height=height,
        width=width,
        interpolation=(Interpolation.BICUBIC if stretched else Interpolation.BILINEAR) | exact,
        threads=1,  # the pipeline's workers are the parallelism
        **_source_colours(frame),
    )
    return over_background(pixels) if see_through else pixels


def _source_colours(frame: Any) -> dict[str, int]:
    """Arguments of the conversion to RGB. Frames without a matrix have the one that players assume for their size."""
    name = frame.format.name
    if frame.format.is_rgb or frame.format.has_palette or name.startswith("mono"):
        return {}
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        high_definition = frame.width >= 1280 or frame.height > 576
        matrix = BT709 if high_definition else _BT601
    full = frame.color_range == FULL or name.startswith("yuvj")
    grey = name.startswith(("gray", "ya")) and frame.color_range != LIMITED
    return {
        "src_colorspace": matrix,
        "src_color_range": FULL if full or grey else LIMITED,
        "dst_color_range": FULL,
    }


def over_background(pixels: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns RGBA pixels over BACKGROUND."""
    alpha = pixels[..., 3:].astype(np.uint32)
    return ((pixels[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """(whether rows and columns are swapped, then x and y mirrored) by the display matrix, to the nearest quarter."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def picture_pixels(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an image of any mode to sRGB as viewers show it.

    16 bits are scaled to 8, transparent pixels shown over BACKGROUND, and colours converted from the image's profile.
    """
    if picture.mode.startswith("I"):  # grey in 16 bits; Pillow would clip it
        values = np.asarray(picture).astype(np.int64)
        grey = np.clip((values + 128) // 257, 0, 255).astype(np.uint8)
        if isinstance(clear := picture.info.get("transparency"), int):
            grey = np.where(values == clear, np.uint8(BACKGROUND), grey)
        return np.repeat(grey[..., None], 3, axis=-1)
    see_through = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    profile = picture.info.get("icc_profile")
    if see_through or picture.mode not in ("RGB", "CMYK"):
        picture = picture.convert("RGBA" if see_through else "RGB")
    if profile and (to_srgb := _to_srgb(profile, picture.mode)) is not None:
        picture = to_srgb.apply(picture)
    return over_background(np.asarray(picture)) if see_through else np.asarray(picture.convert("RGB"))


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """The transform of an ICC profile to sRGB; None for sRGB itself, and for one that does not apply."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB" if mode == "CMYK" else mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of a grey image
        return None
