"""Text metrics: ranges, words, references, errors, the metric of a user's
file.
"""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import metrics

WORDS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


def slow_longest_common_subsequence(first, second):
  table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
  for i, a in enumerate(first):
    for j, b in enumerate(second):
      table[i + 1][j + 1] = (
        table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
      )
  return table[-1][-1]


@given(WORDS, WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
  first, second
):
  a = first.split()
  b = second.split()
  common = slow_longest_common_subsequence(a, b)
  assert metrics._longest_common_subsequence(a, b) == common
  expected = 2 * common / (len(a) + len(b)) if common else 0.0
  assert metrics.rouge_l(first, [second]) == pytest.approx(expected, abs=1e-15)


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60), WORDS)
def test_rouge_l_equals_rouge_score_on_ascii(first, second):
  for a, b in ((first, second), (second, first)):
    ours = metrics.rouge_l(a, [b])
    theirs = metrics.rouge_l_rouge_score(a, [b])
    assert ours == pytest.approx(theirs, abs=1e-12)


@given(
  st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3)
)
def test_every_metric_stays_in_its_declared_range_and_equal_texts_agree(
  text, references
):
  for name in ("rouge_l", "token_f1", "exact_match", "chrf"):
    metric = metrics.METRICS[name]
    value = metric(text, references)
    assert 0.0 <= value <= 1.0
    assert not metric.binary or value in (0.0, 1.0)
    assert metric(text, [*references, text]) == 1.0
    assert metric(text, references[::-1]) == pytest.approx(value, abs=1e-12)
    assert value == pytest.approx(
      max(metric(text, [other]) for other in references), abs=1e-12
    )


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (
      "Full-Featured, snake_case 3!",
      ("full", "featured", "snake", "case", "3"),
    ),
    ("Éléphant e\u0301te\u0301", ("éléphant", "été")),
    ("हिन्दी भाषा", ("हिन्दी", "भाषा")),
    ("漢字 ab", ("漢", "字", "ab")),
    ("ก่อน", ("ก่", "อ", "น")),
    ("\u0301 x", ("x",)),
  ],
)
def test_words_of_any_script(text, words):
  assert metrics.unicode_words(text) == words


def test_squad_metrics_by_hand():
  assert metrics.squad_normalize("The  Cat, sat! ") == "cat sat"
  assert metrics.exact_match("The cat.", ["dog", "a cat"]) == 1.0
  assert metrics.exact_match("cats", ["cat"]) == 0.0
  assert metrics.token_f1(
    "the cat sat", ["cat sat down", "x"]
  ) == pytest.approx(0.8)
  assert metrics.token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
  assert metrics.token_f1("the", ["an"]) == 1.0
  assert metrics.token_f1("the", ["cat"]) == 0.0


def test_import_paths_and_errors():
  path = "tests.calibrate.metrics_test:half"
  metric = metrics.get_metric(path)
  assert metric.name == path and not metric.binary and metric("a", ["b"]) == 0.5
  assert metrics.get_metric("tests.calibrate.metrics_test:same_length").binary
  assert metrics.get_metric("tests.calibrate.metrics_test:HALF") is HALF
  assert (
    metrics.get_metric(HALF) is HALF and metrics.get_metric(half).name == path
  )
  assert metrics.get_metric(metrics.rouge_l) is metrics.METRICS["rouge_l"]
  assert metrics.get_metric(lambda text, references: 0.0).name.endswith(
    "<lambda>"
  )
  assert metrics.compute(HALF, [("a", ("a",)), ("b", ("a",))]).tolist() == [
    1.0,
    0.5,
  ]
  for name, message in (
    ("rouge", "to be one of .* or an import path 'package.module:function'"),
    ("no_such_module:f", "that can be imported, got: "),
  ):
    with pytest.raises(ValueError, match=message):
      metrics.get_metric(name)


def half(prediction, references):
  del prediction, references
  return 0.5


def same_length(prediction, references):
  return float(len(prediction) == len(references[0]))


same_length.binary = True

HALF = metrics.Metric("half", half)


def test_a_file_is_a_module(tmp_path, monkeypatch):
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "measure.py").write_text(
    "from calm.calibrate import metrics\n"
    "calls = []\n"
    "def same(prediction, references): return float(prediction in references)\n"
    "same.binary = True\n"
  )
  monkeypatch.chdir(tmp_path)
  before = list(sys.path)
  found = [
    metrics.get_metric(f"{way}/measure.py:same") for way in ("own", "./own")
  ]
  for metric in found:
    assert (
      metric.binary
      and metric("a", ("a", "b")) == 1.0
      and metric("c", ("a",)) == 0.0
    )
  assert found[0].function is found[1].function  # loaded once
  assert sys.path == before and "own" not in sys.modules
  for name in ("own/nothing.py:same", "own/measure.py:other"):
    with pytest.raises(
      ValueError, match="a function that can be imported, got"
    ):
      metrics.get_metric(name)


@pytest.mark.parametrize("made", [1.5, float("nan"), "x", 10**400, "exit"])
def test_what_is_no_number_in_range_is_refused_by_the_metrics_name(made):
  def function(prediction, references):
    if made == "exit":
      raise SystemExit(0)  # the command would end as if all was well
    return made

  with pytest.raises(
    ValueError, match=r"`metric` 'odd' to give a number in \[0, 1\], got"
  ):
    metrics.Metric("odd", function)("a", ["b"])
  with pytest.raises(
    ValueError, match=r"to give 0 or 1, as it is declared binary, got 0.5"
  ):
    metrics.Metric("bad", half, binary=True)("a", ["b"])
  with pytest.raises(ValueError, match="`references` to hold one text"):
    HALF("a", [])


def test_corpus_scores_take_the_best_of_any_number_of_references():
  texts = ["a b c d e", "f g h i j"]
  scores = metrics.corpus_scores(texts, [["x", texts[0]], [texts[1]]])
  assert scores == pytest.approx({"bleu": 100.0, "chrf": 100.0})
