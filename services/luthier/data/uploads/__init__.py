"""Resumable, checksummed uploads."""
