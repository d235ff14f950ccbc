"""The task queue: leases with epochs, attempts, numbered events, watch, and the worker's own loop."""
