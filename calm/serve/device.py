"""The threads that own the device: a bounded queue of prompts, batches of
compiled shapes.
"""

import collections
import dataclasses
import functools
import math
import os
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import exits, inference
from calm.calibrate import NEVER_EXIT, Online, clusters, thresholds
from calm.console import Progress, print_text
from calm.data import prompt_batches
from calm.decode import program
from calm.inference import grid, outputs
from calm.serve import stops
from calm.t5 import platforms

FIRST_TOKENS = 8  # of a batch that is timed before it serves
# seconds of a part of a stream; the first is a token where texts last longer
PART = 0.02
LEAST_GAIN = 1.15  # of texts a second, by twice as many threads
# last prompts that there was no time yet to draw from for checks
MOST_UNCHECKED = 100
MOST_POINTS = 1000  # of the page's history
FULL_DEPTH = "The full model is used; no guarantee is needed."
NOTHING = outputs.Output("", (), (), (), (), (), 0.0, 0)


@dataclasses.dataclass(frozen=True)
class Part:
  """What is known of a prompt's output."""

  output: outputs.Output = NOTHING  # so far
  text: str = ""  # what the client may have of it; it stays, whatever comes
  reason: str | None = None  # why it ended: 'stop', 'length' or 'stop_sequence'
  threshold: float = NEVER_EXIT
  guarantee: str | None = None
  seconds: float = 0.0  # since its batch began


@dataclasses.dataclass(eq=False)
class Job:
  """One prompt; `tokens` have task prefix and EOS, `threshold` None is the
  served one.
  """

  prompt: str
  tokens: Sequence[int]
  threshold: float | None
  limit: int  # most tokens
  stop: Sequence[str]  # texts that end the output, which is cut before them
  stream: bool = False  # parts are wanted before the end
  # Called in a thread of the device, at last with what went wrong, if something
  # did.
  deliver: Callable[[Part | Exception], None] = lambda part: None
  gone: bool = False  # nobody waits any more

  def visible(
    self, output: outputs.Output, text: str
  ) -> tuple[str, str | None]:
    """The text that the client may have after `text`, and why it ended, if it
    has.
    """
    whole = output.text
    ends = output.tokens[-1:] == (output.eos_id,)
    end = stops.find_stop(whole, self.stop)
    if end is not None:
      return whole[:end], "stop_sequence"
    if ends or len(output.tokens) >= self.limit:
      return whole, "stop" if ends else "length"
    # a character may lack bytes, a space its word
    whole = whole.rstrip("\ufffd ")
    whole = whole[: len(whole) - stops.held_back(whole, self.stop)]
    return whole if whole.startswith(text) else text, None


class Device(threading.Thread):
  """Decodes what is submitted.

  Args:
    threshold: what is served without `online`, a state that calibrates while it
      serves.
    most_waiting: prompts that may wait.
    console: where reports go.
    ended: called where a thread ended by an error, `failed`.
    workers: threads that decode at the same time; None: as many as were
      measured to pay.
  """

  def __init__(
    self,
    model: inference.Predictor,
    threshold: float = NEVER_EXIT,
    online: Online | None = None,
    most_waiting: int = 64,
    console: rich_console.Console | None = None,
    ended: Callable[[], None] = lambda: None,
    workers: int | None = None,
  ):
    super().__init__(name="device", daemon=True)
    self.model = model
    self.online = online
    self.most_waiting = most_waiting
    # 0: not measured yet
    self.workers = workers or 0
    self._checking = False
    self._threshold = threshold
    self._ended = ended
    self._console = console or rich_console.Console(quiet=True)
    self.say = functools.partial(print_text, self._console, soft_wrap=True)
    # (programs that are compiled, of how many)
    self.ready = False
    self.compiled = (0, 1)
    self.failed: BaseException | None = None
    # (served prompts, threshold, layers a token) of the last batches.
    self.history = collections.deque[tuple[int, float, float]](
      maxlen=MOST_POINTS
    )
    self.waiting: list[Job] = []
    self._unchecked = collections.deque[str](maxlen=MOST_UNCHECKED)
    self._stopping = False
    self._condition = threading.Condition()
    # of the first tokens, by shape
    self._seconds: dict[tuple[int, int], float] = {}
    # Seconds of the last batches, by their shape and whether they were at full
    # depth.
    self._spent = collections.defaultdict(
      lambda: collections.deque[float](maxlen=20)
    )
    options = model.options
    most = model.options.max_input_length
    # A batch's shape may be part of the procedure; not of an encoder in 8 bits
    # that packs: its prompts get what they get alone.
    self._whole = model.batch_size_affects_output
    size = options.batch_size
    if self._whole and model.packs:
      self._whole, size = (
        size > 1,
        max(size, inference.DecodeOptions.batch_size),
      )
    self._sizes = (
      (size,) if self._whole else tuple(sorted({1, max(1, size // 2), size}))
    )
    # Rows of a batch that is decoded in one go; none where texts come in
    # stages.
    self._alone = (
      1 if len(program.stage_lengths(options.max_decode_length)) == 1 else 0
    )
    self._lengths = [
      *(b for b in prompt_batches.INPUT_BUCKETS if b < most),
      most,
    ]

  @property
  def threshold(self) -> float:
    """What prompts without a threshold of their own are decoded with."""
    return self._threshold if self.online is None else self.online.threshold

  def guarantee(self, threshold: float) -> str | None:
    """What holds of texts at a threshold; None: nothing."""
    if threshold == NEVER_EXIT:
      return FULL_DEPTH
    made = self.online or (
      None if self.model.platform_mismatch else self.model.calibration
    )
    return (
      made.guarantee
      if made is not None and made.threshold == threshold
      else None
    )

  def submit(self, jobs: Sequence[Job]) -> bool:
    """Queues prompts, unless there is no room for all of them; whether there
    was.
    """
    with self._condition:
      self.waiting = [job for job in self.waiting if not job.gone]
      if self._stopping or len(self.waiting) + len(jobs) > self.most_waiting:
        return False
      self.waiting += jobs
      self._condition.notify(len(jobs))
      return True

  def stop(self) -> None:
    """Lets the threads end with the queue, or between two programs; `join`
    waits for them.
    """
    with self._condition:
      self._stopping = True
      self._condition.notify_all()

  def run(self) -> None:
    self._guarded(self._compile)
    with futures.ThreadPoolExecutor(self.workers or 1) as pool:
      for _ in range(self.workers):
        pool.submit(self._guarded, self._work)

  def _guarded(self, work: Callable[[], None]) -> None:
    try:
      work()
    except BaseException as error:
      self.failed = error
      self.ready = False
      self.stop()
      self._ended()

  def _work(self) -> None:
    while self.ready and (batch := self._next()) is not None:
      if batch:
        self._serve(batch)
      else:
        self._check(self._unchecked.popleft())
        self._checking = False

  def _compile(self) -> None:
    """Runs every program once, on prompts without text."""
    if self.online is not None:
      self.online.give_up()
    model = self.model
    full = self.model.reference
    start = time.monotonic()
    shapes = [
      (size, length) for length in self._lengths for size in self._sizes
    ]
    with Progress(self._console) as progress:
      for number, shape in enumerate(shapes):
        batch = self._batch([], *shape)
        for made, level in ((full, NEVER_EXIT), (model, 1.0)):
          if self._stopping:
            return
          for rule in (
            set(self._rules(level)) if len(batch.tokens) == self._alone else ()
          ):
            made.expect_drafts()
            made.decode(made.encode(batch), batch.active, level, rule)
          run = functools.partial(self._begin, made, batch, level)
          run(0)
          spent = timeit.repeat(run, number=1, repeat=3)
          self._seconds[shape] = min(spent)
        if self.online is not None and len(batch.tokens) == 1:
          model.resume(
            model.encode(batch), None, batch.active, 1.0, np.zeros(1)
          )
        self.compiled = number + 1, len(shapes)
        progress.count("shapes of batches")(*self.compiled)
    middle = self._lengths[len(self._lengths) // 2]
    batches = [
      self._batch([], size, middle)
      for size in {self._sizes[0], self._sizes[-1]}
    ]
    begins = (
      functools.partial(self._begin, model, batch, 1.0) for batch in batches
    )
    self.workers = self.workers or max(map(workers_that_pay, begins))
    self.ready = True
    level = thresholds.format_threshold(self.threshold)
    spent = (
      f"programs took {time.monotonic() - start:.1f} s, decoding threads "
      f"{self.workers}"
    )
    self.say(f"Ready: {spent}; threshold {level}.")
    self.say(
      self.guarantee(self.threshold) or "No guarantee: nothing was calibrated."
    )

  def _begin(
    self,
    model: inference.Predictor,
    batch,
    level: float,
    count: int = FIRST_TOKENS,
  ):
    given = model.encode(batch), batch.active, level, self._rules(level)[0]
    collections.deque(model.stream(*given, ends=[count]), maxlen=0)

  def _next(self) -> list[Job] | None:
    """The next batch; [] where there is time for a check, None at the end."""

    def due() -> bool:
      self.waiting = [job for job in self.waiting if not job.gone]
      return bool(
        self.waiting
        or self._stopping
        or (self._unchecked and not self._checking)
      )

    with self._condition:
      self._condition.wait_for(due)
      if not self.waiting:
        if self._stopping:
          return None
        self._checking = True
        return []
      first = self.waiting[0]
      length = self._length(self.waiting[0])
      lengths = (
        {length}
        if self._whole
        else {n for n in self._lengths if n <= 2 * length}
      )

      def near(job):
        return job.threshold == first.threshold and self._length(job) in lengths

      batch = [job for job in self.waiting if near(job)][: self._sizes[-1]]

      # Few may take less one after another.
      def each(size):
        return self._expected(first, size) / min(size, len(batch))

      batch = batch[
        : min((n for n in self._sizes if n <= self._size(batch)), key=each)
      ]
      self.waiting = [job for job in self.waiting if job not in batch]
      return batch

  def _expected(self, first: Job, size: int) -> float:
    """Seconds of a batch that begins with this prompt, by those served, as one
    lasts as long as its longest text, and by the first tokens, which last less:
    every size is tried.
    """
    length = self._length(first)
    full = self._level(first) == NEVER_EXIT
    begun = self._seconds.get((size, length), math.inf)
    seconds = sorted([begun, *self._spent[size, length, full]])
    # The slowest tenth may have waited for the machine: one pause is worth ten
    # batches.
    return float(np.mean(seconds[: max(1, len(seconds) * 9 // 10)]))

  def _level(self, job: Job) -> float:
    return self.threshold if job.threshold is None else job.threshold

  def _size(self, jobs: Sequence[Job]) -> int:
    return next(size for size in self._sizes if size >= len(jobs))

  def _length(self, job: Job) -> int:
    return prompt_batches.bucket_length(len(job.tokens), self._lengths[-1])

  def _batch(
    self, jobs: Sequence[Job], size: int, length: int
  ) -> prompt_batches.PromptBatch:
    tokens = np.zeros((size, length), np.int32)
    for row, job in enumerate(jobs):
      tokens[row, : len(job.tokens)] = job.tokens
    tokens[len(jobs) :, : 1 if jobs else length] = self.model.eos_id
    active = np.arange(size) < (len(jobs) or size)
    return prompt_batches.PromptBatch(np.arange(len(jobs)), tokens, active)

  def _rules(self, level: float) -> tuple[exits.Rule | None, exits.Rule | None]:
    """Of a batch, and of a prompt alone: drafts, where they were measured to be
    faster.
    """
    full = exits.StaticExit()
    return (
      (full, self.model.exact or full) if level == NEVER_EXIT else (None, None)
    )

  def _serve(self, batch: Sequence[Job]) -> None:
    start = time.perf_counter()
    level = self._level(batch[0])
    guarantee = self.guarantee(level)
    layers = []
    try:
      for job, output, text, reason in self._decode(batch, level):
        spent = time.perf_counter() - start
        job.deliver(Part(output, text, reason, level, guarantee, spent))
        layers += output.exit_layers if reason else ()
    except Exception as error:
      for job in batch:
        job.deliver(error)
      return
    kind = self._size(batch), self._length(batch[0]), level == NEVER_EXIT
    self._spent[kind].append(time.perf_counter() - start)
    if self.online is not None and batch[0].threshold is None:
      with self._condition:
        served = len(batch) + (self.history[-1][0] if self.history else 0)
        self.history.append((served, level, sum(layers) / max(1, len(layers))))
        self._unchecked += [job.prompt for job in batch]

  def _decode(
    self, jobs: Sequence[Job], level: float
  ) -> Iterator[tuple[Job, outputs.Output, str, str | None]]:
    """(job, output, text, reason) of rows that end, and of parts of those that
    are streamed.
    """
    model = self.model.reference if level == NEVER_EXIT else self.model
    size = self._size(jobs)
    batch = self._batch(jobs, size, max(map(self._length, jobs)))
    encoded, (rule, alone) = model.encode(batch), self._rules(level)
    ends = [limit := max(job.limit for job in jobs)]
    # A text that a stop text may end is looked at as it is made.
    if any(job.stream or job.stop for job in jobs):
      every = max(
        1, round(FIRST_TOKENS * PART / self._seconds[batch.tokens.shape])
      )
      begin = 1 if self._expected(jobs[0], size) > PART else every
      ends = [*range(begin, limit, every), limit]
    if size == self._alone and ends == [model.options.max_decode_length]:
      parts = iter([model.decode(encoded, batch.active, level, alone)])
    else:
      parts = model.stream(encoded, batch.active, level, rule, ends=ends)
    left = dict.fromkeys(range(len(jobs)), "")
    for made in parts:
      for row, before in list(left.items()):
        job = jobs[row]
        within = made.exit_layers * (
          np.arange(made.exit_layers.shape[1]) < job.limit
        )
        output = model.output(
          dataclasses.replace(made, exit_layers=within), row
        )
        left[row], reason = job.visible(output, before)
        if reason == "stop_sequence":
          decode = self.model.vocabulary.decode
          output = stops.cut_output(output, job.stop, decode)
        if reason or job.stream:
          yield job, output, left[row], reason
        if reason or job.gone:
          del left[row]
      if not left:
        return

  def _check(self, prompt: str) -> None:
    """Decodes a prompt, if it is drawn, at full depth and at every open
    threshold.
    """
    assert self.online is not None
    try:
      if self.online.should_check(name := clusters.fold_text(prompt)):
        grid.observe(self.model, self.online, {name: prompt})
    except Exception as error:  # no reason to stop serving
      self.say(f"A check failed: {type(error).__name__}: {error}")


def workers_that_pay(decode: Callable[[], Any]) -> int:
  """Threads that give the most texts a second together, at most one a core:
  products of a small model keep one core busy, those of a larger one keep them
  all. `decode` decodes a batch.
  """
  most = os.cpu_count() or 1 if platforms.is_cpu() else 1
  count = 1
  with futures.ThreadPoolExecutor(most) as pool:

    def run(count):
      return futures.wait([pool.submit(decode) for _ in range(count)])

    def seconds(count):
      return timeit.timeit(functools.partial(run, count), number=1)

    def turns(n):
      return range(max(3, min(20, round(1.0 / seconds(n)))))

    def gain(n):
      return np.median([2.0 * seconds(n) / seconds(2 * n) for _ in turns(n)])

    while 2 * count <= most and gain(count) >= LEAST_GAIN:
      count *= 2
  return count
