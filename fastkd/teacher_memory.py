"""Handing the memory of teacher features over to the student's gradient: who may, and who then finds it taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.levels import Levels

_MARK = "_fastkd_given_up_at"  # on a storage: its version when its content was given up


def require_own(levels: Levels) -> None:
    """Raise ``ValueError`` for a teacher feature whose memory is not its own alone."""
    owners: dict[int, str] = {}
    others = ("student", "prior", "mean", "rstd")
    names = {"student": "student_feats[{}]", "prior": "prior[{}]"}
    for field in others:
        for i, x in enumerate(getattr(levels, field)):
            if x.numel():
                owners[_memory(x)] = names.get(field, "standardize[{}]").format(i)
    for i, t in enumerate(levels.teacher):
        if t.numel() == 0:
            continue
        owner = owners.setdefault(_memory(t), f"teacher_feats[{i}]")
        if owner != f"teacher_feats[{i}]":
            raise ValueError(
                f"teacher_feats[{i}]: expected memory of its own, which reuse_teacher_memory=True overwrites, got that "
                f"of {owner}; pass a clone, or reuse_teacher_memory=False"
            )
        if _overlaps_itself(t):
            raise ValueError(
                f"teacher_feats[{i}]: expected memory for each element, which reuse_teacher_memory=True overwrites, "
                f"got strides {t.stride()} of shape {tuple(t.shape)}; pass a clone, or reuse_teacher_memory=False"
            )


def require_intact(teacher: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` for a feature that an earlier loss was allowed to overwrite."""
    for i, t in enumerate(teacher):
        if _was_given_up(t):
            raise ValueError(
                f"teacher_feats[{i}]: expected the teacher's feature, but an earlier distill_loss with "
                "reuse_teacher_memory=True was given its memory for the gradient; run the teacher again, or call that "
                "loss with reuse_teacher_memory=False. If it was filled in a way that PyTorch does not count (.data, "
                "NumPy, a CUDA graph's replay), say so by torch.autograd.graph.increment_version(feature)"
            )


def fits(levels: Levels) -> bool:
    """Whether every gradient, of its student's dtype, has room in its teacher's feature.

    An inference tensor has none: what is done to the gradient in place later would be an error.
    """
    pairs = zip(levels.student, levels.teacher, strict=True)
    return all(s.dtype == t.dtype and not t.is_inference() for s, t in pairs)


def give_up(teacher: Sequence[Tensor]) -> None:
    """Mark features whose content is, or may soon be, gone; autograd is told as of any change in place."""
    torch.autograd.graph.increment_version(teacher)
    for t in teacher:
        setattr(t.untyped_storage(), _MARK, t._version)


def _was_given_up(t: Tensor) -> bool:
    try:
        storage = t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a wrapper, of torch.func say, has none
        return False
    mark = getattr(storage, _MARK, None)
    return mark is not None and not t.is_inference() and mark == t._version  # else it was filled anew since


def _memory(x: Tensor) -> int:
    storage = x.untyped_storage()
    return storage.data_ptr() or storage._cdata  # a fake tensor's has no address


def _overlaps_itself(x: Tensor) -> bool:
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False
