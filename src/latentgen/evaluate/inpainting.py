"""Inpainting: half of every held-out image is hidden and drawn anew given the other half.

References:
  Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv 1907.05600, section 5.
"""

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.evaluate.base import Findings, Picture, Subject, average, check_choice, check_count, hook, per_example
from latentgen.evaluate.grids import grid, interleave

NEEDS = ('inpaint',)
HIDDEN = ('right', 'left', 'bottom', 'top', 'random')
GREY = 0.5  # of hidden pixels in the picture


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = 64,
  train_limit: int | None = 5000,
  hidden: str = 'right',
  draws: int = 4,
  images: int = 8,
) -> Findings:
  """Compares the drawn pixels with the hidden ones.

  A draw from the right conditional distribution has twice the mean squared error of that distribution's mean, which the
  average of many draws tends to: a draw may be right and yet lose to a blurred fill. Both are reported.

  Args:
    subject: what is evaluated.
    split: which images; held-out ones.
    limit: only the first so many.
    train_limit: only so many training images for the trivial fill.
    hidden: 'right', 'left', 'bottom', 'top' half, or 'random', every second pixel on average (the same ones in all images).
    draws: inpaintings an image.
    images: rows of the picture.

  Returns:
    Findings, mean squared errors over hidden pixels in squared image units, n in images, with inpainting/mse_draw, of one
    draw; /mse_average, of the average of the draws; /mse_training_mean, of each pixel's mean over training images; and the
    picture inpainting.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.inpainting'
  check_choice(f'{where}.hidden', hidden, HIDDEN)
  for name, value in (('draws', draws), ('images', images)):
    check_count(f'{where}.{name}', value)
  inpaint = hook(subject, 'inpainting', 'inpaint')
  known = known_pixels(subject, hidden)

  def fill(variables, x, key):
    one = lambda key: inpaint(variables, jnp.where(known, x, 0.0), known, key)
    return {'x': x, 'drawn': jax.lax.map(one, jax.random.split(key, draws)).swapaxes(0, 1)}

  found = per_example(subject, 'inpainting', fill, split, limit)
  train = per_example(subject, 'inpainting', lambda variables, x, key: {'x': x}, 'train', train_limit)['x']
  x, drawn = found['x'], found['drawn']
  missing = np.broadcast_to(~known, x.shape[1:])

  def error(fill: np.ndarray) -> np.ndarray:
    return np.square(fill - x, dtype=np.float64)[:, missing].mean(1)

  fills = {'draw': drawn[:, 0], 'average': drawn.mean(1), 'training_mean': train.mean(0, dtype=np.float64)}
  results = {f'inpainting/mse_{name}': average(error(fill), 'squared image units') for name, fill in fills.items()}
  shown = min(images, len(x))
  masked = np.where(known, x[:shown], GREY)
  picture = Picture(
    grid(interleave(x[:shown], masked, *drawn[:shown].swapaxes(0, 1)), 2 + draws),
    'Inpainting',
    f'A row is an image of {split}: original, what is known of it ({hidden} hidden), and {draws} draws; not selected.',
  )
  return Findings(results, {'inpainting': picture})


def known_pixels(subject: Subject, hidden: str) -> np.ndarray:
  """Which pixels stay, bool [h, w, 1] with the shape of images after preprocessing."""
  raw = subject.data['train'].take([0])
  height, width, _ = jax.eval_shape(lambda key: subject.preprocess(key, raw, False)['image'], jax.random.key(0)).shape[1:]
  known = np.ones((height, width, 1), bool)
  if hidden == 'random':
    return np.random.default_rng(0).random(known.shape) < 0.5
  part = {
    'right': np.s_[:, width // 2 :], 'left': np.s_[:, : width // 2], 'bottom': np.s_[height // 2 :], 'top': np.s_[: height // 2]
  }  # fmt: skip
  known[part[hidden]] = False
  return known
