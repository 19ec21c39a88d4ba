"""Floor 1: requests, KV blocks, scheduling, the engine loop and accelerator models.

Nothing here knows a file, a format or a measurement. Times are integer nanoseconds inside, seconds at
the edges; the wall clock is never read.
"""
