"""Forensics: which fault, or set of faults, makes a healthy model say the garbage that somebody saw."""
