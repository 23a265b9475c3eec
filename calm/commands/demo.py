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
import textwrap

from rich import console as rich_console

from calm.calibrate import NEVER_EXIT, Calibration, metrics, thresholds
from calm.calibrate.generations import records
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text

METRIC = "rouge_l"
ROUNDS = 3
EXAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_shared(parser, "tolerance", "error_rate", "model", "limit")
  text = "keep the generations in this folder (resumable)"
  flags.add(parser, "output", "DIR", text)


def run(arguments: argparse.Namespace) -> int:
  run_lib.use_compilation_cache()
  from calm import inference
  from calm.inference import outputs

  calibration_prompts, unseen_prompts = (
    records.read_prompts(inference.PACKED / f"prompts_{split}.jsonl")[
      : arguments.limit
    ]
    for split in ("calibration", "unseen")
  )
  console = rich_console.Console()
  predictor = inference.load(arguments.model)
  console.print(
    f"[bold]1. Decode[/bold] {len(calibration_prompts)} calibration prompts "
    "at full depth and"
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
  console.print(
    f"\n[bold]3. Decode[/bold] {len(unseen_prompts)} unseen prompts, one at "
    "a time: full depth"
    " and calibrated early exit, in turn."
  )
  full, early = _compare(console, predictor, calibration, unseen_prompts)
  console.print(
    "\n[bold]4. Outputs[/bold] and the decoder layers of each token"
  )
  print(outputs.legend_terminal(early.num_layers))
  for prompt, whole, left in list(
    zip(unseen_prompts, full, early, strict=True)
  )[:EXAMPLES]:
    text = textwrap.shorten(prompt.input, 160, placeholder="...")
    print_text(console, f"\n{prompt.id}: {text}", "dim")
    print_text(console, f"  reference  {prompt.targets[0]}", soft_wrap=True)
    print_text(console, f"  full       {whole.text}", soft_wrap=True)
    print(f"  early      {left.coloured()}")
  said = (
    "its promise"
    if arguments.output
    else "this threshold (with --output: its promise)"
  )
  named = [] if arguments.model == "packed" else [f"--model={arguments.model}"]
  words = ("infer", *named, served, "a long text")
  run_lib.print_next(console, f"\nA text of yours, under {said}:", *words)
  return 0


def _compare(console, predictor, calibration: Calibration, prompts):
  """(full outputs, early outputs); prints risk beside the tolerance, layers and
  seconds.
  """
  from calm.inference import timing

  one = predictor.with_options(batch_size=1)
  texts = [prompt.input for prompt in prompts]
  threshold = calibration.threshold
  metric = metrics.get_metric(METRIC)
  with Progress(console) as progress:
    full, early = (
      one.generate(texts, threshold=each) for each in (NEVER_EXIT, threshold)
    )
    progress(0.0, "seconds of both in turn")
    options = {"prompts": len(texts), "rounds": ROUNDS, "progress": progress}
    seconds = timing.beside_full_depth(one, texts, threshold, **options)
  spent = (seconds.single.full, seconds.single.early)
  for name, made, each in zip(
    ("full depth", "early exit"), (full, early), spent, strict=True
  ):
    pairs = zip(made.texts, prompts, strict=True)
    quality = 100 * statistics.fmean(
      metric(text, p.targets) for text, p in pairs
    )
    text = (
      f"{made.mean_layers:.2f} decoder layers a token, decoder {each:.1f} ms "
      "a prompt"
    )
    print_text(console, f"{name}: {text}, ROUGE-L {quality:.1f}")
  pairs = zip(early.texts, full.texts, strict=True)
  risk = statistics.fmean(1.0 - metric(text, (other,)) for text, other in pairs)
  console.print(
    f"Decoder beside full depth, the fastest of {ROUNDS} rounds each: "
    f"[bold]{seconds}[/bold].\n"
    f"Measured risk on the unseen prompts: [bold]{risk:.4f}[/bold]"
    f" (tolerance {calibration.tolerance:g}); threshold"
    f" {thresholds.format_threshold(threshold)}."
  )
  return full, early
