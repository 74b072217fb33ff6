"""One image file to bytes of a fixed shape, through Pillow."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class BadValues(ValueError):
    """A file that decodes well but whose numbers cannot be an image."""


def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes, with the dot, of all formats that Pillow can read here."""
    from PIL import Image

    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN)


def load_image(path: Path, *, size: int, channels: int) -> np.ndarray:
    """uint8 (channels, size, size), 0..255.

    The camera's rotation is applied, transparency laid over white, the largest centred square
    cut out and resized (Lanczos). 16-bit grey images are scaled from 0..65535, floating ones from [0, 1].

    Raises:
        BadValues: NaN or Inf, or a value outside those ranges; names the file.
        Exception: whatever Pillow raises for a file it cannot read.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_grey_bytes(image, path)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if channels == 3 else "L")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_grey_bytes(image: "Image.Image", path: Path) -> "Image.Image":
    """Deep grey images to 8 bits: Pillow's own conversion clips them at 255 instead of scaling."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all():
        raise BadValues(f"{path}: the image holds NaN or Inf")
    if values.min() < 0 or values.max() > top:
        raise BadValues(f"{path}: values run from {values.min():g} to {values.max():g}; allowed: 0 to {top:g}")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
