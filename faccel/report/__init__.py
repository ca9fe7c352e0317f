"""Reports of runs: what a run folder has, as a record, a page and a comparison."""
