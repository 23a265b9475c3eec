"""Laws of losses for simulations: (generator, mean, shape) -> losses of that
mean.
"""

import numpy as np


def text(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """Most texts are unchanged, the others lose something."""
  return (generator.random(shape) < 3.0 * np.asarray(mean)) * generator.beta(
    1.5, 3.0, shape
  )


def near_binary(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """F1 of short answers."""
  changed = generator.random(shape) < np.asarray(mean) / 0.875
  return changed * np.where(generator.random(shape) < 0.75, 1.0, 0.5)


def dense(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """All texts change a little."""
  mean = np.asarray(mean)
  return generator.beta(20.0 * mean, 20.0 * (1.0 - mean), shape)


def heavy(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """One text in fifty is lost whole, the others lose little; the mean is at
  least 0.02.
  """
  return np.where(
    generator.random(shape) < 0.02, 1.0, (np.asarray(mean) - 0.02) / 0.98
  )


def zero_or_one(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """Exact match."""
  return (generator.random(shape) < mean) * 1.0


def signed(generator: np.random.Generator, mean, shape) -> np.ndarray:
  """Differences of a risk: some for the worse, as many for the better."""
  change = generator.random(shape)
  half = 0.5 + np.asarray(mean)
  return np.where(
    change < 0.4 * half, 1.0, np.where(change < 0.4, -1.0, 0.0)
  ) * 0.5 + (0.6 * np.asarray(mean))


BY_NAME = {
  "text": text,
  "near binary": near_binary,
  "dense": dense,
  "heavy": heavy,
  "0 or 1": zero_or_one,
  "signed": signed,
}
