"""Text of others does nothing on a screen."""

import pytest

from calm.console import sanitize


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
    ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
    ("\r\x08\x9b2J", r"\r\x08\x9b2J"),
    ("a\nb\tc é 漢 [/b] <script>", "a\nb\tc é 漢 [/b] <script>"),
    ("می\u200cخواهم", "می\u200cخواهم"),
  ],
)
def test_marks_that_do_something_are_shown(text, shown):
  assert sanitize(text) == shown
