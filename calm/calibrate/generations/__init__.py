"""Cached outputs: one record per prompt and threshold, on disk and in memory."""

from calm.calibrate.generations.cache import (
  MANIFEST,
  PROMPTS,
  Generations,
  load,
  manifest_procedure,
  read_manifest,
  threshold_file,
)

__all__ = [
  "MANIFEST",
  "PROMPTS",
  "Generations",
  "cache",
  "foreign",
  "load",
  "manifest_procedure",
  "order",
  "procedure",
  "read_manifest",
  "records",
  "shards",
  "threshold_file",
]
