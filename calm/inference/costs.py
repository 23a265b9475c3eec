"""What outputs took: FLOPs and bytes at full depth and at their exits."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calm import exits
from calm.decode import pool, staged
from calm.inference import outputs as outputs_lib
from calm.t5 import costs as costs_lib

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib


def of_a_step(
  predictor: "predictor_lib.Predictor",
  input_length: int,
  rule: exits.Rule | None = None,
  cache_length: int | None = None,
) -> costs_lib.DecodingCosts:
  """What a decode step of a model reads and computes, by the layer that tokens leave at.

  Args:
    predictor: the model under its options.
    input_length: positions of the padded prompt.
    rule: how tokens go through the layers; None is the options' own.
    cache_length: positions of the caches that are read; None: those of the limit.
  """
  options = predictor.options
  if cache_length is None:
    limit = options.max_decode_length
    cache_length = pool.num_slots(limit) if options.refill else limit
  return costs_lib.decoding_costs(
    predictor.config,
    input_length=input_length,
    cache_length=cache_length,
    rule=rule or options.rule,
    num_pieces=predictor.vocabulary.vocab_size,
    shortlist=len(options.shortlist or ()),
    weights_dtype=options.weights_dtype,
    head_dtype=options.head_dtype,
  )


def totals(
  predictor: "predictor_lib.Predictor",
  outputs: Sequence[outputs_lib.Output],
  rule: exits.Rule | None = None,
) -> costs_lib.Totals:
  """FLOPs and bytes of outputs that a model's `generate` made.

  Args:
    predictor: the model under its options.
    outputs: the outputs, or some of them.
    rule: the rule that they were decoded with; None is the options' own.
  """
  total = costs_lib.Totals(0, costs_lib.Cost(), costs_lib.Cost())
  for length in sorted({output.input_length for output in outputs}):
    rows = [output.exit_layers for output in outputs if output.input_length == length]
    for first, last, positions in _stages(predictor, rule):
      step = of_a_step(predictor, length, rule, positions)
      total += costs_lib.totals(step, [row[first:last] for row in rows])
  return total


def _stages(
  predictor: "predictor_lib.Predictor", rule: exits.Rule | None
) -> list[tuple[int, int, int | None]]:
  """(first token, token after the last, positions of the caches that these read)."""
  limit = predictor.options.max_decode_length
  if predictor.options.refill or not isinstance(predictor.runs(rule), staged.StagedProgram):
    return [(0, limit, None)]
  lengths = staged.lengths(limit)
  return [(first, last, last) for first, last in itertools.pairwise((0, *lengths))]
