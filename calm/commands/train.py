"""Train a model with an exit at every decoder layer, from gin files.

  calm train --gin_file=configs/train/local_tiny.gin \\
      --gin_bindings="TRAIN = 'rows.jsonl'" \\
      --gin_bindings="VOCABULARY_PATH = 'spiece.model'" --output_dir=runs/tiny

A stopped run goes on with the same command, and with the losses of a run that
never stopped. Losses go to `scalars.jsonl` of the output folder, the model to
its `model/`.
"""

import argparse
import contextlib
import json
import pathlib
import time
from typing import Any

from rich import console as rich_console

from calm import storage
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text

# Bindings on the command line see only what a gin file has named before them:
# these always.
CHOICES = """
from __gin__ import dynamic_registration

from calm import training
from calm.training import losses
from calm.training import objectives
from calm.training import run
from calm.training import sources

CHOICES = [
  @objectives.LayerWeighted, @objectives.ExitClassifier, @objectives.ExitProbes,
  @losses.layer_weights, @losses.equal_weights,
  @losses.last_layer_weights, @losses.classifier_loss,
  @losses.geometric_classifier_loss,
  @training.adafactor, @training.adam, @training.Schedule,
  @sources.supervised, @sources.denoising, @sources.frequent_tokens,
  @sources.stored_shortlist,
]
"""
_OUTPUT = "calm.training.run.train.output_dir"
SCALARS = "scalars.jsonl"  # of training steps and validations, a line each


def add_arguments(parser: argparse.ArgumentParser) -> None:
  text = "gin file (a program: use only what you would run); repeatable"
  flags.add(
    parser, "gin_file", "FILE", text, [], action="append", required=True
  )
  flags.add(
    parser,
    "gin_bindings",
    "'A.b = 1'",
    "gin binding; repeatable",
    [],
    action="append",
  )
  flags.add(
    parser,
    "gin_search_paths",
    "DIRS",
    "folders of gin files, comma-separated",
    "",
  )
  text = "folder of the run (resumed if it exists); overrides gin's"
  flags.add(parser, "output_dir", "DIR", text)


def run(arguments: argparse.Namespace) -> int:
  import gin

  from calm import training
  from calm.training import run as training_run

  for path in arguments.gin_file:
    # Includes are written from the repository's root; a run's own files may lie
    # elsewhere.
    gin.add_config_file_search_path(str(pathlib.Path(path).absolute().parent))
  gin.add_config_file_search_path(str(training_run.gin_folder()))
  run_lib.use_compilation_cache()
  # an earlier command of this process leaves its own, locked
  gin.clear_config()
  gin.parse_config(CHOICES)  # registers the names, which stay known
  run_lib.parse_gin(arguments)
  run_lib.refuse_unread_macros()
  train: Any = training_run.train
  with contextlib.suppress(ValueError):  # where the files bind nothing of it
    train = gin.get_configurable(train)
  try:
    output_dir = arguments.output_dir or gin.query_parameter(_OUTPUT)
  except ValueError as error:
    raise ValueError(
      "`calm train` needs `--output_dir`, or `run.train.output_dir` in the "
      "gin file."
    ) from error
  print(f"Checkpoints, validations and scalars: {output_dir}", flush=True)
  console = rich_console.Console()
  with Progress(console) as progress:
    monitor = Monitor(pathlib.Path(output_dir), console, progress)
    listener = training.Listener(
      monitor.start, monitor.step, monitor.evaluation
    )
    exported = train(listener=listener, output_dir=output_dir)
  storage.write_atomically(f"{output_dir}/config.gin", gin.config_str())
  text = f"Model with the best validation: {exported}\nDecode with it:"
  run_lib.print_next(
    console, text, "infer", f"--model={exported}", "--threshold=0.9", "a text"
  )
  return 0


class Monitor:
  """Shows a run's progress, and keeps its scalars; its methods are the
  `Listener`.
  """

  def __init__(self, output_dir: pathlib.Path, console, progress):
    self._output_dir = output_dir
    self._console = console
    self._progress = progress
    self._num_steps = 1
    self._since = time.monotonic()

  def start(self, step: int, num_steps: int) -> None:
    """The run begins, or goes on, after `step` of `num_steps`."""
    self._num_steps = num_steps
    self._since = time.monotonic()
    if step:
      print_text(self._console, f"resumed at step {step}")

  def step(self, step: int, scalars: dict[str, float]) -> None:
    """Scalars of a training step."""
    now = time.monotonic()
    rate = scalars["target_tokens"] / max(now - self._since, 1e-9)
    self._since = now
    text = f"loss {scalars['loss']:.3f} {rate:.0f} tokens/s"
    if self._console.is_terminal:
      self._progress(
        step / self._num_steps, f"step {step} of {self._num_steps}, {text}"
      )
    else:
      print_text(self._console, f"{step} {text}")
    self._write("train", step, {**scalars, "tokens_per_second": rate})

  def evaluation(self, step: int, scalars: dict[str, float]) -> None:
    """Scalars of a validation."""
    shown = [f"{k} {v:.4f}" for k, v in scalars.items() if k.endswith("loss")]
    layers = [
      f"{v:.3f}" for k, v in scalars.items() if k.startswith("accuracy/layer_")
    ]
    line = ", ".join([*shown, f"accuracy by layer {' '.join(layers)}"])
    print_text(self._console, f"{step} validation {line}", soft_wrap=True)
    self._write("validation", step, scalars)
    self._since = time.monotonic()

  def _write(self, split: str, step: int, scalars: dict[str, float]) -> None:
    # a loss may well be NaN
    line = json.dumps({"split": split, "step": step, **scalars})
    storage.append(self._output_dir / SCALARS, f"{line}\n".encode())
