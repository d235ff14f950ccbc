"""State that outlives a process: blobs and SQL."""
