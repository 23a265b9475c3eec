"""A calibration cannot be edited: every forgery is refused, by the name of what
is wrong.
"""

import copy
import json

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  calibration,
  risks,
)
from tests.calibrate import laws

GRID = [0.9, 0.5, 0.12]
RATES = dict(tolerance=0.1, error_rate=0.05)


def made(method="auto", **fields):
  generator = np.random.default_rng(0)
  means = (0.01, 0.02, 0.3)
  values = np.stack(
    [laws.mostly_zero(generator, mean, 300) for mean in means], axis=1
  )
  losses = SequenceLosses(
    values, GRID, kind="textual", metric="rouge_l", procedure=laws.procedure()
  )
  return calibrate(losses, **{**RATES, **fields}, method=method)


HONEST = made().to_json()
PAPER = made("paper").to_json()
GROUPS = made(
  promise=risks.EveryGroup(labels=[f"g{row % 2}" for row in range(300)])
).to_json()


def edited(path, new, honest=HONEST):
  """A calibration with one entry changed; `path` names it, dots between."""
  here = value = copy.deepcopy(honest)
  *way, last = path.split(".")
  for name in way:
    here = here[int(name) if name.isdigit() else name]
  here[int(last) if last.isdigit() else last] = new
  return value


def forged(path, new, honest=HONEST):
  """An edited calibration, its digest written anew."""
  value = edited(path, new, honest)
  return {**value, "digest": calibration.digest(value)}


def test_files_that_are_no_calibration_are_refused(tmp_path, monkeypatch):
  path = tmp_path / "c.json"
  for content, message in (
    (None, "got none: No such file"),
    ("{", "expected a calibration, got none"),
    ("[]", "`schema_version` 2 or 1, got .list."),
    (
      json.dumps({**HONEST, "rows": None})[:-1],
      "expected a calibration, got none",
    ),
  ):
    if content is not None:
      path.write_text(content)
    with pytest.raises(ValueError, match=rf"c.json: .*{message}"):
      Calibration.load(path)
  monkeypatch.setattr(calibration, "_MOST_BYTES", 1)
  with pytest.raises(ValueError, match="to have at most 1 bytes, got"):
    Calibration.load(path)


# Refused although the digest was written anew: they contradict the other
# fields.
CONTRADICTIONS = [
  *(
    (path, new, message, HONEST)
    for path, new, message in (
      ("threshold", 0.02, "`threshold` 0.5"),
      ("threshold", "never", "`threshold` 0.5"),
      ("error_rate", 1e-30, "`rejected` False"),
      ("rows.0.p_value", 1.0, "`p_value`"),
      ("rows.2.log_p_value", -1.0, "`p_value`"),
      ("rows.0.rejected", False, "`rejected` True"),
      ("rows.2.rejected", True, "`rejected` False"),
      ("rows.2.adjusted_p_value", 0.01, "`adjusted_p_value`"),
      ("rows.0.threshold", 0.01, "descend strictly"),
      ("testing", "bonferroni", "`adjusted_p_value`"),
      ("visited", [0], "`visited`"),
      (
        "promise",
        {"name": "tail_mean", "beta": 0.5, "start": 0.5},
        "`start` below the tolerance",
      ),
      ("promise", {"name": "every_group", "groups": ["a", "b"]}, "`parts` "),
    )
  ),
  # Methods of sums are computed again.
  *(
    (path, new, r"Expected `log_p_values` .* the file was edited", PAPER)
    for path, new in (
      ("tolerance", 0.08),
      ("rows.0.mean", 0.001),
      ("method", "hoeffding"),
    )
  ),
  # Rows say what the least certain part says.
  *(
    (path, new, message, GROUPS)
    for path, new, message in (
      ("parts.1.means", [0.1, 0.2], "of as many"),
      ("parts.1.num_examples", [300, 300, 0.5], "whole numbers, got 0.5"),
      ("parts.1.log_p_values", [-1.0, -1.0, 1.0], "`mean` .* in row 0"),
      ("rows.0.upper_bound", 0.05, "`upper_bound` .* in row 0"),
    )
  ),
]


@pytest.mark.parametrize(("path", "new", "message", "honest"), CONTRADICTIONS)
def test_contradictions_are_found_without_a_digest(path, new, message, honest):
  with pytest.raises(ValueError, match=message):
    Calibration.from_json(forged(path, new, honest))


def test_a_digest_can_be_expected(tmp_path):
  found = made()
  found.save(tmp_path / "c.json")
  assert (
    Calibration.load(tmp_path / "c.json", expect_digest=found.digest.upper())
    == found
  )
  with pytest.raises(ValueError, match="it is another one, or was edited"):
    Calibration.load(tmp_path / "c.json", expect_digest="0" * 64)
  # The sentence is made of the numbers, and never read.
  value = forged("guarantee", "Nothing is ever lost.")
  assert Calibration.from_json(value).guarantee == found.guarantee


@pytest.mark.parametrize("write", [edited, forged])
@pytest.mark.parametrize(
  ("path", "new"),
  [
    *(
      ("schema_version", 3),
      ("schema_version", True),
      ("more", 1),
      ("rows", [3]),
    ),
    *(("rows.0", {}), ("rows.0.mean", "x"), ("rows", []), ("parts", [{}])),
    *(
      ("tolerance", 10**400),
      ("support.lower", None),
      ("visited", 3),
      ("procedure", 3),
    ),
    *(
      ("promise", 3),
      ("rows.0.log_p_value", 1.0),
      ("promise", {"name": "nothing"}),
    ),
    *(
      ("method", "magic"),
      ("metric", "\u202egnihton"),
      ("seed", "not hexadecimal"),
    ),
  ],
)
def test_fields_of_other_types_are_refused_whatever_the_digest_says(
  path, new, write, tmp_path
):
  (tmp_path / "c.json").write_text(json.dumps(write(path=path, new=new)))
  with pytest.raises(
    ValueError, match=r"c\.json: expected .* got none: .*; restore"
  ) as caught:
    Calibration.load(tmp_path / "c.json")
  text = str(caught.value)
  # no escape of the file's reaches the terminal
  assert text.isprintable() and len(text) < 1500


def family(name, risk):
  table = {name: np.zeros((200, 3))}
  losses = SequenceLosses(table[name], GRID)
  return calibrate_configurations(
    {name: [risks.Risk(losses, 0.1, name=risk)]}, table, error_rate=0.05
  )


@pytest.mark.parametrize(
  "make",
  [
    lambda text: SequenceLosses(np.zeros((9, 3)), GRID, knobs=(text, "b", "c")),
    lambda text: SequenceLosses(np.zeros((9, 3)), GRID, metric=text),
    lambda text: SequenceLosses(np.zeros((9, 3)), GRID, kind=text),
    lambda text: risks.EveryGroup(labels=[text, "other"]),
    lambda text: family("a", text),
    lambda text: family(text, "a"),
  ],
)
def test_texts_that_would_not_be_loaded_are_not_taken(make):
  make("日本 b")
  for text in ("a\nb", "\x1b[31m", "\ud800", "x" * 5000):
    with pytest.raises(
      ValueError, match=r"Expected .* printable characters, got "
    ) as caught:
      make(text)
    assert len(str(caught.value)) < 600


def test_p_equal_to_the_error_rate_goes_either_way():
  """0.25 = 0.5 ** 2, to the last digit or not: what was decided then is
  believed.
  """
  found = calibrate(
    np.zeros((2, 1)),
    [0.5],
    tolerance=0.5,
    error_rate=0.25,
    support=Support(binary=True),
  )
  assert found.certified and Calibration.from_json(found.to_json()) == found
