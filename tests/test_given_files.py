"""What is said of mistakes in the files that flags name."""

import argparse
from pathlib import Path

import pytest

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.given_files import check_given_files


def given(**values: object) -> argparse.Namespace:
    fields = "data_path train_data_path valid_data_path test_data_path tokenizer_type"
    fields += " tokenizer_model pretrained_checkpoint load save save_interval"
    return argparse.Namespace(**{**dict.fromkeys(fields.split()), **values})


@pytest.mark.parametrize(
    "items", [["a"], ["a", "b"], ["a", "b", "c"], ["0.5", "a", "1", "b"], ["1e-3", "a"], None]
)
def test_right_lists_of_data(items: list[str] | None) -> None:
    check_given_files(given(data_path=items, valid_data_path=items))


@pytest.mark.parametrize(
    "items",
    [["0.5"], ["0.5", "a", "b"], ["0,5", "a", "0.5", "b"], ["a", "0.5"], ["0.5", "a", "b", "0.5"]],
)
def test_weights_and_prefixes_that_do_not_take_turns(items: list[str]) -> None:
    for name in ("data_path", "train_data_path", "test_data_path"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {' '.join(items)}: wei"):
            check_given_files(given(**{name: items}))


def test_tokenizer_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    kind = "SentencePieceTokenizer"
    model = tmp_path / "tokenizer.model"
    with pytest.raises(ConfigError, match="model is not there, where --tokenizer-type"):
        check_given_files(given(tokenizer_type=kind, tokenizer_model=str(model)))
    with pytest.raises(ConfigError, match=r"is a folder.*pass --tokenizer-type HuggingFac"):
        check_given_files(given(tokenizer_type=kind, tokenizer_model=str(tmp_path)))
    model.touch()
    check_given_files(given(tokenizer_type=kind, tokenizer_model=str(model)))
    check_given_files(given(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
    check_given_files(given(tokenizer_type=kind, tokenizer_model="msc://store/tokenizer.model"))


def test_checkpoints(tmp_path: Path) -> None:
    begun, empty = tmp_path / "begun", tmp_path / "empty"
    for folder in (begun, empty):
        folder.mkdir()
    (begun / "latest_checkpointed_iteration.txt").write_text("7")
    check_given_files(given(pretrained_checkpoint=str(begun), load=str(empty)))
    check_given_files(given(pretrained_checkpoint=str(empty), load=str(begun)))
    for missing in (empty, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"--pretrained-checkpoint {missing} holds no check"):
            check_given_files(given(pretrained_checkpoint=str(missing)))
    with pytest.raises(ConfigError, match="--save needs --save-interval"):
        check_given_files(given(save="x"))
    check_given_files(given(save="x", save_interval=5))
