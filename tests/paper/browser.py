"""Debian's Chromium without a window, over its debugging pipe: no driver and no package needed.

with browser.open_page(path) as page:
  page.evaluate("document.title")
"""

import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

FLAGS = (
  *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
  *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
  *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
# The browser reads from descriptor 3 and writes to 4. Copies far above come first, so that
# neither end is overwritten before it is in its place.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
  os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 60.0  # seconds; a busy machine starts a browser slowly


def executable() -> str | None:
  """Chromium's path, or None."""
  return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Page:
  """One tab; its commands are those of the Chrome DevTools Protocol."""

  def __init__(self, write: int, read: int):
    self._write, self._read = write, read
    self._buffer = b""
    self._last = 0
    self._session: str | None = None
    self.events: list[dict[str, Any]] = []

  def attach(self, url: str) -> None:
    """Opens the page and waits until it has loaded."""
    target = self.command("Target.createTarget", url="about:blank")["targetId"]
    attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.command(f"{domain}.enable")
    self.command("Page.navigate", url=url)
    deadline = time.monotonic() + _PATIENCE
    while not any(event["method"] == "Page.loadEventFired" for event in self.events):
      self._receive(deadline)

  def command(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Sends a command and returns its result."""
    self._last += 1
    message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    deadline = time.monotonic() + _PATIENCE
    while True:
      answer = self._receive(deadline)
      if answer.get("id") == self._last:
        assert "error" not in answer, (method, answer)
        return answer["result"]

  def _receive(self, deadline: float) -> dict[str, Any]:
    while b"\0" not in self._buffer:
      left = deadline - time.monotonic()
      if left <= 0 or not select.select([self._read], [], [], left)[0]:
        raise TimeoutError(f"the browser said nothing for {_PATIENCE:g} s")
      chunk = os.read(self._read, 1 << 16)
      assert chunk, "the browser closed its pipe"
      self._buffer += chunk
    raw, _, self._buffer = self._buffer.partition(b"\0")
    message = json.loads(raw)
    if "method" in message:
      self.events.append(message)
    return message

  def evaluate(self, expression: str) -> Any:
    """The JSON value of an expression of JavaScript."""
    answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def press(self, key: str) -> None:
    """Presses a key, as a person does: to whatever has the focus."""
    codes = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, " ": 32}
    for kind in ("rawKeyDown", "keyUp"):
      self.command(
        "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key]
      )

  def size(self, width: int, height: int) -> None:
    """Sets the size of the window in CSS pixels."""
    self.command(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def media(self, *, dark: bool = False, medium: str = "screen") -> None:
    """Sets the preferred colours and the medium."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.command("Emulation.setEmulatedMedia", media=medium, features=[scheme])

  def complaints(self) -> list[str]:
    """Errors and warnings of the console so far, and uncaught exceptions."""
    self.evaluate("0")  # what was on its way has now arrived
    found = []
    for event in self.events:
      details = event["params"]
      if event["method"] == "Runtime.exceptionThrown":
        found.append(str(details["exceptionDetails"].get("exception", details)))
      elif event["method"] == "Runtime.consoleAPICalled":
        if details["type"] in ("error", "warning", "assert"):
          found.append(str(details["args"]))
      elif event["method"] == "Log.entryAdded":
        entry = details["entry"]
        found += [entry["text"]] if entry["level"] in ("error", "warning") else []
    return found

  def requests(self) -> list[str]:
    """Addresses that were asked for, data ones left out."""
    urls = [
      event["params"]["request"]["url"]
      for event in self.events
      if event["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


@contextlib.contextmanager
def open_page(path: pathlib.Path) -> Iterator[Page]:
  """A loaded page in a browser of its own."""
  browser = executable()
  assert browser is not None
  to_browser, from_us = os.pipe()
  to_us, from_browser = os.pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    command = [browser, *FLAGS, f"--user-data-dir={profile}"]
    ends = [str(to_browser), str(from_browser)]
    process = subprocess.Popen(
      [sys.executable, "-c", _START, *ends, *command],
      pass_fds=(to_browser, from_browser),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
      page = Page(from_us, to_us)
      page.attach(path.resolve().as_uri())
      yield page
    finally:
      process.terminate()
      process.wait(timeout=30)
      os.close(from_us)
      os.close(to_us)
