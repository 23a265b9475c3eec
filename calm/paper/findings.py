"""Titles of figures and headlines: sentences made from the numbers that they show."""

import math
from collections.abc import Sequence

from calm.inference.panel import threshold
from calm.paper import experiments, perturbations, scores
from calm.paper.figures import series_title
from calm.paper.tables import interval, times

# Share of the full model's quality that counts as kept.
KEPT = 0.98


def headline(report: experiments.TaskReport) -> str:
  """The result of a task in one sentence, or two where a remark is due."""
  title, best = report.settings.title.capitalize(), best_gain(report.gains)
  if best is None or not best.speedup > 1.0:
    slower = "" if best is None else f"; the fastest that is certified runs {pace(best)}"
    return f"{title}: full depth serves best here, nothing faster was certified{slower}."
  drift = f"drift {best.risk:.2f}{ends(best.risk_interval)}"
  return (
    f"{title}: decodes {pace(best)}; {drift} where {best.tolerance:g} was promised"
    f" ({series_title(best.measure)}, threshold {threshold(best.threshold)},"
    f" {report.gains.num_unseen} unseen prompts).{remark(best)}"
  )


def speed(report: experiments.TaskReport) -> str:
  """The speed-up of a task in a word, like `×1.90`; `×1` where full depth serves best."""
  best = best_gain(report.gains)
  return times(best.speedup) if best and best.speedup > 1.0 else "×1"


def pace(gain: experiments.Gain) -> str:
  """Like `×1.90 as fast (1.70 to 2.10)`."""
  return f"{times(gain.speedup)} as fast{ends(gain.speedup_interval)}"


def ends(bounds: scores.Interval, digits: int = 2) -> str:
  """Like ` (0.02 to 0.12)`, or nothing where it is unknown."""
  text = interval(bounds, digits, "")
  return f" ({text})" if text else ""


def remark(gain: experiments.Gain) -> str:
  """A remark where a measured risk is above the tolerance, with a space before."""
  if not gain.above:
    return ""
  if gain.risk_interval[0] > gain.tolerance:
    return " That is more than was promised, and its interval lies above it: do not rely on it."
  return (
    " That is above the promise, which is of the expectation; so few prompts cannot tell the"
    " two apart."
  )


def best_gain(table: experiments.Gains) -> experiments.Gain | None:
  """The cell for textual consistency at the tightest tolerance that is faster than full depth.

  Where none is faster, the fastest that was certified; None where nothing was.
  """
  cells = [cell for cell in table.cells if cell.consistency == "textual" and cell.exits]
  faster = [cell for cell in cells if cell.speedup > 1.0]
  tightest = min((cell.tolerance for cell in faster), default=None)
  among = [cell for cell in faster if cell.tolerance == tightest] or cells
  speed = lambda cell: -math.inf if math.isnan(cell.speedup) else cell.speedup
  return max(among, key=speed, default=None)


def quality_and_layers(
  found: experiments.Curves, title: str, metric: str, num_layers: int
) -> str:
  """Title of Fig. 3 against layers."""
  kept = _kept(found)
  if not kept:
    return f"{title}: no measure keeps {KEPT:.0%} of the full model's {metric}"
  layers, name = min((point.layers, point.name) for point in kept)
  return (
    f"{title}: {series_title(name)} keeps {KEPT:.0%} of the {metric} with {layers:.1f} of"
    f" {num_layers} layers"
  )


def quality_and_seconds(found: experiments.Curves, title: str, metric: str) -> str:
  """Title of Fig. 3 against seconds."""
  timed = [point for point in _kept(found) if point.speedup > 1.0]
  if not timed:
    return f"{title}: nothing that keeps {KEPT:.0%} of the {metric} is faster than full depth"
  best = max(timed, key=lambda point: (point.speedup, point.name))
  return (
    f"{title}: {series_title(best.name)} keeps {KEPT:.0%} of the {metric} up to"
    f" {times(best.speedup)} as fast{ends(best.speedup_interval, 1)}"
  )


def _kept(found: experiments.Curves) -> list[scores.Point]:
  """Points of measures that keep the quality."""
  least = KEPT * found.first(experiments.FULL).quality
  others = (experiments.STATIC, experiments.ORACLE, experiments.FULL)
  return [p for p in found.points if p.name not in others and p.quality >= least]


def risks(entries: Sequence[experiments.MethodTrials], title: str) -> str:
  """Title of the figure of risk against tolerance."""
  over = [
    (split.risk_mean - split.tolerance, entry.measure, split.tolerance)
    for entry in entries
    for split in entry.splits
    if split.risk_mean > split.tolerance
  ]
  if not over:
    return f"{title}: the mean risk stays below what was promised, at every δ"
  excess, name, tolerance = max(over)
  return (
    f"{title}: the mean risk passes what was promised by up to {excess:.3f}"
    f" ({series_title(name)}, δ = {tolerance:g})"
  )


def violations(
  entries: Sequence[experiments.MethodTrials], title: str, error_rate: float
) -> str:
  """Title of the figure of broken promises."""
  trials = [trial for entry in entries for trial in entry.validity]
  worst = max((trial.share for trial in trials), default=0.0)
  allowed = f"{100 * error_rate:g} % are allowed"
  if any(trial.interval[0] > error_rate for trial in trials):
    return f"{title}: the promise breaks too often, in up to {100 * worst:.1f} % ({allowed})"
  return f"{title}: the promise breaks in at most {100 * worst:.1f} % of the draws ({allowed})"


def perturbed(found: perturbations.Perturbations, title: str) -> str:
  """Title of Fig. 2a."""
  first, last = found.sampling[0], found.sampling[-1]
  fell = last.similarity - first.similarity
  spread = 1.96 * math.hypot(first.similarity_error, last.similarity_error)
  shares = f"{100 * first.similarity:.0f} against {100 * last.similarity:.0f} of 100 stay"
  if not abs(fell) > spread:  # also where there is no error to go by
    return f"{title}: a wrong token costs about as much wherever it stands ({shares})"
  return f"{title}: an early wrong token costs {'more' if fell > 0 else 'less'} ({shares})"


def thresholds_shown(name: str, values: Sequence[float]) -> str:
  """Title of Fig. 2b."""
  return (
    f"λ = {experiments.SHOWN_THRESHOLD:g} asks {values[0]:.2f} of the first token and"
    f" {values[-1]:.2f} of the last ({name})"
  )


def schedules_compared(found: experiments.Curves, title: str) -> str:
  """Title of Fig. 2c."""
  least, known = 0.95, {}
  for name, points in found.curves.items():
    if kept := [point.layers for point in points if point.similarity >= least]:
      known[name] = min(kept)
  if experiments.CONSTANT not in known or len(known) < 2:
    return f"{title}: too few points reach {least:.0%} of the full model's text to compare"
  best = min(known, key=lambda name: known[name])
  numbers = ", ".join(f"{name} {value:.1f}" for name, value in known.items())
  alike = max(known.values()) - known[best] < 0.1
  result = "schedules need as many layers" if alike else f"{best} needs the fewest layers"
  return f"{title}: for {least:.0%} of the full model's text, {result} ({numbers})"


def classifiers(found: experiments.Curves, title: str) -> str:
  """Title of App. D's figure."""
  least = KEPT * max(point.quality for point in found.points)
  layers = []
  for name, points in found.curves.items():
    kept = [point.layers for point in points if point.quality >= least]
    layers.append(f"{name} {min(kept):.1f}" if kept else f"{name} never")
  return f"{title}: layers for {KEPT:.0%} of the best quality: {', '.join(layers)}"


def objectives(found: experiments.Curves, title: str) -> str:
  """Title of the figure about Eq. 6."""
  pairs = zip(*found.curves.values(), strict=True)
  gained = [(100 * (a.quality - b.quality), a.layers) for a, b in pairs]
  full, (most, layer) = gained[0][0], max(gained)  # points descend from full depth
  return (
    f"{title}: Eq. 6 is worth {most:+.0f} points after layer {layer:.0f}, and {full:+.1f} at"
    " full depth"
  )
