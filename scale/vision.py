"""scale/vision.py - run a frozen vision tower once per picture, not in every forward pass.

The idea.  A training step reads each picture three times: the student to sample, the teacher to
score, the student to learn. If the tower is frozen, and the teacher has the same one, its output is
the same three times. And pictures do not see each other in the tower: attention stays inside a
frame. So its output can take the place of the pixels *in the prompt*, and later code
(batches, hints, a teacher with pictures of its own) need not know:

    prompt.pixels   (patches, 3 * temporal * P * P)      before: the tower's input
                    (visual tokens, (1 + K) * D)         after:  its output, side by side

The one equation.  The tower's output for one visual token: its embedding, and the K DeepStack
features that are added after the first K decoder layers, each of the model's hidden size D
    f = [ merger(h_last) ; merger_1(h_l1) ; ... ; merger_K(h_lK) ]

In:  prompts as model.py makes them, and the models that will read them.
Out: prompts with features for pixels; the models' towers now pass such features through.

Use it alone (torch, and a Qwen3-VL of transformers 5.4 or later):
    prompts = read_once(prompts, student, teacher)        # the student's tower reads
    model(**processor.batch(prompts))                     # in any order, with either model
    del model.model.visual.forward                        # the stock tower again

Why replace the tower's forward(): only transformers 5.18 and later take features as an argument.
What a model does with its tower's output has changed between versions; the two names used here
have not.
Left out: keeping features from one epoch to the next, since they take about as much memory as the
pixels; several processes (sharding.py), where the tower's layers need all ranks at once.
"""
from __future__ import annotations

from dataclasses import replace
from types import MethodType

import torch

# Dimension letters: D hidden size of the language model, K DeepStack features, P patch size.

KINDS = (("pixels", "grids"), ("video", "video_grids"))


@torch.no_grad()
def read_once(prompts: list, *models, rows: int = 32) -> list:
    """The prompts with features in place of pixels, made by the first model's tower.

    models: all models that will read the prompts. The caller makes sure that their towers are
    equal and frozen. rows: prompts per forward pass, which bounds memory. The features wait on the
    CPU, as the pixels did: for the 2B in bf16 they take two thirds of the pixels' bytes.
    """
    for model in models:
        # a method, not a closure: in a deep copy of the model it belongs to the copy's tower
        model.model.visual.forward = MethodType(read_or_hand_through, model.model.visual)
    tower = models[0].model.visual
    out = list(prompts)
    for kind, grids in KINDS:
        having = [row for row, prompt in enumerate(out) if getattr(prompt, kind) is not None]
        for start in range(0, len(having), rows):
            part = having[start:start + rows]
            pixels = [getattr(out[row], kind) for row in part]
            shapes = [shape for row in part for shape in getattr(out[row], grids)]
            got = tower(torch.cat(pixels).to(tower.device, tower.dtype),
                        grid_thw=torch.tensor(shapes, device=tower.device))
            features = torch.cat([got.pooler_output, *got.deepstack_features], dim=1).cpu()
            sizes = [len(x) // tower.spatial_merge_size**2 for x in pixels]
            for row, mine in zip(part, features.split(sizes)):
                out[row] = replace(out[row], **{kind: mine})
    return out


def read_or_hand_through(tower, pixels, grid_thw, **options):
    """The tower's forward(): reads pixels as usual, and returns features unchanged."""
    # Their number tells pixels from features (the width could be equal): the grids count patches,
    # and a visual token is made of four.
    if len(pixels) == int(grid_thw.prod(dim=1).sum()):
        return type(tower).forward(tower, pixels, grid_thw=grid_thw, **options)
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
    merged, *deep = pixels.split(tower.config.out_hidden_size, dim=1)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=deep)
