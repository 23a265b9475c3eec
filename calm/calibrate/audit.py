"""A watch on a deployed threshold: an alarm, valid at any time, when the risk is too high.

A coin decides for every served prompt whether the full model runs on it too. The coin knows a
seed and the prompt's number, nothing of its text or output. From the losses of sampled prompts
a gambler bets that the risk is above the tolerance:

    wealth = product of (1 + bet_i (loss_i - tolerance))
    0 <= bet_i <= 0.5 / (tolerance - lower)

As long as E[loss_i | past] <= tolerance, wealth is a nonnegative supermartingale: it ever
reaches 1 / alarm_level with probability at most alarm_level (Ville 1939). Losses count in the
order of serving, however late they come: an order of arrival could depend on the losses.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from calm.calibrate.generations import files
from calm.calibrate.generations import records as records_lib
from calm.calibrate.losses import metrics
from calm.calibrate.losses.sequence_losses import Support

SCHEMA_VERSION = 1
_CAP_SHARE = 0.5
# Bets remember about this many losses, so that a good old time does not hide a bad new one.
_MEMORY = 200


@dataclasses.dataclass(frozen=True)
class Watch:
  """What is watched; fixed for the life of one state file.

  Attributes:
    tolerance: the risk that is promised, in (lower, 1).
    alarm_level: probability of a false alarm, ever, in (0, 1).
    sampling_rate: share of served prompts that are checked, in (0, 1].
    seed: of the coin.
    support: declared range of the loss; only its lower bound matters.
    kind: what the loss is; 'risk_signed' needs references, which may arrive later.
    calibration_digest: of the calibration that made the promise, for the record.
  """

  tolerance: float
  alarm_level: float
  sampling_rate: float
  seed: str
  support: Support = dataclasses.field(default_factory=Support)
  kind: str = "textual"
  calibration_digest: str | None = None

  def __post_init__(self):
    low, high = self.support.lower, self.support.upper
    for name, value, least, most in (
      ("tolerance", self.tolerance, low, high),
      ("alarm_level", self.alarm_level, 0.0, 1.0),
      ("sampling_rate", self.sampling_rate, 0.0, math.nextafter(1.0, 2.0)),
    ):
      if not least < value < most:
        raise ValueError(f"`{name}` must be in ({least:.4g}, {most:.4g}), got {value!r}.")

  def sampled(self, number: int) -> bool:
    """The coin of the served prompt of that number: the same everywhere, blind to text."""
    digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < self.sampling_rate * 2.0**64

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Wealth:
  """State of the bets after some losses.

  Attributes:
    count: losses seen.
    log_wealth: nats.
    highest: largest log wealth so far.
    mean: running mean with a memory.
    square: running mean of squared losses.
  """

  count: int = 0
  log_wealth: float = 0.0
  highest: float = 0.0
  mean: float = 0.0
  square: float = 0.25

  def bet(self, watch: Watch) -> float:
    """The next bet; from earlier losses alone."""
    gain = self.mean - watch.tolerance
    spread = max(self.square - self.mean**2, 0.0) + gain**2
    cap = _CAP_SHARE / (watch.tolerance - watch.support.lower)
    return min(max(gain, 0.0) / max(spread, 1e-12), cap)

  def after(self, loss: float, watch: Watch) -> "Wealth":
    """The state after one more loss."""
    wealth = self.log_wealth + math.log(1.0 + self.bet(watch) * (loss - watch.tolerance))
    weight = 1.0 / min(self.count + 2, _MEMORY)
    return Wealth(
      count=self.count + 1,
      log_wealth=wealth,
      highest=max(self.highest, wealth),
      mean=self.mean + weight * (loss - self.mean),
      square=self.square + weight * (loss**2 - self.square),
    )


class Monitor:
  """Keeps one watch in an append-only file; made by `open_monitor`.

  if monitor.check(texts, full_model): ...  # textual losses: served outputs, batch by batch

  number, sampled = monitor.serve()         # any loss: for every served prompt
  if sampled: monitor.record(number, loss)  # now or later
  if monitor.alarm: ...
  """

  def __init__(self, path: pathlib.Path, watch: Watch):
    self.path = path
    self.watch = watch
    self.wealth = Wealth()
    self._served = 0
    self._waiting: list[int] = []
    self._losses: dict[int, float] = {}

  @property
  def served(self) -> int:
    """Prompts served so far."""
    return self._served

  @property
  def waiting(self) -> tuple[int, ...]:
    """Numbers of sampled prompts whose losses have not arrived or wait for earlier ones.

    A loss that will never come (a run was killed between `serve` and `record`) holds up all
    later ones. Record it as the lowest declared loss: that makes no false alarm more likely.
    """
    return tuple(self._waiting)

  @property
  def alarm(self) -> bool:
    """Whether the risk has been shown, at any time, to exceed the tolerance."""
    return self.wealth.highest >= math.log(1.0 / self.watch.alarm_level)

  @property
  def p_value(self) -> float:
    """Anytime p-value of "the risk is at most the tolerance"."""
    return math.exp(-self.wealth.highest)

  def serve(self) -> tuple[int, bool]:
    """Counts a served prompt.

    Returns:
      (its number, whether the full model should run on it too).
    """
    number = self._served
    check = self.watch.sampled(number)
    self._write({"served": number, "sampled": check})
    self._count(number, check)
    return number, check

  def record(self, number: int, loss: float) -> bool:
    """Takes the loss of a sampled prompt.

    Args:
      number: what `serve` returned.
      loss: in the declared range.

    Returns:
      `alarm`.

    Raises:
      ValueError: the prompt was not sampled or has a loss already, or the loss leaves its
        range.
    """
    self._check(number, loss)
    self._write({"number": number, "loss": float(loss)})
    self._settle(number, float(loss))
    return self.alarm

  def check(
    self,
    predictions: Sequence[str],
    full_model: Callable[[list[int]], Sequence[str]],
    metric: str | metrics.Metric = "rouge_l",
  ) -> bool:
    """Counts served outputs, re-runs the full model on some, and bets on how they differ.

        loss = 1 - metric(served, [full model's])   (Def. 1), of the prompts that the coin picks

    For a risk against references, which come later, use `serve` and `record`.

    Args:
      predictions: [num_prompts] texts as served, in that order.
      full_model: positions in `predictions` -> the full model's texts of those prompts; called
        once, or not at all.
      metric: registry name, import path or `Metric`.

    Returns:
      `alarm`.

    Raises:
      ValueError: the watch is on another kind of loss, or `full_model` returns another number
        of texts than it was asked for.
    """
    if self.watch.kind != "textual":
      raise ValueError(
        f"`check` computes textual losses, the watch is on {self.watch.kind!r}: use `serve` and"
        " `record`."
      )
    metric = metrics.get_metric(metric)
    numbers = [self.serve() for _ in predictions]
    rows = [row for row, (_, sampled) in enumerate(numbers) if sampled]
    texts = full_model(rows) if rows else []
    if len(texts) != len(rows):
      raise ValueError(
        f"`full_model` must return a text for each of the {len(rows)} positions, got"
        f" {len(texts)}. The prompts wait for their losses: `waiting`."
      )
    for row, text in zip(rows, texts, strict=True):
      self.record(numbers[row][0], 1.0 - metric(predictions[row], [text]))
    return self.alarm

  def _check(self, number: int, loss: float) -> None:
    low, high = self.watch.support.lower, self.watch.support.upper
    if number not in self._waiting or number in self._losses:
      raise ValueError(f"`number` must be a sampled prompt without a loss, got {number!r}.")
    if not low <= loss <= high:
      raise ValueError(f"`loss` must lie in the declared range [{low}, {high}], got {loss!r}.")

  def _count(self, number: int, check: bool) -> None:
    self._served = number + 1
    if check:
      self._waiting.append(number)

  def _settle(self, number: int, loss: float) -> None:
    self._losses[number] = loss
    while self._waiting and self._waiting[0] in self._losses:
      self.wealth = self.wealth.after(self._losses.pop(self._waiting.pop(0)), self.watch)

  def _write(self, value: dict[str, Any]) -> None:
    files.append(self.path, records_lib.dump_line(value).encode("utf-8"))

  def _replay(self, line: records_lib.Line) -> None:
    value = line.value
    try:
      if "served" in value:
        if value["served"] != self._served:
          raise ValueError(f"expected prompt {self._served}")
        self._count(value["served"], bool(value["sampled"]))
      else:
        self._check(value["number"], value["loss"])
        self._settle(value["number"], value["loss"])
    except (KeyError, TypeError, ValueError) as error:
      raise line.error(f"no line of a monitor: {error}.") from error

  def __repr__(self) -> str:
    return (
      f"Monitor({self._served} served, {self.wealth.count} checked, wealth"
      f" {math.exp(self.wealth.log_wealth):.4g}, alarm at {1.0 / self.watch.alarm_level:.4g}:"
      f" {'ALARM' if self.alarm else 'quiet'})"
    )


def open_monitor(path: str | pathlib.Path, watch: Watch) -> Monitor:
  """Starts a monitor, or goes on with the one whose state the file holds.

  Args:
    path: append-only JSON Lines file; a line cut off by a kill is dropped.
    watch: what is watched; must be that of the file.

  Returns:
    A `Monitor` with everything that the file says already counted.

  Raises:
    GenerationsError: the file is damaged or of another watch; the message names file and line.
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  monitor = Monitor(path, watch)
  if not path.exists() or not path.stat().st_size:
    monitor._write(watch.to_json())
    return monitor
  records_lib.drop_partial_line(path)
  lines = records_lib.read_lines(path)
  first = next(lines, None)
  expected = json.loads(json.dumps(watch.to_json()))
  if first is None or first.value != expected:
    got = None if first is None else first.value
    raise records_lib.GenerationsError(
      f"{path}:1: holds another watch: expected {expected}, got {got}. Start a new file."
    )
  for line in lines:
    monitor._replay(line)
  return monitor
