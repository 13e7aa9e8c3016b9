"""docs/one_step.py - one training step of the tiny model, by hand; the source of one_step.ipynb.

Run   python docs/one_step.py           prints what the notebook shows, without its pictures
      python docs/make_notebook.py      makes the notebook again, with its outputs
Needs what requirements.txt lists. A cell begins at each mark `# %%`.
"""
# %% [markdown]
# # One training step, by hand
#
# This page takes **one** step of multimodal on-policy distillation. It uses one picture, one
# question and one answer, and shows every number on the way. The model is the tiny Qwen3-VL of this
# repository (1.6 M parameters), so all of it runs on a laptop in less than a minute.
#
# The steps have the same four numbers as `training_step` in `distill.py`:
#
# 1. **Prompts.** The student sees a picture and a question. The teacher also gets a hint.
# 2. **Rollout.** The student answers.
# 3. **Score.** Both models read that answer. At each token we measure how far apart they are.
# 4. **Update.** The student moves a little toward the teacher.
#
# Two parts follow: the *recovery module*, and five ways to break the method with one line.
#
# Letters: B prompts, L tokens of a prompt, T tokens of an answer, V words of the vocabulary.

# %%
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

here = Path(globals().get("__file__", "one_step.ipynb")).resolve()    # a notebook has no __file__
ROOT = next(folder for folder in here.parents if (folder / "distill.py").exists())
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import torch

import cue_recovery
import drawings
import model as qwen
from data import records, toy
from loss import distill_loss
from PIL import Image
from rollout import sample
from teacher import frozen_copy, hint

torch.set_num_threads(1)              # more threads do not help a model of this size
student, processor = qwen.load(qwen.TINY, device="cpu")
teacher = frozen_copy(student)        # "self": the teacher is the student as it was at the start
print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters")

# %% [markdown]
# ## 1) Prompts
#
# The second test question of the drawn world. The model cuts the picture into squares of 16 x 16
# pixels. Each square becomes one **visual token**: here there are nine, in violet.
#
# The hint is the *cue*. It lists what can be seen and matters for the question. It does not give
# the answer: someone still has to count.

# %%
record = records.load(toy.default() / "test.jsonl")[1]
picture = Image.open(record["images"][0])
prompt = processor.prompt(record)                              # what the student reads
hinted = processor.prompt(record, hint(record, "cue"))         # the same, and the hint
_, rows, columns = prompt.grids[0]                             # patches; 2 x 2 make a visual token
rows, columns = rows // 2, columns // 2
drawings.picture(picture, rows, columns, {
    "question": record["question"], "right answer": record["answer"],
    "cue (for the teacher only)": record["cue"]})

# %% [markdown]
# A prompt is a list of token ids. Below is the student's, one box a token, with its id. Grey boxes
# are control tokens, violet ones are the nine squares of the picture, blue ones are the question. A
# dot is a space: it belongs to the token that follows.

# %%
def name(token: int) -> str:
    return processor.tokenizer.decode([token], skip_special_tokens=False)


print(f"the student's prompt: {len(prompt.ids)} tokens")
drawings.prompt([(name(token), token) for token in prompt.ids])

# %% [markdown]
# The teacher's prompt is the same, and one line more (orange). **Both end in the same header**, so
# both models answer from the same place.

# %%
print(f"the teacher's prompt: {len(hinted.ids)} tokens")
drawings.prompt([(name(token), token) for token in hinted.ids])

# %% [markdown]
# ## 2) Rollout
#
# The student answers its own prompt. It *samples*: each token is drawn with the probability that
# the student gives it. That is the "on-policy" in the name: we train on what the student says, not
# on what somebody else wrote. No gradient is kept here.
#
# The seed is chosen so that the student makes its usual mistake. It lists three of the four blue
# shapes, and stops.

# %%
answers = sample(student, processor.batch([prompt]), max_new_tokens=96,
                 generator=torch.Generator().manual_seed(0), **processor.sampling)
T = int(answers.lengths[0])
answer = answers.ids[0, :T].tolist()                           # y_1 ... y_T
print(processor.decode(answer))

# %% [markdown]
# The same answer, token by token. Below each token: the probability with which it was drawn.

# %%
drawings.chips([(name(token), f"{chance:.0%}", "control" if name(token)[:2] == "<|" else "text")
                for token, chance in zip(answer, answers.logprobs[0].exp().tolist())])

# %% [markdown]
# ## 3) Score
#
# Now both models read *the same token ids*: their own prompt, and then the student's answer.
#
# ```text
# column      0       ...   L - 1      L       ...   L + T - 1
# token       <|im_start|>  header     y_1     ...   y_T
# logits of                 y_1        y_2     ...   (what follows)
# ```
#
# The logits in one column are about the *next* token. So the answer is read one column early, from
# L - 1 on. L is different for the two models, since their prompts are. T is the same.

# %%
def join(prompts, answers) -> dict:
    """One batch of (B, L + T) tokens, padded on the left: the answers are its last T columns."""
    return processor.batch([replace(prompt, ids=prompt.ids + ids)
                            for prompt, ids in zip(prompts, answers.ids.tolist())])


def read(model, prompts, answers, early: int = 1):
    """(B, T, V) logits of `model` for each token of the answers, behind these prompts."""
    T = answers.ids.shape[1]
    logits = model(**join(prompts, answers)).logits                            # (B, L + T, V)
    L = logits.shape[1] - T
    return logits[:, L - early:L - early + T]


logits = read(student, [prompt], answers)                      # (1, T, V), with gradients
logits.retain_grad()                                           # to look at them below
with torch.no_grad():
    log_q = read(teacher, [hinted], answers)[0].log_softmax(-1)        # (T, V) teacher
log_p = logits[0].log_softmax(-1)                                      # (T, V) student

# %% [markdown]
# At each token there are two distributions over the whole vocabulary. Their distance is the
# forward KL divergence (the default; `loss.py` has three others):
#
# $$ \mathrm{KL}_n = \sum_v p_T(v) \, \big(\log p_T(v) - \log p_\theta(v)\big) $$
#
# It is 0 where the two agree. It is large where the teacher wants a token that the student finds
# unlikely. In the table, words below half a percent are left out.

# %%
kl = (log_q.exp() * (log_q - log_p)).sum(-1)                   # (T,), with a gradient
nats = kl.tolist()


def likeliest(log_probs, k: int = 3) -> dict[str, float]:
    shares, tokens = log_probs.detach().exp().topk(k)
    return {name(int(token)): float(share) for share, token in zip(shares, tokens)}


def cell(log_probs) -> str:
    shown = [f"{token!r} {share:.0%}" for token, share in likeliest(log_probs).items()
             if share >= 0.005]
    return "  ".join(shown)


print(f" n  {'y_n':14}{'KL':>5}   {'the student, its likeliest three':44}the teacher")
for n, token in enumerate(answer):
    print(f"{n + 1:2}  {name(token)!r:14}{nats[n]:5.2f}   {cell(log_p[n]):44}{cell(log_q[n])}")

# %% [markdown]
# The same as a picture: the deeper the orange, the larger the KL. Most tokens are white. Both
# models agree on them, and nothing will be learnt there.

# %%
worst = int(kl.argmax())
print(f"{nats[worst] / sum(nats):.0%} of the answer's loss is at token {worst + 1}, "
      f"{name(answer[worst])!r}")
drawings.chips([(name(token), f"{one:.2f}", one / max(nats)) for token, one in zip(answer, nats)])

# %% [markdown]
# **The one token that matters.** After three shapes the student is undecided: stop, or go on? The
# teacher has read about a fourth shape, and is sure: go on. Nobody told it to write a comma. Nobody
# marked the answer as wrong. No rule compared it with the right answer. The disagreement about one
# token is all there is.

# %%
drawings.bars({"student": likeliest(log_p[worst], 2), "teacher": likeliest(log_q[worst], 2)})

# %% [markdown]
# **Why this token?** Three readings of the same answer tell where a token comes from. *Cue*: the
# teacher, as above. *Wrong cue*: the teacher is told the cue of another picture. *No picture*: the
# model reads the question alone. For each we print the log-probability of the token there, minus
# the student's.
#
# The sum of the first column is the answer's **nats of privilege**,
# $\log p_T(y \mid X, S) - \log p_\theta(y \mid X)$, with X for picture and question, S for the cue.
# Both models still have the same weights, so it is the pointwise information that the cue gives
# about this answer.

# %%
wrong = processor.prompt(record, hint(records.load(toy.default() / "test.jsonl")[2], "cue"))
blind = processor.prompt(record | {"images": []})
with torch.no_grad():
    others = [read(teacher, [asked], answers)[0].log_softmax(-1) for asked in (wrong, blind)]
why = torch.stack([(one - log_p.detach())[range(T), answer] for one in (log_q, *others)], 1)
print(f" n  {'y_n':12}{'cue':>8}{'wrong cue':>12}{'no picture':>12}      (0.5 nats or more)")
for n in (why.abs().max(1).values >= 0.5).nonzero()[:, 0].tolist():
    print(f"{n + 1:2}  {name(answer[n])!r:12}{why[n, 0]:+8.2f}{why[n, 1]:+12.2f}{why[n, 2]:+12.2f}")
print("    {:12}{:+8.2f}{:+12.2f}{:+12.2f}".format("sum", *why.sum(0).tolist()))

# %% [markdown]
# The full stop is unlikely with *this* cue only: another cue, or no picture at all, even makes it
# likelier. A row number is unlikely without the picture, and the cue agrees with it: the student
# has seen it. The nats of privilege are negative, since the cue speaks against this answer.
#
# The loss is the mean over the tokens of an answer, then over answers (eq. 7). We have one answer.
# `distill_loss` of `loss.py` gives the same numbers. It takes hidden states instead of logits, so
# that a vocabulary of 151,936 words fits into memory.

# %%
loss = kl.mean()
with torch.no_grad():
    hidden = []
    for who, asked in ((student, prompt), (teacher, hinted)):
        states = who.model(**join([asked], answers)).last_hidden_state             # (1, L + T, D)
        hidden.append(states[0, -T - 1:-1])                                        # (T, D)
    same = distill_loss(*hidden, student.lm_head.weight, teacher.lm_head.weight)   # (T,)
print(f"loss {loss.item():.4f} nats per token")
print(f"distill_loss gives the same: {torch.allclose(same, kl, atol=1e-4)}")

# %% [markdown]
# Backward. The gradient of the KL in the logits has a simple form: **student minus teacher**,
# $p_\theta - p_T$. A positive number pushes the token down, a negative one pushes it up.

# %%
loss.backward()
pull = T * logits.grad[0, worst]                               # T: undo the mean over tokens
for token in (".", ","):
    index = processor.encode(token)[0]
    print(f"gradient at {token!r}: {float(pull[index]):+.3f}    student minus teacher: "
          f"{(log_p[worst].exp() - log_q[worst].exp())[index].item():+.3f}")

# %% [markdown]
# ## 4) Update
#
# Clip the gradient, then AdamW. The rate is a fifth of the default run's, since this batch has one
# answer and the default run has 48.

# %%
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
optimizer.step()
optimizer.zero_grad()
with torch.no_grad():
    after = read(student, [prompt], answers)[0].log_softmax(-1)
print(f"gradient norm {float(norm):.2f}, clipped to 1")
drawings.bars({"student before": likeliest(log_p[worst], 2),
               "student after one step": likeliest(after[worst], 2),
               "teacher": likeliest(log_q[worst], 2)})

# %% [markdown]
# The student has learnt to go on. No hint was in its prompt, and none is needed from now on. Does
# it also count right now?

# %%
greedy = sample(student, processor.batch([prompt]), max_new_tokens=96, temperature=0,
                **processor.sampling)
print(processor.decode(greedy.ids[0]))

# %% [markdown]
# Not yet. It finds the fourth blue shape, but now it also takes the red square for a blue one. One
# answer taught it one thing: *go on*. Where to stop, it must learn from other pictures. This is why
# a step has 48 prompts, and a run has 140 steps. (The README shows what such a run reaches.)
#
# ## The recovery module
#
# The student must find in the picture what the teacher was told in words. The module helps it. At
# a few layers, while the prompt is read, the first token of the sequence (the *attention sink*)
# asks all visual tokens one question and adds the answer to itself (eq. 3-5):
#
# $$ h_{sink} \leftarrow h_{sink} + \mathrm{Attn}(h_{sink} W_Q,\; V W_K,\; V W_V) \, W_O $$
#
# Every later token can read the first one, so the answer's tokens can too. Here are the four steps
# again, now for several records at a time. Only the module is trained: `--train cue`.

# %%
def take_step(student, records, optimizer, generator) -> None:
    # 1) prompts
    prompts = [processor.prompt(record) for record in records]
    hinted = [processor.prompt(record, hint(record, "cue")) for record in records]
    # 2) rollout
    answers = sample(student, processor.batch(prompts), max_new_tokens=96, generator=generator,
                     **processor.sampling)
    # 3) score
    log_p = read(student, prompts, answers).log_softmax(-1)                        # (B, T, V)
    with torch.no_grad():
        log_q = read(teacher, hinted, answers).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)                                   # (B, T)
    loss = ((kl * answers.mask).sum(1) / answers.lengths).mean()                   # eq. 7
    loss.backward()
    # 4) update
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# %% [markdown]
# To see whether it learns, we keep 16 other records aside. The base answers them once, and we
# measure how far a student is from the teacher on these answers.

# %%
world = records.load(toy.default() / "train.jsonl")
kept = world[400:416]
prompts = [processor.prompt(record) for record in kept]
hints = [processor.prompt(record, hint(record, "cue")) for record in kept]
spoken = sample(teacher, processor.batch(prompts), max_new_tokens=96, temperature=0,
                **processor.sampling)


@torch.no_grad()
def losses(student, teacher, told=hints) -> torch.Tensor:
    """(16,) the loss of each answer that was kept aside."""
    log_p = read(student, prompts, spoken).log_softmax(-1)
    log_q = read(teacher, told, spoken).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (kl * spoken.mask).sum(1) / spoken.lengths


# %% [markdown]
# Before training, W_O is zero: the module looks at the picture, and changes nothing. After twenty
# steps on 16 records each, it has begun to choose. The numbers are percent of the sink's attention,
# as the mean of four heads.

# %%
def attach(model):
    """Add the module, and make it the only part that is trained."""
    cue = cue_recovery.attach(model.requires_grad_(False), every=2)
    return cue.requires_grad_(True)


@torch.no_grad()
def attention(model) -> dict[int, torch.Tensor]:
    """{layer: (rows, columns)}, the sink's attention to the squares of our picture."""
    model.cue_recovery.keep_attention = True
    batch = processor.batch([prompt])
    model(**batch)
    model.cue_recovery.keep_attention = False
    squares = batch["input_ids"][0] == processor.image_id                          # (L,)
    return {layer: map[0].mean(0)[squares].view(rows, columns)                     # of (1, H, L)
            for layer, map in model.cue_recovery.attention.items()}


student = frozen_copy(teacher)                                 # the base again
cue = attach(student)
before = attention(student), float(losses(student, teacher).mean())
optimizer = torch.optim.AdamW(cue.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)
for n in range(20):
    take_step(student, world[16 * n:16 * n + 16], optimizer, generator)
print(f"loss on the records kept aside: {before[1]:.3f} -> "
      f"{float(losses(student, teacher).mean()):.3f}")
drawings.maps(picture, {"before": before[0], "after": attention(student)})

# %% [markdown]
# The first token stands before the question and cannot see it. So this map is the same for every
# question about this picture. (`--sink last` lets the last token of the prompt ask instead.) Twenty
# steps make the module choosy. They do not yet make it wise: docs/results.md says what a whole run
# gains.
#
# Last, the promise that makes the module safe to attach. With W_O = 0 the student **is** the base
# model: every logit is the same number, bit for bit.

# %%
fresh = frozen_copy(teacher)
attach(fresh)
batch = processor.batch([prompt])
with torch.no_grad():
    print(torch.equal(fresh(**batch).logits, teacher(**batch).logits))

# %% [markdown]
# ## Five sabotages
#
# Each of these is one wrong line. None of them raises an error, and a run goes on. First guess what
# happens to the loss, then look. Each time a test of this repository notices: we copy the code,
# change the line in the copy, and run that one test.

# %%
def sabotage(file: str, line: str, wrong: str, test: str) -> None:
    """Change one line in a copy of the code, and run one test there. It should fail."""
    with tempfile.TemporaryDirectory() as copy:
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *qwen.TINY.iterdir()):
            target = Path(copy) / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        text = (ROOT / file).read_text(encoding="utf-8")
        if text.count(line) != 1:
            raise ValueError(f"{file} has {text.count(line)} times {line!r}, expected one")
        (Path(copy) / file).write_text(text.replace(line, wrong), encoding="utf-8")
        got = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
                             cwd=copy, capture_output=True, text=True)
    reasons = [said[1:].strip() for said in got.stdout.splitlines() if said.startswith("E ")]
    verdict = {0: "passes: NOT caught", 1: "fails: caught"}.get(got.returncode, got.stdout[-2000:])
    whole = next(found for found in text.splitlines() if line in found).strip()
    print(f"in {file}\n  - {whole}\n  + {whole.replace(line, wrong)}\n{test}\n  {verdict}",
          *reasons[:1], sep="\n  ")


# %% [markdown]
# ### Sabotage 1: read one column late
#
# What if the answer is read at the columns where it *stands*, instead of one early?

# %%
with torch.no_grad():
    # the teacher without a hint is the student as it was before the update
    late_p, late_q = (read(teacher, [asked], answers, early=0)[0].log_softmax(-1)
                      for asked in (prompt, hinted))
    late = (late_q.exp() * (late_q - late_p)).sum(-1)          # (T,)
print(f"loss {loss.item():.4f} -> {float(late.mean()):.4f}")
print(f"at the last place, which is behind the stop token: {float(late[-1]):.3f} nats")

# %% [markdown]
# The loss is the same, to four digits. Both models are read late, so they are still compared at the
# same place. Only the two ends differ: the first token is never taught, and what is taught last
# comes after the answer's end. Here both models are sure at both ends, so the loss shows nothing.
# With `--loss sampled` the bug is worse: each token is looked up in the distribution of the next.

# %%
sabotage("distill.py", "- (end - 1)", "- end",
         "tests/test_distill.py::test_step_loss_equals_scoring_each_row_alone")

# %% [markdown]
# ### Sabotage 2: swap the KL
#
# KL is not symmetric. What if student and teacher change places?

# %%
swapped = (log_p.exp() * (log_p - log_q)).sum(-1).detach()     # (T,) KL(student || teacher)
print(f"loss {loss.item():.4f} -> {float(swapped.mean()):.4f}")
print(f"at the full stop {nats[worst]:.2f} -> {float(swapped[worst]):.2f} nats")

# %% [markdown]
# It is another objective: reverse KL, which asks "where do I go that the teacher would not?" As a
# choice it is fine (`--loss reverse_kl`). By accident it is not: `loss.py` writes its gradients by
# hand, so here their sign turns too, and the student runs away from the teacher.

# %%
sabotage("loss.py", "def divergence(log_p, log_q, kind", "def divergence(log_q, log_p, kind",
         "tests/test_loss.py::test_forward_and_reverse_are_not_swapped")

# %% [markdown]
# ### Sabotage 3: leave the module on in the teacher
#
# With `--train cue` one frozen backbone can be student *and* teacher, if its module is switched off
# while it teaches. What if somebody forgets?

# %%
for when, model in (("at step 0", fresh), ("after twenty steps", student)):
    print(f"{when:20}loss {float(losses(model, teacher).mean()):.4f} -> "
          f"{float(losses(model, model).mean()):.4f}")

# %% [markdown]
# At step 0 nothing happens, since W_O is zero. Later the teacher moves whenever the student does:
# it carries the student's own mistakes. The loss hardly shows it.

# %%
sabotage("teacher.py", "stack.enter_context(getattr(teacher, name).off())", "pass",
         "tests/test_teacher.py::test_a_student_at_work_as_its_teacher_is_the_base_model")

# %% [markdown]
# ### Sabotage 4: average over micro-batches
#
# A step's answers do not fit into memory at once, so they are scored in groups. Each answer must
# count 1 / (all answers of the step). What if each *group* is averaged by itself?

# %%
each = losses(student, teacher)[:3]
print("loss of three answers:", [round(float(nats), 3) for nats in each])
for groups in ([[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]):
    right = sum(float(each[group].sum()) / 3 for group in groups)
    wrong = sum(float(each[group].mean()) for group in groups)
    print(f"groups {groups}:  right {right:.3f}   averaged by group {wrong:.3f}")

# %% [markdown]
# The right sum does not know how the step was cut. The wrong one grows with the number of groups,
# and a group of one answer counts as much as a group of two. The size of your GPU would change the
# learning rate.

# %%
sabotage("distill.py", "config.batch_size * K * lengths", "len(rows) * lengths",
         "tests/test_distill.py::test_step_accumulation_does_not_change_the_gradient")

# %% [markdown]
# ### Sabotage 5: start W_O at random
#
# Every other matrix starts at random. Why not this one?

# %%
for block in fresh.cue_recovery.blocks.values():              # as wide as the other three matrices
    weight = block.output.weight
    torch.nn.init.normal_(weight, std=len(weight)**-0.5, generator=torch.Generator().manual_seed(0))
print(f"loss at step 0          {float(losses(teacher, teacher).mean()):.4f} -> "
      f"{float(losses(fresh, teacher).mean()):.4f}")
print(f"distance from the base  {float(losses(teacher, teacher, prompts).mean()):.4f} -> "
      f"{float(losses(fresh, teacher, prompts).mean()):.4f}")

# %% [markdown]
# Again the loss says little; here it is even smaller, by chance. But the student is no longer the
# base (last line: both without a hint). It has changed before it has learnt anything. What it gains
# or loses later can no longer be told apart from what the noise did.

# %%
sabotage("cue_recovery.py", "nn.init.zeros_(block.output.weight)",
         "nn.init.normal_(block.output.weight, std=config.hidden_size**-0.5, generator=generator)",
         "tests/test_cue_recovery.py::test_identity_at_the_start")

# %% [markdown]
# That is all of the method. What `distill.py` adds is a loop, settings, and a table at the end:
# `python distill.py` takes these four steps 140 times. The README names the order in which to read
# the seven files.
