"""`init` and `shutdown`: the launcher, the device, the process groups and the excepthook."""
