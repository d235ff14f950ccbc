"""Generated messages of what services store beside the public resources."""
