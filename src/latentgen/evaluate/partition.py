"""Normalisers of a tilted prior, log Z_l(z_<l) of every group: their size, their bias, their effective sample size.

A critic at the optimum has log Z = 0. The estimate log 1/M sum_m r(z_m) is below log Z on average (Jensen), by about
Var[r] / (2 M Z^2), which makes every bound that subtracts it look better than it is; so it is shown at M and at 10 M.
"""

from latentgen.evaluate.base import Findings, Subject, average, check_count, hook, per_example

FACTOR = 10
NEEDS = ('partition',)


def run(
  subject: Subject, *, split: str = 'test', limit: int | None = 500, proposals: int = 100, factor: int = FACTOR
) -> Findings:
  """Estimates normalisers of a method with `partition(variables, x, key, proposals) -> (log_z, ess)`, per level [g, b].

  Args:
    subject: what is evaluated.
    split: images whose posterior samples are the contexts z_<l.
    limit: only the first so many.
    proposals: M.
    factor: the second estimate uses factor * M.

  Returns:
    partition/M<m>/level<i>/group<j>/log_z [nats] and /ess_fraction (effective sample size / M) of every group, for
    both m; partition/M<m>/log_z, the sum over groups, and /ess_fraction, the mean; partition/log_z_gain, how much the
    sum rises from M to factor * M: an estimate of the bias at M that is too small by a factor of about 1 - 1 / factor.

  Raises:
    UserError: if the method has no `partition`, or for a bad value.
  """
  partition = hook(subject, 'partition', 'partition')
  check_count('config.evaluate.partition.proposals', proposals)
  check_count('config.evaluate.partition.factor', factor, least=2)
  findings, sums = Findings(), []
  for m in (proposals, factor * proposals):

    def flat(variables, x, key, m=m):
      log_z, ess = partition(variables, x, key, m)
      levels = enumerate(zip(log_z, ess, strict=True))
      return {f'level{i}/{name}': value for i, (z, e) in levels for name, value in (('log_z', z), ('ess', e / m))}

    found = per_example(subject, 'partition', flat, split, limit, axis=1)
    total, share, groups = 0.0, 0.0, 0
    for level in [name.removesuffix('/log_z') for name in found if name.endswith('/log_z')]:
      for j, (log_z, ess) in enumerate(zip(found[f'{level}/log_z'], found[f'{level}/ess'], strict=True)):
        findings.results[f'partition/M{m}/{level}/group{j}/log_z'] = average(log_z, 'nats')
        findings.results[f'partition/M{m}/{level}/group{j}/ess_fraction'] = average(ess, 'fraction')
        total, share, groups = total + log_z, share + ess, groups + 1
    findings.results[f'partition/M{m}/log_z'] = average(total, 'nats')
    findings.results[f'partition/M{m}/ess_fraction'] = average(share / groups, 'fraction')
    sums.append(total)
  findings.results['partition/log_z_gain'] = average(sums[1] - sums[0], 'nats')
  return findings
