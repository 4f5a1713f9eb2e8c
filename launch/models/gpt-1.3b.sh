# shellcheck shell=bash disable=SC2034
# gpt-1.3b: layers and width of GPT-3 XL, in 16 heads of 128, with RoPE, RMSNorm and SwiGLU.
: "${SEQ_LENGTH:=4096}"
model=(
    --num-layers 24
    --hidden-size 2048
    --ffn-hidden-size 5504
    --num-attention-heads 16
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
