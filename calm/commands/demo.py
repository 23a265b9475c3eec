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
from typing import Any

from rich import console as rich_console

from calm.calibrate import Calibration, ledger, metrics, thresholds
from calm.calibrate.generations import records
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_table, print_text

METRIC = "rouge_l"
REPEATS, EXAMPLES = 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_shared(parser, "tolerance", "error_rate", "model", "limit")
  text = "keep the generations in this folder (resumable)"
  flags.add(parser, "output", "DIR", text)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  run_lib.use_compilation_cache()
  from calm import inference

  calibration_prompts, unseen_prompts = (
    records.read_prompts(inference.PACKED / f"prompts_{split}.jsonl")[: arguments.limit]
    for split in ("calibration", "unseen")
  )
  console = rich_console.Console()
  with run_lib.naming_flag("--model"):
    predictor = inference.load(arguments.model)
  console.print(
    f"[bold]1. Decode[/bold] {len(calibration_prompts)} calibration prompts at full depth and"
    f" over the grid of the measure '{predictor.options.measure}'."
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
  full, early = _compare(console, predictor, calibration, unseen_prompts)
  _print_examples(console, unseen_prompts, full, early)
  said = "its promise" if arguments.output else "this threshold (with --output: its promise)"
  named = [] if arguments.model == "packed" else [f"--model={arguments.model}"]
  words = ("infer", *named, served, "a long text")
  run_lib.print_next(console, f"\nA text of yours, under {said}:", *words)
  return 0


def _compare(console, predictor, calibration: Calibration, prompts):
  """(full outputs, early outputs); prints risk beside the tolerance, layers and seconds."""
  from calm import exits

  one, texts = predictor.with_options(batch_size=1), [prompt.input for prompt in prompts]
  full: Any = None
  early, seconds = full, []
  with Progress(console) as progress:
    for repeat in range(REPEATS + 1):  # the first one compiles
      progress(repeat / (REPEATS + 1), f"round {repeat + 1} of {REPEATS + 1}")
      full = one.generate(texts, rule=exits.StaticExit())
      early = one.generate(texts, threshold=calibration.threshold)
      seconds += [[(o.timing.decode_seconds, o.timing.seconds) for o in (full, early)]]
  metric, median, cells = metrics.get_metric(METRIC), statistics.median, []
  for way, (name, made) in enumerate((("full depth", full), ("early exit", early))):
    decoder, whole = (median(pair[way][i] for pair in seconds[1:]) for i in (0, 1))
    pairs = zip(made.texts, prompts, strict=True)
    quality = 100 * statistics.fmean(metric(text, p.targets) for text, p in pairs)
    numbers = (f"{made.mean_layers:.2f}", f"{decoder:.3f}", f"{whole:.3f}", f"{quality:.1f}")
    cells.append((name, *numbers))
  decoder, whole = (median(a[i] / b[i] for a, b in seconds[1:]) for i in (0, 1))
  cells.append(("speed-up", "", f"x{decoder:.2f}", f"x{whole:.2f}", ""))
  heads = ("", "decoder layers / token", "decoder seconds", "end to end", "ROUGE-L")
  print_table(console, heads, cells)
  pairs = zip(early.texts, full.texts, strict=True)
  risk = statistics.fmean(1.0 - metric(text, (other,)) for text, other in pairs)
  console.print(
    f"Seconds: median of {REPEATS} rounds in turn, compilation excluded.\n"
    f"Measured risk on the unseen prompts: [bold]{risk:.4f}[/bold]"
    f" (tolerance {calibration.tolerance:g}); threshold"
    f" {thresholds.format_threshold(calibration.threshold)}."
  )
  return full, early


def _print_examples(console, prompts, full, early) -> None:
  """A few outputs, every token marked by its exit layer, beside the full model's."""
  from calm.inference import outputs

  console.print("\n[bold]4. Outputs[/bold] and the decoder layers of each token")
  print(outputs.legend_terminal(early.num_layers))
  for prompt, whole, left in list(zip(prompts, full, early, strict=True))[:EXAMPLES]:
    text = prompt.input if len(prompt.input) <= 160 else prompt.input[:157] + "..."
    shown = {"prompt": text, "reference": prompt.targets[0], "full": whole.text}
    print_text(console, f"\n{prompt.id}", "dim")
    for name, value in shown.items():
      print_text(console, f"  {name:<10} {value}", soft_wrap=True)
    print(f"  {'early':<10} {left.coloured()}")
    print_text(console, f"  {'layers':<10} {left.mean_layers:.2f} a token", "dim")
