"""The loss of a micro-batch against its closed form, and mutants of it that must differ."""

import numpy as np
import pytest
import torch

from megatron_multiturn.loss import loss_func

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
