"""The whole pipeline on the packed model: decode, calibrate, decode faster.

Decodes the packed calibration prompts at full depth and over the grid,
calibrates the threshold, then decodes prompts that were never seen and
compares.

  calm demo
  calm demo --tolerance=0.25 --output=runs/demo
"""

import argparse
import pathlib
import statistics

from rich import console as rich_console

from calm.calibrate import Calibration, ledger, metrics, thresholds
from calm.calibrate.generations import records
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_table, print_text

METRIC = "rouge_l"
REPEATS, EXAMPLES = 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  flags.add_shared(parser, "tolerance", "error_rate", "model", "limit")
  text = "keep the generations in this folder (resumable)"
  flags.add(parser, "output", "DIR", text)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Runs all steps and prints what they found."""
  run_lib.use_compilation_cache()
  from calm import inference

  calibration_prompts, unseen_prompts = (
    records.read_prompts(inference.PACKED / f"prompts_{split}.jsonl")[: arguments.limit]
    for split in ("calibration", "unseen")
  )
  console = rich_console.Console()
  with run_lib.naming_flag("--model"):
    predictor = inference.load(arguments.model)
  options = predictor.options
  allowed = "all" if options.exit_layers is None else ",".join(map(str, options.exit_layers))
  console.print(
    f"[bold]1. Decode[/bold] {len(calibration_prompts)} calibration prompts at full depth and"
    f" over the grid of the measure '{options.measure}', exits after layers {allowed}."
  )
  with Progress(console) as progress:
    calibration, cached = inference.grid.certify(
      predictor,
      calibration_prompts,
      tolerance=arguments.tolerance,
      error_rate=arguments.error_rate,
      folder=arguments.output,
      progress=progress,
    )
  console.print("\n[bold]2. Calibrate[/bold] the threshold on them.")
  run_lib.print_calibration(console, calibration, cached)
  served = f"--threshold={thresholds.format_threshold(calibration.threshold)}"
  if arguments.output:
    saved = pathlib.Path(arguments.output) / "calibration.json"
    served = f"--calibration={saved}"
    calibration.save(saved)
    if report := ledger.keep(arguments.output, calibration, calibration_prompts):
      print_text(console, report, "yellow")
  console.print(
    f"\n[bold]3. Decode[/bold] {len(unseen_prompts)} unseen prompts, one at a time: full depth"
    " and calibrated early exit, in turn."
  )
  full, early, seconds = _compare(console, predictor, calibration, unseen_prompts)
  _print_comparison(console, calibration, unseen_prompts, full, early, seconds)
  _print_examples(console, unseen_prompts, full, early)
  said = "its promise" if arguments.output else "this threshold (with --output: its promise)"
  print_text(console, f"\nA text of yours, under {said}:")
  named = [] if arguments.model == "packed" else [f"--model={arguments.model}"]
  print(run_lib.infer_command(*named, served), flush=True)
  return 0


def _compare(console, predictor, calibration: Calibration, prompts):
  """(full outputs, early outputs, [REPEATS] pairs of their (decoder, total) seconds)."""
  from calm import exits

  one = predictor.with_options(batch_size=1)
  texts = [prompt.input for prompt in prompts]
  full, early, seconds = None, None, []
  with Progress(console) as progress:
    for repeat in range(REPEATS + 1):
      compiles = ", which compiles" if not repeat else ""
      progress(repeat / (REPEATS + 1), f"round {repeat + 1} of {REPEATS + 1}{compiles}")
      full = one.generate(texts, rule=exits.StaticExit())
      early = one.generate(texts, threshold=calibration.threshold)
      pair = ((o.timing.decode_seconds, o.timing.seconds) for o in (full, early))
      seconds += [tuple(pair)] if repeat else []
  return full, early, seconds


def _print_comparison(console, calibration: Calibration, prompts, full, early, seconds) -> None:
  """Risk beside the tolerance, layers, seconds and their ratios."""
  metric, median = metrics.get_metric(METRIC), statistics.median
  heads = ("", "decoder layers / token", "decoder seconds", "end to end", "ROUGE-L")
  cells = []
  for way, (name, made) in enumerate((("full depth", full), ("early exit", early))):
    decoder, whole = (median(pair[way][i] for pair in seconds) for i in (0, 1))
    pairs = zip(made.texts, prompts, strict=True)
    quality = 100 * statistics.fmean(metric(text, p.targets) for text, p in pairs)
    numbers = (f"{made.mean_layers:.2f}", f"{decoder:.3f}", f"{whole:.3f}", f"{quality:.1f}")
    cells.append((name, *numbers))
  decoder, whole = (median(a[i] / b[i] for a, b in seconds) for i in (0, 1))
  cells.append(("speed-up", "", f"x{decoder:.2f}", f"x{whole:.2f}", ""))
  print_table(console, heads, cells)
  texts = zip(early.texts, full.texts, strict=True)
  risk = statistics.fmean(1.0 - metric(text, (other,)) for text, other in texts)
  console.print(
    f"Seconds: median of {REPEATS} rounds in turn, compilation excluded.\n"
    f"Measured risk on the unseen prompts: [bold]{risk:.4f}[/bold]"
    f" (tolerance {calibration.tolerance:g}); threshold"
    f" {thresholds.format_threshold(calibration.threshold)}."
  )


def _print_examples(console, prompts, full, early) -> None:
  """A few outputs, every token coloured by its exit layer, beside the full model's."""
  from calm.inference import outputs

  layers, mode = early.num_layers, outputs.terminal_mode()
  how = "" if mode == "plain" else ", tokens coloured by them"
  console.print(f"\n[bold]4. Outputs[/bold] and the decoder layers of each token{how}")
  if mode != "plain":
    print(outputs.legend_terminal(layers, mode=mode))
  for prompt, whole, left in list(zip(prompts, full, early, strict=True))[:EXAMPLES]:
    text = prompt.input if len(prompt.input) <= 160 else prompt.input[:157] + "..."
    print_text(console, f"\n{prompt.id}", "dim")
    shown = {"prompt": text, "reference": prompt.targets[0], "full": whole.text}
    depth = f"{left.mean_layers:.2f} a token"
    if mode == "plain":
      shown["early"], depth = left.text, " ".join(map(str, left.exit_layers))
    for name, value in shown.items():
      print_text(console, f"  {name:<10} {value}", soft_wrap=True)
    if mode != "plain":
      print(f"  {'early':<10} {left.coloured(mode)}")
    print_text(console, f"  {'layers':<10} {depth}", "dim")
