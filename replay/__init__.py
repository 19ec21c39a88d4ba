"""Floor 3: the Trace, its readers and writers, clocks, and running a Trace through a Profile."""
