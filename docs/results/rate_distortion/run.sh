#!/usr/bin/env bash
# Both models at further rates, beside the runs study, study-fixed and grid16, and the two pictures
# of them all. 17 minutes of training with one thread on an AMD EPYC with AVX512-BF16 instructions,
# no GPU, beside other work. DATA is the data of all these runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
for w in 0.1 0.3; do
    python train_vqvae.py $data --models vae --likelihood fixed --kl-weight $w --epochs 4 \
        --out runs/rate/vae-kl$w
done
for k in 32 128; do
    python train_vqvae.py $data --models vqvae --num-embeddings $k --epochs 4 \
        --out runs/rate/vqvae-8x8-k$k
done
python docs/experiments/rate_distortion.py $data
