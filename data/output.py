"""What every converter does last: sample, put pictures in place, write records, say what they are.

Idea. A file of records is looked at once, when it is made, and trusted for months. So it appears
under its name only when it is whole, it never takes the place of another data set's, no picture
that records or cues point to is ever exchanged, and its summary says what a reader would ask:
how many, what kind of answers, how long, how big, what was changed and what is not in it.

In and out.
    kept = even_sample(records, limit)                          each answer in its share
    check_replaceable(path, "easy-vqa")                         or raise: that file is not ours
    place(out / "images/train/0.png", content, origin)          bytes as they are, once
    write_jsonl(path, kept)                                     all of it or nothing
    report(path, kept, sizes, dropped)                          printed

The one equation. Of n rows sorted by answer, the k rows kept are floor((i + 1/2) * n / k); an
answer that n_a rows have gets n_a * k / n of the places, off by less than one.

Run, copy. No command line. This file, and answer_kind from tidy.py; longest_prompt asks model.py
for tokens if a model is given. The standard library and tqdm.

Left out, on purpose. No deleting of files, no locking against a second run into the same folder.
"""
import json
import os
import random
from collections import Counter

from tqdm import tqdm

from data.tidy import answer_kind
from model import Processor


def even_sample(records, limit, seed=0):
    """Keep `limit` records, each answer in its share (see the header), in their old order."""
    if limit is None or limit >= len(records):
        return records
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)                    # which rows of an answer: by chance
    order.sort(key=lambda n: records[n]["answer"])        # stable, so chance survives inside one
    picks = [order[(2 * i + 1) * len(order) // (2 * limit)] for i in range(limit)]
    return [records[n] for n in sorted(picks)]


def check_replaceable(path, source):
    """Refuse a `path` that exists with records of another data set: a mistyped --out, most likely.

    Files of our own are fine to replace. Only the first line is looked at.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    try:
        ours = json.loads(line)["source"] == source
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and does not start with a record of {source}: "
                         f"choose another --out, or move that file away")


def write_atomic(path, content):
    """Write bytes under a temporary name beside `path`, then rename: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)      # records without pictures: nobody made it
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def place(target, content, origin):
    """Write a picture's bytes unless they are there.

    Raises ValueError for a file that is there and differs: records and cues that somebody made
    from the old picture would silently be about another.
    """
    if target.exists():
        if target.read_bytes() != content:
            raise ValueError(f"{target} exists and differs from {origin}: "
                             f"choose a new --out, or delete the old folder first")
        return
    write_atomic(target, content)


def write_jsonl(path, records):
    """Write one JSON object a line, all ASCII, so that no reader's encoding can spoil it."""
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in records).encode("ascii"))


def longest_prompt(path, records, model):
    """Say how long the longest question is, and with `model` the longest prompt, in its tokens."""
    question = max((r["question"] for r in records), key=len)
    text = f"{len(question)} characters of question"
    if model:
        processor = Processor(model)
        lengths = {}
        for record in tqdm(records, desc="tokens", disable=None):
            pictures = [path.parent / name for name in record["images"]]
            lengths[record["id"]] = processor.length({**record, "images": pictures})
        longest = max(lengths, key=lengths.get)
        text += f"; {lengths[longest]} tokens with pictures, {longest}"
    return text


def report(path, records, sizes, dropped, changed=None, first=None, model=None, shown=20):
    """Print what went into one file. The commonest answer's share is the score to beat."""
    first = first or {}
    answers = Counter(r["answer"] for r in records).most_common()
    listing = ", ".join(f"{answer} {count}" for answer, count in answers[:shown])
    more = f", and {len(answers) - shown} more" if len(answers) > shown else ""
    best, count = answers[0]
    kinds = Counter(answer_kind(r["answer"]) for r in records).most_common()
    size_list = ", ".join(f"{n} of {w}x{h}" for (w, h), n in sizes.most_common(shown)) or "none"
    more_sizes = f", and {len(sizes) - shown} other sizes" if len(sizes) > shown else ""
    print(f"{path}: {len(records)} rows")
    print(f"  answers   {len(answers)} distinct: {listing}{more}")
    print(f"  kinds     {', '.join(f'{kind} {n}' for kind, n in kinds)}")
    print(f"  baseline  always {best!r} is right on {100 * count / len(records):.1f} % of rows")
    print(f"  longest   {longest_prompt(path, records, model)}")
    print(f"  pictures  {size_list}{more_sizes}")
    if sizes:
        small, large = (end(sizes, key=lambda size: size[0] * size[1]) for end in (min, max))
        print(f"  extremes  smallest {small[0]}x{small[1]}, largest {large[0]}x{large[1]}")
    for heading, counts in (("changed", changed or {}), ("left out", dropped)):
        print(f"  {heading:8}  " + (", ".join(
            f"{n} {reason}" + (f" (first: {first[reason]})" if reason in first else "")
            for reason, n in counts.items()) or "none"))
