"""Rows whose targets are the texts that the model itself writes for their inputs.

What is promised is closeness to the full model's text, so that is what every layer learns to
write (sequence-level distillation, Kim and Rush 2016): references have words that the last
layer would not choose, and early layers are no better for learning them.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from calm import exits, inference
from calm.calibrate import Prompt
from calm.calibrate.generations import files
from calm.fitting import splits as splits_lib
from calm.inference import offline

# Rows of a batch, and those that are decoded between two looks at the clock, which a run that
# was stopped does not decode again.
BATCH, CHUNK = 64, 512
# What the model wrote, as `sources.supervised` reads it.
OUTPUTS = "outputs.jsonl"


def write(
  predictor: inference.Predictor,
  splits: splits_lib.Splits,
  folder: pathlib.Path,
  seconds: float | None,
  progress: Callable[[float, str], None],
) -> splits_lib.Splits:
  """Decodes the rows that train, and those that validate, at full depth.

  Training reads their tokens (`OUTPUTS`), so that a text which the length limit cut off has no
  end to learn. Called again, it goes on where it was stopped.

  Args:
    predictor: the model under its limits and prefix.
    splits: rows; only `train` and `validation` are read.
    folder: keeps what was decoded; `train.jsonl`, `validation.jsonl` and `OUTPUTS` are written
      there.
    seconds: that the rows that train may take; later ones are left out. None: all are taken.
    progress: told of the share done.

  Returns:
    Splits with those two parts replaced.
  """
  folder.mkdir(parents=True, exist_ok=True)
  predictor = predictor.with_options(batch_size=BATCH)
  parts = {"validation": splits.validation, "train": splits.train}
  whole = sum(map(len, parts.values()))
  done, begun = 0, time.monotonic()
  made: dict[str, tuple[Prompt, ...]] = {}
  lines: list[str] = []
  for name, rows in parts.items():
    found: list[Prompt] = []
    for start in range(0, len(rows), CHUNK):
      late = seconds is not None and time.monotonic() - begun > seconds
      if name == "train" and late and found:
        break
      chunk = rows[start : start + CHUNK]
      told = _told(progress, done, len(chunk), whole)
      kept = _chunk(predictor, chunk, folder / f"{name}-{start:08d}.json", told)
      found += [
        dataclasses.replace(row, targets=(kept[row.id]["prediction"],)) for row in chunk
      ]
      lines += [json.dumps({"id": row.id, **kept[row.id]}) + "\n" for row in chunk]
      done += len(chunk)
    made[name] = tuple(found)
  replaced = dataclasses.replace(splits, **made)
  splits_lib.write(folder, replaced, names=tuple(parts))
  files.write_atomically(folder / OUTPUTS, "".join(lines))
  return replaced


def tokens(
  predictor: inference.Predictor,
  rows: Sequence[Prompt],
  folder: pathlib.Path,
  progress: Callable[[float, str], None],
) -> list[list[int]]:
  """[num_rows] what the full model writes, in tokens with EOS; goes on where it was stopped."""
  folder.mkdir(parents=True, exist_ok=True)
  predictor = predictor.with_options(batch_size=BATCH)
  found: list[list[int]] = []
  for start in range(0, len(rows), CHUNK):
    chunk = rows[start : start + CHUNK]
    told = _told(progress, start, len(chunk), len(rows))
    kept = _chunk(predictor, chunk, folder / f"train-{start:08d}.json", told)
    found += [list(kept[row.id]["tokens"]) for row in chunk]
  return found


def _told(progress, done: int, count: int, whole: int) -> Callable[[float, str], None]:
  """Progress of a chunk as that of all rows."""

  def told(share: float, text: str) -> None:
    del text
    rows = done + share * count
    progress(rows / whole, f"{round(rows)} of {whole} rows")

  return told


def _chunk(
  predictor: inference.Predictor,
  rows: Sequence[Prompt],
  file: pathlib.Path,
  progress: Callable[[float, str], None],
) -> dict[str, dict[str, Any]]:
  """Id -> prediction and tokens, decoded or as they were kept."""
  kept = {} if not file.is_file() else files.parse_json(files.content(file))
  if set(kept) != {row.id for row in rows}:
    records = offline.with_rule(predictor, rows, exits.StaticExit(), progress=progress)
    kept = {r.id: {"prediction": r.prediction, "tokens": r.tokens} for r in records}
    files.write_atomically(file, json.dumps(kept, ensure_ascii=False) + "\n")
  return kept
