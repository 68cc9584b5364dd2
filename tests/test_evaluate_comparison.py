"""Priors side by side, chains stage by stage, and the shares behind precision and coverage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from latentgen.data.source import ArraySource
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, check_subject, report, run_all, write_tables
from latentgen.evaluate.statistics import coverage
from latentgen.types import Trace


@dataclasses.dataclass(frozen=True)
class Prior:
  """Latents in the plane whose posterior is N(0, I) for every image; the prior is N(shift, I), its decoder writes them out."""

  shift: float = 0.0
  density: bool = True
  samplers = ('normal',)

  def _trace(self, z, **terms):
    image = jnp.pad(jax.nn.sigmoid(z).reshape(*z.shape[:2], 1, 2, 1), ((0, 0), (0, 0), (1, 2), (1, 1), (0, 0)))
    px = Independent(Normal(image, 0.1), 3)
    log_p = Normal(self.shift, 1.0).log_prob(z).sum(-1)
    return Trace((z[None],), (z[None],), terms.get('log_q', ()), (log_p[None],), None, (), None, terms.get('log_px'), px)

  def trace(self, variables, x, key, k=1):
    z = jax.random.normal(key, (k, len(x), 2))
    return self._trace(z, log_q=(Normal(0.0, 1.0).log_prob(z).sum(-1)[None],), log_px=jnp.zeros((k, len(x))))

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None):
    return self._trace(self.shift + temperature * jax.random.normal(key, (1, n, 2)))

  def sample(self, variables, key, n, sampler=None, temperature=1.0):
    return self.simulate(variables, key, n).px.mean[0]

  def evaluations(self, variables, sampler):
    return 7.0


@dataclasses.dataclass(frozen=True)
class Wide(Prior):
  samplers = ('normal', 'wide')


def subject(**priors):
  z = np.random.default_rng(0).normal(size=(200, 2))
  images = np.zeros((200, 4, 4, 1), np.uint8)
  images[:, 1, 1:3, 0] = 255 / (1 + np.exp(-z))
  source = ArraySource(images, np.arange(200) % 2, 'squares')
  common = dict(
    variables={'params': {'encoder': {'w': jnp.zeros(9)}, 'prior': {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(1)}}},
    data={'train': source, 'valid': source, 'test': source},
    preprocess=lambda key, raw, train: {'image': raw['image'] / 255.0},
    key=jax.random.key(0), batch_size=50,
  )  # fmt: skip
  own = {name: Subject(method, **common) for name, method in priors.items()}
  stages = {name: lambda name=name: own[name] for name in own}
  return dataclasses.replace(next(iter(own.values())), stages=stages, seconds={name: 1.5 for name in own})


SMALL = dict(steps=20, repeats=3, likelihood_samples=4, likelihood_chunk=2, timed=50, count=4)


def test_the_better_prior_wins_every_column_and_its_cost_is_counted(tmp_path):
  target = subject(far=Prior(2.0), start=Prior(9.0), near=Prior(0.0))
  found = run_all(target, {'comparison': dict(priors=(('far', 'far'), ('near', 'start', 'near')), **SMALL)})
  value = lambda name: found.results[f'comparison/{name}'].value
  assert value('far/auroc') > 0.9 and abs(value('near/auroc') - 0.5) < 0.1
  for what in ('frechet', 'kernel'):
    assert value(f'near/{what}') < value(f'far/{what}')
  for what in ('precision', 'coverage', 'recall', 'elbo', 'iwae'):
    assert value(f'near/{what}') > value(f'far/{what}')
  # KL(N(0, I) || N(2, I)) = 4 in the plane; the posterior is the prior of 'near', where all bounds are log p(x) = 0.
  assert value('near/iwae') == pytest.approx(0.0, abs=1e-5)
  assert value('far/elbo') == pytest.approx(-4.0, abs=0.7) and value('far/gain') == 0.0
  assert value('near/gain') == pytest.approx(-value('far/iwae'), abs=1e-5)
  assert value('near/parameters') == 7 and value('near/evaluations') == 7.0
  table = found.tables['comparison']
  assert [row[0] for row in table.rows] == ['training images', 'far', 'near']
  column = {name: i for i, name in enumerate(table.columns)}
  assert table.rows[2][column['training, s']] == '3' and table.rows[1][column['training, s']] == '1.5'
  assert (2, column['latent AUROC']) in table.bold and (1, column['latent AUROC']) not in table.bold
  assert not any('training' in name or 'second' in name for name in found.results)  # no clock in the results
  write_tables(tmp_path / 'tables', found.tables)
  assert (tmp_path / 'tables' / 'comparison.csv').read_text().startswith('prior,latent AUROC,')
  page = report.write(
    tmp_path, config={}, header='A <title>', results=found.results, pictures=(), metrics=(), tables=found.tables.values()
  ).read_text()
  assert '<strong>' in page and table.title in page


def test_pictures_are_its_own_beside_those_of_samples():
  tasks = {'comparison': SMALL, 'samples': dict(samplers=('normal', 'wide'), count=4, parts=('samplers',))}
  found = run_all(subject(two=Wide()), tasks)
  assert {'comparison_samples', 'comparison_auroc', 'before_after', 'samples_normal'} <= found.images.keys()


def test_priors_without_a_density_have_no_bounds():
  found = run_all(subject(only=Prior(density=False)), {'comparison': SMALL})
  assert 'comparison/only/auroc' in found.results and 'comparison/only/elbo' not in found.results
  assert '–' in found.tables['comparison'].rows[1]


@pytest.mark.parametrize(
  ('priors', 'words'),
  [
    ((('flow', 'flw'),), ['config.evaluate.comparison.priors', "'flw'", "'flow'"]),
    ((('real', 'flow'),), ["'real' is taken"]),
    ((('flow',),), ["'flow' names no stage"]),
  ],
)
def test_bad_priors_name_the_key(priors, words):
  with pytest.raises(UserError) as caught:
    run_all(subject(flow=Prior()), {'comparison': dict(priors=priors, **SMALL)})
  assert all(word in str(caught.value) for word in words)


def test_coverage_is_what_nearest_neighbours_say():
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(120, 3)), 0.3 + 0.7 * rng.normal(size=(90, 3))
  k = 4
  reach = lambda a: NearestNeighbors(n_neighbors=k + 1).fit(a).kneighbors(a)[0][:, -1]
  distance = np.linalg.norm(real[:, None] - fake, axis=-1)
  inside, around = distance <= reach(real)[:, None], distance <= reach(fake)
  found = coverage(real, fake, k)
  assert found.precision == pytest.approx(np.mean([inside[:, j].any() for j in range(90)]))
  assert found.recall == pytest.approx(np.mean([around[i].any() for i in range(120)]))
  assert found.density == pytest.approx(inside.sum() / (k * 90))
  assert found.coverage == pytest.approx(np.mean([inside[i].any() for i in range(120)]))
  assert coverage(real, real + 100.0, k) == (0.0, 0.0, 0.0, 0.0)
  same = coverage(rng.normal(size=(800, 2)), rng.normal(size=(800, 2)))
  assert same.density == pytest.approx(1.0, abs=0.08) and min(same.precision, same.recall) > 0.93
  assert same.coverage == pytest.approx(1 - 2.0**-5, abs=0.03)  # 1 - C(m - 1, k) / C(n + m - 1, k), n = m large


@dataclasses.dataclass(frozen=True)
class Chain(Prior):
  def ratios(self, variables, x, key):
    ones = jnp.ones(len(x))
    return {'positive': jnp.stack([2 * ones, 0 * ones]), 'negative': jnp.stack([-ones, 0 * ones])}


def test_ratios_by_hand():
  found = run_all(subject(chain=Chain()), {'ratios': {}}).results
  want = np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))
  assert found['ratios/0/contrast'].value == pytest.approx(want) and found['ratios/0/accuracy'].value == 1.0
  assert found['ratios/1/contrast'].value == pytest.approx(2 * np.log(2)) and found['ratios/1/accuracy'].value == 0.5
  assert found['ratios/0/divergence'].value == 2.0
  with pytest.raises(UserError, match="'ratios' needs a method with 'ratios', and Prior has none"):
    check_subject({'ratios': {}}, {}, Prior())
  with pytest.raises(UserError, match="'likelihood' needs a method with 'density'"):
    check_subject({'likelihood': {}}, {}, Prior(density=False))
