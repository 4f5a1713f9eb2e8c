# shellcheck shell=bash disable=SC2034
# tiny: for tries and tests, also without a GPU; 0.1 million parameters beside the vocabulary.
: "${SEQ_LENGTH:=256}"
model=(
    --num-layers 2
    --hidden-size 64
    --num-attention-heads 4
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
