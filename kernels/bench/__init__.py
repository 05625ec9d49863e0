"""The benchmark of the kernels: a problem with its oracle, its providers, a clock, and the rows that come of it."""
