"""Sync and async clients of the Luthier services."""
