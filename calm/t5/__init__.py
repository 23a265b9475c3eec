"""The T5 network: for training as T5X writes it, and one position at a time for decoding."""

from calm.t5 import (
  attention,
  caches,
  config,
  costs,
  decoder,
  decoder_weights,
  eight_bits,
  growing,
  layers,
  limits,
  masks,
  native,
  network,
  parameters,
  platforms,
  quantized_heads,
  stacks,
  windows,
)
from calm.t5.config import T5Config
from calm.t5.network import Transformer

__all__ = [
  "T5Config",
  "Transformer",
  "attention",
  "caches",
  "config",
  "costs",
  "decoder",
  "decoder_weights",
  "eight_bits",
  "growing",
  "layers",
  "limits",
  "masks",
  "native",
  "network",
  "parameters",
  "platforms",
  "quantized_heads",
  "stacks",
  "windows",
]
