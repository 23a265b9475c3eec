"""Options that `calm generate` and `calm infer` share: the model and how it decodes."""

import argparse
import pathlib
import sys
from typing import Any

from calm.calibrate import Prompt
from calm.commands import common

DECODE_OPTIONS = (
  "measure",
  "task_prefix",
  "max_input_length",
  "max_decode_length",
  "batch_size",
  "num_devices",
  "propagation",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options; None means: what gin, the calibration or the checkpoint say."""
  parser.add_argument(
    "--model",
    default="packed",
    metavar="FOLDER",
    help="checkpoint folder (ours, Hugging Face's or T5X's), or 'packed' (default)",
  )
  parser.add_argument(
    "--prompts",
    required=True,
    metavar="FILE",
    help="JSON Lines of {id, input, target} (.gz too), or plain text (.txt), one prompt a"
    " line; '-' reads plain text from standard input",
  )
  parser.add_argument("--limit", type=int, metavar="N", help="read only the first N prompts")
  parser.add_argument(
    "--measure",
    metavar="NAME",
    help="softmax (default), state, shortlist, or classifier, which is trained",
  )
  parser.add_argument(
    "--temperature",
    type=float,
    metavar="TAU",
    help="decaying threshold (Eq. 5) with this tau, over max_decode_length; default: constant",
  )
  parser.add_argument(
    "--exit_layers",
    metavar="LAYERS",
    help="layers after which a token may leave, like 2,4,6; default: all",
  )
  parser.add_argument(
    "--propagation",
    metavar="NAME",
    help="what skipped layers store: exit_state (default), first_state, copy_projections",
  )
  parser.add_argument(
    "--engine",
    metavar="NAME",
    help="how steps run; texts are the same: compacted (default from 8 rows on), deferred"
    " (default below; compiles two to three times as fast), eager",
  )
  # Whole numbers and texts that a checkpoint or a calibration brings along.
  for name, type_, metavar, text in (
    ("task_prefix", str, "TEXT", "put before every prompt"),
    ("max_input_length", int, "N", "tokens read of a prompt"),
    ("max_decode_length", int, "N", "most tokens generated"),
    ("batch_size", int, "N", "prompts that a device decodes together (default 8)"),
    ("num_devices", int, "N", "devices that the prompts are spread over (default 1)"),
    ("dtype", str, "NAME", "activation dtype: float32 or bfloat16"),
  ):
    parser.add_argument(f"--{name}", type=type_, metavar=metavar, help=text)


def decode_options(arguments: argparse.Namespace) -> dict[str, Any]:
  """The options that were given, as keyword arguments of `inference.load`."""
  from calm.decode import engines
  from calm.exits import schedules

  given = {name: getattr(arguments, name) for name in DECODE_OPTIONS}
  options = {name: value for name, value in given.items() if value is not None}
  if arguments.exit_layers:
    options["exit_layers"] = parse_layers(arguments.exit_layers)
  if arguments.engine is not None:
    options["engine"] = engines.by_name(arguments.engine)
  if arguments.temperature is not None:
    length = arguments.max_decode_length
    if length is None:
      raise ValueError(
        "Expected `--max_decode_length` with `--temperature`: Eq. 5 decays over it. Got none."
      )
    options["schedule"] = schedules.Decaying(arguments.temperature, length)
  return options


def read_prompts(path: str, limit: int | None) -> list[Prompt]:
  """Prompts from JSON Lines or plain text; see `--prompts`."""
  from calm.data import datasets

  if limit is not None and limit < 1:
    raise ValueError(f"Expected `--limit` of at least 1. Got {limit}; leave it out for all.")
  if path == "-":
    return _numbered(sys.stdin.buffer.read(), "stdin", limit)
  file = pathlib.Path(path)
  with common.called("--prompts"):
    if file.suffix == ".txt" and file.is_file():
      return _numbered(file.read_bytes(), file.name, limit)
    examples = datasets.read_examples(file, limit=limit, require_target=False)
  return [Prompt(e.id, e.input, e.targets, e.source) for e in examples]


def _numbered(content: bytes, name: str, limit: int | None) -> list[Prompt]:
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    number = content.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"Expected `--prompts` of UTF-8 text. Got the byte 0x{content[error.start]:02x} in line"
      f" {number} of {name}; save the text as UTF-8."
    ) from error
  # Not `splitlines`, which ends a prompt at characters that are no ends of lines.
  lines = [line.strip("\r") for line in text.split("\n") if line.strip()][:limit]
  if not lines:
    raise ValueError(
      f"Expected `--prompts` with one prompt a line. Got no line with text in {name}."
    )
  return [Prompt(f"{name}/{i}", line) for i, line in enumerate(lines, start=1)]


def parse_layers(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(layer) for layer in text.split(","))
  except ValueError as error:
    raise ValueError(
      f"Expected `--exit_layers` to be layers like 2,4,6. Got {text!r}; the first layer is 1."
    ) from error
