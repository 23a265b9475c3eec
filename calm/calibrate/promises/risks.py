"""Several risks at once, each within its own tolerance."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from calm import arguments
from calm.calibrate import checks
from calm.calibrate.generations.procedure import describe_differences
from calm.calibrate.losses import SequenceLosses
from calm.calibrate.promises.promise import Part, Promise, Test


@arguments.checked()
@dataclasses.dataclass(frozen=True, eq=False)
class Risk:
  """One of several risks.

  Attributes:
    losses: of the same prompts on the same grid as the others.
    tolerance: bound on their expectation.
    name: in words; '' takes the losses' kind and metric.
  """

  losses: SequenceLosses
  tolerance: float
  name: str = ""

  @property
  def called(self) -> str:
    """The name in words."""
    return self.name or f"{self.losses.kind} loss ({self.losses.metric})"


def check_outputs(risk: Risk, first: SequenceLosses) -> None:
  """Refuses a risk of other outputs than the first one's.

  Raises:
    ValueError: the grid differs, or the procedure, as far as both are known.
  """
  ours, theirs = first.thresholds.tolist(), risk.losses.thresholds.tolist()
  if ours != theirs:
    raise ValueError(
      f"Expected `risks` on the same grid, got {theirs} of {risk.called!r} beside {ours}; take"
      " every loss from the same outputs."
    )
  if first.procedure is None or risk.losses.procedure is None:
    return
  if difference := describe_differences(first.procedure, risk.losses.procedure):
    raise ValueError(
      f"Expected `risks` of outputs of one procedure, got another of {risk.called!r}:"
      f" {difference}; take every loss from the same outputs."
    )


@dataclasses.dataclass(frozen=True)
class SeveralRisks(Promise):
  """E[loss of risk r] <= tolerance of r, for every r.

      p = max over risks

  Attributes:
    names: of the risks.
    tolerances: of the risks.
    risks: the tables.
    name: in files and on the command line.
  """

  names: tuple[str, ...] = ()
  tolerances: tuple[float, ...] = ()
  risks: Sequence[Risk] | None = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "several_risks"

  def __post_init__(self):
    if self.risks is not None:
      object.__setattr__(self, "names", tuple(risk.called for risk in self.risks))
      object.__setattr__(self, "tolerances", tuple(float(r.tolerance) for r in self.risks))
    if not self.names or len(self.names) != len(self.tolerances):
      raise ValueError("Expected `risks` to hold at least one `Risk`, got none.")
    if len(set(self.names)) != len(self.names):
      raise ValueError(f"Expected `risks` of different names, got {list(self.names)}.")
    checks.check_lines(self.names, "names")

  def tests(self, tolerance, support):
    """Each of the risks, all in one range."""
    del tolerance
    pairs = zip(self.names, self.tolerances, strict=True)
    return tuple(Test(name, bound, support) for name, bound in pairs)

  def parts(self, losses, tolerance):
    """Each of the risks."""
    del tolerance
    if self.risks is None:
      raise ValueError("Expected `risks` with their tables, got a promise read from a file.")
    for risk in self.risks:
      same = len(risk.losses.values) == len(losses.values) and risk.losses.ids == losses.ids
      if not same:
        raise ValueError(
          f"Expected `risks` of the same prompts, got others in {risk.called!r}."
        )
      check_outputs(risk, losses)
    return tuple(Part(risk.called, risk.losses, risk.tolerance) for risk in self.risks)

  def statement(self, calibration, loss):
    """Each mean with its bound."""
    del calibration, loss
    pairs = zip(self.names, self.tolerances, strict=True)
    return "expected values of " + " and ".join(
      f"{name} of at most {bound:.10g}" for name, bound in pairs
    )

  def limits(self, unit):
    """Means, each of them."""
    return (
      f"These are means over {unit} drawn like those: they say nothing of any single prompt,"
      " nor of prompts of another kind."
    )


@arguments.checked()
def as_promise(risks: Sequence[Risk]) -> SeveralRisks:
  """`risks` of `calibrate`.

  Raises:
    ValueError: one is no `Risk`.
  """
  return SeveralRisks(risks=tuple(risks))
