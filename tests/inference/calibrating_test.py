"""A grid decoded and certified in one call: `Predictor.calibrate`."""

import contextlib

import pytest

from calm import inference
from calm.calibrate import Prompt, generations, ledger, seconds
from calm.inference import certified, predictor
from tests.inference import predictor_test

# A toy's seconds are noise.
pytestmark = pytest.mark.filterwarnings("ignore::calm.inference.SlowerThanFullDepth")
TEXTS = [f"{word} {i}" for i in range(20) for word in ("a", "the words")]
RATES = {"tolerance": 0.9, "thresholds": [0.9, 0.5]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(directory, **{**predictor_test.OPTIONS, "max_input_length": 32})


def test_a_model_calibrates_itself_on_texts(model):
  served = model.calibrate(TEXTS, **RATES)
  calibration = served.calibration
  assert calibration.procedure == model.procedure and calibration.certified
  measured = seconds.of(calibration)
  assert measured.single.num_prompts == 8 and measured.single.full > 0
  assert calibration.num_examples == len(TEXTS) and calibration.tolerance == 0.9
  assert [row.threshold for row in calibration.rows] == [0.9, 0.5]
  outputs = served.generate(TEXTS[:4])
  assert outputs.threshold == calibration.threshold
  assert outputs.guarantee == calibration.guarantee


def test_the_grid_of_the_model_is_taken_and_generations_are_kept(model, tmp_path):
  with_grid = model.with_options(grid=(0.8, 0.7))
  prompts = [Prompt(str(i), text, (text,)) for i, text in enumerate(TEXTS)]
  folder = tmp_path / "cache"
  options = {"tolerance": 0.9, "consistency": "risk", "metric": "token_f1", "folder": folder}
  calibration, cached = certified.certify(with_grid, prompts, **options)
  assert [row.threshold for row in calibration.rows] == [0.8, 0.7]
  assert calibration.kind == "risk_signed" and calibration.metric == "token_f1"
  assert generations.load(folder).records == cached.records


def test_a_folder_has_a_ledger_that_warns_of_a_second_question(model, tmp_path):
  folder = tmp_path / "runs" / "cache"
  for _ in range(2):
    model.calibrate(TEXTS, **RATES, folder=folder)
  with pytest.warns(UserWarning, match="textual, rouge_l.* within 0.9 at 0.05 on 40 rows"):
    model.calibrate(TEXTS, **RATES, folder=folder, metric="chrf")
  assert len((folder / ledger.LEDGER).read_text().splitlines()) == 2


def test_what_cannot_be_certified_is_refused_before_any_decoding(model, monkeypatch):
  monkeypatch.setattr(inference.Predictor, "encode", None)
  with pytest.raises(ValueError, match="Expected at least 22 prompts"):
    model.calibrate(TEXTS[:5], tolerance=0.1)
  with pytest.raises(ValueError, match=r"at least 22 clusters of prompts .*got 20"):
    model.calibrate([text + " " * i for text in TEXTS[:20] for i in range(5)], tolerance=0.1)
  with pytest.raises(ValueError, match=r"references .*40 without"):
    model.calibrate(TEXTS, tolerance=0.9, consistency="risk")
  with pytest.raises(ValueError, match="`consistency` to be one of"):
    model.calibrate(TEXTS, tolerance=0.9, consistency="textul")
  with pytest.raises(TypeError, match="put it in a list"):
    model.calibrate("one text", tolerance=0.9)


def test_who_looks_on_sees_all_of_it_and_who_asks_is_told(model, monkeypatch):
  seen = []

  @contextlib.contextmanager
  def looking_on():
    yield lambda share, text: seen.append((share, text))

  monkeypatch.setattr(predictor, "Progress", looking_on)
  model.calibrate(TEXTS, **RATES)
  shares = [share for share, _ in seen]
  assert shares == sorted(shares) and shares[0] > 0.0 and shares[-1] == pytest.approx(1.0)
  assert any("batch 2 of 10, threshold 0.9" in text for _, text in seen)
  assert any(text.startswith("timing ") for _, text in seen)
  told, before = [], len(seen)
  model.calibrate(TEXTS, **RATES, progress=lambda *where: told.append(where))
  assert len(seen) == before and [share for share, _ in told] == shares
