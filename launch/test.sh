#!/usr/bin/env bash
# Runs the tests; every skipped one is listed with its reason.
#
#   bash launch/test.sh                    everything but full-size models, on up to four cores
#   bash launch/test.sh -m full -n 0       full-size models: many gigabytes, many minutes
#   bash launch/test.sh tests/models -x    any arguments of pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare dev,torch,eval
"$python" -m pytest -rfEs -n auto --maxprocesses 4 --dist loadscope "$@"
