"""Models on disk: our folders, Hugging Face's, T5X's."""

from calm.checkpoints import files, huggingface, t5x
from calm.checkpoints.checkpoint import (
  FORMAT,
  PACKED,
  Checkpoint,
  Vocabulary,
  load,
  parameters_digest,
  save,
)

__all__ = [
  "FORMAT",
  "PACKED",
  "Checkpoint",
  "Vocabulary",
  "files",
  "huggingface",
  "load",
  "parameters_digest",
  "save",
  "t5x",
]
