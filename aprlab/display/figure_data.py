"""What the data of a figure are called in an output of a cell: known to who draws it, and to who only makes pages."""

FIGURE_DATA = "application/vnd.aprlab.figure+json"

__all__ = ["FIGURE_DATA"]
