"""Data: an order that is arithmetic, a loader that reads it, batches that know what is padding."""
