#!/usr/bin/env bash
# The transformer of docs/results/captions, in a copy of its run folder, asked for the captions of
# all 2,000 test images. Nothing is trained.
set -euo pipefail
cd "$(dirname "$0")/../../.."

test -e runs/captions-2000 || cp -R runs/captions runs/captions-2000
python train_transformer.py --resume --guidance 3 --temperature 1 0.8 --num-samples 2000 \
    --out runs/captions-2000
