"""Model files that are sound but for one hostile thing. Made from the embedded model, cut down to one layer."""
from pathlib import Path


def make(folder: Path) -> list[Path]:
    return []
