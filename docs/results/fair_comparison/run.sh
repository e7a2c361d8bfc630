#!/usr/bin/env bash
# The trainings of the fair comparison, 10 epochs each, and its chart. With one thread on an AMD
# EPYC with AVX512-BF16 instructions, no GPU: 10 to 15 minutes per training of the 8x8 grids on an
# idle core. DATA is the data of all these runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
train="python train_vqvae.py $data --precision bf16 --epochs 10"
for seed in 0 1 2; do
    $train --models vae-spatial --kl-weight 4 --seed $seed --out runs/fair/vae-spatial-w4-seed$seed
    $train --models vqvae --seed $seed --out runs/fair/vqvae-8x8-k512-seed$seed
done
for w in 0.5 1 2; do
    $train --models vae-spatial --kl-weight $w --out runs/fair/vae-spatial-w$w-seed0
done
for k in 32 128; do
    $train --models vqvae --num-embeddings $k --out runs/fair/vqvae-8x8-k$k-seed0
done
$train --models vae --out runs/fair/vae-seed0
$train --models vqvae --num-downsamples 1 --out runs/fair/vqvae-16x16-k512-seed0

# The price with context: a transformer for each VQ-VAE with 8x8 codes. Its samples are not used.
for name in vqvae-8x8-k32-seed0 vqvae-8x8-k128-seed0 vqvae-8x8-k512-seed{0,1,2}; do
    python train_transformer.py --tokenizer runs/fair/$name/checkpoint.pt --condition none \
        --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --epochs 2 --precision bf16 \
        --num-samples 16 --eval-classifier-epochs 1 --out runs/fair/prior-$name
done
python docs/experiments/fair_comparison.py $data
