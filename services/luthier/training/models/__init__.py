"""Base models and tuned models."""
