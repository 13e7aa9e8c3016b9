"""scale/offload.py - a teacher that lives in CPU memory and comes to the GPU only to read.

The idea.  A frozen teacher is needed for a third of a step. While the student samples and learns,
its weights can wait in CPU memory. They are copied to the GPU once a step, the teacher reads every
micro-batch, and its hidden states wait in CPU memory until the student has read the same rows.
Nothing is copied back: scoring changes no weight.

In:  a teacher, the student's device, and how a micro-batch is read.
Out: what teacher.teach yields: rows, hidden states (N, D), head (V, D).
Left out: an averaged teacher, which changes at every step and must stay beside the student.
"""
from __future__ import annotations

from contextlib import contextmanager

from teacher import at_work


def carry(tensor, device):
    """The tensor on `device`, itself if it is there already."""
    return tensor.to(device)


@contextmanager
def brought(model, device):
    """The model's weights on `device` meanwhile. The copies are dropped at the end."""
    home = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor, data in home:
            tensor.data = carry(data, device)
        yield model
    finally:
        for tensor, data in home:
            tensor.data = data


def teach(device, teacher, groups, read):
    """teacher.teach for a teacher that is elsewhere: one visit, then its states wait."""
    head = teacher.lm_head.weight.to(device)
    with brought(teacher, device), at_work(teacher):
        waiting = [(rows, read(teacher, rows).cpu()) for rows in groups]
    yield from ((rows, states.to(device), head) for rows, states in waiting)
