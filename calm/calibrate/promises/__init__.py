"""What can be promised of a threshold; each is one transform of the losses.

Mean           the mean loss is at most delta (the paper's)
Quantile       95 % of texts lose at most delta each
EveryGroup     every language, length or task keeps delta; `each_group` serves by group
EarlyExits     the texts that left early keep delta
TailMean       the mean over the worst 10 % of texts
KnownMixture   the mean over another mixture of tasks, whose shares are known
SeveralRisks   several losses, each with its delta: `calibrate(risks=[Risk(...), ...])`
Cost           the mean loss, and at least x1.5 fewer layers
Configurations several risks, of the cheapest of many configurations
"""

from collections.abc import Mapping
from typing import Any

from calm.calibrate.promises.configurations import Configurations
from calm.calibrate.promises.cost import Cost
from calm.calibrate.promises.early import EarlyExits
from calm.calibrate.promises.every_group import EveryGroup, each_group
from calm.calibrate.promises.mean import Mean
from calm.calibrate.promises.mixture import KnownMixture
from calm.calibrate.promises.promise import Part, Promise, Test, fields_of
from calm.calibrate.promises.quantile import Quantile
from calm.calibrate.promises.risks import Risk, SeveralRisks, as_promise
from calm.calibrate.promises.tail import TailMean

__all__ = [
  "PROMISES",
  "Configurations",
  "Cost",
  "EarlyExits",
  "EveryGroup",
  "KnownMixture",
  "Mean",
  "Part",
  "Promise",
  "Quantile",
  "Risk",
  "SeveralRisks",
  "TailMean",
  "Test",
  "as_promise",
  "each_group",
  "from_json",
  "of_name",
]

PROMISES: Mapping[str, type[Promise]] = {
  promise.name: promise
  for promise in (
    Mean,
    Quantile,
    EveryGroup,
    EarlyExits,
    TailMean,
    KnownMixture,
    SeveralRisks,
    Cost,
    Configurations,
  )
}


def of_name(name: str) -> Promise:
  """The promise of a name, with its default numbers.

  Raises:
    ValueError: there is none of that name, or it lacks data without which it cannot be made.
  """
  if name not in PROMISES:
    raise ValueError(f"Expected `promise` to be one of {sorted(PROMISES)}, got {name!r}.")
  return PROMISES[name]()


def from_json(value: Any) -> Promise:
  """The inverse of `Promise.to_json`.

  Raises:
    ValueError: no promise of that name, or its fields are missing, unknown or out of range.
  """
  name = value.get("name") if isinstance(value, Mapping) else None
  if not isinstance(name, str) or name not in PROMISES:
    raise ValueError(f"Expected `promise` to name one of {sorted(PROMISES)}, got {value!r}.")
  import dataclasses

  allowed = {field.name for field in dataclasses.fields(PROMISES[name]) if field.compare}
  try:
    return PROMISES[name](**fields_of(value, allowed))
  except TypeError as error:
    raise ValueError(f"Expected `promise` {name!r} of numbers, got {value!r}.") from error
