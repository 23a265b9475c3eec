"""Cached outputs: one record per prompt and threshold, on disk and in memory."""

from calm.calibrate.generations.cache import (
  MANIFEST,
  PROMPTS,
  SCHEMA_VERSION,
  Generations,
  load,
  manifest_procedure,
  read_manifest,
  read_records,
  threshold_file,
)

__all__ = [
  "MANIFEST",
  "PROMPTS",
  "SCHEMA_VERSION",
  "Generations",
  "cache",
  "foreign",
  "load",
  "manifest_procedure",
  "order",
  "procedure",
  "read_manifest",
  "read_records",
  "records",
  "reuse",
  "shards",
  "threshold_file",
  "writer",
]
