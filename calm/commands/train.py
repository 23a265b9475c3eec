"""Trains a model with an exit at every decoder layer, its exit classifier or probes, from gin.

  calm train --gin_file=configs/runs/local_tiny.gin \\
      --gin_bindings="TRAIN = 'rows.jsonl'" --gin_bindings="VOCABULARY_PATH = 'spiece.model'" \\
      --output_dir=runs/tiny

Killed or stopped, the same command goes on where it was, with the same losses as if it had
never stopped. Scalars for TensorBoard go to the output folder, the model to its `model/`.
"""

import argparse
import pathlib
import time
from typing import Any

from calm import storage
from calm.commands import common, following, gin_files

# Bindings on the command line see only what a gin file has named before them: these always.
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
  @losses.last_layer_weights, @losses.classifier_loss, @losses.geometric_classifier_loss,
  @training.adafactor, @training.adam, @training.Schedule,
  @sources.supervised, @sources.denoising, @sources.seqio_pairs, @sources.frequent_tokens,
  @sources.stored_shortlist,
]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of `calm train`."""
  common.add_gin_arguments(parser, required=True)
  parser.add_argument(
    "--output_dir",
    metavar="DIR",
    help="folder of the run (gone on with if it exists); overrides `run.train.output_dir`",
  )
  parser.add_argument(
    "--no_tensorboard",
    action="store_true",
    help="write no TensorBoard scalars (saves TensorFlow's start)",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Runs `calm train`."""
  import gin

  from calm.training import configs

  for path in arguments.gin_file:
    # Includes are written from the repository's root; a run's own files may lie elsewhere.
    gin.add_config_file_search_path(str(pathlib.Path(path).absolute().parent))
  gin.add_config_file_search_path(str(configs.root()))
  common.use_compilation_cache()
  gin.clear_config()  # an earlier command of this process leaves its own, locked
  gin.parse_config(CHOICES)  # only the names are wanted, which stay known

  from calm.training import run as run_lib

  train = common.configured(arguments, run_lib.train)
  gin_files.refuse_unread_macros()
  options = {} if arguments.output_dir is None else {"output_dir": arguments.output_dir}
  output_dir = pathlib.Path(_output_dir(arguments))
  print(f"Checkpoints, validations and scalars: {output_dir}", flush=True)
  with Progress(output_dir, tensorboard=not arguments.no_tensorboard) as monitor:
    exported = train(listener=monitor.listener, **options)
  storage.write_atomically(output_dir / "config.gin", gin.config_str())
  print(f"Model with the best validation: {exported}")
  print("Decode with it:")
  # A command that works as it stands.
  words = (f"--model={exported}", "--threshold=0.9")
  print(following.infer(*words, text="a text"), flush=True)
  return 0


def _output_dir(arguments: argparse.Namespace) -> str:
  import gin

  if arguments.output_dir is not None:
    return arguments.output_dir
  try:
    return gin.query_parameter("calm.training.run.train.output_dir")
  except ValueError as error:
    raise ValueError(
      "Expected `--output_dir`, or `run.train.output_dir` in the gin file, to name a folder"
      " for the run, got neither."
    ) from error


class Progress:
  """A progress bar and TensorBoard scalars; its `listener` is what `training.fit` tells."""

  def __init__(self, output_dir: pathlib.Path, *, tensorboard: bool):
    from rich import progress

    from calm import training

    self._bar = progress.Progress(
      progress.TextColumn("step {task.completed}/{task.total}"),
      progress.BarColumn(),
      progress.TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
      progress.TimeRemainingColumn(),
      transient=False,
    )
    # Nothing to see before the loop starts: mistakes are found until then.
    self._task = self._bar.add_task("train", visible=False, loss="-", rate="-")
    self._output_dir, self._tensorboard = output_dir, tensorboard
    self._writers: dict[str, Any] = {}
    self._since = time.monotonic()
    self.listener = training.Listener(self._start, self._step, self._eval)

  def __enter__(self) -> "Progress":
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()
    for writer in self._writers.values():
      writer.close()

  def _start(self, step: int, num_steps: int) -> None:
    self._bar.update(self._task, total=num_steps, completed=step, visible=True)
    if step:
      self._bar.console.print(f"resumed at step {step}")
    self._since = time.monotonic()

  def _step(self, step: int, scalars: dict[str, float]) -> None:
    now = time.monotonic()
    rate = scalars["target_tokens"] / max(now - self._since, 1e-9)
    self._since = now
    loss = f"{scalars['loss']:.3f}"
    self._bar.update(self._task, completed=step, loss=loss, rate=f"{rate:.0f}")
    if not self._bar.console.is_terminal:
      self._bar.console.print(f"{step} loss {loss} {rate:.0f} tokens/s")
    self._write("train", step, {**scalars, "tokens_per_second": rate})

  def _eval(self, step: int, scalars: dict[str, float]) -> None:
    layers = [key for key in scalars if key.startswith("accuracy/layer_")]
    shown = " ".join(f"{scalars[key]:.3f}" for key in layers)
    text = f"{step} validation loss {scalars.get('loss', float('nan')):.4f}"
    others = [f"{k} {v:.4f}" for k, v in scalars.items() if k.endswith("/loss")]
    line = ", ".join([text, *others, f"accuracy by layer {shown}"])
    self._bar.console.print(line, highlight=False, soft_wrap=True)
    self._write("validation", step, scalars)
    self._since = time.monotonic()

  def _write(self, split: str, step: int, scalars: dict[str, float]) -> None:
    if not self._tensorboard:
      return
    if split not in self._writers:
      # Brings TensorFlow, which takes seconds to start.
      from clu import metric_writers

      self._writers[split] = metric_writers.SummaryWriter(str(self._output_dir / split))
    self._writers[split].write_scalars(step, scalars)
    self._writers[split].flush()
