"""The built-in trackers: one module each, which imports its library when the tracker opens."""
