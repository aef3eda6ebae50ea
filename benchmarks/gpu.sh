#!/usr/bin/env bash
# Measures this machine's GPU: train step and greedy decode of full-size FlanT5-XL and Vicuna-7B,
# random bfloat16 weights, ours beside transformers, and one step's numerics against CPU float32.
#   bash benchmarks/gpu.sh                     on a GPU: minutes, JSON into benchmarks/results/
#   bash benchmarks/gpu.sh --tiny              the same code at toy size, also on a CPU
# Needs jax, flax, optax, torch and transformers; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" benchmarks/gpu.py "$@"
