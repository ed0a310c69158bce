"""Which processes take part, and whether they were called alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
"""A process group, a 1-D mesh, or None for all processes."""

_OPTIONS_WIDTH = 128  # bytes; the longest options in words take less


def as_process_group(group: Group) -> dist.ProcessGroup:
    """Return the process group that ``group`` names.

    Raises:
        RuntimeError: if torch.distributed has no processes yet.
        TypeError: if ``group`` is no group.
        ValueError: if it is a mesh of several dimensions, or this process is not in it.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialized by init_process_group, got none")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a 1-D DeviceMesh, got {group.ndim}-D; index it")
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]  # torch's
        raise ValueError(f"group must contain this process, got one without rank {dist.get_rank()}")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, DeviceMesh or None, got {type(group)}")
    return group


def agree(
    refusal: Exception | None,
    shapes: dict[str, torch.Size],
    options: str,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Raise on every rank if one refuses its arguments, or if what must be alike is not.

    Without it a rank that raises, or sends another number of bytes, leaves the others waiting.

    Args:
        refusal: why this rank cannot take part.
        shapes: by argument, the shape that must be the same on every rank, 4-D unless refused.
        options: everything else that must be the same, in words.
        group: the ranks to agree.
        device: where the group's collectives take tensors.
    """
    header: list[int] = [refusal is not None]
    for shape in shapes.values():
        header += [0] * 4 if refusal is not None else [*shape]
    header += options.encode().ljust(_OPTIONS_WIDTH)
    rows = _gather(header, group, device)
    if refusal is not None:
        raise refusal
    if refusing := [rank for rank, row in enumerate(rows) if row[0]]:
        raise ValueError(f"arguments must be accepted on every rank, got refusals on {refusing}")
    for i, name in enumerate(shapes):
        found = [row[1 + 4 * i : 5 + 4 * i] for row in rows]
        if any(other != found[0] for other in found):
            raise ValueError(f"{name} must have the same shape on every rank, got {found}")
    options_found = [bytes(row[-_OPTIONS_WIDTH:]).decode().strip() for row in rows]
    if any(other != options_found[0] for other in options_found):
        raise ValueError(f"options must be the same on every rank, got {options_found}")


def _gather(header: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    own = torch.tensor(header, dtype=torch.int64, device=device)
    rows: list[Tensor] = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group)
    gathered: list[list[int]] = torch.stack(rows).tolist()
    return gathered
