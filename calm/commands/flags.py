"""Options of the command line that several commands share, and what their
values mean.
"""

import argparse
import functools
from typing import Any

# The group of options that `--help` leaves out and `--help_all` lists.
MORE = "more options"


def _whole(text: str, least: int) -> int:
  if not text.isascii() or not text.isdigit() or int(text) < least:
    raise argparse.ArgumentTypeError(
      f"expected a whole number from {least} on, got {text!r}"
    )
  return int(text)


def filled(text: str) -> str:
  """A text with letters: an empty path would be the folder in which the command
  is run.
  """
  if not text:
    message = (
      "is empty; leave it out, or check the shell variable that it comes from"
    )
    raise argparse.ArgumentTypeError(message)
  return text


def _numbers(text: str, kind: type = float) -> tuple[Any, ...]:
  try:
    return tuple(map(kind, text.split(",")))
  except ValueError:
    message = f"expected numbers like 2,4,6, got {text!r}"
    raise argparse.ArgumentTypeError(message) from None


# Types of values by their metavar; all others are `filled` texts.
_TYPES = dict.fromkeys(
  ("RATE", "LEVEL", "SHARE", "STEP", "TAU", "X"), float
) | {
  "N": functools.partial(_whole, least=1),
  "K": functools.partial(_whole, least=0),
  "LAYERS": functools.partial(_numbers, kind=int),
  "X,X": _numbers,
  **dict.fromkeys(("TEXT", "DIRS", "'A.b = 1'"), str),  # may be empty
}
METRICS = (
  "rouge_l, token_f1, exact_match, chrf, file.py:function, or module:function"
)
_KEYS = "the first of input, inputs, prompt, text, question"
_TARGETS = "the first of target(s), reference(s), output, answer"
_INPUT = "JSON Lines, JSON, text, CSV, TSV or Parquet; '-': standard input"
# Options of several commands: (metavar, help), and the rest of the arguments of
# `add`.
_SHARED = {
  "model": ("FOLDER", "checkpoint folder, or 'packed'", {"default": "packed"}),
  "prompts": ("FILE", _INPUT, {"required": True}),
  "input_key": ("KEY", "key or column of the text", {"without": _KEYS}),
  "target_key": (
    "KEY",
    "key or column of the references",
    {"without": _TARGETS},
  ),
  "limit": ("N", "read only the first N prompts", {}),
  "tolerance": ("RATE", "mean loss that is allowed (delta)", {"default": 0.1}),
  "error_rate": (
    "RATE",
    "probability that the guarantee fails (epsilon)",
    {"default": 0.05},
  ),
  "metric": ("NAME", METRICS, {"default": "rouge_l"}),
  "ungrouped": (
    None,
    "take prompts of one group or equal input as independent",
    {},
  ),
  "num_shards": ("N", "decode one of N parts into OUTPUT/shard-...", {}),
  "shard_id": ("K", "which part, from 0 on", {}),
}
# Options of `inference.load`: (name, metavar, help, value where neither the
# option, nor the model, nor its calibration names one).
_DECODING = (
  (
    "measure",
    "NAME",
    "confidence: softmax, shortlist, state, classifier, probe, verified",
    0,
  ),
  (
    "exit_layers",
    "LAYERS",
    "layers after which a token may leave, like 2,4,6",
    "all",
  ),
  ("max_decode_length", "N", "most tokens of an output", 64),
  ("batch_size", "N", "prompts that a device decodes together", 8),
  ("max_input_length", "N", "most tokens of a prompt; the rest is cut", 512),
  ("task_prefix", "TEXT", "put this before every prompt", "none"),
  (
    "temperature",
    "TAU",
    "decaying threshold (Eq. 5) over max_decode_length",
    "constant",
  ),
  (
    "propagation",
    "NAME",
    "exit_state, first_state, learned or copy_projections",
    0,
  ),
  ("num_devices", "N", "devices that share the prompts", 1),
  ("dtype", "NAME", "activations: float32 or bfloat16", 0),
  ("weights_dtype", "NAME", "matrices: float32, bfloat16 or int8", 0),
  ("encoder_dtype", "NAME", "int8: multiply the encoder's layers in 8 bits", 0),
  ("reference_dtype", "NAME", "float32: the full model of the guarantee", 0),
  ("head_dtype", "NAME", "int8: read the output head in 8 bits first", 0),
  ("matmul_precision", "NAME", "products: default, high or highest", 0),
)
_VISIBLE = 4  # of these, in `--help`
_FORMATS = ("jsonl", "json", "text", "csv", "tsv", "parquet", "arrow")
# Options of --online, and what holds without them.
ONLINE = {
  "tolerance": 0.1,
  "error_rate": 0.05,
  "metric": "rouge_l",
  "online_share": 1.0,
}


def more(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
  """The group of options that only `--help_all` lists."""
  groups = [group for group in parser._action_groups if group.title == MORE]
  return groups[0] if groups else parser.add_argument_group(MORE)


def add(
  parser: argparse._ActionsContainer,
  name: str,
  metavar: str | None,
  help: str,
  default: Any = None,
  *,
  without: object = "",
  **options: Any,
) -> None:
  """Declares `--name`; its metavar decides its type, None makes it a switch.

  The help ends with the default, or with what holds `without` the option.
  """
  if options.get("required"):
    help += " (required)"
  if without or default not in (None, "", []):
    help += f" (default: {without or '%(default)s'})"
  if metavar is None:
    parser.add_argument(f"--{name}", action="store_true", help=help, **options)
    return
  options = {"type": _TYPES.get(metavar, filled), "metavar": metavar, **options}
  parser.add_argument(f"--{name}", default=default, help=help, **options)


def add_shared(
  parser: argparse._ActionsContainer, *names: str, **more: Any
) -> None:
  """Declares options that several commands have."""
  for name in names:
    metavar, help, options = _SHARED[name]
    add(parser, name, metavar, help, **{**options, **more})


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Declares the model, the prompts, and how they are decoded."""
  add_shared(parser, "model")
  add_shared(parser, "prompts", required=required)
  add_shared(parser, "input_key", "limit")
  add_decoding(parser)
  options = {"choices": _FORMATS, "without": "by the name, or the content"}
  add_shared(more(parser), "target_key")
  add(more(parser), "prompts_format", "NAME", ", ".join(_FORMATS), **options)


def add_decoding(parser: argparse.ArgumentParser) -> None:
  """Declares how prompts are decoded."""
  for number, (name, metavar, text, fallback) in enumerate(_DECODING):
    without = f"the model's own{f', or {fallback}' if fallback else ''}"
    add(
      parser if number < _VISIBLE else more(parser),
      name,
      metavar,
      text,
      without=without,
    )


def add_promise(parser: argparse.ArgumentParser) -> None:
  """Declares under which promise prompts are served."""
  given = more(parser)
  own = "the model's own, if any"
  add(parser, "calibration", "FILE", "file of `calm calibrate`", without=own)
  add(
    parser,
    "threshold",
    "T",
    "a number in [0, 1], or 'never'; without a guarantee",
  )
  add(
    parser, "online", "FILE", "calibrate while serving; keeps its state in FILE"
  )
  for name in ("tolerance", "error_rate", "metric"):
    add_shared(
      given, name, default=None, without=f"{ONLINE[name]}, of --online"
    )
  text = "share of the prompts that --online checks at first"
  add(given, "online_share", "SHARE", text, without=ONLINE["online_share"])
  add(given, "expect_digest", "HEX", "refuse a calibration of another digest")
  add(
    given,
    "void_guarantee",
    None,
    "decode though the calibration is for another procedure",
  )
  add(
    given,
    "allow_platform",
    None,
    "serve a calibration of another platform, no guarantee",
  )


def decode_options(arguments: argparse.Namespace) -> dict[str, Any]:
  """The options that were given, as keyword arguments of `inference.load`."""
  from calm.exits import schedules

  options: dict[str, Any] = {
    name: getattr(arguments, name) for name, *_ in _DECODING
  }
  options = {
    name: value for name, value in options.items() if value is not None
  }
  if "temperature" in options:
    if (length := arguments.max_decode_length) is None:
      raise ValueError(
        "`--temperature` needs `--max_decode_length`, over which it decays."
      )
    options["schedule"] = schedules.Decaying(options.pop("temperature"), length)
  return options


def open_prompts(arguments: argparse.Namespace):
  """The `prompt_files.Prompts` of the options, or of the command line
  itself.
  """
  # needs packages that `calm calibrate` does without
  from calm.data import prompt_files

  texts = getattr(arguments, "texts", None)
  if bool(texts) == bool(arguments.prompts):
    raise ValueError(
      f"Expected texts or `--prompts`, got {'both' if texts else 'none'}."
    )
  if texts:
    prompts = prompt_files.Prompts(prompt_files.prompts_of(texts))
    prompts.taken = "1 text" if len(texts) == 1 else f"{len(texts)} texts"
    return prompts
  return prompt_files.open_prompts(
    arguments.prompts,
    limit=arguments.limit,
    input_key=arguments.input_key,
    target_key=arguments.target_key,
    format=arguments.prompts_format,
  )
