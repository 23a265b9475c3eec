"""Serve a model over HTTP: a page, and requests of OpenAI's and TGI's clients.

  calm serve --model=mine                        # http://127.0.0.1:8000
  calm serve --online=state.jsonl --tolerance=0.1
  calm serve --host=0.0.0.0 --api_key_file=key.txt
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "a long text", "stream": true}'

Without a calibration or --threshold, texts are full depth's. The first start
compiles all programs, later ones read them from a cache. SIGTERM finishes the
requests that were taken; a second one ends at once.
"""

import argparse
import contextlib
import pathlib
import socket
from collections.abc import Iterator

from rich import console as rich_console

from calm import signals, storage
from calm.calibrate import NEVER_EXIT, thresholds
from calm.commands import flags, infer
from calm.console import print_text

MOST_CONNECTIONS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = flags.add
  flags.add_shared(parser, "model")
  add(parser, "host", "ADDRESS", "listen here", "127.0.0.1")
  add(parser, "port", "K", "and here; 0: at a free one", 8000)
  add(parser, "api_key_file", "FILE", "ask every request for the key in FILE")
  add(parser, "open", None, "listen beyond this machine without a key")
  add(
    parser, "queue", "N", "prompts that may wait; more are answered by 429", 64
  )
  add(parser, "timeout", "N", "most seconds that an answer may take", 60)
  flags.add_promise(parser)
  flags.add_decoding(parser)


def run(arguments: argparse.Namespace) -> int:
  import uvicorn

  from calm import serve

  console = rich_console.Console(stderr=True, highlight=False)
  path = arguments.api_key_file
  key = ""
  loopback = arguments.host in serve.LOOPBACK
  if path is not None:
    key = storage.content(path, 4096).decode("utf-8", "replace").strip()
    if len(key) < 8 or not key.isascii():
      raise ValueError(
        f"Expected {path!r} to hold 8 ASCII characters or more, got others."
      )
  if not (loopback or key or arguments.open):
    host = f"`--host={arguments.host}` lets other machines ask"
    raise ValueError(f"{host}; give `--api_key_file`, or `--open`.")
  if arguments.online and (arguments.calibration or arguments.threshold):
    raise ValueError(
      "`--online` finds the threshold; leave the one that is given out."
    )
  level = arguments.threshold and thresholds.parse_threshold(
    arguments.threshold
  )
  with contextlib.closing(_listen(arguments.host, arguments.port)) as listener:
    model = infer.load(arguments, level)
    if model.options.num_devices > 1:
      raise ValueError(
        "`calm serve` decodes on one device; leave `--num_devices` out."
      )
    served = next(
      (one for one in (level, model.threshold) if one is not None), NEVER_EXIT
    )

    def end():
      return setattr(server, "should_exit", True)

    online = infer.open_online(arguments, model)
    device = serve.Device(model, served, online, arguments.queue, console, end)
    name = pathlib.Path(arguments.model).resolve().name
    timeout = arguments.timeout
    api = serve.Api(device, name, key, timeout, loopback)
    config = uvicorn.Config(
      api.app,
      # which bounds headers; httptools, where it is installed, does not
      http="h11",
      log_level="warning",
      access_log=False,
      server_header=False,
      limit_concurrency=MOST_CONNECTIONS,
      timeout_graceful_shutdown=timeout + 1,
    )
    server = uvicorn.Server(config)
    server.capture_signals = lambda: _ending(server)
    host, port = listener.getsockname()[:2]
    print_text(
      console, f"Compiling; http://{host}:{port}/health says when it is ready."
    )
    server.run(sockets=[listener])
  if device.failed is not None:
    raise device.failed
  return 0


@contextlib.contextmanager
def _ending(server) -> Iterator[None]:
  """A signal ends the server when it has answered, a second one at once."""

  def end(number, frame):
    if server.should_exit:
      signals.end(number)
    server.should_exit = True

  with signals.handling(end):
    yield


def _listen(host: str, port: int) -> socket.socket:
  if port > 65535:
    raise ValueError(f"Expected `--port` of at most 65535, got {port}.")
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
  except OSError as error:
    got = f"got {host!r} and {port} ({error}); choose others"
    raise OSError(
      f"Expected `--host` and `--port` that are free, {got}."
    ) from error
  # Connections inherit it: headers do not wait 40 ms for the client to confirm
  # them.
  listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return listener
