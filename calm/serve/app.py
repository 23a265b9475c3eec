"""The HTTP side of the server: routes, limits, metrics, events."""

import asyncio
import contextlib
import functools
import hmac
import json
import pathlib
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from calm import storage
from calm.calibrate import thresholds
from calm.inference import outputs
from calm.serve import protocol
from calm.serve.device import Device, Part
from calm.serve.protocol import Refusal

MOST_BODY = 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost")
_NO_NETWORK = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
  " connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
Handler = Callable[[Request], Awaitable[Response]]


class Api:
  """The routes over a `Device`; `app` is the application, which starts and ends it.

  Args:
    name: the model's name in requests.
    key: what `Authorization: Bearer` must hold; '': nothing.
    timeout: most seconds that an answer, or a body, may take.
    loopback: whether the server may be called by names of this machine only.
  """

  def __init__(
    self, device: Device, name: str, key: str = "", timeout: float = 60.0, loopback: bool = True
  ):
    self.device, self.name, self._key, self._timeout = device, name, key, timeout
    self._late = Refusal(f"It took more than {timeout:g} seconds.", None, 504, "timeout")
    self._add_metrics()
    text = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
    page = HTMLResponse(text, headers={"Content-Security-Policy": _NO_NETWORK})
    asks = lambda kind, stream=None: self._guard(functools.partial(self._ask, kind, stream))
    post = functools.partial(Route, methods=["POST"])
    # A page of another site whose name was made to lead here (DNS rebinding) is refused.
    known = Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    self.app = Starlette(
      routes=[
        post("/", asks(protocol.Generation)),  # as huggingface_hub's client asks
        Route("/", page),
        Route("/health", self._health),
        Route("/metrics", self._guard(self._metrics)),
        Route("/v1/models", self._guard(self._models)),
        post("/v1/completions", asks(protocol.Completion)),
        post("/generate", asks(protocol.Generation)),
        post("/generate_stream", asks(protocol.Generation, True)),
      ],
      middleware=[known] if loopback else [],
      exception_handlers={HTTPException: lambda request, error: _refused(error)},
      lifespan=self._lifespan,
    )

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self.device.start()
    yield
    await asyncio.to_thread(self.device.stop)

  def _add_metrics(self) -> None:
    self._registry = add = prometheus.CollectorRegistry()
    kind, labels = functools.partial(prometheus.Summary, registry=add), ["route", "status"]
    self._requests = kind("calm_requests", "Requests, and seconds before answers.", labels)
    self._layers = kind("calm_tokens", "Tokens, and their decoder layers.")
    device, online = self.device, self.device.online
    for name, text, value in (
      ("queue", "Prompts that wait.", lambda: len(device.waiting)),
      ("ready", "1 when every program is compiled.", lambda: device.ready),
      ("threshold", "Threshold that is served; +Inf: full depth.", lambda: device.threshold),
      ("checks", "Served prompts that were checked.", lambda: online.checked if online else 0),
      ("alarms", "Alarms of the online calibration.", lambda: online.life if online else 0),
    ):
      prometheus.Gauge(f"calm_{name}", text, registry=add).set_function(value)

  def _guard(self, handler: Handler) -> Handler:
    """Asks for the key, counts requests, and answers errors as JSON."""

    async def guarded(request: Request) -> Response:
      start, route = time.perf_counter(), request.url.path
      try:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
          expected = "Expected `Authorization: Bearer KEY` with the server's key."
          raise Refusal(expected, None, 401, "invalid_api_key")
        async with asyncio.timeout(self._timeout):
          response = await handler(request)
      except TimeoutError:
        response = _refused(self._late)
      except Refusal as refusal:
        response = _refused(refusal)
      except ClientDisconnect:
        response = Response(status_code=499)
      except Exception as error:
        self.device.say(f"{route} failed: {type(error).__name__}: {error}")
        response = _refused(Refusal("The server failed; its log says why.", None, 500))
      spent = time.perf_counter() - start
      self._requests.labels(route, str(response.status_code)).observe(spent)
      return response

    return guarded

  async def _health(self, request: Request) -> Response:
    status = "failed" if self.device.failed else "ok" if self.device.ready else "compiling"
    done, total = self.device.compiled
    body = {"status": status, "compiled": done, "of": total}
    return JSONResponse(body, 200 if self.device.ready else 503)

  async def _metrics(self, request: Request) -> Response:
    content = prometheus.generate_latest(self._registry)
    return Response(content, media_type=prometheus.CONTENT_TYPE_LATEST)

  async def _models(self, request: Request) -> Response:
    device, online = self.device, self.device.online
    options, layers = device.model.options, device.model.num_layers
    as_json = thresholds.threshold_to_json
    history = [(count, as_json(level), mean) for count, level, mean in list(device.history)]
    state = None
    if online is not None:
      state = {"served": online.served, "checked": online.checked, "alarms": online.life}
    about = {
      "max_input_tokens": options.max_input_length,
      "max_new_tokens": options.max_decode_length,
      "num_layers": layers,
      "threshold": as_json(device.threshold),
      "guarantee": device.guarantee(device.threshold),
      "colours": [(colour, outputs.text_colour(colour)) for colour in outputs.scale(layers)],
      "online": state and {**state, "history": history},
    }
    model = {"id": self.name, "object": "model", "created": 0, "owned_by": "calm"}
    return JSONResponse({"object": "list", "data": [model | {"calm": about}]})

  async def _ask(self, kind: Any, stream: bool | None, request: Request) -> Response:
    """One shape of requests; `stream` None: as the request has it."""
    body = await self._body(request)
    if not self.device.ready:
      raise Refusal("Programs are being compiled.", None, 503, Retry_After="5")
    asked = kind(body, self.device, self.name)
    asked.stream = asked.stream if stream is None else stream
    loop, came = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Part]]()

    def deliver(index: int, part: Part) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(came.put_nowait, (index, part))

    for index, job in enumerate(asked.jobs):
      job.stream, job.deliver = asked.stream, functools.partial(deliver, index)
    try:
      self.device.submit(asked.jobs)
    except queue.Full:
      raise Refusal("The queue is full.", None, 429, "queue_full", Retry_After="1") from None
    parts = self._receive(asked.jobs, came)
    if asked.stream:
      return StreamingResponse(self._events(asked, parts), media_type="text/event-stream")
    watching = asyncio.create_task(_watch(request, came))
    try:
      async with contextlib.aclosing(parts):
        found = {index: part async for index, part in parts}
    finally:
      watching.cancel()
    return JSONResponse(asked.whole([found[index] for index in range(len(found))]))

  async def _body(self, request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":  # pages of other sites may send other types unasked
      raise Refusal(f"Expected `Content-Type: application/json`, got {kind!r}.", None, 415)
    size = request.headers.get("content-length", "none")
    if not size.isdecimal() or int(size) > MOST_BODY:
      got = f"Expected `Content-Length` of at most {MOST_BODY}, got {size[:20]}."
      raise Refusal(got, None, 413)
    try:
      body = storage.parse_json(await request.body())
      # No half characters, which no answer can name.
      json.dumps(body, ensure_ascii=False).encode()
      return body
    except ValueError as error:
      raise Refusal(f"Expected the body to be JSON: {str(error)[:200]}") from None

  async def _receive(self, jobs, came: asyncio.Queue) -> AsyncGenerator[tuple[int, Part], None]:
    left, end = len(jobs), time.monotonic() + self._timeout
    try:
      while left:
        index, part = await asyncio.wait_for(came.get(), end - time.monotonic())
        if index < 0:
          raise ClientDisconnect
        if part.error:
          raise Refusal(part.error, None, 500)
        left -= part.reason is not None
        for layers in part.output.exit_layers if part.reason else ():
          self._layers.observe(layers)
        yield index, part
    finally:
      for job in jobs:
        job.gone = True

  async def _events(self, asked: Any, parts) -> AsyncIterator[str]:
    found = [Part() for _ in asked.jobs]
    data = lambda text: f"data: {text}\n\n"
    try:
      async with contextlib.aclosing(parts):
        async for index, part in parts:
          for event in asked.events(index, part, found[index]):
            yield data(json.dumps(event))
          found[index] = part
      for line in asked.end(found):
        yield data(line)
    except (Refusal, TimeoutError) as error:
      refusal = error if isinstance(error, Refusal) else self._late
      yield data(json.dumps(refusal.body))


async def _watch(request: Request, came: asyncio.Queue) -> None:
  """Ends the waiting for parts when the client has left."""
  while (await request.receive())["type"] != "http.disconnect":
    pass
  came.put_nowait((-1, Part()))


def _refused(error: Exception) -> JSONResponse:
  if isinstance(error, HTTPException):  # the router: no such path, or another method
    error = Refusal(f"{error.detail}.", None, error.status_code)
  assert isinstance(error, Refusal)
  return JSONResponse(error.body, error.status, headers=error.headers)
