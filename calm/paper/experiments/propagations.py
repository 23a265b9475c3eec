"""Section 3.3.1: the oracle's exits under three ways to fill the skipped layers."""

import dataclasses
from collections.abc import Mapping, Sequence

from calm import exits
from calm.calibrate import Prompt, Record
from calm.exits import propagation
from calm.paper.bench import scores

# What a reader calls them, and the paper's ROUGE-L on CNN/DM.
TITLES: Mapping[str, tuple[str, str]] = {
  "exit_state": ("oracle, dʲ to the skipped layers", "38.24"),
  "first_state": ("oracle, d¹ always", "38.31"),
  "copy_projections": ("oracle, Kʲ and Vʲ copied", "23.02"),
}
PAPER_FULL = "38.32"


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way.

  Attributes:
    name: of the propagation.
    scores: quality, similarity and layers.
    identical: share of outputs that are the full model's, in [0, 1].
  """

  name: str
  scores: scores.Scores
  identical: float


@dataclasses.dataclass(frozen=True)
class Propagations:
  """Section 3.3.1 for one task.

  Attributes:
    metric: bounded metric.
    num_prompts: validation prompts.
    full: the full model.
    variants: one entry a propagation.
  """

  metric: str
  num_prompts: int
  full: scores.Scores
  variants: tuple[Variant, ...]

  def find(self, name: str) -> Variant:
    """The variant of a name."""
    return next(variant for variant in self.variants if variant.name == name)


def rules() -> Mapping[str, exits.OracleExit]:
  """Oracle exits with each propagation."""
  return {name: exits.OracleExit(propagation=propagation.propagation(name)) for name in TITLES}


def propagations(
  prompts: Sequence[Prompt],
  records: Mapping[str, Sequence[Record]],
  full: Sequence[Record],
  metric: str,
) -> Propagations:
  """Scores the oracle's outputs.

  Args:
    prompts: with references.
    records: propagation -> the oracle's records.
    full: the full model's records.
    metric: a bounded metric.
  """
  references = [prompt.targets for prompt in prompts]

  def variant(name: str, made: Sequence[Record]) -> Variant:
    same = [a.prediction == b.prediction for a, b in zip(made, full, strict=True)]
    return Variant(name, scores.score(made, references, full, metric), sum(same) / len(same))

  return Propagations(
    metric=metric,
    num_prompts=len(prompts),
    full=scores.score(full, references, full, metric),
    variants=tuple(variant(name, made) for name, made in records.items()),
  )
