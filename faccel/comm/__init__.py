"""Communication: nested values travel packed, in one collective of an axis of the context."""
