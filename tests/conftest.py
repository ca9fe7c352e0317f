"""Settings of all tests: one thread per process, because the tests run in parallel."""

import torch

torch.set_num_threads(1)
