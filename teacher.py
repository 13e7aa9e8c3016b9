"""teacher.py - the teacher: the same model (or a bigger one) that is told one thing more.

The idea.  Student and teacher read the same question, and the teacher scores the student's own
tokens. What makes it a teacher is its privilege p: one line behind the question, or a better look.

    student   <picture> How many red shapes are there?
    teacher   <picture> How many red shapes are there?\\n[Hint]: There is a red circle at ...

    privilege   what the teacher is told              where it is from
    none        no hint: the teacher must be a bigger model          (OPD)
    answer      the reference answer                                 (OPSD)
    rationale   reasoning that leads to the answer                   (OPSD, paper section 3.1)
    cue         the visible evidence, never the answer               (ViCuR)
    view        other pictures: larger, marked, sharp; no hint       (ours)
    view+cue    both

The one equation.  With an answer as privilege the teacher's next token depends on something that
the student can never see, I(Y_t; R | X, Y_<t) > 0, and the student learns to sound informed. A cue
is a function of the picture, S = f(X): ideally I(Y_t; S | X, Y_<t) = 0 (eq. 1-2), all learnable.

In:  a record and the name of a privilege; a student model.  Out: a hint, the record as the teacher
     sees it; a frozen teacher model.
Use it alone: imports torch only. Cues are written, and audited for leaks, by data/cues.py.

Choices a reader may wonder about
1) The teacher never has the recovery module, is in eval mode and has no gradients.
2) A teacher with another vocabulary is refused: every id must mean the same string in both models,
   since probabilities of ids are compared. Equal sizes are not enough.
"""
from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager

import torch

# privilege -> the fields of a record that it cannot do without
NEEDS = {"none": (), "answer": ("answer",), "rationale": ("rationale",), "cue": ("cue",),
         "view": ("teacher_images",), "view+cue": ("teacher_images", "cue")}
PRIVILEGES = tuple(NEEDS)
ADDED = "cue_recovery", "lora"      # what is attached to a model and trained beside it


def hint(record: dict, privilege: str) -> str | None:
    """The teacher's extra line for this record; None if the privilege has none.

    Raises ValueError if the record lacks what the privilege needs: a teacher that silently falls
    back to the plain prompt teaches nothing, at a loss of zero.
    """
    if privilege not in PRIVILEGES:
        raise ValueError(f"privilege {privilege!r}, expected one of {', '.join(PRIVILEGES)}")
    name = privilege.removeprefix("view+")
    if name in ("none", "view"):
        return None
    told = record.get(name)
    text = "" if told is None else str(told).strip()        # an answer may be 0
    if not text:
        raise ValueError(f"record {record.get('id', '?')} has no {name}, "
                         f"which --privilege {privilege} needs")
    return text


def seen(record: dict, privilege: str) -> dict:
    """The record as the teacher sees it: with a view its teacher_images in place of images.

    The question, and a video if there is one, stay. Raises ValueError if it has none.
    """
    if not privilege.startswith("view"):
        return record
    if not record.get("teacher_images"):
        raise ValueError(f"record {record.get('id', '?')} has no teacher_images, "
                         f"which --privilege {privilege} needs")
    return {**record, "images": record["teacher_images"]}


def frozen_copy(student):
    """A frozen copy of the student as it is now, without the recovery module."""
    teacher = copy.deepcopy(student)
    for name in ADDED:
        if hasattr(teacher, name):
            getattr(teacher, name).detach()
    return teacher.eval().requires_grad_(False)


@contextmanager
def at_work(teacher):
    """The teacher while it scores: eval mode, no gradients, no module. Everything is left as found.

    A teacher may be the student itself, if only what was added to it is trained: that is off then.
    """
    modes = [(module, module.training) for module in teacher.modules()]     # a part may differ
    with ExitStack() as stack, torch.no_grad():
        for name in ADDED:
            if hasattr(teacher, name):
                stack.enter_context(getattr(teacher, name).off())
        try:
            yield teacher.eval()
        finally:
            for module, training in modes:
                module.training = training


def teach(teacher, groups, read):
    """Yields each micro-batch's rows, the teacher's states (N, D) for them, and its head (V, D).

    read(teacher, rows) -> hidden states that predict the response tokens of these rows.
    """
    for rows in groups:
        with at_work(teacher):
            states = read(teacher, rows)
        # after at_work: if teacher and student are one model, the student reads with its module on
        yield rows, states, teacher.lm_head.weight


@torch.no_grad()
def update_ema(teacher, student, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place; decay 0.99 moves it slowly.

    The teacher is float32, whatever the student is: in bf16 a hundredth of a small difference is
    rounded away, and the average would stay where it started.
    """
    theirs = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"an average in {weight.dtype} would not move: the teacher must be "
                             "float32, as frozen_copy(student).float() is")
        weight.lerp_(theirs[name].to(weight.dtype), 1 - decay)


def check_same_vocabulary(student: dict[str, int], teacher: dict[str, int],
                          student_rows: int, teacher_rows: int) -> None:
    """Refuse a teacher whose token-to-id map or number of logits differs from the student's.

    student, teacher: token -> id; rows: length of a logit vector.
    """
    if student_rows != teacher_rows:
        raise ValueError(f"the student has {student_rows} logits and the teacher {teacher_rows}: "
                         "their distributions cannot be compared")
    if student != teacher:
        differing = [t for t in student.keys() | teacher.keys() if student.get(t) != teacher.get(t)]
        token = min(differing)
        raise ValueError(f"student and teacher name {len(differing)} tokens differently, such as "
                         f"{token!r}: id {student.get(token)} and {teacher.get(token)}")


if __name__ == "__main__":
    raise SystemExit("teacher.py is no command: cues are made by `python data/cues.py write`, and "
                     "checked by `python data/cues.py audit`")
