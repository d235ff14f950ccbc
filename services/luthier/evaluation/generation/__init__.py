"""Interactive text generation."""
