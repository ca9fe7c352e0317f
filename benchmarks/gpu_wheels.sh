#!/usr/bin/env bash
# Downloads what faccel and pytest need besides PyTorch and numpy, for a GPU node without a network:
#     bash benchmarks/gpu_wheels.sh                             # here, into build/gpu_wheels
#     python benchmarks/gpu.py --wheels build/gpu_wheels        # there
# PYTHON_VERSION=3.13 chooses another Python than 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/gpu_wheels
packages=(
  # the dependencies of pyproject.toml
  attrs click PyYAML questionary rich safetensors tensordict xxhash
  # what these need
  cloudpickle markdown-it-py mdurl prompt_toolkit pygments pyvers wcwidth
  # fp8
  torchao
  # for tests/gpu
  iniconfig packaging pluggy pytest
)
rm -rf "$folder"
mkdir -p "$folder"
# Without dependencies: tensordict's would be PyTorch, which the node has.
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$folder" "${packages[@]}"
du -sh "$folder"
