"""Stands before pandas, which users don't have: statsmodels, an oracle of these tests, brings it.

PyArrow imports it, if it is there, at the first array that it makes: .6 CPU-seconds of every job that scores.
"""

raise ImportError("pandas is no dependency of the product")
