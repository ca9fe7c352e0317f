"""A launch as values, run by torch's elastic launcher."""
