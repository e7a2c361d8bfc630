#!/usr/bin/env bash
# A VQ-VAE of 10 epochs, and a picture of every code in its codebook. 18 minutes of training on two
# cores of an AMD EPYC with AVX512-BF16 instructions, no GPU, beside other work; the picture takes
# seconds. DATA is the data of both, a folder of images.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data data/cifar10-images"}
test -e runs/fair/vqvae-8x8-k512-seed0/metrics.json || python train_vqvae.py $data --models vqvae \
    --precision bf16 --epochs 10 --out runs/fair/vqvae-8x8-k512-seed0
python docs/experiments/codebook_gallery.py $data
