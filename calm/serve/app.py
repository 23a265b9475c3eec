"""The HTTP side of the server: routes, limits, metrics, events."""

import asyncio
import contextlib
import functools
import hmac
import json
import pathlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  Response,
  StreamingResponse,
)
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
  " connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri "
  "'none'"
)
Handler = Callable[[Request], Awaitable[Response]]


class Api:
  """The routes over a `Device`; `app` is the application, which starts and ends
  it.

  Args:
    name: the model's name in requests.
    key: what `Authorization: Bearer` must hold; '': nothing.
    timeout: most seconds that an answer, or a body, may take.
    loopback: whether the server may be called by names of this machine only.
  """

  def __init__(
    self,
    device: Device,
    name: str,
    key: str = "",
    timeout: float = 60.0,
    loopback: bool = True,
  ):
    self.device = device
    self.name = name
    self._key = key
    self._timeout = timeout
    self._registry = add = prometheus.CollectorRegistry()
    kind = functools.partial(prometheus.Summary, registry=add)
    labels = ["route", "status"]
    self._requests = kind(
      "calm_requests", "Requests, and seconds before answers.", labels
    )
    self._layers = kind("calm_tokens", "Tokens, and their decoder layers.")
    online = device.online
    for gauge, text, value in (
      ("queue", "Prompts that wait.", lambda: len(device.waiting)),
      ("ready", "1 when every program is compiled.", lambda: device.ready),
      (
        "threshold",
        "Threshold that is served; +Inf: full depth.",
        lambda: device.threshold,
      ),
      (
        "checks",
        "Served prompts that were checked.",
        lambda: online.checked if online else 0,
      ),
      (
        "alarms",
        "Alarms of the online calibration.",
        lambda: online.life if online else 0,
      ),
    ):
      prometheus.Gauge(f"calm_{gauge}", text, registry=add).set_function(value)
    page = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")

    def asks(kind, stream=False):
      return self._guard(functools.partial(self._ask, kind, stream))

    post = functools.partial(Route, methods=["POST"])
    # A page of another site whose name was made to lead here (DNS rebinding) is
    # refused.
    known = Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    self.app = Starlette(
      routes=[
        # as huggingface_hub's client asks
        post("/", asks(protocol.Generation)),
        Route(
          "/",
          HTMLResponse(page, headers={"Content-Security-Policy": _NO_NETWORK}),
        ),
        Route("/health", self._health),
        Route("/metrics", self._guard(self._metrics)),
        Route("/v1/models", self._guard(self._models)),
        post("/v1/completions", asks(protocol.Completion)),
        post("/generate", asks(protocol.Generation)),
        post("/generate_stream", asks(protocol.Generation, True)),
      ],
      middleware=[known] if loopback else [],
      exception_handlers={
        HTTPException: lambda request, error: self._refused(error)
      },
      lifespan=self._lifespan,
    )

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self.device.start()
    yield
    self.device.stop()
    await asyncio.to_thread(self.device.join)

  def _guard(self, handler: Handler) -> Handler:
    """Asks for the key, counts requests, and answers errors as JSON."""

    async def guarded(request: Request) -> Response:
      start = time.perf_counter()
      route = request.url.path
      try:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(
          given.encode(), self._key.encode()
        ):
          expected = (
            "Expected `Authorization: Bearer KEY` with the server's key."
          )
          raise Refusal(expected, None, 401, "invalid_api_key")
        async with asyncio.timeout(self._timeout):
          response = await handler(request)
      except Exception as error:
        response = self._refused(error)
      self._requests.labels(route, response.status_code).observe(
        time.perf_counter() - start
      )
      return response

    return guarded

  def _refused(self, error: Exception) -> JSONResponse:
    """What a client gets for an error."""
    # the router: no such path, or another method
    if isinstance(error, HTTPException):
      error = Refusal(f"{error.detail}.", None, error.status_code)
    elif isinstance(error, TimeoutError):
      error = Refusal(
        f"It took more than {self._timeout:g} seconds.", None, 504, "timeout"
      )
    elif isinstance(error, ClientDisconnect):
      error = Refusal("The client left.", None, 499)
    elif not isinstance(error, Refusal):
      self.device.say(f"A request failed: {type(error).__name__}: {error}")
      error = Refusal("The server failed; its log says why.", None, 500)
    return JSONResponse(error.body, error.status, headers=error.headers)

  async def _health(self, request: Request) -> Response:
    status = (
      "failed"
      if self.device.failed
      else "ok"
      if self.device.ready
      else "compiling"
    )
    done, total = self.device.compiled
    body = {"status": status, "compiled": done, "of": total}
    return JSONResponse(body, 200 if self.device.ready else 503)

  async def _metrics(self, request: Request) -> Response:
    content = prometheus.generate_latest(self._registry)
    return Response(content, media_type=prometheus.CONTENT_TYPE_LATEST)

  async def _models(self, request: Request) -> Response:
    device = self.device
    online = self.device.online
    options = device.model.options
    layers = device.model.num_layers
    as_json = thresholds.threshold_to_json
    history = [
      (count, as_json(level), mean)
      for count, level, mean in list(device.history)
    ]
    state = online and dict(
      served=online.served, checked=online.checked, alarms=online.life
    )
    about = {
      "max_input_tokens": options.max_input_length,
      "max_new_tokens": options.max_decode_length,
      "num_layers": layers,
      "threshold": as_json(device.threshold),
      "guarantee": device.guarantee(device.threshold),
      "colours": [
        (colour, outputs.text_colour(colour))
        for colour in outputs.scale(layers)
      ],
      "online": state and {**state, "history": history},
    }
    model = {
      "id": self.name,
      "object": "model",
      "created": 0,
      "owned_by": "calm",
    }
    return JSONResponse({"object": "list", "data": [model | {"calm": about}]})

  async def _ask(self, kind: Any, stream: bool, request: Request) -> Response:
    """One shape of requests; `stream`: in events, even if the request does not
    ask for them.
    """
    body = await self._body(request)
    if not self.device.ready:
      raise Refusal("Programs are being compiled.", None, 503, Retry_After="5")
    asked = kind(body, self.device, self.name)
    stream, came = (
      stream or asked.stream,
      asyncio.Queue[tuple[int, Part | Exception]](),
    )
    tell = functools.partial(
      asyncio.get_running_loop().call_soon_threadsafe, came.put_nowait
    )
    for index, job in enumerate(asked.jobs):
      job.stream = stream
      job.deliver = lambda part, index=index: tell((index, part))
    if not self.device.submit(asked.jobs):
      raise Refusal(
        "The queue is full.", None, 429, "queue_full", Retry_After="1"
      )
    parts = self._receive(asked.jobs, came)
    if stream:
      return StreamingResponse(
        self._events(asked, parts), media_type="text/event-stream"
      )
    # After its body, all that can come of a request is that its client has
    # left.
    leaving = asyncio.ensure_future(request.receive())
    leaving.add_done_callback(
      lambda _: came.put_nowait((0, ClientDisconnect()))
    )
    try:
      found = {index: part async for index, part in parts}
    finally:
      leaving.cancel()
    return JSONResponse(
      asked.whole([found[index] for index in range(len(found))])
    )

  async def _body(self, request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    # pages of other sites may send other types unasked
    if kind != "application/json":
      raise Refusal(
        f"Expected `Content-Type: application/json`, got {kind!r}.", None, 415
      )
    size = request.headers.get("content-length", "none")
    if not size.isdecimal() or int(size) > MOST_BODY:
      got = (
        f"Expected `Content-Length` of at most {MOST_BODY}, got {size[:20]}."
      )
      raise Refusal(got, None, 413)
    try:
      body = storage.parse_json(await request.body())
      # No half characters, which no answer can name.
      json.dumps(body, ensure_ascii=False).encode()
      return body
    except ValueError as error:
      raise Refusal(
        f"Expected the body to be JSON: {str(error)[:200]}"
      ) from None

  async def _receive(
    self, jobs, came: asyncio.Queue
  ) -> AsyncGenerator[tuple[int, Part], None]:
    left = len(jobs)
    end = time.monotonic() + self._timeout
    try:
      while left:
        index, part = await asyncio.wait_for(came.get(), end - time.monotonic())
        if isinstance(part, Exception):
          raise part
        left -= part.reason is not None
        for layers in part.output.exit_layers if part.reason else ():
          self._layers.observe(layers)
        yield index, part
    finally:
      for job in jobs:
        job.gone = True

  async def _events(self, asked: Any, parts) -> AsyncIterator[str]:
    try:
      async with contextlib.aclosing(parts):
        async for event in asked.events(parts):
          yield f"data: {event}\n\n"
    except Exception as error:
      yield f"data: {bytes(self._refused(error).body).decode()}\n\n"
