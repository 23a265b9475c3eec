"""The promise of a calibration in plain words."""

from typing import TYPE_CHECKING

from calm.calibrate import thresholds as thresholds_lib

if TYPE_CHECKING:
  from calm.calibrate.calibration import Calibration

_KINDS = {
  "textual": "dissimilarity to the full model, 1 - {metric} between both outputs,",
  "risk_signed": "increase of the risk, 1 - {metric} against references, over the full model",
  "risk_clipped": "increase of the risk, 1 - {metric} against references, over the full model"
  " (decreases counted as 0)",
}


def describe(calibration: "Calibration") -> str:
  """What is promised, over what, with which probability, and what is not promised."""
  unit = "clusters of prompts" if calibration.clusters else "prompts"
  if not calibration.certified:
    return (
      "No threshold is certified, so the full model is used"
      f" ({thresholds_lib.NEVER_EXIT_TEXT});"
      f" it meets any tolerance by definition. {calibration.reason}"
    )
  loss = _KINDS.get(calibration.kind, "loss").format(metric=calibration.metric)
  # A sequential run may stop before it has used them all.
  most = "at most " if calibration.sequential else ""
  sentences = [
    f"With probability at least {1.0 - calibration.error_rate:.10g} over the draw of the"
    f" {most}{calibration.num_examples} calibration {unit}, decoding with threshold"
    f" {calibration.threshold:.10g} has an expected {loss} of at most"
    f" {calibration.tolerance:.10g}.",
    f"This is a mean over {unit} drawn like those: it says nothing of any single prompt, nor of"
    " prompts of another kind.",
  ]
  if calibration.order == "given":
    sentences.append(
      "The test saw prompts in the order given by the caller, who answers for its having been"
      " fixed before any loss was seen."
    )
  if calibration.procedure is None:
    sentences.append(
      "The outputs were decoded elsewhere: the user answers for their being decoded as they"
      " will be served."
    )
  return " ".join(sentences)
