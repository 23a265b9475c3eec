r"""Kills commands at random moments (SIGKILL), starts them again, and counts what was lost.

  python scripts/chaos.py                              25 kills each, the table, and the JSON
  python scripts/chaos.py --commands infer --kills 3 --output=

Each command runs undisturbed, twice: the first time compiles. Then it is started, killed and
started again in the same folder, until it was killed often enough; when it ends meanwhile, what
it wrote is compared and it begins anew. Every other kill comes after a random part of the whole
time; the others after a random part of the time in which files change, counted from the first
change, or starting up would take most of them.

while writing: kills after the first change of a file. half-way: kills that left a temporary
file. lost: lines of the undisturbed run that are missing at the end. doubled: lines that are
there more than once. different: other lines or bytes; such lines are printed. last digits:
lines that differ by 1e-5 at most in some number: what was killed between two thresholds decodes
from the beginning where it would have gone on. torn: files that were not whole after a kill,
where they must always be. left: temporary files after the last run.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import chaos_compare
import tables

from calm import storage

ROOT = pathlib.Path(__file__).resolve().parents[1]
ASSETS = ROOT / "calm" / "assets"
COLUMNS = [
  "command",
  "kills",
  "while writing",
  "half-way",
  "runs that ended",
  "lost",
  "doubled",
  "different",
  "last digits",
  "torn",
  "left",
]

ONLINE = """
import sys
from calm import calibrate
options = {"tolerance": 0.2, "share": 0.5, "least_share": 0.5, "seed": "chaos"}
online = calibrate.Online(sys.argv[1], [0.9, 0.5], **options)
losses = lambda number: {0.9: (number % 7) / 50, 0.5: (number % 5) / 20}
if online.missing:
  online.observe(online.served - 1, losses(online.served - 1))
for number in range(online.served, 40000):
  if online.should_check(number):
    online.observe(number, losses(number))
"""


@dataclasses.dataclass(frozen=True)
class Trial:
  """One command and what to look at afterwards.

  Attributes:
    arguments: folder -> what is run.
    results: names or patterns of the files, below the folder, that are compared in the end.
    whole: names of files that are whole whenever they are there.
  """

  arguments: Callable[[pathlib.Path], list[str]]
  results: tuple[str, ...]
  whole: tuple[str, ...] = ()


def calm_command(*words: str) -> list[str]:
  return [sys.executable, "-m", "calm", *words]


def write_prompts(path: pathlib.Path) -> None:
  """48 of the packed model's prompts, with targets to train on."""
  rows = (ASSETS / "prompts_calibration.jsonl").read_text("utf-8").splitlines()[:48]
  targets = [{"target": json.loads(row)["targets"], **json.loads(row)} for row in rows]
  storage.write_atomically(path, "".join(json.dumps(row) + "\n" for row in targets))


def train_trial(prompts: pathlib.Path) -> Trial:
  """A tiny model in 60 steps."""
  words = [
    f"--gin_file={ROOT / 'configs' / 'runs' / 'local_tiny.gin'}",
    f"--gin_bindings=TRAIN = '{prompts}'",
    f"--gin_bindings=VOCABULARY_PATH = '{ASSETS / 'vocabulary.model'}'",
    "--gin_bindings=training.TrainConfig.num_steps = 60",
    "--gin_bindings=training.TrainConfig.eval_every = 10",
    "--no_tensorboard",
  ]
  return Trial(
    lambda at: calm_command("train", *words, f"--output_dir={at / 'run'}"),
    ("run/model/params.safetensors", "run/validation.json"),
    ("run/model/config.json", "run/validation.json"),
  )


def trials(base: pathlib.Path) -> dict[str, Trial]:
  """The commands, on prompts of the packed model; `base` is for what they share."""
  prompts = base / "prompts.jsonl"
  write_prompts(prompts)
  short = ["--max_decode_length=12", "--max_input_length=64", f"--prompts={prompts}"]
  grid = ["--thresholds=0.8,0.5"]
  cache = base / "cache"
  levels = tuple(f"cache/threshold_{name}.jsonl" for name in ("never", "0.8", "0.5"))
  calibrate = ["--tolerance=0.9", "--error_rate=0.5"]
  parts = base / "shards"
  return {
    "generate": Trial(
      lambda at: calm_command("generate", *short, *grid, f"--output={at / 'cache'}"),
      levels,
      ("cache/manifest.json",),
    ),
    "calibrate": Trial(
      lambda at: calm_command(
        "calibrate", str(cache), *calibrate, f"--output={at / 'calibration.json'}"
      ),
      ("calibration.json",),
      ("calibration.json",),
    ),
    "infer": Trial(
      lambda at: calm_command(
        "infer", *short, "--threshold=0.5", f"--output={at / 'out.jsonl'}"
      ),
      ("out.jsonl",),
      ("out.jsonl",),
    ),
    "train": train_trial(prompts),
    "online": Trial(
      lambda at: [sys.executable, "-c", ONLINE, str(at / "state.jsonl")], ("state.jsonl",)
    ),
    "fit": fit_trial(base, calibrate),
    "merge": Trial(
      lambda at: calm_command("merge", str(parts), f"--output={at / 'merged'}"),
      ("merged/*",),
      ("merged/manifest.json",),
    ),
  }


def fit_trial(base: pathlib.Path, rates: list[str]) -> Trial:
  """A fit of a toy, without training. What it chooses is told by seconds; what it decodes to
  choose by is not, and is compared."""
  rows = [
    {"id": f"r{i}", "source": f"s{i}", "input": f"text {i}", "target": "word"}
    for i in range(48)
  ]
  storage.write_atomically(base / "fit.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
  words = ("fit", f"--model={base / 'toy'}", f"--train={base / 'fit.jsonl'}", "--stages=none")
  whole = ("config.json", "inference.json", "calibration.json", "fit/result.json")
  return Trial(
    lambda at: calm_command(*words, *rates, f"--output={at / 'mine'}"),
    ("mine/splits/*.jsonl", "mine/fit/validation/*/threshold_*.jsonl", "mine/vocabulary.*"),
    tuple(f"mine/{name}" for name in whole),
  )


def save_toy(folder: pathlib.Path) -> None:
  """A model of bytes that has learned nothing."""
  import jax

  from calm import checkpoints
  from calm.data import vocabulary
  from calm.t5 import network

  config = network.T5Config(
    **{"vocab_size": 264, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24},
    **{"num_encoder_layers": 1, "num_decoder_layers": 2, "mlp_activations": ("gelu", "linear")},
  )
  tokens = jax.numpy.ones((1, 4), "int32")
  params = network.Transformer(config).init(
    jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
  )["params"]
  words = vocabulary.ByteVocabulary(extra_ids=0)
  checkpoints.save(folder, jax.device_get(params), config, vocabulary=words)


def prepare(name: str, table: dict[str, Trial], base: pathlib.Path) -> None:
  """Makes what a trial reads."""
  if name == "fit":
    save_toy(base / "toy")
  if name == "calibrate":
    run(table["generate"], base)
  if name == "merge":
    whole = table["generate"].arguments(base)
    for number in range(2):
      shard = ["--num_shards=2", f"--shard_id={number}", f"--output={base / 'shards'}"]
      run(Trial(lambda at, shard=shard: [*whole, *shard], ()), base)


@dataclasses.dataclass(frozen=True)
class Ran:
  """How a run went, in seconds; `changed`: when the first file changed, or None."""

  ended: bool
  seconds: float
  changed: float | None

  @property
  def writes(self) -> float:
    """How long files changed."""
    return 0.0 if self.changed is None else self.seconds - self.changed


def stamp(folder: pathlib.Path) -> list[tuple[str, int, int]]:
  """Every file below a folder, its size and when it was written."""
  found = []
  for at, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        status = os.stat(path := os.path.join(at, name))
        found.append((path, status.st_size, status.st_mtime_ns))
  return sorted(found)


def run(
  trial: Trial,
  folder: pathlib.Path,
  seconds: float = float("inf"),
  writing: float = float("inf"),
) -> Ran:
  """Runs it to its end, for some seconds, or for some seconds after a file has changed.

  Raises:
    RuntimeError: it failed.
  """
  before, start, changed = stamp(folder), time.monotonic(), None
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(
      trial.arguments(folder), stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT
    )
    while process.poll() is None:
      now = time.monotonic() - start
      if changed is None and stamp(folder) != before:
        changed = now
      if now >= seconds or (changed is not None and now - changed >= writing):
        process.kill()
        process.wait()
        return Ran(False, now, changed)
      time.sleep(0.001)
    if process.returncode:
      errors.seek(0)
      raise RuntimeError(f"{trial.arguments(folder)}: {errors.read().decode()[-2000:]}")
  return Ran(True, time.monotonic() - start, changed)


def chaos(name: str, trial: Trial, base: pathlib.Path, kills: int, rng: random.Random) -> list:
  """One row of the table."""
  undisturbed = base / name / "undisturbed"
  undisturbed.mkdir(parents=True)
  run(trial, undisturbed)  # what it compiles is kept on the disk
  shutil.rmtree(undisturbed)
  undisturbed.mkdir()
  alone = run(trial, undisturbed)
  totals: collections.Counter = collections.Counter()
  number = 0
  fresh = True
  while True:
    folder = base / name / f"run{number}"
    folder.mkdir(exist_ok=True)
    last = totals["kills"] == kills
    moment = {"seconds": rng.uniform(0.1, 1.0) * alone.seconds}
    if totals["kills"] % 2:
      moment = {"writing": rng.uniform(0.0, 1.0) * alone.writes}
    ran = run(trial, folder, **({} if last else moment))
    if ran.ended:
      # The machine may have been busy with something else before.
      alone = min(alone, ran, key=lambda each: each.seconds) if fresh else alone
      fresh = True
      totals += chaos_compare.compare(trial.results, folder, undisturbed)
      totals["left"] += chaos_compare.temporaries(folder)
      shutil.rmtree(folder)
      totals["runs that ended"] += 1
      number += 1
      if last:
        break
    else:
      fresh = False
      totals["kills"] += 1
      totals["while writing"] += ran.changed is not None
      totals["half-way"] += chaos_compare.temporaries(folder) > 0
      totals["torn"] += chaos_compare.torn(trial.whole, folder)
  return [name, *(totals[column] for column in COLUMNS[1:])]


def write(path: pathlib.Path, rows: list[list]) -> None:
  """The table; rows of commands that were not asked for stay, with how they were made."""
  there = json.loads(path.read_text("utf-8")) if path.exists() else {}
  if there.get("columns") != COLUMNS:
    there = {"rows": [], "command": ""}
  command, again = tables.command_line(), {row[0] for row in rows}
  kept = [row for row in there["rows"] if row[0] not in again]
  earlier = [c for c in there["command"].split("; ") if c and kept and c != command]
  commands = "; ".join([*earlier, command])
  tables.write(path, COLUMNS, [*kept, *rows], command=commands, packages=())


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--commands", nargs="+", help="some of them (default: all)")
  parser.add_argument("--kills", type=int, default=25, help="of each (25)")
  parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
  parser.add_argument(
    "--output",
    default=str(ROOT / "scripts" / "results" / "chaos.json"),
    help="JSON; '' for none",
  )
  flags = parser.parse_args()
  rng = random.Random(flags.seed)
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)
    table = trials(base)
    unknown = sorted(set(flags.commands or ()) - set(table))
    if unknown or flags.kills < 1:
      parser.error(f"--commands are some of {sorted(table)}, --kills at least 1")
    chosen = flags.commands or list(table)
    rows = []
    for name in chosen:
      prepare(name, table, base)
      rows.append(chaos(name, table[name], base, flags.kills, rng))
      print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
      if flags.output:
        write(pathlib.Path(flags.output), rows)
  bad = [COLUMNS.index(name) for name in ("lost", "doubled", "different", "torn", "left")]
  return int(any(row[at] for row in rows for at in bad))


if __name__ == "__main__":
  sys.exit(main())
