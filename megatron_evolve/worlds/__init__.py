"""Worlds: real campaigns over a grid of planted and unplanted shifts, and whether what they said was true."""
