"""Requests and answers: OpenAI's completions, and the generations of TGI."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from calm.calibrate import NEVER_EXIT, thresholds
from calm.data import prompt_batches
from calm.serve.device import Device, Job, Part

MOST_STOPS = 16
MOST_STOP = 256  # characters of one


class Refusal(Exception):
  """An error that the client gets, in the shape of OpenAI's."""

  def __init__(
    self,
    message: str,
    param: str | None = None,
    status=400,
    code=None,
    **headers,
  ):
    self.status = status
    self.headers = {k.replace("_", "-"): v for k, v in headers.items()}
    kind = "invalid_request_error" if status < 500 else "server_error"
    self.body = {
      "error": {"message": message, "type": kind, "param": param, "code": code}
    }


def _texts(value: Any) -> list[Any]:
  return value if isinstance(value, list) else [value]


# Kinds of fields: what holds of a value, and that in words.
TEXTS = (
  lambda v: all(isinstance(t, str) for t in _texts(v)),
  "a text or a list of texts",
)
TEXT = (lambda value: isinstance(value, str), "a text")
COUNT = (lambda value: type(value) is int, "a whole number")
LEVEL = (
  lambda value: (
    value == "never" or (type(value) in (int, float) and 0.0 <= value <= 1.0)
  ),
  "a number in [0, 1] or 'never'",
)
SWITCH = (lambda value: isinstance(value, bool), "true or false")
OBJECT = (lambda value: isinstance(value, dict), "an object")
OWN = {"threshold": LEVEL, "exact": SWITCH, "stop": TEXTS, "seed": COUNT}
# What greedy decoding does anyway, if somebody says it; it draws nothing, so
# any seed will do.
GREEDY = {
  "temperature": 0,
  "top_p": 1,
  "n": 1,
  "best_of": 1,
  "echo": False,
  "logit_bias": {},
}
GREEDY |= {
  "presence_penalty": 0,
  "frequency_penalty": 0,
  "repetition_penalty": 1,
}
GREEDY |= {"do_sample": False, "return_full_text": False, "watermark": False}


def _fields(
  body: Any, kinds: Mapping[str, Any], needed: str = ""
) -> dict[str, Any]:
  """The fields that are given, checked; null is as good as none."""
  if not isinstance(body, dict):
    raise Refusal(f"Expected a JSON object, got {_shown(body)}.")
  given = {name: value for name, value in body.items() if value is not None}
  for name, value in given.items():
    if name in kinds and not kinds[name][0](value):
      raise Refusal(
        f"Expected `{name}` to be {kinds[name][1]}, got {_shown(value)}.", name
      )
    if name not in kinds and (name not in GREEDY or GREEDY[name] != value):
      only = f" but for {json.dumps(GREEDY[name])}" if name in GREEDY else ""
      got = (
        f"`{name:.60}` ({_shown(value)}) is not supported{only}; decoding is "
        "greedy"
      )
      raise Refusal(
        f"{got}: leave it out.", name[:60], code="unsupported_parameter"
      )
  if needed and needed not in given:
    raise Refusal(f"Expected `{needed}`, {kinds[needed][1]}, got none.", needed)
  return given


def _shown(value: Any) -> str:
  return json.dumps(value)[:60]


def _jobs(
  device: Device,
  prompts: Sequence[str],
  given: Mapping[str, Any],
  prompt: str,
  limit: str,
) -> list[Job]:
  """The prompts of a request; `prompt` and `limit` are the names of its
  fields.
  """
  options = device.model.options
  model = device.model
  longest = options.max_input_length
  most = options.max_decode_length
  count = given.get(limit, most)
  stop = _texts(given.get("stop", []))
  if not 1 <= count <= most:
    whole = f"a whole number of at least 1 and at most {most}"
    raise Refusal(
      f"Expected `{limit}` to be {whole}, got {_shown(count)}.", limit
    )
  fits = [1 <= len(text) <= MOST_STOP for text in stop]
  if len(stop) > MOST_STOPS or not all(fits):
    raise Refusal(
      f"Expected at most {MOST_STOPS} texts of 1 to {MOST_STOP} characters as"
      " `stop`.",
      "stop",
    )
  if not 1 <= len(prompts) <= device.most_waiting:
    raise Refusal(
      f"Expected 1 to {device.most_waiting} prompts, got {len(prompts)}.",
      prompt,
    )
  level = given.get("threshold", "never" if given.get("exact") else None)
  level = None if level is None else thresholds.parse_threshold(level)
  if given.get("exact") and level != NEVER_EXIT:
    raise Refusal("`exact` is full depth; leave `threshold` out.", "exact")
  jobs = []
  for text in prompts:
    ids = prompt_batches.beginning(
      model.vocabulary, options.task_prefix + text, longest
    )[0]
    if len(ids) >= longest:
      most = f"at most {longest} tokens, prefix and end included"
      raise Refusal(
        f"Expected prompts of {most}.", prompt, code="context_length_exceeded"
      )
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

  FIELDS = OWN | {
    "model": TEXT,
    "prompt": TEXTS,
    "max_tokens": COUNT,
    "stream": SWITCH,
  }
  FIELDS |= {"stream_options": OBJECT, "user": TEXT}

  def __init__(self, body: Any, device: Device, name: str):
    given = _fields(body, self.FIELDS, "prompt")
    if given.get("model", name) != name:
      raise Refusal(
        f"Expected `model` {name!r}.", "model", 404, "model_not_found"
      )
    extra = _fields(given.get("stream_options", {}), {"include_usage": SWITCH})
    self.jobs = _jobs(
      device, _texts(given["prompt"]), given, "prompt", "max_tokens"
    )
    self.stream = given.get("stream", False)
    self._counts = extra.get("include_usage", False)
    self._same = {
      "id": f"cmpl-{uuid.uuid4().hex}",
      "object": "text_completion",
      "model": name,
    }
    self._same |= {"created": int(time.time())}

  def _choice(self, index: int, part: Part, before: Part) -> dict[str, Any]:
    reason = part.reason and part.reason.removesuffix("_sequence")
    choice = {
      "index": index,
      "text": part.text[len(before.text) :],
      "logprobs": None,
    }
    layers = part.output.exit_layers[len(before.output.tokens) :]
    return choice | {"finish_reason": reason, "exit_layers": layers}

  def _usage(self, parts: Sequence[Part]) -> dict[str, int]:
    read = sum(len(job.tokens) for job in self.jobs)
    made = sum(len(part.output.tokens) for part in parts)
    return {
      "prompt_tokens": read,
      "completion_tokens": made,
      "total_tokens": read + made,
    }

  def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
    choices = [
      self._choice(index, part, Part()) for index, part in enumerate(parts)
    ]
    return self._same | {
      "choices": choices,
      "usage": self._usage(parts),
      "calm": about(parts),
    }

  async def events(
    self, parts: AsyncIterator[tuple[int, Part]]
  ) -> AsyncIterator[str]:
    """The data of each event: what a part adds to the one before of its
    prompt.
    """
    found = [Part() for _ in self.jobs]
    async for index, part in parts:
      event = self._same | {
        "choices": [self._choice(index, part, found[index])]
      }
      yield json.dumps(event | ({"calm": about([part])} if part.reason else {}))
      found[index] = part
    if self._counts:
      yield json.dumps(
        self._same | {"choices": [], "usage": self._usage(found)}
      )
    yield "[DONE]"


class Generation:
  """`POST /generate` and `/generate_stream`."""

  FIELDS = {"inputs": TEXT, "parameters": OBJECT, "stream": SWITCH}
  PARAMETERS = OWN | {"max_new_tokens": COUNT, "details": SWITCH}
  PARAMETERS |= {"decoder_input_details": SWITCH}

  def __init__(self, body: Any, device: Device, name: str):
    given = _fields(body, self.FIELDS, "inputs")
    parameters = _fields(given.get("parameters", {}), self.PARAMETERS)
    self.stream = given.get("stream", False)
    self.jobs = _jobs(
      device, [given["inputs"]], parameters, "inputs", "max_new_tokens"
    )

  def _tokens(self, output: Any) -> list[dict[str, Any]]:
    names = ("id", "text", "exit_layer", "special", "logprob")
    end = output.eos_id
    rows = zip(output.tokens, output.pieces, output.exit_layers, strict=True)
    return [
      dict(zip(names, (*row, row[0] == end, None), strict=True)) for row in rows
    ]

  def _details(self, part: Part) -> dict[str, Any]:
    details = {
      "finish_reason": part.reason if part.reason != "stop" else "eos_token"
    }
    count = len(part.output.tokens)
    return details | {
      "generated_tokens": count,
      "seed": None,
      "calm": about([part]),
    }

  def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
    (part,) = parts
    details = self._details(part) | {
      "prefill": [],
      "tokens": self._tokens(part.output),
    }
    return {"generated_text": part.text, "details": details}

  async def events(
    self, parts: AsyncIterator[tuple[int, Part]]
  ) -> AsyncIterator[str]:
    """The data of each event: a token, and with the last one the whole text."""
    seen = 0
    async for _, part in parts:
      for token in self._tokens(part.output)[seen:]:
        seen += 1
        end = part if part.reason and seen == len(part.output.tokens) else None
        told = {
          "generated_text": end and end.text,
          "details": end and self._details(end),
        }
        yield json.dumps({"index": seen, "token": token, **told})
