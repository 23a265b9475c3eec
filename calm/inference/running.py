"""One batch through the program of a rule, and what it made back on the host."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import numpy as np

from calm import exits
from calm.decode import compiled, drafting, loop, packed
from calm.decode import program as program_lib
from calm.t5 import caches, platforms

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib


def run(
  predictor: "predictor_lib.Predictor",
  rule: exits.Rule | None,
  encoded: caches.Encoded,
  active: np.ndarray,
  threshold: float,
  prior: drafting.Prior | None = None,
) -> loop.Generation:
  """Decodes the active rows of an encoded batch; numpy arrays come back.

  Args:
    predictor: the model.
    rule: None: the options' own.
    encoded: from `Predictor.encode`.
    active: rows that hold a prompt, [batch].
    threshold: lambda.
    prior: what `exits.Verified` begins with.
  """
  # Arguments are looked at one by one, 40 microseconds for those of the encoder.
  weights = dataclasses.replace(predictor.weights, encoder={})
  # Numpy values go to the device inside the call: a tenth of a millisecond less a batch.
  program = predictor.runs(rule)
  with compiled.at_precision(predictor.options.matmul_precision):
    if isinstance(program, program_lib.Program):
      numbers = () if prior is None else (prior.chance, prior.trust, prior.texts)
      known = np.array((threshold, *numbers), np.float32)
      made = np.asarray(program.decode_packed(weights, encoded, active, known))
      return packed.unpacked(made, program.max_decode_length)
    level, expected = jax.tree.map(np.float32, (threshold, prior))
    return _fetched(program.decode(weights, encoded, active, level, expected))


def _fetched(made: loop.Generation) -> loop.Generation:
  """A generation as numpy arrays, once it is there."""
  # Where host and device are one, nothing is to be sent for ahead, and asking takes a core from
  # the program: a twentieth of a short text of a small model.
  if not platforms.runs_in_this_process():
    return jax.device_get(made)
  return jax.tree.map(np.asarray, made)
