"""The containers: each module reads and writes one, and refuses what breaks its rules, with offset and name."""
