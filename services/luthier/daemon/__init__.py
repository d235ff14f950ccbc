"""luthierd: start, serve, work, fetch the demo model."""
