"""References are requested where texts differ, as far as a test looks, and nowhere else."""

import dataclasses
import json

import numpy as np
import pytest

from calm.calibrate import (
  GenerationsError,
  Prompt,
  Record,
  label_requests,
  sequential,
)

COUNT = 200

PROMPTS = [Prompt(f"p{row}", f"prompt {row}") for row in range(COUNT)]

FULL = [Record(f"p{row}", "a b c d") for row in range(COUNT)]

# Every tenth text differs.
EARLY = [Record(f"p{row}", "a b c x" if row % 10 == 0 else "a b c d") for row in range(COUNT)]


def run(ask, kind="risk_signed", prompts=PROMPTS, batch=8):
  """A sequential test of one threshold; returns it and how many losses it looked at."""
  support = label_requests.losses.kind_support(kind, "token_f1")
  test = sequential.SequentialCalibration(
    [0.5], COUNT, tolerance=0.1, error_rate=0.05, support=support
  )
  seen = 0
  while (request := test.request(batch)) is not None:
    rows = slice(request.start, request.stop)
    losses = label_requests.batch_losses(
      prompts[rows], 0.5, EARLY[rows], FULL[rows], kind=kind, metric="token_f1", ask=ask
    )
    assert losses.shape == (request.stop - request.start,)
    seen = request.stop
    test.add(losses)
  return test.calibration(), seen


def test_a_sequential_test_asks_for_a_tenth_of_what_it_looks_at():
  asked = []

  def ask(questions):
    asked.extend(questions)
    return {question.id: ["a b c d"] for question in questions}

  found, seen = run(ask)
  assert found.certified and seen < COUNT
  assert [question.id for question in asked] == [f"p{row}" for row in range(0, seen, 10)]
  assert asked[0] == label_requests.LabelRequest("p0", "prompt 0", "a b c d", ("a b c x",))
  # The same losses as with references of all prompts.
  labelled = [dataclasses.replace(prompt, targets=("a b c d",)) for prompt in PROMPTS]
  assert run(None, prompts=labelled)[0] == found
  # Who has references is not asked.
  assert run(lambda questions: pytest.fail("asked"), prompts=labelled)[0] == found


def test_textual_losses_ask_nobody():
  run(lambda questions: pytest.fail("asked"), kind="textual")


@pytest.mark.parametrize("answer", [{}, {"p0": []}, {"p1": ["a"]}])
def test_what_nobody_answers_is_named(answer):
  with pytest.raises(
    label_requests.MissingReferences, match=r"of 1 prompts .* first \['p0'\]"
  ) as caught:
    run(lambda questions: answer)
  assert [question.id for question in caught.value.requests] == ["p0"]


def test_answers_to_nothing_asked_change_nothing():
  def ask(questions):
    return {prompt.id: ("a b c d",) for prompt in PROMPTS}

  assert run(ask)[0].certified


def test_questions_are_written_and_answers_read(tmp_path):
  path = tmp_path / "unlabelled.jsonl"
  label_requests.write_requests(
    path, [label_requests.LabelRequest("p0", "in", "full", ("early",))]
  )
  assert label_requests.read_references(path) == {"p0": ()}
  path.write_text('{"id": "a", "targets": "x"}\n{"id": "b", "references": ["y", "z"]}\n')
  assert label_requests.read_references(path) == {"a": ("x",), "b": ("y", "z")}
  for line in (
    '{"targets": []}',
    '{"id": "a"}',
    '{"id": 1, "targets": []}',
    '{"id": "a", "targets": [1]}',
  ):
    path.write_text(line + "\n")
    with pytest.raises(GenerationsError, match=r"unlabelled.jsonl:1: expected"):
      label_requests.read_references(path)
  path.write_text('{"id": "a", "targets": []}\n' * 2)
  with pytest.raises(GenerationsError, match=r":2: expected an `id` that is new"):
    label_requests.read_references(path)


def test_losses_are_those_of_the_definition():
  found = label_requests.batch_losses(
    PROMPTS[:2], 0.5, EARLY[:2], FULL[:2], kind="risk_signed", metric="token_f1",
    ask=lambda questions: {"p0": ["b c d"]},
  )  # fmt: skip
  # "a" is an article: F1 of (b c d) is 1, of (b c x) 2/3.
  np.testing.assert_allclose(found, [1 / 3, 0.0])


QUESTIONS = [label_requests.LabelRequest(p.id, p.input, "full", ("early",)) for p in PROMPTS]


def test_answers_stay_where_more_is_asked(tmp_path):
  path = tmp_path / "unlabelled.jsonl"
  label_requests.write_requests(path, QUESTIONS[:2])
  rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  rows[0]["targets"] = ["an answer"]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  label_requests.write_requests(path, QUESTIONS[1:4])
  assert label_requests.read_references(path) == {
    "p0": ("an answer",),
    "p1": (),
    "p2": (),
    "p3": (),
  }
  label_requests.write_requests(path, [])
  assert label_requests.read_references(path) == {"p0": ("an answer",)}


@pytest.mark.parametrize(
  "text",
  [
    '{"id": "p0", "prediction": "a text", "targets": ["x"]}\n',
    '{"id": "p0", "targets": ["x"]}\n{"id": "p0", "targets": ["y"]}\n',
    "no list\n",
  ],
)
def test_questions_replace_nothing_else(tmp_path, text):
  path = tmp_path / "outputs.jsonl"
  path.write_text(text)
  with pytest.raises(GenerationsError, match=r"outputs\.jsonl to be new.*choose another"):
    label_requests.write_requests(path, QUESTIONS)
  assert path.read_text("utf-8") == text
