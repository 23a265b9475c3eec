"""Requests for references, only where a loss needs them.

Where the early text equals the full one the risk difference is 0 whatever the reference, so a
test that looks at prompts one by one requests references of the others alone, and of none
beyond the last that it looks at.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calm import storage
from calm.calibrate import losses, metrics
from calm.calibrate.generations.cache import Generations
from calm.calibrate.generations.records import GenerationsError, Prompt, Record


@dataclasses.dataclass(frozen=True)
class LabelRequest:
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


# Answers requests: {id: references} of at least the requested prompts.
Labeler = Callable[[Sequence[LabelRequest]], Mapping[str, Sequence[str]]]


class MissingReferences(ValueError):
  """References are needed and were not given; `requests` has the prompts."""

  def __init__(self, requests: Sequence[LabelRequest]):
    self.requests = tuple(requests)
    super().__init__(
      f"Expected references of {len(self.requests)} prompts whose text differs from the full"
      f" model's, got none, first {[request.id for request in self.requests[:5]]}; give them."
    )


def find_requests(generations: Generations) -> tuple[LabelRequest, ...]:
  """A request for each prompt of `losses.unlabelled`, with its different texts."""
  wanted, requests = set(losses.unlabelled(generations)), []
  for row, prompt in enumerate(generations.prompts):
    if prompt.id in wanted:
      texts = [column[row].prediction for column in generations.records if row < len(column)]
      full = generations.full[row].prediction
      early = tuple(text for text in dict.fromkeys(texts) if text != full)
      requests.append(LabelRequest(prompt.id, prompt.input, full, early))
  return tuple(requests)


def batch_losses(
  prompts: Sequence[Prompt],
  threshold: float,
  early: Sequence[Record],
  full: Sequence[Record],
  *,
  kind: str,
  metric: metrics.MetricLike = "rouge_l",
  ask: Labeler | None = None,
) -> np.ndarray:
  """Losses of some prompts at one threshold, as `SequentialCalibration.add` wants them.

  Args:
    prompts: [num_prompts] prompts.
    threshold: at which the early texts were decoded.
    early: [num_prompts] their records.
    full: [num_prompts] records of the full model.
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: the text metric.
    ask: answers requests for references, for a risk; None where every prompt has them. It is
      called once with what is missing, and not at all where nothing is.

  Returns:
    [num_prompts] losses.

  Raises:
    MissingReferences: references are missing, and `ask` has none.
    ValueError: as `losses.prefix_losses`.
  """
  grid = np.array([threshold])
  pairs = Generations(tuple(prompts), grid, records=(tuple(early),), full=tuple(full))
  requests = find_requests(pairs) if kind != "textual" and ask is not None else ()
  if requests and ask is not None:
    answers = ask(requests)
    missing = [request for request in requests if not answers.get(request.id)]
    if missing:
      raise MissingReferences(missing)
    labelled = {request.id: tuple(answers[request.id]) for request in requests}
    rows = (dataclasses.replace(p, targets=labelled.get(p.id, p.targets)) for p in prompts)
    pairs = dataclasses.replace(pairs, prompts=tuple(rows))
  return losses.prefix_losses(pairs, kind, metric=metric)[0]


def read_references(path: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
  """References of a JSON Lines file of {id, targets or references}.

  Raises:
    GenerationsError: a line is none, or an id occurs twice; the message names file and line.
  """
  return {line.value["id"]: texts for line, texts in _answers(path)}


def _answers(path: str | pathlib.Path) -> list[tuple[storage.Line, tuple[str, ...]]]:
  answers: dict[str, tuple[storage.Line, tuple[str, ...]]] = {}
  for line in storage.read_lines(path, pipes=True):
    name, value = line.value.get("id"), line.value.get("targets", line.value.get("references"))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(name, str) or name in answers or not isinstance(texts, list):
      raise line.error(f"expected an `id` that is new and `targets`, got {line.value!r:.100}")
    if not all(isinstance(text, str) for text in texts):
      raise line.error(f"expected `targets` to be texts, got {texts!r:.100}")
    answers[name] = (line, tuple(texts))
  return list(answers.values())


def write_requests(path: str | pathlib.Path, requests: Sequence[LabelRequest]) -> None:
  """Writes requests as JSON Lines with empty `targets`, for `read_references` to read.

  Answers that the file has already stay, before the requests.

  Raises:
    GenerationsError: the file holds something else, which is left alone.
  """
  path, kept = pathlib.Path(path), {}
  known = {field.name for field in dataclasses.fields(LabelRequest)} | {"targets", "references"}
  if path.exists():
    try:
      for line, texts in _answers(path):
        if odd := set(line.value) - known:
          raise line.error(f"expected {sorted(known)}, got {sorted(odd)}; leave the rest out")
        kept |= {line.value["id"]: line.value} if texts else {}
    except GenerationsError as error:
      raise GenerationsError(
        f"Expected {path} to be new, or to hold requests and answers, got something else,"
        f" which would be replaced ({error}); choose another file."
      ) from error
  new = [{**dataclasses.asdict(r), "targets": []} for r in requests if r.id not in kept]
  storage.write_atomically(path, "".join(map(storage.dump_line, [*kept.values(), *new])))
