"""The adapter to T5X: `from calm.t5x import models` for T5X's own `models`.

Only `calm.t5x.models` imports t5x.
"""
