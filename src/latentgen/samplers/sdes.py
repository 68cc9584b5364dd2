"""Linear diffusions z_t = m_t z_0 + sqrt(s_t) eps on t in [0, 1], and how times are drawn for their losses; no networks.

dz = f(t) z dt + g(t) dw, hence ds/dt = 2 f s + g^2. Variances s, not deviations, are the numbers here.

Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole, "Score-Based Generative Modeling through Stochastic Differential
Equations", 2021, arXiv 2011.13456. Vahdat, Kreis and Kautz, "Score-based Generative Modeling in Latent Space", 2021, arXiv
2106.05931.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

Time = Float[Array, '...'] | ScalarLike
Real = Float[Array, '...']

WEIGHTINGS = ('ll', 're', 'un')
SAMPLINGS = ('ll', 're', 'un', 'uniform')


class SDE(abc.ABC):
  """What every diffusion knows about itself; times of any shape, elementwise."""

  @abc.abstractmethod
  def mean(self, t: Time) -> Real:
    """m_t."""

  @abc.abstractmethod
  def variance(self, t: Time) -> Real:
    """s_t."""

  @abc.abstractmethod
  def variance_rate(self, t: Time) -> Real:
    """ds/dt."""

  @abc.abstractmethod
  def time(self, s: Time) -> Real:
    """The t with variance s, the inverse of `variance`."""

  @abc.abstractmethod
  def drift(self, t: Time) -> Real:
    """f."""

  @abc.abstractmethod
  def diffusion(self, t: Time) -> Real:
    """g^2."""

  def spread(self, t: Time) -> Real:
    """v_t, the variance of z_t where z_0 is standard normal; N(0, v_1 I) is what generation starts from."""
    return jnp.square(self.mean(t)) + self.variance(t)

  def spread_rate(self, t: Time) -> Real:
    """f + g^2 / (2 v) = d log v / (2 dt): the probability flow where all is N(0, v_t I)."""
    return self.drift(t) + 0.5 * self.diffusion(t) / self.spread(t)


class Preserving(SDE):
  """What the variance-preserving ones have in common: f = -g^2 / 2, ds/dt = g^2 (1 - s), v = 1 (exactly, whatever s_0)."""

  def drift(self, t: Time) -> Real:
    return -0.5 * self.diffusion(t)

  def spread(self, t: Time) -> Real:
    return jnp.ones(jnp.shape(t))

  def spread_rate(self, t: Time) -> Real:
    return jnp.zeros(jnp.shape(t))


@dataclasses.dataclass(frozen=True)
class VP(Preserving):
  """Linear variance-preserving diffusion: g^2 = beta(t) = beta0 + (beta1 - beta0) t.

  m_t^2 = exp(-B_t), 1 - s_t = (1 - s_0) exp(-B_t), B_t = beta0 t + (beta1 - beta0) t^2 / 2.

  Args:
    beta0: beta at t = 0.
    beta1: beta at t = 1, above beta0.
    initial: s_0, in [0, 1).
  """

  beta0: float = 0.1
  beta1: float = 20.0
  initial: float = 0.0

  def integral(self, t: Time) -> Real:
    """B_t."""
    return self.beta0 * t + 0.5 * (self.beta1 - self.beta0) * jnp.square(t)

  def mean(self, t: Time) -> Real:
    return jnp.exp(-0.5 * self.integral(t))

  def variance(self, t: Time) -> Real:
    return self.initial - (1.0 - self.initial) * jnp.expm1(-self.integral(t))

  def variance_rate(self, t: Time) -> Real:
    return self.diffusion(t) * (1.0 - self.initial) * jnp.exp(-self.integral(t))

  def time(self, s: Time) -> Real:
    return _time_of_integral(math.log1p(-self.initial) - jnp.log1p(-s), self.beta0, self.beta1)

  def diffusion(self, t: Time) -> Real:
    return jnp.asarray(self.beta0 + (self.beta1 - self.beta0) * t)


@dataclasses.dataclass(frozen=True)
class GeometricVP(Preserving):
  """Variance-preserving diffusion with s_t = low (high / low)^t, so that d log s / dt is constant.

  beta = g^2 = s log(high / low) / (1 - s), m_t^2 = (1 - s_t) / (1 - low). z_0 counts as the mean of a noisy z at t = 0.

  Args:
    low: s_0.
    high: s_1, below 1.
  """

  low: float = 3e-5
  high: float = 0.999

  @property
  def growth(self) -> float:
    """d log s / dt."""
    return math.log(self.high / self.low)

  def mean(self, t: Time) -> Real:
    return jnp.sqrt((1.0 - self.variance(t)) / (1.0 - self.low))

  def variance(self, t: Time) -> Real:
    return self.low * jnp.exp(self.growth * t)

  def variance_rate(self, t: Time) -> Real:
    return self.growth * self.variance(t)

  def time(self, s: Time) -> Real:
    return jnp.log(s / self.low) / self.growth

  def diffusion(self, t: Time) -> Real:
    s = self.variance(t)
    return self.growth * s / (1.0 - s)


@dataclasses.dataclass(frozen=True)
class SubVP(SDE):
  """Sub-variance-preserving diffusion: f = -beta / 2, g^2 = beta (1 - exp(-2 B_t)), m_t^2 = exp(-B_t), s_t = (1 - exp(-B_t))^2.

  Args:
    beta0: beta at t = 0.
    beta1: beta at t = 1, above beta0.
  """

  beta0: float = 0.1
  beta1: float = 20.0

  @property
  def _linear(self) -> VP:
    return VP(self.beta0, self.beta1)

  def mean(self, t: Time) -> Real:
    return self._linear.mean(t)

  def variance(self, t: Time) -> Real:
    return jnp.square(self._linear.variance(t))

  def variance_rate(self, t: Time) -> Real:
    return 2.0 * self._linear.variance(t) * self._linear.variance_rate(t)

  def time(self, s: Time) -> Real:
    return self._linear.time(jnp.sqrt(s))

  def drift(self, t: Time) -> Real:
    return self._linear.drift(t)

  def diffusion(self, t: Time) -> Real:
    return -self._linear.diffusion(t) * jnp.expm1(-2.0 * self._linear.integral(t))


@dataclasses.dataclass(frozen=True)
class VE(SDE):
  """Variance-exploding diffusion: f = 0, m = 1, s_t = low ((high / low)^t - 1).

  Args:
    low: smallest variance.
    high: largest variance; s_1 = high - low.
  """

  low: float = 1e-4
  high: float = 2500.0

  @property
  def growth(self) -> float:
    """log(high / low)."""
    return math.log(self.high / self.low)

  def mean(self, t: Time) -> Real:
    return jnp.ones(jnp.shape(t))

  def variance(self, t: Time) -> Real:
    return self.low * jnp.expm1(self.growth * t)

  def variance_rate(self, t: Time) -> Real:
    return self.low * self.growth * jnp.exp(self.growth * t)

  def time(self, s: Time) -> Real:
    return jnp.log1p(s / self.low) / self.growth

  def drift(self, t: Time) -> Real:
    return jnp.zeros(jnp.shape(t))

  def diffusion(self, t: Time) -> Real:
    return self.variance_rate(t)


def _time_of_integral(integral: Real, beta0: float, beta1: float) -> Real:
  """t with beta0 t + (beta1 - beta0) t^2 / 2 = integral."""
  return 2.0 * integral / (beta0 + jnp.sqrt(beta0**2 + 2.0 * (beta1 - beta0) * integral))


def weight(sde: SDE, weighting: str, t: Time) -> Real:
  """What |eps - eps_theta|^2 is multiplied with at time t.

  Args:
    sde: the diffusion.
    weighting: 'll' likelihood, g^2 / (2 s); 're' reweighted, g^2 / 2; 'un' unweighted, 1.
    t: times.
  """
  if weighting == 'un':
    return jnp.ones(jnp.shape(t))
  half = 0.5 * sde.diffusion(t)
  return half / sde.variance(t) if weighting == 'll' else half


def draw_times(sde: SDE, sampling: str, rho: Real, start: ScalarLike) -> tuple[Real, Real]:
  """Times from uniform numbers, with their density; an integral over [start, 1] is the mean of integrand / density.

  'll': log s uniform; 're': s uniform; 'un' (VP only): density proportional to 1 - s; 'uniform': t uniform. For a variance-
  preserving diffusion, and z_0 and predictions of N(0, I), each of the first three has the least variance for the weighting of
  its name.

  Args:
    sde: the diffusion.
    sampling: one of SAMPLINGS.
    rho: uniform on [0, 1].
    start: e, above 0 unless s_0 > 0.

  Returns:
    (t, its density on [start, 1]), both like rho.

  Raises:
    ValueError: 'un' for another diffusion than VP.
  """
  if sampling == 'uniform':
    return start + (1.0 - start) * rho, jnp.full(jnp.shape(rho), 1.0 / (1.0 - start))
  if sampling == 'un':
    if not isinstance(sde, VP):
      raise ValueError(f"sampling 'un' is known for the linear VP diffusion only, not for {type(sde).__name__}")
    return _draw_unweighted(sde, rho, start)
  low, high = sde.variance(start), sde.variance(1.0)
  if sampling == 're':
    s, mass = rho * high + (1.0 - rho) * low, high - low
    t = jnp.clip(sde.time(s), start, 1.0)
    return t, sde.variance_rate(t) / mass
  mass = jnp.log(high) - jnp.log(low)
  t = jnp.clip(sde.time(jnp.exp(rho * jnp.log(high) + (1.0 - rho) * jnp.log(low))), start, 1.0)
  return t, sde.variance_rate(t) / (sde.variance(t) * mass)


def unweighted_mass(sde: VP, start: ScalarLike) -> Real:
  """int_e^1 exp(-B_t) dt = exp(beta0 c / 2) sqrt(pi / (4 d)) (erf(sqrt(d) (1 + c)) - erf(sqrt(d) (e + c))).

  d = (beta1 - beta0) / 2, c = beta0 / (beta1 - beta0). The published code has exp(c / 2) in front, 0.23 % more at beta0 = 0.1.
  """
  d, c, low, high = _tails(sde, start)
  return math.exp(0.5 * sde.beta0 * c) * math.sqrt(math.pi / (4.0 * d)) * (low - high)


def _tails(sde: VP, start: ScalarLike) -> tuple[float, float, Real, Real]:
  """(d, c, erfc at start, erfc at 1): complements, as erf has no digits left near 1."""
  d, c = 0.5 * (sde.beta1 - sde.beta0), sde.beta0 / (sde.beta1 - sde.beta0)
  low, high = (jax.scipy.special.erfc(jnp.asarray(math.sqrt(d) * (end + c))) for end in (start, 1.0))
  return d, c, low, high


def _draw_unweighted(sde: VP, rho: Real, start: ScalarLike) -> tuple[Real, Real]:
  d, c, low, high = _tails(sde, start)
  tail = (1.0 - rho) * low + rho * high
  t = jnp.clip(-jax.scipy.special.ndtri(0.5 * tail) / math.sqrt(2.0 * d) - c, start, 1.0)
  return t, jnp.exp(-sde.integral(t)) / unweighted_mass(sde, start)
