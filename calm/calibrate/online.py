"""A threshold that is calibrated while it is served, with its promise at every
time.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm import arguments, storage
from calm.calibrate import betting, checks
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.losses import Support

FORMAT = "calm online 1"
# Bets as shares of the largest that keeps wealth positive, and the weights of
# their gamblers.
SHARES = betting.HEDGE_CAP_SHARE * 2.0 ** -np.arange(6.0)
WEIGHTS = 0.6 ** np.arange(6.0) / np.sum(0.6 ** np.arange(6.0))
FIRST_LIFE = 0.8  # of the error rate; the rest is for lives after an alarm
LATE = 0.75  # of the weight, for gamblers of the alarm who do not begin at once
# checks without a new certificate after which the share of checked prompts
# falls
STALL = 300


class Wealth:
  """Wealth of gamblers at fixed bets, for any number of columns at once.

      wealth = sum over bets b of weight_b product over checks i of (1 + b
      (tolerance - loss_i)) alarm  = sum over k of weight_k sum over b of
      weight_b product over checks i >= k of (1 + b (loss_i - tolerance))

  Where the risk is above the tolerance, wealth is a nonnegative supermartingale
  that begins at 1: it ever reaches 1 / level with probability at most the level
  (Ville 1939). `largest` is the bet that leaves nothing after the worst
  outcome; `restarts` makes an alarm.
  """

  def __init__(
    self, largest: float, shape: tuple[int, ...] = (), restarts: bool = False
  ):
    self._bets = largest * SHARES
    self._restarts = restarts
    self._count = 0
    first = -math.inf if restarts else 0.0
    self._log = np.broadcast_to(np.log(WEIGHTS) + first, (*shape, len(SHARES)))
    self.highest = np.zeros(shape)

  def bet(self, gains: np.ndarray | float) -> None:
    """Follows one check; `gains` are tolerance - loss, or the reverse for an
    alarm.
    """
    if self._restarts:
      self._log = np.logaddexp(
        self._log, np.log(WEIGHTS) + _log_start(self._count)
      )
    self._log = self._log + np.log1p(self._bets * np.asarray(gains)[..., None])
    self._count += 1
    wealth = np.logaddexp.reduce(self._log, axis=-1)
    if self._restarts:
      wealth = np.logaddexp(wealth, _log_waiting(self._count))
    self.highest = np.maximum(self.highest, wealth)


def _log_waiting(count: int) -> float:
  """log of the weight of all gamblers who begin at check `count` >= 1 or
  later.
  """
  return math.log(LATE * math.log(2.0) / math.log(count + 2.0))


def _log_start(count: int) -> float:
  """log of the weight of the gambler who begins at check `count`."""
  late = LATE * math.log(2.0) * math.log1p(1.0 / (count + 2.0))
  late /= math.log(count + 2.0) * math.log(count + 3.0)
  return math.log(late if count else 1.0 - LATE + late)


def life_level(error_rate: float, life: int) -> float:
  """The error rate of one life, 0 is the first; they add up to `error_rate`."""
  share = (1.0 - FIRST_LIFE) / (life * (life + 1.0)) if life else FIRST_LIFE
  return error_rate * share


@arguments.checked()
class Online:
  """Names a threshold for the next prompt, and learns from the prompts that are
  checked.

  online = Online("state.json", [0.9, 0.5], tolerance=0.1, error_rate=0.05)
  text = serve(prompt, online.threshold)          # NEVER_EXIT, the safe
  setting, at first if online.should_check(prompt_id):              # for every
  served prompt, once online.observe(prompt_id, {0.9: 0.0, 0.5: 0.3})  # now or
  later

  With probability at least 1 - error_rate over its whole life, every threshold
  that it names has an expected loss of at most the tolerance, as long as
  prompts are independent draws of one kind; where that changes, from the next
  alarm on.

  Thresholds are certified in their order, from checks that a hash of the id
  draws, at a share that depends on earlier checks alone. After an alarm all
  begins anew, at error_rate times 0.8, 0.2 / 2, 0.2 / 6, ... for each life.
  Losses count in the order of serving.

  Attributes:
    served: prompts that were served, as of the last check in a state that was
      read.
    checked: prompts whose losses count, in all lives.
    life: number of alarms so far.
    about: what the losses depend on.
  """

  def __init__(
    self,
    path: str | pathlib.Path | None,
    thresholds: Sequence[float] | np.ndarray,
    *,
    tolerance: float,
    error_rate: float = 0.05,
    support: Support | None = None,
    share: float = 1.0,
    least_share: float = 0.05,
    alarm_level: float = 0.05,
    patience: int = 1000,
    seed: str = "",
    about: Mapping[str, str] | None = None,
  ):
    """Begins, or goes on with what the file holds.

    Args:
      path: the state, JSON Lines; whole after every call. None keeps it in
        memory alone.
      thresholds: strictly descending, the safest first, fixed before any loss
        was seen.
      tolerance: delta, in (lower, upper) of the support.
      error_rate: epsilon, in (0, 1).
      support: declared range of losses; [0, 1] by default.
      share: of the prompts that are checked while thresholds are being
        certified, in (0, 1].
      least_share: what the share falls to when nothing new is certified, in (0,
        share].
      alarm_level: probability of a false alarm in one life, in (0, 1).
      patience: a loss that is still missing after so many later draws counts as
        the worst.
      seed: of the hash that draws prompts.
      about: what the losses depend on (a metric, a model); must be that of the
        file.

    Raises:
      ValueError: an argument leaves its range.
      storage.FormatError: the file is another's, of other settings, or damaged.
      storage.LockedError: another process has the file.
    """
    self._grid, support = (
      thresholds_lib.validate_grid(thresholds),
      support or Support(),
    )
    self._low = support.lower
    self._high = support.upper

    def above(value):
      return math.nextafter(value, 2.0)

    numbers = (
      ("tolerance", tolerance, support.lower, support.upper),
      ("error_rate", error_rate, 0.0, 1.0),
      ("share", share, 0.0, above(1.0)),
      ("least_share", least_share, 0.0, above(share)),
      ("alarm_level", alarm_level, 0.0, 1.0),
      ("patience", patience, 0, 2**53),
    )
    for name, value, low, high in numbers:
      checks.in_range(name, value, low, high)
    checks.warn_of_error_rate(error_rate)
    self.about = dict(about or {})
    self._tolerance = tolerance
    self._error_rate = error_rate
    self._seed = seed
    self._share = share
    self._least_share = least_share
    self._alarm_level = alarm_level
    self._patience = patience
    self.served = self.checked = 0
    self.life = -1
    # Drawn and without a loss yet: {mark: (life, first open threshold)}, in
    # order.
    self._waiting: dict[str, tuple[int, int]] = {}
    self._labels: dict[str, np.ndarray | None] = {}
    self._seen: set[str] = set()
    self._restart()
    self._path = None if path is None else pathlib.Path(path)
    if self._path is not None:
      settings = {
        "format": FORMAT,
        "thresholds": self._grid.tolist(),
        "support": [support.lower, support.upper],
        **{name: value for name, value, _, _ in numbers},
        "seed": seed,
        "about": self.about,
      }
      self._open(self._path, settings)

  @property
  def threshold(self) -> float:
    """The lowest threshold that is certified, `NEVER_EXIT` while there is
    none.
    """
    return (
      float(self._grid[self._place])
      if self._certified
      else thresholds_lib.NEVER_EXIT
    )

  @property
  def share(self) -> float:
    """The probability that the next new id is drawn."""
    if self._certified == len(self._grid):
      return self._least_share
    idle = self.checked - self._progress
    return max(self._least_share, self._share * (STALL / max(STALL, idle)))

  @property
  def missing(self) -> int:
    """Drawn prompts whose losses are still awaited."""
    return len(self._waiting) - len(self._labels)

  @arguments.checked()
  def should_check(self, id: str | int) -> bool:
    """Counts a served prompt; whether its losses are wanted.

    `id` is of the prompt, or of its cluster (a source, a user) where prompts of
    one are alike.
    """
    mark = self._mark(id)
    if mark not in self._seen and int(mark, 16) < self.share * 2.0**64:
      self._take({"draw": mark, "served": self.served + 1})
      return True
    self.served += 1
    return mark in self._waiting and mark not in self._labels

  def wanted(self, id: str | int) -> tuple[float, ...]:
    """The thresholds at which `observe` needs losses of a prompt that is
    awaited; none else.
    """
    _, first = self._waiting.get(self._mark(id), (0, len(self._grid)))
    return tuple(self._grid[first:].tolist())

  @arguments.checked()
  def observe(
    self, id: str | int, losses: Mapping[float, float] | None
  ) -> float:
    """Takes the losses of a prompt that was drawn; a second time nothing
    changes.

    Args:
      id: as for `should_check`.
      losses: at each threshold that is `wanted` of it; others are left aside.
        None: they will never be known, and count as the worst.

    Returns:
      `threshold`, which may be another now; ValueError where the prompt was not
      drawn, or a loss is missing or leaves its range.
    """
    mark = self._mark(id)
    if mark not in self._seen:
      raise ValueError(
        f"Expected `id` to be one that was drawn, got {id!r:.60}."
      )
    if mark not in self._waiting or mark in self._labels:
      return self.threshold
    values = (
      None
      if losses is None
      else [losses.get(at, math.nan) for at in self.wanted(id)]
    )
    self._take({"observe": mark, "losses": values})
    return self.threshold

  def give_up(self) -> None:
    """Counts the losses that are awaited as the worst: of prompts that a killed
    process had.
    """
    while self.missing:
      lost = next(mark for mark in self._waiting if mark not in self._labels)
      self._take({"observe": lost, "losses": None})

  @property
  def guarantee(self) -> str:
    """What holds and since when, as a sentence."""
    late = f", {self.missing} of them have no loss yet" if self.missing else ""
    counts = (
      f"{self.checked} of {self.served} served prompts were checked{late}"
    )
    alarms = (
      f" Alarms so far: {self.life}; nothing is promised of prompts between "
      "a change of"
    )
    alarms = f"{alarms} their kind and its alarm." if self.life else ""
    if not self._certified:
      return (
        "No threshold is certified now: the safe setting is served; "
        f"{counts}.{alarms}"
      )
    check, served = self._since
    loss = f" ({self.about['metric']})" if "metric" in self.about else ""
    return (
      f"With probability at least {1.0 - self._error_rate:.10g} over the "
      "whole life of this"
      f" state, every threshold that it names has an expected loss{loss} of "
      "at most"
      f" {self._tolerance:.10g} on prompts that are independent draws like "
      "those that were"
      f" checked; it names {self.threshold!r} since check {check} (prompt "
      f"{served}), and"
      f" {counts}.{alarms}"
    )

  @property
  def _place(self) -> int:
    """Row of the grid that is served; the first where nothing is."""
    return max(0, self._certified - 1)

  def _mark(self, id: str | int) -> str:
    named = f"{self._seed}/{id}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(named).hexdigest()[:16]

  def _restart(self) -> None:
    """Begins a life: no evidence, the safe setting."""
    self._wealth = Wealth(
      1.0 / (self._high - self._tolerance), self._grid.shape
    )
    self._alarm = Wealth(1.0 / (self._tolerance - self._low), restarts=True)
    self._certified = 0
    self._progress = self.checked
    self.life += 1
    self._since = (self.checked, self.served)

  def _take(self, line: Mapping[str, Any], *, write: bool = True) -> None:
    """Draws a prompt or takes its losses, as a line of the state; ValueError if
    it is none.
    """
    mark: Any = line.get("draw")
    served = line.get("served", 0)
    losses = line.get("losses")
    drawn = (
      isinstance(mark, str) and type(served) is int and served > self.served
    )
    mark = mark if drawn else str(line.get("observe"))
    known = (
      mark in self._seen
      if drawn
      else mark not in self._waiting or mark in self._labels
    )
    if known:
      raise ValueError(
        "expected a line of this state, got another; restore the file."
      )
    if not drawn and losses is not None:
      levels = self._grid[self._waiting[mark][1] :].tolist()
      numbers = isinstance(losses, list) and all(
        type(x) in (int, float) for x in losses
      )
      if not numbers or len(losses) != len(levels):
        raise ValueError(
          f"expected a loss for each of {levels}, got {losses!r:.100}."
        )
      for level, value in zip(levels, losses, strict=True):
        if not self._low - 1e-9 <= value <= self._high + 1e-9:
          raise ValueError(
            f"Expected `losses` to be in [{self._low:g}, {self._high:g}] at"
            f" threshold {level!r}, got {value!r} (NaN: none); give one for "
            "each of `wanted`,"
            " or None in place of them all where they cannot be known."
          )
    if write and self._path is not None:
      storage.append(self._path, storage.dump_line(line).encode("utf-8"))
    if drawn:
      self.served = served
      self._seen.add(mark)
      self._waiting[mark] = (self.life, self._place)
    else:
      self._labels[mark] = (
        None if losses is None else np.array(losses, np.float64)
      )
    # Bets on what is known, in the order of serving.
    while self._waiting:
      mark = next(iter(self._waiting))
      if mark not in self._labels and len(self._waiting) <= self._patience:
        return
      life, first = self._waiting.pop(mark)
      values = self._labels.pop(mark, None)
      if life == self.life:
        self._count(first, values)

  def _count(self, first: int, values: np.ndarray | None) -> None:
    """One check; a missing loss is the worst for certificates, the best for the
    alarm.
    """
    losses = np.full(len(self._grid), self._tolerance)  # neither won nor lost
    losses[first:] = (
      self._high if values is None else np.clip(values, self._low, self._high)
    )
    self.checked += 1
    self._wealth.bet(self._tolerance - losses)
    if self._certified:
      now = self._low if values is None else losses[self._place]
      self._alarm.bet(now - self._tolerance)
      if self._alarm.highest >= -math.log(self._alarm_level):
        self._restart()
        return
    target = -math.log(life_level(self._error_rate, self.life))
    while (
      self._certified < len(losses)
      and self._wealth.highest[self._certified] >= target
    ):
      self._certified, self._progress = self._certified + 1, self.checked
      self._since = (self.checked, self.served)

  def _open(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Goes on with a file of these settings, or begins it."""
    if path.exists() and not path.is_file():
      raise ValueError(
        f"Expected {str(path)!r} to be a regular file, got one of another kind."
      )
    self._lock = storage.lock(path)
    if not path.exists() or not path.stat().st_size:
      storage.write_atomically(path, storage.dump_line(settings))
      return
    with open(path, "rb") as file:
      raw = file.readline(storage.LONGEST_LINE + 1)
    stored = storage.parse_line(raw.removesuffix(b"\n"))[0] or {}
    if stored.get("format") != FORMAT:
      raise storage.FormatError(
        f"{path}:1: expected a state of `calibrate.Online`, got the file of "
        "another program, or"
        " the monitor of an earlier version; name another file."
      )
    for name, value in settings.items():
      # As JSON: 1 is not true there, nor 0 false.
      if json.dumps(stored.get(name), sort_keys=True) != json.dumps(
        value, sort_keys=True
      ):
        raise storage.FormatError(
          f"{path}:1: expected `{name}` {value!r}, got "
          f"{stored.get(name)!r:.300}; give what the"
          " state began with, or name another file."
        )
    storage.drop_partial_line(path)
    lines = storage.read_lines(path)
    next(lines)
    for line in lines:
      try:
        self._take(line.value, write=False)
      except ValueError as error:
        raise line.error(str(error)) from error
