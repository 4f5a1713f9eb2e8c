"""Reading a step ahead, and what the routers of a mixture of experts are told of padding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_multiturn.moe import StepReader, leave_out_padding


def rows(*turn_nums: int) -> dict[str, torch.Tensor]:
    return {"turn_num": torch.tensor(turn_nums).view(-1, 1)}


def test_a_step_is_read_before_its_first_rows_are_used() -> None:
    batches = [rows(3, 1), rows(0, 2), rows(5, 5), rows(7, 0)]
    iterator, reader = iter(batches), StepReader()
    for first in (0, 2):
        assert reader.begins_step
        expected = sum(int(batch["turn_num"].sum()) for batch in batches[first : first + 2])
        assert reader.read_step(iterator, 2) == expected
        assert [reader.next_rows() for _ in range(2)] == batches[first : first + 2]
    assert reader.begins_step
    assert next(iterator, None) is None


def test_a_rank_without_rows_counts_the_micro_batches_all_the_same() -> None:
    reader = StepReader()
    assert reader.read_step(None, 2) == 0
    assert (reader.next_rows(), reader.begins_step) == (None, False)
    assert (reader.next_rows(), reader.begins_step) == (None, True)


def router(**methods: Any) -> Any:
    def nothing(*args: Any, **kwargs: Any) -> None: ...

    stock = {"apply_z_loss": nothing, "_apply_expert_bias": nothing}
    return SimpleNamespace(
        config=SimpleNamespace(moe_z_loss_coeff=0.5),
        tp_cp_group=torch.distributed.group.WORLD,
        **(stock | methods),
    )


def test_padding_is_not_counted_for_the_bias_of_experts() -> None:
    seen: list[torch.Tensor] = []
    stub = router(_apply_expert_bias=seen.append)
    leave_out_padding(stub)
    routing_map = torch.tensor([[True, False], [True, True], [False, True]])
    stub._apply_expert_bias(routing_map, padding_mask=torch.tensor([False, True, False]))
    stub._apply_expert_bias(routing_map)
    assert seen[0].tolist() == [[True, False], [False, False], [False, True]]
    assert seen[1] is routing_map


@pytest.mark.parametrize(
    ("own", "total", "weight"), [(3, 4, 1.5), (1, 4, 0.5), (0, 4, 0.0), (0, 0, 0.0)]
)
def test_a_rank_weighs_in_the_z_loss_as_much_as_its_share_of_the_row(
    own: int, total: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    coefficients: list[float] = []

    def record(logits: torch.Tensor, padding_mask: torch.Tensor) -> None:
        coefficients.append(float(stub.config.moe_z_loss_coeff))

    stub = router(apply_z_loss=record)
    stub.tp_cp_group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.fill_(total))
    leave_out_padding(stub)
    mask = torch.tensor([False] * own + [True] * (4 - own))
    stub.apply_z_loss(torch.zeros(4, 2), padding_mask=mask)
    assert coefficients == pytest.approx([0.5 * weight], abs=1e-20)
    assert stub.config.moe_z_loss_coeff == 0.5
