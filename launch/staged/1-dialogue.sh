# shellcheck shell=bash disable=SC2034
# Stage 1, dialogue and question-answer data: sessions longer than the window are cut into windows,
# each turn trained once.
read -r -a inputs <<<"${DIALOGUE_DATA:?set it to the files of dialogues, several with blanks between}"
epochs=${DIALOGUE_EPOCHS:-2}
learning_rate=${DIALOGUE_LEARNING_RATE:-1e-4}
global_batch_size=${DIALOGUE_BATCH:-128}
window=${DIALOGUE_WINDOW:-}
preprocess_flags=()
train_flags=(--long-session window)
