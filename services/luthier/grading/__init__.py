"""Answers to scores: metrics of evaluations and graders. No torch; used by training and evaluation."""
