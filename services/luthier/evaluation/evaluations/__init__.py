"""Evaluations: arms on the same records, paired."""
