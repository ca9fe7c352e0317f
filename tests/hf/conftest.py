import os
import tempfile

os.environ.setdefault(
    "HF_HOME", tempfile.mkdtemp(prefix="faccel-hf-")
)  # read when the libraries are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
