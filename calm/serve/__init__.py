"""`calm serve`: a model behind HTTP, with its promise in every answer."""

from calm.serve.app import LOOPBACK, Api
from calm.serve.device import Device

__all__ = ["LOOPBACK", "Api", "Device"]
