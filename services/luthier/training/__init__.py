"""The Training service: fine-tuning jobs, checkpoints and models."""
