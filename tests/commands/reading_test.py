"""What a resumed `calm infer` or `calm generate` reads, in bytes: no more than in proportion to
the prompts."""

import collections
import dataclasses
import json
import pathlib

import pytest

from calm import inference, storage
from calm.calibrate import Record
from calm.commands import cli, infer
from calm.inference import grid, predictor

COUNTS = 400, 1_600
COUNTER = pathlib.Path("/proc/thread-self/io")
# Some is read once whatever the prompts, which makes less of it.
MOST = 1.2 * COUNTS[1] / COUNTS[0]
OPTIONS = {"infer": "--threshold=0.9", "generate": "--thresholds=0.9"}

pytestmark = pytest.mark.skipif(not COUNTER.exists(), reason="needs Linux's count of bytes")


@pytest.fixture(autouse=True)
def no_decoding(model, monkeypatch):
  """Every prompt becomes what one did, in as many batches as ever."""
  made = inference.load(model, max_decode_length=6).generate(["text"], threshold=0.9)
  output = made[0]
  record = Record("", output.text, output.tokens, output.exit_layers)

  def generate(self, texts, **_):
    return dataclasses.replace(made, items=made.items * len(texts))

  def decode(self, ids, *_):
    return [dataclasses.replace(record, id=name) for name in ids], collections.Counter()

  monkeypatch.setattr(predictor.Predictor, "generate", generate)
  monkeypatch.setattr(grid._Batch, "decode", decode)
  monkeypatch.setattr(infer, "MOST_BATCHES", 4)


def read_to_resume(words: list[str], count: int, folder: pathlib.Path, monkeypatch) -> int:
  """Bytes that are read by a run of which another did half."""
  prompts = folder / f"{count}.jsonl"
  lines = (json.dumps({"id": f"p{i:06}", "input": f"text {i:06}"}) for i in range(count))
  prompts.write_text("\n".join(lines) + "\n")
  words = [*words, f"--prompts={prompts}", f"--output={folder / f'out{count}'}"]
  append, written = storage.append, []

  def stopping(path, content):
    """Ctrl-C when half of the lines are written."""
    append(path, content)
    written.append(content.count(b"\n"))
    if sum(written) >= count // 2:
      raise KeyboardInterrupt

  bytes_read = lambda: int(COUNTER.read_text().split()[1])  # by this thread
  with monkeypatch.context() as patched:
    patched.setattr(storage, "append", stopping)
    assert cli.main(words) == 130
  before = bytes_read()
  assert cli.main(words) == 0
  return bytes_read() - before


@pytest.mark.parametrize("command", OPTIONS)
def test_reading_is_linear_in_the_prompts(command, model, tmp_path, monkeypatch):
  lengths = ["--max_input_length=32", "--max_decode_length=6", "--batch_size=8"]
  words = [command, f"--model={model}", *lengths, OPTIONS[command]]
  few, many = (read_to_resume(words, count, tmp_path, monkeypatch) for count in COUNTS)
  assert many <= MOST * few, (few, many)
