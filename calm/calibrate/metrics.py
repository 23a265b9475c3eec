"""Text metrics: similarities in [0, 1] of a prediction to its references."""

import collections
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import math
import os
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import arguments
from calm.calibrate import checks

MetricFn = Callable[[str, Sequence[str]], float]
Pair = tuple[str, tuple[str, ...]]


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Metric:
  """A similarity in [0, 1]; larger is better."""

  name: str  # name in the registry, or import path 'package.module:function'
  # (prediction, references) -> similarity; the best over references
  function: MetricFn
  binary: bool = False  # whether it takes only the values 0 and 1

  def __post_init__(self):
    checks.check_lines([self.name], "metric")

  def __call__(self, prediction: str, references: Sequence[str]) -> float:
    """Similarity of `prediction` to its best reference, 1 for equal texts.

    ValueError where there is no reference, or the metric gives no number in [0,
    1].
    """
    if not references:
      raise ValueError(
        f"Expected `references` to hold one text for {self.name!r}, got none."
      )
    # Equal texts agree before any metric is asked: some give 0 to two empty
    # texts.
    if prediction in references:
      return 1.0
    try:
      given: Any = self.function(prediction, references)
    except SystemExit as error:  # the command would end as if all was well
      given = f"the end of the program ({error.code})"
    try:
      value = float(given)
    except (TypeError, ValueError, OverflowError):
      value = math.nan
    if not -1e-9 <= value <= 1.0 + 1e-9 or (
      self.binary and value not in (0.0, 1.0)
    ):
      expected = (
        "0 or 1, as it is declared binary"
        if self.binary
        else "a number in [0, 1]"
      )
      raise ValueError(
        f"Expected `metric` {self.name!r} to give {expected}, got "
        f"{given!r:.80} for"
        f" {prediction[:80]!r} against {list(references)[:2]!r}; change the "
        "function."
      )
    return min(1.0, max(0.0, value))


_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts written without spaces: every character is a word, or a whole sentence
# would be one.
_UNSPACED = (
  (0x0E00, 0x0EFF),  # Thai, Lao
  (0x1000, 0x109F),  # Burmese
  (0x1780, 0x17FF),  # Khmer
  (0x3040, 0x30FF),  # Hiragana, Katakana
  (0x3400, 0x4DBF),  # CJK
  (0x4E00, 0x9FFF),
  (0xF900, 0xFAFF),
  (0x20000, 0x323AF),
)


@functools.lru_cache(maxsize=1 << 16)
def unicode_words(text: str) -> tuple[str, ...]:
  """Lower-case words of a text in any script.

  ASCII text gives exactly rouge-score's words. Accented letters stay in their
  words, combining marks belong to the letter before them, and scripts without
  spaces are cut into characters.
  """
  text = unicodedata.normalize("NFKC", text).lower()
  if text.isascii():
    return tuple(_ASCII_WORD.findall(text))
  words: list[str] = []
  open_word = False
  for character in text:
    kind = unicodedata.category(character)[0]
    alone = any(low <= ord(character) <= high for low, high in _UNSPACED)
    if kind in "LN" and (alone or not open_word):
      words.append(character)
    elif words and (kind in "LN" or kind == "M"):
      words[-1] += character
    if kind != "M":
      open_word = kind in "LN" and not alone
  return tuple(words)


def _longest_common_subsequence(
  first: Sequence[str], second: Sequence[str]
) -> int:
  """Length of the longest common subsequence, one big-integer step a word
  (Hyyro 2004).
  """
  positions: dict[str, int] = collections.defaultdict(int)
  for index, word in enumerate(first):
    positions[word] |= 1 << index
  row = mask = (1 << len(first)) - 1
  for word in second:
    matched = row & positions.get(word, 0)
    row = ((row + matched) | (row - matched)) & mask
  return len(first) - row.bit_count()


def _f_measure(common: int, predicted: int, expected: int) -> float:
  return 2.0 * common / (predicted + expected) if common else 0.0


def rouge_l(prediction: str, references: Sequence[str]) -> float:
  """ROUGE-L F-measure over `unicode_words`, best over references, in [0, 1]
  (Lin 2004).

  2 LCS(prediction, reference) / (words of prediction + words of reference)
  """
  words = unicode_words(prediction)
  return max(
    _f_measure(
      _longest_common_subsequence(words, other), len(words), len(other)
    )
    for other in map(unicode_words, references)
  )


def rouge_l_rouge_score(prediction: str, references: Sequence[str]) -> float:
  """ROUGE-L F-measure as the rouge-score package computes it: Latin letters and
  digits only.
  """
  from rouge_score import rouge_scorer

  score = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score
  return max(score(text, prediction)["rougeL"].fmeasure for text in references)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.lru_cache(maxsize=1 << 16)
def squad_normalize(text: str) -> str:
  """SQuAD's answer normalisation: lower case, no punctuation, no articles,
  single spaces.
  """
  return " ".join(
    _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
  )


def exact_match(prediction: str, references: Sequence[str]) -> float:
  """1 if the normalised prediction equals a normalised reference, else 0
  (SQuAD).
  """
  answer = squad_normalize(prediction)
  return float(any(answer == squad_normalize(text) for text in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
  """Token F1 after SQuAD's normalisation, best over references, in [0, 1].

      2 common tokens / (tokens of prediction + tokens of reference)

  (Rajpurkar et al. 2016.)
  """
  words = collections.Counter(squad_normalize(prediction).split())
  best = 0.0
  for text in references:
    others = collections.Counter(squad_normalize(text).split())
    if not words and not others:
      return 1.0
    best = max(
      best, _f_measure((words & others).total(), words.total(), others.total())
    )
  return best


def chrf(prediction: str, references: Sequence[str]) -> float:
  """chrF2 of one sentence (sacrebleu), divided by 100, best over references, in
  [0, 1].

      (1 + 4) precision recall / (4 precision + recall)   of character 1- to
      6-grams

  (Popovic 2015.)
  """
  import sacrebleu

  return (
    sacrebleu.CHRF().sentence_score(prediction, list(references)).score / 100.0
  )


def corpus_scores(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """{'bleu', 'chrf'}: of the corpus (sacrebleu, 0 to 100), which no mean over
  prompts is.

  Texts are [num_examples], `references` those accepted of each, at least one.
  """
  import sacrebleu

  # sacrebleu wants one stream a reference number, with None where an example
  # has fewer.
  streams: Any = list(itertools.zip_longest(*references))
  return {
    "bleu": sacrebleu.corpus_bleu(list(predictions), streams).score,
    "chrf": sacrebleu.corpus_chrf(list(predictions), streams).score,
  }


METRICS: Mapping[str, Metric] = {
  function.__name__: Metric(
    function.__name__, function, binary=function is exact_match
  )
  for function in (rouge_l, rouge_l_rouge_score, token_f1, exact_match, chrf)
}

# What names a metric: a name or import path, a function, or the metric itself.
MetricLike = str | Metric | MetricFn


def _module(name: str) -> Any:
  """A module by its import name, or loaded from the path of its file.

  No folder is searched for what a file, or anything else, imports.
  """
  if not name.endswith(".py"):
    return importlib.import_module(name)
  path = os.path.abspath(name)
  known = f"calm_metric_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
  if known not in sys.modules:
    spec: Any = importlib.util.spec_from_file_location(known, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[known] = module
  return sys.modules[known]


@arguments.checked()
def get_metric(name: MetricLike) -> Metric:
  """A metric by registry name or import path, or of a function.

  A name is one of `METRICS`, 'folder/file.py:function' or
  'package.module:function' of what is installed. Both are imported (trust them
  as any program), with `function(prediction, references) -> [0, 1]`. A function
  with a true attribute `binary` declares values 0 and 1 only. ValueError where
  the name is unknown or cannot be imported.
  """
  function: Any = name
  path = name if isinstance(name, str) else ""
  if isinstance(name, str):
    if name in METRICS:
      return METRICS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
      raise ValueError(
        f"Expected `metric` to be one of {sorted(METRICS)} or an import path"
        f" 'package.module:function', got {name!r}."
      )
    try:
      function = getattr(_module(module), attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
      text = (
        f"Expected `metric` {name!r} to be a function that can be imported, "
        f"got: {error}."
      )
      raise ValueError(text) from error
  if isinstance(function, Metric):
    return function
  for metric in METRICS.values():
    if metric.function is function:
      return metric
  if not path:  # its import path, where that leads to it
    path = getattr(function, "__qualname__", type(function).__name__)
    module = str(getattr(function, "__module__", None))
    if getattr(sys.modules.get(module), path, None) is function:
      path = f"{module}:{path}"
  return Metric(path, function, binary=bool(getattr(function, "binary", False)))


def compute(metric: Metric, pairs: Sequence[Pair]) -> np.ndarray:
  """[num_pairs] similarity in [0, 1] of (prediction, references), equal pairs
  once.
  """
  found = {pair: metric(*pair) for pair in dict.fromkeys(pairs)}
  return np.array([found[pair] for pair in pairs], np.float64)
