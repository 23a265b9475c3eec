r"""Shards of the packed model in processes that are killed, beside one process: same records?

  python scripts/shards.py --shards=4 --prompts=48 --kills=8

Runs `calm generate` once over all prompts, and `--num_shards` processes of it at the same
time, killed (SIGKILL) at random moments and started again, then `calm merge`. Every line of
every threshold is compared, and then tokens and exits alone. At --batch_size=1 lines are equal
byte for byte; above, prompts have other batch mates in a shard, and a matrix product of another
shape may round the last digit of a confidence otherwise.
"""

import argparse
import collections
import json
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile
import time

import calm
from calm import storage

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "calm" / "assets" / "prompts_calibration.jsonl"
COLUMNS = [
  "rows of a batch",
  "shards",
  "kills",
  "records",
  "lines that differ",
  "tokens or exits that differ",
]
LEVELS = ("never", "0.8", "0.5", "0.1")


def command(prompts: pathlib.Path, output: pathlib.Path, batch_size: int) -> list[str]:
  return [
    *(sys.executable, "-m", "calm", "generate", f"--prompts={prompts}", f"--output={output}"),
    *("--thresholds=0.8,0.5,0.1", "--max_decode_length=16", "--max_input_length=64"),
    f"--batch_size={batch_size}",
  ]


def start(words: list[str]) -> subprocess.Popen:
  return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)


def kill_and_restart(words: list[str], count: int, kills: int, rng: random.Random) -> int:
  """Runs all shards side by side, killing some; returns how often."""
  shard = lambda number: [*words, f"--num_shards={count}", f"--shard_id={number}"]
  running = {number: start(shard(number)) for number in range(count)}
  killed = 0
  while running:
    time.sleep(0.5)
    for number, process in list(running.items()):
      code = process.poll()
      if code is None and killed < kills and rng.random() < 0.04:
        process.kill()
        process.wait()
        killed += 1
        running[number] = start(shard(number))
      elif code == 0:
        del running[number]
      elif code is not None:
        raise RuntimeError(f"Expected status 0 of {shard(number)}, got {code}; run it by hand.")
  return killed


def compare(merged: pathlib.Path, one: pathlib.Path) -> tuple[int, int, int]:
  """(records, lines that differ, records whose tokens or exits differ)."""
  total = lines = parts = 0
  for level in LEVELS:
    ours, theirs = (
      (at / f"threshold_{level}.jsonl").read_text("utf-8").splitlines() for at in (merged, one)
    )
    total += len(theirs)
    lines += sum((collections.Counter(theirs) - collections.Counter(ours)).values())
    brief = lambda rows: {
      row["id"]: (row["prediction"], row["tokens"], row["exit_layers"])
      for row in map(json.loads, rows)
    }
    mine, wanted = brief(ours), brief(theirs)
    parts += sum(mine.get(name) != value for name, value in wanted.items())
    parts += len(mine) - len(wanted)
  return total, lines, parts


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shards", type=int, default=4)
  parser.add_argument("--prompts", type=int, default=48)
  parser.add_argument("--kills", type=int, default=8)
  parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--output", default=str(ROOT / "scripts" / "results" / "shards.json"), help="'' for none"
  )
  flags = parser.parse_args()
  rng, rows = random.Random(flags.seed), []
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)
    lines = PROMPTS.read_text("utf-8").splitlines(keepends=True)[: flags.prompts]
    storage.write_atomically(base / "prompts.jsonl", "".join(lines))
    for size in flags.batch_sizes:
      one, many = base / f"one{size}", base / f"many{size}"
      if start(command(base / "prompts.jsonl", one, size)).wait():
        raise RuntimeError(
          "Expected status 0 of the undisturbed run, got another; run it by hand."
        )
      words = command(base / "prompts.jsonl", many, size)
      killed = kill_and_restart(words, flags.shards, flags.kills, rng)
      if start([sys.executable, "-m", "calm", "merge", str(many)]).wait():
        raise RuntimeError("Expected status 0 of calm merge, got another; run it by hand.")
      rows.append([size, flags.shards, killed, *compare(many / "merged", one)])
      print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
  result = {
    "command": shlex.join(["python", "scripts/shards.py", *sys.argv[1:]]),
    "columns": COLUMNS,
    "rows": rows,
    "versions": {"calm": calm.__version__},
  }
  if flags.output:
    storage.write_atomically(flags.output, json.dumps(result, indent=1) + "\n")
  return int(any(row[-1] for row in rows) or any(row[0] == 1 and row[-2] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
