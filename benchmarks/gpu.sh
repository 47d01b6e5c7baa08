#!/usr/bin/env bash
# All checks and benchmarks on a GPU, part by part, into one folder; finished parts are skipped. See docs/benchmarks.md.
exec "${PYTHON:-python}" "$(dirname "$0")/gpu.py" "$@"
