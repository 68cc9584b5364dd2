"""Score matching, annealed Langevin dynamics and inpainting with scores that are known; the score network's parts by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal, stats

from latentgen import losses, samplers
from latentgen.data.source import ArraySource
from latentgen.errors import UserError
from latentgen.evaluate import Subject, run_all
from latentgen.methods import score
from latentgen.nets import convolution, layers, ncsn
from latentgen.types import Context

KEY = jax.random.key(0)
CENTRES, SHARES = jnp.array([[5.0, 5.0], [-5.0, -5.0]]), jnp.array([0.8, 0.2])


# ---------------------------------------------------------------------------------------- the ladder and the sampler


def test_ladder_is_geometric():
  sigmas = samplers.geometric_ladder(1.0, 0.01, 10)
  np.testing.assert_allclose(sigmas, 10 ** (-2 * np.arange(10) / 9), rtol=1e-5)
  np.testing.assert_allclose(samplers.geometric_ladder(0.3, 0.3, 1), [0.3], rtol=1e-6)
  for start, end, levels in ((0.1, 1.0, 3), (1.0, 1.0, 2), (1.0, 0.0, 3), (1.0, 0.1, 1), (1.0, 0.5, 0)):
    with pytest.raises(ValueError, match='falling ladder'):
      samplers.geometric_ladder(start, end, levels)


def test_step_sizes_keep_the_signal_to_noise_ratio_of_an_update():
  sigmas = np.array([7.0, 2.0, 0.5])
  steps = np.asarray(samplers.step_sizes(jnp.float32(sigmas), 0.03), np.float64)
  np.testing.assert_allclose(steps[-1], 0.03, rtol=1e-6)
  drift, noise = steps / 2 * (1 / sigmas), np.sqrt(steps)  # scores are of order 1 / sigma
  np.testing.assert_allclose(drift / noise, np.full(3, np.sqrt(0.03) / (2 * 0.5)), rtol=1e-6)


def mixture_score(x, level, sigma):
  """Of the mixture whose components have standard deviation sigma."""
  del level
  log_p = jnp.log(SHARES) - jnp.square(x[:, None] - CENTRES).sum(-1) / (2 * sigma**2)
  weight = jax.nn.softmax(log_p, -1)
  return ((weight[..., None] * CENTRES).sum(1) - x) / sigma**2


@pytest.mark.parametrize('levels, steps, want, atol', [(10, 100, 0.80, 0.03), (1, 1000, 0.50, 0.05)])
def test_annealing_finds_the_shares_of_far_modes(levels, steps, want, atol):
  """Two modes ten deviations apart: a single level keeps the shares of the start, which are equal."""
  sigmas = samplers.geometric_ladder(20.0 if levels > 1 else 1.0, 1.0, levels)
  x0 = jax.random.uniform(KEY, (4000, 2), minval=-8.0, maxval=8.0)
  run = jax.jit(lambda key: samplers.annealed_langevin(mixture_score, key, x0, sigmas, steps=steps, eps=0.1))
  x = np.asarray(run(jax.random.key(1)))
  right = x.sum(1) > 0
  assert abs(right.mean() - want) < atol
  np.testing.assert_allclose(np.cov(x[right].T), np.eye(2), atol=0.12)


def gaussian_score(x, level, sigma):
  del level, sigma
  return -x


@pytest.mark.parametrize('convention, variance', [('half', lambda a: 1 / (1 - a / 4)), ('full', lambda a: 1 / (1 - a / 2))])
def test_variance_of_either_convention(convention, variance):
  x0 = jax.random.normal(KEY, (100_000, 1))
  for a in (0.2, 0.8):
    run = functools.partial(samplers.annealed_langevin, gaussian_score, steps=60, eps=a, convention=convention)
    x = jax.jit(lambda key, run=run: run(key, x0, jnp.ones(1)))(jax.random.key(2))
    np.testing.assert_allclose(x.var(), variance(a), rtol=5 * np.sqrt(2 / 100_000))


def test_full_steps_are_half_steps_of_twice_the_size():
  sigmas, x0 = samplers.geometric_ladder(2.0, 0.5, 3), jnp.ones((5, 2))
  run = functools.partial(samplers.annealed_langevin, mixture_score, KEY, x0, sigmas, steps=4)
  np.testing.assert_allclose(run(eps=0.02, convention='half'), run(eps=0.01, convention='full'), rtol=1e-5)
  assert np.abs(run(eps=0.02, convention='full') - run(eps=0.01, convention='full')).max() > 1e-3


def test_sampler_passes_levels_and_sigmas_in_order():
  """Without noise, a score that is the index: x grows by c sum_i a_i i T."""
  sigmas = jnp.array([4.0, 2.0, 1.0])
  run = functools.partial(samplers.annealed_langevin, steps=5, eps=0.1, temperature=0.0)
  x = run(lambda x, level, sigma: jnp.ones_like(x) * level, KEY, jnp.zeros((2, 3)), sigmas)
  np.testing.assert_allclose(x, 0.5 * 5 * 0.1 * (16 * 0 + 4 * 1 + 1 * 2), rtol=1e-5)
  x = run(lambda x, level, sigma: jnp.ones_like(x) * sigma, KEY, jnp.zeros((2, 3)), sigmas)
  np.testing.assert_allclose(x, 0.5 * 5 * 0.1 * (16 * 4 + 4 * 2 + 1 * 1), rtol=1e-5)


def test_last_denoising_is_the_mean_given_the_noisy_point():
  """N(0, s^2) data: E[x | y] = y s^2 / (s^2 + sigma^2)."""
  s2, sigmas = 0.7, jnp.array([1.0, 0.5])
  oracle = lambda x, level, sigma: -x / (s2 + sigma**2)
  run = functools.partial(samplers.annealed_langevin, oracle, KEY, jnp.ones((6, 2)), sigmas, steps=3, eps=0.05)
  np.testing.assert_allclose(run(denoise=True), run() * s2 / (s2 + 0.25), rtol=1e-5)


@pytest.mark.parametrize('options, message', [(dict(steps=0), 'steps is 0'), (dict(steps=1, convention='third'), 'third')])
def test_sampler_refuses(options, message):
  with pytest.raises(Exception, match=message):
    samplers.annealed_langevin(gaussian_score, KEY, jnp.zeros((1, 1)), jnp.ones(1), eps=0.1, **options)


@pytest.mark.parametrize('eps, steps, mean, variance', [(2e-3, 300, 1.801, 0.190), (1e-3, 100, 1.787, 0.200)])
def test_inpainting_of_a_correlated_gaussian(eps, steps, mean, variance):
  """Correlation 0.9, the first coordinate known to be 2: the second is N(1.8, 0.19); long chains reach it."""
  cov = jnp.array([[1.0, 0.9], [0.9, 1.0]])
  oracle = lambda x, level, sigma: -jnp.linalg.solve(cov + sigma**2 * jnp.eye(2), x.T).T
  clamp = lambda x, sigma, key: x.at[:, 0].set(2.0 + sigma * jax.random.normal(key, x.shape[:1]))
  sigmas = samplers.geometric_ladder(3.0, 0.05, 10)
  run = functools.partial(samplers.annealed_langevin, oracle, steps=steps, eps=eps, clamp=clamp)
  x = jax.jit(lambda key: run(key, jax.random.uniform(KEY, (8000, 2)), sigmas))(jax.random.key(3))
  np.testing.assert_allclose(x[:, 1].mean(), mean, atol=0.04)
  np.testing.assert_allclose(x[:, 1].var(), variance, atol=0.02)
  np.testing.assert_allclose([x[:, 0].mean(), x[:, 0].std()], [2.0, 0.05], atol=0.003)


# ---------------------------------------------------------------------------------------- losses

MU, S = np.array([1.0, -2.0]), np.array([[1.0, 0.6], [0.6, 2.0]])


def gaussian_data(n, key=KEY):
  root = jnp.float32(np.linalg.cholesky(S))
  return jnp.float32(MU) + jax.random.normal(key, (n, 2)) @ root.T


OBJECTIVES = {
  'denoising': losses.denoising_score_matching,
  'sliced': losses.noisy_sliced_score_matching,
  'sliced, not reduced': functools.partial(losses.noisy_sliced_score_matching, variance_reduced=False),
}


@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_perturbed_score_is_the_least_linear_one(name):
  """s(x) = A x + b at A = -(S + sigma^2 I)^-1, b = -A mu: no gradient there, one elsewhere."""
  sigma, n = 0.7, 100_000
  best = -np.linalg.inv(S + sigma**2 * np.eye(2))
  x = gaussian_data(n)

  def loss(a, b, key):
    score_fn = lambda y, s: y @ a.T + b
    return OBJECTIVES[name](score_fn, key, x, jnp.full((n,), sigma)).mean()

  grad = jax.jit(jax.grad(loss, (0, 1)))
  norm = lambda a, b: np.sqrt(sum(float(jnp.square(g).sum()) for g in grad(jnp.float32(a), jnp.float32(b), jax.random.key(1))))
  tolerance = 0.02 if name == 'denoising' else 0.04
  assert norm(best, -best @ MU) < tolerance
  assert norm(0.8 * best, -0.8 * best @ MU) > 2 * tolerance


@pytest.mark.parametrize('name', OBJECTIVES)
def test_differences_are_those_of_explicit_score_matching(name):
  """E (1/2) |s(y) - true score(y)|^2 over perturbed data, between two settings, in closed form for linear scores."""
  sigma, n = 0.5, 200_000
  total = S + sigma**2 * np.eye(2)
  precision = np.linalg.inv(total)

  def explicit(a, b):
    gap, shift = a + precision, a @ MU + b  # s - true = gap (y - mu) + shift
    return 0.5 * (np.trace(gap @ total @ gap.T) + shift @ shift)

  settings = [(-0.4 * np.eye(2), np.array([0.3, -0.5])), (np.array([[-0.7, 0.1], [0.3, -0.5]]), np.array([0.5, -1.0]))]
  x, sigmas = gaussian_data(n), jnp.full((n,), sigma)
  found = []
  for a, b in settings:
    score_fn = lambda y, s, a=a, b=b: y @ jnp.float32(a).T + jnp.float32(b)
    found.append(np.asarray(OBJECTIVES[name](score_fn, jax.random.key(4), x, sigmas, power=0.0), np.float64))
  difference = found[0] - found[1]
  want = explicit(*settings[0]) - explicit(*settings[1])
  error = difference.std() / np.sqrt(n)
  assert abs(want) > 10 * error
  assert abs(difference.mean() - want) < 4.5 * error


@pytest.mark.parametrize('power', [2.0, 0.0])
def test_weight_puts_all_levels_on_one_scale(power):
  """N(0, s^2 I_D) and its true scores: sigma^2 loss = D s^2 / (2 (s^2 + sigma^2)), at most D / 2."""
  s, d, n = 0.5, 3, 40_000
  x = s * jax.random.normal(KEY, (n, d))
  for sigma in (1.0, 0.2, 0.01):
    loss = losses.denoising_score_matching(
      lambda y, level: -y / (s**2 + jnp.square(level)[:, None]), jax.random.key(5), x, jnp.full((n,), sigma), power=power
    )
    want = 0.5 * d * s**2 / (s**2 + sigma**2) * sigma ** (power - 2)
    np.testing.assert_allclose(loss.mean(), want, rtol=5 * np.sqrt(2 / (d * n)))
    assert power == 0 or want <= d / 2


def test_sliced_forms_agree_on_average_and_one_varies_less():
  a = jnp.float32(np.random.default_rng(0).normal(size=(4, 4)))
  x = jnp.full((50_000, 4), 0.7)
  loss = lambda flag: losses.sliced_score_matching(lambda y: y @ a.T, KEY, x, variance_reduced=flag)
  reduced, plain = (np.asarray(loss(flag), np.float64) for flag in (True, False))
  want = np.trace(a) + 0.5 * np.square(np.asarray(a) @ np.full(4, 0.7)).sum()
  for found in (reduced, plain):
    np.testing.assert_allclose(found.mean(), want, atol=5 * found.std() / np.sqrt(50_000))
  assert reduced.std() < plain.std()


# ---------------------------------------------------------------------------------------- the method


@dataclasses.dataclass(frozen=True)
class Oracle:
  """A network that is the perturbed score of pixels N(1/2, s^2), times one parameter; the ladder is that of the method."""

  s: float = 0.1
  start: float = 1.0
  end: float = 0.05
  levels: int = 5
  image_shape: tuple[int, int, int] = (4, 4, 1)
  divide: bool = False

  def init(self, key, x, level):
    assert x.shape[1:] == self.image_shape and level.shape == x.shape[:1]
    return {'params': {'factor': jnp.ones(())}}

  def apply(self, variables, x, level):
    sigma = self.start * (self.end / self.start) ** (level[:, None, None, None] / (self.levels - 1))
    field = variables['params']['factor'] * (0.5 - x) / (self.s**2 + sigma**2)
    return field * sigma if self.divide else field


def oracle(**options):
  net = Oracle(divide=options.get('divide', False))
  method = score.build(net, 10, start=net.start, end=net.end, langevin_steps=40, step_size=5e-4, **options)
  return net, method, method.init(KEY, {'image': jnp.zeros((2, 4, 4, 1))})


def context(net, n):
  x = 0.5 + net.s * jax.random.normal(jax.random.key(6), (n, *net.image_shape))
  return Context(batch={'image': x}, key=jax.random.key(7), step=jnp.zeros((), jnp.int32), stats={})


@pytest.mark.parametrize('divide', [False, True])
def test_loss_averages_the_levels(divide):
  net, method, variables = oracle(divide=divide)
  sigma2 = (net.start * (net.end / net.start) ** (np.arange(5) / 4)) ** 2
  want = (8 * net.s**2 / (net.s**2 + sigma2)).mean()  # D = 16
  ctx = context(net, 20_000)
  loss, aux = jax.jit(method.loss)(variables['params'], ctx)
  np.testing.assert_allclose(loss, want, rtol=0.03)
  np.testing.assert_allclose(aux.metrics['denoising'], loss)
  found = jax.jit(method.metrics)(variables['params'], ctx)['denoising']
  assert found.shape == (20_000,)
  np.testing.assert_allclose(found.mean(), want, rtol=0.01)
  grad = jax.jit(jax.grad(lambda p: method.loss(p, ctx)[0]))(variables['params'])
  assert abs(float(grad['score']['factor'])) < 0.02 * 16  # least at the true score


@pytest.mark.parametrize('reduced', [True, False])
def test_sliced_loss_averages_the_levels(reduced):
  """sigma^2 (tr J + |s|^2 / 2) of the true score is -sigma^2 D / (2 (s^2 + sigma^2)) on average."""
  net, method, variables = oracle(objective='sliced', variance_reduced=reduced, projections=2)
  sigma2 = (net.start * (net.end / net.start) ** (np.arange(5) / 4)) ** 2
  loss, aux = jax.jit(method.loss)(variables['params'], context(net, 40_000))
  np.testing.assert_allclose(loss, -(8 * sigma2 / (net.s**2 + sigma2)).mean(), rtol=0.03)
  assert set(aux.metrics) == {'sliced'}


def chain_variance(net, sampler, temperature=1.0):
  """Of chains with 'full' steps by its recursion, v <- v (1 - a / t)^2 + 2 a, t = s^2 + sigma^2, from that of U[0, 1]."""
  sigma2 = (net.start * (net.end / net.start) ** (np.arange(5) / 4)) ** 2
  v = 1 / 12
  for level in [4] * 5 if sampler == 'single' else range(5):
    a, t = 5e-4 * sigma2[level] / sigma2[4], net.s**2 + sigma2[level]
    for _ in range(40):
      v = v * (1 - a / t) ** 2 + 2 * a * temperature**2
  return v * (net.s**2 / (net.s**2 + sigma2[4])) ** 2 if sampler == 'denoised' else v


def test_samples_have_the_moments_of_the_data():
  net, method, variables = oracle(single_step_size=5e-4)
  for sampler, temperature in (('annealed', 1.0), ('denoised', 1.0), ('single', 1.0), (None, 0.5)):
    draw = jax.jit(lambda v, key, s=sampler, t=temperature: method.sample(v, key, 4000, s, t))
    x = draw(variables, jax.random.key(8))
    assert x.shape == (4000, 4, 4, 1)
    want = np.sqrt(chain_variance(net, sampler, temperature))
    np.testing.assert_allclose([x.mean(), x.std()], [0.5, want], rtol=0.01)  # 64,000 pixels: 3.5 standard errors
  assert np.sqrt(chain_variance(net, 'denoised')) < 1.1 * net.s  # and that is the data's
  with pytest.raises(UserError, match='--sampler=base'):
    method.sample(variables, KEY, 2, 'base')


def test_inpainting_keeps_what_is_known():
  net, method, variables = oracle(inpainting_step_size=5e-4)
  x = jnp.full((500, 4, 4, 1), 0.9)
  mask = (jnp.arange(4) < 2)[:, None]  # left half
  drawn = jax.jit(method.inpaint)(variables, x, mask, KEY)
  assert (drawn[:, :, :2] == x[:, :, :2]).all()
  np.testing.assert_allclose([drawn[:, :, 2:].mean(), drawn[:, :, 2:].std()], [0.5, 0.09], atol=0.01)  # pixels are independent
  other = jax.jit(method.inpaint)(variables, jnp.where(mask, x, 0.3), mask, KEY)
  np.testing.assert_array_equal(other, drawn)  # hidden pixels are not looked at


@pytest.mark.parametrize('options, message', [
  (dict(objective='sliding'), "method.objective is 'sliding'"), (dict(convention='none'), 'method.convention'),
  (dict(langevin_steps=0), 'method.langevin_steps is 0'), (dict(projections=True), 'method.projections'),
  (dict(step_size=0.0), 'method.step_size is 0.0'), (dict(start=0.01), 'method.start is 0.01'),
  (dict(power=-1.0), 'method.power'),
])  # fmt: skip
def test_method_refuses(options, message):
  with pytest.raises(UserError, match=message) as error:
    score.build(Oracle(), 10, **options)
  assert '\n' not in str(error.value)


def test_method_refuses_networks_without_levels():
  with pytest.raises(UserError, match='method.name'):
    score.build(object(), 10)


# ---------------------------------------------------------------------------------------- the evaluation task


@dataclasses.dataclass(frozen=True)
class Copies:
  """Fills hidden pixels with the mirror image of known ones, plus or minus 1/10 by the key."""

  samplers = ('base',)

  def inpaint(self, variables, x, mask, key):
    sign = jnp.where(jax.random.bernoulli(key), 0.1, -0.1)
    return jnp.where(mask, x, jnp.clip(x[:, :, ::-1] + sign, 0, 1))


def test_inpainting_task_by_hand():
  rng = np.random.default_rng(0)
  half = rng.integers(80, 180, (100, 4, 2, 1))
  images = np.concatenate([half, half[:, :, ::-1]], 2).astype(np.uint8)
  data = {'train': ArraySource(images[:60], None), 'test': ArraySource(images[60:], None)}
  preprocess = lambda key, batch, train: {**batch, 'image': batch['image'].astype(jnp.float32) / 255}
  subject = Subject(Copies(), {'params': {}, 'stats': {}}, data, preprocess, jax.random.key(3), 16)
  found = run_all(subject, {'inpainting': {'draws': 3, 'images': 2}})
  x = images / 255
  trivial = np.square(x[60:] - x[:60].mean(0))[:, :, 2:].mean((1, 2, 3))
  mean = found.results['inpainting/mse_training_mean']
  np.testing.assert_allclose([mean.value, mean.stderr], [trivial.mean(), trivial.std(ddof=1) / np.sqrt(40)], rtol=1e-5)
  np.testing.assert_allclose(found.results['inpainting/mse_draw'].value, 0.01, rtol=1e-4)
  assert found.results['inpainting/mse_draw'].n == 40
  assert found.results['inpainting/mse_average'].value < 0.01 + 1e-6
  picture = found.images['inpainting'].array
  assert picture.dtype == np.uint8 and picture.shape[1] > picture.shape[0]  # 2 rows of 5


@pytest.mark.parametrize('hidden', ['left', 'right', 'top', 'bottom', 'random'])
def test_hidden_part(hidden):
  seen = []

  class Looks(Copies):
    def inpaint(self, variables, x, mask, key):
      seen.append(np.asarray(mask)[..., 0])
      return x

  images = np.full((40, 4, 6, 1), 100, np.uint8)
  data = {'train': ArraySource(images, None), 'test': ArraySource(images, None)}
  preprocess = lambda key, batch, train: {**batch, 'image': batch['image'].astype(jnp.float32) / 255}
  subject = Subject(Looks(), {'params': {}, 'stats': {}}, data, preprocess, KEY, 40)
  found = run_all(subject, {'inpainting': {'hidden': hidden}})
  known = np.ones((4, 6), bool)
  part = {'left': np.s_[:, :3], 'right': np.s_[:, 3:], 'top': np.s_[:2], 'bottom': np.s_[2:]}.get(hidden)
  if part is None:
    assert 0 < seen[0].sum() < 24
  else:
    known[part] = False
    np.testing.assert_array_equal(seen[0], known)
  # What is hidden is not handed over: the method saw 0 there and gave it back.
  np.testing.assert_allclose(found.results['inpainting/mse_draw'].value, (100 / 255) ** 2, rtol=1e-5)


def test_inpainting_task_refuses():
  data = {'test': ArraySource(np.zeros((2, 4, 4, 1), np.uint8), None)}
  subject = Subject(Copies(), {}, data, None, KEY)
  with pytest.raises(UserError, match='config.evaluate.inpainting.hidden'):
    run_all(subject, {'inpainting': {'hidden': 'rihgt'}})
  with pytest.raises(UserError, match="needs a method with 'inpaint'"):
    run_all(dataclasses.replace(subject, method=Oracle()), {'inpainting': {}})


# ---------------------------------------------------------------------------------------- the network


def test_norm_is_the_papers():
  rng = np.random.default_rng(0)
  x, table = rng.normal(2.0, 3.0, (3, 4, 5, 6)), rng.normal(size=(7, 3, 6))
  level = np.array([6, 0, 2])
  got = ncsn.Norm(7).apply({'params': {'table': jnp.float32(table)}}, jnp.float32(x), jnp.asarray(level))
  for b in range(3):
    gamma, alpha, beta = table[level[b]]
    means = x[b].mean((0, 1))
    h = stats.zscore(x[b].reshape(20, 6), 0).reshape(4, 5, 6)
    want = gamma * (h + alpha * stats.zscore(means, ddof=1)) + beta
    np.testing.assert_allclose(got[b], want, atol=2e-4)


def test_norm_starts_as_published():
  table = ncsn.Norm(50).init(KEY, jnp.zeros((1, 2, 2, 40)), jnp.zeros(1, jnp.int32))['params']['table']
  np.testing.assert_allclose(table[:, :2].mean(), 1.0, atol=0.002)
  np.testing.assert_allclose(table[:, :2].std(), 0.02, rtol=0.05)
  assert (table[:, 2] == 0).all()


@pytest.mark.parametrize('dilation, shape', [(1, (5, 6)), (2, (8, 8)), (2, (5, 7)), (4, (4, 4)), (4, (7, 9)), (3, (2, 5))])
def test_dilated_convolution_is_scipys(dilation, shape):
  rng = np.random.default_rng(1)
  x, kernel, bias = rng.normal(size=(2, *shape, 2)), rng.normal(size=(3, 3, 2, 3)), rng.normal(size=3)
  params = {'params': {'conv': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}}
  got = ncsn.Dilated(3, dilation).apply(params, jnp.float32(x))
  wide = np.zeros((2 * dilation + 1, 2 * dilation + 1, 2, 3))
  wide[::dilation, ::dilation] = kernel
  for b in range(2):
    for o in range(3):
      want = sum(signal.correlate2d(x[b, ..., i], wide[..., i, o], 'same') for i in range(2)) + bias[o]
      np.testing.assert_allclose(got[b, ..., o], want, atol=1e-4)


@pytest.mark.parametrize('shape', [(3, 8), (7, 5)])
def test_pooling_is_scipys(shape):
  x = np.random.default_rng(2).normal(size=(2, *shape, 3))
  got = ncsn._pool(jnp.float32(x))
  want = ndimage.uniform_filter(x, (1, 5, 5, 1), mode='constant')
  np.testing.assert_allclose(got, want, atol=1e-5)


@functools.cache
def small():
  net = ncsn.build((8, 8, 1), levels=3, channels=4, units=1, dilations=(1, 2))
  x = jax.random.uniform(KEY, (3, 8, 8, 1))
  rng = np.random.default_rng(0)  # instead of an initialisation, which takes longer to compile than all else here
  shapes = jax.eval_shape(net.init, KEY, x, jnp.zeros(3, jnp.int32))
  params = jax.tree.map(lambda a: jnp.float32(0.3 * rng.normal(size=a.shape)), shapes)
  return jax.jit(net.apply), params, x


def test_sliced_loss_goes_through_the_convolutions_own_gradients():
  """Second derivatives of a network on a CPU are those of XLA's convolutions."""
  first, second = (layers.Conv(n, 3) for n in (5, 2))
  x = jax.random.normal(KEY, (3, 6, 6, 2))

  def loss(params):
    score_fn = lambda y, s: second.apply(params[1], jax.nn.elu(first.apply(params[0], y)))
    return losses.noisy_sliced_score_matching(score_fn, jax.random.key(2), x, jnp.full((3,), 0.3), projections=2).mean()

  params = first.init(KEY, x), second.init(KEY, jnp.zeros((3, 6, 6, 5)))
  found = {}
  for name in ('native', 'custom'):
    with convolution.implementation(name):
      found[name] = jax.jit(lambda p: jax.value_and_grad(loss)(p))(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found['custom'], found['native'])
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found['native'][1])) > 1e-3


def test_levels_change_the_output_and_the_batch_does_not():
  apply, params, x = small()
  level = jnp.array([0, 1, 2])
  y = apply(params, x, level)
  assert y.shape == x.shape and y.dtype == jnp.float32
  np.testing.assert_array_equal(y, apply(params, x, level))
  swapped = apply(params, x, jnp.array([1, 0, 2]))
  assert np.abs(swapped - y)[:2].max(axis=(1, 2, 3)).min() > 1e-4
  np.testing.assert_allclose(swapped[2], y[2], atol=1e-5)
  order = jnp.array([2, 0, 1])
  np.testing.assert_allclose(apply(params, x[order], level[order]), y[order], atol=1e-5)  # no statistics of the batch
  other = x.at[1:].set(0.0)
  np.testing.assert_allclose(apply(params, other, level)[0], y[0], atol=1e-5)


@pytest.mark.parametrize('channels, shape', [(64, (28, 28, 1)), (128, (32, 32, 3))])
def test_published_sizes(channels, shape):
  """Parameters counted from the description: convolutions k k i o + o, norms three numbers a level and channel."""
  net = ncsn.build(shape, channels=channels)
  tree = jax.eval_shape(net.init, KEY, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))
  c, d, image = channels, 2 * channels, shape[2]
  conv = lambda i, o, k=3, bias=True: k * k * i * o + bias * o
  norm = lambda i: 30 * i
  block = lambda i, o: norm(i) + norm(o) + conv(i, o) + conv(o, o)
  wider = lambda i, k: 2 * norm(i) + conv(i, i) + conv(i, d) + conv(i, d, k)  # the second of two convolutions widens
  units = lambda i, n: n * 2 * (norm(i) + conv(i, i, bias=False))
  pools = lambda i: 2 * (norm(i) + conv(i, i, bias=False))
  want = conv(image, c) + 2 * block(c, c) + wider(c, 1) + block(d, d) + 2 * (wider(d, 3) + block(d, d))
  want += units(d, 2) + pools(d) + units(d, 1)
  want += 2 * units(d, 2) + 2 * (norm(d) + conv(d, d)) + pools(d) + units(d, 1)
  want += 2 * units(d, 2) + 2 * (norm(d) + conv(d, c)) + pools(c) + units(c, 1)
  want += 2 * units(c, 2) + 2 * (norm(c) + conv(c, c)) + pools(c) + units(c, 3)
  want += norm(c) + conv(c, image)
  assert sum(a.size for a in jax.tree.leaves(tree)) == want


@pytest.mark.parametrize('shape, options, message', [
  ((8, 8, 1), dict(levels=0), 'model.levels is 0'), ((8, 8, 1), dict(dilations=(2,)), 'model.dilations'),
  ((7, 8, 1), {}, 'both sides must be even'), ((8, 8, 1), dict(dtype='float16'), "model.dtype is 'float16'"),
])  # fmt: skip
def test_network_refuses(shape, options, message):
  with pytest.raises(UserError, match=message):
    ncsn.build(shape, **options)
