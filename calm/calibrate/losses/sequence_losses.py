"""Cached generations -> losses [num_examples, num_thresholds] (Definitions 1 and 2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm import arguments
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import columns
from calm.calibrate.generations import order as order_lib
from calm.calibrate.generations.cached import Generations
from calm.calibrate.generations.procedures import Procedure
from calm.calibrate.losses import blocks, checks, metrics
from calm.calibrate.losses.metric_values import Progress

# The metric of losses that were given as numbers.
UNKNOWN = "unknown"


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Support:
  """The values that a loss can take, declared before any is seen.

  Attributes:
    lower: smallest possible loss, in [-1, 0] or above.
    upper: largest possible loss; 1 for every loss of this package.
    binary: whether 0 and 1 are the only values.
  """

  lower: float = 0.0
  upper: float = 1.0
  binary: bool = False

  def __post_init__(self):
    if not (np.isfinite([self.lower, self.upper]).all() and self.lower < self.upper):
      raise ValueError(
        f"Expected `support` to have finite `lower` < `upper`, got [{self.lower},"
        f" {self.upper}]; an unbounded loss cannot be controlled."
      )
    if self.binary and (self.lower, self.upper) != (0.0, 1.0):
      raise ValueError(
        f"Expected a binary `support` to be [0, 1], got [{self.lower}, {self.upper}]."
      )


@arguments.checked()
@dataclasses.dataclass(frozen=True, eq=False)
class SequenceLosses:
  """Losses of every prompt at every threshold, and what they are losses of.

  Everything that is tested passes through here and is checked here, once.

  Attributes:
    values: [num_examples, num_thresholds] float64.
    thresholds: [num_thresholds] float64, strictly descending.
    support: declared range of `values`.
    kind: 'textual', 'risk_clipped' or 'risk_signed'.
    metric: name of the text metric.
    ids: [num_examples] prompt ids.
    groups: [num_examples] cluster of each prompt, or None; `calibrate` tests cluster means
      then (`ungrouped` takes prompts for independent).
    groups_ignored: whether there were clusters, which `ungrouped` took away.
    procedure: how the outputs were decoded, or None.
    order: 'permuted' (tests that depend on the order see a permutation seeded by the sorted
      ids, the contents and the procedure) or 'given' (rows as they are).
    contents: digest of what the prompts say, or '' where that is not known.
    knobs: what was turned, in the order of `thresholds`, where that was no threshold.

  Raises:
    ValueError: `values` is no table of real numbers with a row a prompt and a column a
      threshold, the grid does not descend in [0, 1], ids are not unique texts, a group is
      missing, or a calibration cannot store kind, metric or knobs (`checks.is_line`). Losses
      that leave the support are no error here: `calibrate` says so in words.
  """

  values: np.ndarray
  thresholds: np.ndarray
  support: Support = dataclasses.field(default_factory=Support)
  kind: str = "textual"
  metric: str = UNKNOWN
  ids: tuple[Any, ...] | None = None
  groups: tuple[Any, ...] | None = None
  groups_ignored: bool = False
  procedure: Procedure | None = None
  order: str = "permuted"
  contents: str = ""
  knobs: tuple[str, ...] = ()

  def __post_init__(self):
    values = checks.as_numbers(self.values, "losses")
    grid = thresholds_lib.validate_grid(self.thresholds)
    if values.ndim != 2 or values.shape[1] != len(grid) or not len(values):
      raise ValueError(
        f"Expected `losses` to be [num_examples, num_thresholds] = [n, {len(grid)}] with n at"
        f" least 1, got shape {values.shape}; give one row a prompt, one column a threshold."
      )
    if self.order not in ("permuted", "given"):
      raise ValueError(f"Expected `order` to be 'permuted' or 'given', got {self.order!r}.")
    checks.check_lines([self.kind], "kind", checks.LONGEST_KIND)
    checks.check_lines([self.metric], "metric")
    checks.check_lines(self.knobs, "knobs")
    if self.knobs and len(self.knobs) != len(grid):
      raise ValueError(f"Expected {len(grid)} `knobs`, one a column, got {len(self.knobs)}.")
    checked: dict[str, Any] = {"values": values, "thresholds": grid}
    if self.ids is not None:
      checked["ids"] = checks.check_ids(self.ids, len(values))
    if self.groups is not None:
      checked["groups"] = checks.check_groups(self.groups, len(values))
    for name, value in checked.items():
      object.__setattr__(self, name, value)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.array(self.values, dtype=dtype, copy=copy)

  def in_given_order(self) -> "SequenceLosses":
    """The same losses, to be tested in the order of their rows; the guarantee will say so."""
    return dataclasses.replace(self, order="given")

  def ungrouped(self) -> "SequenceLosses":
    """The same losses, each prompt taken for an independent draw.

    The promise is false if prompts of one cluster are not; the guarantee says so.
    """
    groups = self.groups or ()
    ignored = self.groups_ignored or len(set(groups)) < len(groups)
    return dataclasses.replace(self, groups=None, groups_ignored=ignored)

  @arguments.checked()
  def grouped(self, groups: Sequence[Any]) -> "SequenceLosses":
    """The same losses, of prompts that come in these clusters."""
    return dataclasses.replace(self, groups=tuple(groups), groups_ignored=False)

  def rows(self, index: Sequence[int] | np.ndarray) -> "SequenceLosses":
    """The losses of some prompts, by row number.

    Raises:
      ValueError: the numbers are not whole.
    """
    index = np.asarray(index)
    if index.dtype.kind not in "iub":
      raise ValueError(f"Expected `index` to be a list of row numbers, got {index!r:.60}.")
    return dataclasses.replace(
      self,
      values=self.values[index],
      ids=None if self.ids is None else tuple(np.array(self.ids, object)[index]),
      groups=None if self.groups is None else tuple(np.array(self.groups, object)[index]),
    )

  def __repr__(self) -> str:
    return (
      f"SequenceLosses({self.kind}, {self.metric}, {self.values.shape[0]} prompts x"
      f" {self.values.shape[1]} thresholds, means"
      f" {np.array2string(self.values.mean(axis=0), precision=4, threshold=6)})"
    )


@arguments.checked()
def textual_losses(
  generations: Generations,
  *,
  metric: metrics.MetricLike = "rouge_l",
  workers: int | None = None,
  progress: Progress | None = None,
) -> SequenceLosses:
  """Textual dissimilarity to the full model's output (Def. 1, Eq. 10).

      L_i(threshold) = 1 - metric(early_i, [full_i])  in [0, 1];  0 where both texts are equal

  Args:
    generations: complete cached generations.
    metric: registry name, import path, function or `Metric`.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_examples, num_thresholds] losses.

  Raises:
    ValueError: generations are incomplete, or the metric is no bounded mean or leaves [0, 1].
  """
  return compute(generations, "textual", metric=metric, workers=workers, progress=progress)


@arguments.checked()
def risk_losses(
  generations: Generations,
  *,
  metric: metrics.MetricLike = "rouge_l",
  signed: bool = True,
  workers: int | None = None,
  progress: Progress | None = None,
) -> SequenceLosses:
  """Increase of the risk against references, early exit over full model (Def. 2).

      signed:   L_i(threshold) = R(early_i, Z_i) - R(full_i, Z_i)           in [-1, 1] (Eq. 2)
      clipped:  L_i(threshold) = max(0, R(early_i, Z_i) - R(full_i, Z_i))   in [0, 1]  (Eq. 11)

  with R = 1 - metric. The clipped mean is an upper bound of the signed one: it does not reward
  prompts whose output improves.

  Args:
    generations: complete cached generations; every prompt whose text differs from the full
      model's at some threshold has references (`unlabelled` names those that have none).
    metric: registry name, import path, function or `Metric`.
    signed: which of the two.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_examples, num_thresholds] losses.

  Raises:
    ValueError: a prompt has no references, generations are incomplete, or the metric is no
      bounded mean or leaves [0, 1].
  """
  kind = "risk_signed" if signed else "risk_clipped"
  return compute(generations, kind, metric=metric, workers=workers, progress=progress)


@arguments.checked()
def compute(
  generations: Generations,
  kind: str,
  *,
  metric: metrics.MetricLike = "rouge_l",
  workers: int | None = None,
  progress: Progress | None = None,
) -> SequenceLosses:
  """Losses of the kind 'textual', 'risk_signed' or 'risk_clipped'; see the functions above.

  Args:
    generations: complete cached generations.
    kind: the kind.
    metric: registry name, import path, function or `Metric`.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_examples, num_thresholds] losses.

  Raises:
    ValueError: as above, or `kind` is unknown.
  """
  short = [
    thresholds_lib.format_threshold(threshold)
    for threshold, records in zip(
      [*generations.thresholds, thresholds_lib.NEVER_EXIT],
      [*generations.records, generations.full],
      strict=True,
    )
    if len(records) < len(generations.prompts)
  ]
  if short:
    raise ValueError(
      "Expected `generations` to have a record of every prompt at every threshold, got"
      f" incomplete ones at {short[:5]}; a sequential run is tested prompt by prompt:"
      " `prefix_losses`."
    )
  metric = metrics.get_metric(metric)
  prefixes = prefix_losses(generations, kind, metric=metric, workers=workers, progress=progress)
  values = np.stack(prefixes, axis=1)
  groups = order_lib.known_groups(generations.prompts)
  if groups is None and not all(prompt.input for prompt in generations.prompts):
    # Copies of a prompt have one text of the full model, too.
    numbers: dict[str, int] = {}
    texts = [numbers.setdefault(t, len(numbers)) for t in columns.texts(generations.full)]
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
    contents=order_lib.run_digest(generations.prompts, columns.texts(generations.full)),
    knobs=generations.knobs,
  )


def prefix_losses(
  generations: Generations,
  kind: str,
  *,
  metric: metrics.MetricLike = "rouge_l",
  workers: int | None = None,
  progress: Progress | None = None,
) -> tuple[np.ndarray, ...]:
  """Losses of a run that may have stopped early: per threshold a prefix of the recorded order.

  Args:
    generations: cached generations; a threshold may have records of the first prompts only.
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: registry name, import path, function or `Metric`.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_thresholds] arrays, each [records of that threshold].

  Raises:
    ValueError: a prompt has no references, a threshold has more records than the full model,
      the metric is no bounded mean or leaves [0, 1], or `kind` is unknown.
  """
  definition = _definition(kind)
  metric = metrics.get_metric(metric)
  if max(map(len, generations.records)) > len(generations.full):
    raise ValueError(
      "Expected `generations` to have full-model records for all prompts used, got"
      f" {len(generations.full)}."
    )
  if not definition.textual:
    _check_references(generations)
  options = {"workers": workers, "progress": blocks.BlockProgress(generations, progress)}
  pieces = [
    blocks.texts_apart(block, metric, options)
    if definition.textual
    else blocks.risks(block, generations, definition.floor, metric, options)
    for block in blocks.read(generations)
  ]
  return tuple(map(np.concatenate, zip(*pieces, strict=True)))


def changed_rows(generations: Generations) -> tuple[np.ndarray, ...]:
  """Per threshold the rows whose text differs from the full model's."""
  return tuple(
    blocks.changed(columns.texts(records), columns.texts(generations.full))
    for records in generations.records
  )


def unlabelled(generations: Generations) -> tuple[str, ...]:
  """Ids of prompts that need references for a risk and have none.

  Where the early text equals the full one, both have the same risk whatever the references, so
  that the difference is exactly 0; only prompts whose text differs at some threshold need any.
  """
  rows = np.unique(np.concatenate([np.zeros(0, np.int64), *changed_rows(generations)]))
  prompts = generations.prompts
  return tuple(prompts[row].id for row in rows if not prompts[row].targets)


@dataclasses.dataclass(frozen=True)
class _Definition:
  textual: bool
  floor: float


_DEFINITIONS: Mapping[str, _Definition] = {
  "textual": _Definition(textual=True, floor=0.0),
  "risk_signed": _Definition(textual=False, floor=-1.0),
  "risk_clipped": _Definition(textual=False, floor=0.0),
}


def _definition(kind: str) -> _Definition:
  if kind not in _DEFINITIONS:
    raise ValueError(f"Expected `kind` to be one of {sorted(_DEFINITIONS)}, got {kind!r}.")
  return _DEFINITIONS[kind]


@arguments.checked()
def kind_support(kind: str, metric: metrics.MetricLike) -> Support:
  """The declared range of losses of a kind and metric.

  Raises:
    ValueError: `kind` or `metric` is unknown.
  """
  floor = _definition(kind).floor
  return Support(lower=floor, binary=metrics.get_metric(metric).binary and floor == 0.0)


def _check_references(generations: Generations) -> None:
  bare = unlabelled(generations)
  if bare:
    raise ValueError(
      "Expected `generations` to have references (`targets`) for every prompt whose text"
      f" differs from the full model's to compute a risk, got {len(bare)} that have none,"
      f" first {list(bare[:5])}; `--list_unlabelled` writes them all, and `textual_losses`"
      " needs none."
    )
