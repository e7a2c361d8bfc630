#!/usr/bin/env bash
# A VQ-VAE-2 and two VQ-VAEs on drawn shapes, and their transformers. On an NVIDIA H200, beside
# twelve other trainings, each took one to three minutes. The transformer of the VQ-VAE-2 was trained
# with one thread on an AMD EPYC with AVX512-BF16 instructions, in bfloat16 too, and so for fewer
# epochs. (Its evaluation classifier was kept from a run that was cut off.)
set -euo pipefail
cd "$(dirname "$0")/../../.."

train="python train_vqvae.py --data shapes --precision bf16 --checkpoint-every 2000 --epochs 40"
$train --models vqvae2 --out runs/hierarchy/vqvae2
$train --models vqvae --num-downsamples 1 --out runs/hierarchy/flat-16x16
$train --models vqvae --out runs/hierarchy/flat-8x8

for name in vqvae2 flat-16x16 flat-8x8; do
    [ $name = vqvae2 ] && epochs=4 || epochs=20
    python train_transformer.py --data shapes --tokenizer runs/hierarchy/$name/checkpoint.pt \
        --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --epochs $epochs --precision bf16 \
        --num-samples 1000 --checkpoint-every 2000 --out runs/hierarchy/prior-$name
done
python docs/experiments/hierarchy.py --data shapes
