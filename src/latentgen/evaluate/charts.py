"""Charts drawn with matplotlib into arrays or SVG, without global state and the same to the byte every time.

Matplotlib is imported where a chart is drawn: training starts without it.
"""

import contextlib
import io
from typing import TYPE_CHECKING
import warnings

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure

LABEL = 60  # characters
COLORS = ('#3b7dd8', '#e07b39', '#3a9d6b', '#c2507a', '#8a6fd1', '#9a8a3c', '#5aa6b8', '#8c8c8c')
INK = '#7d848d'  # legible on white and on black
STYLE = {
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'svg.hashsalt': 'latentgen',
  'svg.fonttype': 'path',
  'text.color': INK,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.color': INK,
  'grid.alpha': 0.2,
  'grid.linewidth': 0.6,
  'axes.formatter.useoffset': False,
}


def axes(width: float, height: float, rows: int = 1, heights=None):
  """A figure of that size in inches with its axes, one or an array of them. Call within `style()`."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, 1, height_ratios=heights)


def style():
  """The context in which charts are drawn and rendered."""
  from matplotlib import rc_context

  return rc_context(STYLE)


def plain(text: str) -> str:
  """A text as a label: not read as mathematics, without control characters, cut where it is overlong."""
  shown = ''.join(c if c.isprintable() else '\ufffd' for c in text)
  return (shown if len(shown) <= LABEL else f'{shown[: LABEL - 1]}…').replace('$', r'\$')


@contextlib.contextmanager
def _any_text():
  """Characters that the font lacks are boxes, labels too wide overlap: without a word."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing', UserWarning)
    warnings.filterwarnings('ignore', 'constrained_layout not applied', UserWarning)
    yield


def pixels(figure: 'Figure') -> np.ndarray:
  """The figure on white, uint8 [H, W, 3]."""
  figure.patch.set_facecolor('white')
  with _any_text():
    figure.canvas.draw()
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def svg(figure: 'Figure') -> bytes:
  """The figure on a transparent ground; no date, no random identifiers."""
  buffer = io.BytesIO()
  for ax in figure.axes:
    ax.set_facecolor('none')
  with _any_text():
    figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  return buffer.getvalue()


def legend(ax, **options) -> None:
  """A legend without frame, if there is more than one line."""
  if len(ax.get_legend_handles_labels()[0]) > 1:
    ax.legend(frameon=False, **options)
