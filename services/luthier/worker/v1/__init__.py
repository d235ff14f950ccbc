"""Generated messages and stubs of the protocol between workers and services."""
