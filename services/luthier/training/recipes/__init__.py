"""One readable training loop per method."""
