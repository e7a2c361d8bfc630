#!/usr/bin/env bash
# The study's batch sizes, 10 epochs each. With one thread on an AMD EPYC with AVX512-BF16
# instructions, no GPU: 10 to 30 minutes per training on an idle core. DATA is the data of all runs.
# (Batch 128 is also a part of the fair comparison: there they are vae-seed0 and vqvae-8x8-k512-seed0.)
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
for size in 256 128 64 32 16; do
    for model in vae vqvae; do
        python train_vqvae.py $data --precision bf16 --epochs 10 --models $model \
            --batch-size $size --out runs/sweep/$model-batch$size
    done
done
python docs/experiments/sweep.py $data
