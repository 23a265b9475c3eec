"""The paper's sentences, each beside what was measured here."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from calm.paper.experiments import decay, gains, perturbations, suite, tradeoff


@dataclasses.dataclass(frozen=True)
class Finding:
  """One sentence on one task.

  Attributes:
    found: the numbers, in words.
    agrees: whether they say what the paper says; None: they cannot tell.
  """

  found: str
  agrees: bool | None


@dataclasses.dataclass(frozen=True)
class Claim:
  """One sentence of the paper.

  Attributes:
    text: what it says, with where.
    paper: its numbers.
    check: a task's report -> what was found here.
  """

  text: str
  paper: str
  check: Callable[[suite.TaskReport], Finding]


def _oracle(report: suite.TaskReport) -> Finding:
  found = report.propagations
  variant = found.find("exit_state").scores
  layers = report.tradeoff.num_layers
  return Finding(
    f"{_points(variant.quality)} against {_points(found.full.quality)} at"
    f" {variant.layers:.2f} of {layers} layers",
    variant.quality > found.full.quality - 0.01 and variant.layers < layers / 2,
  )


def _first_state(report: suite.TaskReport) -> Finding:
  found = report.propagations
  variant = found.find("first_state").scores
  return Finding(
    f"{_points(variant.quality)} against {_points(found.full.quality)}",
    variant.quality > found.full.quality - 0.01,
  )


def _copied(report: suite.TaskReport) -> Finding:
  found = report.propagations
  variant = found.find("copy_projections").scores
  return Finding(
    f"{_points(variant.quality)} against {_points(found.full.quality)}",
    variant.quality < 0.9 * found.full.quality,
  )


def _earlier_is_worse(report: suite.TaskReport) -> Finding:
  points = report.perturbations.sampling
  third = len(points) // 3
  if not third:
    return Finding("outputs are too short to tell", None)
  early, late = _similarity(points[:third]), _similarity(points[-third:])
  return Finding(
    f"like the unperturbed text: first third {_points(early)}, last third {_points(late)}",
    early < late,
  )


def _layer_is_milder(report: suite.TaskReport) -> Finding:
  layer = _similarity(report.perturbations.layer)
  sampling = _similarity(report.perturbations.sampling)
  return Finding(
    f"like the unperturbed text: layer-based {_points(layer)}, sampling-based"
    f" {_points(sampling)}",
    layer > sampling,
  )


def _similarity(points: Sequence[perturbations.Position]) -> float:
  return float(np.mean([point.similarity for point in points]))


def _decay_helps(report: suite.TaskReport) -> Finding:
  constant, _, fast = report.decay.curves
  fewest = {
    curve.name: [decay.reachable_layers(curve, least) for least in (0.95, 0.9, 0.8)]
    for curve in (constant, fast)
  }
  pairs = list(zip(fewest[constant.name], fewest[fast.name], strict=True))
  shown = ", ".join(f"{a:.2f} / {b:.2f}" for a, b in pairs)
  saved = float(np.mean([a - b for a, b in pairs]))
  return Finding(
    f"fewest layers at 95, 90, 80 % of the full text, constant / τ = 4: {shown}",
    # Less than a tenth of a layer either way is nothing that a reader should build on.
    None if math.isnan(saved) or abs(saved) < 0.1 else saved > 0,
  )


def _half_the_layers(report: suite.TaskReport) -> Finding:
  curve, full = report.tradeoff.curve("softmax"), report.tradeoff.full.scores
  half = report.tradeoff.num_layers / 2
  points = [p for p in curve.points if p.scores.layers <= half] if curve else []
  if not points:
    return Finding("no threshold of the grid goes below half of the layers", None)
  best = max(points, key=lambda point: point.scores.quality).scores
  return Finding(
    f"{_points(best.quality)} against {_points(full.quality)} at {best.layers:.2f} layers",
    best.quality >= full.quality - 0.01,
  )


def _softmax_is_shallowest(report: suite.TaskReport) -> Finding:
  softmax = ("softmax", "shortlist")  # the same measure, asked in another order
  wins = ties = total = 0
  for target in dict.fromkeys(row.target for row in report.gains.rows):
    rows = [row for row in report.gains.rows if row.target == target]
    best = {
      name: min((r.gains[0].layers for r in rows if (r.measure in softmax) == name), default=99)
      for name in (True, False)
    }
    total += 1
    wins += best[True] < best[False]
    ties += best[True] == best[False]
  found = f"softmax needs the fewest layers in {wins} of {total} targets ({ties} ties)"
  return Finding(found, None if ties == total else wins + ties > total / 2)


def _state_below_static(report: suite.TaskReport) -> Finding:
  state, static = report.tradeoff.curve("state"), report.tradeoff.curve(tradeoff.STATIC)
  if state is None or static is None:
    return Finding("not measured", None)
  depths = [p.scores.layers for p in static.points][::-1]
  quality = [p.scores.quality for p in static.points][::-1]
  own = [p.scores for p in state.points if p.scores.layers < report.tradeoff.num_layers - 0.1]
  if not own:
    return Finding("no threshold of the grid leaves early", None)
  below = sum(s.quality < np.interp(s.layers, depths, quality) for s in own)
  return Finding(f"{below} of {len(own)} points lie below static's line", below > len(own) / 2)


def _classifier_saves_flops(report: suite.TaskReport) -> Finding:
  cells = {
    row.measure: row.gains[0].flops_reduction
    for row in report.gains.rows
    if row.target == gains.Target("textual", 0.25)
  }
  softmax, other = (cells.get(name, float("nan")) for name in ("softmax", "classifier"))
  if math.isnan(softmax) or math.isnan(other):
    return Finding("not measured", None)
  return Finding(
    f"textual, δ = 0.25: classifier ×{other:.2f}, softmax ×{softmax:.2f}", other > softmax
  )


def _speedup(report: suite.TaskReport) -> Finding:
  cells = [(row, gain) for row in report.gains.rows for gain in row.gains]
  timed = [(r, g) for r, g in cells if g.threshold <= 1.0 and not math.isnan(g.speedup)]
  if not timed:
    return Finding("nothing was certified", False)
  row, gain = max(timed, key=lambda cell: cell[1].speedup)
  return Finding(
    f"decoding ×{gain.speedup:.2f}, with the encoder ×{gain.end_to_end:.2f} ({row.measure},"
    f" {row.target.consistency}, δ = {row.target.tolerance:g})",
    gain.speedup >= 2.0,
  )


def _promise(report: suite.TaskReport) -> Finding:
  entries = [entry for method in report.validity.trials for entry in method.validity]
  # Draws are equally many, so that the largest share has the highest interval as well.
  worst = max(entries, key=lambda entry: entry.share)
  low, high = (100 * end for end in worst.interval)
  return Finding(
    f"largest share of violations {100 * worst.share:.1f} % of {worst.trials} draws (95 %"
    f" interval {low:.1f} to {high:.1f}) over {len(entries)} measures, methods and δ"
    f" (ε = {100 * worst.error_rate:g} %)",
    worst.interval[0] <= worst.error_rate,
  )


def _points(value: float) -> str:
  return f"{100 * value:.1f}"


CLAIMS: Sequence[Claim] = (
  Claim(
    "The oracle keeps the quality with few layers (3.3.1)",
    "38.24 against 38.32 at 1.53 of 8 layers",
    _oracle,
  ),
  Claim("So does d¹ in place of dʲ for skipped layers (3.3.1)", "38.31", _first_state),
  Claim("Copying projected K and V fails (3.3.1)", "23.02 against 38.32", _copied),
  Claim("Earlier wrong tokens hurt more (Fig. 2a)", "a falling curve", _earlier_is_worse),
  Claim(
    "The first layer's token hurts less than a sampled one (Fig. 2a)", "", _layer_is_milder
  ),
  Claim(
    "Decaying thresholds offer better points (Fig. 2c)", "no drop of 10 points", _decay_helps
  ),
  Claim(
    "Softmax saves half of the layers at little loss (Fig. 3)",
    "all three tasks",
    _half_the_layers,
  ),
  Claim(
    "Softmax needs the fewest layers once calibrated (Table 2)", "all", _softmax_is_shallowest
  ),
  Claim("The state measure often falls below static (Fig. 3)", "often", _state_below_static),
  Claim(
    "The classifier saves more FLOPs than softmax (Table 2)",
    "×1.15 against ×0.49 (CNN/DM, 0.25)",
    _classifier_saves_flops,
  ),
  Claim("Up to three times as fast (abstract)", "×1.9 to ×3.5 on TPU v3, estimated", _speedup),
  Claim("The promise holds in at least 1 - ε of the draws (App. B)", "yes", _promise),
)
