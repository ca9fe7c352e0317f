"""Rewrites scripts of Accelerate: what `faccel migrate` runs. Needs libcst, and not torch."""
