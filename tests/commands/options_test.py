"""Values that no option means, for every option of every command that takes a
value.

The options are read off the commands' own parsers: one that is new is asked
about too. What comes back is a refusal that names the option or the value, or
the table calls the value fair.
"""

import collections

import pytest

pytest.importorskip(
  "matplotlib", reason="matplotlib (the `report` extra) is not installed"
)

from calm.commands import cli
from tests.commands import asked

ESCAPE = "\x1b[2J"
LONG = "x" * 5000
STREAM = "/proc/self/mem"
VALUES = {
  "number": ("x", "", "-1", "0", "nan", "1e400", "1.5.5", "10" * 20, ESCAPE),
  "name": ("x", "", "a.b:c", ESCAPE, LONG),
  "place": (
    *("", "nowhere/at/all", LONG, f"nowhere{ESCAPE}", "/dev/null", STREAM),
    *("/proc/nothing/there", "{folder}", "{garbage}", "{rows}/below"),
  ),
}
PLACES = ("FILE", "FOLDER", "DIR", "PLACE")
NUMBERS = ("N", "K", "COUNT", "X", "TAU", "RATE", "STEP", "SHARE", "LEVEL")
# Any text will do, and folders to search in that are not there are passed over.
TEXTS = ("TEXT", "DIRS")


def _any(value):
  return True


def _of(*values):
  return lambda value: value in values


def _new(value):
  return value.startswith("nowhere") or value == "{folder}"


_much = "10" * 20
_odd = f"nowhere{ESCAPE}"
# Options, of one command or of all -> what they may well mean.
FAIR = {
  "--limit --ablated --timed --rounds --queue --timeout --largest_cluster": _of(
    _much
  ),
  "--seed --shard_id --port": _of("0"),
  "--temperature --examples": _of("0", _much),
  "--start": _of("-1", "0"),
  "--references": _of("/dev/null"),
  "--gin_bindings": _of(""),
  "--online": _of(_odd),
  "--data": lambda value: value != "",
  "--output_dir demo--output fit--output generate--output report--output": _new,
  "merge--output": _any,
  # A stream says what is wrong when it is written to.
  "calibrate--output infer--output": _of(
    _odd, "/dev/null", STREAM, "{garbage}"
  ),
}


def is_fair(command, option, value):
  """Whether an option may well have a value."""
  return any(
    holds(value)
    for names, holds in FAIR.items()
    if {option, f"{command}{option}"} & set(names.split())
  )


def kind(action):
  if action.metavar in TEXTS:
    return None
  if action.type in (int, float) or action.metavar in NUMBERS:
    return "number"
  return "place" if action.metavar in PLACES else "name"


def told_of(option, value, told):
  """Whether a message says which option, or which value, is meant."""
  name = option.strip("-")
  names = (name, name.replace("_", " "), name.rstrip("s").replace("_", " "))
  plain = told.replace("\n", " ")
  shown = value.replace(ESCAPE, "\\x1b[2J")[:60]
  return any(each in plain for each in names) or (
    len(shown) > 3 and shown in plain
  )


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_no_option_takes_nonsense(command, asker, monkeypatch):
  asked.stop_at_work(monkeypatch, command)
  found = collections.Counter()
  wrong = []
  for action in asked.actions(command):
    option = (*action.option_strings, action.metavar or action.dest)[0]
    for value in VALUES.get(kind(action), ()):
      fair = is_fair(command, option, value)
      given = value.replace("{garbage}", "garbage").format(
        folder=asker.folder, rows=asker.rows
      )
      words = asker.words(command, option)
      words += [f"{option}={given}"] if action.option_strings else [given]
      status, told = asker.ask(words)
      outcome = "named" if status == 2 else "fair"
      if status not in (2, 0, "taken") or (status != 2 and not fair):
        outcome = "silent"
      elif status == 2 and not told_of(option, given, told):
        outcome = "vague"
      found[outcome] += 1
      if (
        outcome in ("silent", "vague") or "Traceback" in told or ESCAPE in told
      ):
        wrong.append(
          f"{outcome} {option}={value[:60]!r}: {status}: {told[-300:]}"
        )
  assert found["named"] >= 0.95 * (found["named"] + found["vague"]), "\n".join(
    wrong
  )
  assert not [each for each in wrong if not each.startswith("vague")], (
    "\n".join(wrong)
  )
