"""Outputs decoded elsewhere: T5X, vLLM, OpenAI batches and plain {id, prediction} JSON Lines.

Nothing says how such outputs were decoded, so `procedure` is None unless the caller states it.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.cache import Generations
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.generations.records import GenerationsError, Prompt, Record

Path = str | pathlib.Path

# T5X names features so; whatever else a line has is ignored.
_INPUT, _TARGET = "inputs_pretokenized", "targets_pretokenized"


def read_predictions(
  path: Path, threshold: float | None = None
) -> tuple[tuple[Prompt, ...], tuple[Record, ...]]:
  """Reads one file of outputs, of either form, line by line.

  {"id": ..., "prediction": ...} is a plain line; `input`, `targets` (or `references`), `group`
  and the fields of `Record` are read where they are there. A line of an OpenAI batch's output
  (`vllm run-batch` writes the same) has its id in `custom_id` and its text in `response.body`;
  a `RequestOutput` of vLLM has `request_id` and `outputs`. A T5X `infer` line ({"inputs":
  {...}, "prediction": ..., "aux": {...}}) gives the prompt too; its id is `inputs.id` where the
  task kept one, else the line number.

  Args:
    path: JSON Lines file.
    threshold: lambda that the file is given as, in [0, 1]; infinity is the full model's. None:
      lines are not asked.

  Returns:
    Prompts and records in the order of the file.

  Raises:
    GenerationsError: a line is neither, or holds several decodes of its prompt, or was decoded
      by T5X with another threshold, or an id occurs twice; the message names file and line.
  """
  prompts, records = {}, []
  for line in storage.read_lines(path, pipes=True):
    if isinstance(decodes := line.value.get("prediction"), list):
      one = "decode with `return_all_decodes = False`, which keeps the best"
      raise line.error(_several(len(decodes), one))
    try:
      prompt, record = _read_line(line)
      _check_threshold(line, threshold)
    except GenerationsError:
      raise
    except (AttributeError, TypeError, ValueError) as error:
      raise line.error(
        f'expected {{"id", "prediction"}}, or a line of T5X infer, of an OpenAI batch or of'
        f" vLLM, got no output: {error}; write it in one of these forms."
      ) from error
    if prompt.id in prompts:
      raise line.error(
        f"expected every id once, got {prompt.id!r} twice; give every output its own."
      )
    prompts[prompt.id] = prompt
    records.append(record)
  if not records:
    raise GenerationsError(
      f"{path}: expected outputs, one a line, got none; name the file that decoding wrote."
    )
  return tuple(prompts.values()), tuple(records)


def _read_line(line: storage.Line) -> tuple[Prompt, Record]:
  value = line.value
  if isinstance(value.get("inputs"), Mapping):
    features = value["inputs"]
    name = features.get("id", f"line {line.number}")
    if isinstance(name, bool) or not isinstance(name, str | int):
      raise ValueError(f"Expected `inputs.id` to be a text or a whole number, got {name!r}")
    name = str(name)
    return _t5x_prompt(name, features), Record.from_json(_t5x_record(name, value))
  if "custom_id" in value or {"request_id", "outputs"} <= set(value):
    value = _served(line)
  prompt = Prompt.from_json({"input": "", **value})
  return prompt, Record.from_json(value)


def _served(line: storage.Line) -> dict[str, Any]:
  """A line of a server's output as {id, prediction}; ValueError where its request failed."""
  value = line.value
  if "custom_id" not in value:
    output = _only(value["outputs"], "outputs", line)
    plain = {"id": value["request_id"], "prediction": output.get("text")}
    return plain | ({"input": value["prompt"]} if isinstance(value.get("prompt"), str) else {})
  response = value.get("response") or {}
  if value.get("error") or response.get("status_code", 200) != 200:
    raise ValueError(
      "Expected `response` of a request that succeeded, got one that failed:"
      f" {value.get('error') or response!r:.200}"
    )
  body = response.get("body") or {}
  if "choices" in body:
    choice = _only(body["choices"], "choices", line)
    text = (choice.get("message") or choice).get("content", choice.get("text"))
  else:
    messages = [m for m in body.get("output", ()) if m.get("type") == "message"]
    parts = _only(messages, "output", line).get("content", ())
    text = "".join(part.get("text", "") for part in parts)
  return {"id": value["custom_id"], "prediction": text}


def _only(entries: Any, name: str, line: storage.Line) -> Mapping[str, Any]:
  if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
    raise ValueError(f"Expected `{name}` to be a list of objects, got {entries!r:.100}")
  if len(entries) > 1:  # which of them is served is not known
    raise line.error(_several(len(entries), "ask for one, as with `n = 1`"))
  return entries[0]


def _several(count: int, one: str) -> str:
  """What to say of several decodes of a prompt, and of how to get one."""
  return (
    f"expected one `prediction` of a prompt, got a list of {count} decodes; {one}, or write the"
    " one that is served as `prediction`."
  )


def _t5x_prompt(name: str, features: Mapping[str, Any]) -> Prompt:
  targets = features.get("targets", features.get(_TARGET, ()))
  texts = [targets] if isinstance(targets, str) else list(targets or ())
  if not all(isinstance(text, str) for text in texts):
    # With include_all_inputs `targets` are tokens; the text stands beside.
    texts = [features[_TARGET]] if _TARGET in features else []
  group = features.get("group", features.get("source"))
  return Prompt.from_json(
    {"id": name, "input": features.get(_INPUT, ""), "targets": texts, "group": group}
  )


def _t5x_record(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
  aux = {} if value.get("aux") is None else value["aux"]
  if not isinstance(aux, Mapping):
    raise ValueError(f"Expected `aux` to be an object, got {aux!r:.100}")
  tokens = value.get("prediction_tokens")
  if tokens is not None and not isinstance(tokens, list):
    raise ValueError(f"Expected `prediction_tokens` to be a list, got {tokens!r:.100}")
  names = ("exit_layers", "confidences", "rejected_confidences")
  record = {field: aux[field] for field in names if field in aux}
  layers = record.get("exit_layers")
  if layers is not None:
    if any(layer < 0 for layer in layers):
      raise ValueError(f"Expected `exit_layers` of at least 0, got {layers!r:.100}")
    # Padding has exit layer 0 and follows the real tokens.
    length = sum(layer > 0 for layer in layers)
    record = {field: values[:length] for field, values in record.items()}
    tokens = tokens if tokens is None or len(tokens) == length else None
  score = aux.get("scores", aux.get("score"))
  more = {"tokens": tokens, "score": score}
  record |= {field: value for field, value in more.items() if value is not None}
  return {"id": name, "prediction": value.get("prediction"), **record}


def _check_threshold(line: storage.Line, expected: float | None) -> None:
  """Refuses a T5X line whose `aux` names another threshold than the file is given as."""
  aux = line.value.get("aux")
  if expected is None or not isinstance(line.value.get("inputs"), Mapping) or not aux:
    return
  level = aux.get("threshold")
  if level is None:
    # With exits but no confidence nothing was measured: every token ran a fixed depth.
    level = expected if "confidences" in aux or "exit_layers" not in aux else math.inf
  number = isinstance(level, int | float) and not isinstance(level, bool)
  if not number or not (0 <= level <= 1 or level == math.inf):
    raise ValueError(f"Expected `aux.threshold` to be a number in [0, 1], got {level!r:.100}")
  if not math.isclose(level, expected, rel_tol=2.0**-23):  # T5X writes a float32's digits
    name = lambda value: "none (the full model)" if value == math.inf else f"{value:.7g}"
    raise line.error(
      f"expected outputs of threshold {name(expected)}, as the file is given, got outputs of"
      f" threshold {name(level)} (`aux.threshold`); name each file by the threshold that"
      " decoded it."
    )


def gather(
  full: Path,
  by_threshold: Mapping[float, Path] | Mapping[str, Path],
  *,
  prompts: Path | None = None,
  procedure: Procedure | None = None,
  provenance: Provenance | None = None,
) -> Generations:
  """Cached generations from one file a threshold, in any form `read_predictions` knows.

  Args:
    full: outputs of the full model.
    by_threshold: {threshold: file}, thresholds in [0, 1]; or {knob: file} of any other knob,
      as texts, the best first.
    prompts: JSON Lines of {id, input, targets, group}; None takes what `full` says.
    procedure: how they were decoded, where the caller can vouch for it.
    provenance: their story.

  Returns:
    `Generations` with prompts in the order of `prompts`, or of `full`.

  Raises:
    GenerationsError: a file is damaged, ids are missing or unknown somewhere, or a line that
      goes by its number has another input than the same line of `full`, or T5X decoded a line
      with another threshold than its file is given as.
    ValueError: some knobs are thresholds in [0, 1] and others are not.
  """
  order = list(by_threshold)
  if not any(isinstance(knob, str) for knob in order):
    order.sort(reverse=True)
    thresholds_lib.validate_grid([float(knob) for knob in order])
  grid, knobs = thresholds_lib.grid_of_knobs(order)
  known, full_records = read_predictions(full, math.inf)
  if prompts is not None:
    known = records_lib.read_prompts(prompts)
  by_id = {prompt.id: prompt for prompt in known}
  columns = [_align(full, known, full_records, by_id, known)]
  for knob in order:
    path: Path = by_threshold[knob]  # type: ignore[index]
    others, records = read_predictions(path, None if knobs else float(knob))
    columns.append(_align(path, known, records, by_id, others))
  return Generations(
    prompts=known,
    thresholds=np.asarray(grid),
    records=tuple(columns[1:]),
    full=columns[0],
    procedure=procedure,
    provenance=provenance or Provenance(),
    knobs=knobs,
  )


def _align(path: Path, known, records, by_id, others) -> tuple[Record, ...]:
  """The records in the order of `known`; GenerationsError where they are of other prompts."""
  by_name = {record.id: record for record in records}
  missing = [prompt.id for prompt in known if prompt.id not in by_name]
  unknown = [name for name in by_name if name not in by_id]
  if missing or unknown:
    raise GenerationsError(
      f"{path}: expected one output of each of the {len(known)} prompts, got missing"
      f" {missing[:5]}, unknown {unknown[:5]}; decode the same prompts for every file."
    )
  for number, other in enumerate(others, start=1):
    ours = by_id[other.id].input
    if other.input and ours and other.input != ours:
      raise GenerationsError(
        f"{path}: expected output {number} (id {other.id!r}) to be of the input"
        f" {ours[:60]!r}, got {other.input[:60]!r}: the files are not aligned; decode the same"
        " prompts in one order, or give them ids."
      )
  return tuple(by_name[prompt.id] for prompt in known)
