"""The benchmark at a tiny shape: forced exits come out, tables are whole, peers are named."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
TINY = ("--shapes=tiny", "--batch_sizes=2", "--input_lengths=16", "--decode_lengths=6")


@pytest.fixture
def scripts(monkeypatch):
  """The scripts as modules, as `python scripts/benchmark.py` finds them."""
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import benchmark
  import benchmark_models
  import benchmark_peers
  import benchmark_systems

  yield {
    "benchmark": benchmark,
    "models": benchmark_models,
    "peers": benchmark_peers,
    "systems": benchmark_systems,
  }
  jax.config.update("jax_enable_compilation_cache", True)
  for name in [name for name in sys.modules if name.startswith("benchmark")]:
    del sys.modules[name]


def test_one_command_makes_one_table(scripts, tmp_path, capsys):
  path = tmp_path / "table.json"
  options = ("--depths=1", "--measures=classifier", "--repeats=2", "--shortlist=8", "--peers=")
  options = (*options, "--engines=default", "--systems=static,mixed", "--against=full depth")
  assert scripts["benchmark"].main([*TINY, *options, f"--output={path}"]) == 0
  table = json.loads(path.read_text())
  rows = {row[1]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
  assert {"full depth", "static 1", "classifier, mixed, default"} <= set(rows)
  full, static = rows["full depth"], rows["static 1"]
  assert full["layers"] == 4 and static["layers"] == 1
  mixed = rows["classifier, mixed, default"]
  narrow = rows["classifier, mixed, default, head in 8 bits"]
  assert 1 < mixed["layers"] < 4 and narrow["layers"] == mixed["layers"]
  for row in rows.values():
    assert 0 < row["ms a step"] < row["with the encoder"] and row["compile s"] >= 0
  assert mixed["over static"] > 0 and static["over static"] == pytest.approx(1)
  assert full["tokens equal"] == 1 and mixed["tokens equal"] is None
  # Two repeats are too few for an interval.
  assert full["full depth over it"] == full["with both encoders"] == "1.00"
  assert float(static["full depth over it"]) > 0
  assert table["machine"].endswith("cores") and "jax" in table["versions"]
  assert "| classifier, mixed, default |" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["probe", "shortlist"])
def test_forced_exits_are_exact_for_every_row_and_token(scripts, measure):
  models, systems = scripts["models"], scripts["systems"]
  setting = models.Setting("tiny", 3, 16, 6)
  ours = systems.Ours(models.load("tiny", "float32", 8), setting)
  system = ours.forced("mixed", measure, models.mixed_depths(4), "default")
  (got,) = system.decode().exit_layers
  np.testing.assert_array_equal(got, system.exact[0])
  assert len(np.unique(got)) > 2
  assert (got[0] != got[1]).any()


def test_a_forced_measure_depends_on_what_it_measures(scripts):
  """Meta: a measure whose value could not matter might not be computed."""
  models = scripts["models"]

  @dataclasses.dataclass(frozen=True)
  class Given:
    name, uses_head, uses_shortlist, part, bound = "given", False, False, None, None

    def __call__(self, view):
      return view.hidden

  forced = models.ForcedMeasure(Given(), 4)
  view = lambda value: dataclasses.make_dataclass("View", ["layer", "hidden"])(
    2, jnp.asarray(value)
  )
  low, high = forced(view(0.0)), forced(view(1.0))
  assert low < high
  trace = models.Trace((2, 3), 4)
  two, three = (trace(jnp.asarray(0.0), jnp.asarray(t)) for t in (0, 1))
  assert two <= low and high < three


def test_the_packed_model_has_real_prompts(scripts):
  models = scripts["models"]
  setting = models.Setting("packed", 2, 256, 8, num_prompts=4)
  made = models.batches(models.load("packed", "float32", 8), setting)
  assert [batch.shape for batch in made] == [(2, 256)] * 2
  assert all((batch[:, 0] > 2).all() and (batch == 1).any() for batch in made)


def test_a_peer_that_is_not_there_is_named(scripts):
  peers = scripts["peers"]
  assert peers.not_installed("json") is None
  assert "no_such_package" in peers.not_installed("json", "no_such_package")
  assert {"t5x", "t5x_calm", "transformers", "ctranslate2"} == {p.name for p in peers.PEERS}


def test_rows_are_counted_to_their_end(scripts):
  benchmark, decoded = scripts["benchmark"], scripts["systems"].Decoded
  tokens = np.array([[5, 1, 0, 0], [5, 6, 7, 8]])
  np.testing.assert_array_equal(benchmark.lengths(tokens, 1), [2, 4])
  other = np.array([[5, 1, 9, 9], [5, 6, 7, 9]])
  assert benchmark.agreement(decoded([other]), decoded([tokens]), 1) == pytest.approx(5 / 6)


def test_a_ratio_has_an_interval_that_supposes_no_distribution(scripts):
  """The median of 7 lies between the least and the most of them but once in 64."""
  import harness

  ours, theirs = [1.0] * 7, [2.0, 9.0, 3.0, 1.0, 4.0, 5.0, 100.0]
  got = harness.ratio(theirs, ours)
  assert (got.median, got.low, got.high) == (4.0, 1.0, 100.0)
  assert str(got) == "4.00 [1.00, 100.00]"
  assert str(harness.ratio(theirs[:5], ours[:5])) == "3.00"


def test_calls_take_turns(scripts):
  import harness

  order = []
  runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
  timed = harness.in_turn(runs, 2)
  assert order == ["a", "b", "a", "b", "b", "a"]
  assert timed["a"].result == 1 and timed["a"].results == [3, 6]
  assert len(timed["b"].seconds) == 2 and timed["b"].median > 0


def test_an_unknown_shape_is_refused(scripts, capsys):
  with pytest.raises(SystemExit):
    scripts["benchmark"].parse(["--shapes=huge"])
  assert "Expected shapes among" in capsys.readouterr().err
