"""Choose the lowest threshold that is certified to stay within the tolerance.

Reads the folder that `calm generate` wrote (or JSON Lines files of anybody's) and writes
calibration.json. Needs numpy and scipy only: no JAX.

  calm calibrate runs/cache --tolerance=0.1 --error_rate=0.05
  calm calibrate runs/cache --kind=risk_signed --metric=token_f1 --tolerance=0.02
  calm calibrate --full=full.jsonl --outputs 0.9=a.jsonl 0.8=b.jsonl --output=calibration.json
"""

import argparse
import dataclasses
import pathlib

from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from calm import calibrate as calibrate_lib
from calm.calibrate import Support, generations, planning, sequential, thresholds
from calm.calibrate.evidence import methods, multiple_testing
from calm.calibrate.generations import foreign, order
from calm.calibrate.losses import sequence_losses
from calm.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument("directory", nargs="?", help="folder written by `calm generate`")
  parser.add_argument(
    "--full", metavar="FILE", help="JSON Lines of the full model's outputs, made elsewhere"
  )
  parser.add_argument(
    "--outputs",
    nargs="+",
    metavar="THRESHOLD=FILE",
    help="JSON Lines of outputs at each threshold, made elsewhere",
  )
  rate = {"type": float, "metavar": "RATE"}
  parser.add_argument("--tolerance", default=0.1, help="delta (default 0.1)", **rate)
  parser.add_argument("--error_rate", default=0.05, help="epsilon (default 0.05)", **rate)
  parser.add_argument(
    "--kind",
    choices=["textual", "risk_signed", "risk_clipped"],
    default="textual",
    help="loss: distance to the full model's text (textual, the default), or increase of the"
    " risk against references",
  )
  parser.add_argument(
    "--metric",
    default="rouge_l",
    metavar="NAME",
    help="rouge_l (default), token_f1, exact_match, chrf, or import.path:function",
  )
  parser.add_argument(
    "--method",
    default="auto",
    metavar="NAME",
    help=f"p-values: {', '.join(methods.METHODS)} (default auto: betting, or binomial where"
    " losses are 0 or 1)",
  )
  parser.add_argument(
    "--testing",
    default="fixed_sequence",
    metavar="NAME",
    help=f"{', '.join(multiple_testing.PROCEDURES)} (default fixed_sequence)",
  )
  parser.add_argument(
    "--by_group", action="store_true", help="calibrate on means over each prompt's group"
  )
  parser.add_argument(
    "--pilot",
    metavar="DIR",
    help="folder of `calm generate` for other prompts, on the same grid (the validation"
    " split): prints first how likely so many prompts certify each threshold",
  )
  parser.add_argument(
    "--output", metavar="FILE", help="where to write (default DIRECTORY/calibration.json)"
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Calibrates, prints the table and the promise, writes the file."""
  console = rich_console.Console()
  cached = _read(arguments)
  _plan(arguments, console, cached)
  result = (_replay if cached.sequential else _calibrate)(arguments, console, cached)
  output = pathlib.Path(
    arguments.output or pathlib.Path(arguments.directory or ".") / "calibration.json"
  )
  result.save(output)
  print_calibration(console, result, cached)
  console.print(f"Written to {output}")
  return 0


def _plan(arguments, console, cached: generations.Generations) -> None:
  """Refuses, before any work, where nothing could be certified; warns where little could."""
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  units = order.prompt_groups(cached.prompts) if arguments.by_group else cached.ids
  count, name = len(set(units)), arguments.testing
  clusters = len(set(order.known_groups(cached.prompts) or cached.ids))
  if not arguments.by_group and clusters < len(cached.ids):
    console.print(
      f"[yellow]The {len(cached.ids)} prompts come in {clusters} groups and are taken for"
      " independent all the same; --by_group promises over groups.[/yellow]"
    )
  share = (
    multiple_testing.first_share(name, len(cached.thresholds))
    if name in multiple_testing.PROCEDURES
    else 1
  )
  rates = (arguments.tolerance, arguments.error_rate * share)
  refusal = planning.refusal(
    count,
    arguments.tolerance,
    arguments.error_rate,
    support=support if count == len(cached.ids) else Support(support.lower, support.upper),
    method="betting" if cached.sequential else arguments.method,
    share=share,
  )
  if refusal:
    raise ValueError(refusal)
  if arguments.pilot:
    pilot = _losses(arguments, generations.load(arguments.pilot))
    curve = planning.power_curve(
      pilot,
      [count, 2 * count, 4 * count],
      tolerance=rates[0],
      error_rate=rates[1],
      method=arguments.method,
    )
    console.print(f"Power by prompts and threshold, judged by {arguments.pilot}:\n{curve}")
  elif support.lower < 0.0:
    forecast = planning.forecast(count, *rates, method=arguments.method)
    if forecast:
      console.print(f"[yellow]{forecast}[/yellow]")


def _calibrate(arguments, console, cached) -> calibrate_lib.Calibration:
  with rich_progress.Progress(console=console, transient=True) as bar:
    task = bar.add_task(f"{arguments.metric} losses", total=None)
    losses = _losses(
      arguments, cached, lambda done, total: bar.update(task, completed=done, total=total)
    )
  return calibrate_lib.calibrate(
    losses,
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    method=arguments.method,
    testing_procedure=arguments.testing,
  )


def _losses(arguments, cached, progress=None) -> sequence_losses.SequenceLosses:
  """Losses as the flags want them; `--by_group` refuses prompts that have no group."""
  losses = sequence_losses.compute(
    cached, arguments.kind, metric=arguments.metric, progress=progress
  )
  groups = order.prompt_groups(cached.prompts) if arguments.by_group else None
  return dataclasses.replace(losses, groups=groups)


def _replay(arguments, console, cached) -> calibrate_lib.Calibration:
  """A run that stopped early is tested prompt by prompt, as it was decoded."""
  del console
  if arguments.by_group != cached.by_group:
    tested = "by group" if cached.by_group else "by prompt"
    raise ValueError(
      f"Expected `--by_group` as the run that stopped early had it: it was decided {tested}, in"
      f" an order made for that. Got by_group={arguments.by_group}; change the flag, or"
      " generate again."
    )
  return sequential.replay(
    cached,
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    kind=arguments.kind,
    metric=arguments.metric,
  )


def _read(arguments: argparse.Namespace) -> generations.Generations:
  if arguments.directory and not (arguments.full or arguments.outputs):
    return generations.load(arguments.directory)
  if arguments.full and arguments.outputs and not arguments.directory:
    files = {}
    for pair in arguments.outputs:
      threshold, _, path = pair.partition("=")
      files[thresholds.parse_threshold(threshold)] = path
    return foreign.gather(arguments.full, files)
  raise ValueError(
    "Expected the folder of `calm generate`, or both --full and --outputs. Got"
    f" directory={arguments.directory!r}, --full={arguments.full!r},"
    f" --outputs={arguments.outputs!r}."
  )


def print_calibration(
  console: rich_console.Console,
  result: calibrate_lib.Calibration,
  cached: generations.Generations | None = None,
) -> None:
  """The table of the tested thresholds and the promise in words."""
  layers = mean_layers(cached)
  table = rich_table.Table(
    title=f"{result.kind} loss, {result.metric}; p-values: {result.method}"
  )
  for name in ("threshold", "mean loss", "upper bound", "p-value", "certified"):
    table.add_column(name, justify="right")
  if layers:
    table.add_column("layers / token", justify="right")
  for row in result.rows:
    cells = [
      thresholds.format_threshold(row.threshold),
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.3g}",
      "yes" if row.rejected else "no",
    ]
    if layers:
      cells.append(f"{layers[row.threshold]:.2f}")
    style = "bold" if row.threshold == result.threshold else None
    table.add_row(*cells, style=style)
  console.print(table)
  console.print(
    f"Calibrated threshold: [bold]{thresholds.format_threshold(result.threshold)}[/bold]"
    f" ({result.reason})"
  )
  console.print(result.guarantee)


def mean_layers(cached: generations.Generations | None) -> dict[float, float]:
  """Mean decoder layers a token at every threshold, where the outputs record exits."""
  if cached is None:
    return {}
  counts = {}
  for threshold, records in zip(cached.thresholds.tolist(), cached.records, strict=True):
    layers = [layer for record in records for layer in record.exit_layers or ()]
    if not layers:
      return {}
    counts[threshold] = sum(layers) / len(layers)
  return counts
