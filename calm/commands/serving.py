"""Prompts decoded chunk after chunk: lines or texts as they are made, and what it all took."""

import argparse
import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from calm import exits
from calm.calibrate import NEVER_EXIT, Prompt, seconds, thresholds
from calm.commands import common, monitoring, results
from calm.console import Progress, print_text, rate, sanitize
from calm.data import prompt_batches
from calm.inference.outputs import legend_terminal

# Seconds of full depth are measured beside a calibrated threshold's where the calibration does
# not say them and the prompts are so many that it costs them little.
MEASURED_PROMPTS = 64
# Prompts go to the model so many batches at a time, fewer where that takes too long.
FIRST_BATCHES, MOST_BATCHES, MOST_BATCHES_REFILLED, CHUNK_SECONDS = 4, 16, 64, 10.0


class Served:
  """Decodes chunk after chunk and adds up what there is to report."""

  monitored: monitoring.Monitored | None = None

  def __init__(self, predictor, threshold: float, exact, console, count: int, startup: float):
    from calm.inference import outputs
    from calm.t5 import costs

    self.predictor, self.threshold, self._console = predictor, threshold, console
    self._exact = exact
    self._passes = self._passed = self._drafts = self._drafted = 0
    self._looked, self._given_up = False, ""
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
      print_text(self._console, opened.report)
    try:
      with Progress(self._console) as progress:
        for chunk, outputs in self._decode(pending, progress, opened.done):
          opened.write(chunk, [_line(*pair) for pair in zip(chunk, outputs, strict=True)])
    except KeyboardInterrupt:
      done = f"stopped after {opened.done} of {self._count} prompts; {opened.stopped}"
      raise common.StoppedError(done) from None

  def to_screen(self, prompts: Iterable[Prompt], coloured: bool) -> None:
    """Texts, as they are made."""
    try:
      with Progress(self._console) as progress:
        for _, outputs in self._decode(iter(prompts), progress):
          # The texts would be printed into the bar.
          with progress.hidden() if sys.stdout.isatty() else contextlib.nullcontext():
            for output in outputs:
              text = sanitize(output.text) if sys.stdout.isatty() else output.text
              print(output.coloured() if coloured else text)
            sys.stdout.flush()
    except KeyboardInterrupt:
      raise common.StoppedError(
        f"stopped after {self._done} of {self._count} prompts; with --output=FILE the same"
        " command would go on"
      ) from None
    if coloured:
      print(legend_terminal(self.predictor.num_layers), file=sys.stderr)

  def _decode(
    self, prompts: Iterator[Prompt], progress: Progress, done: int = 0
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
      if isinstance(self._exact, exits.Verified) and self._count >= MEASURED_PROMPTS:
        self._look_at_drafts(self._exact)
      if self.monitored is not None:  # what was served is safe by now
        self.monitored.check(chunk, outputs)
      progress.count("prompts")(done + self._done, self._count)
      affordable = int(CHUNK_SECONDS / max(outputs.timing.seconds, 1e-9) * len(chunk) / batch)
      batches = max(1, min(most, 4 * batches, affordable))

  def _look_at_drafts(self, rule: exits.Verified) -> None:
    """Goes on without drafts where full depth by itself was measured to be faster, once."""
    from calm import inference

    if self._looked or not self._drafts:  # without drafts both would be full depth
      return
    texts = [prompt.input for prompt in self._sample]
    found = inference.timing.exact_beside_full_depth(self.predictor, texts, rule)
    self._looked = True
    if found is not None and found.speedup < 1:
      self._exact = exits.StaticExit()
      self._given_up = (
        f" Drafts made it x{found.speedup:.2f} as fast as full depth by itself, so that they"
        f" were given up after {_count(self._done, 'prompt')}."
      )

  def _why_no_drafts(self) -> str:
    size = self.predictor.options.batch_size
    if self._drafts or not self._passes or size == 1:
      return ""
    return (
      f" No draft was made: in batches of {size} a pass over several positions costs about as"
      " much as so many steps. --batch_size=1 makes drafts where they are worth it."
    )

  def _add(self, outputs, caught: Sequence[warnings.WarningMessage]) -> None:
    self._done += len(outputs)
    self._tokens += sum(len(output.exit_layers) for output in outputs)
    self._layers += sum(sum(output.exit_layers) for output in outputs)
    self._timing += outputs.timing
    self._passes += sum(output.passes for output in outputs)
    # Not those that were decoded after drafts were given up.
    self._passed += sum(len(output.tokens) for output in outputs if output.passes)
    self._drafts += sum(output.drafts for output in outputs)
    self._drafted += sum(sum(output.drafted) for output in outputs)
    if not self._passes:
      rule = self.predictor.served_rule(self.threshold)
      self._costs += self.predictor.total_costs(outputs, rule)
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
    say = lambda text: print_text(self._console, text)
    if self._cut:
      cut, last = sum(each.cut for each in self._cut), self._cut[-1]
      longest = max(each.longest for each in self._cut)
      part = any(each.part for each in self._cut)
      said = prompt_batches.CutPrompts(cut, self._done, longest, last.limit, part)
      say(f"Warning: {said}")
    timing, layers = self._timing, self.predictor.num_layers
    mean = self._layers / self._tokens if self._tokens else float("nan")
    threshold = thresholds.format_threshold(self.threshold)
    say(
      f"{_count(self._done, 'prompt')}, threshold {threshold},"
      f" {mean:.2f} of {layers} decoder layers a token."
    )
    say(
      f"{timing.seconds:.2f} s: encoder {timing.encode_seconds:.2f} s, decoder"
      f" {timing.decode_seconds:.2f} s ({rate(self._done, timing.seconds)}); besides,"
      f" start-up {self._startup:.1f} s and compilation {timing.compile_seconds:.1f} s"
      f" ({_count(timing.compilations, 'program')})."
    )
    if self._drafts:
      say(
        f"{self._passed / self._passes:.2f} tokens a pass of all layers; of"
        f" {_count(self._drafts, 'draft')} {self._drafted / max(self._drafts, 1):.0%} were"
        " accepted."
      )
    elif self._tokens and not self._passes:
      say(f"Costs by formula, decoder only: {self._costs}.")
    self._say_seconds(say)
    if self._exact:
      said = "These are the full model's own texts: every token was verified at full depth."
      say(f"{said}{self._given_up or self._why_no_drafts()}")
    elif self.threshold == NEVER_EXIT and not self._guarantee:
      say("This was the full model: there is nothing that a guarantee would be about.")
    else:
      why = self.predictor.platform_mismatch or _why_none(arguments)
      say(self._guarantee or f"No guarantee: {why}.")
    if self.monitored is not None:
      say(self.monitored.report())

  def _say_seconds(self, say: Callable[[str], None]) -> None:
    """The calibrated threshold beside full depth, and a warning where it is not faster.

    Nothing is measured where the calibration tells, whose warning came when it was opened.
    """
    calibration = self.predictor.calibration
    if calibration is None or not self._guarantee or not calibration.certified:
      return
    noted = seconds.of(calibration)
    if noted is not None:
      say(f"Decoder beside full depth, as measured with the calibration: {noted.told}.")
    elif self._done >= MEASURED_PROMPTS:
      found = self._measured()
      say(f"Decoder beside full depth, measured on some of these prompts: {found.told}.")
      if slow := seconds.warning(calibration, found):
        say(f"Warning: {slow}")

  def _measured(self) -> seconds.Seconds:
    from calm import inference

    texts = [prompt.input for prompt in self._sample]
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)  # said above, of all prompts
      return inference.timing.beside_full_depth(
        self.predictor, texts, self.threshold, prompts=4, rounds=3
      )


def _count(number: int, thing: str) -> str:
  return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


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
