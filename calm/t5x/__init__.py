"""The adapter to T5X: `from calm.t5x import models` where a gin file imports T5X's own.

Only `calm.t5x.models` imports t5x.
"""
