"""Aliases of models: names for roles, which move from model to model through gates."""
