"""Text of others on a screen: nothing in it moves the cursor, colours or turns what follows."""

import unicodedata

# Other (control, format, surrogate, private, unassigned) and separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # letters of Persian, Hindi and others need them


def visible(text: object) -> str:
  """A text as one can look at it safely: control and direction marks as their escapes.

  Ends of lines and tabs stay. `\\x1b[31m` is shown as it is written here, and does nothing.
  """
  return "".join(
    c.encode("unicode_escape").decode()
    if unicodedata.category(c) in _HIDDEN and c not in "\n\t" + _JOINERS
    else c
    for c in str(text)
  )
