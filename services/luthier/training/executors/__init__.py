"""How a worker runs a training: in one process of its own, or on several ranks. Only the worker speaks to services."""
