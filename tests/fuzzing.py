"""For the fuzz tests: damage to files and hostile values, all from a seed, and what may come of them."""

from collections.abc import Callable, Sequence
import contextlib
import json
import random
import resource
import time
from typing import Any

import pytest

from latentgen.errors import LONGEST, UserError

SECONDS, GROWTH = 10.0, 600e6  # that one input may take; bytes of memory that a whole test may

WORDS = (
  '', ' ', '\t', '-', '--', '.', '..', '/dev/null', '~', '~nobody-of-that-name', 'a' * 5000, 'x' * 300 + '/y', '\u202e',
  '\u00e9',
  'e\u0301', '\U0001f600', '\ud800', '\x00', '\x1b[31m', 'line\nline', "'", '"', '{', '}', '[[[[', '((((', ')', '[1, 2',
  "('a',", '{1: 2',
  '{[]: 1}', '{**{}}', 'f""', 'b"x"', '\\', r"'\d'", '#', '$x$', '%s', '%(x)s', '{0}', '<script>', 'None', 'none', 'null',
  'True', 'true',
  'TRUE', 'nan', 'inf', '-inf', '1e400', '-1e400', '1e308', '-1e-320', '0', '-0', '0.0', '1', '-1', '2', '3.5', '007', '0x10',
  '1_000',
  '1+1', '1+2j', '1j', '9' * 25, '-' + '9' * 25, '9' * 5000, '2147483648', '4294967296', '9223372036854775807',
  '9223372036854775808',
  '-9223372036854775809', '1000000000000', '()', '[]', '{}', 'set()', '{1}', '(1, 2)', '[1, -1]', "('a', 'b')",
  "('a', ('b', ('c',)))",
  '(None,)', '((),)', '(nan,)', '{"a": 1}', "{'name': 'x'}", '[[1, 2], [3, 4]]', '...', 'Ellipsis', 'lambda: 0',
  '__import__("os")',
  '(' * 90 + ')' * 90, '(' * 3000 + ')' * 3000, '[' * 190 + ']' * 190, '-' * 4000 + '1', 'not ' * 3000 + '1', '1' + '+1' * 3000,
  'os.path', 'builtins', '.vae', 'vae.', 'a..b', 'latentgen', 'latentgen.nets', 'json.tool', '__main__', 'Vae', 'v\u00e6',
  'name', 'digits',
)  # fmt: skip
VALUES = (
  None, True, False, 0, 1, -1, 2, 7, 10**12, 10**30, -(10**30), 2**31, 2**63, 0.0, -0.0, 0.5, -0.5, 1.0, 1e300, -1e300, 5e-324,
  float('nan'), float('inf'), -float('inf'), 1j, '', 'x', '\x00', 'a' * 5000, b'x', (), (0,), (-1,), (1, 2), (None,), ('x',),
  ((1, 2), (3,)),
  ('x', 1), (('x', 1),), (('(', 1.0),), (float('nan'),), (10**12,), {}, {'x': 1}, {'name': 'x'}, {'name': None}, {1: 2},
  {'name': 'vae'},
  object, print, Ellipsis, range(3),
)  # fmt: skip

ALIEN = ('', 'null', '3', '[]', '{}', '"x"', 'true', 'NaN', '[1, 2]', '{"stage": 3}', '{"step": 1}',
  '{"stage": "vae", "step": "x"}', '{"stage": [], "step": 1}',
         '{"stage": {}, "step": null}', '{"stage": "vae", "step": NaN}', '{"stage": "other", "step": 1}',
         '{"step": 1, "stage": "va', '[' * 100_000,
         '{"a":' * 50_000, '9' * 5000, '\x00', '\ud7ff', '<html>', '{"experiment": 1, "variant": 2, "config": 3}',
         '{"experiment": "vae_nce", "variant": "smoke", "config": []}',
         '{"experiment": "vae_nce", "variant": "smoke", "config": null}',
         '{"experiment": {}, "variant": [], "config": {}}', '{"first": "x"}', '{"first": [1]}', '{"vae": NaN}')  # fmt: skip


def runs(few: int, many: int):
  """The same test short, and long."""
  return pytest.mark.parametrize('count', [few, pytest.param(many, marks=pytest.mark.slow)])


def survives(call: Callable[[], Any], about: object) -> Any:
  """What `call` returns, or the UserError by which it refuses; it must do either in one line and in good time.

  Args:
    call: reads or builds something from hostile input.
    about: that input, for the message of a failure.
  """
  start = time.perf_counter()
  try:
    try:
      found = call()
    except UserError as error:
      found = error
      text = str(error)
      assert text and len(text.splitlines()) == 1 and len(text) < LONGEST + 10, text
    assert time.perf_counter() - start < SECONDS
  except BaseException as error:
    error.add_note(f'input: {str(about)[:600]!r}')
    raise
  return found


@contextlib.contextmanager
def little_memory():
  """Fails if the peak of this process grew by more than GROWTH."""
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  before = peak()
  yield
  assert peak() - before < GROWTH


def damage(rng: random.Random, good: bytes, others: Sequence[bytes] = ()) -> bytes:
  """One to four mutations: bits, bytes, words of four bytes, cuts, insertions, repeats, another file's part."""
  raw = bytearray(good)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    place, length = rng.randrange(len(raw) + 1), rng.choice((1, 2, 4, 8, 64))
    if rng.random() < 0.5:
      place = min(place, rng.randrange(64))  # headers
    what = rng.randrange(8)
    if what == 0 and place < len(raw):
      raw[place] ^= 1 << rng.randrange(8)
    elif what == 1 and place < len(raw):
      raw[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif what == 2:
      raw[place : place + 4] = rng.choice((b'\xff' * 4, b'\x7f\xff\xff\xff', bytes(4), b'\0\0\0\1', rng.randbytes(4)))
    elif what == 3:
      del raw[place : place + length]
    elif what == 4:
      raw[place:place] = rng.randbytes(length)
    elif what == 5:
      del raw[rng.randrange(len(raw) + 1) :]
    elif what == 6:
      raw[place:place] = raw[place : place + length] * rng.choice((1, 3, 50))
    elif others:
      other = rng.choice(others)
      raw[place : place + length] = other[rng.randrange(len(other)) :][: rng.choice((length, len(other)))]
  return bytes(raw)


def mutated(rng: random.Random, good) -> bytes:
  """JSON with bytes damaged, a value changed, or something else altogether."""
  what = rng.random()
  if what < 0.5:
    return damage(rng, json.dumps(good).encode(), [a.encode() for a in ALIEN if a])
  if what < 0.7:
    return rng.choice(ALIEN).encode()
  found = json.loads(json.dumps(good))
  node = found
  while True:
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = rng.choice(keys)
    if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6:
      node = node[key]
      continue
    value = rng.choice(VALUES + WORDS)
    node[key] = value if type(value) in (int, float, str, bool, type(None)) else {'x': [1]}
    return json.dumps(found).encode()
