"""What a fit is asked for: its options, and its rows in parts. Rows of one
source, or of inputs that differ only in case, punctuation and spaces, stay in
one part.
"""

import dataclasses
import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from calm import arguments, inference, storage
from calm.calibrate import Prompt, clusters, losses, metrics, planning
from calm.console import Report
from calm.data import prompt_files
from calm.inference import grid
from calm.t5 import limits

# Rows in memory; or a DataFrame, which has no type that could be named here.
Rows = Sequence[Prompt | str | Mapping[str, Any]] | Any
WORK = "fit"  # the folder that only a later run of the same request reads
PARTS = ("train", "validation", "calibration", "last")
# (share of the groups, most groups) of the parts that measure; training has the
# rest.
_SHARES = {
  True: {
    "calibration": (0.15, 1000),
    "validation": (0.1, 128),
    "last": (0.05, 200),
  },
  False: {
    "calibration": (0.5, 1000),
    "validation": (0.25, 128),
    "last": (0.25, 200),
  },
}
_LEAST = {"validation": 20, "last": 10}
# The calibration part gets this multiple of the least number, as far as there
# are rows.
_COMFORT = 4
# Share of the rows that the length limits leave whole; the limits' own limits,
# in tokens.
_WHOLE = 0.99
_LONGEST_INPUT = 1024
_LONGEST_TEXT = 256


def parse_budget(text: str) -> float:
  """Seconds of '90s', '30m', '1.5h', '1h30m'.

  Raises:
    ValueError: the text is no time.
  """
  lower = text.strip().lower()
  units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
  time = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)")
  seconds = sum(
    float(number) * units[unit] for number, unit in time.findall(lower)
  )
  if time.sub("", lower).strip() or not seconds > 0:
    raise ValueError(
      f"Expected `budget` to be a time like 90s, 30m or 1h30m, got {text!r}."
    )
  return seconds


@arguments.checked(budget=parse_budget)
@dataclasses.dataclass(frozen=True)
class FitOptions:
  """The options of `fit`; with the rows and the model they determine its
  output.

  Attributes:
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    train_all: whether all weights are trained, as in the paper. By default
      exits are learned beside the model's weights, none of which changes.
    stages: 'all', or 'none' to use the exits that the model has.
    consistency: 'textual' (distance to the full model's text) or 'risk' (loss
      of quality against the rows' references).
    metric: name or import path of the text metric.
    prefix: text put before every input; None uses the model's own.
    input_key, target_key: keys of the text and of the references in a row;
      None: the first of `prompt_files.INPUT_KEYS` and of `TARGET_KEYS`.
    budget: seconds after which `train_all` stops training, shared by its
      stages, or a time like '30m'; None: it makes the recipe's steps.
    seed: of splits, training and sampling.
    batch_size: prompts that are decoded together; 1 where a candidate in 8 bits
      is chosen.
  """

  tolerance: float = 0.1
  error_rate: float = 0.05
  train_all: bool = False
  stages: Literal["all", "none"] = "all"
  consistency: grid.Consistency = "textual"
  metric: str = "rouge_l"
  prefix: str | None = None
  input_key: str | None = None
  target_key: str | None = None
  budget: float | None = None
  seed: int = 0
  batch_size: int = 8

  def __post_init__(self):
    # refuses others
    planning.min_calibration_size(self.tolerance, self.error_rate)
    if self.train_all and self.stages == "none":
      raise ValueError(
        "Expected `train_all` or `stages` 'none', got both; leave out what "
        "is not meant."
      )
    if self.budget is not None and not (self.train_all and self.budget > 0):
      raise ValueError(
        "Expected `budget` to be seconds above 0, and `train_all` with it, "
        f"got {self.budget}"
        f" and {self.train_all}; exits beside frozen weights need none."
      )
    limits.whole("seed", self.seed, 0, 2**32 - 1, "give a number in that range")
    metrics.get_metric(self.metric)

  @property
  def kind(self) -> str:
    """The loss that is controlled."""
    return grid.KINDS[self.consistency]

  @property
  def learns_exits(self) -> bool:
    """Whether exits are learned beside frozen weights."""
    return not self.train_all and self.stages != "none"


# ---- Rows


def read_rows(
  train: str | pathlib.Path | Rows, options: FitOptions
) -> tuple[Prompt, ...]:
  """Rows of a file in any format of `calm infer`, of a DataFrame, or those
  given; ValueError where one has no reference and needs it, or an id occurs
  twice.
  """
  keys: Any = {"input_key": options.input_key, "target_key": options.target_key}
  if isinstance(train, str | pathlib.Path):
    rows = tuple(prompt_files.open_prompts(train, **keys))
  else:
    rows = prompt_files.prompts_of(train, **keys)
  bare = [
    row.id for row in rows if not any(target.strip() for target in row.targets)
  ]
  if bare and options.consistency != "textual":
    raise ValueError(
      "Expected `train` to be rows with references "
      f"({', '.join(prompt_files.TARGET_KEYS)}),"
      f" got {len(bare)} of {len(rows)} without, first {bare[:3]}; name the "
      "field"
      " (`target_key`), or take textual consistency."
    )
  repeated = len(rows) - len({row.id for row in rows})
  if repeated:
    raise ValueError(
      f"Expected `train` to be rows with ids of their own, got {repeated} "
      "ids twice; number"
      " them."
    )
  return rows


def length_limits(
  predictor: inference.Predictor, rows: Sequence[Prompt], prefix: str | None
) -> tuple[dict[str, Any], int]:
  """`task_prefix`, `max_input_length`, `max_decode_length` for rows, and how
  many are cut; the model's own prefix where `prefix` is None, its text limit
  where rows have no references. ValueError where its vocabulary does not know
  the pieces of these texts.
  """
  vocabulary = predictor.vocabulary
  prefix = predictor.options.task_prefix if prefix is None else prefix
  inputs = [vocabulary.encode(prefix + row.input) for row in rows]
  unknown = sum(
    token == vocabulary.unk_id for tokens in inputs for token in tokens
  )
  total = sum(map(len, inputs))
  if unknown > 0.2 * max(total, 1):
    raise ValueError(
      "Expected the model's vocabulary to know the rows' texts, got "
      f"{unknown} unknown of"
      f" {total} pieces; is it the tokenizer that the model was trained "
      "with, and the language?"
    )

  # with EOS
  def quantile(sizes):
    return 1 + int(np.quantile(sizes, _WHOLE, method="higher"))

  targets = [
    len(vocabulary.encode(row.targets[0])) for row in rows if row.targets
  ]
  decode_length = predictor.options.max_decode_length
  if targets:
    decode_length = min(_LONGEST_TEXT, -(-quantile(targets) // 8) * 8)
  input_length = (
    -(-min(quantile([*map(len, inputs)]), _LONGEST_INPUT) // 32) * 32
  )
  made = {"max_input_length": input_length, "max_decode_length": decode_length}
  cut = sum(len(tokens) >= input_length for tokens in inputs)
  return {"task_prefix": prefix, **made}, cut


@dataclasses.dataclass(frozen=True)
class Splits:
  """The rows of every part."""

  train: tuple[Prompt, ...]  # rows that train; all rows of their groups
  # prompts on which everything is chosen, one a group
  validation: tuple[Prompt, ...]
  # that certify, one a group; nothing else looks at them
  calibration: tuple[Prompt, ...]
  last: tuple[Prompt, ...]  # that are evaluated once, in the end, one a group
  num_groups: int
  # rows that repeat another's input but for case, punctuation and spaces
  num_repeats: int
  population: str  # what the promise is about

  def __str__(self) -> str:
    sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in PARTS)
    repeats = (
      f"; {self.num_repeats} repeat another's input" if self.num_repeats else ""
    )
    return f"{sizes} rows, of {self.num_groups} groups{repeats}"


def split(rows: Sequence[Prompt], options: FitOptions, trains: bool) -> Splits:
  """Splits rows by group, by rows and seed and not by their order; where
  nothing `trains`, that part is empty. ValueError where there are too few
  groups to certify anything.
  """
  tolerance = options.tolerance
  error_rate = options.error_rate
  lower = losses.kind_support(options.kind, options.metric).lower
  names = [
    f"id:{row.id}" if row.group is None else f"group:{row.group}"
    for row in rows
  ]
  texts = [_letters(row.input) for row in rows]
  members: dict[str, list[Prompt]] = {}
  for row, name in zip(rows, clusters.join_equal(names, texts), strict=True):
    members.setdefault(name, []).append(row)
  needed = max(
    planning.min_calibration_size(tolerance, error_rate, lower=low)
    for low in (lower, 0.0)
  )
  groups = len(members)
  shares = _SHARES[trains].items()
  # With few rows calibration comes first, then choosing.
  sizes = {
    name: min(round(share * groups), most) for name, (share, most) in shares
  }
  sizes |= {name: max(sizes[name], least) for name, least in _LEAST.items()}
  third = groups // (3 if trains else 2)
  sizes["calibration"] = max(
    sizes["calibration"], min(third, _COMFORT * needed)
  )
  left = groups - sum(sizes.values()) - (sizes["validation"] if trains else 0)
  sizes["calibration"] += min(0, left)
  least = (needed + sum(_LEAST.values())) * (2 if trains else 1)
  if groups < least or sizes["calibration"] < needed:
    raise ValueError(
      f"Expected at least {least} rows of different groups for `tolerance` "
      f"{tolerance} and"
      f" `error_rate` {error_rate}: {needed} to calibrate on, the others to "
      "choose on and to"
      f" look at{', and as many again to train on' if trains else ''}, got "
      f"{groups}; give more"
      " rows, or a larger tolerance."
    )

  def draw(name):
    return hashlib.sha256(f"{options.seed}\n{name}".encode()).hexdigest()

  ranked = sorted(members, key=draw)
  parts = {}
  for name, size in sizes.items():
    chosen, ranked = ranked[:size], ranked[size:]
    parts[name] = tuple(
      min(members[g], key=lambda row: draw(row.id)) for g in chosen
    )
  parts["train"] = (
    tuple(row for g in ranked for row in members[g]) if trains else ()
  )
  population = "The promise is about prompts drawn as these rows are."
  if groups < len(rows):
    population = (
      f"The promise is about one row of each of {groups} groups (rows of one "
      "source, or of one"
      f" input), every group as likely, however many of the {len(rows)} rows "
      "it has: nothing is"
      " promised about the rows of one group alone."
    )
  repeats = len(texts) - len(set(texts))
  return Splits(
    **parts, num_groups=groups, num_repeats=repeats, population=population
  )


def _letters(text: str) -> str:
  """What twins share: the text in lower case without punctuation, symbols and
  spaces.
  """
  folded = clusters.fold_text(text)
  others = {
    ord(c): None for c in set(folded) if unicodedata.category(c)[0] not in "LMN"
  }
  return folded.translate(others) or text


def write(
  folder: pathlib.Path, splits: Splits, names: Sequence[str] = PARTS
) -> None:
  """Writes `train.jsonl`, `validation.jsonl`, ... as rows that `calm train`
  reads too.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    lines = []
    for row in getattr(splits, name):
      value = {
        "id": row.id,
        "source": row.group,
        "input": row.input,
        "target": row.targets,
      }
      kept = {
        key: entry for key, entry in value.items() if entry not in (None, ())
      }
      lines.append(storage.dump_line(kept))
    storage.write_atomically(folder / f"{name}.jsonl", "".join(lines))


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fit at work."""

  # the given model under the rows' prefix and limits
  source: inference.Predictor
  # The same with the lengths that its folder states, so that its texts are the
  # same; where it states none, the larger of the defaults and the rows'.
  given: inference.Predictor
  initial: pathlib.Path  # its folder
  splits: Splits
  output: pathlib.Path
  options: FitOptions
  say: Callable[[str], object]  # prints a sentence
  # called with the title of a step; returns its progress
  step: Callable[[str], Report]

  @property
  def work(self) -> pathlib.Path:
    """Training runs, generations and results: a stopped run resumes from
    them.
    """
    return self.output / WORK

  @property
  def results(self) -> pathlib.Path:
    """Results of finished steps."""
    return self.work / "results"
