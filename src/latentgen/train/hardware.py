"""Named accelerators by their datasheets, and how long they compute and communicate at best."""

from collections import Counter
from collections.abc import Iterable, Mapping
import dataclasses

from latentgen.train.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Hardware:
  """One accelerator among many of its kind.

  Args:
    name: of the product.
    peak: {dtype: floating-point operations a second}, dense, as jax multiplies that type by default.
    memory: bytes.
    near: bytes a second that a device sends, in one direction, to the others of its domain.
    domain: devices that one fast interconnect joins: a server, a pod.
    far: bytes a second that a device sends beyond its domain.
    source: where the figures are from.
  """

  name: str
  peak: Mapping[str, float]
  memory: float
  near: float
  domain: int
  far: float
  source: str

  def compute_seconds(self, flops: Mapping[str, float]) -> float:
    """Of so many operations by dtype, at peak; types without a figure of their own run as float32 does."""
    return sum(count / self.peak.get(dtype, self.peak['float32']) for dtype, count in flops.items())

  def communication_seconds(self, found: Iterable[Collective]) -> float:
    """Of all collectives one after the other, at full bandwidth and without latency."""
    return sum(c.times * self._seconds(c) for c in found)

  def _seconds(self, c: Collective) -> float:
    """Hierarchical: the members in one domain over the fast links, then every device its share across domains.

    A group of n has k members in each of m = n / k domains; device i is in domain i // domain.
    """
    n = len(c.group)
    k = max(Counter(i // self.domain for i in c.group).values())
    m = -(-n // k)
    if c.kind in ('collective-permute', 'collective-broadcast'):
      return c.payload / (self.far if m > 1 else self.near)
    if c.kind == 'all-to-all':
      return c.payload / n * ((k - 1) / self.near + (n - k) / self.far)
    passes = 2 if c.kind == 'all-reduce' else 1
    return passes * c.payload * ((k - 1) / k / self.near + (m - 1) / m / k / self.far)


# float32 is multiplied in TF32 on a GPU, in one pass of bfloat16 on a TPU, unless jax_default_matmul_precision is set.
HARDWARE = (
  Hardware(
    'H200 SXM', {'bfloat16': 989.5e12, 'float16': 989.5e12, 'float32': 494.5e12}, 141e9, near=450e9, domain=8, far=50e9,
    source='NVIDIA H200 datasheet: BF16 1,979 and TF32 989 TFLOPS with sparsity, half of it dense; 141 GB; NVLink 900 GB/s, '
    'both directions. NVIDIA DGX H200 datasheet: 8 GPUs; a 400 Gb/s network port for each',
  ),
  Hardware(
    'TPU v5e', {'bfloat16': 197e12, 'float32': 197e12}, 16e9, near=200e9, domain=256, far=3.125e9,
    source='Google Cloud, TPU v5e: 197 TFLOPS (bf16); 16 GB; interchip interconnect 1600 Gbps; pod of 256 chips, data center '
    'network 6.4 Tbps a pod',
  ),
  Hardware(
    'TPU v5p', {'bfloat16': 459e12, 'float32': 459e12}, 95 * 2**30, near=600e9, domain=8960, far=6.25e9,
    source='Google Cloud, TPU v5p: 459 TFLOPS (bf16); 95 GiB; interchip interconnect 1200 GBps, both directions; pod of 8960 '
    'chips; data center network 50 Gbps a chip',
  ),
)  # fmt: skip
