"""Models on disk: our folders, Hugging Face's, T5X's."""

from calm.checkpoints import files, huggingface, t5x
from calm.checkpoints.checkpoint import (
  EXITS,
  FORMAT,
  PACKED,
  Checkpoint,
  Vocabulary,
  copy_base,
  load,
  parameters_digest,
  save,
  save_exits,
  with_exits,
)

__all__ = [
  "EXITS",
  "FORMAT",
  "PACKED",
  "Checkpoint",
  "Vocabulary",
  "copy_base",
  "files",
  "huggingface",
  "load",
  "parameters_digest",
  "save",
  "save_exits",
  "t5x",
  "with_exits",
]
