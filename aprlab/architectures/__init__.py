"""Architectures: what each reads of a config, which tensors it has, and its one straight forward pass."""

from aprlab.architectures.qwen2 import Tap, check, forward, points

__all__ = ["Tap", "check", "forward", "points"]
