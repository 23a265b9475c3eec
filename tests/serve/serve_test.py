"""A real server over a toy model: texts of `Predictor.generate`, whatever
arrives beside.
"""

import asyncio
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

uvicorn = pytest.importorskip(
  "uvicorn", reason="uvicorn (the `serve` extra) is not installed"
)
httpx = pytest.importorskip(
  "httpx", reason="httpx (the `test` extra) is not installed"
)

from rich import console as rich_console
from starlette.testclient import TestClient

from calm import calibrate, inference, serve
from calm.calibrate import NEVER_EXIT
from calm.commands import cli
from calm.decode import compiled, speculative
from calm.exits import Speculative, StaticExit
from calm.serve import app, device
from tests.commands import toy

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"max_input_length": 32, "max_decode_length": 12, "batch_size": 4}
TEXTS = [
  *toy.TEXTS,
  *(f"prompt number {i} of some" for i in range(7)),
  "é€",
  "",
]
WAIT = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return toy.save_model(tmp_path_factory.mktemp("serve") / "toy")


@pytest.fixture(scope="module")
def model(folder):
  return inference.load(folder, **SIZES)


class Running:
  """A server in a thread of this process."""

  def __init__(self, model, *given, **options):
    console = rich_console.Console(stderr=True)
    self.device = serve.Device(model, *given, console=console, **options)
    self.api = serve.Api(self.device, "toy")
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(self.api.app, http="h11", log_level="warning")
    self.server = uvicorn.Server(config)
    self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    sockets = {"sockets": [listener]}
    self.thread = threading.Thread(
      target=self.server.run, kwargs=sockets, daemon=True
    )

  def __enter__(self):
    self.thread.start()
    wait_until(lambda: self.device.ready or self.device.failed)
    assert self.device.ready, self.device.failed
    self.client = httpx.Client(base_url=self.url, timeout=WAIT)
    return self

  def __exit__(self, *_):
    self.client.close()
    self.server.should_exit = True
    self.thread.join(WAIT)
    assert not self.device.is_alive() and not self.thread.is_alive()

  def post(self, path="/v1/completions", status=200, **body):
    answer = self.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()

  def events(self, path="/v1/completions", **body):
    with self.client.stream("POST", path, json=body) as answer:
      assert answer.headers["content-type"].startswith("text/event-stream")
      lines = [
        line.removeprefix("data: ") for line in answer.iter_lines() if line
      ]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def wait_until(holds, seconds=WAIT):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.fixture(scope="module")
def served(model):
  with Running(model, 0.5, most_waiting=16, workers=1) as running:
    yield running


@pytest.fixture(scope="module")
def expected(model):
  """{threshold: outputs of TEXTS}"""
  return {t: model.generate(TEXTS, threshold=t) for t in (0.3, 0.5, NEVER_EXIT)}


def told(answer):
  """(text, layers, threshold) of an answer to one prompt, in one piece or in
  events.
  """
  if answer.text.startswith("data:"):
    lines = answer.text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if '"text"' in line]
  else:
    events = [answer.json()]
  choices = [event["choices"][0] for event in events]
  layers = [layer for choice in choices for layer in choice["exit_layers"]]
  return (
    "".join(c["text"] for c in choices),
    layers,
    events[-1]["calm"]["threshold"],
  )


@pytest.mark.parametrize("workers", (1, 3))
def test_texts_are_those_of_the_predictor_whatever_arrives_beside_them(
  served, model, expected, workers, monkeypatch
):
  ways = [({}, 0.5), ({"threshold": 0.3}, 0.3), ({"exact": True}, NEVER_EXIT)]
  ways += [({"threshold": "never"}, NEVER_EXIT)]
  programs = compiled.num_made()
  draw = np.random.default_rng(0)
  rows = [int(row) for row in draw.integers(len(TEXTS), size=60)]
  asked = [
    (row, *ways[draw.integers(4)], int(draw.integers(1, 13))) for row in rows
  ]

  async def ask(client, row, way, level, limit):
    body = {
      "prompt": TEXTS[row],
      "stream": row % 2 == 0,
      "max_tokens": limit,
      **way,
    }
    while (
      answer := await client.post("/v1/completions", json=body)
    ).status_code == 429:
      assert answer.headers["Retry-After"] == "1"
      await asyncio.sleep(0.05)
    assert answer.status_code == 200, answer.text
    output = expected[level][row]
    never = "never" if level == NEVER_EXIT else level
    text = model.vocabulary.decode(list(output.tokens[:limit]))
    assert told(answer) == (text, list(output.exit_layers[:limit]), never)

  async def ask_all(running):
    async with httpx.AsyncClient(base_url=running.url, timeout=WAIT) as client:
      await asyncio.gather(*(ask(client, *one) for one in asked))

  if workers == 1:
    asyncio.run(ask_all(served))
  else:
    monkeypatch.setattr(device, "PART", 0.0)  # a token is a part
    with Running(model, 0.5, most_waiting=16, workers=workers) as running:
      asyncio.run(ask_all(running))
  # all of them were there before the first request
  assert compiled.num_made() == programs


def test_a_list_of_prompts_usage_and_what_is_promised(served, expected):
  body = {
    "prompt": TEXTS[:3],
    "model": "toy",
    "temperature": 0,
    "user": "x",
    "stop": None,
  }
  made = served.post(**body)
  some = expected[0.5][:3]
  assert [choice["text"] for choice in made["choices"]] == [
    o.text for o in some
  ]
  assert [choice["index"] for choice in made["choices"]] == [0, 1, 2]
  tokens = sum(len(o.tokens) for o in some)
  read = sum(len(text) + 1 for text in TEXTS[:3])
  usage = {
    "prompt_tokens": read,
    "completion_tokens": tokens,
    "total_tokens": read + tokens,
  }
  assert made["usage"] == usage
  layers = sum(sum(o.exit_layers) for o in some) / tokens
  assert made["calm"]["layers"] == pytest.approx(layers, abs=1e-4)
  assert made["calm"]["guarantee"] is None  # nothing was calibrated
  assert (
    served.post(prompt="a", threshold="never")["calm"]["guarantee"]
    == device.FULL_DEPTH
  )
  options = {"include_usage": True}
  *_, last, done = served.events(**body, stream=True, stream_options=options)
  assert last["usage"] == usage and last["choices"] == [] and done == "[DONE]"


def test_a_guarantee_is_of_its_threshold_alone(model):
  made = calibrate.calibrate(
    np.zeros((200, 1)), [0.5], tolerance=0.1, error_rate=0.05
  )
  promised = serve.Device(
    dataclasses.replace(model, calibration=made, threshold=0.5), 0.5
  )
  assert promised.guarantee(promised.threshold) == made.guarantee
  assert promised.guarantee(0.6) is None


def test_generations_have_the_shape_of_tgi(served, expected):
  row = max(range(len(TEXTS)), key=lambda row: len(expected[0.5][row].tokens))
  output = expected[0.5][row]
  events = served.events("/generate_stream", inputs=TEXTS[row])
  assert [event["index"] for event in events] == list(
    range(1, len(output.tokens) + 1)
  )
  assert tuple(event["token"]["id"] for event in events) == output.tokens
  assert (
    tuple(event["token"]["exit_layer"] for event in events)
    == output.exit_layers
  )
  assert [e["generated_text"] for e in events] == [None] * (len(events) - 1) + [
    output.text
  ]
  for path in ("/", "/generate"):  # a client of Hugging Face asks the first
    made = served.post(
      path, inputs=TEXTS[row], parameters={"max_new_tokens": 3}
    )
    (choice,) = served.post(prompt=TEXTS[row], max_tokens=3)["choices"]
    assert made["generated_text"] == choice["text"]
    assert (
      made["details"]["finish_reason"] == choice["finish_reason"] == "length"
    )
    assert len(made["details"]["tokens"]) == 3


@pytest.mark.parametrize("part", ["encoder", "weights"])
def test_prompts_that_are_decoded_alone_in_8_bits_are_served_together(
  folder, part
):
  narrow = {
    **SIZES,
    f"{part}_dtype": "int8",
    "reference_dtype": "float32",
    "batch_size": 1,
  }
  model = inference.load(folder, **narrow)
  texts = TEXTS[:9]
  with Running(model, 0.5, workers=2) as running:
    programs = compiled.num_made()
    made = running.post(prompt=texts)["choices"]
    assert compiled.num_made() == programs  # however many tokens were packed
    assert max(size for size, _, _ in running.device._spent) > 1
  assert [choice["text"] for choice in made] == list(
    model.generate(texts, threshold=0.5).texts
  )


def test_drafts_are_compiled_before_the_first_request(model, monkeypatch):
  monkeypatch.setattr(speculative, "draft_cost", lambda *_: 0.1)
  rule = Speculative(1, draft_head="full")
  exact = dataclasses.replace(
    model.with_options(max_input_length=64), exact=rule
  )
  made = serve.Device(exact, workers=1)
  made._compile()
  programs = compiled.num_made()
  for length in (3, 40):  # two shapes
    exact.expect_drafts()
    made._serve(
      [device.Job("", [*range(2, length + 2), exact.eos_id], None, 12, ())]
    )
    assert [history.backoff for history in exact.expected_drafts.values()]
  assert compiled.num_made() == programs


def test_the_client_of_openai(served, expected):
  openai = pytest.importorskip(
    "openai", reason="the client of OpenAI is not installed"
  )
  with openai.OpenAI(
    base_url=f"{served.url}/v1", api_key="none", max_retries=0
  ) as client:
    create = functools.partial(
      client.completions.create, model="toy", prompt=TEXTS[0]
    )
    assert create().choices[0].text == expected[0.5][0].text
    parts = create(stream=True, extra_body={"threshold": "never"})
    assert (
      "".join(p.choices[0].text for p in parts) == expected[NEVER_EXIT][0].text
    )
    assert [model.id for model in client.models.list()] == ["toy"]
    with pytest.raises(openai.BadRequestError, match="decoding is greedy"):
      create(temperature=0.7)


def test_a_stop_ends_a_stream_whose_parts_last_and_an_answer(
  served, expected, monkeypatch
):
  row, text = next(
    (i, o.text) for i, o in enumerate(expected[0.5]) if len(o.text) > 4
  )
  stop = text[2:4]
  count = len(expected[0.5][row].tokens)
  monkeypatch.setattr(served.device, "_expected", lambda *_: 0.0)
  # in a token's seconds
  for part, parts in ((1e9, 1), (0.0, count), (3, -(-count // 3))):
    monkeypatch.setattr(
      device, "PART", part * served.device._seconds[1, 32] / 8
    )
    # and [DONE]
    assert len(served.events(prompt=TEXTS[row], stream=True)) == parts + 1
  for stream in (False, True):
    body = {
      "prompt": TEXTS[row],
      "stop": [stop, "never there"],
      "stream": stream,
    }
    answer = served.client.post("/v1/completions", json=body)
    assert told(answer)[0] == text[: text.index(stop)]
    assert '"finish_reason":"stop"' in answer.text.replace(" ", "")


@pytest.mark.parametrize("stream", [False, True])
def test_decoding_ends_where_a_stop_text_is_complete_and_counts_no_more(
  served, model, expected, monkeypatch, stream
):
  outputs = expected[0.5]
  row = max(range(len(outputs)), key=lambda row: len(outputs[row].text))
  output = outputs[row]
  stop = output.text[1:3]
  count = 1
  while stop not in model.vocabulary.decode(list(output.tokens[:count])):
    count += 1
  assert 1 < count < len(output.tokens)
  decode = inference.Predictor.stream
  ends = []

  def recorded(*given, **options):
    for position, part in enumerate(decode(*given, **options)):
      ends.append(options["ends"][position])
      yield part

  monkeypatch.setattr(inference.Predictor, "stream", recorded)
  monkeypatch.setattr(device, "PART", 0.0)  # a token is a part
  body = {"prompt": TEXTS[row], "stop": stop, "stream": stream}
  if stream:
    body["stream_options"] = {"include_usage": True}
  answer = served.client.post("/v1/completions", json=body)
  assert ends[-1] == count
  assert f'"completion_tokens":{count},' in answer.text.replace(" ", "")
  text, layers, _ = told(answer)
  assert text == output.text[: output.text.index(stop)]
  assert layers == list(output.exit_layers[:count])


JSON = {"content-type": "application/json"}
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
  ("body", "status", "param", "words"),
  [
    (b'{"prompt": NaN}', 400, None, "NaN"),
    (b'{"prompt": "\xff"}', 400, None, "JSON"),
    (DEEP, 400, None, "too deep"),
    ({}, 400, "prompt", "got none"),
    ({"prompt": ["a", 1]}, 400, "prompt", "list of texts"),
    ({"prompt": "a" * 32}, 400, "prompt", "at most 32 tokens"),
    (b'{"prompt": "\\ud800"}', 400, None, "surrogates"),
    (b'{"\\ud800": 1}', 400, None, "surrogates"),
    ({"prompt": "a", "max_tokens": 13}, 400, "max_tokens", "at most 12"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "whole number"),
    ({"prompt": "a", "temperature": 0.7}, 400, "temperature", "greedy"),
    ({"prompt": "a", "messages": []}, 400, "messages", "not supported"),
    ({"prompt": "a", "threshold": 1.5}, 400, "threshold", "'never'"),
    (
      {"prompt": "a", "threshold": 0.5, "exact": True},
      400,
      "exact",
      "full depth",
    ),
    ({"prompt": "a", "stop": ["a", ""]}, 400, "stop", "1 to 256 characters"),
    ({"prompt": "a", "stop": "a" * 257}, 400, "stop", "1 to 256 characters"),
    ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ({"prompt": "a", "stream": 1}, 400, "stream", "true or false"),
    ({"prompt": "a", "stream_options": {"x": 1}}, 400, "x", "not supported"),
    ({"prompt": "a", "model": "other"}, 404, "model", "'toy'"),
    (b" " * (app.MOST_BODY + 1), 413, None, "at most"),
    (iter([b"{}"]), 413, None, "got none"),  # in chunks
  ],
)
def test_what_cannot_be_answered_is_refused_by_name(
  served, body, status, param, words
):
  content = json.dumps(body).encode() if isinstance(body, dict) else body
  answer = served.client.post("/v1/completions", content=content, headers=JSON)
  error = answer.json()["error"]
  assert (answer.status_code, error["param"]) == (
    status,
    param,
  ) and words in error["message"]
  assert (
    error["type"] == "invalid_request_error" and "Traceback" not in answer.text
  )


def test_other_refusals(served):
  assert served.post("/nowhere", 404)["error"]["message"] == "Not Found."
  assert served.client.get("/generate").status_code == 405
  assert served.client.post("/generate", content=b"{}").status_code == 415
  assert (
    served.client.get("/health", headers={"host": "evil.example"}).status_code
    == 400
  )
  assert served.post("/generate", 400, inputs="a", parameters={"top_k": 3})[
    "error"
  ]["param"]


def test_what_the_server_says_of_itself(served):
  (known,) = served.client.get("/v1/models").json()["data"]
  assert known["id"] == "toy" and known["calm"]["num_layers"] == 3
  assert known["calm"]["threshold"] == 0.5 and known["calm"]["online"] is None
  served.post(prompt="a")
  said = served.client.get("/metrics").text
  for line in (
    "calm_ready 1.0",
    "calm_threshold 0.5",
    "calm_queue 0.0",
    "calm_alarms 0.0",
  ):
    assert line in said
  assert re.search(
    r'calm_requests_count{route="/v1/completions",status="200"} [1-9]', said
  )
  page = served.client.get("/")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  assert not re.search(r"(src|href)=", page.text)


def test_the_page_runs_in_a_browser(served):
  chromium = shutil.which("chromium") or pytest.skip(
    "needs Chromium: apt-get install chromium"
  )
  flags = [
    "--no-sandbox",
    "--disable-gpu",
    "--virtual-time-budget=4000",
    "--dump-dom",
  ]
  words = [chromium, "--headless", *flags, served.url]
  text = subprocess.run(
    words, capture_output=True, text=True, timeout=WAIT
  ).stdout
  assert '<span id="name">toy</span>' in text
  assert "Nothing is promised: this threshold was not calibrated." in text


def test_a_full_queue_a_client_that_left_and_an_answer_too_late(
  served, monkeypatch
):
  go = threading.Event()
  decoded = []
  decode = served.device._decode

  def wait(batch, level):  # until it is let go
    decoded.extend(job.prompt for job in batch)
    assert go.wait(WAIT)
    return decode(batch, level)

  async def comes_about(holds):
    while not holds():
      await asyncio.sleep(0.01)

  async def ask():
    async with httpx.AsyncClient(base_url=served.url, timeout=WAIT) as client:

      def post(text):
        return client.post("/v1/completions", json={"prompt": text})

      some = [asyncio.create_task(post("first"))]
      await comes_about(lambda: decoded)
      some += [asyncio.create_task(post(f"b{i}")) for i in range(16)]
      await comes_about(lambda: len(served.device.waiting) == 16)
      full = await post("one too many")
      assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
      assert full.json()["error"]["code"] == "queue_full"
      some.pop(3).cancel()  # b2
      await comes_about(lambda: any(job.gone for job in served.device.waiting))
      monkeypatch.setattr(served.api, "_timeout", 0.3)
      late = await post("in the place of b2")
      assert (
        late.status_code == 504 and late.json()["error"]["code"] == "timeout"
      )
      go.set()
      assert {answer.status_code for answer in await asyncio.gather(*some)} == {
        200
      }

  monkeypatch.setattr(served.device, "_decode", wait)
  asyncio.run(asyncio.wait_for(ask(), WAIT))
  assert sorted(decoded) == sorted(
    ["first", *(f"b{i}" for i in range(16) if i != 2)]
  )


def test_nobody_waits_any_more_and_the_next_one_is_served(model):
  made = serve.Device(model)
  found = []
  gone = device.Job("gone", [3, 1], 0.5, 8, (), gone=True)
  thread = threading.Thread(
    target=lambda: found.append(made._next()), daemon=True
  )
  made.waiting.append(gone)
  thread.start()
  time.sleep(0.1)
  assert thread.is_alive() and not found  # the queue is empty, which is no end
  made.submit([dataclasses.replace(gone, prompt="next", gone=False)])
  thread.join(WAIT)
  assert [job.prompt for job in found[0]] == ["next"]
  made.stop()
  assert made._next() is None


def test_as_many_threads_as_pay_decode_at_the_same_time(monkeypatch):
  lock = threading.Lock()

  def alone():
    return [lock.acquire(), time.sleep(0.02), lock.release()]

  monkeypatch.setattr(device.os, "cpu_count", lambda: 5)
  assert device.workers_that_pay(lambda: time.sleep(0.02)) == 4
  assert device.workers_that_pay(alone) == 1


def test_a_batch_has_prompts_of_one_threshold_and_pays(model):
  made = serve.Device(model.with_options(max_input_length=128))
  made._seconds = {
    (size, n): size * 0.7 for size in (1, 4) for n in (32, 64, 128)
  }
  made._seconds[4, 128] = 1.0

  def job(name, length, level=None):
    return device.Job(name, [3] * length, level, 8, ())

  made.submit(
    [job("a", 9), job("b", 9, 0.5), job("c", 100), job("d", 9), job("e", 50)]
  )

  def taken():
    return "".join(job.prompt for job in made._next())

  assert taken() == "a"  # a, d and e would take 2.8 for 2.1
  assert taken() == "b"
  assert taken() == "cde"  # 1.0 for 2.1, all as long as the longest


def test_served_batches_tell_whether_the_next_one_pays(model):
  made = serve.Device(model.with_options(max_input_length=32))
  made._seconds = {(1, 32): 1.0, (4, 32): 2.5}
  spent = made._spent
  asked = [device.Job(name, [3] * 9, 0.5, 8, ()) for name in "abc"]

  def size():
    return made.submit(asked) and len(made._next())

  spent[4, 32, False].append(99.0)  # the machine had other work
  assert size() == 3
  spent[4, 32, False].extend([3.5] * 3)
  assert size() == 1  # three take 3.0 one after another
  spent[1, 32, False].extend([2.0] * 3)
  assert size() == 4


def test_a_batch_that_fails_is_an_error_of_its_requests_alone(
  served, monkeypatch
):
  monkeypatch.setattr(served.device, "_decode", lambda *_: iter([None, 1 / 0]))
  assert served.post(prompt="a", status=500)["error"]["type"] == "server_error"
  (event,) = served.events(prompt="a", stream=True)
  assert event["error"]["type"] == "server_error"
  monkeypatch.undo()
  assert served.post(prompt="a")


def test_a_key_is_asked_for(model):
  api = serve.Api(serve.Device(model), "toy", key="secret key")
  client = TestClient(api.app, "http://127.0.0.1")
  assert client.get("/v1/models").status_code == 401
  assert (
    client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code
    == 401
  )
  right = {"authorization": "Bearer secret key"}
  assert client.get("/v1/models", headers=right).status_code == 200
  # no lifespan: nothing is compiled
  assert client.get("/health").status_code == 503
  assert (
    client.post("/generate", json={"inputs": "a"}, headers=right).status_code
    == 503
  )


def test_a_text_in_parts_is_the_text(model):
  long = model.with_options(max_decode_length=128, batch_size=2)  # two stages
  (batch,) = long.plan(TEXTS[:2])
  encoded = long.encode(batch)
  for threshold, rule in ((0.5, None), (NEVER_EXIT, StaticExit())):
    whole = long.decode(encoded, batch.active, threshold, rule)
    *_, last = long.stream(
      encoded, batch.active, threshold, rule, ends=[1, 50, 90, 128]
    )
    np.testing.assert_array_equal(last.tokens, whole.tokens)
    np.testing.assert_array_equal(last.exit_layers, whole.exit_layers)


def test_a_threshold_is_calibrated_while_it_is_served(model, tmp_path):
  options = {"tolerance": 0.5, "error_rate": 0.2, "thresholds": [0.99, 0.3]}
  with Running(
    model, online=model.online(tmp_path / "state", **options)
  ) as running:
    assert running.post(prompt="a")["calm"]["guarantee"] == device.FULL_DEPTH
    for i in range(60):
      served = running.post(prompt=f"prompt {i}")
    wait_until(lambda: running.device.online.checked == 61)
    assert served["calm"]["threshold"] <= 0.99
    assert "whole life of this state" in served["calm"]["guarantee"]
    expected = model.generate(
      ["prompt 59"], threshold=served["calm"]["threshold"]
    )
    assert served["choices"][0]["text"] == expected.texts[0]
    # Thresholds of a client's own are not checked.
    running.post(prompt="another", threshold=0.9)
    known = running.client.get("/v1/models").json()["data"][0]["calm"]["online"]
    assert known["served"] == known["checked"] == len(known["history"]) == 61
    level = running.device.online.threshold
  again = model.online(tmp_path / "state", **options)
  assert again.threshold == level and again.checked == 61
  again._lock.release()


# ---- The command


class Command:
  """`calm serve` in a process of its own."""

  def __init__(self, *words):
    command = [
      sys.executable,
      "-m",
      "calm",
      "serve",
      "--port=0",
      *map(str, words),
    ]
    self.process = subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    self.lines = []
    while not self.lines or "Ready" not in self.lines[-1]:
      line = self.process.stderr.readline()
      assert line, self.lines
      self.lines.append(line)
    found = next(
      match
      for line in self.lines
      if (match := re.search(r"http://\S+:(\d+)", line))
    )
    self.port = int(found[1])

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()

  def half_a_request(self):
    """A connection on which the end of a request is missing, and that end."""
    body = json.dumps({"prompt": "a"}).encode()
    connection = socket.create_connection(
      ("127.0.0.1", self.port), timeout=WAIT
    )
    head = (
      "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
      "application/json"
    )
    connection.sendall(
      f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:5]
    )
    time.sleep(0.5)  # it is taken
    return connection, body[5:]

  def terminate(self):
    self.process.terminate()
    time.sleep(0.5)


def test_signals_and_a_state_that_outlives_them(folder, tmp_path):
  words = [
    f"--model={folder}",
    "--max_input_length=32",
    "--max_decode_length=4",
  ]
  words += ["--batch_size=1", f"--online={tmp_path / 'state'}"]
  with Command(*words) as first:
    url = f"http://127.0.0.1:{first.port}/v1/completions"
    assert (
      httpx.post(url, json={"prompt": "b"}, timeout=WAIT).status_code == 200
    )
    connection, _ = first.half_a_request()
    first.terminate()
    assert first.process.poll() is None  # it waits for the rest
    first.terminate()
    assert first.process.wait(WAIT) == 143
    connection.close()

  with Command(*words) as second:
    if curl := shutil.which("curl"):
      url = f"http://127.0.0.1:{second.port}/v1/completions"
      sent = [curl, "-sN", url, "--json", '{"prompt": "c", "stream": true}']
      assert subprocess.check_output(sent, text=True).endswith(
        "data: [DONE]\n\n"
      )
    with (
      pytest.raises(OSError),  # headers have a bound
      socket.create_connection(
        ("127.0.0.1", second.port), timeout=WAIT
      ) as endless,
    ):
      endless.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
      for number in range(1000):
        endless.sendall(b"name%d: %s\r\n" % (number, b"a" * 10_000))
    connection, rest = second.half_a_request()
    second.terminate()
    connection.sendall(rest)
    assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK")
    assert second.process.wait(WAIT) == 0
    assert "Traceback" not in second.process.stderr.read()
    connection.close()


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (
      ["--host=0.0.0.0"],
      "`--host=0.0.0.0` lets other machines ask; give `--api_key_file`",
    ),
    (["--api_key_file={tmp}/short"], "to hold 8 ASCII characters or more"),
    (["--api_key_file={tmp}/none"], "No such file"),
    (
      ["--online={tmp}/state", "--threshold=0.5"],
      "`--online` finds the threshold",
    ),
    (["--threshold=2"], "Expected `threshold` to be a number in [0, 1]"),
    (["--port=99999"], "Expected `--port` of at most 65535"),
    (
      ["--host=no.such.host.invalid", "--open"],
      "Expected `--host` and `--port` that are free",
    ),
    (["--tolerance=0.1", "--port=0"], "`--tolerance` needs `--online`"),
  ],
)
def test_the_command_refuses(words, said, folder, tmp_path, capsys):
  (tmp_path / "short").write_text("short\n")
  given = [word.format(tmp=tmp_path) for word in words]
  assert cli.main(["serve", f"--model={folder}", *given]) == 2
  assert said in capsys.readouterr().err
