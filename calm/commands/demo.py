"""The whole pipeline on the packed model: decode, calibrate, decode faster with a promise.

Decodes the packed calibration prompts at full depth and over the grid, calibrates the
threshold, then decodes prompts it has never seen and compares.

  calm demo
  calm demo --tolerance=0.25 --output=runs/demo
  calm demo --measure=classifier --exit_layers=all
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any

from rich import console as rich_console

from calm.calibrate import (
  Calibration,
  Procedure,
  Prompt,
  calibrate,
  generations,
  planning,
  thresholds,
)
from calm.calibrate.generations import records
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.losses import metrics, sequence_losses
from calm.commands import certificate, common, following, helping, model_flags
from calm.console import Progress, print_table, print_text

# Fixed before the first run; another tolerance is the user's choice, not ours.
TOLERANCE, ERROR_RATE = 0.1, 0.05
# Where another measure of the packed model crosses such tolerances.
GRIDS = {"classifier": tuple(percent / 100 for percent in range(99, 79, -1))}
METRIC = "rouge_l"
REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  helping.add_rates(parser)
  parser.add_argument(
    "--measure",
    metavar="NAME",
    help="softmax, shortlist, state, classifier (default: the model's own)",
  )
  parser.add_argument(
    "--exit_layers",
    metavar="LAYERS",
    help="layers after which a token may leave, like 2,4, or all (default: the model's own)",
  )
  parser.add_argument(
    "--model",
    default="packed",
    metavar="FOLDER",
    help="a checkpoint, or 'packed' (default %(default)s)",
  )
  number = {"type": int, "metavar": "N"}
  parser.add_argument("--limit", help="use only the first N prompts of each set", **number)
  parser.add_argument(
    "--examples", default=4, help="outputs to show at the end (default %(default)s)", **number
  )
  parser.add_argument(
    "--output", metavar="DIR", help="keep the generations in this folder (resumable)"
  )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Full depth and calibrated early exit on the same unseen prompts, one at a time.

  Attributes:
    full, early: outputs of the last repeat.
    full_times, early_times: (decode seconds, encode and decode seconds) of every repeat.
    risk: mean loss of the early outputs against the full ones.
    quality: mean metric against the references, full and early.
  """

  full: Any
  early: Any
  full_times: list[tuple[float, float]]
  early_times: list[tuple[float, float]]
  risk: float
  quality: tuple[float, float]


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Runs all steps and prints what they found."""
  common.use_compilation_cache()
  calibration_prompts = packed_prompts("calibration", arguments.limit)
  unseen_prompts = packed_prompts("unseen", arguments.limit)
  _refuse_rates(len(calibration_prompts), arguments.tolerance, arguments.error_rate)
  common.check_count("--examples", arguments.examples)
  console, predictor = rich_console.Console(), _open(arguments)
  allowed = predictor.options.exit_layers
  shown = "all" if allowed is None else ",".join(map(str, allowed))
  console.print(
    f"[bold]1. Decode[/bold] {len(calibration_prompts)} calibration prompts at full depth and"
    f" over the grid of the measure '{predictor.options.measure}', exits after layers {shown}."
  )
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(arguments.output or scratch)
    cached = generate_grid(console, predictor, calibration_prompts, folder)
  console.print("\n[bold]2. Calibrate[/bold] the threshold on them.")
  losses = sequence_losses.compute(cached, "textual", metric=METRIC)
  calibration = calibrate(
    losses, tolerance=arguments.tolerance, error_rate=arguments.error_rate
  )
  certificate.print_calibration(console, calibration, cached)
  if arguments.output:
    calibration.save(pathlib.Path(arguments.output) / "calibration.json")
    certificate.record(console, arguments.output, calibration, calibration_prompts)
  console.print(
    f"\n[bold]3. Decode[/bold] {len(unseen_prompts)} unseen prompts, one at a time: full depth"
    " and calibrated early exit, in turn."
  )
  result = compare(console, predictor, calibration, unseen_prompts)
  print_comparison(console, calibration, result)
  print_examples(console, unseen_prompts, result, arguments.examples)
  print_text(console, "\nA text of yours, under this threshold:")
  print(serving_command(arguments, calibration), flush=True)
  return 0


def serving_command(arguments: argparse.Namespace, calibration: Calibration) -> str:
  """A command that works as it stands, with the model and options of the demo."""
  kept = arguments.output  # with it the promise, which brings measure and layers
  given = [
    f"--{name}={value}"
    for name in ("model", *(() if kept else ("measure", "exit_layers")))
    if (value := getattr(arguments, name)) not in (None, "packed")
  ]
  if kept:
    return following.infer(*given, f"--calibration={pathlib.Path(kept) / 'calibration.json'}")
  threshold = f"--threshold={thresholds.format_threshold(calibration.threshold)}"
  return following.infer(*given, threshold)


def _refuse_rates(count: int, tolerance: float, error_rate: float) -> None:
  planning.min_calibration_size(tolerance, error_rate)  # refuses bad rates
  refusal = planning.refusal(count, tolerance, error_rate, method="auto")
  if refusal:
    raise ValueError(refusal)


def _open(arguments: argparse.Namespace):
  """The model under the measure and layers that were named."""
  from calm import inference

  options = {}
  if arguments.measure:
    options["measure"] = arguments.measure
  if (named := arguments.exit_layers) is not None:
    options["exit_layers"] = None if named == "all" else model_flags.parse_layers(named)
  with common.called("--model"):
    return inference.load(arguments.model, **options)


def packed_prompts(split: str, limit: int | None) -> tuple[Prompt, ...]:
  """The packed prompts of a split ('calibration' or 'unseen'; no source is in both)."""
  from calm import inference

  if limit is not None and limit < 1:
    raise ValueError(f"Expected `--limit` of at least 1, got {limit}; leave it out for all.")
  return records.read_prompts(inference.PACKED / f"prompts_{split}.jsonl")[:limit]


def generate_grid(
  console: rich_console.Console, predictor, prompts, folder: pathlib.Path
) -> generations.Generations:
  """Decodes the prompts at every threshold, with a progress bar."""
  from calm.inference import grid

  measure = predictor.options.measure
  own = predictor.options.grid or GRIDS.get(measure) or thresholds.default_grid(measure)
  levels = [float(t) for t in own]
  procedure: Procedure = predictor.procedure
  writer = writer_lib.open_writer(
    folder, prompts=prompts, thresholds=levels, procedure=procedure
  )
  with Progress(console) as progress:
    advance = grid.as_shares(progress, levels)
    summary = grid.generate(predictor, prompts, levels, writer, progress=advance)
  writer.finish()
  console.print(f"{len(levels)} thresholds and full depth: {summary}.")
  return generations.load(folder)


def compare(
  console: rich_console.Console, predictor, calibration: Calibration, prompts
) -> Comparison:
  """Times both models in turn; the first round compiles and is not counted."""
  from calm import exits

  one = predictor.with_options(batch_size=1)
  texts = [prompt.input for prompt in prompts]
  full = early = None
  full_times, early_times = [], []
  with console.status("decoding") as status:
    for repeat in range(REPEATS + 1):
      compiles = ", which compiles" if not repeat else ""
      status.update(f"decoding, round {repeat + 1} of {REPEATS + 1}{compiles}")
      full = one.generate(texts, rule=exits.StaticExit())
      early = one.generate(texts, threshold=calibration.threshold)
      if repeat:
        full_times.append((full.timing.decode_seconds, full.timing.seconds))
        early_times.append((early.timing.decode_seconds, early.timing.seconds))
  assert full is not None and early is not None
  metric = metrics.get_metric(METRIC)
  pairs = zip(early.texts, full.texts, strict=True)
  risk = statistics.fmean(1.0 - metric(a, (b,)) for a, b in pairs)
  quality = tuple(
    100 * statistics.fmean(metric(t, p.targets) for t, p in zip(o.texts, prompts, strict=True))
    for o in (full, early)
  )
  return Comparison(full, early, full_times, early_times, risk, (quality[0], quality[1]))


def print_comparison(
  console: rich_console.Console, calibration: Calibration, result: Comparison
) -> None:
  """Risk beside the tolerance, layers, seconds and their ratios."""
  heads = ("", "decoder layers / token", "decoder seconds", "end to end", "ROUGE-L")
  cells = []
  rows = (
    ("full depth", result.full, result.full_times, result.quality[0]),
    ("early exit", result.early, result.early_times, result.quality[1]),
  )
  for name, outputs, times, quality in rows:
    decode, both = (statistics.median(column) for column in zip(*times, strict=True))
    cells.append(
      (name, f"{outputs.mean_layers:.2f}", f"{decode:.3f}", f"{both:.3f}", f"{quality:.1f}")
    )
  decode, both = (
    statistics.median(
      f[i] / e[i] for f, e in zip(result.full_times, result.early_times, strict=True)
    )
    for i in (0, 1)
  )
  cells.append(("speed-up", "", f"x{decode:.2f}", f"x{both:.2f}", ""))
  print_table(console, heads, cells)
  console.print(
    f"Seconds: median of {REPEATS} rounds in turn, compilation excluded.\n"
    f"Measured risk on the unseen prompts: [bold]{result.risk:.4f}[/bold]"
    f" (tolerance {calibration.tolerance:g}); threshold"
    f" {thresholds.format_threshold(calibration.threshold)}."
  )


def print_examples(console, prompts, result: Comparison, count: int) -> None:
  """A few outputs, every token coloured by its exit layer, beside the full model's."""
  from calm.inference import outputs

  layers, mode = result.early.num_layers, outputs.terminal_mode()
  how = "" if mode == "plain" else ", tokens coloured by them"
  console.print(f"\n[bold]4. Outputs[/bold] and the decoder layers of each token{how}")
  if mode != "plain":
    print(outputs.legend_terminal(layers, mode=mode))
  for prompt, full, early in list(zip(prompts, result.full, result.early, strict=True))[:count]:
    text = prompt.input if len(prompt.input) <= 160 else prompt.input[:157] + "..."
    print_text(console, f"\n{prompt.id}", "dim")
    for name, value in (
      ("prompt", text),
      ("reference", prompt.targets[0]),
      ("full", full.text),
    ):
      print_text(console, f"  {name:<10} {value}", soft_wrap=True)
    if mode == "plain":
      print_text(console, f"  {'early':<10} {early.text}", soft_wrap=True)
      told = " ".join(map(str, early.exit_layers))
    else:
      print(f"  {'early':<10} {early.coloured(mode)}")
      told = f"{early.mean_layers:.2f} a token"
    print_text(console, f"  {'layers':<10} {told}", "dim")
