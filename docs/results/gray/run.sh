#!/usr/bin/env bash
# Pictures to be coloured: the grey copy as the condition, over the codes of docs/results/vqgan, a
# short run. 50 minutes with one thread on an AMD EPYC with AVX512-BF16 instructions, no GPU, and
# paused for most of them. With --condition-image edges or lowres, sketches or small copies.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/vqgan/checkpoint.pt \
    --condition image --condition-image gray --limit 20000 --epochs 2 --dropout 0 \
    --num-samples 1000 --out runs/gray
