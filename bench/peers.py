"""What people would use instead, measured in an environment of its own: python bench/peers.py ROW; prints JSON."""

import timing

timing.one_thread()

import json  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402

warnings.filterwarnings('ignore')
torch.set_num_threads(1)


def versions() -> dict[str, str]:
  import importlib.metadata

  return {name: importlib.metadata.version(name) for name in ('pythae', 'torch')}


def vae(kind: str):
  """Pythae's VAE with its default MLPs, or with the networks of its MNIST benchmark."""
  from pythae.models import VAE, VAEConfig

  config = VAEConfig(input_dim=(1, 28, 28), latent_dim=timing.MLP['latent'], reconstruction_loss='bce')
  if kind == 'mlp':
    return VAE(config)
  from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST

  return VAE(config, encoder=Encoder_Conv_VAE_MNIST(config), decoder=Decoder_Conv_AE_MNIST(config))


def step(kind: str) -> dict[str, float]:
  """Images a CPU second of its training step, without its data loader."""
  from pythae.models.base.base_utils import ModelOutput

  model = vae(kind).train()
  optimiser = torch.optim.Adam(model.parameters(), lr=timing.LEARNING_RATE)
  batch = timing.MLP['batch']
  data = ModelOutput(data=(torch.rand(batch, 1, 28, 28) > 0.5).float())

  def run():
    loss = model(data, epoch=1, dataset_size=60_000).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()

  return {'images': batch / timing.cpu_seconds(run), 'parameters': sum(p.numel() for p in model.parameters())}


def likelihood(kind: str) -> dict[str, float]:
  """Image-samples a CPU second of `get_nll`."""
  model = vae(kind).eval()
  n = {'mlp': 4, 'conv': 1}[kind]
  data = (torch.rand(n, 1, 28, 28) > 0.5).float()
  with torch.no_grad():
    seconds = timing.cpu_seconds(lambda: model.get_nll(data, n_samples=timing.SAMPLES, batch_size=100), warm=1, repeats=3)
  return {'samples': n * timing.SAMPLES / seconds}


def _seconds(module: torch.nn.Module, shape: list[int]) -> float:
  """Forward and backward, channels first as torch likes it."""
  n, h, w, c = shape
  x = torch.randn(n, c, h, w, requires_grad=True)
  g = torch.randn_like(module(x))

  def run():
    x.grad = None
    module.zero_grad()
    module(x).backward(g)

  return timing.cpu_seconds(run, seconds=0.5)


def depthwise() -> list[float]:
  """Seconds, forward and backward, by shape."""
  conv = lambda c: torch.nn.Conv2d(c, c, timing.KERNEL, padding=timing.KERNEL // 2, groups=c, bias=False)
  return [_seconds(conv(shape[-1]), shape) for shape in timing.DEPTHWISE]


def layers(path: str) -> dict[str, float]:
  """Seconds of the layers in a file, forward and backward, each on its own, summed by kind."""
  with open(path) as file:
    wanted = json.load(file)
  known: dict[str, float] = {}
  totals: dict[str, float] = {}
  for layer in wanted:
    times, key = layer.pop('times'), json.dumps(layer)
    shape = layer['shape']
    if key not in known:
      if layer['kind'] == 'normalise':
        module = torch.nn.Sequential(torch.nn.BatchNorm2d(shape[-1]), torch.nn.SiLU())
      else:
        size, groups = layer['size'], shape[-1] if layer['kind'] == 'depthwise' else 1
        options = {'stride': layer['stride'], 'padding': (size - 1) // 2, 'groups': groups, 'bias': layer['bias']}
        module = torch.nn.Conv2d(shape[-1], layer['features'], size, **options)
      known[key] = _seconds(module.train(), shape)
    totals[layer['kind']] = totals.get(layer['kind'], 0.0) + times * known[key]
  return totals


if __name__ == '__main__':
  timing.answer({'versions': versions, 'step': step, 'likelihood': likelihood, 'depthwise': depthwise, 'layers': layers})
