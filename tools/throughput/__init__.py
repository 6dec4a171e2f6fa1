"""Timers and meters of `profile_throughput`, and what its figures are compared with."""
