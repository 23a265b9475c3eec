"""A fit from rows to a folder that serves itself, on a toy of bytes; and what
is refused.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip(
  "jinja2", reason="jinja2 (the `report` extra) is not installed"
)
pytest.importorskip(
  "orbax.checkpoint", reason="Orbax (the `train` extra) is not installed"
)

from calm import checkpoints, exits, fitting, inference
from calm.calibrate import Calibration, calibrate, generations
from calm.data import vocabulary
from calm.fitting import choose, request, run, train
from calm.inference import timing
from tests import toy_vocabulary
from tests.fitting import conftest

pytestmark = pytest.mark.usefixtures("promotion", "few_rounds")
WORDS = conftest.WORDS
OPTIONS = {**conftest.OPTIONS, "stages": "none"}
LIMITS = ("task_prefix", "max_input_length", "max_decode_length")


@pytest.fixture(scope="module")
def made(directory, rows, always_faster, tmp_path_factory):
  """(folder, served model, what was said) of a fit with the exits that the toy
  has.
  """
  output = tmp_path_factory.mktemp("fit") / "mine"
  said = conftest.Said()
  served = fitting.fit(
    directory, rows[:45], output=output, console=said.console, **OPTIONS
  )
  return output, served, said.lines


def limits_of(model):
  return {name: getattr(model.options, name) for name in LIMITS}


def full_tokens(model, texts=WORDS):
  return [
    output.tokens for output in model.generate(texts, rule=exits.StaticExit())
  ]


def test_the_folder_serves_itself_under_its_promise(made, directory):
  output, served, said = made
  opened = inference.load(output)
  calibration = Calibration.load(output / "calibration.json")
  assert opened.calibration == calibration == served.calibration
  assert calibration.procedure == opened.procedure and calibration.certified
  assert opened.options.grid == tuple(row.threshold for row in calibration.rows)
  assert opened.parameters_digest == inference.load(directory).parameters_digest
  outputs = opened.generate(["a few words"])
  assert outputs.threshold == calibration.threshold
  assert outputs.guarantee == calibration.guarantee
  assert calibration.provenance.notes["seconds"]["single"]["speedup"] == 1.5
  assert any("(chosen)" in line for line in said) and "Rows: train 0" in said[0]
  assert (
    said[1]
    == said[-1]
    == "The promise is about prompts drawn as these rows are."
  )


def test_an_opened_model_fits_its_folder_and_no_other_parameters(
  made, directory, rows, monkeypatch, tmp_path
):
  output, served, _ = made
  model = inference.load(directory).with_options(measure="state")
  monkeypatch.setattr(run, "make", None)  # the same request: all of it is done
  again = model.fit(rows[:45], output=output, **OPTIONS)
  assert again.calibration == served.calibration and again.folder == output
  others = (
    dataclasses.replace(model, params={**model.params}),
    inference.load("packed"),
  )
  with pytest.raises(
    ValueError, match=r"`calm.load` opened.*another origin; save it"
  ):
    others[0].fit(rows[:45], output=tmp_path / "none", **OPTIONS)
  with pytest.raises(ValueError, match="the model"):
    others[1].fit(rows[:45], output=output, **OPTIONS)


def test_the_summary_says_what_was_found(made):
  output, served, _ = made
  page = (output / "summary.html").read_text("utf-8")
  for words in (
    "Decodes x1.50 as fast as full depth",
    f"calm infer --model={output}",
    "With probability at least 0.95",
    "The promise is about prompts drawn as these rows are.",
    "a first timing",
    "What was certified",
    'title="layer 1"',
    '<input class="promised" type="range"',
  ):
    assert words in page
  assert "http" not in page
  result = json.loads((output / "fit" / "result.json").read_text("utf-8"))
  # The slider has texts of the last part at every threshold, and starts at what
  # is promised.
  shown = result["panel"]
  grid = served.options.grid
  assert shown["thresholds"][1:] == list(grid) and len(shown["items"]) == 6
  assert {len(item["levels"]) for item in shown["items"]} == {1 + len(grid)}
  tolerance, at = shown["promised"][shown["first"]]
  assert tolerance == 0.5 and shown["thresholds"][at] == served.threshold
  assert (
    result["last"]["risk"]["count"] == 11
    and result["threshold"] == served.threshold
  )


def test_a_stopped_fit_goes_on_and_another_request_is_refused(
  made, directory, rows, monkeypatch
):
  output, served, _ = made
  with pytest.raises(ValueError, match=r"`tolerance` \(0\.5 there, 0\.6 now\)"):
    fitting.fit(
      directory, rows[:45], output=output, **{**OPTIONS, "tolerance": 0.6}
    )
  with pytest.raises(ValueError, match="the rows"):
    fitting.fit(directory, rows[:44], output=output, **OPTIONS)
  asked = output / "fit" / "request.json"
  text = asked.read_text()
  # is compared, and not imported
  asked.write_text(text.replace('"chrf"', '"/x.py:run"'))
  with pytest.raises(ValueError, match=r"`metric` \('/x.py:run' there"):
    fitting.fit(directory, rows[:45], output=output, **OPTIONS)
  asked.write_text(text)
  monkeypatch.setattr(run, "make", None)  # what is done is not done again
  again = fitting.fit(directory, rows[:45], output=output, **OPTIONS)
  assert again.calibration == served.calibration


@pytest.mark.parametrize(
  "way", ["after layer", "full depth, drafts off the prompt"]
)
def test_8_bits_are_a_candidate_against_the_texts_of_the_given_model(
  way, directory, rows, always_faster, monkeypatch, tmp_path
):
  monkeypatch.setattr(choose, "LEAST_LAYERS", 1)
  timed = choose.timed

  def faster_in_8_bits(*arguments):
    found, full = timed(*arguments)

    def wanted(e):
      return e.candidate.in_8_bits == "layers" and way in str(e.candidate)

    def speed(e):
      return 2.0 if wanted(e) else 1.5

    return [
      dataclasses.replace(e, speedup=2.0, end_to_end=speed(e)) for e in found
    ], full

  monkeypatch.setattr(choose, "timed", faster_in_8_bits)
  output = tmp_path / "mine"
  said = conftest.Said()
  options = {**OPTIONS, "tolerance": 0.7}
  served = fitting.fit(
    directory, rows[:45], output=output, console=said.console, **options
  )
  assert (
    served.calibration is not None
    and served.calibration.procedure == served.procedure
  )
  procedure = served.calibration.procedure
  dtypes = procedure.weights_dtype, procedure.encoder_dtype
  assert dtypes == ("int8, states whole", "int8")
  assert (
    procedure.reference_dtype == "float32"
    and "float32" in served.calibration.guarantee
  )
  (chosen,) = (line for line in said.lines if "(chosen)" in line)
  assert way in chosen and ", matrices in 8 bits" in chosen
  assert any(", encoder in 8 bits: x" in line for line in said.lines)
  made = served.generate(WORDS)
  assert all(bool(each.passes) == ("drafts" in way) for each in made)
  if way != "after layer":
    assert procedure.exit_layers == () and served.calibration.threshold == 1.0
    assert made.texts == served.generate(WORDS, rule=exits.StaticExit()).texts
  # What it is held against is what the given model writes, token by token.
  given = inference.load(directory, **limits_of(served))
  written = [
    output.tokens for output in served.generate(WORDS, threshold="never")
  ]
  assert written == full_tokens(given)


def test_the_cut_decoder_is_served_under_its_promise_where_it_is_faster(
  directory, rows, always_faster, monkeypatch, tmp_path
):
  timed = choose.timed

  def faster_cut(*arguments):
    found, full = timed(*arguments)
    return [
      dataclasses.replace(e, end_to_end=3.0 if e.cut else 1.5) for e in found
    ], full

  monkeypatch.setattr(choose, "timed", faster_cut)
  output = tmp_path / "mine"
  options = {**OPTIONS, "tolerance": 0.99}
  served = fitting.fit(directory, rows[:45], output=output, **options)
  assert served.options.grid == (0.0,) == (served.calibration.threshold,)
  (layer,) = served.options.exit_layers
  cut = served.generate(WORDS, rule=exits.StaticExit(layer))
  assert served.generate(WORDS).texts == cut.texts
  page = (output / "summary.html").read_text("utf-8")
  assert (
    f"Cut after layer {layer}: x1.50 under the same promise; exits: x1.50."
    in page
  )


@pytest.fixture(scope="module")
def trained(directory, rows, always_faster, tmp_path_factory):
  """A fit that trains all weights: (given folder, output, the call, served,
  what was said).
  """
  given = shutil.copytree(directory, tmp_path_factory.mktemp("given") / "toy")
  # rows have 32
  (given / "inference.json").write_text(json.dumps({"max_input_length": 24}))
  output = tmp_path_factory.mktemp("trained") / "mine"
  said = conftest.Said()
  real = train.recipe

  def few(*asked):
    return (
      4,
      0.0,
      dataclasses.replace(real(*asked)[2], num_steps=2),
    )

  options = {
    **conftest.OPTIONS,
    "train_all": True,
    "tolerance": 0.9,
    "budget": 600.0,
  }

  def fit():
    return fitting.fit(
      given, rows, output=output, console=said.console, **options
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "recipe", few)
    yield given, output, fit, fit(), said


def test_stages_train_what_they_should(trained):
  given, output, _, _, said = trained
  steps = [line for line in said.lines if line.startswith("Stage ")]
  assert [line.split(":")[0] for line in steps] == [
    "Stage one",
    "Stage own",
    "Stage two",
  ]
  stages = (
    output / "fit" / f"stage_{name}" / "model" for name in ("one", "own", "two")
  )
  start, one, own, two = (
    checkpoints.load(folder).params["decoder"] for folder in (given, *stages)
  )

  def kernel(tree):
    return np.asarray(tree["layers_0"]["mlp"]["wo"]["kernel"])

  assert np.any(kernel(start) != kernel(one)) and np.any(
    kernel(one) != kernel(own)
  )
  for part in ("exit_classifier", "exit_probes"):
    assert np.any(two[part]["kernel"])
  two.pop("exit_probes")
  two["exit_classifier"] = own["exit_classifier"]
  jax.tree.map(np.testing.assert_array_equal, two, own)
  # Stages own and two read the texts that the model wrote after stage one, not
  # references.
  lines = (
    (output / "fit" / "own_texts" / "train.jsonl")
    .read_text("utf-8")
    .splitlines()
  )
  written = [json.loads(line) for line in lines]
  after = inference.load(output / "fit" / "stage_one" / "model", batch_size=4)
  texts = after.generate(
    [row["input"] for row in written], rule=exits.StaticExit()
  ).texts
  assert [row["target"] for row in written] == [[text] for text in texts]


def test_trained_weights_are_certified_against_the_given_models_texts(trained):
  given, output, _, served, _ = trained
  assert served.calibration == Calibration.load(output / "calibration.json")
  own = inference.load(given, **limits_of(served))
  assert served.parameters_digest != own.parameters_digest
  procedure = served.calibration.procedure
  assert (
    procedure is not None
    and procedure.reference_digest == own.parameters_digest
  )
  named = f"that was given (parameters {own.parameters_digest[:12]})"
  assert named in served.calibration.guarantee
  cached = generations.load(output / "fit" / "calibration")
  texts = own.generate(
    [prompt.input for prompt in cached.prompts], rule=exits.StaticExit()
  )
  assert [record.prediction for record in cached.full] == texts.texts
  with pytest.raises(
    ValueError, match="full-depth texts of the model that was given"
  ):
    served.with_options(grid=(0.5,)).calibrate(cached.prompts, tolerance=0.9)
  assert "The weights are trained ones" in (output / "summary.html").read_text(
    "utf-8"
  )


@pytest.mark.filterwarnings("ignore::calm.data.prompt_batches.CutPrompts")
def test_trained_weights_that_are_not_faster_leave_the_given_ones_untouched(
  trained, monkeypatch
):
  given, output, fit, _, said = trained
  (output / "fit" / "result.json").unlink()
  monkeypatch.setattr(
    train, "train_stage", lambda *args, **options: pytest.fail("again")
  )
  monkeypatch.setattr(
    inference.timing, "beside_full_depth", lambda *args, **options: SLOW
  )
  served = fit()
  assert (
    served.calibration is None and not (output / "calibration.json").exists()
  )
  before, after = (
    checkpoints.load(folder).params for folder in (given, output)
  )
  jax.tree.map(np.testing.assert_array_equal, before, after)
  own = inference.load(given)
  texts = [*WORDS, *(f"{i} is none of the rows" for i in range(9))]
  assert (
    served.generate(texts).texts
    == own.generate(texts, rule=exits.StaticExit()).texts
  )
  last = said.lines[-1]
  assert (
    last.startswith("The given model is served at full depth")
    and "x0.83" in last
  )


def test_why_full_depth_is_served_is_said(made):
  calibration = made[1].calibration
  none = choose.Choice((), None, (), 1.0, 20)
  tried = choose.Tried(
    choose.Candidate("softmax", (1,)), (0.5,), (0.1,), 0.5, 1.0, 0.9
  )
  slower = dataclasses.replace(none, tried=(tried,))
  chosen = dataclasses.replace(slower, chosen=0)
  failed = calibrate(np.ones((200, 1)), [0.9], tolerance=0.1, error_rate=0.05)
  for given, words in (
    ((none, None, None), "no measure stays within"),
    ((slower, None, None), "x0.90"),
    ((chosen, calibration, SLOW), "was not faster on the last part (x0.83"),
    ((chosen, failed, None), "nothing is certified: the first"),
  ):
    assert words in run.why_full_depth(*given)
  assert run.why_full_depth(chosen, calibration, None) == ""


SLOW = timing.Seconds(timing.Pair(1, 2, 1.0, 1.2, 0.83, 0.9), None)


def test_full_depth_with_drafts_is_served_where_exits_are_slower(
  made, directory, rows, monkeypatch, tmp_path
):
  fast = timing.Seconds(timing.Pair(1, 2, 1.2, 1.0, 1.2, 1.1), None)

  def told(*args, rule=None, **more):
    return SLOW if rule is None else fast

  monkeypatch.setattr(inference.timing, "beside_full_depth", told)
  # The last look only: what was chosen and certified is there.
  output = shutil.copytree(made[0], tmp_path / "mine")
  (output / "fit" / "result.json").unlink()
  served = fitting.fit(directory, rows[:45], output=output, **OPTIONS)
  assert served.calibration is None and served.exact == inference.exact_rule(
    served
  )
  got = served.generate(WORDS)
  given = inference.load(directory, **limits_of(served))
  assert [output.tokens for output in got] == full_tokens(given)
  assert all(output.passes for output in got)
  page = (output / "summary.html").read_text("utf-8")
  assert (
    "its own texts x1.20 as fast" in page
    and "full-depth program itself" not in page
  )
  assert "At full depth: " in page
  (output / "full_depth.json").write_text('{"exact": {"draft_layer": 1}}')
  with pytest.raises(ValueError, match=r"full_depth\.json"):
    inference.load(output)


def bare(rows):
  return [dataclasses.replace(row, targets=()) for row in rows]


REFUSED = {
  "stages": ({"stages": "both!"}, "`stages`"),
  "tolerance": ({"tolerance": 0.0}, "`tolerance`"),
  "consistency": ({"consistency": "text"}, "`consistency`"),
  "metric": ({"metric": "rogue"}, "`metric`"),
  "budget": ({"stages": "all", "train_all": True, "budget": 0.0}, "`budget`"),
  "budget of nothing": (
    {"stages": "all", "budget": 9.0},
    "`train_all` with it",
  ),
  "both": ({"train_all": True}, "got both"),
  "to calibrate": (
    {"tolerance": 0.1},
    r"at least 59 rows .*29 to calibrate on",
  ),
  "no references": (
    {"rows": bare, "consistency": "risk"},
    r"references .*45 of 45 without",
  ),
  "an id twice": ({"rows": lambda rows: [*rows, rows[0]]}, "1 ids twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_and_rows_that_cannot_do_are_named_before_any_work(
  directory, rows, tmp_path, name
):
  options, words = REFUSED[name]
  options = {**OPTIONS, **options}
  given = options.pop("rows", list)(rows[:45])
  with pytest.raises(ValueError, match=words):
    fitting.fit(directory, given, output=tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_know_the_texts_is_named_before_any_work(
  directory, rows, tmp_path
):
  rows = [dataclasses.replace(r, input="日 本 語 の 文 " + r.id) for r in rows]
  pieces = vocabulary.SentencePieceVocabulary(
    toy_vocabulary.train(tmp_path / "toy.model")
  )
  opened = inference.load(directory)
  checkpoints.save(
    tmp_path / "model", opened.params, opened.config, vocabulary=pieces
  )
  with pytest.raises(ValueError, match="unknown"):
    fitting.fit(
      tmp_path / "model", rows[:45], output=tmp_path / "out", **OPTIONS
    )
  assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(directory, rows, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  (tmp_path / "file").write_text("")
  for name in ("mine", "file"):
    with pytest.raises(ValueError, match="`output` to be a new folder"):
      fitting.fit(directory, rows[:45], output=tmp_path / name, **OPTIONS)
  assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_budgets_are_times():
  read = [
    fitting.parse_budget(text) for text in ("90", "90s", "30m", "1.5h", "1h30m")
  ]
  assert read == [90, 90, 1800, 5400, 5400]
  assert fitting.FitOptions(train_all=True, budget="30m").budget == 1800
  for text in ("", "soon", "-3m", "5 apples"):
    with pytest.raises(ValueError, match="`budget`"):
      fitting.parse_budget(text)


# ---- On a screen


def test_from_python_a_fit_tells_standard_error_and_a_console_takes_its_place(
  monkeypatch, tmp_path, capsys
):
  def work(begun):
    begun.step("Work")(0.5, "half of it")
    begun.say("Done.")

  def begin(*given):
    return request.Fit(*[None] * 4, tmp_path, *given[3:])

  monkeypatch.setattr(run, "begin", begin)
  monkeypatch.setattr(run, "make", work)
  monkeypatch.setattr(inference, "load", lambda output: None)
  fitting.fit("packed", [], output=tmp_path / "a")
  assert capsys.readouterr() == ("", "Work ...\nDone.\n")
  said = conftest.Said()
  fitting.fit("packed", [], output=tmp_path / "b", console=said.console)
  assert capsys.readouterr() == ("", "") and said.lines == ["Work ...", "Done."]
