"""Servers under arrivals at random: milliseconds to an answer and to its first
token.

  python scripts/benchmark_serve.py --results=serve
  --calibration=runs/cache/calibration.json python scripts/benchmark_serve.py
  --results=serve_small --model=small --threshold=0.64

All systems have the routes, the queue, the rule of batches and as many threads
as pay of `calm serve` (`serve.Device`, whose decoder peers replace), each in a
process of its own, and take turns. 'A core each': CTranslate2 has one thread a
prompt and a prompt a core, where by itself it gives one prompt all cores. 'No
model' answers with an empty text: what the server adds. Capacity is texts a
second for --clients that ask one after another. Then prompts arrive as a
Poisson process at shares of the first system's capacity, the same arrivals for
every system; at once (burst); and as streams. Numbers are medians of rounds.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import benchmark_models as models
import benchmark_peers as peers
import harness
import numpy as np
import tables

from calm import inference, serve
from calm.calibrate import NEVER_EXIT
from calm.commands import run as run_lib
from calm.data import prompt_files
from calm.inference import outputs
from calm.serve.device import Part, workers_that_pay

SHARES = (0.3, 0.6, 0.9)
# Exits under the promise, of float32 and with matrices in 8 bits.
CALIBRATED = {
  "calm, calibrated": "calibration",
  "calm, calibrated, 8 bits": "narrow",
}
SYSTEMS = {
  **{
    "calm, full depth": (),
    "calm, exact": (),
    **dict.fromkeys(CALIBRATED, ()),
    "no model": (),
  },
  **{
    f"CTranslate2 {kind}": ("torch", "transformers", "ctranslate2")
    for kind in ("int8", "int8, a core each", "float32", "float32, a core each")
  },
  "transformers": ("torch", "transformers"),
}
COLUMNS = ("system", "arrivals", "layers", "texts a second", "ms p50", "ms p99")
COLUMNS += ("ms first token", "CPU ms a text")
PACKAGES = (
  "jax",
  "starlette",
  "uvicorn",
  "torch",
  "transformers",
  "ctranslate2",
)

# (prompts, most tokens, told of a row's first token or None) -> the tokens of
# each.
Decode = Callable[[Sequence[Sequence[int]], int, Any], list[list[int]]]
# Seconds to the first token and to the end, and the answer's last line.
Answer = tuple[float, float, bytes]


# ---- The servers


class Numbers:
  """Texts that are numbers of tokens, for random weights."""

  pad_id = 0
  eos_id = 1
  unk_id = 2
  vocab_size = models.SIZES["small"]["vocab_size"]
  encode = staticmethod(lambda text: [int(word) for word in text.split()])
  decode = staticmethod(lambda ids: " ".join(map(str, ids)))
  piece = staticmethod(str)


class PeerDevice(serve.Device):
  """Another decoder behind the same queue."""

  def __init__(
    self, model: inference.Predictor, decode: Decode, **options: Any
  ):
    super().__init__(model, **options)
    self._peer = decode

  def _compile(self) -> None:
    for length in self._lengths:
      for size in self._sizes:
        rows = [[3] * (length - 1) + [self.model.eos_id]] * size

        def run(rows=rows):
          return self._peer(rows, 8, None)

        self._seconds[size, length] = min(
          timeit.repeat(run, number=1, repeat=4)
        )
    row = [3] * 63 + [self.model.eos_id]
    self.workers = workers_that_pay(lambda: self._peer([row], 8, None))
    self.ready = True

  def _decode(self, jobs, level):
    def first(row: int, token: int) -> None:
      output = self._output([token])
      jobs[row].deliver(Part(output, jobs[row].visible(output, "")[0]))

    told = first if any(job.stream for job in jobs) else None
    rows = self._peer(
      [job.tokens for job in jobs], max(job.limit for job in jobs), told
    )
    for job, ids in zip(jobs, rows, strict=True):
      output = self._output(ids[: job.limit])
      yield job, output, *job.visible(output, "")

  def _output(self, ids: Sequence[int]) -> outputs.Output:
    model = self.model
    ones = (1.0,) * len(ids)
    pieces = tuple(map(model.vocabulary.piece, ids))
    layers = (model.num_layers,) * len(ids)
    text = model.vocabulary.decode(ids)
    end = (0.0, model.num_layers, model.eos_id)
    return outputs.Output(text, tuple(ids), pieces, layers, ones, ones, *end)


def ctranslate2(model: inference.Predictor, kind: str) -> Decode:
  kind, _, apart = kind.partition(", ")
  threads = (
    {"inter_threads": os.cpu_count(), "intra_threads": 1} if apart else {}
  )
  translator = peers.Translator(model, kind, **threads)

  def decode(rows, limit, first):
    def told(step) -> bool:
      if step.step == 0:
        first(step.batch_id, step.token_id)
      return False

    return translator.generate(rows, limit, callback=told if first else None)

  return decode


def transformers(model: inference.Predictor) -> Decode:
  theirs = peers.Torch(model)
  end = model.eos_id

  def decode(rows, limit, first):
    def told(ids, scores, **_):
      if first and ids.shape[1] == 2:
        for row, token in enumerate(ids[:, 1].tolist()):
          first(row, token)
      return theirs.torch.zeros(len(ids), dtype=theirs.torch.bool)

    batch = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for target, row in zip(batch, rows, strict=True):
      target[: len(row)] = row
    made = theirs.generate(batch, limit, stopping_criteria=[told]).tolist()
    return [ids[: [*ids, end].index(end) + 1] for ids in made]

  return decode


def device(options: argparse.Namespace) -> serve.Device:
  """The system of --system, which begins when it is started."""
  name = options.system
  early = options.system in CALIBRATED
  if options.model == "small":
    lengths: Any = {"max_input_length": 128, "max_decode_length": 64}
    if CALIBRATED.get(name) == "narrow":
      lengths |= {
        "weights_dtype": "int8",
        "reference_dtype": "float32",
        "batch_size": 1,
      }
    decoding = inference.DecodeOptions("classifier", **lengths)
    random = models.load("small", "float32", 512)
    model = inference.Predictor(
      random.config, random.params, Numbers(), decoding
    )
  else:
    calibration = getattr(options, CALIBRATED[name]) if early else None
    model = inference.load(options.model, calibration=calibration)
  others: dict[str, Callable[[], Decode]] = {
    "no model": lambda: lambda rows, limit, first: [[model.eos_id]] * len(rows),
    "transformers": lambda: transformers(model),
  }
  if name.startswith("CTranslate2 "):
    others[name] = lambda: ctranslate2(model, name.removeprefix("CTranslate2 "))
  if name in others:
    return PeerDevice(model, others[name](), most_waiting=10_000)
  if name == "calm, exact":
    model = dataclasses.replace(model, exact=inference.exact_rule(model))
  level = (
    options.threshold if options.threshold is not None else model.threshold
  )
  if not early or level is None:
    level = NEVER_EXIT
  return serve.Device(model, level, most_waiting=10_000)


def serve_one(options: argparse.Namespace) -> None:
  """Serves --system at a free port, which is printed when it is ready."""
  import uvicorn

  run_lib.use_compilation_cache()
  listener = socket.create_server(("127.0.0.1", 0))
  made = device(options)
  listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def tell() -> None:
    while not made.ready:
      time.sleep(0.1)
    print(listener.getsockname()[1], flush=True)
    os._exit(bool(sys.stdin.read()))  # with the process that started it

  threading.Thread(target=tell, daemon=True).start()
  made._ended = lambda: os._exit(1)
  api = serve.Api(made, "model", timeout=900)
  config = uvicorn.Config(
    api.app, http="h11", log_level="warning", timeout_keep_alive=900
  )
  uvicorn.Server(config).run(sockets=[listener])


# ---- Their clients


class Client:
  """Connections to a server, in few steps: client and server share the
  cores.
  """

  def __init__(self, name: str, words: Sequence[str]):
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    self.name = name
    self.process = subprocess.Popen([*words, f"--system={name}"], **pipes)
    assert self.process.stdout is not None
    self._port = int(self.process.stdout.readline())
    self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

  async def ask(self, body: dict[str, Any]) -> Answer:
    start = time.perf_counter()
    first = 0.0
    content = json.dumps(body).encode()
    pair = self.free.pop() if self.free else None
    reader, writer = pair or await asyncio.open_connection(
      "127.0.0.1", self._port
    )
    head = (
      "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
      "application/json"
    )
    writer.write(
      f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 200"):
      raise RuntimeError(f"{self.name}: {answer}")
    if length := re.search(rb"content-length: (\d+)", answer):
      last = await reader.readexactly(int(length[1]))
    else:
      last = b""
      while (line := await reader.readline()) != b"0\r\n":
        if line.startswith(b"data: {"):
          first, last = first or time.perf_counter() - start, line[6:]
      await reader.readline()
    self.free.append((reader, writer))
    return first, time.perf_counter() - start, last

  def cpu_seconds(self) -> float:
    """Of the server so far (Linux)."""
    with open(f"/proc/{self.process.pid}/stat") as file:
      user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def one_after_another(
  client: Client, bodies: list[dict], clients: int
) -> list[Answer]:
  """So many clients ask, each when it has its answer."""
  left = iter(bodies)
  found = []

  async def one() -> None:
    for body in left:
      found.append(await client.ask(body))

  await asyncio.gather(*(one() for _ in range(clients)))
  return found


async def arrive(
  client: Client, bodies: list[dict], gaps: np.ndarray
) -> list[Answer]:
  """Prompts come after these gaps, [num_bodies] seconds, whatever became of
  those before.
  """
  start = time.perf_counter()
  asked = []
  for body, due in zip(bodies, np.cumsum(gaps), strict=True):
    await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
    asked.append(asyncio.create_task(client.ask(body)))
  return await asyncio.gather(*asked)


async def measure(
  client: Client,
  bodies: list[dict],
  clients: int,
  rate: float | None,
  seed: int,
) -> dict[str, tuple[float, float, list[Answer]]]:
  """{arrivals: (seconds, CPU seconds of the server, answers)}; `rate` None: its
  capacity.
  """
  made: dict[str, tuple[float, float, list[Answer]]] = {}

  async def timed(name: str, answers) -> float:
    start = time.perf_counter()
    cpu = client.cpu_seconds()
    found = await answers
    made[name] = time.perf_counter() - start, client.cpu_seconds() - cpu, found
    return len(found) / made[name][0]

  client.free.clear()  # connections of another event loop
  await one_after_another(client, bodies, clients)  # every shape has run
  await timed(
    "one client", one_after_another(client, bodies[: len(bodies) // 4], 1)
  )
  most = await timed("capacity", one_after_another(client, bodies, clients))
  gaps = np.random.default_rng(seed).exponential(
    1 / (rate or most), len(bodies)
  )
  for share in SHARES:
    await timed(f"{share:g}", arrive(client, bodies, gaps / share))
  await timed("burst", arrive(client, bodies, 0 * gaps))
  streams = [body | {"stream": True} for body in bodies]
  await timed(
    f"{SHARES[1]:g}, streams", arrive(client, streams, gaps / SHARES[1])
  )
  return made


def row(
  name: str, arrivals: str, rounds: list[tuple[float, float, list[Answer]]]
) -> list[Any]:
  """Medians of the rounds of one system and one kind of arrivals, as a line of
  the table.
  """
  made = []
  for spent, cpu, found in rounds:
    numbers = [
      (*answer[:2], json.loads(answer[2])["calm"]["layers"]) for answer in found
    ]
    first, seconds, layers = np.array(numbers).T
    times = (
      *np.percentile(seconds, (50, 99)),
      np.median(first),
      cpu / len(found),
    )
    made.append([np.mean(layers), len(found) / spent, *1e3 * np.array(times)])
  *rest, first, cpu = np.median(made, axis=0).tolist()
  return [name, arrivals, *rest, first or None, cpu]


def requests(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Bodies of the requests: rows of a file, or random tokens for random
  weights.
  """
  draw = np.random.default_rng(0)
  if options.model == "small":
    sizes = draw.integers((16, 8), (120, 65), (options.count, 2)).tolist()

    def text(size):
      return " ".join(map(str, draw.integers(3, 32_000, size)))

    return [{"prompt": text(size), "max_tokens": most} for size, most in sizes]
  model = inference.load(options.model)
  limit = model.options.max_input_length
  prefix = model.options.task_prefix
  rows = prompt_files.open_prompts(options.prompts)
  texts = [
    row.input
    for row in rows
    if len(model.vocabulary.encode(prefix + row.input)) < limit
  ]
  return [
    {"prompt": texts[i]} for i in draw.integers(len(texts), size=options.count)
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  add = parser.add_argument
  add(
    "--model",
    default="packed",
    help="'packed', 'small' (random weights) or a folder",
  )
  add(
    "--calibration",
    help="of 'calm, calibrated'; a folder of `calm fit` has its own",
  )
  add("--narrow", help="the calibration of 'calm, calibrated, 8 bits'")
  add("--threshold", type=float, help="of 'calm, calibrated', in its place")
  add("--prompts", default=inference.PACKED / "prompts_unseen.jsonl")
  add(
    "--count", type=int, default=300, help="requests of each kind of arrivals"
  )
  add("--clients", type=int, default=16)
  add("--rounds", type=int, default=2)
  add(
    "--systems",
    default=";".join(SYSTEMS),
    help="the first one's capacity is the unit",
  )
  add(
    "--results",
    help="writes scripts/results/RESULTS.json, for scripts/tables.py",
  )
  add("--system", help="serve this one alone")
  options = parser.parse_args()
  if options.system:
    serve_one(options)
    return
  bodies = requests(options)
  clients = []
  rate = None
  rounds: dict[tuple[str, str], list] = {}
  try:
    for name in options.systems.split(";"):
      if name == "calm, calibrated, 8 bits" and not (
        options.narrow or options.threshold
      ):
        continue
      if why := peers.not_installed(*SYSTEMS[name]):
        print(f"not installed: {name} ({why})", file=sys.stderr)
        continue
      clients.append(Client(name, [sys.executable, *sys.argv]))
      print(f"ready: {name}", file=sys.stderr, flush=True)
    for number in range(options.rounds):
      for client in clients if number % 2 == 0 else clients[::-1]:
        made = asyncio.run(
          measure(client, bodies, options.clients, rate, number)
        )
        rate = rate or len(bodies) / made["capacity"][0]
        for arrivals, part in made.items():
          rounds.setdefault((client.name, arrivals), []).append(part)
        print(f"round {number}: {client.name}", file=sys.stderr, flush=True)
  finally:
    for client in clients:
      client.process.kill()
  rows = [row(*key, parts) for key, parts in rounds.items()]
  path = (
    tables.RESULTS / f"{options.results}.json"
    if options.results
    else os.devnull
  )
  about: Any = {"machine": harness.machine(), "packages": PACKAGES}
  print(tables.table(tables.write(path, COLUMNS, rows, **about)))


if __name__ == "__main__":
  main()
