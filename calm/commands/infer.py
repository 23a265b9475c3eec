"""Decode prompts under a calibrated threshold, with the promise attached.

A calibration that was made for another model or other options is refused. A model folder that
`calm fit` made brings its own: it is served under its promise with no further options.

  calm infer --model=mine --prompts=prompts.txt
  calm infer --calibration=runs/cache/calibration.json --prompts=prompts.txt
  calm infer --threshold=0.8 --prompts=prompts.jsonl --output=out.jsonl
  calm infer --threshold=0.8 --prompts=rows.csv --input_key=review --output=- | head -3
  echo "A long package description" | calm infer --threshold=never --prompts=- --color

--output takes JSON Lines of {id, prediction, tokens, exit_layers, confidences, score}, in the
order of the prompts, as they are made. A file takes its place when it is whole; until then it
is FILE.partial, and after a kill or Ctrl-C the same command goes on from there.
"""

import argparse
import os
import pathlib
import time
import warnings
from collections.abc import Iterable
from typing import Any

from rich import console as rich_console

from calm.calibrate import NEVER_EXIT, Calibration, Prompt, thresholds
from calm.calibrate.generations import merging, procedures
from calm.commands import common, model_flags, monitoring, results, serving, sharding
from calm.console import print_text
from calm.inference import exact_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  model_flags.add_arguments(parser)
  parser.add_argument(
    "--calibration",
    metavar="FILE",
    help="calibration.json of `calm calibrate` (default: the model's own, if it has one)",
  )
  parser.add_argument(
    "--expect_digest",
    metavar="HEX",
    help="refuse the calibration unless this is its digest, as `calm calibrate` printed it",
  )
  parser.add_argument(
    "--threshold",
    metavar="T",
    help="a number in [0, 1], or 'never' for the full-depth program; without a promise",
  )
  _add_exact(parser)
  parser.add_argument(
    "--void_guarantee",
    action="store_true",
    help="decode although the calibration is for another procedure; no promise holds",
  )
  parser.add_argument(
    "--refill",
    action="store_true",
    help="put the next prompt into a row whose text has ended: fewer steps for long lists"
    " (one device, float32, not --weights_dtype=int8)",
  )
  parser.add_argument(
    "--output",
    metavar="FILE",
    help="JSON Lines to write: a file (resumed if it was stopped), a pipe or device, or '-' for"
    " standard output; default: texts to the screen",
  )
  parser.add_argument(
    *("--colour", "--color"), action="store_true", help="color every token by its exit layer"
  )
  monitoring.add_arguments(parser)
  sharding.add_arguments(parser)
  common.add_gin_arguments(parser)


def _add_exact(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--exact",
    action="store_true",
    help="the full model's own texts, faster: its first layers draft tokens, one pass of the"
    " others verifies them; needs no calibration",
  )
  parser.add_argument(
    "--draft_layer",
    type=int,
    metavar="K",
    help="with --exact, the layer that drafts (default: a quarter of them)",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Decodes the prompts."""
  start = time.monotonic()
  own = _check(arguments)
  threshold = thresholds.NEVER_EXIT_TEXT if arguments.exact else arguments.threshold
  if threshold is not None:
    threshold = thresholds.parse_threshold(threshold)
  console = rich_console.Console(stderr=True, highlight=False)
  prompts, part = _prompts(arguments)
  print_text(console, f"{prompts.taken}.")
  predictor = _load(arguments, threshold)
  predictor.weights  # noqa: B018 (laid out now, or it would count as decoding)
  threshold = predictor.threshold if threshold is None else threshold
  if threshold is None:
    raise ValueError(
      f"Expected `--threshold` beside options that the calibration of {own.parent} is not for,"
      " got none; give one, or leave the options out."
    )
  calibration = predictor.calibration
  if old := procedures.unknown_platform(calibration and calibration.procedure):
    console.print(f"About the calibration: {old}", markup=False)
  exact = exact_rule(predictor, arguments.draft_layer) if arguments.exact else None
  startup = time.monotonic() - start
  work = serving.Served(predictor, threshold, exact, console, len(prompts), startup)
  if part is None:
    return _serve(arguments, work, prompts)
  about = {"threshold": work.about["threshold"], "procedure": predictor.procedure.to_json()}
  if part.begin("infer", about, console):
    return 0
  if len(part):  # few prompts leave shards empty
    arguments.output = str(part.folder / merging.OUTPUTS)
    status = _serve(arguments, work, prompts)
  part.finish("infer", about, [merging.OUTPUTS] if len(part) else [])
  return status if len(part) else 0


def _prompts(arguments: argparse.Namespace) -> tuple[Any, sharding.Part | None]:
  """The prompts to decode, and the shard that they are of, if any."""
  which = sharding.shard(arguments)
  if arguments.output and which is None:
    common.check_output(arguments.output, read=(arguments.prompts, arguments.calibration))
    if os.path.realpath(arguments.output) == os.path.realpath(arguments.monitor or ""):
      raise ValueError(
        f"Expected `--output` to be another file than `--monitor`, got {arguments.output!r} for"
        " both, and the one would replace the other; choose another name."
      )
  prompts = model_flags.open_prompts(arguments)
  if which is None:
    return prompts, None
  if not arguments.output:
    raise ValueError("Expected `--output` beside `--num_shards`, got none; name a folder.")
  part = sharding.Part(prompts, which, arguments.output)
  return part, part


def _serve(
  arguments: argparse.Namespace, work: serving.Served, prompts: Iterable[Prompt]
) -> int:
  """Decodes, reports, and says by the exit status whether the monitor gave its alarm."""
  work.monitored = monitoring.open_monitored(arguments, work.predictor, work.threshold)
  if arguments.output:
    with results.open_results(arguments.output, work.about) as opened:
      work.to_results(prompts, opened)
  else:
    work.to_screen(prompts, arguments.colour)
  work.report(arguments)
  alarm = work.monitored is not None and work.monitored.alarm
  return monitoring.ALARM_STATUS if alarm and arguments.fail_on_alarm else 0


def _check(arguments: argparse.Namespace) -> pathlib.Path:
  """Where the model's own calibration would be; ValueError if nothing says how to decode."""
  own = pathlib.Path(arguments.model) / "calibration.json"
  serves_itself = own.is_file() or own.with_name("full_depth.json").is_file()
  says = arguments.calibration is not None or arguments.threshold is not None
  if not (says or serves_itself or arguments.exact):
    raise ValueError(
      "Expected `--calibration`, `--threshold` or `--exact`, got none of them, and no"
      " calibration.json in the folder of `--model`; make one with `calm fit`, or with `calm"
      " generate` and `calm calibrate`, or decode without a promise: --threshold=0.9."
    )
  if arguments.exact and says:
    raise ValueError(
      "Expected neither `--calibration` nor `--threshold` with `--exact`, whose texts are the"
      " full model's, got one; leave it out."
    )
  if arguments.draft_layer is not None and not arguments.exact:
    raise ValueError(
      f"Expected `--exact` beside `--draft_layer`, got {arguments.draft_layer} alone; add it."
    )
  return own


def _load(arguments: argparse.Namespace, threshold: float | None):
  common.use_compilation_cache()
  from calm import inference

  load = common.configured(arguments, inference.load)
  options = model_flags.decode_options(arguments)
  if arguments.refill:
    options["refill"] = True
  with common.called("--model"), warnings.catch_warnings():
    if threshold == NEVER_EXIT:
      warnings.simplefilter("ignore", inference.UntrainedExits)
    return load(
      arguments.model,
      calibration=_calibration(arguments),
      void_guarantee=arguments.void_guarantee,
      allow_platform=arguments.allow_platform,
      dtype=arguments.dtype,
      **options,
    )


def _calibration(arguments: argparse.Namespace):
  """What `load` is to take: the file, or what it holds where a digest is expected."""
  if arguments.expect_digest is None:
    return arguments.calibration
  if arguments.calibration is None:
    raise ValueError("Expected `--calibration` beside `--expect_digest`, got none.")
  return Calibration.load(arguments.calibration, expect_digest=arguments.expect_digest)
