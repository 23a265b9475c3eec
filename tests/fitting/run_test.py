"""A fit from rows to a folder that serves itself, on a toy of bytes; and what is refused."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib (the `report` extra) is not installed")

from calm import checkpoints, exits, fitting, inference
from calm.calibrate import Calibration, Prompt, calibrate, generations, ledger, seconds
from calm.calibrate import thresholds as thresholds_lib
from calm.data import vocabulary
from calm.fitting import candidates, choose, run, splits
from calm.fitting import result as result_lib
from calm.inference import grid, result_cache
from tests import toy_vocabulary

WORDS = ["a few words", "another text", "say it", "the fourth", "b"]
ROWS = [
  Prompt(f"r{i}", f"{WORDS[i % 5]} {i}", (f"{WORDS[i % 3]}",), f"g{i}") for i in range(45)
]
LEAVES = candidates.Candidate("softmax", (1,))
OPTIONS = {"tolerance": 0.5, "stages": "none", "batch_size": 4, "metric": "chrf"}


@pytest.fixture(scope="module")
def model(directory):
  return directory


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
  """Seconds are looked at for their form here, not for their size."""
  patch = pytest.MonkeyPatch()
  patch.setattr(choose, "FIRST", (1, 1))
  patch.setattr(choose, "LAST", (2, 1))
  patch.setattr(choose, "FINALISTS", 1)
  patch.setattr(candidates, "measures", lambda predictor: ("softmax",))
  patch.setattr(inference.timing, "PROMPTS", 2)
  patch.setattr(inference.timing, "ROUNDS", 1)
  yield
  patch.undo()


@pytest.fixture(scope="module")
def always_faster():
  """Whatever was measured, exits are taken to be faster: a toy's seconds are noise."""
  patch = pytest.MonkeyPatch()
  measured, timed = inference.timing.beside_full_depth, choose.timed

  def measure(*arguments, **options):
    found = measured(*arguments, **options)
    return dataclasses.replace(
      found, single=dataclasses.replace(found.single, speedup=1.5), batched=None
    )

  def faster(*arguments):
    found = timed(*arguments)
    faster = tuple(1.5 for _ in found.speedups)
    return dataclasses.replace(found, speedups=faster, end_to_end=faster)

  patch.setattr(inference.timing, "beside_full_depth", measure)
  patch.setattr(choose, "timed", faster)
  yield patch
  patch.undo()


@pytest.fixture(scope="module")
def made(model, always_faster, tmp_path_factory):
  output = tmp_path_factory.mktemp("fit") / "mine"
  said = []
  served = fitting.fit(
    model, ROWS, output=output, listener=fitting.Listener(say=said.append), **OPTIONS
  )
  return output, served, said


def test_the_folder_serves_itself_under_its_promise(made, model):
  output, served, said = made
  opened = inference.load(output)
  calibration = Calibration.load(output / "calibration.json")
  assert opened.calibration == calibration == served.calibration
  assert calibration.procedure == opened.procedure and calibration.certified
  assert opened.options.grid == tuple(row.threshold for row in calibration.rows)
  assert opened.parameters_digest == inference.load(model).parameters_digest
  outputs = opened.generate(["a few words"])
  assert outputs.threshold == calibration.threshold
  assert outputs.guarantee == calibration.guarantee
  assert calibration.provenance.notes["seconds"]["single"]["speedup"] == 1.5
  assert any("(chosen)" in line for line in said) and "Rows: train 0" in said[0]
  assert said[1] == said[-1] == "The promise is about prompts drawn as these rows are."


def test_the_summary_says_what_was_found(made):
  output, served, _ = made
  markdown = (output / "summary.md").read_text("utf-8")
  page = (output / "summary.html").read_text("utf-8")
  for text in (markdown, page):
    assert "Decodes x1.50 as fast as full depth" in text
    assert f"calm infer --model={output}" in text
    assert "(chosen)" in markdown and "With probability at least 0.95" in text
    assert "The promise is about prompts drawn as these rows are." in text
  assert (
    "<svg" in page
    and "layer 1 of 3" in page
    and "http" not in page.replace("http://www.w3.org", "")
  )
  result = json.loads((output / "fit" / "result.json").read_text("utf-8"))
  assert result["last"]["risk"]["count"] == 11
  tried = result["choice"]["tried"]
  went_on = [entry["first_speedup"] for entry in tried if entry["thresholds"]]
  looked = [entry["first_speedup"] for entry in tried if not entry["thresholds"]]
  assert "in a first timing" in markdown and min(went_on) >= max(looked, default=0.0)
  assert result["threshold"] == served.threshold


def test_a_stopped_fit_goes_on_and_another_request_is_refused(
  made, model, always_faster, monkeypatch
):
  output, served, _ = made
  with pytest.raises(ValueError, match=r"`tolerance` \(0\.5 there, 0\.6 now\)"):
    fitting.fit(model, ROWS, output=output, **{**OPTIONS, "tolerance": 0.6})
  with pytest.raises(ValueError, match="the rows"):
    fitting.fit(model, ROWS[:-1], output=output, **OPTIONS)
  monkeypatch.setattr(choose.Choosing, "run", None)  # what is done is not done again
  monkeypatch.setattr(inference.timing, "beside_full_depth", None)
  again = fitting.fit(model, ROWS, output=output, **OPTIONS)
  assert again.calibration == served.calibration


def test_what_is_served_is_certified_where_a_text_depends_on_its_rows(
  model, always_faster, tmp_path
):
  rounded = shutil.copytree(model, tmp_path / "rounded")
  config = json.loads((rounded / "config.json").read_text())
  (rounded / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
  served = fitting.fit(
    rounded, ROWS, output=tmp_path / "mine", listener=fitting.Listener(), **OPTIONS
  )
  assert served.calibration is not None
  assert served.calibration.procedure == served.procedure
  assert served.procedure.batch_bucket == OPTIONS["batch_size"]


@pytest.mark.parametrize("part", ["encoder", "layers"])
def test_8_bits_are_a_candidate_against_the_texts_of_the_given_model(
  model, always_faster, monkeypatch, tmp_path, part
):
  monkeypatch.setattr(choose, "LEAST_LAYERS", 1)
  timed = choose.timed

  def faster_in_8_bits(predictor, prompts, tried, *rest):
    found = timed(predictor, prompts, tried, *rest)
    speedups = tuple(2.0 if entry.candidate.in_8_bits == part else 1.5 for entry in tried)
    return dataclasses.replace(found, speedups=speedups, end_to_end=speedups)

  monkeypatch.setattr(choose, "timed", faster_in_8_bits)
  said: list[str] = []
  output, listener = tmp_path / "mine", fitting.Listener(say=said.append)
  served = fitting.fit(model, ROWS, output=output, listener=listener, **OPTIONS)
  assert served.calibration is not None and served.calibration.procedure == served.procedure
  procedure = served.calibration.procedure
  weights_dtype = {"layers": "int8", "encoder": None}[part]
  assert (procedure.weights_dtype, procedure.encoder_dtype) == (weights_dtype, "int8")
  assert procedure.reference_dtype == "float32" and "float32" in served.calibration.guarantee
  assert any(f", {part} in 8 bits" in line and "(chosen)" in line for line in said)
  # What it is held against is what the given model writes, token by token.
  opened = inference.load(output)
  given = inference.load(model, **limits_of(opened))
  texts = given.generate(WORDS, rule=exits.StaticExit())
  assert [o.tokens for o in opened.generate(WORDS, threshold="never")] == [
    o.tokens for o in texts
  ]
  assert "in 8 bits" in (output / "summary.md").read_text("utf-8")


LARGE = 40


@pytest.fixture(scope="module")
def worse(model, always_faster, tmp_path_factory):
  """A fit whose exits are certified and faster, of weights that write worse than those given.

  References are what the given model writes, which nobody learns from few rows.
  """
  pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")
  given = shutil.copytree(model, tmp_path_factory.mktemp("given") / "toy")
  stated = {"max_input_length": 24, "max_decode_length": 8}  # rows have 32
  (given / "inference.json").write_text(json.dumps(stated))
  texts = [f"{WORDS[i % 5]} {i}" for i in range(300)]
  own = inference.load(given).generate(texts, rule=exits.StaticExit()).texts
  pairs = [pair for pair in zip(texts, own, strict=True) if pair[1].strip()][: 80 + LARGE]
  rows = [
    {"input": text, "target": target, "source": f"g{max(0, i - LARGE)}"}
    for i, (text, target) in enumerate(pairs)
  ]
  output = tmp_path_factory.mktemp("worse") / "mine"
  said: list[str] = []

  def fit(**options):
    listener = fitting.Listener(say=said.append)
    options = {**OPTIONS, "train_all": True, "stages": "one", "tolerance": 0.9, **options}
    with jax.numpy_dtype_promotion("standard"):
      return fitting.fit(given, rows, output=output, listener=listener, **options)

  return given, output, fit(), said, fit


def page_of(output):
  """The summary's first words, in either form the same."""
  first = (output / "summary.md").read_text("utf-8").partition("\n")[0].removeprefix("# ")
  assert f"<h1>{first}</h1>" in (output / "summary.html").read_text("utf-8")
  return first


@pytest.mark.filterwarnings("ignore::calm.data.prompt_batches.CutPrompts")
def test_weights_that_write_worse_are_not_served_and_the_given_ones_are_untouched(worse):
  model, output, served, said, _ = worse
  given, opened = inference.load(model), inference.load(output)
  assert opened.calibration is None and not (output / "calibration.json").exists()
  assert served.parameters_digest == opened.parameters_digest == given.parameters_digest
  before, after = (checkpoints.load(folder).params for folder in (model, output))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  for file in ("params.safetensors", "vocabulary.json"):
    assert (output / file).read_bytes() == (model / file).read_bytes()
  texts = [*WORDS, *(f"{i} is none of the rows that are given" for i in range(20))]
  assert opened.generate(texts).texts == given.generate(texts, rule=exits.StaticExit()).texts
  page = page_of(output)
  assert page.startswith("Full depth is served by the given model, its weights untouched")
  assert re.search(r"training made full depth worse \(chrf 0\.\d+ ± .*accept_quality", page)
  assert said[-1] == page


def test_weights_that_write_worse_are_served_where_that_is_accepted_and_the_page_says_it_first(
  worse,
):
  given, output, refused, _, fit = worse
  served = fit(accept_quality=True)  # nothing is trained again
  assert served.calibration == Calibration.load(output / "calibration.json")
  assert served.parameters_digest != refused.parameters_digest
  # The promise is about the given model's texts, which were decoded with the given weights.
  own = inference.load(given, **limits_of(served))
  procedure = served.calibration.procedure
  assert procedure is not None and procedure.reference_digest == own.parameters_digest
  named = f"that was given (parameters {own.parameters_digest[:12]})"
  assert named in served.calibration.guarantee
  cached = generations.load(output / "fit" / "calibration")
  texts = own.generate([prompt.input for prompt in cached.prompts], rule=exits.StaticExit())
  assert [record.prediction for record in cached.full] == texts.texts
  with pytest.raises(ValueError, match="full-depth texts of the model that was given"):
    served.with_options(grid=(0.5,)).calibrate(cached.prompts, tolerance=0.9)
  assert not (output / "full_depth.json").exists()
  page = page_of(output)
  found = re.match(r"The weights are trained ones.*\(chrf ([\d.]+) .* has ([\d.]+) ", page)
  assert found and float(found[1]) < float(found[2])
  assert fit().parameters_digest == refused.parameters_digest
  assert not (output / "calibration.json").exists()


def test_trained_weights_that_are_not_faster_leave_the_given_ones_untouched(worse, monkeypatch):
  given, output, refused, _, fit = worse
  stored = output / "fit" / "results"
  for file in stored.glob("seconds-*.json"):
    file.unlink()
  measure = inference.timing.beside_full_depth
  slower = seconds.Seconds(dataclasses.replace(SLOW.single, speedup=0.9), None)
  monkeypatch.setattr(inference.timing, "beside_full_depth", lambda *args, **options: slower)
  served = fit(accept_quality=True)
  assert served.calibration is None and served.parameters_digest == refused.parameters_digest
  before, after = (checkpoints.load(folder).params for folder in (given, output))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert "was not faster" in page_of(output) and "its weights untouched" in page_of(output)
  for file in stored.glob("seconds-*.json"):
    file.unlink()
  monkeypatch.setattr(inference.timing, "beside_full_depth", measure)
  assert fit(accept_quality=True).calibration is not None


def test_a_budget_without_steps_is_refused_with_the_least_that_is_taken(model, tmp_path):
  pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")
  rows = [dataclasses.replace(ROWS[i % 45], id=f"r{i}", group=f"g{i}") for i in range(90)]
  rows = [dataclasses.replace(row, input=f"{row.input} {row.id}") for row in rows]
  options = {**OPTIONS, "train_all": True, "stages": "one"}
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(ValueError, match="fewer than 20 steps after compiling") as refused:
      fitting.fit(
        model, rows, output=tmp_path / "a", listener=fitting.Listener(), budget=1.0, **options
      )
    assert not (tmp_path / "a").exists()
    named = re.search(r"at least (\w+), got 1s", str(refused.value))
    assert named
    enough = fitting.FitOptions(budget=fitting.parse_budget(named[1]), **options)
    made = run.Fit.open(str(model), rows, tmp_path / "a", enough, fitting.Listener())
  assert set(made.timed) == {"one"}


def test_the_population_is_said_beside_the_promise(worse):
  _, output, _, said, fit = worse
  fit(accept_quality=True)
  for text in (said[1], said[-1], (output / "summary.md").read_text("utf-8")):
    assert "one row of each of 80 groups" in text and "Group 'g0' has 34 % of the rows" in text


def limits_of(model):
  names = ("task_prefix", "max_input_length", "max_decode_length")
  return {name: getattr(model.options, name) for name in names}


class Begun(Exception):
  """Everything was checked, and work would begin."""


def said_before_work(model, rows, output, **options):
  said: list[str] = []

  def stop(title):
    raise Begun(title)

  with pytest.raises(Begun):
    listener = fitting.Listener(say=said.append, step=stop)
    fitting.fit(model, rows, output=output, listener=listener, **{**OPTIONS, **options})
  return " ".join(said)


def test_a_fit_on_rows_that_certified_another_says_so_where_it_can_know(made, model, tmp_path):
  output = made[0]
  known = "Some or all of these rows were calibrated on before"
  assert len((output / "fit" / ledger.LEDGER).read_text().splitlines()) == 1
  beside = output.parent / "beside"
  loud = [dataclasses.replace(row, input=f"{row.input.upper()}!") for row in ROWS]
  for rows, more in ((ROWS, {"tolerance": 0.6}), (loud, {"metric": "rouge_l"})):
    said = said_before_work(model, rows, beside, **more)
    assert known in said and str(output) in said and "--error_rate=0.025" in said
    assert not (beside / "fit" / ledger.LEDGER).exists()  # nothing was looked at
    shutil.rmtree(beside)
  others = [dataclasses.replace(row, input=f"new {row.input}") for row in ROWS]
  assert known not in said_before_work(model, others, beside)
  # Out of sight, unless it is what was fitted that is fitted again.
  assert known not in said_before_work(model, ROWS, tmp_path / "elsewhere")
  assert known in said_before_work(output, ROWS, tmp_path / "again")
  damages = ("", "[]", '{"rows": 3}', '{"rows": [[]]}')
  for name, damage in itertools.product((ledger.LEDGER, ledger.EARLIER), damages):
    (beside / "fit" / name).write_text(damage)
    assert known in said_before_work(model, ROWS, output.parent / "third", tolerance=0.7)
    shutil.rmtree(output.parent / "third")
  shutil.rmtree(beside)


def test_many_prompts_are_decoded_in_larger_batches_where_no_text_depends_on_them(model):
  plain = inference.load(model, batch_size=4, max_input_length=64)
  larger = grid.in_bulk(plain)
  assert {batch.tokens.shape for batch in larger.plan(WORDS)} == {(8, 64)}
  assert larger.procedure == plain.procedure
  narrow = inference.load(model, dtype="bfloat16")
  for rounded in (narrow, plain.with_options(weights_dtype="int8")):
    assert grid.in_bulk(rounded) is rounded


def _check_that_nothing_certified_is_said(result):
  """Where nothing was chosen, no column, no seconds and no second text tell of exits."""
  last = dataclasses.replace(result.last, risk=None, quality_early=None)
  bare = dataclasses.replace(result, seconds=None, last=last, curve=())
  for text in result_lib.pages(bare, fitting.FitOptions(**OPTIONS), "mine").values():
    assert "certified exits" not in text and "Seconds are" not in text
    assert "What was tried" in text and "What was chosen" not in text
    assert "At full depth: " in text and "  served `" not in text
    assert "decoder layers per token" not in text and "layer 1 of 3" not in text


TRIED = choose.Tried(LEAVES, (0.5,), (0.1,), (1.0,), 0.5, 1.0, 0.9)
NONE = choose.Choice((), None, (), 1.0, 20, 2)
SLOWER = dataclasses.replace(NONE, tried=(TRIED,))
SLOW = seconds.Seconds(seconds.Pair(1, 2, 1.0, 1.2, 0.83, 0.9), None)


def test_why_full_depth_is_served_is_said(made):
  calibration = made[1].calibration
  assert "no measure stays within" in run.why_full_depth(NONE, None, None)
  assert "x0.90" in run.why_full_depth(SLOWER, None, None)
  chosen = dataclasses.replace(SLOWER, chosen=0)
  reason = run.why_full_depth(chosen, calibration, SLOW)
  assert "certified but was not faster" in reason and "x0.83" in reason
  failed = calibrate(np.ones((200, 1)), [0.9], tolerance=0.1, error_rate=0.05)
  assert run.why_full_depth(chosen, failed, None).startswith("nothing is certified: the first")


def test_full_depth_is_served_where_exits_are_not_faster(
  made, model, always_faster, monkeypatch
):
  output, served, _ = made
  predictor = served.with_options()
  reason = run.why_full_depth(dataclasses.replace(SLOWER, chosen=0), served.calibration, SLOW)
  # It is served without further options, and as the full-depth program.
  whole = result_lib.Folder(output.parent / "whole", output.parent / "whole" / "fit", None)
  whole.work.mkdir(parents=True)
  result = dataclasses.replace(
    _result(output), reason=reason, threshold=thresholds_lib.NEVER_EXIT, exact=None
  )
  whole.write(model, predictor, result, None, fitting.FitOptions(**OPTIONS))
  full = inference.load(whole.path)
  texts = ["a few words", "say it"]
  got, static = full.generate(texts), predictor.generate(texts, rule=exits.StaticExit())
  assert got.texts == static.texts and got.mean_layers == full.num_layers
  assert "Full depth is served: threshold" in (whole.path / "summary.md").read_text("utf-8")
  # Where its own drafts were measured to be faster, it is served from them.
  fast = seconds.Pair(1, 2, 1.2, 1.0, 1.2, 1.1)
  exact = dataclasses.replace(result, exact=seconds.Seconds(fast, None))
  whole.write(model, predictor, exact, None, fitting.FitOptions(**OPTIONS))
  drafting = inference.load(whole.path)
  assert drafting.exact == inference.exact_rule(predictor)
  got = drafting.generate(texts)
  assert got.texts == static.texts and all(output.passes for output in got)
  for page in ("summary.md", "summary.html"):
    said = (whole.path / page).read_text("utf-8")
    assert "its own texts x1.20 as fast" in said and "full-depth program itself" not in said
    assert "own texts from drafts that it verifies" in said
  _check_that_nothing_certified_is_said(dataclasses.replace(result, choice=SLOWER))
  (whole.path / "full_depth.json").write_text('{"exact": {"draft_layer": 1}}')
  with pytest.raises(ValueError, match=r"full_depth\.json"):
    inference.load(whole.path)


def _result(output):
  """The result that a fit wrote, read again."""
  stored = json.loads((output / "fit" / "result.json").read_text("utf-8"))
  fields = {field.name for field in dataclasses.fields(result_lib.Result)}
  return result_cache.from_json(
    result_lib.Result, {k: v for k, v in stored.items() if k in fields}
  )


@pytest.mark.parametrize(
  ("changed", "words"),
  [
    ({"stages": "both!"}, "`stages`"),
    ({"tolerance": 0.0}, "`tolerance`"),
    ({"consistency": "text"}, "`consistency`"),
    ({"metric": "rogue"}, "`metric`"),
    ({"budget": 0.0}, "`budget`"),
  ],
)
def test_options_without_meaning_are_named_before_any_work(model, tmp_path, changed, words):
  with pytest.raises(ValueError, match=words):
    fitting.fit(model, ROWS, output=tmp_path / "out", **{**OPTIONS, **changed})
  assert not (tmp_path / "out").exists()


def test_rows_that_cannot_do_are_named_before_any_work(model, tmp_path):
  fit = lambda rows, **more: fitting.fit(
    model, rows, output=tmp_path / "out", **{**OPTIONS, **more}
  )
  with pytest.raises(ValueError, match=r"at least 35 rows .*got 1;"):
    fit(ROWS[:1])
  with pytest.raises(ValueError, match=r"at least 59 rows .*29 to calibrate on"):
    fit(ROWS, tolerance=0.1)
  bare = [dataclasses.replace(row, targets=()) for row in ROWS]
  for more in ({"consistency": "risk"}, {"train_all": True, "stages": "own"}):
    with pytest.raises(ValueError, match=r"references .*45 of 45 without.*accept_quality"):
      fit(bare, **more)
  with pytest.raises(ValueError, match="1 ids twice"):
    fit([*ROWS, ROWS[0]])
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("rows.jsonl", '{"input": "a"}\n', "rows with references.*1 of 1 without"),
    ("rows.jsonl", '{"input": "a", "target": " "}\n', "1 of 1 without"),
    ("rows.csv", "review,label\na,b\n", "`input` or .*--input_key"),
    ("rows.json", "[]", "no examples"),
    ("rows.jsonl", '{"id": "a", "input": "a"}\n' * 2, "of an earlier row"),
  ],
)
def test_files_that_cannot_do_are_named_before_any_work(model, tmp_path, name, text, words):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=words):
    fitting.fit(
      model,
      tmp_path / name,
      output=tmp_path / "out",
      **{**OPTIONS, "train_all": True, "stages": "both"},
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("model_type", "rows", "words"),
  [
    ("bart", ROWS, "`model_type` in config.json"),
    (
      "t5",
      [dataclasses.replace(r, input="日 本 語 の 文 " + r.id) for r in ROWS],
      "unknown",
    ),
  ],
)
def test_models_that_are_not_the_rows_are_named_before_any_work(
  model, tmp_path, model_type, rows, words
):
  """Another architecture, and a tokenizer that does not know the texts."""
  folder = tmp_path / "model"
  if model_type == "t5":
    pieces = vocabulary.SentencePieceVocabulary(toy_vocabulary.train(tmp_path / "toy.model"))
    opened = inference.load(model)
    checkpoints.save(folder, opened.params, opened.config, vocabulary=pieces)
  else:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
  with pytest.raises(ValueError, match=words):
    fitting.fit(folder, rows, output=tmp_path / "out", **OPTIONS)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["json", "csv", "tsv"])
def test_rows_come_in_every_format_of_prompts(tmp_path, suffix):
  values = [
    {"text": row.input, "reference": row.targets[0], "group": row.group} for row in ROWS
  ]
  delimiter = {"csv": ",", "tsv": "\t"}.get(suffix)
  lines = [list(values[0]), *(list(value.values()) for value in values)]
  text = json.dumps(values) if delimiter is None else "\n".join(map(delimiter.join, lines))
  (tmp_path / f"rows.{suffix}").write_text(text)
  read = splits.read_rows(tmp_path / f"rows.{suffix}", fitting.FitOptions())
  assert [(r.input, r.targets, r.group) for r in read] == [
    (row.input, row.targets, row.group) for row in ROWS
  ]


def test_a_folder_with_other_files_is_left_alone(model, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  (tmp_path / "file").write_text("")
  for name in ("mine", "file"):
    with pytest.raises(ValueError, match="`output` to be a new folder"):
      fitting.fit(model, ROWS, output=tmp_path / name, **OPTIONS)
  assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_budgets_are_times():
  read = [fitting.parse_budget(text) for text in ("90", "90s", "30m", "1.5h", "1h30m")]
  assert read == [90, 90, 1800, 5400, 5400]
  for text in ("", "soon", "-3m", "5 apples"):
    with pytest.raises(ValueError, match="`budget`"):
      fitting.parse_budget(text)


def test_means_have_intervals():
  found = run.mean(np.array([0.0, 1.0] * 50))
  assert found.value == 0.5 and found.count == 100
  assert found.margin == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)


def test_the_head_is_read_in_8_bits_where_that_is_faster(model, tmp_path, monkeypatch):
  said: list[str] = []
  monkeypatch.setattr(choose, "LEAST_NUMBERS", 1)
  found = choose.HeadReading(6.0, 4.0, 2)
  monkeypatch.setattr(choose, "read_head", lambda *arguments: found)
  served = fitting.fit(
    model,
    ROWS,
    output=tmp_path / "mine",
    listener=fitting.Listener(say=said.append),
    **OPTIONS,
  )
  assert served.procedure.head_dtype == "int8" and str(found) in said
  if served.calibration is not None:
    assert served.calibration.procedure.head_dtype == "int8"


@pytest.mark.parametrize(
  ("stored", "narrow", "pays"), [(6.0, 5.0, True), (6.0, 5.9, False), (5.0, 6.0, False)]
)
def test_a_head_in_8_bits_is_taken_where_it_is_clearly_faster(stored, narrow, pays):
  found = choose.HeadReading(stored, narrow, 8)
  assert found.pays == pays and f"x{stored / narrow:.2f}" in str(found)
  assert ("read in 8 bits;" in str(found)) == pays


def test_both_heads_are_timed_on_the_same_prompts_and_a_small_one_is_not(model, monkeypatch):
  opened = inference.load(model, max_input_length=16, max_decode_length=4)
  assert not choose.has_large_head(opened)
  monkeypatch.setattr(choose, "LEAST_NUMBERS", 1)
  assert choose.has_large_head(opened)
  assert not choose.has_large_head(opened.with_options(head_dtype="int8"))
  decoded = []
  real = inference.Predictor.decode

  def note(self, *arguments):
    decoded.append(self.options.head_dtype)
    return real(self, *arguments)

  monkeypatch.setattr(inference.Predictor, "decode", note)
  shares = []
  found = choose.read_head(opened, ROWS[:3], lambda share, text: shares.append(share))
  assert found.stored > 0 and found.narrow > 0 and shares[-1] == 1.0
  assert decoded.count(None) == decoded.count("int8") > found.num_prompts > 0


def test_a_tokenizer_that_the_model_does_not_know_is_said_before_any_work(
  model, monkeypatch, tmp_path
):
  monkeypatch.setattr(run.tokenizer_check, "warning", lambda predictor, rows: "Another's.")
  said = []
  listener = fitting.Listener(say=said.append)
  run.Fit.open(str(model), ROWS, tmp_path / "mine", fitting.FitOptions(**OPTIONS), listener)
  assert said[0].startswith("Rows: ") and said[2:] == ["Another's."]


def test_rows_may_be_mappings_and_other_lists_are_named():
  rows = [{"input": f"t {i}", "target": "x"} for i in range(3)]
  read = splits.read_rows(rows, fitting.FitOptions(**OPTIONS))
  assert read[1] == Prompt("prompt/2", "t 1", ("x",))
  with pytest.raises(TypeError, match="got 7 as number 1"):
    splits.read_rows([7], fitting.FitOptions(**OPTIONS))
