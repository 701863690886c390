"""aprlab: one model, two files, several engines. Where do they part, why, and what is the proof?"""

__version__ = "0.1.0"
