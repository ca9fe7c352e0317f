"""Settings of these tests: an empty cache of Hugging Face, no network, no progress messages."""

import os
import tempfile

# The libraries read these variables when they are imported.
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="faccel-hf-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
