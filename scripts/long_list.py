r"""`calm infer` and `calm generate` over 100,000 prompts: seconds and memory on the way.

  python scripts/long_list.py                       both, and the JSON
  python scripts/long_list.py --prompts=2000 --output=

A toy of two layers, texts of four bytes. Each command is killed (SIGKILL) when half of the
prompts are done, and started again. Memory is the most that the process has held so far
(VmHWM), CPU seconds those that it took since it was started, compiling included; neither memory
nor what a prompt takes may grow with the prompts that are done.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time

import jax
import soak

import calm
from calm import storage

COLUMNS = ["command", "prompts", "CPU seconds", "prompts a CPU second", "most resident MB", ""]
OPTIONS = ("--max_input_length=32", "--max_decode_length=4", "--batch_size=128")


def busy(pid: int) -> float:
  """CPU seconds of a process, which do not run while something else has the machine."""
  fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Lines:
  """Counts the lines of a file that grows."""

  def __init__(self, path: pathlib.Path):
    self._path, self._read, self.count = path, 0, 0

  def look(self) -> int:
    if self._path.exists():
      with open(self._path, "rb") as file:
        file.seek(self._read)
        content = file.read()
        self._read += len(content)
        self.count += content.count(b"\n")
    return self.count


def resident(pid: int, before: float) -> float:
  """The most megabytes that a process has held; `before`, where it has just ended."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith("VmHWM"):
      return int(line.split()[1]) / 1024
  return before


def watch(name: str, words: list[str], at: pathlib.Path, marks: list[int], kill: int) -> list:
  """Rows at the marks; the run is killed once `kill` prompts are done."""
  rows, killed, path = [], "", at
  while True:
    lines = Lines(path)
    begun = lines.look()
    process = subprocess.Popen(words, cwd=soak.ROOT, stderr=subprocess.DEVNULL)
    left, most = [mark for mark in marks if mark > begun], 0.0
    while process.poll() is None:
      most = resident(process.pid, most)
      if left and lines.look() >= left[0]:
        seconds = busy(process.pid)
        rate = round((lines.count - begun) / seconds)
        rows.append([name, left.pop(0), round(seconds), rate, round(most), killed])
        if not killed and lines.count >= kill:
          process.kill()
      time.sleep(0.05)
    if process.returncode >= 0:
      break
    killed = f"after a kill at {kill}"
  if process.returncode:
    raise RuntimeError(f"Expected {words} to end well, got {process.returncode}; run it alone.")
  return rows


def measure(count: int, folder: pathlib.Path) -> list[list]:
  soak.save_toy(folder / "toy")
  prompts = folder / "prompts.jsonl"
  with open(prompts, "w", encoding="utf-8") as file:
    for number in range(count):
      file.write(json.dumps({"id": f"p{number}", "input": f"text number {number}"}) + "\n")
  named = [f"--model={folder / 'toy'}", f"--prompts={prompts}", *OPTIONS]
  calm_command = [sys.executable, "-m", "calm"]
  output, cache = folder / "out.jsonl", folder / "cache"
  infer = [*calm_command, "infer", *named, "--threshold=0.5", f"--output={output}"]
  generate = [*calm_command, "generate", *named, "--thresholds=0.5", f"--output={cache}"]
  # The last lies before the end, where a batch of another size compiles a program of its own.
  marks = [count * tenths // 10 for tenths in (1, 3, 5, 7, 9)]
  rows = watch("calm infer", infer, folder / "out.jsonl.partial", marks, count // 2)
  if output.read_bytes().count(b"\n") != count:
    raise RuntimeError("Expected a line for every prompt, got others; see the output.")
  rows += watch("calm generate", generate, cache / "threshold_0.5.jsonl", marks, count // 2)
  if len((cache / "threshold_0.5.jsonl").read_bytes().splitlines()) != count:
    raise RuntimeError("Expected a record for every prompt, got others; see the cache.")
  return rows


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--prompts", type=int, default=100_000, help="how many (100000)")
  default = soak.ROOT / "scripts" / "results" / "long_list.json"
  parser.add_argument("--output", default=str(default), help="'' for none")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    rows = measure(flags.prompts, pathlib.Path(folder))
  for row in rows:
    print(row)
  versions = {"calm": calm.__version__, "jax": jax.__version__}
  result = {
    "command": shlex.join(["python", "scripts/long_list.py", *sys.argv[1:]]),
    "columns": COLUMNS,
    "rows": rows,
    "versions": {**versions, "python": platform.python_version()},
    "machine": "two cores that other work shares",
  }
  if flags.output:
    storage.write_atomically(flags.output, json.dumps(result, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
