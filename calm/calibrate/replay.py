"""The calibration of a run that stopped early, from its folder."""

from calm.calibrate import sequential
from calm.calibrate.calibration import Calibration
from calm.calibrate.generations import order
from calm.calibrate.generations.cached import Generations
from calm.calibrate.losses import sequence_losses


def replay(
  cached: Generations, *, tolerance: float, error_rate: float, kind: str, metric: str
) -> Calibration:
  """Tests a sequential run prompt by prompt, or cluster by cluster, as it was decoded.

  Args:
    cached: a sequential run; prompts are in the order of the test.
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: name or import path of the text metric.

  Returns:
    The calibration that the run itself wrote, if at the same rates.

  Raises:
    ValueError: at these rates the test would have asked for more prompts than the run has.
  """
  columns = sequence_losses.prefix_losses(cached, kind, metric=metric)
  groups = order.prompt_groups(cached.prompts) if cached.by_group else None
  units = order.consecutive_units(len(cached.prompts), groups)
  test = sequential.SequentialCalibration(
    cached.thresholds,
    len(units),
    tolerance=tolerance,
    error_rate=error_rate,
    support=sequence_losses.kind_support(kind, metric),
    clusters=cached.by_group,
  )
  thresholds = cached.thresholds.tolist()
  while (request := test.request(1)) is not None:
    column = columns[thresholds.index(request.threshold)]
    unit = units[request.start]
    if unit.stop > len(column):
      raise ValueError(
        f"Expected a sequential run for `tolerance` {tolerance} and `error_rate` {error_rate}."
        f" Got one that stopped earlier, at threshold {request.threshold} after {len(column)}"
        " prompts; generate again with these rates, or calibrate with the run's own."
      )
    test.add([column[unit].mean()])
  return test.calibration(
    kind=kind,
    metric=metric,
    seed=order.order_seed(order.unit_names(cached.ids, groups), cached.procedure),
    procedure=cached.procedure,
  )
