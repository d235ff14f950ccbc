"""Ranks on the machines of a Ray cluster: Ray places them, the worker that claimed a task drives them.

Four kinds of processes, of which the first alone speaks to services and has credentials:
- the worker (`driver`), which has neither torch nor Ray;
- a child of it (`fit`), which joins the cluster as a Ray driver: its end is the end of all that it has there;
- the ranks (`rank`), one a device, which `ray.train` starts on the cluster's machines;
- the post (`post`) between them, beside the child, and a sentry (`sentry`) on each machine that has ranks.
"""
