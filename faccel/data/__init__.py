"""Data order, sources and loaders."""
