"""Requests and answers: OpenAI's completions, and the generations of TGI."""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm.calibrate import NEVER_EXIT, thresholds
from calm.data import prompt_batches
from calm.serve.device import Device, Job, Part

MOST_STOPS = 4


class Refusal(Exception):
  """An error that the client gets, in the shape of OpenAI's."""

  def __init__(self, message: str, param: str | None = None, status=400, code=None, **headers):
    self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
    kind = "invalid_request_error" if status < 500 else "server_error"
    self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _texts(value: Any) -> list[Any]:
  return value if isinstance(value, list) else [value]


def _is_threshold(value: Any) -> bool:
  number = type(value) in (int, float) and 0.0 <= value <= 1.0
  return number or value == thresholds.NEVER_EXIT_TEXT


# Kinds of fields: what holds of a value, and that in words.
_Kind = tuple[Callable[[Any], bool], str]
TEXTS: _Kind = (
  lambda v: all(isinstance(text, str) for text in _texts(v)),
  "a text or a list of texts",
)
TEXT: _Kind = (lambda value: isinstance(value, str), "a text")
COUNT: _Kind = (lambda value: type(value) is int and value >= 1, "a whole number from 1 on")
SEED: _Kind = (lambda value: type(value) is int, "a whole number")
SWITCH: _Kind = (lambda value: isinstance(value, bool), "true or false")
OBJECT: _Kind = (lambda value: isinstance(value, dict), "an object")
OWN = {"threshold": (_is_threshold, "a number in [0, 1] or 'never'"), "exact": SWITCH}
OWN |= {"stop": TEXTS, "seed": SEED}  # nothing is drawn: any seed will do
# What greedy decoding does anyway, if somebody says it.
GREEDY = {"temperature": 0, "top_p": 1, "n": 1, "best_of": 1, "echo": False, "logit_bias": {}}
GREEDY |= {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
GREEDY |= {"do_sample": False, "return_full_text": False, "watermark": False}


def _fields(body: Any, kinds: Mapping[str, _Kind], needed: str = "") -> dict[str, Any]:
  """The fields that are given, checked; null is as good as none."""
  if not isinstance(body, dict):
    raise Refusal(f"Expected a JSON object, got {_shown(body)}.")
  given = {name: value for name, value in body.items() if value is not None}
  for name, value in given.items():
    if name in kinds and not kinds[name][0](value):
      raise Refusal(f"Expected `{name}` to be {kinds[name][1]}, got {_shown(value)}.", name)
    if name not in kinds and (name not in GREEDY or json.dumps(GREEDY[name]) != _shown(value)):
      only = f" but for {json.dumps(GREEDY[name])}" if name in GREEDY else ""
      got = f"`{name:.60}` ({_shown(value)}) is not supported{only}; decoding is greedy"
      raise Refusal(f"{got}: leave it out.", name[:60], code="unsupported_parameter")
  if needed and needed not in given:
    raise Refusal(f"Expected `{needed}`, {kinds[needed][1]}, got none.", needed)
  return given


def _shown(value: Any) -> str:
  value = int(value) if isinstance(value, float) and value.is_integer() else value
  return json.dumps(value)[:60]


def _jobs(
  device: Device, prompts: Sequence[str], given: Mapping[str, Any], prompt: str, limit: str
) -> list[Job]:
  """The prompts of a request; `prompt` and `limit` are the names of its fields."""
  options, model = device.model.options, device.model
  longest, most = options.max_input_length, options.max_decode_length
  count, stop = given.get(limit, most), _texts(given.get("stop", []))
  if count > most:
    raise Refusal(f"Expected `{limit}` of at most {most}, got {count}.", limit)
  if len(stop) > MOST_STOPS or not all(stop):
    raise Refusal(f"Expected at most {MOST_STOPS} texts as `stop`, none empty.", "stop")
  if not 1 <= len(prompts) <= device.most_waiting:
    raise Refusal(f"Expected 1 to {device.most_waiting} prompts, got {len(prompts)}.", prompt)
  level = given.get("threshold", "never" if given.get("exact") else None)
  level = None if level is None else thresholds.parse_threshold(level)
  if given.get("exact") and level != NEVER_EXIT:
    raise Refusal("`exact` is full depth; leave `threshold` out.", "exact")
  jobs = []
  for text in prompts:
    ids = prompt_batches.beginning(model.vocabulary, options.task_prefix + text, longest)[0]
    if len(ids) >= longest:
      most = f"at most {longest} tokens, prefix and end included"
      raise Refusal(f"Expected prompts of {most}.", prompt, code="context_length_exceeded")
    jobs.append(Job(text, [*ids, model.eos_id], level, count, stop))
  return jobs


def about(parts: Sequence[Part]) -> dict[str, Any]:
  """What every answer says: threshold, layers a token, and what is promised."""
  layers = [layer for part in parts for layer in part.output.exit_layers]
  return {
    "threshold": thresholds.threshold_to_json(parts[0].threshold),
    "layers": round(sum(layers) / max(1, len(layers)), 4),
    "num_layers": parts[0].output.num_layers,
    "guarantee": parts[0].guarantee,
    "milliseconds": round(1e3 * max(part.seconds for part in parts), 3),
  }


class Completion:
  """`POST /v1/completions`."""

  FIELDS = OWN | {"model": TEXT, "prompt": TEXTS, "max_tokens": COUNT, "stream": SWITCH}
  FIELDS |= {"stream_options": OBJECT, "user": TEXT}

  def __init__(self, body: Any, device: Device, name: str):
    given = _fields(body, self.FIELDS, "prompt")
    if given.get("model", name) != name:
      raise Refusal(f"Expected `model` {name!r}.", "model", 404, "model_not_found")
    extra = _fields(given.get("stream_options", {}), {"include_usage": SWITCH})
    self.jobs = _jobs(device, _texts(given["prompt"]), given, "prompt", "max_tokens")
    self.stream, self._counts = given.get("stream", False), extra.get("include_usage", False)
    self._same = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": name}
    self._same |= {"created": int(time.time())}

  def _choice(self, index: int, part: Part, before: Part) -> dict[str, Any]:
    reason = part.reason and part.reason.removesuffix("_sequence")
    choice = {"index": index, "text": part.text[len(before.text) :], "logprobs": None}
    layers = part.output.exit_layers[before.count :]
    return choice | {"finish_reason": reason, "exit_layers": layers}

  def _usage(self, parts: Sequence[Part]) -> dict[str, int]:
    read, made = sum(len(job.tokens) for job in self.jobs), sum(part.count for part in parts)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

  def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
    choices = [self._choice(index, part, Part()) for index, part in enumerate(parts)]
    made = {"choices": choices, "usage": self._usage(parts)}
    return self._same | made | {"calm": about(parts)}

  def events(self, index: int, part: Part, before: Part) -> list[dict[str, Any]]:
    """Events of what a part adds to the one before."""
    event = self._same | {"choices": [self._choice(index, part, before)]}
    return [event | ({"calm": about([part])} if part.reason else {})]

  def end(self, parts: Sequence[Part]) -> list[str]:
    usage = self._same | {"choices": [], "usage": self._usage(parts)}
    return [*([json.dumps(usage)] if self._counts else []), "[DONE]"]


class Generation:
  """`POST /generate` and `/generate_stream`."""

  FIELDS = {"inputs": TEXT, "parameters": OBJECT, "stream": SWITCH}
  PARAMETERS = OWN | {"max_new_tokens": COUNT, "details": SWITCH}
  PARAMETERS |= {"decoder_input_details": SWITCH}

  def __init__(self, body: Any, device: Device, name: str):
    given = _fields(body, self.FIELDS, "inputs")
    parameters = _fields(given.get("parameters", {}), self.PARAMETERS)
    self.stream = given.get("stream", False)
    self.jobs = _jobs(device, [given["inputs"]], parameters, "inputs", "max_new_tokens")

  def _tokens(self, output: Any) -> list[dict[str, Any]]:
    columns = output.tokens, output.pieces, output.exit_layers
    names = "id", "text", "exit_layer"
    made = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return [t | {"logprob": None, "special": t["id"] == output.eos_id} for t in made]

  def _details(self, part: Part) -> dict[str, Any]:
    details = {"finish_reason": part.reason if part.reason != "stop" else "eos_token"}
    return details | {"generated_tokens": part.count, "seed": None, "calm": about([part])}

  def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
    (part,) = parts
    details = self._details(part) | {"prefill": [], "tokens": self._tokens(part.output)}
    return {"generated_text": part.text, "details": details}

  def events(self, index: int, part: Part, before: Part) -> list[dict[str, Any]]:
    """Events of what a part adds to the one before."""
    none = {"generated_text": None, "details": None}
    made = list(enumerate(self._tokens(part.output), 1))[before.count :]
    events = [{"index": number, "token": token, **none} for number, token in made]
    if part.reason:
      events[-1] |= {"generated_text": part.text, "details": self._details(part)}
    return events

  def end(self, parts: Sequence[Part]) -> list[str]:
    return []
