"""Fine-tuning jobs and their checkpoints."""
