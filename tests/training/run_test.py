"""Runs from their parts, and `calm train` from gin to an exported
checkpoint.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import shutil
import tomllib

import jax
import numpy as np
import pytest
from rich import console as rich_console

pytest.importorskip(
  "orbax.checkpoint", reason="Orbax (the `train` extra) is not installed"
)
gin = pytest.importorskip("gin")

from calm import checkpoints, inference
from calm.commands import cli, train
from calm.commands.run import guarded
from calm.data import vocabulary
from calm.t5 import network, parameters
from calm.training import run, sources, updates
from tests import toy_vocabulary

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "train"


@pytest.fixture(autouse=True)
def environment():
  gin.clear_config()
  with jax.numpy_dtype_promotion("standard"):  # optax's own code promotes
    yield
  gin.clear_config()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  model = toy_vocabulary.train(folder / "toy.model")
  texts = [
    f"{text} {n}"
    for n in range(8)
    for text in dict.fromkeys(toy_vocabulary.TEXTS)
  ]
  rows = [{"input": text, "target": text.split()[-2]} for text in texts]
  path = folder / "rows.jsonl"
  path.write_text(
    "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
  )
  return path, model


def arguments(gin_file, output_dir, *bindings, **options):
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  words = [f"--gin_file={gin_file}"]
  words += [f"--gin_bindings={binding}" for binding in bindings]
  words += [f"--output_dir={output_dir}"] if output_dir else []
  made = parser.parse_args(words)
  vars(made).update(options)
  return made


def bindings(files, num_steps=12):
  return (
    f"TRAIN = '{files[0]}'",
    f"VOCABULARY_PATH = '{files[1]}'",
    f"training.TrainConfig.num_steps = {num_steps}",
    "network.T5Config.vocab_size = 160",
    "training.TrainConfig.eval_every = 6",
    "training.TrainConfig.log_every = 3",
  )


@pytest.fixture(scope="module")
def stage_one(files, tmp_path_factory):
  output_dir = tmp_path_factory.mktemp("stage_one")
  gin.clear_config()
  with jax.numpy_dtype_promotion("standard"):
    code = train.run(
      arguments(CONFIGS / "local_tiny.gin", output_dir, *bindings(files))
    )
  assert code == 0
  return output_dir


def test_the_command_trains_and_exports_a_model_that_loads(stage_one, files):
  checkpoint = checkpoints.load(stage_one / "model")
  assert checkpoint.config.num_decoder_layers == 3
  assert checkpoint.vocabulary == vocabulary.SentencePieceVocabulary(files[1])
  options = json.loads((stage_one / "model" / "inference.json").read_text())
  assert options == {
    "task_prefix": "",
    "max_input_length": 64,
    "max_decode_length": 32,
  }
  history = json.loads((stage_one / "validation.json").read_text())
  assert [entry["step"] for entry in history] == [6, 12]
  assert history[1]["loss"] < history[0]["loss"] < np.log(160)
  assert {"loss/layer_1", "accuracy/layer_3"} <= set(history[0])
  assert "num_steps = 12" in (stage_one / "config.gin").read_text()


def test_a_finished_run_is_only_exported_again_and_says_what_decodes_it(
  stage_one, files, capsys
):
  before = (stage_one / "model" / "params.safetensors").read_bytes()
  args = arguments(CONFIGS / "local_tiny.gin", stage_one, *bindings(files))
  assert train.run(args) == 0
  out = capsys.readouterr().out
  assert "resumed at step 12" in out
  assert (stage_one / "model" / "params.safetensors").read_bytes() == before
  words = shlex.split(out.splitlines()[-1])
  assert words[0] == "calm" and cli.main(words[1:]) == 0
  assert checkpoints.load(stage_one / "model").exits_trained


def test_scalars_are_kept(tmp_path):
  monitor = train.Monitor(tmp_path, rich_console.Console(), None)
  monitor.start(0, 3)
  monitor.step(3, {"loss": 2.0, "target_tokens": 5.0, "accuracy/layer_1": 0.5})
  monitor.evaluation(3, {"loss": 1.0, "accuracy/layer_1": 0.5, "qa/loss": 3.0})
  kept = [
    json.loads(line)
    for line in (tmp_path / train.SCALARS).read_text().splitlines()
  ]
  names = ("split", "step", "loss", "accuracy/layer_1")
  assert [[line[name] for name in names] for line in kept] == [
    ["train", 3, 2.0, 0.5],
    ["validation", 3, 1.0, 0.5],
  ]


def test_mistakes_are_one_message_and_code_2(files, tmp_path, capsys):
  cases = {
    "No such file": (
      "TRAIN = 'missing.jsonl'",
      f"VOCABULARY_PATH = '{files[1]}'",
    ),
    "SentencePiece": (
      f"TRAIN = '{files[0]}'",
      "VOCABULARY_PATH = 'missing.model'",
    ),
    "TRAIN = '...'": (
      f"VOCABULARY_PATH = '{files[1]}'",
      "TRAIN = %gin.REQUIRED",
    ),
    "got INITIAL, which nothing reads": (*bindings(files), "INITIAL = 'model'"),
  }

  def run(given):
    return guarded(train.run, given)

  for message, given in cases.items():
    gin.clear_config()
    assert (
      run(arguments(CONFIGS / "local_tiny.gin", tmp_path / "run", *given)) == 2
    )
    error = capsys.readouterr().err
    assert (
      message in error
      and error.startswith("calm: ")
      and "Traceback" not in error
    )
  gin.clear_config()
  assert run(arguments(CONFIGS / "missing.gin", tmp_path)) == 2
  assert "missing.gin" in capsys.readouterr().err
  gin.clear_config()
  assert run(arguments(CONFIGS / "local_tiny.gin", None, *bindings(files))) == 2
  assert "--output_dir" in capsys.readouterr().err


def test_exit_parts_are_added_and_wider_mlps_are_of_the_same_function(
  tmp_path, caplog
):
  config = network.T5Config(
    vocab_size=8,
    emb_dim=4,
    num_heads=1,
    head_dim=4,
    mlp_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
    exit_classifier=False,
    one_hot_embedding=False,
  )
  params = jax.tree.map(np.asarray, updates.init_params(config, 0))
  checkpoints.save(tmp_path, params, config)
  made, added, _ = run.starting_point(None, str(tmp_path), 0)
  assert made.exit_classifier and added["decoder"]["exit_classifier"][
    "kernel"
  ].shape == (4, 1)
  wider = dataclasses.replace(config, mlp_dim=6)
  model, grown, _ = run.starting_point(wider, str(tmp_path), 0)
  assert "4 units each to 6" in caplog.text and model.mlp_dim == 6
  tokens = np.array([[3, 4, 1]], np.int32)

  def states(config, params):
    return network.Transformer(config).apply(
      {"params": params}, tokens, tokens, tokens, method="hidden_states"
    )

  np.testing.assert_allclose(
    states(model, grown), states(config, params), rtol=1e-5, atol=1e-5
  )
  with pytest.raises(ValueError, match="shape"):
    run.starting_point(dataclasses.replace(config, mlp_dim=3), str(tmp_path), 0)


def test_named_parts_start_anew_and_the_rest_stays(stage_one):
  before = parameters.flatten(checkpoints.load(stage_one / "model").params)
  for parts, name in (
    (("decoder/layers_0/mlp",), "decoder/layers_0/mlp/"),
    (("encoder",), "encoder/"),
  ):
    made = run.starting_point(None, str(stage_one), 1, parts)[1]
    for path, leaf in parameters.flatten(made).items():
      assert bool(np.all(leaf == before[path])) == (name not in path), path
  with pytest.raises(
    ValueError, match=r"`fresh`.*exit_classifier.*got 'classifier'"
  ):
    run.starting_point(None, str(stage_one), 0, ("classifier",))
  with pytest.raises(ValueError, match="`model` or `initial`"):
    run.starting_point(None, None, 0)


def test_the_wheel_takes_configs_into_the_package():
  text = (CONFIGS.parents[1] / "pyproject.toml").read_text("utf-8")
  wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
  assert wheel["force-include"] == {"configs": "calm/configs"}


def test_denoising_reads_what_follows_the_marker_and_each_text_once(
  files, tmp_path
):
  vocab = vocabulary.SentencePieceVocabulary(files[1])
  texts = ["pack my box with five dozen jugs", "the quick brown fox jumps"]
  texts = [*(" ".join([text] * 4) for text in texts), "dog"]
  rows = [
    {"input": f"question: what? context: {text}"}
    for text in [*texts[:2], texts[0]]
  ]
  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (tmp_path / "plain.jsonl").write_text(json.dumps({"input": texts[0]}) + "\n")
  source = sources.denoising(
    [("plain.jsonl", ""), ("qa.jsonl", " context: ")],
    vocab,
    20,
    1,
    root=str(tmp_path),
  )
  assert [
    vocab.decode(source.texts[i]) for i in range(len(source.texts))
  ] == texts[:2]
  assert source.first_sentinel == vocab.vocab_size - 1


def test_a_shortlist_is_the_targets_most_frequent_tokens(files, tmp_path):
  words = vocabulary.SentencePieceVocabulary(files[1], extra_ids=4)
  for name, targets in (("a", ["fox fox", "fox"]), ("b", ["dog"] * 100)):
    rows = [
      json.dumps({"input": "x", "target": target}) + "\n" for target in targets
    ]
    (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
  names = ["a.jsonl", "b.jsonl"]
  found = sources.frequent_tokens(names, words, 1000, root=str(tmp_path))
  assert set(found) == {
    words.eos_id,
    *words.encode("fox fox"),
    *words.encode("dog"),
  }
  assert (
    sources.frequent_tokens(names, words, 2, root=str(tmp_path)) == found[:2]
  )
  run.Export(words, shortlist=found).write(tmp_path)
  stored = json.loads((tmp_path / "inference.json").read_text("utf-8"))
  assert stored["shortlist"] == list(found)


def own_texts(files, folder):
  """Prompts without targets, and what `calm infer` may have made of all but the
  first.
  """
  inputs = [
    json.loads(line)["input"]
    for line in files[0].read_text("utf-8").splitlines()
  ]
  prompts = folder / "prompts.jsonl"
  own = folder / "own.jsonl"
  rows = [
    json.dumps({"id": f"p{i}", "input": text}) for i, text in enumerate(inputs)
  ]
  prompts.write_text("\n".join(rows), encoding="utf-8")
  made = [
    json.dumps({"id": f"p{i}", "prediction": "x", "tokens": [5 + i % 50, 1]})
    for i in range(len(inputs) - 1, 0, -1)
  ]
  own.write_text("\n".join(made), encoding="utf-8")
  return inputs, prompts, own


def test_outputs_stand_in_for_targets(files, tmp_path):
  words = vocabulary.SentencePieceVocabulary(files[1])
  inputs, prompts, own = own_texts(files, tmp_path)
  source = sources.supervised(
    str(prompts), words, ((64, 8),), 4, outputs=str(own)
  )
  assert len(source.inputs) == len(inputs) - 1
  assert source.targets[0].tolist() == [6, 1] and source.targets[
    6
  ].tolist() == [12, 1]
  own.write_text(json.dumps({"id": "other", "tokens": [1]}), encoding="utf-8")
  with pytest.raises(
    ValueError, match=r"`outputs`.*calm infer --threshold=never"
  ):
    sources.supervised(str(prompts), words, ((64, 8),), 4, outputs=str(own))
  own.write_text("{}", encoding="utf-8")
  with pytest.raises(
    ValueError, match=r"own.jsonl:1: .* `calm infer --output`.*Expected `id`"
  ):
    sources.supervised(str(prompts), words, ((64, 8),), 4, outputs=str(own))


def test_probes_learn_from_the_models_own_texts(stage_one, files, tmp_path):
  inputs, prompts, own = own_texts(files, tmp_path)
  with pytest.raises(
    ValueError, match=r"a shortlist in inference.json.*ExitProbes.shortlist"
  ):
    sources.stored_shortlist(str(stage_one))
  initial = tmp_path / "listed"
  shutil.copytree(stage_one / "model", initial)
  options = json.loads((initial / "inference.json").read_text("utf-8"))
  (initial / "inference.json").write_text(
    json.dumps({**options, "shortlist": [1, 3, 5, 7]})
  )
  chosen = [
    f"INITIAL = '{initial}'",
    f"PROMPTS = '{prompts}'",
    f"OUTPUTS = '{own}'",
  ]
  chosen += [
    "TrainConfig.num_steps = 4",
    "TrainConfig.eval_every = 2",
    "TARGETS = 8",
  ]
  chosen += ["supervised.batch_size = 8"]
  assert (
    train.run(
      arguments(CONFIGS / "exit_probes.gin", tmp_path / "probes", *chosen)
    )
    == 0
  )
  before = checkpoints.load(stage_one / "model")
  after = checkpoints.load(tmp_path / "probes" / "model")
  old = parameters.flatten(before.params)
  new = parameters.flatten(after.params)
  assert {path for path in new if path not in old} == {
    f"decoder/exit_probes/{name}" for name in ("kernel", "features", "bias")
  }
  assert all(np.array_equal(new[path], leaf) for path, leaf in old.items())
  assert new["decoder/exit_probes/kernel"].any() and after.config.exit_probes
  early = inference.load(tmp_path / "probes" / "model", measure="probe")
  assert early.generate(inputs[:1], threshold=0.0).mean_layers == 1.0
  with pytest.raises(ValueError, match=r"'probe'.*calm train --gin_file"):
    inference.load(initial, measure="probe").generate(inputs[:1], threshold=0.5)
