"""The Evaluation service: evaluations and text generation."""
