"""Texts in, tokens out: vocabularies, files of examples, batches for training and decoding.

`seqio_tasks` loads TensorFlow and is imported by its own name only.
"""

from calm.data import datasets, prompt_batches, prompt_files, rows, training_batches, vocabulary

__all__ = [
  "datasets",
  "prompt_batches",
  "prompt_files",
  "rows",
  "seqio_tasks",
  "training_batches",
  "vocabulary",
]
