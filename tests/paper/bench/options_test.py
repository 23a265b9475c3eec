"""Options of a report without meaning are refused before anything is decoded."""

import pytest

pytest.importorskip("jax", reason="the report decodes")

from calm import exits, inference
from calm.exits import schedules
from calm.paper.bench import bench


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("limit", -1), ("timed", 0), ("rounds", -2), ("ablated", 0), ("examples", -1)),
    *(("step", 0.0), ("error_rate", 1.0), ("error_rate", float("nan"))),
    *(("measures", ("sotfmax",)), ("measures", ("softmax@a",))),
    *(("measures", ("softmax/-1",)), ("measures", ("verified@2,4",))),
    ("measures", ("verified",)),
  ],
)
def test_what_has_no_meaning_is_named(name, value):
  with pytest.raises(ValueError, match=f"`{name}`"):
    bench.Options(**{name: value})
  assert bench.Options(measures=("softmax@2,4", "state"), limit=None).limit is None


def test_a_name_says_measure_layers_and_decay():
  packed = inference.load("packed", max_decode_length=24)
  options = bench.under(packed, "softmax@2,4/8").options
  assert (options.measure, options.exit_layers) == ("softmax", (2, 4))
  assert options.schedule == schedules.Decaying(8.0, 24)
  assert bench.under(packed, "softmax").options.schedule == schedules.Constant()
  assert bench.available(packed, ("softmax@2,4/8", "probe/2")) == ("softmax@2,4/8",)


def test_drafts_with_slack_are_a_measure_that_every_model_has():
  packed = inference.load("packed", max_decode_length=24)
  assert bench.Options(measures=("verified@2",)).measures == ("verified@2",)
  rule = bench.under(packed, "verified@2").options.rule
  assert isinstance(rule, exits.Verified) and rule.draft_layer == 2
  assert bench.available(packed, ("probe", "verified@2")) == ("verified@2",)
