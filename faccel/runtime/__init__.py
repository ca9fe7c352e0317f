"""`init` and `shutdown`: detection of the environment, devices and process groups."""
