"""Starting processes: a launch as values, run by torch.distributed.run."""
