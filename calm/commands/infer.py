"""Decode prompts under a calibrated threshold, with its guarantee.

A calibration for another model or other options is refused. A model folder of
`calm fit` has its own, and needs no further options.

  calm infer --model=mine "a long text"
  calm infer --model=mine --prompts=prompts.txt
  calm infer --calibration=runs/cache/calibration.json --prompts=prompts.txt
  calm infer --threshold=0.8 --prompts=rows.csv --input_key=review --output=-
  calm infer --online=state.jsonl --tolerance=0.1 --prompts=today.jsonl
  calm infer --threshold=never --color "a long text"
  calm infer --model=mine --stream "a long text"

--output takes JSON Lines of {id, prediction, tokens, exit_layers, confidences,
score}, first into FILE.(digest).partial, with which the same command goes on
after a kill.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import console as rich_console

from calm import storage
from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Online,
  Prompt,
  clusters,
  thresholds,
)
from calm.commands import flags, merge
from calm.commands import run as run_lib
from calm.console import Progress, print_text, sanitize
from calm.data import prompt_batches
from calm.inference import exact_rule, grid, outputs, timing

# With so many prompts, seconds that the calibration does not name are measured.
MEASURED_PROMPTS = 64
# Batches a chunk, at first and at most; and most seconds a chunk.
FIRST_BATCHES = 4
MOST_BATCHES = 16
CHUNK_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  help = "decode these, in place of --prompts"
  parser.add_argument(
    "texts", nargs="*", metavar="TEXT", type=flags.filled, help=help
  )
  flags.add_model(parser, required=False)
  flags.add_promise(parser)
  add = flags.add
  add(
    parser, "exact", None, "the full model's own texts, drafted by first layers"
  )
  add(parser, "output", "FILE", "write JSON Lines here; '-': standard output")
  help = "color every token by its exit layer"
  parser.add_argument(
    "--color", "--colour", dest="colour", action="store_true", help=help
  )
  add(parser, "stream", None, "print every token as it comes")
  flags.add_shared(flags.more(parser), "num_shards", "shard_id")


def run(arguments: argparse.Namespace) -> int:
  start = time.monotonic()
  _check(arguments)
  threshold = (
    thresholds.NEVER_EXIT_TEXT if arguments.exact else arguments.threshold
  )
  threshold = threshold and thresholds.parse_threshold(threshold)
  console = rich_console.Console(stderr=True, highlight=False)
  prompts, mark = merge.take_shard(
    flags.open_prompts(arguments), arguments.shard_id, arguments.num_shards
  )
  print_text(console, f"{prompts.taken}.")
  predictor = load(arguments, threshold)
  predictor.weights  # noqa: B018 (laid out now, or it would count as decoding)
  online = open_online(arguments, predictor)
  if threshold is None:
    threshold = predictor.threshold if online is None else online.threshold
  if threshold is None:
    raise ValueError(
      "Expected `--threshold` beside options that the calibration of"
      f" {arguments.model} is not for, got none; give one, or leave the "
      "options out."
    )
  made_by = predictor.calibration and predictor.calibration.procedure
  if made_by and None in (made_by.platform, made_by.matmul_precision):
    print_text(
      console, "The calibration names no `platform`, which is not checked."
    )
  startup = time.monotonic() - start
  serving = Serving(arguments, predictor, threshold, online, console)
  if mark is not None:
    about = {
      "threshold": serving.name,
      "procedure": predictor.procedure.to_json(),
    }
    mark |= {"kind": "infer", "about": about}
    folder = merge.shard_folder(arguments.output, mark)
    if (there := merge.read_mark(folder)) is not None:
      if there != json.loads(json.dumps(mark)):
        got = "got another's (threshold, prompts or procedure)"
        raise ValueError(
          f"{folder}: expected a finished shard of this run, {got}; take it "
          "away."
        )
      print_text(console, f"{folder} is finished already.", soft_wrap=True)
      return 0
    folder.mkdir(parents=True, exist_ok=True)
    arguments.output = str(folder / merge.OUTPUTS)
  if prompts or mark is None:  # few prompts leave shards empty
    serving.serve(prompts)
    serving.report(startup)
  if mark is not None:
    merge.write_mark(folder, mark)
  return 0


def open_online(arguments: argparse.Namespace, predictor) -> Online | None:
  """The state that --online names."""
  given = {name: getattr(arguments, name) for name in flags.ONLINE}
  given = {name: value for name, value in given.items() if value is not None}
  if arguments.online is not None:
    options = {**flags.ONLINE, **given}
    return predictor.online(
      arguments.online, share=options.pop("online_share"), **options
    )
  for name in given:
    raise ValueError(f"`--{name}` needs `--online`, the file of its state.")
  return None


def _check(arguments: argparse.Namespace) -> None:
  """ValueError where options do not fit one another."""
  own = pathlib.Path(arguments.model)
  serves_itself = any(
    (own / f"{n}.json").is_file() for n in ("calibration", "full_depth")
  )
  # A folder that is not there is named by what reads it.
  serves_itself |= arguments.model != "packed" and not own.exists()
  named = arguments.calibration is not None or arguments.threshold is not None
  ways = sum(map(bool, (named, arguments.exact, arguments.online)))
  if not ways and not serves_itself:
    raise ValueError(
      "Expected `--calibration`, `--threshold` or `--exact`, or `--online`, "
      "got none, and no"
      " calibration.json in the folder of `--model`; without a guarantee: "
      "--threshold=0.9."
    )
  if ways > 1:
    raise ValueError(
      "Expected `--calibration` and `--threshold`, `--exact`, or `--online`, "
      "got several of"
      " them."
    )
  if arguments.stream and (arguments.output or arguments.colour):
    raise ValueError(
      "`--stream` prints plain text: leave `--output` and `--color` out."
    )
  sharded = arguments.num_shards is not None or arguments.shard_id is not None
  if sharded and (arguments.online or arguments.output in (None, "-")):
    raise ValueError(
      "`--num_shards` needs `--output`, the shards' folder, and no "
      "`--online`, whose state one"
      f" process keeps; got {arguments.output!r}."
    )
  if arguments.output and not sharded:
    read = (arguments.prompts, arguments.calibration, arguments.online)
    run_lib.check_output(arguments.output, read=read)


def load(arguments: argparse.Namespace, threshold: float | None):
  """The model that the options name, under its calibration."""
  run_lib.use_compilation_cache()
  from calm import inference

  calibration = arguments.calibration
  if (digest := arguments.expect_digest) is not None:
    own = pathlib.Path(arguments.model) / "calibration.json"
    calibration = Calibration.load(calibration or own, expect_digest=digest)
  with warnings.catch_warnings():
    if threshold == NEVER_EXIT:
      warnings.simplefilter("ignore", inference.UntrainedExits)
    return inference.load(
      arguments.model,
      calibration=calibration,
      void_guarantee=arguments.void_guarantee,
      allow_platform=arguments.allow_platform,
      **flags.decode_options(arguments),
    )


class Serving:
  """Decodes prompts chunk after chunk and adds up what the report needs."""

  def __init__(
    self, arguments, predictor, threshold, online: Online | None, console
  ):
    self._arguments = arguments
    self._predictor = predictor
    self._threshold = threshold
    self._online = online
    self._console = console
    self._rule = (
      (predictor.exact or exact_rule(predictor)) if arguments.exact else None
    )
    self._sums = collections.Counter[str]()
    self._timing = outputs.Timing(0.0, 0.0, 0)
    self._cut: list[prompt_batches.CutPrompts] = []
    self._guarantee: str | None = None
    self._sample: tuple[str, ...] = ()  # texts that are timed
    self._shown = ""  # of a text that is printed as it comes
    self.name = "online" if online else thresholds.format_threshold(threshold)

  def serve(self, prompts: Sequence[Prompt]) -> None:
    """Decodes the prompts into a file or a stream, or onto the screen."""
    output = self._arguments.output
    about = self._predictor.procedure.to_json()
    about |= {"threshold": self.name}
    coloured = self._arguments.colour and not output
    opened = open_output(output, prompts, about) if output else None
    with opened or contextlib.nullcontext((0, None)) as (done, write):
      if done:
        print_text(
          self._console, f"{done} prompts' outputs are there already; going on."
        )
      # a bar would be drawn into the text
      quiet = rich_console.Console(quiet=True)
      with Progress(
        quiet if self._arguments.stream else self._console
      ) as progress:
        for chunk, made in self._decode(prompts[done:]):
          if write is not None:
            write(_lines(chunk, made))
          else:
            if sys.stdout.isatty():  # texts would be printed into the bar
              progress.hide()
            for text in [o.coloured() if coloured else _plain(o) for o in made]:
              print(text.removeprefix(self._shown), flush=True)
            self._shown = ""
          done += len(chunk)
          progress.count("prompts")(done, len(prompts))
    if coloured:
      print(
        outputs.legend_terminal(self._predictor.num_layers), file=sys.stderr
      )

  def _decode(
    self, prompts: Sequence[Prompt]
  ) -> Iterator[tuple[Sequence[Prompt], Any]]:
    """(prompts, outputs), so many at a time that memory and what a kill costs
    are bounded.
    """
    options = self._predictor.options
    batches = FIRST_BATCHES
    batch = options.batch_size * options.num_devices
    start = 0
    parts = self._show if self._arguments.stream else None
    while chunk := prompts[start : start + (1 if parts else batches * batch)]:
      way = {"threshold": self._threshold, "rule": self._rule}
      if self._online is not None:
        # Prompts of one group, and prompts that say the same, are checked once.
        ids = [
          clusters.fold_text(p.input) if p.group is None else str(p.group)
          for p in chunk
        ]
        way = {"online": self._online, "ids": ids}
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = self._predictor.generate(
          [p.input for p in chunk], parts=parts, **way
        )
      for warning in caught:
        if isinstance(warning.message, prompt_batches.CutPrompts):
          self._cut.append(warning.message)
        else:
          warnings.warn(warning.message, stacklevel=2)
      self._sums.update(
        prompts=len(made),
        tokens=sum(len(output.exit_layers) for output in made),
        layers=sum(sum(output.exit_layers) for output in made),
        passes=sum(output.passes for output in made),
      )
      self._timing += made.timing
      self._guarantee = made.guarantee
      self._sample = (*self._sample, *(prompt.input for prompt in chunk))[
        : 2 * batch
      ]
      yield chunk, made
      start += len(chunk)
      affordable = int(
        CHUNK_SECONDS / max(made.timing.seconds, 1e-9) * len(chunk) / batch
      )
      batches = max(1, min(MOST_BATCHES, 4 * batches, affordable))

  def _show(self, row: int, output: outputs.Output) -> None:
    """Prints what came of a text since the last call."""
    # a character may lack bytes, a space its word
    text = _plain(output).rstrip("\ufffd ")
    if text.startswith(self._shown):
      print(text.removeprefix(self._shown), end="", flush=True)
      self._shown = text

  def report(self, startup: float) -> None:
    """Prints what it took, and the guarantee."""

    def say(text):
      return print_text(self._console, text)

    sums = self._sums
    spent = self._timing
    layers = self._predictor.num_layers
    if cut := self._cut:
      counts = (
        sum(c.cut for c in cut),
        sums["prompts"],
        max(c.longest for c in cut),
      )
      part = any(each.part for each in cut)
      say(f"Warning: {prompt_batches.CutPrompts(*counts, cut[-1].limit, part)}")
    mean = sums["layers"] / sums["tokens"] if sums["tokens"] else float("nan")
    pace = sums["prompts"] / max(spent.seconds, 1e-9)
    say(
      f"{_count(sums['prompts'], 'prompt')}, threshold {self.name},"
      f" {mean:.2f} of {layers} decoder layers a token."
    )
    say(
      f"{spent.seconds:.2f} s: encoder {spent.encode_seconds:.2f} s, decoder"
      f" {spent.decode_seconds:.2f} s ({pace:.2f} prompts a second); besides,"
      f" start-up {startup:.1f} s and compilation {spent.compile_seconds:.1f} s"
      f" ({_count(spent.compilations, 'program')})."
    )
    if sums["passes"]:
      say(f"{sums['tokens'] / sums['passes']:.2f} tokens a pass of all layers.")
    say(self._promised())

  def _promised(self) -> str:
    """What holds of the outputs."""
    if self._online is not None:
      return self._online.guarantee
    if self._rule:
      return (
        "These are the full model's own texts: every token was verified at "
        "full depth."
      )
    if self._guarantee:
      return f"{self._seconds()}{self._guarantee}"
    if self._threshold == NEVER_EXIT:
      return "The full model was used; no guarantee is needed."
    why = "the calibration is for another threshold than --threshold"
    if self._arguments.void_guarantee:
      why = "--void_guarantee was given"
    elif self._arguments.calibration is None:
      why = "nothing was calibrated for these options and this threshold"
    return f"No guarantee: {self._predictor.platform_mismatch or why}."

  def _seconds(self) -> str:
    """Lines on the decoder beside full depth; none where nothing is known of
    it.
    """
    calibration = self._predictor.calibration
    if calibration is None or not calibration.certified:
      return ""
    if noted := timing.noted(calibration):  # whose warning came with `load`
      return (
        "Decoder beside full depth, as measured with the calibration: "
        f"{noted}.\n"
      )
    if self._sums["prompts"] < MEASURED_PROMPTS:
      return ""
    with warnings.catch_warnings():
      # reported above
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)
      found = timing.beside_full_depth(
        self._predictor, self._sample, self._threshold, prompts=4, rounds=3
      )
    slow = timing.warning(timing.note(calibration, found))
    warned = f"Warning: {slow}\n" if slow else ""
    return (
      "Decoder beside full depth, measured on some of these prompts: "
      f"{found}.\n{warned}"
    )


def _count(number: int, thing: str) -> str:
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _plain(output: outputs.Output) -> str:
  return sanitize(output.text) if sys.stdout.isatty() else output.text


def _lines(prompts: Sequence[Prompt], made: Sequence[Any]) -> bytes:
  """Outputs as JSON Lines."""
  lines = []
  for prompt, output in zip(prompts, made, strict=True):
    value = grid.record(output, prompt.id).to_json()
    del value["rejected_confidences"]
    if output.passes:
      value |= {"drafted": list(output.drafted), "passes": output.passes}
    lines.append(json.dumps(value, ensure_ascii=False) + "\n")
  return "".join(lines).encode("utf-8")


@contextlib.contextmanager
def open_output(
  path: str | pathlib.Path, prompts: Sequence[Prompt], about: Mapping[str, Any]
) -> Iterator[tuple[int, Callable[[bytes], Any]]]:
  """(prompts whose lines are there, what writes further lines).

  `path` is a file, which has another name until the block ends well
  (`partial_path`), a link to one, a device, a pipe, a socket, or '-' for
  standard output.
  """
  target = storage.destination(path)
  if target is None:
    with storage.replacing(path) as file:
      yield 0, lambda lines: (file.write(lines), file.flush())
    return
  with storage.lock(target):
    partial = partial_path(target, prompts, about)
    yield (
      count_lines(partial, prompts),
      functools.partial(storage.append, partial),
    )
    storage.put(partial, target)


def partial_path(
  target: pathlib.Path, prompts: Sequence[Prompt], about: Mapping[str, Any]
) -> pathlib.Path:
  """NAME.DIGEST.partial, the digest being of the prompts and of all that
  outputs depend on.

  So the same command goes on after a kill, and another one has a file of its
  own.
  """
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for prompt in prompts:
    digest.update(json.dumps([prompt.id, prompt.input]).encode() + b"\n")
  return target.with_name(f"{target.name}.{digest.hexdigest()[:16]}.partial")


def count_lines(partial: pathlib.Path, prompts: Sequence[Prompt]) -> int:
  """The lines that an earlier run left; errors where they are of something
  else.
  """
  if partial.is_symlink() or (partial.exists() and not partial.is_file()):
    raise OSError(
      f"Expected {str(partial)!r} to be a file, got a link or a device."
    )
  done = 0
  if partial.exists():
    storage.drop_partial_line(partial)
    for done, line in enumerate(storage.read_lines(partial), start=1):
      if done > len(prompts) or line.value.get("id") != prompts[done - 1].id:
        raise line.error(
          "expected the outputs of an earlier run, got others; take it away."
        )
  return done
