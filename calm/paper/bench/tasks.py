"""Prefix, lengths and metric of each task, in one table."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from calm.calibrate import Prompt
from calm.data import datasets


@dataclasses.dataclass(frozen=True)
class TaskSettings:
  """How one task is decoded and scored.

  Attributes:
    name: its folder in the data.
    title: what a reader calls it.
    prefix: text put before every prompt.
    max_input_length: tokens of a prompt that are read, EOS included.
    max_decode_length: most tokens generated, EOS included; N of Eq. 5.
    metric: bounded metric of losses and of quality.
    metric_title: what a reader calls it.
    stands_for: the paper's task that it stands for.
    paper_length: the paper's Table 1 for that task.
    bleu: whether corpus BLEU is reported beside.
  """

  name: str
  title: str
  prefix: str
  max_input_length: int
  max_decode_length: int
  metric: str
  metric_title: str
  stands_for: str = ""
  paper_length: str = ""
  bleu: bool = False


TASKS: Mapping[str, TaskSettings] = {
  task.name: task
  for task in (
    TaskSettings(
      name="debian_synopsis",
      title="summaries",
      prefix=datasets.DEBIAN["debian_synopsis"].prefix,
      max_input_length=256,
      max_decode_length=24,
      metric="rouge_l",
      metric_title="ROUGE-L",
      stands_for="CNN/DM",
      paper_length="82 (42 - 141)",
    ),
    TaskSettings(
      name="debian_qa",
      title="questions",
      prefix=datasets.DEBIAN["debian_qa"].prefix,
      max_input_length=256,
      max_decode_length=24,
      metric="token_f1",
      metric_title="token F1",
      stands_for="SQuAD",
      paper_length="5 (1 - 13)",
    ),
    TaskSettings(
      name="debian_enfr",
      title="translation",
      prefix=datasets.DEBIAN["debian_enfr"].prefix,
      max_input_length=96,
      max_decode_length=96,
      metric="chrf",
      metric_title="chrF",
      stands_for="WMT15 EN-FR",
      paper_length="39 (10 - 82)",
      bleu=True,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class OwnPrompts:
  """A user's own prompts, split, in a random order, one of every source.

  Attributes:
    validation: grids are chosen on these.
    test: the first are calibrated on, the others unseen.
  """

  validation: tuple[Prompt, ...]
  test: tuple[Prompt, ...]


def task(name: str) -> TaskSettings:
  """The settings of a task, also by the end of its name ('qa').

  Raises:
    ValueError: the name is unknown.
  """
  for known, settings in TASKS.items():
    if name == known or known.endswith(f"_{name}"):
      return settings
  raise ValueError(
    f"Expected `name` to be a task of {sorted(TASKS)} (or the end of one), got {name!r}."
  )


def read_prompts(
  data: str | pathlib.Path | OwnPrompts,
  settings: TaskSettings,
  split: str,
  *,
  limit: int | None = None,
  seed: int = 0,
) -> tuple[Prompt, ...]:
  """One prompt of every source of a split, in a random order.

  Rows of one source resemble each other; one of each makes prompts exchangeable, which is what
  a calibration needs. Files are sorted by id, so the order is drawn.

  Args:
    data: folder of the data sets, or prompts that are split already.
    settings: the task.
    split: 'validation' or 'test'.
    limit: at most so many prompts; None: all sources.
    seed: of the draw.
  """
  if isinstance(data, OwnPrompts):
    return getattr(data, split)[:limit]
  examples = datasets.read_examples(datasets_path(data, settings, split))
  order = np.random.default_rng(seed).permutation(len(examples))
  chosen: dict[str, datasets.Example] = {}
  for index in order:
    example = examples[int(index)]
    chosen.setdefault(example.source or example.id, example)
  rows = list(chosen.values())[:limit]
  return tuple(Prompt(e.id, e.input, e.targets, e.source) for e in rows)


def datasets_path(data: str | pathlib.Path, settings: TaskSettings, split: str) -> pathlib.Path:
  """The file of a split."""
  return datasets.TextTask(settings.name, settings.prefix, (settings.metric,)).path(data, split)
