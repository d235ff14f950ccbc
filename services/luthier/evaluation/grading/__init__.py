"""Graders tried on given answers."""
