r"""A long life in one process: many shapes, many predictors, many prompts.

  python scripts/soak.py               everything, and its JSON
  python scripts/soak.py --batches=200 --prompts=0 --output=

batches: the packed model decodes batches of random sizes and lengths, every measure in its turn
and more shapes than programs are kept, and every text is compared with the same text decoded
alone: tokens and exits are equal, or their first difference is a tie (`soak_measures.is_tie`).
A measure's threshold is the median of the confidences that full depth refuses. Every shape is
met once before anything is counted: a program that was dropped is loaded from the disk, and a
loaded one takes half as much room again as one that was compiled. predictors: opened one after
the other, each with programs of its own. prompts: `calm infer` over a long list with a toy.
Memory maps, file descriptors and resident memory are read from /proc; the second half of a part
must not need more than the first, but for a tenth. The exit status is 1 where that, or a text,
does not hold.
"""

import argparse
import dataclasses
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

import jax
import numpy as np
import soak_measures

import calm
from calm import checkpoints, inference, storage
from calm.data import vocabulary as vocabulary_lib
from calm.decode import compiled
from calm.t5 import network

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "calm" / "assets" / "prompts_calibration.jsonl"
COLUMNS = [
  "part",
  "runs",
  "tokens by exit layer",
  "programs compiled",
  "memory maps, first half / second half",
  "file descriptors",
  "resident MB",
  "different texts",
  "seconds",
]
# What the second half may need more than the first.
SLACK = 1.1


@dataclasses.dataclass(frozen=True)
class Usage:
  """What this process holds."""

  maps: int
  descriptors: int
  resident: float


def usage() -> Usage:
  """Read from /proc."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return Usage(
    pathlib.Path("/proc/self/maps").read_bytes().count(b"\n"),
    len(os.listdir("/proc/self/fd")),
    pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
  )


def halves(seen: list[Usage]) -> dict[str, tuple[float, float]]:
  """The most of each kind in the first half and in the second."""
  middle = max(1, len(seen) // 2)
  most = lambda part, name: max(getattr(one, name) for one in part or seen)
  names = [field.name for field in dataclasses.fields(Usage)]
  return {name: (most(seen[:middle], name), most(seen[middle:], name)) for name in names}


def flat(found: dict[str, tuple[float, float]]) -> bool:
  return all(second <= SLACK * first for first, second in found.values())


def row(
  part: str, runs: int, compiled_count: int, found, different: str, seconds: float
) -> list:
  whole = lambda name: " / ".join(f"{value:.0f}" for value in found[name])
  return [
    *(part, runs, "", compiled_count, whole("maps"), whole("descriptors"), whole("resident")),
    *(different, f"{seconds:.0f}"),
  ]


def texts(rng: random.Random, count: int) -> list[str]:
  """Beginnings of the packed prompts, of 1 to 20 words."""
  lines = PROMPTS.read_text("utf-8").splitlines()
  words = [json.loads(line)["input"].split() for line in lines]
  return [" ".join(rng.choice(words)[: rng.randint(1, 20)]) for _ in range(count)]


def batches(flags: argparse.Namespace, rng: random.Random) -> tuple[list[list], bool]:
  """Random batches of the packed model, the measures taking turns."""
  start = time.monotonic()
  options = {"max_decode_length": 8, "max_input_length": 64}
  subjects, compiled.LIMIT = [], flags.programs
  for name in flags.measures.split(","):
    subject = soak_measures.Subject(name, texts(rng, flags.texts), flags.most_rows, **options)
    subjects.append(subject)
    subject.meet_shapes()
    print(f"{name} at {subject.threshold:g}: {subject.layers}", flush=True)
  seen, counted = [usage()], program_count()
  for done in range(flags.batches):
    subjects[done // flags.turn % len(subjects)].decode(rng)
    if done % 20 == 19:
      seen.append(usage())
    if done % 100 == 99:
      print(f"{done + 1} batches, {time.monotonic() - start:.0f} s, {seen[-1]}", flush=True)
    if time.monotonic() - start > flags.seconds:
      break
  compiled.LIMIT = 128
  found = halves(seen)
  lines = [
    [f"{each.name} at {each.threshold:g}", each.batches, each.layers, *[""] * 4, each.says, ""]
    for each in subjects
  ]
  total = lambda name: sum(getattr(each, name) for each in subjects)
  name = f"together: 1 to {flags.most_rows} rows, {flags.programs} programs kept"
  says = f"{total('different')} of {total('rows')}, {total('ties')} of them ties"
  made, seconds = program_count() - counted, time.monotonic() - start
  lines.append(row(name, total("batches"), made, found, says, seconds))
  return lines, flat(found) and all(each.good for each in subjects)


def predictors(flags: argparse.Namespace, rng: random.Random) -> tuple[list[list], bool]:
  """Predictors opened one after the other, each of other lengths."""
  start, seen, counted = time.monotonic(), [], program_count()
  prompts = texts(rng, 2)
  for number in range(flags.predictors):
    length = 2 + number % 10  # so that programs of ten are kept, and used again
    model = inference.load("packed", max_decode_length=length, exit_layers=(3, 4))
    model.generate(prompts, threshold=flags.threshold)
    seen.append(usage())
  found = halves(seen)
  made = program_count() - counted
  line = row("predictors", flags.predictors, made, found, "", time.monotonic() - start)
  # Programs are kept up to a bound, so that maps and memory grow until it is reached.
  return [line], found["descriptors"][1] <= SLACK * found["descriptors"][0]


def infer(flags: argparse.Namespace, rng: random.Random) -> tuple[list[list], bool]:
  """`calm infer` with a toy over a tenth of the prompts, and over all."""
  del rng
  start, peaks = time.monotonic(), []
  with tempfile.TemporaryDirectory() as folder:
    at = pathlib.Path(folder)
    save_toy(at / "toy")
    for count in (flags.prompts // 10, flags.prompts):
      prompts = at / f"{count}.jsonl"
      with open(prompts, "w", encoding="utf-8") as file:
        for number in range(count):
          file.write(json.dumps({"id": f"p{number}", "input": f"text number {number}"}) + "\n")
      command = [
        *(sys.executable, "-m", "calm", "infer", f"--model={at / 'toy'}"),
        *(f"--prompts={prompts}", f"--output={at / 'out.jsonl'}", "--threshold=0.5"),
        *("--max_input_length=32", "--max_decode_length=4", "--batch_size=128"),
      ]
      process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
      _, status, used = os.wait4(process.pid, 0)
      process.returncode = os.waitstatus_to_exitcode(status)
      lines = (at / "out.jsonl").read_bytes().count(b"\n")
      if status or lines != count:
        raise RuntimeError(
          f"Expected {count} lines of {command}, got {lines} and status {status}; run it by"
          " hand."
        )
      peaks.append(used.ru_maxrss / 1024)
  found = {"maps": ("",), "descriptors": ("",), "resident": tuple(peaks)}
  line = [
    *(f"`calm infer`, toy, {flags.prompts // 10} / {flags.prompts} prompts", 2, ""),
    *("", "", "", " / ".join(f"{peak:.0f} (peak)" for peak in found["resident"]), ""),
    f"{time.monotonic() - start:.0f}",
  ]
  return [line], peaks[1] <= SLACK * peaks[0]


def save_toy(folder: pathlib.Path) -> None:
  """A model of bytes that has learned nothing."""
  config = network.T5Config(
    **{"vocab_size": 264, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24},
    **{"num_encoder_layers": 1, "num_decoder_layers": 2, "mlp_activations": ("gelu", "linear")},
  )
  tokens = np.ones((1, 4), np.int32)
  params = network.Transformer(config).init(
    jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
  )["params"]
  checkpoints.save(
    folder,
    jax.tree.map(np.asarray, params),
    config,
    vocabulary=vocabulary_lib.ByteVocabulary(extra_ids=0),
  )


def program_count() -> int:
  return COMPILED[0]


COMPILED = [0]


def _listen(event: str, duration_secs: float, **_) -> None:
  del duration_secs
  COMPILED[0] += event.endswith("/backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_listen)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--batches", type=int, default=2000, help="random batches (2000)")
  parser.add_argument("--most_rows", type=int, default=12, help="rows of a batch (1 to 12)")
  parser.add_argument("--programs", type=int, default=50, help="programs that are kept (50)")
  parser.add_argument("--predictors", type=int, default=40, help="opened in turn (40)")
  parser.add_argument("--prompts", type=int, default=100_000, help="of calm infer (100000)")
  parser.add_argument("--threshold", type=float, default=0.1, help="of predictors (0.1)")
  parser.add_argument(
    "--measures", default=",".join(soak_measures.MEASURES), help="of batches (all)"
  )
  parser.add_argument("--texts", type=int, default=40, help="different ones a measure (40)")
  parser.add_argument("--turn", type=int, default=125, help="batches of a measure's turn (125)")
  parser.add_argument("--seed", type=int, default=0, help="of shapes and texts (0)")
  parser.add_argument("--seconds", type=float, default=9000, help="bound of batches (9000)")
  parser.add_argument("--cache", help="folder of compiled programs (default: a new one)")
  parser.add_argument(
    "--output", default=str(ROOT / "scripts" / "results" / "soak.json"), help="'' for none"
  )
  flags = parser.parse_args()
  # What was dropped is compiled again from the disk: it is loaded anew, and that is the point.
  cache = tempfile.TemporaryDirectory()
  jax.config.update("jax_compilation_cache_dir", flags.cache or cache.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  rng, results = random.Random(flags.seed), []
  parts = ((batches, flags.batches), (predictors, flags.predictors), (infer, flags.prompts))
  for part, wanted in parts:
    if wanted:
      results.append(part(flags, rng))
      print(results[-1], flush=True)
      write(flags.output, [line for lines, _ in results for line in lines])
  cache.cleanup()
  return int(not all(good for _, good in results))


def write(output: str, rows: list[list]) -> None:
  """The table so far."""
  versions = {"calm": calm.__version__, "jax": jax.__version__}
  given = [part for part in sys.argv[1:] if not part.startswith(("--cache", "--output"))]
  result = {
    "command": shlex.join(["python", "scripts/soak.py", *given]),
    "columns": COLUMNS,
    "rows": rows,
    "versions": {**versions, "python": platform.python_version()},
    "machine": "two cores that other work shares",
  }
  if output:
    storage.write_atomically(output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  sys.exit(main())
