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
import hashlib
import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from rich import console as rich_console

from calm import storage
from calm.calibrate import NEVER_EXIT, Calibration, Online, Prompt, thresholds
from calm.calibrate.generations import order, procedure
from calm.commands import flags, shards
from calm.commands import run as run_lib
from calm.console import Progress, print_text, rate, sanitize
from calm.data import prompt_batches
from calm.inference import exact_rule, outputs, timing

# With so many prompts, seconds that the calibration does not name are measured.
MEASURED_PROMPTS = 64
# Batches a chunk, at first and at most; and most seconds a chunk.
FIRST_BATCHES, MOST_BATCHES, CHUNK_SECONDS = 4, 16, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  help = "decode these, in place of --prompts"
  parser.add_argument("texts", nargs="*", metavar="TEXT", type=flags.filled, help=help)
  flags.add_model(parser, required=False)
  flags.add_promise(parser)
  add = flags.add
  add(parser, "exact", None, "the full model's own texts, drafted by first layers")
  add(parser, "output", "FILE", "write JSON Lines here; '-': standard output")
  help = "color every token by its exit layer"
  parser.add_argument("--color", "--colour", dest="colour", action="store_true", help=help)
  add(parser, "stream", None, "print every token as it comes")
  flags.add_shared(flags.more(parser), "num_shards", "shard_id")


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Decodes the prompts."""
  start = time.monotonic()
  _check(arguments)
  threshold = thresholds.NEVER_EXIT_TEXT if arguments.exact else arguments.threshold
  if threshold is not None:
    threshold = thresholds.parse_threshold(threshold)
  console = rich_console.Console(stderr=True, highlight=False)
  prompts = flags.open_prompts(arguments)
  part = None
  if which := shards.parse_shard(arguments):
    prompts = part = shards.ShardRun(prompts, which, arguments.output)
  print_text(console, f"{prompts.taken}.")
  predictor = load(arguments, threshold)
  predictor.weights  # noqa: B018 (laid out now, or it would count as decoding)
  online = open_online(arguments, predictor)
  if threshold is None:
    threshold = predictor.threshold if online is None else online.threshold
  if threshold is None:
    raise ValueError(
      "Expected `--threshold` beside options that the calibration of"
      f" {arguments.model} is not for, got none; give one, or leave the options out."
    )
  calibration = predictor.calibration
  if old := unknown_platform(calibration and calibration.procedure):
    print_text(console, f"About the calibration: {old}")
  startup = time.monotonic() - start
  serving = Serving(arguments, predictor, threshold, online, console, len(prompts), startup)
  if part is None:
    serving.serve(prompts, arguments.output)
    return 0
  about = {"threshold": serving.about["threshold"], "procedure": predictor.procedure.to_json()}
  if part.begin("infer", about, console):
    if len(part):  # few prompts leave shards empty
      serving.serve(prompts, str(part.folder / shards.OUTPUTS))
    part.finish("infer", about, [shards.OUTPUTS] if len(part) else [])
  return 0


def unknown_platform(made_by: procedure.Procedure | None) -> str:
  """One line that says so where a file does not tell where it was decoded; else ''."""
  if not made_by or None not in (made_by.platform, made_by.matmul_precision):
    return ""
  return (
    "An earlier version wrote it, which did not record `platform` and `matmul_precision`:"
    " whether it was decoded on a platform like this one is not checked."
  )


def open_online(arguments: argparse.Namespace, predictor) -> Online | None:
  """The state that --online names."""
  given = {name: getattr(arguments, name) for name in flags.ONLINE}
  given = {name: value for name, value in given.items() if value is not None}
  if arguments.online is not None:
    options = {**flags.ONLINE, **given}
    return predictor.online(arguments.online, share=options.pop("online_share"), **options)
  for name in given:
    raise ValueError(f"`--{name}` needs `--online`, the file of its state.")
  return None


def _check(arguments: argparse.Namespace) -> None:
  """ValueError where options do not fit one another."""
  own = pathlib.Path(arguments.model)
  serves_itself = any((own / f"{n}.json").is_file() for n in ("calibration", "full_depth"))
  # A folder that is not there is named by what reads it.
  serves_itself |= arguments.model != "packed" and not own.exists()
  named = arguments.calibration is not None or arguments.threshold is not None
  sharded = arguments.num_shards is not None
  for odd, message in (
    (
      not (named or serves_itself or arguments.exact or arguments.online),
      "Expected `--calibration`, `--threshold` or `--exact`, or `--online`, got none of them,"
      " and no calibration.json in the folder of `--model`; make one with `calm fit`, or with"
      " `calm generate` and `calm calibrate`, or decode without a guarantee: --threshold=0.9.",
    ),
    (
      arguments.online and (named or arguments.exact or sharded),
      "`--online` finds the threshold itself, in one process: leave `--calibration`,"
      " `--threshold`, `--exact` and `--num_shards` out.",
    ),
    (
      arguments.exact and named,
      "`--exact` needs neither `--calibration` nor `--threshold`.",
    ),
    (
      arguments.stream and (arguments.output or arguments.colour),
      "`--stream` prints plain text: leave `--output` and `--color` out.",
    ),
    (
      arguments.expect_digest is not None and arguments.calibration is None,
      "`--expect_digest` needs `--calibration`, the file of that digest.",
    ),
  ):
    if odd:
      raise ValueError(message)
  if arguments.output and not sharded:
    read = (arguments.prompts, arguments.calibration, arguments.online)
    run_lib.check_output(arguments.output, read=read)


def load(arguments: argparse.Namespace, threshold: float | None):
  """The model that the options name, under its calibration."""
  run_lib.use_compilation_cache()
  from calm import inference

  calibration = arguments.calibration
  if (digest := arguments.expect_digest) is not None:
    calibration = Calibration.load(calibration, expect_digest=digest)
  with run_lib.naming_flag("--model"), warnings.catch_warnings():
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
  """Decodes `count` prompts chunk after chunk and adds up what the report needs."""

  def __init__(self, arguments, predictor, threshold, online, console, count, startup):
    self._arguments, self.predictor, self.threshold = arguments, predictor, threshold
    self._online, self._console, self._count, self._startup = online, console, count, startup
    self._exact = exact_rule(predictor) if arguments.exact else None
    self._sums = collections.Counter[str]()
    self._timing = outputs.Timing(0.0, 0.0, 0)
    self._cut: list[prompt_batches.CutPrompts] = []
    self._guarantee: str | None = None
    self._sample: tuple[str, ...] = ()  # texts that are timed
    self._parts: Callable[[int, outputs.Output], None] | None = None

  @property
  def about(self) -> dict[str, Any]:
    """What the outputs depend on."""
    text = "online" if self._online else thresholds.format_threshold(self.threshold)
    return {"threshold": text, **self.predictor.procedure.to_json()}

  def serve(self, prompts: Iterable[Prompt], output: str | None) -> None:
    """Decodes the prompts into a file or a stream, or onto the screen, and reports."""
    with contextlib.ExitStack() as stack:
      coloured = self._arguments.colour and not output
      results: Results = (screen := Stream(coloured=coloured))
      self._parts = screen.show if self._arguments.stream else None
      if output:
        results = stack.enter_context(open_results(output, self.about))
      pending = results.pending(prompts)
      if results.done:
        text = f"{results.done} prompts' outputs are there already; going on."
        print_text(self._console, text)
      try:
        quiet = rich_console.Console(quiet=True)  # a bar would be drawn into the text
        with Progress(quiet if self._parts else self._console) as progress:
          for chunk, made in self._decode(pending, progress, results.done):
            # Texts would be printed into the bar.
            hides = not output and sys.stdout.isatty()
            with progress.hidden() if hides else contextlib.nullcontext():
              results.write(chunk, made)
      except KeyboardInterrupt:
        raise run_lib.StoppedError(
          f"stopped after {results.done} of {self._count} prompts; {results.stopped}"
        ) from None
    if coloured:
      print(outputs.legend_terminal(self.predictor.num_layers), file=sys.stderr)
    self._report()

  def _decode(
    self, prompts: Iterator[Prompt], progress: Progress, done: int = 0
  ) -> Iterator[tuple[Sequence[Prompt], Any]]:
    """(prompts, outputs), so many at a time that memory and what a kill costs are bounded."""
    options = self.predictor.options
    batch = options.batch_size * options.num_devices
    batches = FIRST_BATCHES
    while chunk := list(itertools.islice(prompts, 1 if self._parts else batches * batch)):
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = self._generate(chunk)
      self._add(made, caught)
      self._sample = (*self._sample, *(prompt.input for prompt in chunk))[: 2 * batch]
      yield chunk, made
      progress.count("prompts")(done + self._sums["prompts"], self._count)
      affordable = int(CHUNK_SECONDS / max(made.timing.seconds, 1e-9) * len(chunk) / batch)
      batches = max(1, min(MOST_BATCHES, 4 * batches, affordable))

  def _generate(self, chunk: Sequence[Prompt]):
    texts = [prompt.input for prompt in chunk]
    if self._online is None:
      way = {"threshold": self.threshold, "rule": self._exact, "parts": self._parts}
      return self.predictor.generate(texts, **way)
    # Prompts of one group, and prompts that say the same, are checked once.
    names = [str(p.group) if p.group is not None else order.fold_text(p.input) for p in chunk]
    return self.predictor.generate(texts, online=self._online, ids=names, parts=self._parts)

  def _add(self, made, caught: Sequence[warnings.WarningMessage]) -> None:
    self._sums.update(
      prompts=len(made),
      tokens=sum(len(output.exit_layers) for output in made),
      layers=sum(sum(output.exit_layers) for output in made),
      passes=sum(output.passes for output in made),
      drafts=sum(output.drafts for output in made),
      accepted=sum(sum(output.drafted) for output in made),
    )
    self._timing += made.timing
    self._guarantee = made.guarantee
    for warning in caught:
      if isinstance(warning.message, prompt_batches.CutPrompts):
        self._cut.append(warning.message)
      else:
        warnings.warn_explicit(
          warning.message, warning.category, warning.filename, warning.lineno
        )

  def _report(self) -> None:
    """Prints what it took, and the guarantee."""
    say = lambda text: print_text(self._console, text)
    sums, spent, layers = self._sums, self._timing, self.predictor.num_layers
    if cut := self._cut:
      counts = sum(c.cut for c in cut), sums["prompts"], max(c.longest for c in cut)
      part = any(each.part for each in cut)
      say(f"Warning: {prompt_batches.CutPrompts(*counts, cut[-1].limit, part)}")
    mean = sums["layers"] / sums["tokens"] if sums["tokens"] else float("nan")
    say(
      f"{_count(sums['prompts'], 'prompt')}, threshold {self.about['threshold']},"
      f" {mean:.2f} of {layers} decoder layers a token."
    )
    say(
      f"{spent.seconds:.2f} s: encoder {spent.encode_seconds:.2f} s, decoder"
      f" {spent.decode_seconds:.2f} s ({rate(sums['prompts'], spent.seconds)}); besides,"
      f" start-up {self._startup:.1f} s and compilation {spent.compile_seconds:.1f} s"
      f" ({_count(spent.compilations, 'program')})."
    )
    size = self.predictor.options.batch_size
    if sums["drafts"]:
      say(
        f"{sums['tokens'] / sums['passes']:.2f} tokens a pass of all layers; of"
        f" {_count(sums['drafts'], 'draft')} {sums['accepted'] / sums['drafts']:.0%} were"
        " accepted."
      )
    elif sums["passes"] and size > 1:
      say(
        f"No draft was made: in batches of {size} a pass over several positions costs about as"
        " much as so many steps. --batch_size=1 makes drafts where they are worth it."
      )
    say(self._promised())

  def _promised(self) -> str:
    """What holds of the outputs."""
    if self._online is not None:
      return self._online.guarantee
    if self._exact:
      return "These are the full model's own texts: every token was verified at full depth."
    if self._guarantee:
      return f"{self._seconds()}{self._guarantee}"
    if self.threshold == NEVER_EXIT:
      return "The full model was used; no guarantee is needed."
    why = "the calibration is for another threshold than --threshold"
    if self._arguments.void_guarantee:
      why = "--void_guarantee was given"
    elif self._arguments.calibration is None:
      why = "nothing was calibrated for these options and this threshold"
    return f"No guarantee: {self.predictor.platform_mismatch or why}."

  def _seconds(self) -> str:
    """Lines on the decoder beside full depth; none where nothing is known of it."""
    calibration = self.predictor.calibration
    if calibration is None or not calibration.certified:
      return ""
    if noted := timing.noted(calibration):  # whose warning came with `load`
      return f"Decoder beside full depth, as measured with the calibration: {noted}.\n"
    if self._sums["prompts"] < MEASURED_PROMPTS:
      return ""
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)  # reported above
      found = timing.beside_full_depth(
        self.predictor, self._sample, self.threshold, prompts=4, rounds=3
      )
    slow = timing.warning(timing.note(calibration, found))
    warned = f"Warning: {slow}\n" if slow else ""
    return f"Decoder beside full depth, measured on some of these prompts: {found}.\n{warned}"


def _count(number: int, thing: str) -> str:
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _lines(prompts: Sequence[Prompt], made: Sequence[Any]) -> bytes:
  """Outputs as JSON Lines."""
  lines = []
  for prompt, output in zip(prompts, made, strict=True):
    value = {
      "id": prompt.id,
      "prediction": output.text,
      "tokens": list(output.tokens),
      "exit_layers": list(output.exit_layers),
      "confidences": [float(str(c)) for c in output.confidences],
      "score": output.score,
    }
    if output.passes:
      value |= {"drafted": list(output.drafted), "passes": output.passes}
    lines.append(json.dumps(value, ensure_ascii=False) + "\n")
  return "".join(lines).encode("utf-8")


class Stream:
  """Lines for standard output, a device, a pipe or a socket; texts for the screen.

  Attributes:
    done: prompts whose outputs are there.
    stopped: what a run that stops now leaves.
  """

  def __init__(self, file: BinaryIO | None = None, coloured: bool = False):
    self.done, self._file, self._coloured, self._shown = 0, file, coloured, ""
    self.stopped = "what was written is whole lines; the same command starts anew"
    if file is None:
      self.stopped = "with --output=FILE the same command would go on"

  def pending(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts whose outputs are missing."""
    return iter(prompts)

  def write(self, prompts: Sequence[Prompt], made: Sequence[Any]) -> None:
    """Writes the outputs of the next prompts."""
    if self._file is not None:
      self._file.write(_lines(prompts, made))
      self._file.flush()
    else:
      for output in made:
        text = sanitize(output.text) if sys.stdout.isatty() else output.text
        print(output.coloured() if self._coloured else text.removeprefix(self._shown))
        self._shown = ""
      sys.stdout.flush()
    self.done += len(prompts)

  def show(self, row: int, output: outputs.Output) -> None:
    """Prints what came of a prompt's text since the last call."""
    text = output.text.rstrip("\ufffd ")  # a character may lack bytes, a space its word
    text = sanitize(text) if sys.stdout.isatty() else text
    if text.startswith(self._shown):
      print(text.removeprefix(self._shown), end="", flush=True)
      self._shown = text


class ResumableFile:
  """A regular file: NAME.DIGEST.partial until it is whole.

  The digest is of the prompts and of all that their outputs depend on, so that the same command
  goes on after a kill, and another one has a file of its own. Methods as of `Stream`.
  """

  def __init__(self, target: pathlib.Path, about: Mapping[str, Any]):
    self._target, self._about, self.done = target, about, 0

  @property
  def stopped(self) -> str:
    return f"the same command goes on from {self._partial}" if self.done else "nothing was made"

  def pending(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts whose lines are missing; they are the last ones."""
    digest = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode())
    for prompt in prompts:
      digest.update(json.dumps([prompt.id, prompt.input]).encode() + b"\n")
    name = f"{self._target.name}.{digest.hexdigest()[:16]}.partial"
    self._partial, rest = self._target.with_name(name), iter(prompts)
    if self._partial.is_symlink() or (self._partial.exists() and not self._partial.is_file()):
      raise OSError(f"Expected {str(self._partial)!r} to be a file, got a link or a device.")
    if self._partial.exists():
      storage.drop_partial_line(self._partial)
      for line in storage.read_lines(self._partial):
        wanted = next(rest, None)
        if wanted is None or line.value.get("id") != wanted.id:
          raise line.error("expected the outputs of an earlier run, got others; take it away.")
        self.done += 1
    return rest

  def write(self, prompts: Sequence[Prompt], made: Sequence[Any]) -> None:
    """Writes the outputs of the next prompts."""
    storage.append(self._partial, _lines(prompts, made))
    self.done += len(prompts)

  def finish(self) -> None:
    """The file takes its place."""
    storage.put(self._partial, self._target)


Results = Stream | ResumableFile


@contextlib.contextmanager
def open_results(path: str, about: Mapping[str, Any]) -> Iterator[Results]:
  """Opens `--output`; a file takes its place when the block ends well.

  Args:
    path: a file, a link to one, a device, a pipe, a socket, or '-' for standard output.
    about: what the lines depend on; a stopped run of the same is gone on with.

  Raises:
    OSError: it cannot be written, or another process writes it.
  """
  target = storage.destination(path)
  if target is None:
    with storage.replacing(path) as file:
      yield Stream(file)
    return
  with storage.lock(target):
    results = ResumableFile(target, about)
    yield results
    results.finish()
