#!/usr/bin/env bash
# A VQGAN of drawn shapes, in minutes: 3 min 27 s in all on two idle cores of an AMD EPYC with
# AVX512-BF16 instructions, no GPU.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_vqgan.py --data shapes --epochs 3 --batch-size 32 --lr 2e-3 \
    --perceptual-weight 0.2 --disc-start 0.5 --channels 16 --disc-channels 32 \
    --out runs/shapes-vqgan
