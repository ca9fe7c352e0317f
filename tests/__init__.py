"""The tests; see README.md."""

import torch

# The CUDA build of PyTorch 2.11 ends with a segmentation fault in `FakeTensorMode`, and so in each
# DTensor, if the node has no GPU. Here, because the processes that tests start import it, too.
if torch.__version__.startswith("2.11.") and torch.version.cuda and not torch.cuda.is_available():
    torch._C._ensureCUDADeviceGuardSet = lambda: None
