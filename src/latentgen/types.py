"""The contracts: what a network leaves behind, what a method offers, what a training run is made of.

Everything above arrays in this package is one of these few types. All log quantities are in nats, `b` is the batch, `k`
the axis of importance samples, `g` the axis of groups (stochastic layers of one resolution).
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

from flax import struct
import jax
import optax

Array = jax.Array
Key = jax.Array
Params = Mapping[str, Any]  # {group: tree of arrays}
Batch = Mapping[str, Array]  # {'image': [b, h, w, c] float32 in [0, 1], 'label': [b] int32, ...}
Variables = Mapping[str, Any]  # {'params': {group: tree}, 'stats': {group: tree}, 'carry': tree}


# ---------------------------------------------------------------------------------------------- networks


class Distribution(Protocol):
  """A density over arrays; a pytree."""

  @property
  def mean(self) -> Array: ...

  def log_prob(self, value: Array) -> Array: ...

  def sample(self, key: Key) -> Array: ...


@struct.dataclass
class Trace:
  """What one stochastic pass through a latent-variable network leaves behind; all terms in nats.

  A level is a resolution, coarse to fine; a group is one stochastic layer in it. Per-level leaves are stacked over the g
  groups of the level, as a scan makes them and as vmapped critics want them. A plain VAE is one level with g = 1.
  Passes that only generate have `log_q = ()` and no `kl`, `log_px` or `posterior`.
  """

  eps: tuple[Array, ...]  # per level [g, k, b, ...]; noise coordinates under the prior, z = loc + scale * eps
  z: tuple[Array, ...]  # per level [g, k, b, ...]; latent coordinates
  log_q: tuple[Array, ...]  # per level [g, k, b]
  log_p: tuple[Array, ...]  # per level [g, k, b], under the model's prior
  kl: tuple[Array, ...] | None  # per level [g, k, b]; closed form, where the network has one
  context: tuple[Array, ...]  # per level [g, k, b, ...]; top-down state that parametrises p(z_l | z_<l)
  prior: tuple[Any, ...] | None  # per level, the Normal p(z_l | z_<l) over [g, k, b, ...]; None if not location-scale
  log_px: Array | None  # [k, b]
  px: Distribution  # decoder output; log_prob(x [b, h, w, c]) is [k, b]
  posterior: tuple[Any, ...] | None = None  # per level, the Normal q(z_l | z_<l, x) over [g, k, b, ...]; None if not Gaussian
  label: Array | None = None  # [k, b, classes], one-hot: the class that was drawn or given, where the network has classes

  def log_weight(self) -> Array:
    """Importance log-weight log p(x, z) - log q(z | x), [k, b]."""
    return self.log_px + sum(p.sum(0) for p in self.log_p) - sum(q.sum(0) for q in self.log_q)

  def rate(self) -> tuple[Array, ...]:
    """Per level [g, k, b]: the closed-form KL where there is one, else its one-sample estimate log q - log p."""
    return self.kl if self.kl is not None else tuple(q - p for q, p in zip(self.log_q, self.log_p, strict=True))


class Choose(Protocol):
  """Picks one group during top-down generation; the hook for SIR, Langevin, fixed latents or a learned prior.

  Args:
    level: index of the level, coarse to fine (a Python int).
    group: index of the group in its level (an int or, inside a scan, a traced scalar).
    prior: base conditional p(z_l | z_<l), batch shape [n, ...]; of methods.mixture the mixture, which is the model's own.
    context: top-down state, [n, ...].
    key: PRNG key of this group.

  Returns:
    z, [n, ...].
  """

  def __call__(self, level: int, group: Any, prior: Any, context: Array, key: Key) -> Array: ...


def ancestral(level: int, group: Any, prior: Any, context: Array, key: Key) -> Array:
  """The `Choose` that draws from the base prior."""
  del level, group, context
  return prior.sample(key)


class LatentNet(Protocol):
  """What every latent-variable network offers. A Flax module; these are its methods, called through `net.apply`.

  The rng stream is 'sample'. Parameters under a module whose name is `encoder` or `posterior` belong to inference, all
  others to the generative model: `latentgen.nets.groups` splits on this.
  """

  def infer(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """Posterior pass: x [b, h, w, c] in [0, 1] -> Trace with k samples an image."""
    ...

  def simulate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0, train: bool = False) -> Trace:
    """Top-down pass without data: a Trace with k = 1 and b = n."""
    ...

  def generate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0) -> Distribution:
    """`simulate(...).px` without its k axis: a distribution over [n, h, w, c]."""
    ...


class Density(Protocol):
  """A density over vectors that is learned from examples of them; a prior on noise coordinates. All of it is traceable.

  It has either `loss`, for gradient steps, or `fit(key, vectors) -> params` on numpy arrays [n, d], for a stage in closed form.
  """

  exact: bool  # `log_prob` is there, and is the log-density itself
  samplers: tuple[str, ...]  # names that `sample` accepts; the first is the default

  def init(self, key: Key, d: int) -> Any:
    """Parameters for vectors of d dimensions; shapes may depend on options, not on the examples."""
    ...

  def loss(self, params: Any, key: Key, u: Array) -> Array:
    """[n, d] -> what is minimised, per example [n]; in nats if `exact`."""
    ...

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    """[n, d]."""
    ...

  def log_prob(self, params: Any, u: Array) -> Array:
    """[n, d] -> nats, [n]; only if `exact`."""
    ...

  def evaluations(self, params: Any, d: int, sampler: str) -> float:
    """Network evaluations that one sample takes."""
    ...


# ---------------------------------------------------------------------------------------------- methods


@struct.dataclass
class Context:
  """All that a loss may read besides the parameters."""

  batch: Batch  # preprocessed
  key: Key  # typed; folded from the run's seed, the stage, the step and the update
  step: Array  # [] int32, counts from 0 within the stage
  stats: Mapping[str, Any]  # state without gradient (BatchNorm statistics, power-iteration vectors)
  carry: Any = ()  # what lives from step to step (chains, replay buffers), as `prepare` left it
  shared: Any = ()  # what `prepare` computed for this step
  ema: Mapping[str, Any] = struct.field(default_factory=dict)  # {group: averaged parameters}, where a stage keeps them


class Aux(NamedTuple):
  """What a loss returns beside its value."""

  metrics: Mapping[str, Array | Mapping[str, Array]] = {}  # scalars, nats unless the name says otherwise
  stats: Mapping[str, Any] = {}  # entries of `ctx.stats` that changed


LossFn = Callable[[Params, Context], tuple[Array | Mapping[str, Array], Aux]]


@dataclasses.dataclass(frozen=True)
class Update:
  """One gradient update: `loss` is minimised over the parameter groups `wrt`, on every `every`-th step (the first is step `every`).

  Simultaneous updates of one and the same loss are one pass, with one key, of which each takes its groups' gradients. Updates that
  differ in what they descend but share the forward pass name one function too: what it gives as {update's name: scalar}, its loss
  or a metric, holds each update's own.
  """

  name: str
  wrt: tuple[str, ...]
  loss: LossFn
  every: int = 1


class Method(Protocol):
  """A training dynamics as pure functions. `order` says whether all updates see the same parameters or the newest.

  `methods.base.Base` gives the defaults. `variables` is {'params', 'stats'} with EMA weights where a stage keeps them.

  Optional, and traceable:
    inpaint(variables, x [b, h, w, c], mask, key) -> images [b, h, w, c] whose pixels are drawn anew where the mask, which
      broadcasts to x, is 0, given those where it is 1.
  """

  order: Literal['simultaneous', 'sequential']
  samplers: tuple[str, ...]  # names that `sample` accepts; the first is the default

  def init(self, key: Key, batch: Batch) -> Variables: ...

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    """Stochastic work that the updates of a step share: (shared, carry). No gradient flows out."""
    ...

  def updates(self) -> tuple[Update, ...]: ...

  def sample(self, variables: Variables, key: Key, n: int, sampler: str | None = None, temperature: float = 1.0) -> Array:
    """[n, h, w, c] images, the means of the decoder's distribution."""
    ...

  def metrics(self, params: Params, ctx: Context) -> Mapping[str, Array]:
    """Per example [b]; evaluation only."""
    ...


class LatentModel(Protocol):
  """What evaluation reads of a method that has latents, in evaluation mode.

  Optional, where the method knows such a thing, and traceable as the rest:
    classify(variables, x [b, h, w, c], key) -> log p(y | x), [b, classes];
    cluster(variables, x, key) -> log p(component | x), [b, components];
    mixture(variables) -> distributions.GaussianMixture, the prior over a single group of latents;
    propose(variables, x, key, k) -> Trace whose samples and `log_q` are those of a better proposal for importance weights;
    logits(variables, x, key), partition(variables, x, key, proposals): of priors that tilt, see methods.nce;
    ratios(variables, x, key) -> {'positive', 'negative'}: logits of a chain of ratios, [K, b];
    anomaly_scores(variables, x, key) -> {name: [b]}, larger for what is more anomalous;
    starts, place, picture: from a density's base to images, see methods.density;
    evaluations(variables, sampler) -> evaluations of the prior's networks that one sample takes (not traceable).
  """

  samplers: tuple[str, ...]
  density: bool  # traces hold log q and log p, so that there are bounds on log p(x)

  def trace(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    """Posterior samples; `log_p` is under the method's own prior, learned tilts included."""
    ...

  def simulate(
    self,
    variables: Variables,
    key: Key,
    n: int,
    sampler: str | None = None,
    temperature: float = 1.0,
    choose: Choose | None = None,
    label: Array | None = None,
  ) -> Trace:
    """A top-down pass; `label` [n, classes], one-hot, is the class of each where the network has classes, which it draws if None.

    `label` may be missing from a method whose traces have none.
    """
    ...


# ---------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Stage:
  """One method, its optimisers, its length, and what it takes over from earlier stages."""

  name: str
  method: Method
  optim: Mapping[str, optax.GradientTransformation]  # {update: optimiser}
  steps: int
  load: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {parameter group: earlier stage}
  fit: Callable[[Variables, Any, Key], Variables] | None = None
  # closed-form stages: (variables, iterable over the preprocessed training batches, key) -> variables; steps is 0
  ema: Mapping[str, float] = dataclasses.field(default_factory=dict)  # {parameter group: decay}
  best: str | None = None  # validation metric (lower is better) that picks the step whose weights the stage hands on
  patience_steps: int = 0  # the stage ends when the metric has not been better for so many steps; 0: only at its last


Recipe = tuple[Stage, ...]


@struct.dataclass
class TrainState:
  """All that is saved, besides the data iterator."""

  step: Array  # [] int32
  params: Any  # {group: tree}
  stats: Any
  carry: Any
  opt: Any  # {update: optimiser state}
  ema: Any  # {group: tree}
  skipped: Array  # [] int32, steps undone as something in them was not finite
