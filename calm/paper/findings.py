"""Titles of figures, by their names, and headlines: sentences made from their numbers."""

import math
from collections.abc import Sequence

from calm.inference.panel import threshold
from calm.paper import experiments, scores, trials
from calm.paper.figures import series_title
from calm.paper.page import interval, times

# Share of the full model's quality that counts as kept.
KEPT = 0.98


def headline(task: experiments.Task) -> tuple[str, str]:
  """The speed-up of a task in a word, like `×1.90`, and its result in one sentence, or two
  where a remark is due."""
  title, best = task.settings.title.capitalize(), best_gain(task.gains)
  pace = "" if best is None else f"{times(best.speedup)} as fast{ends(best.speedup_interval)}"
  if best is None or not best.speedup > 1.0:
    slower = pace and f"; the fastest that is certified runs {pace}"
    return "×1", f"{title}: full depth serves best here, nothing faster was certified{slower}."
  remark = ""
  if best.risk_interval[0] > best.tolerance:
    remark = (
      " That is more than was promised, and its interval lies above it: do not rely on it."
    )
  elif best.above:
    remark = (
      " That is above the promise, which is of the expectation; so few prompts cannot tell the"
      " two apart."
    )
  return times(best.speedup), (
    f"{title}: decodes {pace}; drift {best.risk:.2f}{ends(best.risk_interval)} where"
    f" {best.tolerance:g} was promised ({series_title(best.measure)}, threshold"
    f" {threshold(best.threshold)}, {len(task.unseen)} unseen prompts).{remark}"
  )


def ends(bounds: scores.Interval, digits: int = 2) -> str:
  """Like ` (0.02 to 0.12)`, or nothing where it is unknown."""
  text = interval(bounds, digits, "")
  return f" ({text})" if text else ""


def best_gain(table: Sequence[experiments.Gain]) -> experiments.Gain | None:
  """The cell for textual consistency at the tightest tolerance that is faster than full depth.

  Where none is faster, the fastest that was certified; None where nothing was.
  """
  cells = [cell for cell in table if cell.consistency == "textual" and cell.exits]
  faster = [cell for cell in cells if cell.speedup > 1.0]
  tightest = min((cell.tolerance for cell in faster), default=None)
  among = [cell for cell in faster if cell.tolerance == tightest] or cells
  speed = lambda cell: -math.inf if math.isnan(cell.speedup) else cell.speedup
  return max(among, key=speed, default=None)


def quality_and_layers(task: experiments.Task) -> str:
  kept, settings = _kept(task.tradeoff), task.settings
  title, metric = settings.title, settings.metric_title
  if not kept:
    return f"{title}: no measure keeps {KEPT:.0%} of the full model's {metric}"
  layers, name = min((point.layers, point.name) for point in kept)
  return (
    f"{title}: {series_title(name)} keeps {KEPT:.0%} of the {metric} with {layers:.1f} of"
    f" {task.num_layers} layers"
  )


def quality_and_seconds(task: experiments.Task) -> str:
  timed = [point for point in _kept(task.tradeoff) if point.speedup > 1.0]
  title, metric = task.settings.title, task.settings.metric_title
  if not timed:
    return f"{title}: nothing that keeps {KEPT:.0%} of the {metric} is faster than full depth"
  best = max(timed, key=lambda point: (point.speedup, point.name))
  return (
    f"{title}: {series_title(best.name)} keeps {KEPT:.0%} of the {metric} up to"
    f" {times(best.speedup)} as fast{ends(best.speedup_interval, 1)}"
  )


def _kept(found: scores.Curves) -> list[scores.Point]:
  """Points of measures that keep the quality."""
  least = KEPT * found.curves[experiments.FULL][0].quality
  others = (experiments.STATIC, experiments.ORACLE, experiments.FULL)
  return [p for p in found.points if p.name not in others and p.quality >= least]


def risks(entries: Sequence[trials.Trial], title: str) -> str:
  excess, name, tolerance = max(
    (e.risk_mean - e.tolerance, e.measure, e.tolerance) for e in entries
  )
  if not excess > 0.0:
    return f"{title}: the mean risk stays below what was promised, at every δ"
  return (
    f"{title}: the mean risk passes what was promised by up to {excess:.3f}"
    f" ({series_title(name)}, δ = {tolerance:g})"
  )


def violations(entries: Sequence[trials.Trial], title: str, error_rate: float) -> str:
  worst = 100 * max(entry.share for entry in entries)
  allowed = f"{100 * error_rate:g} % are allowed"
  if any(entry.interval[0] > error_rate for entry in entries):
    return f"{title}: the promise breaks too often, in up to {worst:.1f} % ({allowed})"
  return f"{title}: the promise breaks in at most {worst:.1f} % of the draws ({allowed})"


def perturbed(points: Sequence[scores.Point], title: str) -> str:
  """Title of Fig. 2a."""
  first, last = points[0], points[-1]
  fell = last.similarity - first.similarity
  spread = 1.96 * math.hypot(first.similarity_error, last.similarity_error)
  shares = f"{100 * first.similarity:.0f} against {100 * last.similarity:.0f} of 100 stay"
  if not abs(fell) > spread:  # also where there is no error to go by
    return f"{title}: a wrong token costs about as much wherever it stands ({shares})"
  return f"{title}: an early wrong token costs {'more' if fell > 0 else 'less'} ({shares})"


def _layers_for(found: scores.Curves, title: str, field: str, least: float, what: str) -> str:
  layers = []
  for name, points in found.curves.items():
    kept = [point.layers for point in points if getattr(point, field) >= least]
    layers.append(f"{name} {min(kept):.1f}" if kept else f"{name} never")
  return f"{title}: layers for {what}: {', '.join(layers)}"


def schedules_compared(found: scores.Curves, title: str) -> str:
  """Title of Fig. 2c."""
  return _layers_for(found, title, "similarity", 0.95, "95% of the full model's text")


def classifiers(found: scores.Curves, title: str) -> str:
  """Title of App. D's figure."""
  least = KEPT * max(point.quality for point in found.points)
  return _layers_for(found, title, "quality", least, f"{KEPT:.0%} of the best quality")


def objectives(found: scores.Curves, title: str) -> str:
  """Title of the figure about Eq. 6."""
  pairs = zip(*found.curves.values(), strict=True)
  gained = [(100 * (a.quality - b.quality), a.layers) for a, b in pairs]
  full, (most, layer) = gained[0][0], max(gained)  # points descend from full depth
  return (
    f"{title}: Eq. 6 is worth {most:+.0f} points after layer {layer:.0f}, and {full:+.1f} at"
    " full depth"
  )
