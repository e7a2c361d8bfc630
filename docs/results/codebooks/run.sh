#!/usr/bin/env bash
# The rows of the table and their transformers, codebooks of other sizes, and two VQGANs. On an
# NVIDIA H200 up to 15 of these ran side by side, and all of them, with the runs of hierarchy/ and
# most of filling_in/, in eleven minutes; a row took 3 minutes then, a transformer 1, a VQGAN 6.
# With one thread on a CPU with AVX512-BF16 instructions, a row takes half an hour. DATA is the data
# of all these runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
shared="$data --precision bf16 --checkpoint-every 2000"
row() {
    python train_vqvae.py $shared --models vqvae --epochs 20 --out "runs/codebooks/$1" "${@:2}"
}
row ema
row gradient --quantizer gradient
row ema-cosine --cosine --embedding-dim 16
row gradient-cosine --quantizer gradient --cosine --embedding-dim 16
row ema-rotation --gradient-estimator rotation
row simvq --quantizer simvq
row simvq-8 --quantizer simvq --embedding-dim 8
row fsq --quantizer fsq
row lfq --quantizer lfq
row residual-3x8 --quantizer residual --num-rounds 3 --num-embeddings 8
row residual-2x512 --quantizer residual --num-rounds 2
row ema-unguarded --no-data-init --no-restart-dead-codes
row gradient-unguarded --quantizer gradient --no-data-init
row ema-16 --embedding-dim 16
row fsq-binary --quantizer fsq --levels 2 2 2 2 2 2 2 2 2
row gradient-rotation --quantizer gradient --gradient-estimator rotation

# All transformers are measured by one evaluation classifier of one epoch.
classifier=runs/codebooks/eval_classifier.pt
for name in ema gradient ema-cosine gradient-cosine ema-rotation simvq simvq-8 fsq lfq \
    residual-3x8 residual-2x512 ema-unguarded gradient-unguarded; do
    [ -e $classifier ] && evaluator="--eval-classifier $classifier" \
        || evaluator="--eval-classifier-epochs 1"
    python train_transformer.py $data --tokenizer runs/codebooks/$name/checkpoint.pt $evaluator \
        --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --epochs 2 --num-samples 2000 \
        --precision bf16 --checkpoint-every 2000 --out runs/codebooks/prior-$name
    [ -e $classifier ] || cp runs/codebooks/prior-$name/eval_classifier.pt $classifier
done

for K in 64 512 4096 16384; do
    for quantizer in ema fsq "simvq --embedding-dim 8" lfq; do
        python train_vqvae.py $shared --models vqvae --epochs 2 --quantizer $quantizer \
            --num-embeddings $K --out runs/codebooks-sweep/${quantizer%% *}-$K
    done
done

for quantizer in ema fsq; do
    python train_vqgan.py $shared --epochs 3 --quantizer $quantizer --out runs/vqgan-$quantizer
done
python docs/experiments/codebooks.py $data
