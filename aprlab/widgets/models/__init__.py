"""View-models: what a widget knows and does, in plain Python. Nothing here imports a widget library."""
