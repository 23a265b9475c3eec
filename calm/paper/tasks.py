"""The three tasks on Debian texts: prefix, lengths, metric, and their prompts."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from calm.calibrate import Prompt
from calm.data import datasets


@dataclasses.dataclass(frozen=True)
class TaskSettings:
  """How one task is decoded and scored."""

  name: str  # its folder in the data
  title: str  # its name on the page
  prefix: str  # text put before every prompt
  max_input_length: int  # tokens of a prompt that are read, EOS included
  max_decode_length: int  # most tokens generated, EOS included; N of Eq. 5
  metric: str  # bounded metric of losses and of quality
  metric_title: str  # the metric's name on the page
  stands_for: str = ""  # the corresponding task of the paper
  paper_length: str = ""  # the paper's Table 1 for that task
  bleu: bool = False  # whether corpus BLEU is reported too


TASKS: Mapping[str, TaskSettings] = {
  name: TaskSettings(name, title, datasets.DEBIAN[name].prefix, *lengths, *scores, bleu)
  for name, title, lengths, scores, bleu in (
    (
      "debian_synopsis",
      "summaries",
      (256, 24),
      ("rouge_l", "ROUGE-L", "CNN/DM", "82 (42 - 141)"),
      False,
    ),
    (
      "debian_qa",
      "questions",
      (256, 24),
      ("token_f1", "token F1", "SQuAD", "5 (1 - 13)"),
      False,
    ),
    (
      "debian_enfr",
      "translation",
      (96, 96),
      ("chrf", "chrF", "WMT15 EN-FR", "39 (10 - 82)"),
      True,
    ),
  )
}


def task(name: str) -> TaskSettings:
  """The settings of a task by its name or the end of it ('qa'); ValueError for another."""
  for known, settings in TASKS.items():
    if name == known or known.endswith(f"_{name}"):
      return settings
  raise ValueError(
    f"Expected `name` to be a task of {sorted(TASKS)} (or the end of one), got {name!r}."
  )


def read_prompts(
  data: str | pathlib.Path,
  settings: TaskSettings,
  split: str,
  *,
  limit: int | None = None,
  seed: int = 0,
) -> tuple[Prompt, ...]:
  """At most `limit` prompts of a split, one of every source, in a random order of the seed.

  Rows of one source resemble each other; one of each makes prompts exchangeable, as a
  calibration needs. Files are sorted by id, so the order is drawn.
  """
  examples = datasets.read_examples(datasets.DEBIAN[settings.name].path(data, split))
  by_source: dict[str, Prompt] = {}
  for index in np.random.default_rng(seed).permutation(len(examples)):
    example = examples[int(index)]
    by_source.setdefault(example.group or example.id, example)
  return tuple(by_source.values())[:limit]
