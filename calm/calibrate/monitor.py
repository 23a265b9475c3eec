"""A monitor of a deployed threshold: an alarm, valid at any time, when the risk is too high.

A hash of its id decides for every served prompt whether the full model runs on it too. From the
losses of sampled prompts gamblers bet that the risk is above the tolerance; one begins at every
loss, so that a change is seen soon after a long good time as well:

    wealth = sum over k of weight_k product over i >= k of (1 + bet_i (loss_i - tolerance))
    0 <= bet_i <= 0.5 / (tolerance - lower),   weight_0 about 1/2, weight_k ~ 1 / (k log(k)^2)

As long as E[loss_i | past] <= tolerance, wealth is a nonnegative supermartingale that starts at
1: it ever reaches 1 / alarm_level with probability at most alarm_level (Ville 1939). Losses
count in the order of serving, however late they come: an order of arrival could depend on them.
An id is bet on once: a prompt that is served again is no independent draw.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from calm import arguments, storage
from calm.calibrate import metrics
from calm.calibrate.generations import records as records_lib
from calm.calibrate.losses import Support

# Version 1 had the first gambler alone; its files go on so.
SCHEMA_VERSION = 2
_CAP_SHARE = 0.5
# Bets remember about this many losses, so that a good old time does not hide a bad new one.
_MEMORY = 200
# Of the weight, what is left for gamblers who do not begin at once.
_LATE_SHARE = 0.75


@arguments.checked()
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
  seed: str | int
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
        raise ValueError(
          f"Expected `{name}` to be in ({least:.4g}, {most:.4g}), got {value!r}."
        )

  def sampled(self, name: int | str) -> bool:
    """The coin of the prompt of that number or id: the same everywhere, blind to text."""
    return int(self.mark(name), 16) < self.sampling_rate * 2.0**64

  def mark(self, name: int | str) -> str:
    """16 hexadecimal digits of SHA-256 by which the file knows that number or id."""
    named = f"{self.seed}/{name}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(named).hexdigest()[:16]

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Wealth:
  """State of the bets after some losses.

  Attributes:
    count: losses seen.
    log_started: log wealth of the gamblers who have begun, nats.
    highest: largest log wealth so far.
    mean: running mean of about the last 200 losses.
    square: running mean of their squares.
    restarts: whether gamblers begin after the first loss too.
  """

  count: int = 0
  log_started: float = -math.inf
  highest: float = 0.0
  mean: float = 0.0
  square: float = 0.25
  restarts: bool = True

  @property
  def log_wealth(self) -> float:
    """Nats; of all gamblers, those who are still to begin included."""
    return _log_add(self.log_started, _log_waiting(self.count, self.restarts))

  def bet(self, watch: Watch) -> float:
    """The next bet; from earlier losses alone."""
    gain = self.mean - watch.tolerance
    spread = max(self.square - self.mean**2, 0.0) + gain**2
    cap = _CAP_SHARE / (watch.tolerance - watch.support.lower)
    return min(max(gain, 0.0) / max(spread, 1e-12), cap)

  def after(self, loss: float, watch: Watch) -> "Wealth":
    """The state after one more loss."""
    factor = math.log(1.0 + self.bet(watch) * (loss - watch.tolerance))
    started = _log_add(self.log_started, _log_weight(self.count, self.restarts)) + factor
    wealth = _log_add(started, _log_waiting(self.count + 1, self.restarts))
    weight = 1.0 / min(self.count + 2, _MEMORY)
    return dataclasses.replace(
      self,
      count=self.count + 1,
      log_started=started,
      highest=max(self.highest, wealth),
      mean=self.mean + weight * (loss - self.mean),
      square=self.square + weight * (loss**2 - self.square),
    )


def _log_waiting(count: int, restarts: bool) -> float:
  """log of the weight of all gamblers who begin at loss `count` or later: 1 at 0."""
  if count == 0:
    return 0.0
  return (
    math.log(_LATE_SHARE * math.log(2.0) / math.log(count + 2.0)) if restarts else -math.inf
  )


def _log_weight(count: int, restarts: bool) -> float:
  """log of the weight of the gambler who begins at loss `count`: what is waiting less."""
  if not restarts:
    return 0.0 if count == 0 else -math.inf
  late = _LATE_SHARE * math.log(2.0) * math.log1p(1.0 / (count + 2.0))
  late /= math.log(count + 2.0) * math.log(count + 3.0)
  return math.log(1.0 - _LATE_SHARE + late if count == 0 else late)


def _log_add(first: float, second: float) -> float:
  high, low = max(first, second), min(first, second)
  return high if low == -math.inf else high + math.log1p(math.exp(low - high))


class Monitor:
  """Keeps one watch in an append-only file; made by `open_monitor`.

  if monitor.check(texts, full_model): ...  # textual losses: served outputs, batch by batch

  number, sampled = monitor.serve()         # any loss: for every served prompt
  if sampled: monitor.record(number, loss)  # now or later
  if monitor.alarm: ...
  """

  def __init__(self, path: pathlib.Path, watch: Watch, lock: storage.Lock | None = None):
    self.path = path
    self.watch = watch
    self.wealth = Wealth()
    self._lock = lock
    self._served = self._repeated = 0
    self._marks: set[str] = set()
    self._waiting: list[int] = []
    self._losses: dict[int, float] = {}

  @property
  def served(self) -> int:
    """Prompts served so far."""
    return self._served

  @property
  def repeated(self) -> int:
    """Served prompts that the coin picked and whose ids had been bet on before."""
    return self._repeated

  @property
  def waiting(self) -> tuple[int, ...]:
    """Numbers of sampled prompts whose losses have not arrived or wait for earlier ones.

    Record a loss that will never come (a run was killed) as the lowest declared loss: that
    makes no false alarm more likely.
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

  @arguments.checked()
  def serve(self, name: str | int | None = None) -> tuple[int, bool]:
    """Counts a served prompt.

    Args:
      name: its id, by which the coin picks it, once; None takes its number, so that a prompt
        that is served again is bet on again, which makes false alarms.

    Returns:
      (its number, whether the full model should run on it too).
    """
    number = self._served
    check = self.watch.sampled(number if name is None else name)
    value: dict[str, Any] = {"served": number, "sampled": check}
    if check and name is not None:
      value["name"] = self.watch.mark(name)
      value["sampled"] = check = value["name"] not in self._marks
    self._write(value)
    self._count(value)
    return number, check

  @arguments.checked()
  def record(self, number: int, loss: float) -> bool:
    """Takes the loss, in the declared range, of a sampled prompt; returns `alarm`.

    Raises:
      ValueError: the prompt was not sampled or has a loss already, or the loss leaves its
        range.
    """
    self._check(number, loss)
    self._write({"number": number, "loss": float(loss)})
    self._settle(number, float(loss))
    return self.alarm

  @arguments.checked()
  def check(
    self,
    predictions: Sequence[str],
    full_model: Callable[[list[int]], Sequence[str]],
    metric: metrics.MetricLike = "rouge_l",
    names: Sequence[str | int] | None = None,
  ) -> bool:
    """Counts served outputs, runs the full model on some, and bets on how they differ.

        loss = 1 - metric(served, [full model's])   (Def. 1), of the prompts that the coin picks

    For a risk against references, which come later, use `serve` and `record`.

    Args:
      predictions: [num_prompts] texts as served, in that order.
      full_model: positions in `predictions` -> the full model's texts of those prompts; called
        once, or not at all.
      metric: registry name, import path, function or `Metric`.
      names: [num_prompts] ids by which the coin picks, each once; None takes numbers.

    Returns:
      `alarm`.

    Raises:
      ValueError: the watch is on another kind of loss, or `full_model` returns another number
        of texts than it was asked for.
    """
    if self.watch.kind != "textual":
      raise ValueError(
        "Expected `check`, which computes textual losses, of a watch on these, got one on"
        f" {self.watch.kind!r}; use `serve` and `record`."
      )
    metric = metrics.get_metric(metric)
    named = [None] * len(predictions) if names is None else names
    if len(named) != len(predictions):
      raise ValueError(
        f"Expected `names` for each of the {len(predictions)} predictions, got {len(named)}."
      )
    numbers = [self.serve(name) for _, name in zip(predictions, named, strict=True)]
    rows = [row for row, (_, sampled) in enumerate(numbers) if sampled]
    made: Any = full_model(rows) if rows else ()
    texts = tuple(made) if arguments.is_listing(made) else (made,)
    if len(texts) != len(rows) or not all(isinstance(text, str) for text in texts):
      raise ValueError(
        f"Expected `full_model` to return a text for each of the {len(rows)} positions, got"
        f" {len(texts)}: {texts!r:.60}; the prompts wait for their losses: `waiting`."
      )
    for row, text in zip(rows, texts, strict=True):
      self.record(numbers[row][0], 1.0 - metric(predictions[row], [text]))
    return self.alarm

  def _check(self, number: int, loss: float) -> None:
    low, high = self.watch.support.lower, self.watch.support.upper
    if number not in self._waiting or number in self._losses:
      raise ValueError(
        f"Expected `number` to be a sampled prompt without a loss, got {number!r}."
      )
    if not low <= loss <= high:
      raise ValueError(
        f"Expected `loss` to lie in the declared range [{low}, {high}], got {loss!r}."
      )

  def _count(self, value: dict[str, Any]) -> None:
    self._served = value["served"] + 1
    if value["sampled"]:
      self._waiting.append(value["served"])
    if "name" in value:  # files of earlier versions do not have it
      self._repeated += not value["sampled"]
      self._marks.add(str(value["name"]))

  def _settle(self, number: int, loss: float) -> None:
    self._losses[number] = loss
    while self._waiting and self._waiting[0] in self._losses:
      self.wealth = self.wealth.after(self._losses.pop(self._waiting.pop(0)), self.watch)

  def _write(self, value: dict[str, Any]) -> None:
    storage.append(self.path, storage.dump_line(value).encode("utf-8"))

  def _replay(self, line: storage.Line) -> None:
    value = line.value
    try:
      if "served" in value:
        if value["served"] != self._served:
          raise ValueError(f"Expected `served` to be {self._served}, got {value['served']!r}")
        self._count(value)
      else:
        self._check(value["number"], value["loss"])
        self._settle(value["number"], value["loss"])
    except (KeyError, TypeError, ValueError) as error:
      raise line.error(
        f"expected a line of this monitor, got another: {error}; restore the file, or start a"
        " new one."
      ) from error

  def __repr__(self) -> str:
    return (
      f"Monitor({self._served} served, {self.wealth.count} checked, wealth"
      f" {math.exp(self.wealth.log_wealth):.4g}, alarm at {1.0 / self.watch.alarm_level:.4g}:"
      f" {'ALARM' if self.alarm else 'quiet'})"
    )


@arguments.checked()
def open_monitor(path: str | pathlib.Path, watch: Watch) -> Monitor:
  """Starts a monitor, or goes on with the one whose state the file holds.

  Args:
    path: append-only JSON Lines file; a line cut off by a kill is dropped, and what a full disk
      left of a line before the next one.
    watch: what is watched; must be that of the file.

  Returns:
    A `Monitor` with everything that the file says already counted. The file is its alone: a
    second process is refused until this one ends or lets go of the monitor.

  Raises:
    LockedError: another process writes the file; the message names it.
    GenerationsError: the file is damaged or of another watch; the message names file and line.
    ValueError: it is a pipe, a device or a folder.
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise ValueError(
      f"Expected {str(path)!r} to be a regular file, got one of another kind; name another."
    )
  monitor = Monitor(path, watch, storage.lock(path))
  if not path.exists() or not path.stat().st_size:
    monitor._write(watch.to_json())
    return monitor
  # Looked at first: what is mended below must be a monitor's.
  monitor.wealth = Wealth(restarts=_check_watch(path, watch) != 1)
  storage.drop_partial_line(path)
  _unglue(path)
  lines = storage.read_lines(path)
  next(lines)
  for line in lines:
    monitor._replay(line)
  return monitor


def _check_watch(path: pathlib.Path, watch: Watch) -> int:
  """The version of the watch that a file begins with; GenerationsError if it is another."""
  with open(path, "rb") as file:
    raw = file.readline(storage.LONGEST_LINE + 1)
  expected = json.loads(json.dumps(watch.to_json()))
  got, _ = storage.parse_line(raw.removesuffix(b"\n"))
  for version in (expected["schema_version"], 1):
    wanted = expected | {"schema_version": version}
    if json.dumps(got, sort_keys=True) == json.dumps(wanted, sort_keys=True):
      return version
  raise records_lib.GenerationsError(
    f"{path}:1: expected the watch {expected}, got {got or raw[:100]!r}; start a new file."
  )


def _unglue(path: pathlib.Path) -> None:
  """Takes out what is left of lines that a full disk cut off, each before a whole one."""
  longest = storage.LONGEST_LINE
  with open(path, "rb") as file:
    whole = True
    while line := file.readline(longest + 1):
      if len(line) > longest:  # which is named when it is read
        return
      whole &= _last_whole(line.removesuffix(b"\n")) == line.removesuffix(b"\n")
  if not whole:
    mended = map(_last_whole, path.read_bytes().split(b"\n"))
    with contextlib.suppress(UnicodeDecodeError):  # it is damaged otherwise, and will be named
      storage.write_atomically(path, b"\n".join(mended).decode("utf-8"))


def _last_whole(raw: bytes) -> bytes:
  """A line as it is, if it is whole or hopeless; else the whole line at its end."""
  if not raw.strip() or storage.parse_line(raw)[0] is not None:
    return raw
  start = raw.rfind(b'{"')
  return raw[start:] if start > 0 and storage.parse_line(raw[start:])[0] else raw
