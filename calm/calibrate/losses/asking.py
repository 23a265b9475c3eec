"""References that are asked for only when a loss needs them.

Where the early text equals the full one the risk difference is 0 whatever the reference, so a
test that looks at prompts one by one asks for references of the others alone, and of none
beyond the last that it looks at.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate.generations import records
from calm.calibrate.generations.cached import Generations
from calm.calibrate.generations.records import Prompt, Record
from calm.calibrate.losses import metrics, sequence_losses


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt whose references are wanted: what a person, or a judge, has to look at.

  Attributes:
    id: the prompt's id.
    input: its text.
    full: text of the full model.
    early: different texts of early exits.
  """

  id: str
  input: str
  full: str
  early: tuple[str, ...]


# Who answers: {id: references} of at least the questions.
Ask = Callable[[Sequence[Question]], Mapping[str, Sequence[str]]]


class Unanswered(ValueError):
  """References are wanted and nobody gave them; `questions` has the prompts."""

  def __init__(self, questions: Sequence[Question]):
    self.questions = tuple(questions)
    super().__init__(
      f"Expected references of {len(self.questions)} prompts whose text differs from the full"
      f" model's, got none, first {[question.id for question in self.questions[:5]]}; give"
      " them."
    )


def questions(generations: Generations) -> tuple[Question, ...]:
  """The prompts of `sequence_losses.unlabelled`, with their different texts."""
  wanted = set(sequence_losses.unlabelled(generations))
  found = []
  for row, prompt in enumerate(generations.prompts):
    if prompt.id in wanted:
      texts = [column[row].prediction for column in generations.records if row < len(column)]
      full = generations.full[row].prediction
      early = tuple(text for text in dict.fromkeys(texts) if text != full)
      found.append(Question(prompt.id, prompt.input, full, early))
  return tuple(found)


def answered(generations: Generations, ask: Ask) -> Generations:
  """The generations with references wherever a risk needs them.

  Args:
    generations: cached generations.
    ask: called once with what is missing, and not at all where nothing is.

  Raises:
    Unanswered: `ask` left some out.
  """
  missing = questions(generations)
  if not missing:
    return generations
  answers = ask(missing)
  left = [question for question in missing if not answers.get(question.id)]
  if left:
    raise Unanswered(left)
  prompts = tuple(
    prompt
    if prompt.targets or prompt.id not in answers
    else dataclasses.replace(prompt, targets=tuple(answers[prompt.id]))
    for prompt in generations.prompts
  )
  return dataclasses.replace(generations, prompts=prompts)


def batch_losses(
  prompts: Sequence[Prompt],
  threshold: float,
  early: Sequence[Record],
  full: Sequence[Record],
  *,
  kind: str,
  metric: metrics.MetricLike = "rouge_l",
  ask: Ask | None = None,
) -> np.ndarray:
  """Losses of some prompts at one threshold, as `SequentialCalibration.add` wants them.

  Args:
    prompts: [num_prompts] prompts.
    threshold: at which the early texts were decoded.
    early: [num_prompts] their records.
    full: [num_prompts] records of the full model.
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: the text metric.
    ask: who knows references, for a risk; None where every prompt has them.

  Returns:
    [num_prompts] losses.

  Raises:
    Unanswered: references are missing, and `ask` has none.
    ValueError: as `sequence_losses.prefix_losses`.
  """
  pairs = Generations(
    prompts=tuple(prompts),
    thresholds=np.array([threshold]),
    records=(tuple(early),),
    full=tuple(full),
  )
  if kind != "textual" and ask is not None:
    pairs = answered(pairs, ask)
  return sequence_losses.prefix_losses(pairs, kind, metric=metric, workers=1)[0]


def read_references(path: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
  """References of a JSON Lines file of {id, targets or references}.

  Raises:
    GenerationsError: a line is none, or an id occurs twice; the message names file and line.
  """
  found: dict[str, tuple[str, ...]] = {}
  for line in storage.read_lines(path, pipes=True):
    name, value = line.value.get("id"), line.value.get("targets", line.value.get("references"))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(name, str) or name in found or not isinstance(texts, list):
      raise line.error(f"expected an `id` that is new and `targets`, got {line.value!r:.100}")
    if not all(isinstance(text, str) for text in texts):
      raise line.error(f"expected `targets` to be texts, got {texts!r:.100}")
    found[name] = tuple(texts)
  return found


def write_questions(path: str | pathlib.Path, wanted: Sequence[Question]) -> None:
  """Writes questions as JSON Lines with empty `targets`, for `read_references` to read.

  Answers that the file has already stay, before the questions.

  Raises:
    GenerationsError: the file holds something else, which is left alone.
  """
  kept = _answers(pathlib.Path(path))
  asked = [{**dataclasses.asdict(q), "targets": []} for q in wanted if q.id not in kept]
  storage.write_atomically(path, "".join(map(storage.dump_line, [*kept.values(), *asked])))


def _answers(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The lines of a file of questions that were answered, by id."""
  if not path.exists():
    return {}
  known = {field.name for field in dataclasses.fields(Question)} | {"targets", "references"}
  try:
    answered = {name for name, texts in read_references(path).items() if texts}
    lines = list(storage.read_lines(path, pipes=True))
    odd = next((line for line in lines if set(line.value) - known), None)
    if odd is not None:
      raise odd.error(f"expected {sorted(known)}, got {sorted(odd.value)}; leave the rest out")
  except records.GenerationsError as error:
    raise records.GenerationsError(
      f"Expected {path} to be new, or to hold questions and answers, got something else, which"
      f" would be replaced ({error}); choose another file."
    ) from error
  return {line.value["id"]: line.value for line in lines if line.value["id"] in answered}
