"""Energies over vectors, as the log of a tilt: p(u) = N(u; 0, I) exp(f(u)) / Z. The network returns f, the negative energy."""

from collections.abc import Sequence

from flax import linen as nn
import jax

from latentgen.errors import UserError, near

Array = jax.Array
ACTIVATIONS = ('gelu', 'leaky_relu', 'swish', 'tanh')


class Tilt(nn.Module):
  """f: u [n, d] -> [n]. Its last layer starts at zero, so that the prior starts as its base.

  Args:
    hidden: widths.
    activation: one of ACTIVATIONS; 'leaky_relu' has slope 0.2.

  References:
    Pang, Han, Nijkamp, Zhu and Wu, "Learning Latent Space Energy-Based Prior Model", 2020, arXiv 2006.08205.
  """

  hidden: Sequence[int] = (200, 200)
  activation: str = 'gelu'

  @nn.compact
  def __call__(self, u: Array) -> Array:
    act = (lambda h: nn.leaky_relu(h, 0.2)) if self.activation == 'leaky_relu' else getattr(nn, self.activation)
    for width in self.hidden:
      u = act(nn.Dense(width, kernel_init=nn.initializers.xavier_normal())(u))
    return nn.Dense(1, kernel_init=nn.initializers.zeros)(u)[..., 0]


def checked(hidden: Sequence[int], activation: str) -> Tilt:
  """The tilt that a method's options describe.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  if activation not in ACTIVATIONS:
    raise UserError(f'method.activation is {activation!r}{near(activation, ACTIVATIONS)}')
  if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in hidden):
    raise UserError(f'method.hidden is {hidden!r}, need widths of at least 1')
  return Tilt(tuple(hidden), activation)
