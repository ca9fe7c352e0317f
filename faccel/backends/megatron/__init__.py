"""Models that Megatron-core has built, with its parallel groups, schedules and optimizers."""
