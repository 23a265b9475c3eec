"""Laws of losses and cached generations made by hand, for the tests of
`calm.calibrate`.
"""

import numpy as np

from calm.calibrate import Procedure, Prompt, Record
from calm.calibrate.generations import Generations


def bernoulli(generator, mean, shape):
  return (generator.random(shape) < mean).astype(np.float64)


def two_point(generator, mean, shape):
  """Rarely large: the worst case for bounds that trust the seen variance."""
  top = min(1.0, 10.0 * mean)
  return top * (generator.random(shape) < mean / top)


def mostly_zero(generator, mean, shape):
  """Text-like: zero for most prompts, else spread over (0, 1)."""
  return (generator.random(shape) < 3.0 * mean) * generator.beta(
    1.5, 3.0, shape
  )


def heavy(generator, mean, shape):
  return (generator.random(shape) < 1.5 * mean) * generator.beta(
    4.0, 2.0, shape
  )


def constant(generator, mean, shape):
  del generator
  return np.full(shape, float(mean))


def signed(generator, mean, shape):
  """{-1, 0, 1} with that mean: the paired difference of two exact-match
  risks.
  """
  uniform = generator.random(shape)
  return (uniform < 0.3 + mean).astype(np.float64) - (uniform > 0.7)


def signed_smooth(generator, mean, shape):
  return mean + 0.2 * (generator.random(shape) - 0.5)


UNIT_LAWS = (bernoulli, two_point, mostly_zero, heavy, constant)
SIGNED_LAWS = (signed, signed_smooth)


def procedure(**changes) -> Procedure:
  fields = dict(
    parameters_digest="p" * 8,
    tokenizer_digest="t" * 8,
    task_prefix="summarize: ",
    max_input_length=64,
    max_decode_length=16,
    eos_id=1,
    measure="softmax",
    exit_layers=[1, 2, 3],
    schedule={"name": "constant"},
    propagation="hidden_state",
    shortlist=None,
    heads="shared",
    activation_dtype="float32",
    decode_method={"name": "greedy"},
  )
  return Procedure(**{**fields, **changes})


def prompts(count, **fields):
  return tuple(
    Prompt(
      f"id-{i:03d}",
      f"input {i}",
      (f"word{i} same",),
      f"group-{i // 2}",
      **fields,
    )
    for i in range(count)
  )


def record(name, text="a b", **fields):
  return Record(name, text, **fields)


def generations(count=4, grid=(0.9, 0.5), texts=None, **fields):
  """`texts[threshold position][row]`; the full model says 'word{i} same'."""
  rows = prompts(count)
  texts = texts or [[f"word{i} same" for i in range(count)] for _ in grid]
  return Generations(
    prompts=rows,
    thresholds=np.array(grid),
    records=tuple(
      tuple(record(p.id, text) for p, text in zip(rows, column, strict=False))
      for column in texts
    ),
    full=tuple(record(p.id, f"word{i} same") for i, p in enumerate(rows)),
    **fields,
  )


def assert_super_uniform(p, weights):
  """P(p <= u) <= u at every value u that p takes."""
  order = np.argsort(p)
  reached = np.cumsum(weights[order])
  last_of_ties = np.append(np.diff(p[order]) > 1e-12, True)
  assert np.all(
    reached[last_of_ties] <= p[order][last_of_ties] * (1 + 1e-9) + 1e-12
  )
