"""Texts in, tokens out: vocabularies, files of examples, batches for training
and decoding.

`seqio_tasks` loads TensorFlow and is imported by its own name only.
"""

from calm.data import prompt_batches, prompt_files, training_batches, vocabulary

__all__ = [
  "prompt_batches",
  "prompt_files",
  "seqio_tasks",
  "training_batches",
  "vocabulary",
]
