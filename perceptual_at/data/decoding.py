"""One encoded image as a tensor of bytes, by rules that lose nothing without a word.

Eight bits per channel stay as they are: grey and palette images become colour images of the same pixels, EXIF's
orientation is applied, an alpha channel that is opaque is dropped, of the pictures in a camera's JPEG (MPO) the first
is the image. What eight bits of RGB cannot hold is refused: 16-bit and floating-point pixels, transparency, CMYK and
other colour spaces, more than one frame.
"""

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._extras import extra

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""What files of images are called."""
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "RGBA", "LA", "PA", "RGBa", "La")

Size = int | tuple[int, int]


def checked_size(function: str, size: Any) -> Size:
    """Require a side, or height and width."""
    sides: Sequence[Any] = size if _check.is_sequence(size) else (size,)
    if len(sides) != 2 and sides is size:
        raise ValueError(f"{function}: `size` must be one side or height and width, got {size!r}.")
    for side in sides:
        _check.count(function, "size", side)
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def decode(function: str, source: Path | IO[bytes], named: str, *, size: Size | None, grey: bool = False) -> Tensor:
    """One image, uint8 `(3, H, W)`, or `(1, H, W)` if `grey`; scaled and cropped to `size` where there is one.

    Raises:
        ValueError: if it cannot be read, or holds what bytes of RGB cannot; the message has the name.
    """
    image = opened(function, source, named).convert("L" if grey else "RGB")
    if size is None:
        return to_bytes(image)
    height, width = (size, size) if isinstance(size, int) else size
    if image.size != (width, height):
        scale = max(height / image.height, width / image.width)
        scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        image = image.resize(scaled, _bilinear()).crop((left, top, left + width, top + height))
    return to_bytes(image)


def to_bytes(image: Any) -> Tensor:
    """The bytes of a PIL image of one or three channels, uint8 `(C, H, W)`."""
    channels = len(image.getbands())
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def opened(function: str, source: Path | IO[bytes], named: str) -> Any:
    """The decoded image, upright, in a mode of eight bits without alpha that means anything."""
    image_module, operations = _pillow(function)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            warnings.filterwarnings("ignore", message="Palette images with Transparency")
            warnings.filterwarnings("ignore", message="Corrupt EXIF data")
            with image_module.open(source) as file:
                problem = _unfit(file)
                if problem is None:
                    image = operations.exif_transpose(file)
                    image.load()
                    problem = _transparent(image)
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
        raise ValueError(f"{function}: `{named}` is a decompression bomb ({error}). Remove it.") from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, KeyError, IndexError) as error:
        raise ValueError(
            f"{function}: `{named}` cannot be read as an image ({error}); it is damaged or incomplete. "
            "Restore or remove it."
        ) from error
    if problem is not None:
        raise ValueError(f"{function}: `{named}` has {problem}. Convert or remove it.")
    return image


def _unfit(file: Any) -> str | None:
    """What eight bits of RGB cannot hold, judged by the header."""
    decoder, layout = (file.tile[0][0], file.tile[0][3]) if file.tile else ("", ())
    words = layout if isinstance(layout, tuple) else (layout,)
    # "BGR;16" is 16 bits for all three channels; the number beside the mode of a PPM is its greatest value.
    sixteen = any(";16" in str(word) and word != "BGR;16" for word in words)
    greatest = max((word for word in words if isinstance(word, int)), default=0) if "ppm" in decoder else 0
    if file.mode.startswith("I") or sixteen or greatest > 255:
        return f"pixels of 16 bits or more (mode {file.mode}), which bytes cannot hold"
    if file.mode == "F":
        return "floating-point pixels, whose range nothing tells"
    if file.mode not in _PLAIN:
        return f"the colour space {file.mode}, which has no one meaning in RGB"
    frames = getattr(file, "n_frames", 1)
    return f"{frames} frames, of which none is the image" if frames > 1 and file.format != "MPO" else None


def _transparent(image: Any) -> str | None:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        lowest = image.convert("RGBA").getextrema()[3][0]
        if lowest < 255:
            return "transparent pixels, whose colour depends on what is behind them"
        image.info.pop("transparency", None)
    return None


def _bilinear() -> Any:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _pillow(function: str) -> tuple[Any, Any]:
    return extra(function, "PIL.Image", why="to read images"), extra(function, "PIL.ImageOps", why="to read images")
