"""dispersive: S = Σ_ij E_ij with the affinities E_ij = exp(−scale·‖hᵢ − hⱼ‖²); the loss is log S less a constant.

Story of the op: forward multiplies the rows with each other, chunk by chunk of their columns, into one (B, B) matrix of
fp32 products: ‖hᵢ − hⱼ‖² = ‖hᵢ‖² + ‖hⱼ‖² − 2⟨hᵢ, hⱼ⟩. Less the batch's mean, which distances do not see, so that
an offset common to all samples cancels nothing. Backward is a product of the same shape, with the Laplacian of E:

    dS/dhᵢ = −4·scale·(Σ_j E_ij·hᵢ − Σ_j E_ij·hⱼ)

No (B, B, K) tensor exists, nor a (B, K) copy of half-precision rows: a chunk is widened at a time. The products are the
library's, so one implementation serves every device; both passes are custom ops, as a compiler would unroll the chunks.

Where the batch is spread over processes, each computes the affinities of its own rows with all, which are gathered in
their own dtype; what crosses beyond that is one number. Its gradient needs no other process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..raw_op import LIBRARY
from ..registry import COMPOSITE, Op, register
from .reference import dispersive_loss_reference

register(
    Op(
        "dispersive",
        ("dispersive_loss",),
        dispersive_loss_reference,
        backends=(),
        otherwise="library products on every device",
    )
)

# Elements of a chunk. A CPU's should fit its cache; a GPU's should outlast the launch of its kernels.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 23


def _chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the rows, less their mean, in the dtype of the arithmetic."""
    count, width = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = max(_CHUNK.get(rows.device.type, _CHUNK_ELSEWHERE) // count, 256)
    for begin in range(0, width, step):
        columns = slice(begin, begin + step)
        chunk = rows[:, columns].to(dtype)
        yield columns, chunk - chunk.mean(dim=0)


def affinity(rows: Tensor, rank: int, world: int, temperature: float) -> Tensor:
    """Compute AFFINITY."""
    own = _own(rows, rank, world)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    products = rows.new_zeros((rows.shape[0] // world, rows.shape[0]), dtype=dtype)
    squares = rows.new_zeros(rows.shape[0], dtype=dtype)
    with torch.autocast(rows.device.type, enabled=False):
        for _, chunk in _chunks(rows):
            products.addmm_(chunk[own], chunk.t())
            squares += torch.linalg.vecdot(chunk, chunk)
    distances = (squares[own, None] + squares - 2 * products).clamp_(min=0)
    distances.diagonal(own.start).zero_()
    return distances.mul_(-_scale(rows, temperature)).exp_()


def affinity_grad(grad: Tensor, rows: Tensor, affinity: Tensor, rank: int, world: int, temperature: float) -> Tensor:
    """Compute AFFINITY_GRAD."""
    laplacian = -affinity
    diagonal = laplacian.diagonal(_own(rows, rank, world).start)
    diagonal.zero_()  # its ones would cost small affinities their digits in the sum, and cancel
    diagonal.copy_(-laplacian.sum(dim=1))
    laplacian *= -4 * _scale(rows, temperature) * grad
    gradient = rows.new_empty((affinity.shape[0], rows.shape[1]))
    with torch.autocast(rows.device.type, enabled=False):
        for columns, chunk in _chunks(rows):
            gradient[:, columns] = laplacian @ chunk
    return gradient


def _own(rows: Tensor, rank: int, world: int) -> slice:
    count = rows.shape[0] // world
    return slice(rank * count, (rank + 1) * count)


def _scale(rows: Tensor, temperature: float) -> float:
    return 1 / (rows.shape[1] * temperature)


def _fake_affinity(rows: Tensor, rank: int, world: int, temperature: float) -> Tensor:
    return rows.new_empty((rows.shape[0] // world, rows.shape[0]), dtype=torch.promote_types(rows.dtype, torch.float32))


def _fake_affinity_grad(
    grad: Tensor, rows: Tensor, affinity: Tensor, rank: int, world: int, temperature: float
) -> Tensor:
    return rows.new_empty((affinity.shape[0], rows.shape[1]))


# rows: (B, K) of all processes. Returns E of the own rows, (B / world, B), float32 (float64 for float64 rows).
AFFINITY = raw_op.declare(
    "dispersive_affinity", _fake_affinity, kind=COMPOSITE, backends=(LIBRARY,), python={LIBRARY: "op:affinity"}
)[LIBRARY]
# grad: of S, (). Returns the gradient of the own rows, (B / world, K), in the dtype of the rows.
AFFINITY_GRAD = raw_op.declare(
    "dispersive_affinity_grad", _fake_affinity_grad, kind=COMPOSITE, backends=(LIBRARY,),
    python={LIBRARY: "op:affinity_grad"},
)[LIBRARY]  # fmt: skip


class AffinitySum(FusedFunction):
    """S over the own rows i and all rows j, with the gradient of the S over all i and j."""

    instead = "write the loss in plain PyTorch there"

    @staticmethod
    def forward(
        hidden: Tensor, everyone: Tensor | None, rank: int, world: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(sum, affinities)."""
        affinity = AFFINITY(hidden if everyone is None else everyone, rank, world, temperature)
        return affinity.sum(), affinity

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        hidden, everyone, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden if everyone is None else everyone, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the own rows."""
        if grad is None:
            return (None,) * 5
        rows, affinity = ctx.saved_tensors
        gradient = AFFINITY_GRAD(grad, rows, affinity, *ctx.options)
        return differentiable_once(gradient, grad, rows), None, None, None, None


def dispersive_loss(hidden: Tensor, temperature: float, group: dist.ProcessGroup | None, gather: bool) -> Tensor:
    """The loss of the rows of this process, or with `gather` of all in the group (None: of the default one).

    Args:
        hidden: (B, K), B > 0, K > 0.
        temperature: of the affinities.
        group: whose rows are gathered.
        gather: whether they are.
    """
    world = dist.get_world_size(group) if gather else 1
    if world == 1:
        return (AffinitySum.run(hidden, None, 0, 1, temperature)[0] / hidden.shape[0] ** 2).log()
    count = world * hidden.shape[0]
    everyone = hidden.new_empty((count, hidden.shape[1]))
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.14 on
    gather_into(everyone, hidden.detach().contiguous(), group=group)
    own = AffinitySum.run(hidden, everyone, dist.get_rank(group), world, temperature)[0]
    total = own.detach().clone()
    dist.all_reduce(total, group=group)
    # As if every process had computed the whole sum from rows gathered with gradient, whose backward adds up the
    # gradients of all: DDP's average over the processes is then the gradient of the one loss.
    return ((total + world * (own - own.detach())) / count**2).log()
