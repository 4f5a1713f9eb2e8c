# shellcheck shell=bash disable=SC2034
# qwen2.5-7b: the shape of Qwen2.5-7B, 7,615,616,512 parameters; with its tokenizer, a vocabulary
# of 152,064. Two tensor parallel ranks leave room for rows on GPUs of 80 GB.
: "${SEQ_LENGTH:=4096}" "${TENSOR_PARALLEL:=2}"
model=(
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --add-qkv-bias
    --position-embedding-type rope
    --rotary-base 1000000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by "$((512 / TENSOR_PARALLEL))" # Megatron multiplies by the ranks
    --attention-dropout 0
    --hidden-dropout 0
)
