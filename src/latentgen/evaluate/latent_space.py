"""Pictures of a latent space: where the images are in it, what the prior's components stand for, what a dimension does.

Codes are posterior means, over all groups of the model. Traversals are in the noise coordinates of the base prior, so that they
mean the same in a hierarchy, where the groups below follow the one that is swept. The class, where there are any, stays.

References:
  I. Higgins et al., beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, 2017 (traversals).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.evaluate import base, charts
from latentgen.evaluate.base import Findings, Picture, Subject, check_choice, check_count, codes, fetch, named_key
from latentgen.evaluate.grids import grid, interleave

PARTS = ('scatter', 'components', 'traversals')
REACH = 2.0  # standard deviations of the prior on either side
NEEDS = ('trace',)


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = 2000,
  images: int = 2,
  dimensions: int = 8,
  columns: int = 9,
  components: int = 64,
  parts: Sequence[str] = PARTS,
) -> Findings:
  """Draws the pictures.

  Args:
    subject: what is evaluated.
    split: whose images.
    limit: only the first so many of them.
    images: how many are traversed.
    dimensions: at most so many rows a traversed image, the most active dimensions.
    columns: values a dimension takes.
    components: at most so many decoded means, those of the greatest weight.
    parts: which pictures, of PARTS.

  Returns:
    Pictures latent_space (in two dimensions, or along the first two principal directions; with the components of the prior
    where the method has `mixture`), components (only there), traversals.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.latent_space'
  for name, value, least in (
    ('images', images, 1), ('dimensions', dimensions, 1), ('columns', columns, 2), ('components', components, 1),
  ):  # fmt: skip
    check_count(f'{where}.{name}', value, least)
  for part in parts:
    check_choice(f'{where}.parts', part, PARTS)
  pictures: dict[str, Picture] = {}
  mixture = getattr(subject.method, 'mixture', None)
  mixture = None if mixture is None else fetch(jax.jit(mixture)(subject.variables))
  if 'scatter' in parts:
    pictures['latent_space'] = _scatter(subject, split, limit, mixture)
  if 'components' in parts and mixture is not None:
    pictures['components'] = _components(subject, mixture, components)
  if 'traversals' in parts:
    pictures['traversals'] = _traversals(subject, split, limit, mixture, images, dimensions, columns)
  return Findings(images=pictures)


# ---------------------------------------------------------------------------------------------- codes


def plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The affine map of [n, d] to two dimensions: (origin [d], directions [d, 2]).

  With d <= 2 the coordinates themselves (one of them beside zeros), else the first two principal directions, each with its
  greatest entry positive.
  """
  d = points.shape[1]
  if d <= 2:
    return np.zeros(d), np.eye(d, 2)
  origin = points.mean(0)
  _, _, rows = np.linalg.svd(points - origin, full_matrices=False)
  directions = np.zeros((d, 2))
  found = rows[:2]
  directions[:, : len(found)] = (found * np.sign(np.take_along_axis(found, np.abs(found).argmax(1)[:, None], 1))).T
  return origin, directions


def ellipse(variance: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, float]:
  """Half axes and angle of the one-deviation ellipse of a Gaussian with diagonal covariance, seen in a plane.

  Args:
    variance: [d].
    directions: [d, 2].

  Returns:
    (half axes [2], larger first; angle of the larger one in degrees).
  """
  values, vectors = np.linalg.eigh(directions.T @ (variance[:, None] * directions))
  return np.sqrt(np.maximum(values[::-1], 0)), float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))


def _scatter(subject: Subject, split: str, limit: int | None, mixture) -> Picture:
  from matplotlib.patches import Ellipse

  points = codes(subject, 'latent_space', split, limit).astype(np.float64)
  label = np.zeros(len(points), int)
  if subject.data[split].num_classes:
    label = np.asarray(base.labels(subject, 'latent_space', split, limit))
  origin, directions = plane(points)
  flat = (points - origin) @ directions
  classes = np.unique(label)
  with charts.style():
    figure, ax = charts.axes(6.0, 5.4)
    for i, y in enumerate(classes):
      color, marker = charts.COLORS[i % len(charts.COLORS)], 'ox^sD'[i // len(charts.COLORS) % 5]
      name = f'{y}' if len(classes) > 1 else None
      ax.scatter(*flat[label == y].T, s=9, color=color, marker=marker, linewidths=0.8, alpha=0.7, label=name)
    if mixture is not None:
      centres = (mixture.loc - origin) @ directions
      for centre, scale, weight in zip(centres, mixture.scale, mixture.weights, strict=True):
        half, angle = ellipse(np.square(scale, dtype=np.float64), directions)
        shade = float(np.clip(weight * len(mixture.weights), 0.15, 1.0))
        ax.add_patch(Ellipse(centre, *(2 * half), angle=angle, fill=False, edgecolor='#404040', lw=1.0, alpha=shade))
      ax.plot(*centres.T, '+', color='#404040', markersize=4)
    ax.autoscale_view()
    wide = points.shape[1] > 2
    ax.set(xlabel='principal direction 1' if wide else 'z 1', ylabel='principal direction 2' if wide else 'z 2')
    charts.legend(ax, loc='center left', bbox_to_anchor=(1.0, 0.5), title='class')
    array = charts.pixels(figure)
  kept = flat.var(0).sum() / points.var(0).sum() if points.var() else 1.0
  caption = f'Posterior means of {len(points)} images of {split}, {kept:.0%} of their variance.'
  if mixture is not None:
    caption += f' Ellipses: one deviation of the {len(mixture.weights)} components of the prior, fainter with less weight.'
  return Picture(array, 'Latent space', caption)


def _components(subject: Subject, mixture, most: int) -> Picture:
  order = np.argsort(-mixture.weights, kind='stable')[:most]
  means = jnp.asarray(mixture.loc[order])

  @jax.jit
  def decode(variables, key):
    return subject.method.simulate(variables, key, len(order), choose=lambda *_: means).px.mean[0]

  array = grid(fetch(decode(subject.variables, subject.key)))
  return Picture(
    array, 'Components of the prior', f'Decoded means of {len(order)} of {len(mixture.weights)} components, by weight.'
  )


# ---------------------------------------------------------------------------------------------- traversals


def _flat(levels) -> jax.Array:
  """Per level [g, b, ...] -> [b, d], as `codes` orders them."""
  return jnp.concatenate([a.swapaxes(0, 1).reshape(a.shape[1], -1) for a in levels], -1)


def coordinates(trace):
  """(centre, variance) of the posterior in noise coordinates, both [b, d]; a sample and 1 where it is not Gaussian."""
  if trace.posterior is None:
    centre = _flat([e[:, 0] for e in trace.eps])
    return centre, jnp.ones_like(centre)
  loc = [q.mean for q in trace.posterior]
  scale = [jnp.broadcast_to(q.scale, q.shape) for q in trace.posterior]
  if trace.prior is not None:
    loc = [(m - p.loc) / p.scale for m, p in zip(loc, trace.prior, strict=True)]
    scale = [s / p.scale for s, p in zip(scale, trace.prior, strict=True)]
  return _flat([m[:, 0] for m in loc]), jnp.square(_flat([s[:, 0] for s in scale]))


def _traversals(subject: Subject, split, limit, mixture, images: int, dimensions: int, columns: int) -> Picture:
  def read(variables, x, key):
    trace = subject.method.trace(variables, x, key, 1)
    centre, variance = coordinates(trace)
    label = {} if trace.label is None else {'label': trace.label[0]}
    return {'centre': centre, 'variance': variance, 'image': x, **label}

  found = base.per_example(subject, 'latent_space', read, split, limit)
  centre, variance = found['centre'].astype(np.float64), found['variance'].mean(0)
  # By the spread of the means over that of the posteriors, which is small where a dimension ignores the image.
  active = np.argsort(-centre.var(0) / variance, kind='stable')[:dimensions]
  middle, deviation = np.zeros(centre.shape[1]), np.ones(centre.shape[1])
  if mixture is not None:
    middle = mixture.weights @ mixture.loc
    deviation = np.sqrt(mixture.weights @ (np.square(mixture.scale) + np.square(mixture.loc - middle)))

  rows, steps = min(images, len(centre)), np.linspace(-REACH, REACH, columns)
  points = np.repeat(centre[:rows], len(active) * columns, 0).reshape(rows, len(active), columns, -1)
  for i, d in enumerate(active):
    points[:, i, :, d] = middle[d] + steps * deviation[d]
  points = jnp.asarray(points.reshape(-1, centre.shape[1]), jnp.float32)
  # The shapes of the levels, from which a group's slice of the codes follows.
  x = found['image'][:rows]
  trace = jax.eval_shape(lambda v, x: subject.method.trace(v, x, subject.key, 1), subject.variables, x)
  shapes = [e.shape for e in trace.eps]
  whole = trace.prior is None and trace.posterior is not None  # the coordinates are the latents themselves

  @jax.jit
  def decode(variables, points, label, key):
    levels, start = [], 0
    for g, _, _, *event in shapes:
      size = g * int(np.prod(event))
      levels.append(points[:, start : start + size].reshape(-1, g, *event).swapaxes(0, 1))
      start += size

    def choose(level, group, prior, context, key):
      del context, key
      return levels[level][group] if whole else prior.loc + prior.scale * levels[level][group]

    given = {} if label is None else {'label': jnp.broadcast_to(label, (len(points), *label.shape))}
    return subject.method.simulate(variables, key, len(points), choose=choose, **given).px.mean[0]

  size = columns * len(active)
  key = named_key(subject.key, 'decode')
  label = found.get('label', [None] * rows)
  parts = [fetch(decode(subject.variables, points[i * size : (i + 1) * size], label[i], key)) for i in range(rows)]
  swept = np.concatenate(parts).reshape(rows * len(active), columns, *x.shape[1:])
  original = np.repeat(x, len(active), 0)
  array = grid(interleave(original, *swept.swapaxes(0, 1)), columns + 1)
  return Picture(
    array,
    'Traversals',
    f'Left an image of {split}; then decoder means at its posterior mean with one dimension swept over the mean of the prior '
    f'plus and minus {REACH:g} of its standard deviations. The {len(active)} most active dimensions, a row each.',
  )
