"""Outputs -> losses [num_examples, num_thresholds] (Definitions 1 and 2)."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import arguments
from calm.calibrate import checks, clusters, metrics
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import Generations, predictions
from calm.calibrate.generations.procedure import Procedure
from calm.calibrate.generations.records import Prompt, Record

# The metric of losses that were given as numbers.
UNKNOWN = "unknown"
# Kind: the least loss that it can have.
KINDS = {"textual": 0.0, "risk_signed": -1.0, "risk_clipped": 0.0}
# Texts of so many prompts are in memory at a time, at all thresholds.
PROMPTS = 64


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Support:
  """The values that a loss can take, declared before any is seen."""

  lower: float = 0.0  # smallest possible loss, in [-1, 0] or above
  upper: float = 1.0  # largest possible loss; 1 for every loss of this package
  binary: bool = False  # whether 0 and 1 are the only values

  def __post_init__(self):
    if not (
      np.isfinite([self.lower, self.upper]).all() and self.lower < self.upper
    ):
      raise ValueError(
        "Expected `support` to have finite `lower` < `upper`, got "
        f"[{self.lower},"
        f" {self.upper}]; an unbounded loss cannot be controlled."
      )
    if self.binary and (self.lower, self.upper) != (0.0, 1.0):
      got = f"[{self.lower}, {self.upper}]"
      raise ValueError(f"Expected a binary `support` to be [0, 1], got {got}.")


@arguments.checked()
@dataclasses.dataclass(frozen=True, eq=False)
class SequenceLosses:
  """Losses of every prompt at every threshold, and what they are losses of.

  Everything that is tested passes through here and is checked here, once:
  ValueError names what is wrong. Losses that leave the support are no error
  here: `calibrate` says so in words.
  """

  values: np.ndarray  # [num_examples, num_thresholds] float64
  thresholds: np.ndarray  # [num_thresholds] float64, strictly descending
  # declared range of `values`
  support: Support = dataclasses.field(default_factory=Support)
  kind: str = "textual"  # 'textual', 'risk_clipped' or 'risk_signed'
  metric: str = UNKNOWN  # name of the text metric
  ids: tuple[Any, ...] | None = None  # [num_examples] prompt ids
  # [num_examples] cluster of each prompt, or None; `calibrate` tests cluster
  # means then (`ungrouped` takes prompts for independent).
  groups: tuple[Any, ...] | None = None
  # whether there were clusters, which `ungrouped` took away
  groups_ignored: bool = False
  procedure: Procedure | None = None  # how the outputs were decoded, or None
  # digest of what the prompts say, or '' where that is not known
  contents: str = ""
  # Names of the settings, in the order of `thresholds`, where they were no
  # thresholds.
  knobs: tuple[str, ...] = ()

  def __post_init__(self):
    values = checks.as_numbers(self.values, "losses")
    grid = thresholds_lib.validate_grid(self.thresholds)
    if values.ndim != 2 or values.shape[1] != len(grid) or not len(values):
      raise ValueError(
        "Expected `losses` to be [num_examples, num_thresholds] = [n, "
        f"{len(grid)}] with n at"
        f" least 1, got shape {values.shape}; give one row a prompt, one "
        "column a threshold."
      )
    checks.check_lines([self.kind], "kind", checks.LONGEST_KIND)
    checks.check_lines([self.metric], "metric")
    checks.check_lines(self.knobs, "knobs")
    if self.knobs and len(self.knobs) != len(grid):
      raise ValueError(
        f"Expected {len(grid)} `knobs`, one a column, got {len(self.knobs)}."
      )
    vars(self).update(values=values, thresholds=grid)
    if self.ids is not None:
      vars(self).update(ids=checks.check_ids(self.ids, len(values)))
    if self.groups is not None:
      vars(self).update(groups=checks.check_groups(self.groups, len(values)))

  def ungrouped(self) -> "SequenceLosses":
    """The same losses, each prompt taken for an independent draw; the guarantee
    says so.
    """
    groups = self.groups or ()
    ignored = self.groups_ignored or len(set(groups)) < len(groups)
    return dataclasses.replace(self, groups=None, groups_ignored=ignored)

  def rows(self, index: Sequence[int] | np.ndarray) -> "SequenceLosses":
    """The losses of some prompts, by row number."""
    index = np.asarray(index)

    def some(names):
      return None if names is None else tuple(np.array(names, object)[index])

    rows = {
      "values": self.values[index],
      "ids": some(self.ids),
      "groups": some(self.groups),
    }
    return dataclasses.replace(self, **rows)

  def __repr__(self) -> str:
    size = "{} prompts x {} thresholds".format(*self.values.shape)
    means = np.array2string(self.values.mean(axis=0), precision=4, threshold=6)
    return f"SequenceLosses({self.kind}, {self.metric}, {size}, means {means})"


@arguments.checked()
def compute(
  generations: Generations,
  kind: str,
  *,
  metric: metrics.MetricLike = "rouge_l",
  progress: Callable[[int, int], None] | None = None,
) -> SequenceLosses:
  """Losses of cached generations (Definitions 1 and 2).

      textual       1 - metric(early_i, [full_i])             in [0, 1]   (Eq.
      10) risk_signed   R(early_i, Z_i) - R(full_i, Z_i)          in [-1, 1]
      (Eq. 2) risk_clipped  max(0, R(early_i, Z_i) - R(full_i, Z_i))  in [0, 1]
      (Eq. 11)

  of prompt i at each threshold, with R = 1 - metric and references Z_i; 0,
  without a call of the metric, where both texts are equal.

  Args:
    generations: complete cached generations; for a risk, every prompt whose
      text differs from the full model's has references.
    kind: one of these.
    metric: registry name, import path, function or `Metric`.
    progress: called with (prompts done, prompts in all).

  Raises:
    ValueError: generations are incomplete, a prompt lacks references, the
      metric is no bounded mean or leaves [0, 1], or `kind` is unknown.
  """
  prompts, metric = generations.prompts, metrics.get_metric(metric)
  pairs = zip(generations.thresholds, generations.records, strict=True)
  if short := [float(at) for at, rows in pairs if len(rows) < len(prompts)]:
    raise ValueError(
      "Expected `generations` to have a record of every prompt at every "
      "threshold, got"
      f" incomplete ones at {short[:5]}; generate the rest."
    )
  values = np.stack(
    prefix_losses(generations, kind, metric=metric, progress=progress), axis=1
  )
  groups = clusters.known_groups(clusters.prompt_clusters(prompts))
  if groups is None and not all(prompt.input for prompt in prompts):
    # Copies of a prompt have one text of the full model, too.
    texts = [hash(text) for text in predictions(generations.full)]
    checks.warn_of_copies(np.column_stack([values, texts]))
  return SequenceLosses(
    values=values,
    thresholds=generations.thresholds,
    support=kind_support(kind, metric),
    kind=kind,
    metric=metric.name,
    ids=generations.ids,
    groups=groups,
    procedure=generations.procedure,
    contents=clusters.run_digest(prompts, predictions(generations.full)),
    knobs=generations.knobs,
  )


def prefix_losses(
  generations: Generations,
  kind: str,
  *,
  metric: metrics.MetricLike = "rouge_l",
  progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, ...]:
  """[num_thresholds] arrays of losses, each of the records that a threshold has
  (`compute`).

  A run of an earlier version that stopped early has some of the first prompts
  only.
  """
  kind_support(kind, metric := metrics.get_metric(metric))
  prompts = generations.prompts
  count = len(generations.full)
  columns = [
    predictions(records) for records in (generations.full, *generations.records)
  ]
  pieces = []
  bare = []
  for first in range(0, max(1, count), PROMPTS):
    full, *early = (list(itertools.islice(texts, PROMPTS)) for texts in columns)
    some = prompts[first : first + PROMPTS]
    known = (
      [(text,) for text in full]
      if kind == "textual"
      else [p.targets for p in some]
    )
    pairs = itertools.chain(
      *(enumerate(zip(texts, full, strict=False)) for texts in early)
    )
    differ = {row for row, (text, reference) in pairs if text != reference}
    bare += [some[row].id for row in sorted(differ) if not known[row]]
    if not bare:
      loss = functools.partial(_loss, functools.cache(metric), KINDS[kind])
      pieces.append(
        [np.array([*map(loss, full, known, texts)]) for texts in early]
      )
    if progress is not None:
      progress(min(first + PROMPTS, count), count)
  if bare:
    raise ValueError(
      "Expected `generations` to have references (`targets`) for every "
      "prompt whose text"
      f" differs from the full model's to compute a risk, got {len(bare)} "
      "that have none, first"
      f" {bare[:100]}; a textual loss needs none."
    )
  return tuple(map(np.concatenate, zip(*pieces, strict=True)))


def _loss(
  similarity, least: float, full: str, known: tuple[str, ...], text: str
) -> float:
  """similarity(full, known) - similarity(text, known), 0 where texts are
  equal.
  """
  return (
    max(similarity(full, known) - similarity(text, known), least)
    if text != full
    else 0.0
  )


@arguments.checked()
def kind_support(kind: str, metric: metrics.MetricLike) -> Support:
  """The declared range of losses of a kind and metric; ValueError where either
  is unknown.
  """
  floor = KINDS[arguments.one_of("kind", kind, KINDS)]
  return Support(
    lower=floor, binary=metrics.get_metric(metric).binary and floor == 0.0
  )


@arguments.checked()
def from_texts(
  full: Sequence[str],
  early: Mapping[Any, Sequence[str]],
  *,
  references: Sequence[str | Sequence[str]] | None = None,
  kind: str | None = None,
  metric: metrics.MetricLike = "rouge_l",
  ids: Sequence[str] | None = None,
  groups: Sequence[Any] | None = None,
) -> SequenceLosses:
  """Losses of texts of any system, to be handed to `calibrate`.

  >>> from calm.calibrate import calibrate
  >>> full = [f"answer {row}" for row in range(100)]
  >>> cheap = [text if row % 3 else "another" for row, text in enumerate(full)]
  >>> texts = {"12 layers": full, "2 layers": cheap}
  >>> losses = from_texts(full, texts, metric="exact_match")
  >>> calibrate(losses, tolerance=0.1, error_rate=0.05).knob
  '12 layers'

  Args:
    full: [num_examples] texts of the full system.
    early: {knob: [num_examples] texts}, the best (slowest) first: thresholds,
      layers, beams, names of smaller models. The order was fixed before any
      loss was seen. Knobs that are numbers in [0, 1] and descend are
      thresholds.
    references: [num_examples] accepted texts of each prompt, one or several;
      needed by risks, and there only where texts differ: an empty list will do
      elsewhere.
    kind: 'textual', 'risk_signed' or 'risk_clipped'; by default 'risk_signed'
      with references, 'textual' without.
    metric: the text metric.
    ids: [num_examples] unique ids.
    groups: [num_examples] clusters of prompts.

  Raises:
    ValueError: lengths differ, there is no knob, or references are missing that
      a risk needs.
  """
  names = (
    tuple(f"text {row}" for row in range(len(full))) if ids is None else ids
  )
  names = checks.check_ids(names, len(full))
  targets: Any = [()] * len(full) if references is None else references
  tables = {"references": targets} | {
    f"early[{knob!r}]": early[knob] for knob in early
  }
  for name, rows in tables.items():
    if isinstance(rows, str) or len(rows) != len(full):
      raise ValueError(
        f"Expected `{name}` of {len(full)} texts, as `full`, got {len(rows)}."
      )
  grid, knobs = thresholds_lib.grid_of_knobs(list(early))

  def records(texts):
    return tuple(map(Record, names, texts))

  generations = Generations(
    prompts=tuple(
      Prompt(name, "", (rows,) if isinstance(rows, str) else tuple(rows))
      for name, rows in zip(names, targets, strict=True)
    ),
    thresholds=grid,
    records=tuple(map(records, early.values())),
    full=records(full),
    knobs=knobs,
  )
  kind = kind or ("textual" if references is None else "risk_signed")
  losses = compute(generations, kind, metric=metric)
  return (
    losses
    if groups is None
    else dataclasses.replace(losses, groups=tuple(groups))
  )


def from_frame(frame: Any, support: Support | None = None) -> SequenceLosses:
  """The losses of a DataFrame: one row a prompt, one column a threshold, in any
  order.

  Columns are named by thresholds (numbers or their text), and `id` and `group`,
  if any.
  """
  named = [name for name in frame.columns if name not in ("id", "group")]
  try:
    levels = [float(name) for name in named]
  except (TypeError, ValueError):
    raise ValueError(
      "Expected columns of `losses` to be named by thresholds, `id` or "
      f"`group`, got {named}."
    ) from None
  if not named or len(set(levels)) < len(levels):
    raise ValueError(
      f"Expected `losses` to have a column a threshold, got {named}."
    )
  grid = sorted(levels, reverse=True)
  by_level = dict(zip(levels, named, strict=True))

  def column(name):
    return checks.as_numbers(np.asarray(frame[name]), f"column {name!r}")

  # What is missing (None, NaN, NaT, NA) stays and is refused as a group.
  def missing(v):
    return v is None or type(v).__name__ in ("NAType", "NaTType") or v != v

  def texts(name):
    return tuple(v if missing(v) else str(v) for v in frame[name])

  return SequenceLosses(
    np.stack([column(by_level[level]) for level in grid], axis=1),
    np.array(grid),
    support or Support(),
    kind="loss",
    ids=tuple(map(str, frame["id"])) if "id" in list(frame.columns) else None,
    groups=texts("group") if "group" in list(frame.columns) else None,
  )
