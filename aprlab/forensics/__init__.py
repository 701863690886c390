"""Forensics: which fault, or set of faults, makes a healthy model say a given garbage sentence."""
