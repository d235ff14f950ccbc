"""Start, guard, observe and stop a service process."""
