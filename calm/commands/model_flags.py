"""Options that `calm generate` and `calm infer` share: the model and how it decodes."""

import argparse
from typing import Any

from calm.commands import common
from calm.data import prompt_files, row_formats

DECODE_OPTIONS = (
  "measure",
  "task_prefix",
  "max_input_length",
  "max_decode_length",
  "batch_size",
  "num_devices",
  "propagation",
  "matmul_precision",
  "weights_dtype",
  "encoder_dtype",
  "reference_dtype",
  "head_dtype",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options; None means: what gin, the calibration or the checkpoint say."""
  parser.add_argument(
    "--model",
    default="packed",
    metavar="FOLDER",
    help="checkpoint folder (ours, Hugging Face's or T5X's), or 'packed' (default %(default)s)",
  )
  parser.add_argument(
    "--prompts",
    required=True,
    metavar="FILE",
    help="JSON Lines, a JSON array, plain text (a prompt a line), CSV, TSV or Parquet, any of"
    " them gzipped; '-' reads standard input. What was taken for what is said once",
  )
  parser.add_argument(
    "--input_key",
    metavar="KEY",
    help="key or column of the text (default: the first of input, inputs, prompt, text)",
  )
  parser.add_argument(
    "--prompts_format",
    choices=list(row_formats.FORMATS),
    metavar="NAME",
    help="jsonl, json, text, csv, tsv or parquet (default: told by the name, or the content)",
  )
  parser.add_argument("--limit", type=int, metavar="N", help="read only the first N prompts")
  _add_exits(parser)
  _add_sizes(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
  """Whole numbers and texts that a checkpoint or a calibration brings along."""
  for name, type_, metavar, text, default in (
    ("task_prefix", str, "TEXT", "put before every prompt", "the model's own, or none"),
    ("max_input_length", int, "N", "tokens read of a prompt", "the model's own, or 512"),
    ("max_decode_length", int, "N", "most tokens generated", "the model's own, or 64"),
    ("batch_size", int, "N", "prompts that a device decodes together", "8"),
    ("num_devices", int, "N", "devices that the prompts are spread over", "1"),
    ("dtype", str, "NAME", "activation dtype: float32 or bfloat16", "the model's own"),
    (
      *("weights_dtype", str, "NAME"),
      "of matrices: float32, bfloat16, or int8 (layers multiply in 8 bits: another full model)",
      "the model's own",
    ),
    (
      *("encoder_dtype", str, "NAME"),
      "int8: the encoder's layers multiply in 8 bits, whatever --weights_dtype is",
      "the model's own",
    ),
    (
      *("reference_dtype", str, "NAME"),
      "float32: the full model that texts are compared with, whatever they are decoded in",
      "the model's own",
    ),
    (
      *("head_dtype", str, "NAME"),
      "int8: output heads are read in 8 bits first; the same tokens, on a CPU sooner",
      "the model's own",
    ),
    (
      *("matmul_precision", str, "NAME"),
      "of float32 products: default, high or highest (a CPU knows one only)",
      "the model's own",
    ),
  ):
    told = f"{text} (default: {default})"
    parser.add_argument(f"--{name}", type=type_, metavar=metavar, help=told)


def _add_exits(parser: argparse.ArgumentParser) -> None:
  """When and how a token leaves."""
  parser.add_argument(
    "--measure",
    metavar="NAME",
    help="softmax, state, shortlist; classifier and probe, which are trained"
    " (default: the model's own, or softmax); or verified: exact decoding with slack,"
    " --exit_layers being the one layer that drafts",
  )
  parser.add_argument(
    "--temperature",
    type=float,
    metavar="TAU",
    help="decaying threshold (Eq. 5) with this tau, over max_decode_length (default: the"
    " model's own, or constant)",
  )
  parser.add_argument(
    "--exit_layers",
    metavar="LAYERS",
    help="layers after which a token may leave, like 2,4,6 (default: the model's own, or all)",
  )
  parser.add_argument(
    "--propagation",
    metavar="NAME",
    help="what skipped layers store: exit_state, first_state, learned, copy_projections"
    " (default: the model's own, or exit_state)",
  )
  parser.add_argument(
    "--engine",
    metavar="NAME",
    help="how steps run; texts are the same: compacted (default from 8 rows on), deferred"
    " (default below; compiles two to three times as fast), eager",
  )


def decode_options(arguments: argparse.Namespace) -> dict[str, Any]:
  """The options that were given, as keyword arguments of `inference.load`."""
  from calm.decode import engines
  from calm.exits import schedules

  given = {name: getattr(arguments, name) for name in DECODE_OPTIONS}
  options = {name: value for name, value in given.items() if value is not None}
  if arguments.exit_layers is not None:
    options["exit_layers"] = parse_layers(arguments.exit_layers)
  if arguments.engine is not None:
    options["engine"] = engines.by_name(arguments.engine)
  if arguments.temperature is not None:
    length = arguments.max_decode_length
    if length is None:
      raise ValueError(
        "Expected `--max_decode_length` with `--temperature`: Eq. 5 decays over it, got none."
      )
    options["schedule"] = schedules.Decaying(arguments.temperature, length)
  return options


def open_prompts(arguments: argparse.Namespace) -> prompt_files.PromptFile:
  """The prompts that the options name, checked and counted."""
  limit = arguments.limit
  if limit is not None and limit < 1:
    raise ValueError(f"Expected `--limit` of at least 1, got {limit}; leave it out for all.")
  with common.called("--prompts"):
    return prompt_files.open_prompts(
      arguments.prompts,
      limit=limit,
      input_key=arguments.input_key,
      format=arguments.prompts_format,
    )


def parse_layers(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(layer) for layer in text.split(","))
  except ValueError as error:
    raise ValueError(
      f"Expected `--exit_layers` to be layers like 2,4,6, got {text!r}; the first layer is 1."
    ) from error
