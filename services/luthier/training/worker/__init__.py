"""The training worker: registers base models and runs fine-tuning jobs."""
