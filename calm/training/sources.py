"""Where batches come from: rows of files, texts to denoise; the shortlist."""

import collections
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm import arguments, checkpoints, storage
from calm.calibrate.generations import records
from calm.checkpoints import files
from calm.data import prompt_files, training_batches
from calm.t5 import limits

MODEL_FOLDER = "model"  # of a run
_LEAST_TOKENS = 16  # of a text that is denoised


@arguments.checked()
def supervised(
  path: str,
  vocabulary: checkpoints.Vocabulary,
  buckets: Sequence[tuple[int, int]],
  batch_size: int,
  *,
  root: str = "",
  prefix: str = "",
  seed: int = 0,
  every: int = 1,
  outputs: str = "",
) -> training_batches.Supervised:
  """Length-bucketed batches of one JSON Lines file (see `prompt_files`).

  Args:
    path: the file, below `root`.
    vocabulary: text -> ids.
    buckets: (input_length, target_length) in tokens with EOS, ascending.
    batch_size: rows of a batch.
    prefix: put before each input.
    seed: seeds the order.
    every: keep every n-th example only.
    outputs: what `calm infer --threshold=never --output` wrote for these
      prompts: the targets are the model's own tokens then, and prompts that are
      not in it are left out. Stage two learns from them without references, on
      the texts that it will decide about.
  """
  limits.whole("batch_size", batch_size, 1, 2**20, "give rows")
  rising = itertools.pairwise([(1, 1), *buckets, (limits.LONGEST,) * 2])

  def fits(one, next):
    return len(next) == 2 and one[0] <= next[0] and one[1] <= next[1]

  if not buckets or not all(itertools.starmap(fits, rising)):
    raise ValueError(
      f"Expected `buckets` to be pairs of lengths in 1 ... {limits.LONGEST}, "
      "ascending in both,"
      f" as ((64, 32),), got {buckets!r}."
    )
  file = pathlib.Path(root) / path
  examples = prompt_files.open_prompts(file, require_target=not outputs)[
    ::every
  ]

  def encoded(text):
    return np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)

  if outputs:

    def parse(line: storage.Line) -> records.Record:
      given: Any = line.value.get
      tokens: Any = given("tokens") or "none"
      return records.Record(given("id"), "", tokens)

    lines = records.read_each(outputs, parse, "a line of `calm infer --output`")
    own: Any = {record.id: record.tokens for _, record in lines}
    examples = [e for e in examples if e.id in own]
    if not examples:
      raise ValueError(
        f"Expected `outputs` to hold texts of the prompts in {str(file)!r}, "
        "by their ids, got"
        f" none in {outputs!r}; make it with `calm infer --threshold=never "
        f"--prompts={file}`."
      )
    targets = [np.array(own[e.id], np.int32) for e in examples]
  else:
    targets = [encoded(e.targets[0]) for e in examples]
  inputs = [encoded(prefix + e.input) for e in examples]
  return training_batches.Supervised(
    inputs, targets, tuple(buckets), batch_size, seed
  )


@arguments.checked()
def frequent_tokens(
  paths: Sequence[str],
  vocabulary: checkpoints.Vocabulary,
  size: int,
  *,
  root: str = "",
) -> tuple[int, ...]:
  """A shortlist from training targets: the `size` tokens seen most often, EOS
  included, each JSON Lines file below `root` weighing the same. It has two at
  least, if need be the first piece of the vocabulary: it is asked how far its
  first two are apart.
  """
  shares: collections.Counter[int] = collections.Counter()
  for path in paths:
    examples = prompt_files.open_prompts(
      pathlib.Path(root) / path, require_target=True
    )
    counts = collections.Counter(vocabulary.eos_id for _ in examples)
    for example in examples:
      counts.update(vocabulary.encode(example.targets[0]))
    total = counts.total()
    shares.update({token: count / total for token, count in counts.items()})
  # Ties by id, so that the same files give the same list.
  found = sorted(shares, key=lambda token: (-shares[token], token))
  if len(found) < 2:
    named = {0, vocabulary.eos_id, vocabulary.unk_id, *found}
    found += [token for token in range(len(named) + 1) if token not in named][
      :1
    ]
  return tuple(found[:size])


@arguments.checked()
def stored_shortlist(path: str) -> tuple[int, ...]:
  """The shortlist in the folder of a checkpoint, or of a run that exported
  one.
  """
  found = files.read_json(find_checkpoint(path) / "inference.json").get(
    "shortlist"
  )
  if not found:
    raise ValueError(
      f"Expected {path!r} to bring a shortlist in inference.json, got none; "
      "bind"
      " `objectives.ExitProbes.shortlist` and `run.Export.shortlist` to the "
      "same"
      " `@sources.frequent_tokens()`."
    )
  return tuple(found)


@arguments.checked()
@functools.lru_cache(maxsize=1)
def stored_vocabulary(path: str) -> checkpoints.Vocabulary | None:
  """The vocabulary in the folder of a checkpoint, or of a run that exported
  one.
  """
  return checkpoints.load(find_checkpoint(path)).vocabulary


def find_checkpoint(initial: str) -> pathlib.Path:
  """The checkpoint at `initial`, or the one that a run exported below it."""
  exported = pathlib.Path(initial) / MODEL_FOLDER
  return exported if exported.is_dir() else pathlib.Path(initial)


@arguments.checked()
def denoising(
  texts: Sequence[tuple[str, str]],
  vocabulary: checkpoints.Vocabulary,
  length: int,
  batch_size: int,
  *,
  root: str = "",
  seed: int = 0,
) -> training_batches.Denoising:
  """T5 span corruption over the inputs of JSON Lines files, each distinct text
  once.

  Args:
    texts: (file below `root`, marker): of each input, what follows the first
      marker; the whole input where the marker is "".
    vocabulary: text -> ids; its extra ids are the sentinels.
    length: tokens of a text that are read, before corruption; texts below 16
      are left out.
    batch_size: rows of a batch.
    seed: seeds order and corruption.
  """
  found: dict[str, None] = {}
  for path, marker in texts:
    for example in prompt_files.open_prompts(pathlib.Path(root) / path):
      found[example.input.split(marker, 1)[-1] if marker else example.input] = (
        None
      )
  encoded = [np.array(vocabulary.encode(text), np.int32) for text in found]
  encoded = [ids for ids in encoded if len(ids) >= _LEAST_TOKENS]
  source = training_batches.Denoising(
    encoded,
    length,
    batch_size,
    seed,
    first_sentinel=vocabulary.vocab_size - 1,
    eos_id=vocabulary.eos_id,
  )
  if source.max_spans > vocabulary.extra_ids:
    raise ValueError(
      f"Expected a vocabulary with at least {source.max_spans} `extra_ids`, "
      "one a corrupted"
      f" span of a text of {length} tokens, got {vocabulary.extra_ids}; "
      "shorten `length`."
    )
  return source
