#!/usr/bin/env bash
# Measures one suite of `benchmarks.run` on this machine's GPU: full-size models, random bfloat16
# weights that are made on the device, ours beside transformers.
#   bash benchmarks/gpu.sh train               under nine minutes; the same call again goes on
#   bash benchmarks/gpu.sh generate --out F    any flags of `benchmarks.run`
#   bash benchmarks/gpu.sh numerics            one step of tiny models against CPU float32
#   bash benchmarks/gpu.sh train --device cpu --sizes tiny --dtype bfloat16   the same code, no GPU
# Needs jax, flax, optax, torch and transformers; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:?expected train, generate, rank or numerics}
shift
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ $suite == numerics ]]; then exec "$python" -m benchmarks.numerics "$@"; fi
exec "$python" -m benchmarks.run --suite "$suite" --device gpu --resume --budget 240 "$@"
