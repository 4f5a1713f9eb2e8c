# shellcheck shell=bash disable=SC2034
# llama3-8b: the shape of Llama 3 8B, 8,030,261,248 parameters; with its tokenizer, a vocabulary
# of 128,256. Two tensor parallel ranks leave room for rows on GPUs of 80 GB.
: "${SEQ_LENGTH:=8192}" "${TENSOR_PARALLEL:=2}"
model=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --position-embedding-type rope
    --rotary-base 500000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by "$((256 / TENSOR_PARALLEL))" # Megatron multiplies by the ranks
    --attention-dropout 0
    --hidden-dropout 0
)
