"""Decode prompts under a calibrated threshold, with the promise attached.

A calibration that was made for another model or other options is refused. A model folder that
`calm fit` made brings its own: it is served under its promise with no further options.

  calm infer --model=mine --prompts=prompts.txt
  calm infer --calibration=runs/cache/calibration.json --prompts=prompts.txt
  calm infer --threshold=0.8 --prompts=prompts.jsonl --output=out.jsonl
  echo "A long package description" | calm infer --threshold=never --prompts=- --colour
"""

import argparse
import json
import pathlib
import sys

from rich import console as rich_console

from calm.calibrate import Prompt, thresholds
from calm.calibrate.generations import files
from calm.commands import common, model_flags
from calm.inference import colours


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  model_flags.add_arguments(parser)
  parser.add_argument(
    "--calibration", metavar="FILE", help="calibration.json of `calm calibrate`"
  )
  parser.add_argument(
    "--threshold", metavar="T", help="a number in [0, 1] or 'never', without a promise"
  )
  parser.add_argument(
    "--void_guarantee",
    action="store_true",
    help="decode although the calibration is for another procedure; no promise holds",
  )
  parser.add_argument(
    "--refill",
    action="store_true",
    help="put the next prompt into a row whose text has ended: fewer steps for long lists"
    " (one device, float32)",
  )
  parser.add_argument(
    "--output", metavar="FILE", help="JSON Lines to write; default: texts to the screen"
  )
  parser.add_argument(
    "--colour", action="store_true", help="colour every token by its exit layer"
  )
  common.add_gin_arguments(parser)


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Decodes the prompts."""
  own = pathlib.Path(arguments.model) / "calibration.json"
  if arguments.calibration is None and arguments.threshold is None and not own.is_file():
    raise ValueError(
      "Expected `--calibration` or `--threshold`. Got neither, and no calibration.json in the"
      " folder of `--model`; make one with `calm fit`, or with `calm generate` and `calm"
      " calibrate`, or decode without a promise: --threshold=0.9."
    )
  threshold = arguments.threshold
  if threshold is not None:
    threshold = thresholds.parse_threshold(threshold)
  if arguments.output:
    common.check_output(arguments.output)
  prompts = model_flags.read_prompts(arguments.prompts, arguments.limit)
  common.use_compilation_cache()
  from calm import inference

  console = rich_console.Console(stderr=True, highlight=False)
  load = common.configured(arguments, inference.load)
  options = model_flags.decode_options(arguments)
  if arguments.refill:
    options["refill"] = True
  with common.called("--model"):
    predictor = load(
      arguments.model,
      calibration=arguments.calibration,
      void_guarantee=arguments.void_guarantee,
      dtype=arguments.dtype,
      **options,
    )
  with console.status(f"decoding {len(prompts)} prompts"):
    outputs = predictor.generate([prompt.input for prompt in prompts], threshold=threshold)
  if arguments.output:
    lines = [_line(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    files.write_atomically(pathlib.Path(arguments.output), "".join(lines))
  else:
    for output in outputs:
      print(output.coloured() if arguments.colour else output.text)
    if arguments.colour:
      print(colours.legend_terminal(outputs.num_layers), file=sys.stderr)
  timing = outputs.timing
  assert outputs.threshold is not None
  shown = thresholds.format_threshold(outputs.threshold)
  console.print(
    f"{_count(len(outputs), 'prompt')}, threshold {shown},"
    f" {outputs.mean_layers:.2f} of {outputs.num_layers} decoder layers a token;"
    f" encoder {timing.encode_seconds:.2f} s, decoder {timing.decode_seconds:.2f} s"
    f" ({_count(timing.compilations, 'program')} compiled in that time)."
  )
  console.print(f"Costs by formula, decoder only: {predictor.costs(outputs)}.")
  console.print(outputs.guarantee or f"No guarantee: {_why_none(arguments)}.")
  return 0


def _count(number: int, thing: str) -> str:
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _why_none(arguments: argparse.Namespace) -> str:
  if arguments.calibration is None:
    return "nothing was calibrated for these options and this threshold"
  if arguments.void_guarantee:
    return "--void_guarantee was given"
  return "the calibration is for another threshold than --threshold"


def _line(prompt: Prompt, output) -> str:
  value = {
    "id": prompt.id,
    "prediction": output.text,
    "tokens": list(output.tokens),
    "exit_layers": list(output.exit_layers),
    "confidences": [float(str(c)) for c in output.confidences],
    "score": output.score,
  }
  return json.dumps(value, ensure_ascii=False) + "\n"
