"""What lasts: a state on the disk, whole or not at all, and back."""
