"""Scores of predictions and the statistics over them."""
