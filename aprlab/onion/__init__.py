"""The onion: historical faults by name, and the search that takes a broken model apart layer by layer."""
