"""Learning rate, batches, dropout and buckets by the size of the model.

Pretrained sizes have the T5 paper's and T5X's fine-tuning values: Adafactor at a constant 1e-3,
dropout 0.1. Models of a few million parameters learn at the rates that the model in the box
needed: 1e-2 with warm-up and decay, little dropout, and span corruption beside the task.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm.t5 import network

SMALL_PARAMETERS = 20_000_000
# Activations of a step: matrices are long enough by then, and most machines have them to spare.
STEP_BYTES = 2**31
_STEP = 8
# (share of the inputs, share of the targets) that a bucket holds; the last holds the limits.
_BUCKETS = ((0.4, 0.9), (0.75, 0.97))


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one stage trains.

  Attributes:
    peak: learning rate at its highest.
    warmup_steps: steps to get there.
    final_fraction: of the peak, at the end; 1 keeps it constant.
    optimizer: 'adafactor' or 'adam'.
    dropout_rate: of the network.
    batch_size: rows a step.
    num_steps: updates where no budget says otherwise.
    sampled_layers: layers whose heads are computed a step (Eq. 6 drawn); None: all.
    denoising: steps of span corruption for ten of the task; 0 leaves it out.
    patience: validations without gain before it stops; None never does.
  """

  peak: float
  warmup_steps: int
  final_fraction: float
  optimizer: str
  dropout_rate: float
  batch_size: int
  num_steps: int
  sampled_layers: int | None = None
  denoising: int = 0
  patience: int | None = None


def num_parameters(config: network.T5Config) -> int:
  """Parameters of a model, about: matrices only."""
  width = config.num_heads * config.head_dim
  mlp = (len(config.mlp_activations) + 1) * config.mlp_dim * config.emb_dim
  attention = 4 * width * config.emb_dim
  layers = config.num_encoder_layers * (attention + mlp)
  layers += config.num_decoder_layers * (2 * attention + mlp)
  heads = 1 if config.logits_via_embedding else 2
  return layers + heads * config.vocab_size * config.emb_dim


def stage_one(config: network.T5Config, num_rows: int) -> Recipe:
  """Eq. 6 over all layers, from a checkpoint."""
  small = num_parameters(config) < SMALL_PARAMETERS
  batch = batch_size(num_rows)
  epochs = 10 if small else 3
  steps = int(np.clip(epochs * num_rows // batch, 100, 20_000))
  return Recipe(
    peak=1e-2 if small else 1e-3,
    warmup_steps=min(100, steps // 10),
    final_fraction=0.05 if small else 1.0,
    optimizer="adafactor",
    dropout_rate=0.05 if small else 0.1,
    batch_size=batch,
    num_steps=steps,
    sampled_layers=2 if config.num_decoder_layers > 2 else None,
    denoising=1 if small else 0,
  )


def stage_own(config: network.T5Config, num_rows: int) -> Recipe:
  """Stage one's, on the model's own texts: nothing to denoise, and a rate that decays.

  What is learned is in the model already, so that the rate may end low.
  """
  return dataclasses.replace(
    stage_one(config, num_rows), warmup_steps=20, final_fraction=0.05, denoising=0
  )


def stage_two(config: network.T5Config, num_rows: int) -> Recipe:
  """The exit classifier alone: a linear map, trained in a few hundred steps."""
  del config
  return Recipe(
    peak=1e-2,
    warmup_steps=20,
    final_fraction=0.05,
    optimizer="adam",
    dropout_rate=0.0,
    batch_size=batch_size(num_rows),
    num_steps=300,
    patience=3,
  )


def batch_size(num_rows: int) -> int:
  """64 rows a step, fewer where there are few; a power of two, which parts divide."""
  return 1 << (int(np.clip(num_rows // 4, 4, 64)).bit_length() - 1)


def row_bytes(config: network.T5Config, bucket: tuple[int, int]) -> int:
  """Bytes of one row's float32 activations that a step of training holds, about.

  Args:
    config: sizes.
    bucket: padded (input, target) lengths.
  """
  read, written = bucket
  emb, mlp, heads = config.emb_dim, 5 * config.mlp_dim, config.num_heads
  width = heads * config.head_dim
  # Three times the attention weights: logits, softmax, and after dropout.
  encoder = read * (3 * heads * read + 9 * emb + 4 * width + mlp)
  decoder = written * (3 * heads * (read + written) + 12 * emb + 8 * width + mlp)
  layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
  return 4 * (layers + 3 * written * config.vocab_size)


def microbatches(config: network.T5Config, bucket: tuple[int, int], rows: int) -> int:
  """Parts that a batch is computed in, so that activations take at most `STEP_BYTES`.

  Args:
    config: sizes.
    bucket: the longest padded (input, target) lengths.
    rows: of a batch, a power of two.
  """
  fitting = max(1, min(rows, STEP_BYTES // row_bytes(config, bucket)))
  return rows >> (fitting.bit_length() - 1)


def buckets(
  input_lengths: Sequence[int], target_lengths: Sequence[int], limits: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
  """Padded (input, target) lengths of training batches, ascending, the last one the limits.

  Args:
    input_lengths: tokens of every input, prefix and EOS included.
    target_lengths: tokens of every target, EOS included.
    limits: (`max_input_length`, `max_decode_length`).
  """
  found = []
  for shares in _BUCKETS:
    lengths = (input_lengths, target_lengths)
    sizes = [
      min(limit, -(-int(np.quantile(values, share)) // _STEP) * _STEP)
      for values, share, limit in zip(lengths, shares, limits, strict=True)
    ]
    found.append((sizes[0], sizes[1]))
  return tuple(dict.fromkeys([*found, limits]))
