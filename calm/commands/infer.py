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
import contextlib
import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import console as rich_console

from calm.calibrate import NEVER_EXIT, Calibration, Prompt, screen, seconds, thresholds
from calm.calibrate.generations import merging, procedures
from calm.calibrate.generations.shown import visible
from calm.commands import common, model_flags, monitoring, results, sharding, showing
from calm.data import prompt_batches
from calm.inference import colours, costs, exact_rule

# Seconds of full depth are measured beside a calibrated threshold's where the calibration does
# not say them and the prompts are so many that it costs them little.
MEASURED_PROMPTS = 64
# Prompts go to the model so many batches at a time, fewer where that takes too long.
FIRST_BATCHES, MOST_BATCHES, MOST_BATCHES_REFILLED, CHUNK_SECONDS = 4, 16, 64, 10.0


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
    " (one device, float32)",
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
  screen.say(console, f"{prompts.taken}.")
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
  work = _Work(predictor, threshold, exact, console, len(prompts), startup)
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
    common.check_output(arguments.output)
  prompts = model_flags.open_prompts(arguments)
  if which is None:
    return prompts, None
  if not arguments.output:
    raise ValueError("Expected `--output` beside `--num_shards`, got none; name a folder.")
  part = sharding.Part(prompts, which, arguments.output)
  return part, part


def _serve(arguments: argparse.Namespace, work: "_Work", prompts: Iterable[Prompt]) -> int:
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


class _Work:
  """Decodes chunk after chunk and adds up what there is to report."""

  monitored: monitoring.Monitored | None = None

  def __init__(self, predictor, threshold: float, exact, console, count: int, startup: float):
    from calm.inference import outputs
    from calm.t5 import costs

    self.predictor, self.threshold, self._console = predictor, threshold, console
    self._exact = exact
    self._passes = self._drafts = self._drafted = 0
    self._count, self._startup = count, startup
    self._done = self._tokens = self._layers = 0
    self._timing = outputs.Timing(0.0, 0.0, 0)
    self._costs = costs.Totals(0, costs.Cost(), costs.Cost())
    self._cut: list[prompt_batches.CutPrompts] = []
    self._guarantee: str | None = None
    self._sample: tuple[Prompt, ...] = ()

  @property
  def about(self) -> dict[str, Any]:
    """What its lines depend on."""
    text = thresholds.format_threshold(self.threshold)
    return {"threshold": text, **self.predictor.procedure.to_json()}

  def to_results(self, prompts: Iterable[Prompt], opened: results.Results) -> None:
    """Lines of JSON, as they are made."""
    pending = opened.pending(prompts)
    if opened.report:
      screen.say(self._console, opened.report)
    try:
      with showing.counting(self._console, self._count, "prompts", done=opened.done) as counter:
        for chunk, outputs in self._decode(pending, counter):
          opened.write(chunk, [_line(*pair) for pair in zip(chunk, outputs, strict=True)])
    except KeyboardInterrupt:
      done = f"stopped after {opened.done} of {self._count} prompts; {opened.stopped}"
      raise common.StoppedError(done) from None

  def to_screen(self, prompts: Iterable[Prompt], coloured: bool) -> None:
    """Texts, as they are made."""
    try:
      with showing.counting(self._console, self._count, "prompts") as counter:
        for _, outputs in self._decode(iter(prompts), counter):
          # The texts would be printed into the bar.
          with counter.hidden() if sys.stdout.isatty() else contextlib.nullcontext():
            for output in outputs:
              text = visible(output.text) if sys.stdout.isatty() else output.text
              print(output.coloured() if coloured else text)
            sys.stdout.flush()
    except KeyboardInterrupt:
      raise common.StoppedError(
        f"stopped after {self._done} of {self._count} prompts; with --output=FILE the same"
        " command would go on"
      ) from None
    if coloured:
      print(colours.legend_terminal(self.predictor.num_layers), file=sys.stderr)

  def _decode(
    self, prompts: Iterator[Prompt], counter: showing.Counter
  ) -> Iterator[tuple[Sequence[Prompt], Any]]:
    """(prompts, outputs), so many at a time that memory and what a kill costs are bounded."""
    options = self.predictor.options
    batch = options.batch_size * options.num_devices
    most = MOST_BATCHES_REFILLED if options.refill else MOST_BATCHES
    batches = FIRST_BATCHES
    while chunk := list(itertools.islice(prompts, batches * batch)):
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = [p.input for p in chunk]
        outputs = self.predictor.generate(texts, threshold=self.threshold, rule=self._exact)
      self._add(outputs, caught)
      self._sample = (*self._sample, *chunk)[: 2 * batch]
      yield chunk, outputs
      if self.monitored is not None:  # what was served is safe by now
        self.monitored.check(chunk, outputs)
      counter.add(len(chunk), outputs.timing.compile_seconds)
      affordable = int(CHUNK_SECONDS / max(outputs.timing.seconds, 1e-9) * len(chunk) / batch)
      batches = max(1, min(most, 4 * batches, affordable))

  def _add(self, outputs, caught: Sequence[warnings.WarningMessage]) -> None:
    self._done += len(outputs)
    self._tokens += sum(len(output.exit_layers) for output in outputs)
    self._layers += sum(sum(output.exit_layers) for output in outputs)
    self._timing += outputs.timing
    self._passes += sum(output.passes for output in outputs)
    self._drafts += sum(output.drafts for output in outputs)
    self._drafted += sum(sum(output.drafted) for output in outputs)
    if not self._passes:
      rule = self.predictor.served_rule(self.threshold)
      self._costs += costs.totals(self.predictor, outputs, rule)
    self._guarantee = outputs.guarantee
    for warning in caught:
      if isinstance(warning.message, prompt_batches.CutPrompts):
        self._cut.append(warning.message)
      else:
        warnings.warn_explicit(
          warning.message, warning.category, warning.filename, warning.lineno
        )

  def report(self, arguments: argparse.Namespace) -> None:
    """What it took, and the promise."""
    say = lambda text: screen.say(self._console, text)
    if self._cut:
      cut, last = sum(each.cut for each in self._cut), self._cut[-1]
      longest = max(each.longest for each in self._cut)
      say(f"Warning: {prompt_batches.CutPrompts(cut, self._done, longest, last.limit)}")
    timing, layers = self._timing, self.predictor.num_layers
    mean = self._layers / self._tokens if self._tokens else float("nan")
    threshold = thresholds.format_threshold(self.threshold)
    say(
      f"{_count(self._done, 'prompt')}, threshold {threshold},"
      f" {mean:.2f} of {layers} decoder layers a token."
    )
    say(
      f"{timing.seconds:.2f} s: encoder {timing.encode_seconds:.2f} s, decoder"
      f" {timing.decode_seconds:.2f} s ({showing.rate(self._done, timing.seconds)}); besides,"
      f" start-up {self._startup:.1f} s and compilation {timing.compile_seconds:.1f} s"
      f" ({_count(timing.compilations, 'program')})."
    )
    if self._passes:
      say(
        f"{self._tokens / self._passes:.2f} tokens a pass of all layers; of"
        f" {_count(self._drafts, 'draft')} {self._drafted / max(self._drafts, 1):.0%} were"
        " accepted."
      )
    elif self._tokens:
      say(f"Costs by formula, decoder only: {self._costs}.")
    if slow := self._slower():
      say(f"Warning: {slow}")
    if self._exact:
      say("These are the full model's own texts: every token was verified at full depth.")
    elif self.threshold == NEVER_EXIT and not self._guarantee:
      say("This was the full model: there is nothing that a guarantee would be about.")
    else:
      why = self.predictor.elsewhere or _why_none(arguments)
      say(self._guarantee or f"No guarantee: {why}.")
    if self.monitored is not None:
      say(self.monitored.report())

  def _slower(self) -> str:
    """What to say where the calibrated threshold is not faster, measured on these prompts.

    Nothing is measured where the calibration tells: that was said when it was opened.
    """
    calibration = self.predictor.calibration
    if calibration is None or not self._guarantee or self._done < MEASURED_PROMPTS:
      return ""
    if seconds.of(calibration) is not None or not calibration.certified:
      return ""
    from calm import inference

    texts = [prompt.input for prompt in self._sample]
    measured = inference.seconds.measure(
      self.predictor, texts, self.threshold, prompts=4, rounds=3
    )
    return seconds.warning(calibration, measured)


def _count(number: int, thing: str) -> str:
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _calibration(arguments: argparse.Namespace):
  """What `load` is to take: the file, or what it holds where a digest is expected."""
  if arguments.expect_digest is None:
    return arguments.calibration
  if arguments.calibration is None:
    raise ValueError("Expected `--calibration` beside `--expect_digest`, got none.")
  return Calibration.load(arguments.calibration, expect_digest=arguments.expect_digest)


def _why_none(arguments: argparse.Namespace) -> str:
  if arguments.void_guarantee:
    return "--void_guarantee was given"
  if arguments.calibration is None:
    return "nothing was calibrated for these options and this threshold"
  return "the calibration is for another threshold than --threshold"


def _line(prompt: Prompt, output) -> str:
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
  return json.dumps(value, ensure_ascii=False) + "\n"
