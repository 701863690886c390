"""Architectures: what each reads of a config, which tensors it has, and its one straight forward pass."""
