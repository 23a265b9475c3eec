"""Outputs decoded elsewhere: T5X, vLLM, OpenAI batches, plain {id, prediction}
lines.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import Generations
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.records import GenerationsError, Prompt, Record

Path = str | pathlib.Path
_TARGET = "targets_pretokenized"
_WHAT = (
  "{id, prediction}, or a line of T5X infer, of an OpenAI batch or of vLLM"
)


def read_predictions(
  path: Path, threshold: float | None = None
) -> tuple[tuple[Prompt, ...], tuple[Record, ...]]:
  """Reads one file of outputs, of any of these forms, line by line.

  {"id": ..., "prediction": ...} is a plain line; `input`, `targets` (or
  `references`), `group` and the fields of `Record` are read where they are
  there. A line of an OpenAI batch's output (`vllm run-batch` writes the same)
  has its id in `custom_id` and its text in `response.body`; a `RequestOutput`
  of vLLM has `request_id` and `outputs`. A T5X `infer` line ({"inputs": {...},
  "prediction": ..., "aux": {...}}) gives the prompt too; its id is `inputs.id`
  where the task kept one, else the line number.

  `threshold` is what the file is given as (infinity: the full model's); None
  asks no line. GenerationsError where a line is no output, or several, or an id
  occurs twice.
  """
  prompts: list[Prompt] = []

  def parse(line: storage.Line) -> Record:
    value = _plain(line, threshold)
    prompts.append(Prompt.from_json({"input": "", **value}))
    return Record.from_json(value)

  records = tuple(
    row for _, row in records_lib.read_each(path, parse, _WHAT, pipes=True)
  )
  if not records:
    raise GenerationsError(f"{path}: expected outputs, one a line, got none.")
  return tuple(prompts), records


def _plain(line: storage.Line, threshold: float | None) -> Mapping[str, Any]:
  """A line of any form as a plain one: the fields of a prompt and of its
  record.
  """
  value = line.value
  if isinstance(value.get("prediction"), list):
    _only(line, value["prediction"], "prediction")
  if isinstance(value.get("inputs"), Mapping):
    return _of_t5x(line, threshold)
  if "custom_id" in value:
    return {"id": value["custom_id"], "prediction": _of_batch(line)}
  if {"request_id", "outputs"} <= set(value):
    prompt = value.get("prompt")  # a text, or tokens
    text = _only(line, value["outputs"], "outputs").get("text")
    plain = {"id": value["request_id"], "prediction": text}
    return {**plain, "input": prompt} if isinstance(prompt, str) else plain
  return value


def _of_batch(line: storage.Line) -> Any:
  """The text of a line of a batch's output; ValueError where its request
  failed.
  """
  response = line.value.get("response") or {}
  error = line.value.get("error")
  if error or response.get("status_code", 200) != 200:
    raise ValueError(
      "Expected `response` of a request that succeeded, got one that failed:"
      f" {error or response!r:.200}"
    )
  body = response.get("body") or {}
  if "choices" in body:
    choice = _only(line, body["choices"], "choices")
    return (choice.get("message") or choice).get("content", choice.get("text"))
  messages = [
    part for part in body.get("output", ()) if part.get("type") == "message"
  ]
  parts = _only(line, messages, "output").get("content", ())
  return "".join(part.get("text", "") for part in parts)


def _only(line: storage.Line, entries: Any, name: str) -> Mapping[str, Any]:
  """The one decode of a prompt: which of several is served is not known."""
  if (
    isinstance(entries, list)
    and len(entries) == 1
    and isinstance(entries[0], Mapping)
  ):
    return entries[0]
  raise line.error(
    f"expected one decode of a prompt in `{name}`, got {entries!r:.100}; "
    "decode with"
    " `return_all_decodes = False`, or ask for one (`n = 1`)."
  )


def _of_t5x(line: storage.Line, threshold: float | None) -> dict[str, Any]:
  """A line of T5X's `infer`; whatever else it has is ignored."""
  value = line.value
  features = line.value["inputs"]
  name = features.get("id", f"line {line.number}")
  aux = value.get("aux")
  tokens = value.get("prediction_tokens")
  if not isinstance(aux, dict | None) or not isinstance(tokens, list | None):
    raise ValueError(
      "Expected `aux` to be an object and `prediction_tokens` to be a list, got"
      f" {aux!r:.60} and {tokens!r:.60}"
    )
  aux = aux or {}
  _check_threshold(line, aux, threshold)
  targets = features.get("targets", features.get(_TARGET, ()))
  texts = [targets] if isinstance(targets, str) else list(targets or ())
  if not all(isinstance(text, str) for text in texts):
    # With include_all_inputs `targets` are tokens; the text stands beside.
    texts = [features[_TARGET]] if _TARGET in features else []
  names = ("exit_layers", "confidences", "rejected_confidences")
  record = {field: aux[field] for field in names if field in aux}
  if (layers := record.get("exit_layers")) is not None:
    if any(layer < 0 for layer in layers):
      raise ValueError(
        f"Expected `exit_layers` of at least 0, got {layers!r:.100}"
      )
    # Padding has exit layer 0 and follows the real tokens.
    length = sum(layer > 0 for layer in layers)
    record = {field: values[:length] for field, values in record.items()}
    tokens = tokens if tokens is None or len(tokens) == length else None
  return {
    "id": str(name) if type(name) is int else name,
    "input": features.get("inputs_pretokenized", ""),
    "targets": texts,
    "group": features.get("group", features.get("source")),
    "prediction": value.get("prediction"),
    "tokens": tokens,
    "score": aux.get("scores", aux.get("score")),
    **record,
  }


def _check_threshold(
  line: storage.Line, aux: Mapping[str, Any], given: float | None
) -> None:
  """Refuses a T5X line whose `aux` names another threshold than the file is
  given as.
  """
  if given is None or not aux:
    return
  level = aux.get("threshold")
  if level is None:
    # With exits but no confidence nothing was measured: every token ran a fixed
    # depth.
    level = (
      given if "confidences" in aux or "exit_layers" not in aux else math.inf
    )
  if type(level) not in (int, float) or not (
    0 <= level <= 1 or level == math.inf
  ):
    raise ValueError(
      f"Expected `aux.threshold` to be a number in [0, 1], got {level!r:.100}"
    )
  # T5X writes a float32's digits
  if not math.isclose(level, given, rel_tol=2.0**-23):

    def name(value):
      return "none (the full model)" if value == math.inf else f"{value:.7g}"

    raise line.error(
      f"expected outputs of threshold {name(given)}, as the file is given, "
      "got outputs of"
      f" threshold {name(level)} (`aux.threshold`); name each file by its "
      "own threshold."
    )


def gather(
  full: Path, by_threshold: Mapping[float, Path] | Mapping[str, Path]
) -> Generations:
  """Cached generations from one file a threshold, in any form
  `read_predictions` knows.

  `by_threshold` has thresholds in [0, 1], or any other knob as texts, the best
  first; prompts are what `full` says of them. GenerationsError where a file is
  damaged, or its prompts or threshold are others.
  """
  order: list[Any] = list(by_threshold)
  if not any(isinstance(knob, str) for knob in order):
    order.sort(reverse=True)
    thresholds_lib.validate_grid(order)
  grid, knobs = thresholds_lib.grid_of_knobs(order)
  known, outputs = read_predictions(full, math.inf)
  by_id = {prompt.id: prompt for prompt in known}
  records = []
  for knob in order:
    path = by_threshold[knob]
    said, early = read_predictions(path, None if knobs else float(knob))
    by_name = {record.id: record for record in early}
    missing = [name for name in by_id if name not in by_name]
    unknown = [name for name in by_name if name not in by_id]
    if missing or unknown:
      raise GenerationsError(
        f"{path}: expected one output of each of the {len(known)} prompts, "
        "got missing"
        f" {missing[:5]}, unknown {unknown[:5]}; decode the same prompts for "
        "every file."
      )
    for number, other in enumerate(said, start=1):
      ours = by_id[other.id].input
      if other.input and ours and other.input != ours:
        raise GenerationsError(
          f"{path}: expected output {number} (id {other.id!r}) to be of the "
          "input"
          f" {ours[:60]!r}, got {other.input[:60]!r}: the files are not "
          "aligned; decode the"
          " same prompts in one order, or give them ids."
        )
    records.append(tuple(by_name[name] for name in by_id))
  return Generations(known, grid, tuple(records), outputs, knobs=knobs)
