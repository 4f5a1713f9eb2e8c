"""The loss of a micro-batch against its closed form, and mutants of it that must differ."""

import numpy as np
import pytest
import torch

from megatron_multiturn.loss import loss_func, turn_report

# Two rows: turns of 3, 2 and 3 target tokens in the first, one of 1 in the second.
LOSS_TOKEN_NUM = torch.tensor(
    [[0, 0, 3, 3, 3, 0, 2, 2, 0, 0, 3, 3, 3, 0, 0], [0] * 14 + [1]], dtype=torch.float32
)
LOSS_MASK = (LOSS_TOKEN_NUM > 0).float()
TURN_NUM = torch.tensor([[3], [1]])


def losses() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([0, 0]).uniform(0.1, 9, (2, 15))).float()


def turn_mean(values: torch.Tensor) -> float:
    """The mean over the four turns of each turn's mean, by hand in float64."""
    v = values.double().numpy()
    turns = [v[0, 2:5], v[0, 6:8], v[0, 10:13], v[1, 14:15]]
    return float(np.mean([turn.mean() for turn in turns]))


def test_loss_over_divisor_is_the_mean_over_turns() -> None:
    values = losses()
    loss, divisor, _ = loss_func(LOSS_MASK, LOSS_TOKEN_NUM, TURN_NUM, values)
    assert divisor.dtype == torch.int32
    assert float(loss / divisor) == pytest.approx(turn_mean(values), rel=1e-6)


def test_a_token_mean_is_another_number() -> None:
    values = losses()
    ones = (LOSS_TOKEN_NUM > 0).float()
    loss, _, _ = loss_func(LOSS_MASK, ones, TURN_NUM, values)
    assert float(loss / LOSS_MASK.sum()) != pytest.approx(turn_mean(values), rel=1e-2)


def test_gradient_is_each_tokens_share_of_its_turn() -> None:
    values = losses().requires_grad_()
    loss, _, _ = loss_func(LOSS_MASK, LOSS_TOKEN_NUM, TURN_NUM, values)
    loss.backward()
    expected = torch.where(LOSS_TOKEN_NUM > 0, 1 / LOSS_TOKEN_NUM, 0.0)
    torch.testing.assert_close(values.grad, expected, rtol=0, atol=0)


def test_report_sums_over_micro_batches_to_global_means() -> None:
    values = losses()
    whole = loss_func(LOSS_MASK, LOSS_TOKEN_NUM, TURN_NUM, values)[2]
    rows = [slice(0, 1), slice(1, 2)]
    parts = [
        loss_func(LOSS_MASK[row], LOSS_TOKEN_NUM[row], TURN_NUM[row], values[row])[2]
        for row in rows
    ]
    for name, pair in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], pair, rtol=1e-6, atol=0)
    total, count = whole["token loss"].tolist()
    assert count == 9
    masked = values.double()[LOSS_MASK.bool()].mean()
    assert total / count == pytest.approx(float(masked), rel=1e-6)
    assert whole["lm loss"].tolist()[1] == 4


def test_a_micro_batch_without_a_target_adds_nothing() -> None:
    zeros = torch.zeros(1, 4)
    values = torch.full((1, 4), 3.0, requires_grad=True)
    loss, divisor, report = loss_func(zeros, zeros, torch.zeros(1, 1, dtype=torch.int64), values)
    loss.backward()
    assert (float(loss.detach()), int(divisor)) == (0.0, 0)
    assert values.grad is not None
    assert not values.grad.any()
    assert all(pair.tolist() == [0.0, 0.0] for pair in report.values())


def test_bfloat16_losses_are_summed_in_float32() -> None:
    ones = torch.ones(1, 4096)
    values = torch.ones(1, 4096, dtype=torch.bfloat16)
    loss, _, _ = loss_func(ones, ones, torch.tensor([[4096]]), values)
    assert loss.dtype == torch.float32
    assert float(loss) == 4096.0


def test_turns_are_whole_numbers_however_they_are_cut() -> None:
    """Nine turns of seven targets: sevenths in every micro-batch, of which there are seven."""
    index = torch.ones(7, 9, dtype=torch.int32)
    lengths = torch.full((7, 9), 7.0)
    share = torch.tensor(1 / 7, dtype=torch.float64)
    parts = [
        turn_report(torch.ones(1, 9), index[i : i + 1], lengths[i : i + 1], batch_share=share)
        for i in range(7)
    ]
    total, count = sum(part["turns"] for part in parts)  # type: ignore[misc]
    assert float((total / count).float()) == 9.0
    targets, count = sum(part["target tokens"] for part in parts)  # type: ignore[misc]
    assert float((targets / count).float()) == 63.0


def test_the_loss_of_each_turn_of_a_session() -> None:
    values = losses()
    index = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 1, 1, 1, 0, 0], [0] * 14 + [2]])
    report = turn_report(
        values,
        index,
        LOSS_TOKEN_NUM,
        batch_share=torch.tensor(1.0, dtype=torch.float64),
        num_turn_indices=3,
    )
    v = values.double().numpy()
    means = {1: [v[0, 2:5].mean(), v[0, 10:13].mean()], 2: [v[0, 6:8].mean(), v[1, 14]]}
    for turn, expected in means.items():
        total, count = report[f"turn {turn} loss"].tolist()
        assert count == pytest.approx(2)
        assert total / count == pytest.approx(float(np.mean(expected)), rel=1e-6)
    assert report["turn 3 loss"].tolist() == [0.0, 0.0]
    assert report["turns"].tolist() == pytest.approx([4.0, 1.0], rel=1e-12)
