# shellcheck shell=bash disable=SC2034
# Stage 2, knowledge as questions and answers: a question that is a bare term is put in one of
# several phrasings.
read -r -a inputs <<<"${KNOWLEDGE_DATA:?set it to the files of knowledge, several with blanks between}"
epochs=${KNOWLEDGE_EPOCHS:-5}
learning_rate=${KNOWLEDGE_LEARNING_RATE:-1e-4}
global_batch_size=${KNOWLEDGE_BATCH:-128}
window=${KNOWLEDGE_WINDOW:-}
preprocess_flags=(
    --prompt-variants "${KNOWLEDGE_PHRASINGS:-$root/launch/staged/phrasings_en.txt}"
)
train_flags=(--long-session window)
