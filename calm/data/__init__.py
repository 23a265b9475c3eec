"""Texts in, tokens out: vocabularies, files of examples, batches for training and decoding.

`seqio_tasks` loads TensorFlow and is imported by its own name only.
"""

from calm.data import (
  datasets,
  prompt_batches,
  prompt_files,
  prompt_tables,
  row_formats,
  tokenizer_files,
  training_batches,
  vocabulary,
)

__all__ = [
  "datasets",
  "prompt_batches",
  "prompt_files",
  "prompt_tables",
  "row_formats",
  "seqio_tasks",
  "tokenizer_files",
  "training_batches",
  "vocabulary",
]
