"""A step of a weight of rank r against a noisy gradient in K-FAC's coordinates, which leaves the rank as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.linalg.metric import eigen, working_dtype

PARTS = 8  # of the eigenvalues of each moment, for the filter


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of a moment and the square roots of its damped eigenvalues, ascending."""

    vectors: Tensor  # (k, k)
    roots: Tensor  # (k,)

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Basis:
        values, vectors = eigen(moment)
        values = values.clamp_min(0)
        return cls(vectors, (values + damping * values.mean()).clamp_min(torch.finfo(values.dtype).tiny).sqrt())


@dataclass(frozen=True)
class Step:
    """A layer in K-FAC's coordinates, and where to go from it."""

    weight: Tensor  # W̃ (m, n)
    direction: Tensor  # (m, n), in the tangent space
    left: Tensor  # (m, m), takes the outputs' coordinates back
    right: Tensor  # (n, n), takes the inputs' coordinates back, from the right; one for all layers of an input
    agreed: float  # ⟨direction by one half, gradient by the other⟩: how fast the loss falls, scatter left out


def natural_step(
    weight: Tensor,  # W' (m, n), of rank r
    halves: tuple[Tensor, Tensor],  # the gradient by each half of the tokens (m, n)
    outputs: Basis,  # of G (m, m)
    inputs: Basis,  # of C (n, n)
    rank: int,
) -> Step:
    """Find where to move a weight, in the coordinates of the eigenbases."""

    def turn(matrix: Tensor) -> Tensor:
        return outputs.vectors.T @ matrix @ inputs.vectors

    row, column = outputs.roots[:, None], inputs.roots[None, :]
    own = row * turn(weight) * column
    first, second = (turn(half) / row / column for half in halves)
    share = agreement(first, second)
    factors = _cut(own, rank)
    left, right = (torch.linalg.qr(side)[0] for side in (factors[0], factors[1].T))
    filtered = [on_tangent(half * share, left, right) for half in (first, second)]
    return Step(
        own,
        (filtered[0] + filtered[1]) / 2,
        outputs.vectors / outputs.roots,
        (inputs.vectors / inputs.roots).T,
        float((filtered[0] * second).sum() + (filtered[1] * first).sum()) / 2,
    )


def agreement(first: Tensor, second: Tensor, parts: int = PARTS) -> Tensor:  # (m, n)
    """Say how much of each block of their mean two noisy matrices agree on, between 0 and 1."""
    rows, columns = (torch.arange(k, device=first.device) * parts // k for k in first.shape)
    block = (rows[:, None] * parts + columns[None, :]).flatten()

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(parts * parts).index_add_(0, block, values.flatten())

    whole = summed(((first + second) / 2).square())
    share = (summed(first * second) / whole.clamp_min(torch.finfo(whole.dtype).tiny)).clamp(0, 1)
    return share[block].view(first.shape)


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # (m, r) and (r, n)
    """Return factors of the nearest matrix of rank r, by the eigenvectors of the smaller Gram matrix."""
    if matrix.shape[0] <= matrix.shape[1]:
        left = eigen(matrix @ matrix.T)[1][:, -rank:]
        return left, left.T @ matrix
    right = eigen(matrix.T @ matrix)[1][:, -rank:].T
    return matrix @ right.T, right


def on_tangent(
    matrix: Tensor,  # (m, n)
    left: Tensor,  # (m, r), orthonormal
    right: Tensor,  # (n, r), orthonormal
) -> Tensor:
    """Return the nearest matrix in the tangent space of the matrices of rank r at one with these column and row spaces."""
    inside = left @ (left.T @ matrix)
    return inside + (matrix - inside) @ right @ right.T


def stepped(step: Step, size: float, rank: int) -> tuple[Tensor, Tensor]:  # (m, r) and (r, n)
    """Return the factors of the weight after a step, cut to its rank in the same coordinates; in the weight's own ones."""
    wide = working_dtype(step.weight.device)
    moved = step.weight.to(wide) - size * step.direction.to(wide)
    left, right = _cut(moved, rank)
    return step.left.to(wide) @ left, right @ step.right.to(wide)
