"""Files of other systems are read as they are, or refused with their line."""

import json

import numpy as np
import pytest

from calm.calibrate.generations import foreign
from calm.calibrate.generations.records import GenerationsError, Record


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def t5x(text, prediction, **fields):
  inputs = {
    "inputs_pretokenized": text,
    "targets_pretokenized": f"target of {text}",
  }
  return {"inputs": inputs, "prediction": prediction, **fields}


def plain(*names, **fields):
  return [{"id": name, "prediction": name, **fields} for name in names]


def test_t5x_predict_with_aux_brings_exits_without_padding(tmp_path):
  aux = {
    "exit_layers": [2, 3, 0, 0],
    "confidences": [0.5, 0.0, 0.0, 0.0],
    "rejected_confidences": [0.25, 0.5, 0.0, 0.0],
    "scores": -1.5,
  }
  rows = [t5x("a", "x", aux=aux, prediction_tokens=[7, 1])]
  rows[0]["inputs"] |= {"id": 7, "source": "s", "targets": [5, 6]}
  (prompt,), (record,) = foreign.read_predictions(
    write(tmp_path / "f.jsonl", rows)
  )
  assert record == Record(
    "7", "x", [7, 1], [2, 3], [0.5, 0.0], [0.25, 0.5], -1.5
  )
  assert (prompt.id, prompt.group, prompt.targets) == (
    "7",
    "s",
    ("target of a",),
  )
  # T5X cuts tokens at the first 0, even a real one
  rows[0]["prediction_tokens"] = [7]
  # a model that does not report them
  del aux["confidences"], rows[0]["inputs"]["id"]
  _, (record,) = foreign.read_predictions(write(tmp_path / "f.jsonl", rows))
  assert (record.id, record.tokens, record.confidences) == (
    "line 1",
    None,
    None,
  )
  assert record.exit_layers == (2, 3)


def test_plain_files_need_id_and_prediction_only(tmp_path):
  full = write(tmp_path / "full.jsonl", plain("a", "b"))
  early = write(tmp_path / "early.jsonl", plain("b", "a"))
  loaded = foreign.gather(full, {0.5: early, 0.7: full})
  assert loaded.ids == ("a", "b") and loaded.thresholds.tolist() == [0.7, 0.5]
  assert [r.prediction for r in loaded.records[1]] == ["a", "b"]
  knobs = foreign.gather(full, {"12": full, "2": early})
  assert knobs.knobs == ("12", "2") and knobs.thresholds.tolist() == [1.0, 0.5]
  with pytest.raises(ValueError, match=r"in \[0, 1\]"):
    foreign.gather(full, {9.0: full, 0.5: early})


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], "early.jsonl: expected outputs, one a line, got none"),
    (plain("b"), r"missing \['a'\], unknown \['b'\]"),
    (
      plain("a", input="other"),
      "output 1 .* to be of the input .*, got 'other'.* not aligned",
    ),
  ],
)
def test_errors_name_the_file(tmp_path, rows, message):
  full = write(tmp_path / "full.jsonl", plain("a", input="a"))
  early = write(tmp_path / "early.jsonl", rows)
  with pytest.raises(GenerationsError, match=message):
    foreign.gather(full, {0.5: early})


def decoded_at(threshold, measured=True):
  """A line of `predict_with_aux`; without a threshold it is the full
  model's.
  """
  aux = {"exit_layers": [2, 2, 0], "scores": -1.0}
  if threshold is not None:
    aux |= {"threshold": threshold}
  return t5x(
    "a", "x", aux=aux | ({"confidences": [0.5, 0.5, 0.0]} if measured else {})
  )


FULL = decoded_at(None, measured=False)


def gathered(tmp_path, full, early, knob):
  return foreign.gather(
    write(tmp_path / "full.jsonl", [full]),
    {knob: write(tmp_path / "early.jsonl", [early])},
  )


@pytest.mark.parametrize("knob", [1 / 3, 0.0])
@pytest.mark.parametrize("said", [1 / 3, 0.0, None])
def test_a_t5x_file_is_taken_for_the_threshold_alone_that_its_lines_say(
  tmp_path, knob, said
):
  # As T5X writes it: 0.2 is 0.20000000298023224.
  written = None if said is None else float(np.float32(said))
  line = decoded_at(written, measured=said is not None)
  if said == knob:
    assert gathered(tmp_path, FULL, line, knob).thresholds.tolist() == [knob]
    with pytest.raises(
      GenerationsError, match=r"full.jsonl:1: .* threshold none .*, got outp"
    ):
      gathered(tmp_path, line, line, knob)
    return
  name = "none" if said is None else f"{said:.7g}"
  message = (
    rf"early.jsonl:1: .* threshold {knob:.7g}, as .* got outputs of "
    rf"threshold {name} "
  )
  with pytest.raises(GenerationsError, match=message):
    gathered(tmp_path, FULL, line, knob)
  # Another knob than a threshold has no number to be held to.
  assert gathered(tmp_path, FULL, line, f"lambda={knob}").knobs == (
    f"lambda={knob}",
  )


@pytest.mark.parametrize(
  "said", ["0.5", -0.1, pytest.param(10**400, id="huge")]
)
def test_a_threshold_that_is_none_is_refused(tmp_path, said):
  with pytest.raises(
    GenerationsError, match=r"`aux.threshold` to be a number in \[0, 1\]"
  ):
    gathered(tmp_path, FULL, decoded_at(said), 0.5)


def batch(**response):
  return {"custom_id": "p0", "response": response}


def message(text):
  return {"type": "message", "content": [{"type": "output_text", "text": text}]}


def chat(*texts):
  return batch(
    body={"choices": [{"message": {"content": text}} for text in texts]}
  )


ONE = (
  "expected one decode of a prompt in `(prediction|outputs|choices|output)`, "
  "got .*"
)
FAILED = "`response` of a request that succeeded, got one that failed: .*"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"id": "a"}, "got none: Expected `prediction` to be a text"),
    (t5x("a", "x", aux=[1]), r"`aux` to be an object .*, got \[1\]"),
    (
      t5x("a", "x", aux={"exit_layers": [1, -1]}),
      "`exit_layers` of at least 0",
    ),
    (
      {**chat("x"), "error": {"code": "batch_expired"}},
      f"{FAILED}batch_expired",
    ),
    (batch(status_code=500), f"{FAILED}500"),
    (chat(), "`choices`"),
    (batch(body={}), "`output`"),
    (chat(None), "`prediction` to be a text"),
    ({"request_id": 3, "outputs": [{"text": "x"}]}, "`id` to be a text"),
    (t5x("b", ["x", "y"]), f"{ONE}return_all_decodes = False"),
    (
      {"request_id": "p0", "outputs": [{"text": "x"}, {"text": "y"}]},
      f"{ONE}`n = 1`",
    ),
    (chat("x", "y"), f"{ONE}`n = 1`"),
    (batch(body={"output": [message("x"), message("y")]}), f"{ONE}`n = 1`"),
    (
      {"id": "first", "prediction": "x"},
      "expected every id once, got 'first' twice",
    ),
  ],
)
def test_a_line_that_is_no_output_is_refused_with_its_number(
  line, message, tmp_path
):
  path = write(
    tmp_path / "out.jsonl", [{"id": "first", "prediction": "a text"}, line]
  )
  with pytest.raises(GenerationsError, match=rf"out.jsonl:2: .*{message}"):
    foreign.read_predictions(path)
