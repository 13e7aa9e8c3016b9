"""scale/vision.py - a frozen vision tower reads each picture once, not at every forward pass.

The idea.  A step of distillation shows each picture three times: to the student that samples, to
the teacher that scores, to the student that is trained. While the tower is frozen, and the
teacher's is the same, its answer is the same too. And pictures do not see each other in the tower:
attention stays inside a frame. So what it says of a prompt's pictures can take the place of their
pixels *in the prompt*, and what is done with prompts later (batches, hints) need not know of it:

    prompt.pixels   (patches, 3 * temporal * P * P)      before: what the tower reads
                    (visual tokens, (1 + K) * D)         after:  what it says, side by side

The one equation.  The tower's answer for one visual token: its embedding, and the K DeepStack
features that are added behind the first K decoder layers, all of the model's hidden size D
    f = [ merger(h_last) ; merger_1(h_l1) ; ... ; merger_K(h_lK) ]

In:  prompts as model.py makes them, and the models that are going to read them.
Out: prompts with features for pixels; the models' towers now hand such features through.

Use it alone (torch, and a Qwen3-VL of transformers 5.4 or later):
    prompts = read_once(prompts, student, teacher)        # the student's tower reads
    model(**processor.batch(prompts))                     # in any order, with either model
    del model.model.visual.forward                        # the stock tower again

Why this way: transformers 5.18 and later take features as an argument, earlier ones do not; and
what a model makes of its tower's answer changed on the way, but never the two names used here.
Left out: keeping features from one epoch to the next, since they take about as much memory as the
pixels; and several processes (sharding.py), where the tower's layers need all ranks at once.
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

    models: all that are to read the prompts; that their towers are equal and frozen is for the
    caller to see to. rows: prompts read at a time, which bounds memory. The features wait on the
    CPU as the pixels did: for the 2B in bf16 they take two thirds of the pixels' bytes.
    """
    for model in models:
        # a method, not a closure: a deep copy of the model then has its own tower's
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
    """The tower's forward(): pixels are read as ever, features are given back as if just made."""
    # told apart by their number, not by their width, which may agree: the grids count patches, and
    # a visual token is made of four
    if len(pixels) == int(grid_thw.prod(dim=1).sum()):
        return type(tower).forward(tower, pixels, grid_thw=grid_thw, **options)
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
    merged, *deep = pixels.split(tower.config.out_hidden_size, dim=1)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=deep)
