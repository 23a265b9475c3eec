"""Malformed and forged input, generated: every field of every file that is read, exchanged.

A table of documents, each with the function that reads it; a generator of exchanges. What comes
back is an error that says what was expected where, or a value that the table calls fair; never
a traceback of another kind, never a wait, never a silent acceptance.
"""

import collections
import copy
import json
import resource
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import hostile_documents as documents
from tests import hostile_runs as runs
from tests.spent import Spent

# No module has this name; to look for it is a fault.
PLANTED = "planted_module"
VALUES = (
  *(None, True, -1, 0, 1.5, 10**9, 10**30, "x", "", [], {}, [[1]], {"a": 1}, "\x1b[2J"),
  f"{PLANTED}:run",
)
SECONDS, BYTES = 10.0, 2**30
_DEEP, _HUGE, _NAN = "@deep@", "@huge@", "@nan@"
_RAW = {f'"{_DEEP}"': "[" * 20_000, f'"{_HUGE}"': "1e400", f'"{_NAN}"': "NaN"}


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
  """Every place of a document, the first two of a list."""
  items = value.items() if isinstance(value, dict) else ()
  for key, child in items if isinstance(value, dict) else list(enumerate(value))[:2]:
    yield (*prefix, key)
    if isinstance(child, dict | list):
      yield from paths(child, (*prefix, key))


def exchanged(document: Any) -> Iterator[tuple[str, Any, str]]:
  """(the field, or what was done; its new value; the text of the document after it)."""
  for path in paths(document):
    for value in (*VALUES, _DEEP, _HUGE, _NAN, documents.GONE):
      changed = copy.deepcopy(document)
      holder = changed
      for key in path[:-1]:
        holder = holder[key]
      if holder[path[-1]] == value and type(holder[path[-1]]) is type(value):
        continue
      if value == documents.GONE:
        del holder[path[-1]]
      else:
        holder[path[-1]] = value
      text = json.dumps(changed)
      for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
      yield ".".join(map(str, path)), value, text
  text = json.dumps(document)
  for what, raw in (
    ("empty", ""),
    ("null", "null"),
    ("list", "[]"),
    ("halved", text[: len(text) // 2]),
    ("twice", text + text),
    ("deep", "[" * 50_000),
    ("bytes", text.replace('"', "\udcff", 1)),
  ):
    yield what, None, raw


def named(error: Exception) -> bool:
  """Whether an error says what was expected of what, and what there was."""
  text = str(error)
  names = any(mark in text for mark in ("`", "'", "/"))
  return names and "xpected " in text and ", got" in text


# Errors of use; anything else is a traceback to the user.
TOLD = (ValueError, OSError)


class Tally(collections.Counter):
  """Outcomes by kind, and what was wrong."""

  def __init__(self):
    super().__init__()
    self.wrong: list[str] = []

  def take(self, what: str, read: Callable[[], Any], fair: bool | Callable[[Any], bool]):
    """Reads; `fair`: whether something may be read, or whether what was read may be."""
    spent = Spent()
    try:
      found = read()
      fair = fair(found) if callable(fair) else fair
      kind = "accepted" if fair else "silent"
      if not fair:
        self.wrong.append(f"{what}: accepted")
    except TOLD as error:
      kind = "named" if named(error) else "vague"
      if kind == "vague":
        self.wrong.append(f"{what}: vague: {error!r}")
    except Exception as error:
      kind = "traceback"
      self.wrong.append(f"{what}: traceback: {error!r:.200}")
    if spent.seconds > SECONDS:
      self.wrong.append(f"{what}: took {spent.seconds:.0f} s")
      self["slow"] += 1
    self[kind] += 1


NAMES = (
  *documents.FAIR,
  *runs.FAIR,
)


def fair(name: str, field: str, value: Any) -> bool:
  """Whether a reader may take `value` in `field` of the document `name`."""
  allowed = {**documents.FAIR, **runs.FAIR}[name]
  return any(holds(value) for fields, holds in allowed.items() if field in fields.split())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  made = documents.documents(tmp_path_factory.mktemp("hostile"))
  return made | runs.documents(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def looked_for(monkeypatch):
  """Modules that were looked for."""
  found: list[str] = []
  finder = types.SimpleNamespace(find_spec=lambda name, *place: found.append(name))
  monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
  return found


@pytest.mark.parametrize("name", NAMES)
def test_exchanged_fields_are_refused_by_name(table, name, looked_for):
  path, read = table[name]
  good = path.read_bytes()
  read()  # what is not exchanged is read
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tally = Tally()
  try:
    for field, value, text in exchanged(json.loads(good)):
      path.write_bytes(text.encode("utf-8", "surrogateescape"))
      tally.take(f"{name}: {field} = {value!r}", read, fair(name, field, value))
  finally:
    path.write_bytes(good)
  refused = tally["named"] + tally["vague"] + tally["traceback"]
  wrong = tally["traceback"], tally["slow"], tally["silent"]
  assert wrong == (0, 0, 0), "\n".join(tally.wrong[:20])
  assert PLANTED not in looked_for, "a name of a file was imported"
  # What an earlier run left unfinished is begun anew, whatever it is.
  assert refused or name == "unfinished outputs"
  assert tally["named"] >= 0.95 * refused, "\n".join(tally.wrong[:20])
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_the_check_of_messages_can_fail():
  assert not named(ValueError("bad")) and not named(KeyError("vocab_size"))
  assert named(ValueError("Expected `vocab_size` to be a whole number, got 'x'."))
  tally = Tally()
  tally.take("a", lambda: {}["b"], True)
  tally.take("b", lambda: int("x"), True)
  tally.take("c", lambda: 1, True)
  tally.take("d", lambda: 1, False)
  kinds = {"traceback": 1, "vague": 1, "accepted": 1, "silent": 1}
  assert dict(tally) == kinds and len(tally.wrong) == 3
