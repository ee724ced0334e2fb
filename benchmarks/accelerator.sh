#!/usr/bin/env bash
# Runs all benchmarks that need an accelerator.
#
#   benchmarks/accelerator.sh fetch          with network: downloads the packages that
#                                            the other machine lacks into .carry/
#   benchmarks/accelerator.sh run DIR ...    on the machine with the accelerator:
#                                            installs them into .carry/site and runs
#                                            benchmarks/accelerator.py
#
# The machine with the accelerator needs Python 3.12 with JAX, Flax, Optax, Orbax,
# PyTorch and sentence-transformers, but no network. PYTHON replaces python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=.carry/site

case "${1:-}" in
fetch)
	mkdir -p .carry/wheels
	"${PYTHON:-.venv/bin/python}" -m pip download --quiet --no-deps \
		--only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --dest .carry/wheels \
		array-record grain ml_collections portpicker tensorboardX
	"${PYTHON:-.venv/bin/python}" benchmarks/train_light.py --build
	du -sh .carry
	;;
run)
	shift
	output=$1
	shift
	"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
		--target "$site" .carry/wheels/*.whl
	PYTHONPATH=$PWD/$site${PYTHONPATH:+:$PYTHONPATH} \
		"$python" benchmarks/accelerator.py --output="$output" "$@"
	;;
*)
	sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
	exit 2
	;;
esac
