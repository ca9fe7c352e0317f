"""What the ranks of a run are doing: `faccel why`, the socket of each rank, and the verdict."""
