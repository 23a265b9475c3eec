r"""A million cached records: shards merged and calibrated; seconds, and the most memory.

  python scripts/benchmark_merge.py --records 100000 1000000

Makes shards of `calm generate`'s form with records of some twenty tokens, 19 thresholds and
full depth for each prompt, a third of the texts unlike the full model's, and runs `calm merge`
and `calm calibrate` on them, each in a process of its own.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np

import calm
from calm import storage
from calm.calibrate import Procedure, Prompt, Record, generations, open_writer, thresholds
from calm.calibrate.generations import shards

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARDS = 4
GRID = thresholds.default_grid("softmax").tolist()
LEVELS = [float("inf"), *GRID]
COLUMNS = ["records", "prompts", "step", "seconds", "most memory, MB", "folder, MB"]
WORDS = [f"word{number}" for number in range(2000)]
PROCEDURE = Procedure(
  **{"parameters_digest": "p", "tokenizer_digest": "t", "task_prefix": "", "eos_id": 1},
  **{"max_input_length": 128, "max_decode_length": 24, "measure": "softmax"},
  **{"exit_layers": (1, 2, 3), "schedule": {"name": "constant"}, "propagation": "exit_state"},
  **{"shortlist": None, "heads": "shared", "activation_dtype": "float32"},
  decode_method={"name": "greedy"},
)


def record(prompt: Prompt, threshold: float, rng: random.Random) -> Record:
  """A text of twelve words; lower thresholds change more of them."""
  words = prompt.targets[0].split()
  if np.isfinite(threshold) and rng.random() < 1.0 / 3.0:
    words[rng.randrange(len(words))] = rng.choice(WORDS)
  length = 20
  numbers = [round(rng.random(), 6) for _ in range(length)]
  layers = [rng.randint(1, 3) for _ in range(length)]
  return Record(
    prompt.id, " ".join(words), tuple(range(length)), tuple(layers), tuple(numbers),
    tuple(numbers), -12.5,
  )  # fmt: skip


def write_shards(root: pathlib.Path, count: int) -> None:
  """Shards of `count` prompts, as `calm generate` leaves them."""
  rng = random.Random(0)
  text = lambda words: " ".join(rng.choices(WORDS, k=words))
  prompts = [Prompt(f"prompt/{i}", text(30), (text(12),)) for i in range(count)]
  for number in range(SHARDS):
    listing = shards.Listing(shards.Shard(number, SHARDS))
    mine = list(listing.mine(prompts))
    at = root / listing.shard.name
    writer = open_writer(at, prompts=mine, thresholds=GRID, procedure=PROCEDURE)
    for threshold in LEVELS:
      for start in range(0, len(mine), 1000):
        batch = mine[start : start + 1000]
        writer.append(threshold, [record(prompt, threshold, rng) for prompt in batch])
    writer.finish()
    names = [generations.PROMPTS, *map(generations.threshold_file, LEVELS)]
    about = {"procedure": PROCEDURE.to_json(), "thresholds": GRID}
    shards.mark_of("generate", listing, about, at, names).save(at)


def measured(*words: str) -> tuple[float, float]:
  """(seconds, MB) of a command; MB is the most of any one of its processes."""
  start = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, "-m", "calm", *words], cwd=ROOT, stdout=subprocess.DEVNULL
  )
  _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if status:
    raise RuntimeError(
      f"Expected status 0 of calm {' '.join(words)}, got {process.returncode}; run it by hand."
    )
  return time.monotonic() - start, used.ru_maxrss / 1024


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--records", type=int, nargs="+", default=[100_000, 1_000_000])
  parser.add_argument("--folder", help="where (default: a temporary folder)")
  parser.add_argument(
    "--output", default=str(ROOT / "scripts" / "results" / "merge.json"), help="'' for none"
  )
  flags = parser.parse_args()
  rows = []
  for wanted in flags.records:
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
      root, count = pathlib.Path(folder), wanted // len(LEVELS)
      write_shards(root, count)
      for step, words in (
        ("calm merge", ("merge", str(root))),
        ("calm calibrate", ("calibrate", str(root / "merged"))),
      ):
        seconds, memory = measured(*words)
        size = sum(path.stat().st_size for path in (root / "merged").iterdir()) / 1e6
        parts = (f"{seconds:.0f}", f"{memory:.0f}", f"{size:.0f}")
        rows.append([f"{count * len(LEVELS):,}", f"{count:,}", step, *parts])
        print(rows[-1], flush=True)
  result = {
    "command": shlex.join(["python", "scripts/benchmark_merge.py", *sys.argv[1:]]),
    "columns": COLUMNS,
    "rows": rows,
    "align": ["right", "right", "left", "right", "right", "right"],
    "versions": {"calm": calm.__version__, "python": platform.python_version()},
    "machine": "two cores that other work shares",
  }
  if flags.output:
    storage.write_atomically(flags.output, json.dumps(result, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
