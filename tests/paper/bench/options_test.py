"""Options of a report without meaning are refused before anything is decoded."""

import pytest

pytest.importorskip("jax", reason="the report decodes")

from calm.paper.bench import bench


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("limit", -1), ("timed", 0), ("rounds", -2), ("ablated", 0), ("examples", -1)),
    *(("step", 0.0), ("error_rate", 1.0), ("error_rate", float("nan"))),
    *(("measures", ("sotfmax",)), ("measures", ("softmax@a",))),
  ],
)
def test_what_has_no_meaning_is_named(name, value):
  with pytest.raises(ValueError, match=f"`{name}`"):
    bench.Options(**{name: value})
  assert bench.Options(measures=("softmax@2,4", "state"), limit=None).limit is None
