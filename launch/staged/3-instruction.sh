# shellcheck shell=bash disable=SC2034
# Stage 3, instructions: more epochs, in smaller steps.
read -r -a inputs <<<"${INSTRUCTION_DATA:?set it to the files of instructions, several with blanks between}"
epochs=${INSTRUCTION_EPOCHS:-10}
learning_rate=${INSTRUCTION_LEARNING_RATE:-2e-5}
global_batch_size=${INSTRUCTION_BATCH:-128}
window=${INSTRUCTION_WINDOW:-}
preprocess_flags=()
train_flags=(--long-session window)
