"""Risk and its bound against decoder layers, from the calibration part."""

from calm.fitting.options import FitOptions
from calm.fitting.result import Result
from calm.paper.report import figures


def draw(result: Result, options: FitOptions) -> figures.Figure | None:
  """The curve with the chosen point; None where nothing was tested."""
  if not result.curve:
    return None
  points = sorted(result.curve, key=lambda point: point.layers)
  layers = [point.layers for point in points]

  def paint(axes) -> None:
    axes.plot(layers, [p.risk for p in points], marker="o", color="#0072b2", label="mean loss")
    bounds = [p.bound for p in points]
    axes.plot(layers, bounds, linestyle="--", color="#d55e00", label="upper bound")
    promised = {"color": figures.INK, "linewidth": 0.9, "linestyle": ":"}
    axes.axhline(options.tolerance, label="tolerance", **promised)
    for point in points:
      if point.threshold == result.certified_threshold:
        axes.plot(
          [point.layers],
          [point.risk],
          marker="*",
          markersize=13,
          color="#009e73",
          linestyle="none",
          label="certified",
        )
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{options.kind} loss, {options.metric}")

  title = f"Fewer layers, more risk: {options.tolerance:g} is promised"
  caption = (
    f"{points[0].count} calibration prompts, one point a threshold. The certified threshold is"
    " the lowest that the test passed, from the right to the left."
  )
  return figures.draw("curve", title, caption, paint)
