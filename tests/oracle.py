"""What training is promised to compute: a GPT in float64, one session at a time, on one process.

Nothing is packed, cut or distributed here, and neither the package nor Megatron's model code is
imported. Every layout of a job is compared with this file, so it is the definition:

    loss = sum over all target tokens i of the batch of  weight[i] * -log p(token i | tokens < i)

with the model of `oracle_model`, the weights of `target_weights`, gradients by autograd, and plain
Adam.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from oracle_model import ModelShape, token_losses
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """Adam without weight decay."""

    learning_rate: float
    epsilon: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None  # of the gradient of all parameters together


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The tokens of a session, and where in it the targets are."""

    tokens: Tensor  # (m,) int64
    turns: list[list[int]]  # of each turn that has any, the indices of its target tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleResult:
    """What training computed; gradients and reports are those before each step's update."""

    reports: list[dict[str, float]]  # one a step, see `report`
    gradients: list[Parameters]  # one a step
    parameters: Parameters  # after the last step
    routing_margin: float  # how near the nearest choice of an expert was, in the router's logits


def read_sessions(prefix: str) -> list[Session]:
    """The sessions of a dataset on disk, by Megatron's reader.

    A document is a session and a sequence a segment; the lowest two bits of its mode say what it
    is: 0 context, 1 a target that begins a turn, 2 a target that continues it. The first token of
    a session is predicted by nothing, so it is no target.
    """
    documents = IndexedDataset(prefix, multimodal=True)
    sessions = []
    for begin, end in pairwise(documents.document_indices):
        tokens: list[int] = []
        turns: list[list[int]] = []
        for segment, mode in zip(*documents[begin:end], strict=True):
            if mode & 3 == 1:
                turns.append([])
            if mode & 3:
                turns[-1] += range(max(len(tokens), 1), len(tokens) + len(segment))
            tokens += segment.tolist()
        sessions.append(
            Session(tokens=torch.tensor(tokens), turns=[turn for turn in turns if turn])
        )
    return sessions


def target_weights(sessions: Sequence[Session], average: str = "turn") -> list[Tensor]:
    """The weight of each token's loss in the mean over the batch; (m,) a session, 0 off target.

    turn      the mean over all turns of the batch of the mean over a turn's target tokens
    session   the mean over the sessions that have a turn of the mean over their turns
    token     the mean over all target tokens of the batch
    """
    num_turns = sum(len(session.turns) for session in sessions)
    num_sessions = sum(bool(session.turns) for session in sessions)
    num_targets = sum(len(turn) for session in sessions for turn in session.turns)
    all_weights = []
    for session in sessions:
        weights = torch.zeros(len(session.tokens), dtype=torch.float64)
        for turn in session.turns:
            weights[turn] = {
                "turn": 1 / (num_turns * len(turn)),
                "session": 1 / (num_sessions * len(session.turns) * len(turn)),
                "token": 1 / num_targets,
            }[average]
        all_weights.append(weights)
    return all_weights


def gradients_of(
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    sessions: Sequence[Session],
    average: str = "turn",
) -> tuple[dict[str, float], Parameters, float]:
    """(what the log shows, gradient of the objective, routing margin) of one batch."""
    sessions = [session for session in sessions if session.turns]  # the others weigh nothing
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    gradients = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    all_losses, margins = [], [math.inf]
    for session, weights in zip(sessions, target_weights(sessions, average), strict=True):
        losses, margin = token_losses(leaves, shape, session.tokens)
        parts = torch.autograd.grad((weights * losses).sum(), list(leaves.values()))
        for name, part in zip(leaves, parts, strict=True):
            gradients[name] += part
        all_losses.append(losses.detach())
        margins.append(margin)
    return report(sessions, all_losses, average), gradients, min(margins)


def report(sessions: Sequence[Session], losses: Sequence[Tensor], average: str) -> dict[str, float]:
    """What the log shows of a batch.

    `lm loss` is the objective, `token loss` the mean over all target tokens, and `turn K loss`
    the mean over the K-th turns of the sessions that have one, of each turn's mean.
    """
    turns = [turn for session in sessions for turn in session.turns]
    shown = {"turns": float(len(turns)), "target tokens": float(sum(map(len, turns)))}
    for name, weights in (
        ("lm loss", target_weights(sessions, average)),
        ("token loss", target_weights(sessions, "token")),
    ):
        shown[name] = float(torch.cat(weights) @ torch.cat(list(losses)))
    for index in range(max(len(session.turns) for session in sessions)):
        means = [
            float(of_session[session.turns[index]].mean())
            for session, of_session in zip(sessions, losses, strict=True)
            if len(session.turns) > index
        ]
        shown[f"turn {index + 1} loss"] = sum(means) / len(means)
    return shown


def train(
    initial: Mapping[str, Tensor],
    shape: ModelShape,
    batches: Sequence[Sequence[Session]],
    adam: AdamSettings,
    average: str = "turn",
) -> OracleResult:
    """One step of Adam on each batch of sessions, in turn, from the parameters `initial`."""
    parameters = {name: tensor.double() for name, tensor in initial.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    reports, all_gradients, margin = [], [], math.inf
    for step, sessions in enumerate(batches, start=1):
        shown, gradients, step_margin = gradients_of(parameters, shape, sessions, average)
        reports.append(shown)
        all_gradients.append(gradients)
        margin = min(margin, step_margin)
        clip = _clip_factor(gradients, adam.clip_norm)
        beta1, beta2 = adam.betas
        for name, gradient in gradients.items():
            first[name] = beta1 * first[name] + (1 - beta1) * clip * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * (clip * gradient).square()
            mean, square = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
            change = mean / (square.sqrt() + adam.epsilon)
            parameters[name] = parameters[name] - adam.learning_rate * change
    return OracleResult(
        reports=reports, gradients=all_gradients, parameters=parameters, routing_margin=margin
    )


def _clip_factor(gradients: Mapping[str, Tensor], clip_norm: float | None) -> float:
    """What shortens the gradient to `clip_norm`; 1 if it is no longer than that."""
    if clip_norm is None:
        return 1.0
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    return min(1.0, clip_norm / (norm + 1e-6))  # the small term as in torch's clip_grad_norm_
