"""Images as files: bytes, and one picture of many."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

# Eight-pixel digits are enlarged, by whole pixels, until a person can see them.
_SMALLEST_SIDE = 48


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [−1, 1] to uint8 (N, H, W, C), rounded; values outside are clamped."""
    scaled = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(pixels: np.ndarray, path: Path, columns: int) -> None:
    """uint8 (N, H, W, C), C = 1 or 3, N ≥ 1, as one PNG picture, row by row."""
    from PIL import Image

    count, height, width, channels = pixels.shape
    zoom = max(1, math.ceil(_SMALLEST_SIDE / max(height, width)))
    gap = 2
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = gap + row * (height * zoom + gap), gap + column * (width * zoom + gap)
        grid[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, "PNG")
