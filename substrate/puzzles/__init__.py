"""Seeded puzzle rows: six families at two difficulties, one module a family, `families` the registry."""
