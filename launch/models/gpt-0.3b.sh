# shellcheck shell=bash disable=SC2034
# gpt-0.3b: layers, width and heads of GPT-3 Medium, with RoPE, RMSNorm and SwiGLU.
: "${SEQ_LENGTH:=4096}"
model=(
    --num-layers 24
    --hidden-size 1024
    --ffn-hidden-size 2752
    --num-attention-heads 16
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
