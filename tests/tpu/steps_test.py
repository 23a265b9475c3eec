"""Whole steps compiled for a TPU's mesh: training, and decoding as T5X's users
run it.

Real widths, few layers and a small vocabulary; scripts/tpu_steps.py compiles
the paper's runs.
"""

import dataclasses
import functools
from typing import Any

import pytest

jax = pytest.importorskip("jax")
import tpu_hlo
import tpu_report
import tpu_steps

pytestmark = pytest.mark.skipif(
  bool(tpu_report.available()), reason=tpu_report.available()
)

SMALL: Any = dict(vocabulary=2048, batch=16, inputs=128, targets=64)


@functools.cache
def compiled(step: tpu_steps.Step):
  # Optax promotes types and ranks.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return step.compiled()


@pytest.mark.parametrize("kind", sorted(tpu_steps.STAGES))
def test_a_training_step_sums_gradients_and_holds_its_state_once(kind):
  made = compiled(tpu_steps.Step(kind, "small", layers=1, **SMALL))
  module = tpu_hlo.parse(made.as_text())
  assert set(tpu_hlo.collectives(module, module.entry)) == {"all-reduce"}
  memory = made.memory_analysis()
  # The state is donated: what is not aliased is the batch, and the metrics.
  assert memory.alias_size_in_bytes >= 0.99 * memory.argument_size_in_bytes
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1e6


@pytest.mark.parametrize("topology", ["v3:2x2", "v5e:2x2"])
def test_each_core_decodes_rows_of_its_own_and_moves_no_cache(topology):
  """The loop that `calm.t5x.models` runs, under `shard_map` as there."""
  step = tpu_steps.Step("decode", "small", topology, layers=2, **SMALL)
  module = tpu_hlo.parse(compiled(step).as_text())
  config = step.config
  assert not tpu_hlo.collectives(module)
  weight = config.emb_dim * config.num_heads * config.head_dim
  assert not [x.text for x in tpu_hlo.moved(module, weight)]


def test_inference_replicates_the_decoder_and_gathers_no_weight():
  """As T5X's inference has it with `whole_decoder`; without, each batch gathers
  the weights.
  """
  step = tpu_steps.Step("decode", "small", layers=2, model=2, **SMALL)
  gathered = compiled(step)
  kept = compiled(dataclasses.replace(step, whole=True))

  def exchanged_by_decoder(made):
    module = tpu_hlo.parse(made.as_text())
    found = [
      x for x in module.within(module.entry) if x.opcode in tpu_hlo.COLLECTIVES
    ]
    assert found  # the encoder's
    return [x.text for x in found if "/encoder/" not in x.text]

  assert exchanged_by_decoder(gathered) and not exchanged_by_decoder(kept)

  def stored(made):
    return made.memory_analysis().argument_size_in_bytes

  assert stored(gathered) < stored(kept)
