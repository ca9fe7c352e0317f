"""Runs Python code on a pretended TPU VM with the real TorchTPU: `python tpu_vm.py CHIPS CODE`.

TorchTPU counts the chips on the PCI bus and registers the device only if there are some. The
registered device has no hardware, so every tensor on it is an error.
"""

import os
import sys


def main(num_chips, code):
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # otherwise it asks Google's metadata server for minutes
    import torch
    from torch_tpu import _loader
    from torch_tpu._internal.utils import hardware

    if num_chips:
        hardware._scan_pci_tpus = lambda: (num_chips, hardware._V4_TOPOLOGY)
        _loader._init_device("tpu")
    # The ranks of a launch are ordinary processes.
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    exec(code, {"torch": torch})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
