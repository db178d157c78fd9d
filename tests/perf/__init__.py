"""Guards of the project's own speed: exact counters, and times against references (`make perf`)."""
