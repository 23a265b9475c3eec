"""What a promise is: one or more tests, each on one transform of the losses.

A promise says what is bounded. It turns a table of losses into `Part`s, each of them a table
with a tolerance of its own, and certifies a threshold where every part is certified. That needs
no charge for the number of parts: "some part exceeds its tolerance" is a union of hypotheses,
and a threshold that breaks the promise breaks one of them, whose p-value alone is small with
probability at most the error rate (intersection-union; p = the largest p over parts).
"""

import abc
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from calm import arguments
from calm.calibrate import checks
from calm.calibrate.losses import SequenceLosses, Support

if TYPE_CHECKING:
  from calm.calibrate.calibration import Calibration


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """One test of a promise.

  Attributes:
    name: what is tested, '' where there is one test only.
    losses: what is tested, [num_examples, num_thresholds].
    tolerance: bound on their expectation.
    rows: [num_examples, num_thresholds] rows that count at each threshold, or None for all.
    share: of the error rate that this part may use.
    ascending: whether thresholds are tested from the lowest up (what falls as texts leave
      earlier), not from the highest down.
  """

  name: str
  losses: SequenceLosses
  tolerance: float
  rows: np.ndarray | None = None
  share: float = 1.0
  ascending: bool = False


@dataclasses.dataclass(frozen=True)
class Test:
  """What a part will test, known before there is any loss.

  Attributes:
    name: of the part.
    tolerance: bound on the expectation of what is tested.
    support: declared range of what is tested.
    share: of the error rate.
  """

  __test__: ClassVar[bool] = False  # no test of pytest's

  name: str
  tolerance: float
  support: Support
  share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Promise(abc.ABC):
  """Base of all promises: a frozen dataclass of plain numbers.

  Fields that hold rows of the calibration prompts (labels, depths, weights) are not compared
  and not stored: a promise that was read from a file speaks, and cannot be tested again.
  """

  name: ClassVar[str]

  @abc.abstractmethod
  def tests(self, tolerance: float, support: Support) -> tuple[Test, ...]:
    """What will be tested of losses in `support`, in the order of `parts`."""

  @abc.abstractmethod
  def parts(self, losses: SequenceLosses, tolerance: float) -> tuple[Part, ...]:
    """The tests on these losses.

    Raises:
      ValueError: the promise lacks its data, or they do not fit the losses.
    """

  def place(self, rejected: Any) -> int | None:
    """Which of the rows is served, of those that are certified; None where none is.

    Args:
      rejected: [num_thresholds] whether each row is certified; thresholds descend.
    """
    (certified,) = np.nonzero(rejected)
    return int(certified[-1]) if len(certified) else None

  def check_rows(self, thresholds: Sequence[float]) -> None:
    """What the thresholds of the rows must be.

    Raises:
      ValueError: they do not descend strictly.
    """
    if any(a <= b for a, b in itertools.pairwise(thresholds)):
      raise ValueError(
        "Expected `rows` with strictly descending thresholds, got another order."
      )

  @abc.abstractmethod
  def statement(self, calibration: "Calibration", loss: str) -> str:
    """What is promised of a threshold, as the end of "decoding with threshold x has ...".

    Args:
      calibration: with this promise.
      loss: the loss in words.
    """

  def limits(self, unit: str) -> str:
    """What is not promised."""
    return (
      f"This is a mean over {unit} drawn like those: it says nothing of any single prompt, nor"
      " of prompts of another kind."
    )

  def to_json(self) -> dict[str, Any]:
    """Name and numbers; rows of calibration prompts stay behind."""
    kept = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.compare
    }
    return {"name": self.name} | {
      key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()
    }


def transformed(losses: SequenceLosses, values: np.ndarray, support: Support) -> SequenceLosses:
  """`losses` with other values in another range."""
  return dataclasses.replace(losses, values=values, support=support)


def rows_of(values: Any, losses: SequenceLosses, name: str, *, table: bool) -> np.ndarray:
  """Data of a promise as an array with a row a prompt.

  Raises:
    ValueError: there are none, they have another shape, or a table's values are no amounts.
  """
  shape = losses.values.shape if table else losses.values.shape[:1]
  array = None if values is None else np.asarray(values)
  if array is not None and table:
    array = checks.as_amounts(array, name)
  if array is None or array.shape != shape:
    got = "nothing" if array is None else f"shape {array.shape}"
    raise ValueError(
      f"Expected `{name}` of shape {shape}, a row a prompt of `losses`, got {got}; a promise"
      " read from a file has no rows and cannot be tested again."
    )
  return array


def in_range(name: str, value: Any, low: float, high: float) -> float:
  """A number strictly between two others.

  Raises:
    ValueError: it is not.
  """
  plain = isinstance(value, int | float | np.number) and not isinstance(value, bool)
  if not plain or not low < value < high:
    raise ValueError(f"Expected `{name}` to be in ({low:g}, {high:g}), got {value!r}.")
  return float(value)


@arguments.checked()
def names_of(labels: Sequence[Any]) -> tuple[str, ...]:
  """Different labels, sorted.

  Raises:
    ValueError: a label is no text.
  """
  odd = [label for label in labels if not isinstance(label, str) or not label]
  if odd:
    raise ValueError(
      f"Expected `labels` to be texts, got {odd[0]!r}; give such prompts a label of their own"
      " ('other'): without them the promise would be of other prompts."
    )
  return tuple(sorted({str(label) for label in labels}))


def fields_of(value: Mapping[str, Any], allowed: set[str]) -> dict[str, Any]:
  """The numbers of a stored promise, lists as tuples.

  Raises:
    ValueError: a field is missing or unknown.
  """
  found = {
    key: tuple(entry) if isinstance(entry, list) else entry
    for key, entry in value.items()
    if key != "name"
  }
  if set(found) != allowed:
    raise ValueError(
      f"Expected `promise` {value.get('name')!r} with the fields {sorted(allowed)}, got"
      f" {sorted(found)}; it was made by another version, or edited."
    )
  return found
