"""Requests for references, only of prompts where a loss needs them.

Where the early text equals the full one the risk difference is 0 whatever the reference.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from calm import storage
from calm.calibrate import losses
from calm.calibrate.generations.cache import Generations
from calm.calibrate.generations.records import GenerationsError

_FIELDS = {"id", "input", "full", "early", "targets", "references"}


def find_requests(generations: Generations) -> list[dict[str, Any]]:
  """{id, input, full, early} of each prompt of `losses.unlabelled`; early: different texts."""
  wanted, requests = set(losses.unlabelled(generations)), []
  for row, prompt in enumerate(generations.prompts):
    if prompt.id in wanted:
      texts = [column[row].prediction for column in generations.records if row < len(column)]
      full = generations.full[row].prediction
      early = [text for text in dict.fromkeys(texts) if text != full]
      requests.append({"id": prompt.id, "input": prompt.input, "full": full, "early": early})
  return requests


def read_references(
  path: str | pathlib.Path, only: set[str] | None = None
) -> dict[str, tuple[str, ...]]:
  """References of a JSON Lines file of {id, targets or references}; a lone text is one.

  Raises:
    GenerationsError: a line is none, has other fields than `only`, or an id occurs twice; the
      message names file and line.
  """
  found: dict[str, tuple[str, ...]] = {}
  for line in storage.read_lines(path, pipes=True):
    name, value = line.value.get("id"), line.value.get("targets", line.value.get("references"))
    texts: Any = [value] if isinstance(value, str) else value
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    more = only is not None and not set(line.value) <= only
    if not isinstance(name, str) or name in found or not whole or more:
      raise line.error(
        f"expected an `id` that is new and `targets`, texts, got {line.value!r:.100}"
      )
    found[name] = tuple(texts)
  return found


def write_requests(path: str | pathlib.Path, requests: Sequence[Mapping[str, Any]]) -> None:
  """Writes requests as JSON Lines with empty `targets`, for `read_references` to read.

  Answers that the file has already stay, before the requests.

  Raises:
    GenerationsError: the file holds something else, which is left alone.
  """
  path, kept = pathlib.Path(path), []
  if path.exists():
    try:
      answers = read_references(path, _FIELDS)
      kept = [line.value for line in storage.read_lines(path) if answers[line.value["id"]]]
    except GenerationsError as error:
      raise GenerationsError(
        f"Expected {path} to be new, or to hold requests and answers, got something else,"
        f" which would be replaced ({error}); choose another file."
      ) from error
  answered = {value["id"] for value in kept}
  new = [{**request, "targets": []} for request in requests if request["id"] not in answered]
  storage.write_atomically(path, "".join(map(storage.dump_line, [*kept, *new])))
