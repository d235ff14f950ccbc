"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# Machines that run the tests are shared: a slow example is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
