"""Many small images in one picture, scaled by whole factors so that 8x8 digits can be seen."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 127  # grey of gaps and empty places: visible beside both black and white images
TILE = 48  # pixels that a tile should have in height
HEADER = 22  # height of a panel's title


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None, gap: int = 2) -> np.ndarray:
  """Lays images out row by row.

  Image i is at row i // columns and column i % columns; its pixel (0, 0) is at
  (gap + row * (scale * h + gap), gap + column * (scale * w + gap)).

  Args:
    images: [n, h, w, c] float in [0, 1] (clipped), c 1 or 3.
    columns: images in a row; by default the grid is nearly square.
    scale: factor of enlargement, by nearest neighbour; by default such that a tile is about 48 pixels high.
    gap: pixels of grey around every tile.

  Returns:
    uint8 [H, W] for c = 1, [H, W, 3] for c = 3.
  """
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
    raise ValueError(f'images must be [n, h, w, 1 or 3] with n > 0, not {list(images.shape)}')
  n, h, w, c = images.shape
  columns = columns or math.ceil(math.sqrt(n))
  scale = scale or max(1, round(TILE / h))
  rows = math.ceil(n / columns)
  tiles = np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
  canvas = np.full((rows * (h * scale + gap) + gap, columns * (w * scale + gap) + gap, c), GAP, np.uint8)
  for i, tile in enumerate(tiles):
    top, left = (gap + place * (size * scale + gap) for place, size in zip(divmod(i, columns), (h, w), strict=True))
    canvas[top : top + h * scale, left : left + w * scale] = tile
  return canvas[..., 0] if c == 1 else canvas


def beside(panels: dict[str, np.ndarray], space: int = 14) -> np.ndarray:
  """Pictures side by side on white, each under its title.

  Args:
    panels: {title: uint8 [H, W] or [H, W, 3]}.
    space: pixels between them.

  Returns:
    uint8 [H', W', 3].
  """
  arrays = [np.repeat(a[..., None], 3, -1) if a.ndim == 2 else a for a in panels.values()]
  height = max(a.shape[0] for a in arrays) + HEADER
  width = sum(a.shape[1] for a in arrays) + space * (len(arrays) - 1)
  canvas = Image.new('RGB', (width, height), 'white')
  draw, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(15), 0
  for title, array in zip(panels, arrays, strict=True):
    while len(title) > 1 and draw.textlength(title, font=font) > array.shape[1]:
      title = title[:-1]
    draw.text((left + 2, 2), title, fill=(60, 64, 70), font=font)
    canvas.paste(Image.fromarray(array), (left, HEADER))
    left += array.shape[1] + space
  return np.asarray(canvas)


def interleave(*sets: np.ndarray) -> np.ndarray:
  """[n, ...] each -> [n * sets, ...]: for every n one of each set, in order."""
  return np.stack(sets, 1).reshape(-1, *sets[0].shape[1:])
