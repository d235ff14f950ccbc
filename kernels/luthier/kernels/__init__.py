"""Public operators: each has an eager reference and faster implementations chosen by a measured table."""
