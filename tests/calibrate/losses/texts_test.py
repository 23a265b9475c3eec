"""Texts of any system and any knob, from memory and from files, to a promise."""

import json

import numpy as np
import pytest

from calm.calibrate import Calibration, calibrate, from_texts
from calm.calibrate.generations import foreign
from calm.calibrate.losses import sequence_losses

FULL = [f"answer {row}" for row in range(100)]
CHEAP = ["another" if row % 3 == 0 else text for row, text in enumerate(FULL)]
RATES = {"tolerance": 0.1, "error_rate": 0.05}


@pytest.mark.parametrize("knobs", [(12, 2), ("large", "base"), (8.0, 1.0)])
def test_any_ordered_knob_is_calibrated_best_first(knobs, tmp_path):
  losses = from_texts(FULL, dict(zip(knobs, (FULL, CHEAP), strict=True)), metric="exact_match")
  assert losses.knobs == tuple(map(str, knobs)) and losses.kind == "textual"
  np.testing.assert_allclose(losses.values.mean(axis=0), [0.0, 0.34])
  found = calibrate(losses, **RATES)
  first, second = map(str, knobs)
  assert found.knob == first and found.knobs == (first, second)
  assert f"decoding with {first!r} has" in found.guarantee
  assert (
    found.reason == f"{first} is the lowest certified threshold; {second} is not certified."
  )
  found.save(tmp_path / "c.json")
  assert Calibration.load(tmp_path / "c.json", expect_digest=found.digest) == found
  value = json.loads((tmp_path / "c.json").read_text())
  for odd in (["a"], [1, 2], ["a", "b\n"], "ab"):
    with pytest.raises(ValueError, match="`knobs`"):
      Calibration.from_json({**value, "knobs": odd})
  with pytest.raises(ValueError, match="digest"):
    Calibration.from_json({**value, "knobs": ["other", "names"]})


def test_thresholds_stay_thresholds_and_nothing_certified_is_the_full_model():
  found = calibrate(from_texts(FULL, {0.9: FULL, 0.5: CHEAP}, metric="exact_match"), **RATES)
  assert found.knobs == () and found.knob == found.threshold == 0.9
  assert "knobs" not in found.to_json()
  none = calibrate(from_texts(FULL, {"small": CHEAP}, metric="exact_match"), **RATES)
  assert none.knob is None and not none.certified


def test_references_are_read_where_texts_differ():
  references = [[] if row % 3 else ["another", "x"] for row in range(100)]
  losses = from_texts(FULL, {"base": CHEAP}, references=references, metric="exact_match")
  assert losses.kind == "risk_signed" and losses.support.lower == -1.0
  np.testing.assert_array_equal(losses.values[:4, 0], [-1.0, 0.0, 0.0, -1.0])
  texts = ["z"] * 100  # one text a prompt
  clipped = from_texts(FULL, {1: CHEAP}, references=texts, kind="risk_clipped")
  assert clipped.kind == "risk_clipped" and np.all(clipped.values == 0.0)
  with pytest.raises(ValueError, match="references"):
    from_texts(FULL, {"base": CHEAP}, references=[[]] * 100)


def test_ids_and_groups_are_kept():
  names = [f"p{row}" for row in range(100)]
  groups = [f"g{row // 2}" for row in range(100)]
  losses = from_texts(FULL, {"base": CHEAP}, ids=names, groups=groups)
  assert losses.ids == tuple(names) and losses.groups == tuple(groups)
  assert calibrate(losses, **RATES).num_examples == 50


@pytest.mark.parametrize(
  ("early", "options", "message"),
  [
    ({}, {}, "`knobs` to be at least one, all different, got"),
    ({"a": CHEAP[:-1]}, {}, r"early\['a'\].* of 100 texts"),
    (
      {"a": "text"},
      {},
      r"`early` to be a mapping .*, got 'text' \(str\) at 'a'",
    ),
    ({1: CHEAP, "1": CHEAP}, {}, "all different"),
    ({0.5: CHEAP, 0.9: FULL}, {}, "descend strictly"),
    ({"a": CHEAP}, {"references": ["x"]}, "`references` of 100"),
    ({"a": CHEAP}, {"ids": ["x"] * 100}, "unique"),
  ],
)
def test_what_does_not_fit_is_refused(early, options, message):
  with pytest.raises(ValueError, match=message):
    from_texts(FULL, early, **options)


def test_losses_need_a_knob_a_column():
  losses = from_texts(FULL, {"a": CHEAP})
  with pytest.raises(ValueError, match="Expected 1 `knobs`"):
    sequence_losses.SequenceLosses(losses.values, losses.thresholds, knobs=("a", "b"))


def chat(row, text, **body):
  message = {"index": 0, "message": {"role": "assistant", "content": text}}
  return {
    "id": f"batch_{row}",
    "custom_id": f"p{row}",
    "response": {"status_code": 200, "body": {"choices": [message], **body}},
    "error": None,
  }


LINES = {
  "openai chat": chat(0, "a text"),
  "openai completion": {
    "custom_id": "p0",
    "response": {"status_code": 200, "body": {"choices": [{"text": "a text"}]}},
  },
  "openai response": {
    "custom_id": "p0",
    "response": {
      "body": {
        "output": [
          {"type": "reasoning"},
          {
            "type": "message",
            "content": [{"type": "output_text", "text": "a "}, {"text": "text"}],
          },
        ]
      }
    },
  },
  "vllm": {"request_id": "p0", "prompt": "said", "outputs": [{"index": 0, "text": "a text"}]},
  "plain": {"id": "p0", "prediction": "a text", "references": ["r"]},
}


@pytest.mark.parametrize("form", LINES)
def test_lines_of_servers_are_read_as_they_are(form, tmp_path):
  path = tmp_path / "out.jsonl"
  path.write_text(json.dumps(LINES[form]) + "\n")
  (prompt,), (record,) = foreign.read_predictions(path)
  assert (record.id, record.prediction, prompt.id) == ("p0", "a text", "p0")
  assert prompt.input == ("said" if form == "vllm" else "")
  assert prompt.targets == (("r",) if form == "plain" else ())


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      {**chat(0, "x"), "error": {"code": "batch_expired"}},
      "got one that failed: .*batch_expired",
    ),
    ({"custom_id": "p0", "response": {"status_code": 500}}, "got one that failed: .*500"),
    ({"custom_id": "p0", "response": {"body": {"choices": []}}}, "`choices`"),
    ({"custom_id": "p0", "response": {"body": {}}}, "`output`"),
    ({"custom_id": "p0"}, "`output`"),
    ({"custom_id": "p0", "response": "x"}, "no output"),
    (chat(0, None), "`prediction` to be a text"),
    ({"request_id": "p0", "outputs": []}, "`outputs`"),
    ({"request_id": 3, "outputs": [{"text": "x"}]}, "`id` to be a text"),
  ],
)
def test_answers_that_are_none_are_refused_by_line(line, message, tmp_path):
  path = tmp_path / "out.jsonl"
  path.write_text(json.dumps(line) + "\n")
  with pytest.raises(foreign.GenerationsError, match=rf"out.jsonl:1: .*{message}"):
    foreign.read_predictions(path)


def message(text):
  return {"type": "message", "content": [{"type": "output_text", "text": text}]}


@pytest.mark.parametrize(
  "line",
  [
    {"request_id": "p0", "outputs": [{"text": "x"}, {"text": "y"}]},
    chat(0, "x", choices=[{"index": i, "message": {"content": t}} for i, t in enumerate("xy")]),
    {"custom_id": "p0", "response": {"body": {"output": [message("x"), message("y")]}}},
  ],
  ids=["vllm", "openai chat", "openai response"],
)
def test_several_decodes_of_a_server_are_refused_as_those_of_t5x(line, tmp_path):
  path = tmp_path / "out.jsonl"
  path.write_text(json.dumps(LINES["plain"] | {"id": "p1"}) + "\n" + json.dumps(line) + "\n")
  said = (
    r"out.jsonl:2: expected one `prediction` of a prompt, got a list of 2 decodes; .*`n = 1`"
  )
  with pytest.raises(foreign.GenerationsError, match=said):
    foreign.read_predictions(path)


def test_files_at_any_knob_are_gathered(tmp_path):
  def write(name, texts):
    path = tmp_path / name
    path.write_text("".join(json.dumps(chat(r, t)) + "\n" for r, t in enumerate(texts)))
    return path

  full, cheap = write("full.jsonl", FULL), write("cheap.jsonl", CHEAP)
  found = foreign.gather(full, {"12": full, "2": cheap})
  assert found.knobs == ("12", "2") and found.thresholds.tolist() == [1.0, 0.5]
  plain = foreign.gather(full, {0.5: cheap, 0.9: full})
  assert plain.knobs == () and plain.thresholds.tolist() == [0.9, 0.5]
  assert plain.records[0] == plain.full
  with pytest.raises(ValueError, match=r"in \[0, 1\]"):
    foreign.gather(full, {9.0: full, 0.5: cheap})


def test_copies_of_prompts_are_seen_in_their_texts():
  """Inputs are not known here: equal losses beside equal texts of the full system are told."""
  with pytest.warns(UserWarning, match="as copies of a prompt do"):
    from_texts(FULL * 3, {"large": FULL * 3, "base": CHEAP * 3}, metric="exact_match")
  # The losses repeat every third row, and the texts say that these are other prompts.
  calibrate(from_texts(FULL, {"large": CHEAP}, metric="exact_match"), **RATES)
