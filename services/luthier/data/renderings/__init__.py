"""Renderings: the exact tokens and loss masks that a job trains on."""
