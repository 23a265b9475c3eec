"""The benchmark at a tiny shape: forced exits come out, tables are whole, peers
are named.
"""

import json
import time

# As `python scripts/benchmark.py` finds them.
import benchmark
import benchmark_models as models
import benchmark_peers as peers
import benchmark_systems as systems
import harness
import jax
import numpy as np
import pytest
import tables

TINY = (
  "--shapes=tiny",
  "--batch_sizes=2",
  "--input_lengths=16",
  "--decode_lengths=6",
)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache():
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def test_one_command_makes_one_table(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(tables, "RESULTS", tmp_path)
  options = (
    "--depths=1",
    "--measures=classifier",
    "--repeats=2",
    "--shortlist=8",
    "--peers=",
  )
  options = (
    *options,
    "--engines=default",
    "--systems=static,mixed",
    "--results=table",
  )
  assert benchmark.main([*TINY, *options]) == 0
  table = json.loads((tmp_path / "table.json").read_text())
  rows = {
    row[1]: dict(zip(table["columns"], row, strict=True))
    for row in table["rows"]
  }
  assert {"full depth", "static 1", "classifier, mixed, default"} <= set(rows)
  full = rows["full depth"]
  static = rows["static 1"]
  assert full["layers"] == 4 and static["layers"] == 1
  mixed = rows["classifier, mixed, default"]
  narrow = rows["classifier, mixed, default, head in 8 bits"]
  assert 1 < mixed["layers"] < 4 and narrow["layers"] == mixed["layers"]
  for row in rows.values():
    assert (
      0 < row["ms a step"] < row["with the encoder"] and row["compile s"] >= 0
    )
  assert mixed["over static"] > 0 and static["over static"] == pytest.approx(1)
  assert table["machine"].endswith("cores") and "jax" in table["versions"]
  assert "| classifier, mixed, default |" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["probe", "shortlist"])
def test_forced_exits_are_exact_for_every_row_and_token(measure):
  setting = models.Setting("tiny", 3, 16, 6)
  ours = systems.Ours(models.load("tiny", "float32", 8), setting)
  for exit_layers in (None, (1, 3)):
    depths = models.mixed_depths(4, exit_layers=exit_layers)
    system = ours.forced("mixed", measure, depths, "default", exit_layers)
    (got,) = system.decode().exit_layers
    np.testing.assert_array_equal(got, system.exact[0])
    assert set(np.unique(got)) == {1, 2, 3, 4} & {
      *(exit_layers or (1, 2, 3)),
      4,
    }
    assert (got[0] != got[1]).any()


def test_a_peer_that_is_not_there_is_named_and_rows_are_counted_to_their_end():
  assert peers.not_installed("json") is None
  assert "no_such_package" in peers.not_installed("json", "no_such_package")
  tokens = np.array([[5, 1, 0, 0], [5, 6, 7, 8]])
  np.testing.assert_array_equal(benchmark.lengths(tokens, 1), [2, 4])


def test_calls_take_turns():
  order = []
  runs = {
    name: lambda name=name: order.append(name) or len(order) for name in "ab"
  }
  timed = harness.in_turn(runs, 2)
  assert order == ["a", "b", "a", "b", "b", "a"]
  assert timed["a"].result == 1 and timed["a"].results == [3, 6]
  assert len(timed["b"].seconds) == 2 and timed["b"].median > 0


def test_a_peer_answers_behind_the_routes_of_the_server():
  testclient = pytest.importorskip(
    "starlette.testclient", reason="starlette is not installed"
  )
  pytest.importorskip(
    "prometheus_client", reason="prometheus-client is not installed"
  )
  import benchmark_serve

  from calm import inference, serve

  def decode(rows, limit, first):
    return [[5, 1]] * len(rows)

  device = benchmark_serve.PeerDevice(inference.load("packed"), decode)
  with testclient.TestClient(
    serve.Api(device, "m").app, "http://127.0.0.1"
  ) as client:
    while device.is_alive() and not device.ready:
      time.sleep(0.02)
    answer = client.post("/v1/completions", json={"prompt": "a"})
  line = benchmark_serve.row(
    "m", "0.3", [(2.0, 1.0, [(0.0, 0.5, answer.content)])]
  )
  assert line == ["m", "0.3", 8.0, 0.5, 500.0, 500.0, None, 1000.0]
