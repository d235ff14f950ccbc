"""The evaluation worker: runs evaluations and answers interactive prompts with one engine."""
