"""DeepSpeed's ZeRO: optimizer states, gradients and parameters sharded over the data ranks."""
