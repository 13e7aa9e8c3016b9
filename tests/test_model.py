"""model.py: prompts, pictures, batches and checkpoints, each held against what transformers does.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_model.py

"Reference" below is the slow, general way: the chat template through Jinja, the image processor of
transformers, the model's own get_rope_index. Names with a pitfall number are bugs others had.
"""
import copy
import doctest
import functools
import io
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cue_recovery
import model as qwen
from scale import checkpoint, checks

REAL = qwen.TINY.parents[2] / "shared" / "qwen3-tokenizer"
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TAIL = ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
TEXTS = ["How many red shapes are there?", "", " leading and trailing  ", "\n\nblank lines\n",
         "tabs\tand\r\nreturns", "日本語、émigré, 🙂🏽, e\u0301",
         "Find $x$: \\frac{1}{2}x^2 = 8.", "<b>not | a < control > token</b>",
         "12345678901234567890"]


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A processor with Qwen3's own tokenizer and Qwen3-VL's own ids and picture settings."""
    if not (REAL / "tokenizer.json").exists():
        pytest.skip("shared/qwen3-tokenizer is not here")
    folder = tmp_path_factory.mktemp("real")
    write = {"config.json": {"model_type": "qwen3_vl", "image_token_id": 151655,
                             "video_token_id": 151656, "text_config": {"vocab_size": 151936},
                             "vision_config": {"patch_size": 16, "spatial_merge_size": 2}},
             "preprocessor_config.json": {"patch_size": 16, "merge_size": 2, **HALF, "size": {
                 "shortest_edge": 65536, "longest_edge": 16777216}},
             "generation_config.json": {"eos_token_id": [151645, 151643], "pad_token_id": 151643}}
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer.json").symlink_to(REAL / "tokenizer.json")
    return qwen.Processor(folder)


@pytest.fixture(params=["tiny", "real"])
def processor(request, loaded):
    """The processor of the tiny checkpoint, then the one with the real tokenizer."""
    return loaded[1] if request.param == "tiny" else request.getfixturevalue("real")


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_pixels(processor, images):
    """Qwen's image processor of transformers, on Pillow."""
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor)
    try:
        hf = kind(patch_size=processor.patch, merge_size=processor.merge, **HALF,
                  min_pixels=processor.min_pixels, max_pixels=processor.max_pixels)
    except ImportError:
        pytest.skip("this transformers (5.4) has no image processor without torchvision")
    out = hf(images=images, return_tensors="pt")
    return out["pixel_values"], [tuple(grid) for grid in out["image_grid_thw"].tolist()]


@functools.cache
def reference_tokenizer(folder):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def reference_ids(processor, record, hint=None, template=None):
    """The chat template through transformers, then one pad a visual token."""
    hf = reference_tokenizer(processor.folder)
    text = record["question"] + ("" if hint is None else f"\n[Hint]: {hint}")
    if record["images"]:
        text = [{"type": "image"}] * len(record["images"]) + [{"type": "text", "text": text}]
    messages = [{"role": "system", "content": qwen.SYSTEM}, {"role": "user", "content": text}]
    text = hf.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False,
        chat_template=template or (qwen.TINY / "chat_template.jinja").read_text())
    grids = reference_pixels(processor, record["images"])[1] if record["images"] else []
    first, *others = text.split("<|image_pad|>")
    pads = ["<|image_pad|>" * (t * h * w // processor.merge**2) for t, h, w in grids]
    text = first + "".join(pad + other for pad, other in zip(pads, others, strict=True))
    return hf(text, add_special_tokens=False)["input_ids"]


def copy_folder(folder, **changes):
    """The tiny checkpoint in `folder`; changes: file stem = dict of top-level keys to replace."""
    shutil.copytree(qwen.TINY, folder)
    for stem, keys in changes.items():
        path = folder / f"{stem}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def logits_of(model, processor, prompts, side="left"):
    with torch.no_grad():
        return model(**processor.batch(prompts, side)).logits


def test_attention_does_not_plan_anew_for_each_length():
    """cuDNN's attention took 45 ms more for each column count it had not met (H200, torch 2.11)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    qwen.load(qwen.TINY, device="meta")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_doctests():
    result = doctest.testmod(qwen)
    assert result.attempted >= 3 and result.failed == 0


# ---------------------------------------------------------------------------- prompts

@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("hint", [None, "a red circle at row 1\n column 2"])
def test_prompt_is_the_chat_template(processor, images, hint):
    pictures = [noise(60 + 40 * n, 100, n) for n in range(images)]
    for text in TEXTS:
        record = {"images": pictures, "question": text}
        assert processor.prompt(record, hint).ids == reference_ids(processor, record, hint)


def test_text_prompt_is_the_template_that_ships_with_qwen3(real):
    template = json.loads((REAL / "tokenizer_config.json").read_text())["chat_template"]
    for text in TEXTS:
        record = {"images": [], "question": text}
        assert real.prompt(record).ids == reference_ids(real, record, template=template)


# A template of the shape that Qwen3-VL's own has: tools, a system turn, pictures counted, a switch.
LONG = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set pictures = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' or 'image' in part %}
                    {%- set pictures.count = pictures.count + 1 %}
                    {%- if add_vision_id %}Picture {{ pictures.count }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif 'text' in part %}
                    {{- part.text }}
                {%- else %}
                    {%- continue %}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
IF, END = "{%- if add_generation_prompt %}\n    ", "\n{%- endif %}"
ENDINGS = {     # how a template may end -> what it puts behind the assistant's header
    IF + "{{- '<|im_start|>assistant\\n' }}" + END: "",                           # Instruct
    IF + "{{- '<|im_start|>assistant\\n<think>\\n' }}" + END + "\n": "<think>\n",  # Thinking
    IF + "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and "
         "enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
         "    {%- endif %}" + END: "",                                            # Qwen3
    IF + "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and "
         "enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
         "    {%- else %}\n        {{- '<think>\\n' }}\n    {%- endif %}" + END: "<think>\n",
    "{% if add_generation_prompt %}{{ \"<|im_start|>assistant\n\" }}{% endif %}": "",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\n{% endif %}": "\n",
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n<think>\n  {% endif %}": "<think>\n"}


def with_ending(ending):
    return (qwen.TINY / "chat_template.jinja").read_text().partition(
        "{% if add_generation_prompt")[0] + ending


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("beginning", ["", LONG])
def test_the_prompt_ends_as_the_checkpoints_template_does(processor, tmp_path, ending, beginning):
    """Thinking checkpoints put <think> behind the assistant's header. Prompts without it silently
    were not the model's own. Held against Jinja; the mark is one token where the model has one."""
    template, own = beginning + ending if beginning else with_ending(ending), copy.copy(processor)
    (tmp_path / "chat_template.jinja").write_text(template)
    own.answer_prefix = qwen._answer_prefix(tmp_path)     # all that a Processor takes over from it
    assert own.answer_prefix == ENDINGS[ending]
    for record, hint in (({"images": [], "question": "Why?"}, None),
                         ({"images": [noise(60, 90)], "question": "Why?"}, "look")):
        ids = own.prompt(record, hint).ids
        assert ids == reference_ids(processor, record, hint, template) and len(ids) == own.length(
            record, hint)
    think = own.control.get("<think>")
    assert (think in ids) == (think is not None and ENDINGS[ending] == "<think>\n")


@pytest.mark.parametrize("template, reason", [
    (with_ending("{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"), "start.>model"),
    (with_ending("{% if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"),
     "assistant' of a question"),                       # the dash eats the line's end
    (with_ending(IF + "{{- '<|im_start|>assistant\\n' + start }}" + END), "rendered.* 'start' is undefined"),
    (with_ending(""), "im_end.>.n' of a question"),
    (with_ending("{% if add_generation_prompt %}"), "TemplateSyntaxError"),
    (with_ending(IF + "{{ raise_exception('no') }}" + END), "'raise_exception' is undefined"),
    (with_ending(IF + "{{ messages.append(1) }}" + END), "SecurityError"),
    (with_ending("").replace("{{ part.text }}", "{{ part.text | trim('W') }}"), "hy.<"),
    ("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}<|im_end|>",
     "makes '<.im_start.>assistant"),
    ("[INST] {{ messages[0].content }} [/INST]", "makes '.INST")])
def test_an_unknown_template_is_refused(tmp_path, template, reason):
    folder = copy_folder(tmp_path / "own")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"own/chat_template.jinja: this chat template .*{reason}"):
        qwen.Processor(folder)


@pytest.mark.parametrize("name, value", [
    ("chat_template.jinja", str), ("chat_template.json", lambda text: {"chat_template": text}),
    ("tokenizer_config.json", lambda text: {"chat_template": text}),
    ("tokenizer_config.json", lambda text: {"chat_template": [
        {"name": "tools", "template": "?"}, {"name": "default", "template": text}]})])
def test_a_template_is_found_wherever_it_stands_and_saved(tiny, tmp_path, name, value):
    folder, template = copy_folder(tmp_path / "start"), with_ending(list(ENDINGS)[1])
    (folder / "chat_template.jinja").unlink()
    there = value(template)
    (folder / name).write_text(there if isinstance(there, str) else json.dumps(there))
    processor = qwen.Processor(folder)
    checkpoint.save_model(tiny[0], processor, tmp_path / "out")
    assert qwen.Processor(tmp_path / "out").answer_prefix == processor.answer_prefix == "<think>\n"


@pytest.mark.parametrize("hint", [None, "a red circle"])
def test_an_instruction_stands_between_question_and_hint(processor, hint):
    """How to answer is asked of student and teacher alike; records without it stay as they were."""
    record = {"images": [noise(64, 64)], "question": "How many?"}
    asked = processor.prompt({**record, "instruction": "Box the answer."}, hint)
    assert asked.ids == reference_ids(
        processor, {**record, "question": "How many?\nBox the answer."}, hint)
    assert processor.prompt({**record, "instruction": ""}, hint).ids == processor.prompt(
        record, hint).ids != asked.ids
    assert processor.prompt({**record, "instruction": "Box the answer."}, hint, asked).ids == (
        asked.ids)


def test_decode_copies_a_tensor_once(loaded, monkeypatch):
    """int() of each element of a tensor on a GPU waits for the GPU: 524,288 times a step."""
    ids = torch.tensor(loaded[1].encode("four blue shapes"))
    monkeypatch.setattr(torch.Tensor, "__int__", None)
    monkeypatch.setattr(torch.Tensor, "__iter__", None)
    assert loaded[1].decode(ids) == loaded[1].decode(ids.tolist()) == "four blue shapes"


def test_tiny_folder_is_a_tokenizer_of_transformers():
    """What other software loads from the folder gives the same prompt by its own template."""
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(qwen.TINY)
    messages = [{"role": "system", "content": qwen.SYSTEM}, {"role": "user", "content": TEXTS[0]}]
    text = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ours = qwen.Processor(qwen.TINY).prompt({"images": [], "question": TEXTS[0]}).ids
    assert hf(text, add_special_tokens=False)["input_ids"] == ours


def test_control_strings_in_a_record_stay_text(processor):
    """A question that contains "<|im_end|>" must not end the turn, nor "<|image_pad|>" ask for a
    picture: for every control token the prompt has those of the format, and no more."""
    control = set(processor.control.values())
    assert len(control) >= 7
    plain = processor.prompt({"images": [], "question": "a"}, hint="b").ids
    skeleton = [i for i in plain if i in control]
    for name in processor.control:
        text = f" {name} {name}x\n{name * 2}\n"
        ids = processor.encode(text)
        assert not control & set(ids)
        assert processor.decode([*ids, *processor.stop_ids, processor.pad_id]) == text
        asked = processor.prompt({"images": [], "question": text}, hint=text).ids
        assert [i for i in asked if i in control] == skeleton


def test_several_pictures_keep_their_order(processor):
    pictures = [noise(300, 90), noise(64, 200, 1), noise(128, 128, 2)]
    alone = [processor.prompt({"images": [p], "question": ""}) for p in pictures]
    prompt = processor.prompt({"images": pictures, "question": "Which?"})
    assert prompt.grids == [p.grids[0] for p in alone] and len(set(prompt.grids)) == 3
    assert torch.equal(prompt.pixels, torch.cat([p.pixels for p in alone]))
    runs = "".join("*" if i == processor.image_id else " " for i in prompt.ids).split()
    assert [len(run) for run in runs] == [t * h * w // 4 for t, h, w in prompt.grids]


def test_pitfall_2_teacher_and_student_share_header_and_prefix(processor):
    """OPSD#10: the teacher's prompt ended in another assistant header than the student's, so that
    the first tokens of every answer were scored as a disagreement. Only the hint may differ."""
    record = {"images": [noise(96, 64)], "question": "Which shape is red"}
    student, teacher = processor.prompt(record), processor.prompt(record, "a circle")
    tail = processor.encode(*[processor.control.get(t, t) for t in TAIL])
    start = len(student.ids) - len(tail)
    assert student.ids[start:] == teacher.ids[-len(tail):] == tail
    assert student.ids[:start] == teacher.ids[:start]
    assert teacher.ids[start:-len(tail)] == processor.encode("\n[Hint]: a circle")
    assert student.grids == teacher.grids and torch.equal(student.pixels, teacher.pixels)


def test_pitfall_3_stop_ids_are_a_set_from_the_generation_config(processor, tmp_path):
    """ms-swift#9526: one model stops at 151645, another at 151643 too; a single eos id is wrong.
    The config may hold a list, one number, null or nothing; <|im_end|> always stops."""
    end, text = processor.control["<|im_end|>"], processor.control["<|endoftext|>"]
    assert processor.stop_ids == {end, text}
    for number, (value, expected) in enumerate(
            [(473, {473, 475}), ([473, 3], {3, 473, 475}), (None, {475}), ([], {475})]):
        folder = copy_folder(tmp_path / str(number), generation_config={"eos_token_id": value})
        assert qwen.Processor(folder).stop_ids == expected
    (folder / "generation_config.json").unlink()
    assert qwen.Processor(folder).stop_ids == {475}


def test_pitfall_6_vision_ids_are_never_sampled(processor):
    """verl#7038, EasyR1#110: the policy sampled <|image_pad|>, and scoring died with "image
    features and image tokens do not match". Banned: control ids but the stops, unused rows."""
    banned, stop = set(processor.banned_ids), processor.stop_ids
    control = {i for name, i in processor.control.items() if name.startswith("<|")}
    rows = json.loads((processor.folder / "config.json").read_text())["text_config"]["vocab_size"]
    unused = set(range(rows)) - set(processor.vocab.values())
    assert unused and {processor.image_id, processor.video_id} <= control - stop
    assert banned == (control - stop) | unused
    assert not banned & set(processor.encode("".join(TEXTS)))


# ---------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("size", [(48, 64), (700, 500), (333, 97), (16, 16), (1, 1), (5, 3),
                                  (1, 200), (200, 1), (600, 3)])
def test_pixels_are_those_of_transformers(loaded, size):
    """From one pixel to more than the budget: the same grid, and not a bit of difference."""
    _, processor = loaded
    prompt = processor.prompt({"images": [noise(*size)], "question": ""})
    pixels, grids = reference_pixels(processor, [noise(*size)])
    assert prompt.grids == grids and (prompt.pixels - pixels).abs().max() == 0


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "1", "CMYK", "RGBA", "YCbCr", "I"])
def test_pixels_of_every_mode_are_those_of_transformers(loaded, mode):
    """PITFALLS 15. Transparent pictures agree from transformers 5.22, which puts them on white."""
    if "A" in mode and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22):
        pytest.skip("this transformers drops the alpha channel")
    image = noise(56, 40)
    if "A" in mode:
        image.putalpha(noise(56, 40, 1).convert("L"))
    image = image.convert(mode)
    pixels, _ = reference_pixels(loaded[1], [image])
    prompt = loaded[1].prompt({"images": [image], "question": ""})
    assert (prompt.pixels - pixels).abs().max() == 0


def test_real_patch_size_is_that_of_transformers(real):
    pixels, grids = reference_pixels(real, [noise(400, 300), noise(50, 700, 1)])
    prompt = real.prompt({"images": [noise(400, 300), noise(50, 700, 1)], "question": ""})
    assert prompt.grids == grids and torch.equal(prompt.pixels, pixels)


@pytest.mark.parametrize("tag, stored", [
    (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180),
    (4, Image.Transpose.FLIP_TOP_BOTTOM), (5, Image.Transpose.TRANSPOSE),
    (6, Image.Transpose.ROTATE_90), (7, Image.Transpose.TRANSVERSE),
    (8, Image.Transpose.ROTATE_270)])
def test_pitfall_15_exif_rotation_is_undone(loaded, tmp_path, tag, stored):
    """Qwen3-VL#1352: a phone's photograph reached the model lying on its side. A file and an
    opened picture, turned by the tag, are the upright one; length() knows the swapped sides."""
    _, processor = loaded
    upright, exif = noise(96, 32), Image.Exif()
    exif[0x0112] = tag
    upright.transpose(stored).save(tmp_path / "photo.png", exif=exif)
    expected = processor.prompt({"images": [upright], "question": "?"})
    for source in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        record = {"images": [source], "question": "?"}
        prompt = processor.prompt(record)
        assert prompt.grids == expected.grids and torch.equal(prompt.pixels, expected.pixels)
        assert processor.length(record) == len(prompt.ids)
    assert qwen.to_rgb(Image.open(tmp_path / "photo.png")).tobytes() == upright.tobytes()


def test_nonsense_orientation_is_ignored(loaded, tmp_path):
    """Cameras write what the standard does not know (9, or text where a number belongs); the
    picture is then taken as it is."""
    for entry in (b"\0\3\0\0\0\1\0\x09\0\0", b"\0\2\0\0\0\3up\0\0"):   # SHORT 9, ASCII "up"
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12" + entry + bytes(4)
        noise(32, 48).save(tmp_path / "odd.png", exif=exif)
        assert Image.open(tmp_path / "odd.png").getexif()[0x0112] in (9, "up")
        prompt = loaded[1].prompt({"images": [tmp_path / "odd.png"], "question": ""})
        assert prompt.grids == [(1, 6, 4)]


@pytest.mark.parametrize("top", [65535, 4000, 200])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, top):
    """Pillow's convert("RGB") makes everything above 255 of 65,535 white; and a picture too
    dark to reach 255 must stay dark, not be taken for one of 8 bits."""
    values = np.linspace(0, top, 40 * 24).reshape(24, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = Image.open(tmp_path / "deep.png")
    assert image.mode == "I;16"
    got = np.asarray(qwen.to_rgb(image)).astype(float)
    assert got.shape == (24, 40, 3) and abs(got - values[:, :, None] / 257).max() <= 1


def test_transparency_shows_white(loaded):
    """RGBA and a palette with a transparent colour (PNG tRNS) look as a viewer shows them."""
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    for image in (clear, palette, clear.convert("LA"), clear.convert("RGBa")):
        assert (loaded[1].prompt({"images": [image], "question": ""}).pixels == 1).all()


def test_a_transparent_grey_of_sixteen_bits_shows_white(tmp_path):
    """A 16-bit grey PNG may name one grey as transparent; it became the black it is stored as."""
    values = np.full((24, 40), 1000, np.uint16)
    values[:, 20:] = 40000
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=1000)
    image = Image.open(tmp_path / "deep.png")
    assert image.mode == "I;16" and image.info["transparency"] == 1000
    got = np.asarray(qwen.to_rgb(image))
    assert (got[:, :20] == 255).all() and (abs(got[:, 20:] - 40000 / 257) <= 1).all()


def png_bytes(image, cut=None):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()[:cut]


@pytest.mark.parametrize("content, reason", [
    (png_bytes(noise(64, 64), 3000), "truncated"), (b"%PDF-1.7 not a picture", "cannot identify"),
    (b"", "cannot identify"), (png_bytes(noise(201 * 4, 4)), "more than 200 times"),
    (png_bytes(noise(4, 201 * 4)), "4 x 804"), (None, "No such file")])
def test_pitfall_15_what_cannot_be_read_is_refused_by_name(loaded, tmp_path, content, reason):
    """One broken file among 100,000 stops a run at an unknown place. The message names the record,
    the file and the reason, and the ratio of 200 itself is still read."""
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        loaded[1].prompt({"id": "geo-17", "images": [path], "question": ""})
    assert "record geo-17" in str(error.value) and "broken.png" in str(error.value)
    assert loaded[1].prompt({"images": [noise(800, 4)], "question": ""}).grids


@pytest.mark.parametrize("record, message", [
    ({"images": "/a.png", "question": "?"}, "record ?: images must be a list, not '/a.png'"),
    ({"images": [], "id": "7"}, "record 7 has no question")])
def test_a_record_by_hand_is_told_what_it_lacks(processor, record, message):
    """A path that is no list was "cannot read picture /", a missing question a bare KeyError."""
    for read in (processor.prompt, processor.length):
        with pytest.raises(ValueError) as error:
            read(record)
        assert str(error.value) == message


def test_any_kind_of_decoder_error_names_the_record(loaded, monkeypatch):
    """Pillow's AVIF reader raises RuntimeError on a damaged file, others struct.error or KeyError:
    a list of exception types forgot some."""
    def broken(image):
        raise RuntimeError("Failed to decode frame 0")
    monkeypatch.setattr(qwen, "to_rgb", broken)
    with pytest.raises(ValueError, match="record a-1: cannot decode .* frame 0"):
        loaded[1].prompt({"id": "a-1", "images": [noise(32, 32)], "question": ""})


def test_pitfall_15_decompression_bomb_is_refused(loaded, tmp_path, monkeypatch):
    """A file of a few bytes may claim gigabytes of pixels: Pillow's limit holds, with the name."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    noise(64, 64).save(tmp_path / "bomb.png")
    record = {"id": "b-2", "images": [tmp_path / "bomb.png"], "question": ""}
    for call in (loaded[1].prompt, loaded[1].length):
        with pytest.raises(ValueError, match="record b-2: .*bomb.png.* exceeds limit"):
            call(record)


def test_length_is_the_length_of_the_prompt(processor, tmp_path):
    noise(90, 250).save(tmp_path / "tall.jpg")
    for images in ([], [tmp_path / "tall.jpg"], [noise(7, 9), tmp_path / "tall.jpg"]):
        for hint in (None, "look left"):
            record = {"images": images, "question": "How many?"}
            assert processor.length(record, hint) == len(processor.prompt(record, hint).ids)


@pytest.mark.parametrize("low, high", [(1024, 65536), (256, 4096), (30000, 40000)])
def test_pixel_budget(low, high):
    """The resized picture stays within the budget, and is the one transformers makes."""
    processor = qwen.Processor(qwen.TINY, min_pixels=low, max_pixels=high)
    images = [noise(*size) for size in ((20, 20), (64, 48), (150, 400), (900, 700))]
    prompt = processor.prompt({"images": images, "question": ""})
    assert prompt.grids == reference_pixels(processor, images)[1]
    assert all(low <= h * w * 8 * 8 <= high for _, h, w in prompt.grids)


def test_large_pictures_are_decoded_by_one_thread(processor, monkeypatch, tmp_path):
    """Four pictures of 108 megapixels in four threads took 5.2 GB, and a machine of 64 cores reads
    thirty at a time. Looking for the EXIF of a PNG decodes it, too."""
    Image.new("RGB", (70, 60), "red").save(tmp_path / "a.png")
    threads = set()

    def watched(call):
        return lambda image: (threads.add(threading.get_ident()), call(image))[1]
    monkeypatch.setattr(qwen, "to_rgb", watched(qwen.to_rgb))
    monkeypatch.setattr(PngImageFile, "getexif", watched(PngImageFile.getexif))
    record = {"id": "1", "images": [str(tmp_path / "a.png")], "question": "q"}
    plain = processor.prompt(record)
    assert threads == {threading.get_ident()}
    threads.clear()
    monkeypatch.setattr(qwen, "BIG", 70 * 60 - 1)
    with ThreadPoolExecutor(4) as pool:
        prompts = list(pool.map(processor.prompt, [record] * 8))
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert all(torch.equal(p.pixels, plain.pixels) for p in prompts)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match="record 1: cannot read picture .*a.png"):
        processor.prompt(record)


def test_a_thin_picture_keeps_one_row_of_tokens():
    """qwen-vl-utils (Qwen3-VL#2121) rounded the short side of a thin picture down to zero."""
    processor = qwen.Processor(qwen.TINY, min_pixels=256, max_pixels=4096)
    for images, thin in ([noise(3600, 20)], 1), ([noise(20, 3600)], 2):
        grid, = processor.prompt({"images": images, "question": ""}).grids
        assert grid[thin] == 2 and [grid] == reference_pixels(processor, images)[1]


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5000.* above .*4000"):
        qwen.Processor(qwen.TINY, min_pixels=5000, max_pixels=4000)
    clip = copy_folder(tmp_path / "clip", preprocessor_config={"image_mean": [0.48, 0.46, 0.41]})
    with pytest.raises(ValueError, match="image_mean is .*0.48"):
        qwen.Processor(clip)
    ids = copy_folder(tmp_path / "ids", config={"image_token_id": 12})
    with pytest.raises(ValueError, match="image_pad.* is 12, tokenizer.json says 478"):
        qwen.Processor(ids)


# ---------------------------------------------------------------------------- batches

@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_the_models_own(loaded, ragged, side):
    model, processor = loaded
    batch = processor.batch(ragged, side)
    names = "input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"
    expected, _ = model.model.get_rope_index(**{name: batch[name] for name in names})
    real = batch["attention_mask"].bool().expand(3, -1, -1)
    assert torch.equal(batch["position_ids"][real], expected[real])
    assert batch["attention_mask"][:, -1 if side == "left" else 0].all() and not real.all()
    assert batch["image_grid_thw"].shape == (4, 3)


def test_pitfall_10_left_and_right_padding_give_the_same_logits(loaded, ragged):
    """nanoVLM#116 lost .036 of a benchmark by the wrong side, and a right-padded prompt samples
    its first token from padding. Either side is right here; left ends all rows in a real token."""
    model, processor = loaded
    sides = {side: processor.batch(ragged, side) for side in ("left", "right")}
    assert sides["left"]["attention_mask"][:, -1].all()
    left, right = (logits_of(model, processor, ragged, side)[batch["attention_mask"].bool()]
                   for side, batch in sides.items())
    assert (left - right).abs().max() < 2e-5 * left.abs().max()


def test_padded_is_alone(loaded, ragged):
    model, processor = loaded
    together = logits_of(model, processor, ragged)
    for row, prompt in enumerate(ragged):
        alone = logits_of(model, processor, [prompt])[0]
        difference = together[row, -len(prompt.ids):] - alone
        assert difference.abs().max() < 2e-5 * alone.abs().max()


def test_pitfall_13_token_types_are_padded_with_the_ids(loaded, ragged):
    """trl#5785: ids were padded on the left and mm_token_type_ids on the right, so that the model
    gave picture positions to words. They mark exactly the visual tokens, on both sides."""
    _, processor = loaded
    for side in ("left", "right"):
        batch = processor.batch(ragged, side)
        kinds = batch["mm_token_type_ids"]
        assert torch.equal(kinds == 1, batch["input_ids"] == processor.image_id)
        assert kinds.sum(1).tolist() == [
            sum(h * w // 4 for _, h, w in prompt.grids) for prompt in ragged]
    with pytest.raises(ValueError, match="'middle'"):
        processor.batch(ragged, "middle")


def test_pitfall_12_swapping_the_picture_changes_the_logits(loaded, records):
    """KDFlow#9: one engine never loaded the vision weights. The loss fell normally and the score
    was 1 %. Two pictures of one size, the same words: the same logits before, others after."""
    model, processor = loaded
    picture = records[0]["images"][0]
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first, second = (processor.prompt({**records[0], "images": [p]}) for p in (picture, other))
    assert first.ids == second.ids
    a, b = (logits_of(model, processor, [prompt])[0] for prompt in (first, second))
    start = first.ids.index(processor.image_id)
    assert torch.equal(a[:start], b[:start])
    assert (a[-1] - b[-1]).abs().max() > 1e-3 * a.abs().max()


def test_text_only_batch_has_no_pictures(loaded):
    model, processor = loaded
    prompts = [processor.prompt({"images": [], "question": text}) for text in TEXTS[:2]]
    batch = processor.batch(prompts)
    assert "pixel_values" not in batch and "image_grid_thw" not in batch
    assert torch.isfinite(logits_of(model, processor, prompts)).all()


# ---------------------------------------------------------------------------- checkpoints

def make_model(tied):
    """A model of the tiny shape with random weights; untied, its head is another matrix."""
    config = transformers.AutoConfig.from_pretrained(qwen.TINY)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model


@pytest.mark.parametrize("cue", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_pitfall_23_save_then_load_gives_equal_logits(loaded, ragged, tmp_path, tied, cue):
    """sglang#18024: 2B ties its head to the embedding and 8B does not; the embedding was copied
    over an untied head. Both survive, with the module and without, and the folder is an ordinary
    one: transformers alone loads the base model from it."""
    model, processor = make_model(tied), loaded[1]
    base = logits_of(model, processor, ragged)
    if cue:
        for block in cue_recovery.attach(model, 2).blocks.values():
            torch.nn.init.normal_(block.output.weight, std=0.1)
    expected = logits_of(model, processor, ragged)
    checkpoint.save_model(model, processor, tmp_path / "deep" / "out")
    again, other = qwen.load(tmp_path / "deep" / "out", device="cpu")
    assert torch.equal(logits_of(again, other, ragged), expected)
    assert torch.equal(expected, base) != cue and hasattr(again, "cue_recovery") == cue
    plain, _ = qwen.load(tmp_path / "deep" / "out", device="cpu", cue=False)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "deep" / "out",
                                                                     dtype=torch.float32)
    for model in (plain, stock.eval()):
        assert torch.equal(logits_of(model, processor, ragged), base)
    with safe_open(tmp_path / "deep" / "out" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "cue_recovery" in key]
        assert ("lm_head.weight" in file.keys()) == (not tied)


def test_saved_folder_has_the_processor(tiny, tmp_path, monkeypatch):
    """Loaded by a relative path and saved from another folder: nothing is lost on the way."""
    copy_folder(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    processor = qwen.Processor("start")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoint.save_model(tiny[0], processor, "out")
    assert vars(qwen.Processor("out")).keys() == vars(processor).keys()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert Path("out", name).read_bytes() == (qwen.TINY / name).read_bytes()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fail(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("where", ["save_pretrained", "copyfile", "cue", "rename"])
def test_a_crash_while_saving_leaves_the_old_folder(tiny, tmp_path, monkeypatch, where):
    """A full disk in the middle of a save: the checkpoint before it is still there, byte for byte,
    and the next save works."""
    model, processor = tiny
    folder = tmp_path / "out"
    checkpoint.save_model(model, processor, folder)
    before = contents(folder)
    cue_recovery.attach(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(*{"save_pretrained": (model, "save_pretrained"),
                        "copyfile": (shutil, "copyfile"), "rename": (checkpoint.os, "replace"),
                        "cue": (cue_recovery.CueRecovery, "save")}[where], fail)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save_model(model, processor, folder)
    assert contents(folder) == before
    checkpoint.save_model(model, processor, folder)
    assert contents(folder).keys() == before.keys() | {qwen.CUE_FILE}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_whole_folder_is_never_deleted(tiny, tmp_path, monkeypatch):
    """A kill between the two renames leaves only FOLDER.old and FOLDER.tmp. The next save began by
    deleting both: had it been killed too, nothing at all would have been left."""
    model, processor = tiny
    checkpoint.save_model(model, processor, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.old")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save_model(model, processor, tmp_path / "out")
    assert contents(tmp_path / "out.old") == before
    for _ in range(2):                                # FOLDER.old alone, then beside FOLDER
        checkpoint.save_model(model, processor, tmp_path / "out")
        assert contents(tmp_path / "out") == before and not (tmp_path / "out.old").exists()
        shutil.copytree(tmp_path / "out", tmp_path / "out.old")


def test_missing_weights_are_refused_by_name(tmp_path):
    """transformers fills what a file lacks with random numbers and a warning."""
    folder = copy_folder(tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    gone = "model.language_model.layers.3.mlp.up_proj.weight"
    assert weights.pop(gone, None) is not None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"partial: 1 weights are missing.*{gone}"):
        qwen.load(folder, device="cpu")


def test_an_untied_config_needs_a_head(tmp_path):
    """Qwen3-VL-Embedding#89: tie_word_embeddings false, but no lm_head in the file."""
    folder = copy_folder(tmp_path / "headless", config={"tie_word_embeddings": False})
    with pytest.raises(ValueError, match="lm_head.weight"):
        qwen.load(folder, device="cpu")


def test_another_architecture_is_refused(tmp_path):
    folder = copy_folder(tmp_path / "other", config={"model_type": "llama"})
    with pytest.raises(ValueError, match="other: model_type is 'llama'.*'qwen3_vl'"):
        qwen.load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = copy_folder(tmp_path / "hole")
    (folder / name).unlink()
    message = f"hole is not a Qwen3-VL folder: {name} is missing"
    with pytest.raises(FileNotFoundError, match=message):
        qwen.load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json",
                                  "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"a": 1,', b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = copy_folder(tmp_path / "cut")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cut/{name}: not valid JSON"):
        qwen.load(folder)


@pytest.mark.parametrize("path, kind", [("nobody-at-all/no-such-model", ConnectionError),
                                        ("./no/such/folder", FileNotFoundError),
                                        ("no-such-model", FileNotFoundError),
                                        ("mistyped/", FileNotFoundError)])
def test_an_unreachable_model_is_one_line_with_the_default(path, kind):
    """Without a network the hub's own message is a page of traceback. conftest.py sets
    HF_HUB_OFFLINE=1, so this test asks no server."""
    with pytest.raises(kind, match=f"{path}.*tiny-qwen3-vl") as error:
        qwen.load(path)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_copy_without_the_tiny_folder_names_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(qwen, "TINY", tmp_path / "data" / "tiny-qwen3-vl")
    with pytest.raises(FileNotFoundError) as error:
        qwen.load(qwen.TINY)
    assert str(error.value).count(str(qwen.TINY)) == 1


def test_a_missing_cue_recovery_file_is_explained(tiny, tmp_path, monkeypatch):
    """model.py may be copied alone; a checkpoint with the module then says what it needs."""
    model, processor = tiny
    cue_recovery.attach(model)
    checkpoint.save_model(model, processor, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "cue_recovery", None)
    with pytest.raises(ImportError, match="put cue_recovery.py beside model.py, or .*cue=False"):
        qwen.load(tmp_path / "out", device="cpu")
    assert not hasattr(qwen.load(tmp_path / "out", device="cpu", cue=False)[0], "cue_recovery")


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float64])
def test_dtype_and_mode(dtype):
    model, _ = qwen.load(qwen.TINY, dtype=dtype, device="cpu")
    expected = {None: torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.float64)
    assert {p.dtype for p in model.parameters()} == {expected} and not model.training


@pytest.mark.parametrize("bad, message", [
    ({"device": "gpu"}, "'gpu' is none of cpu, cuda"), ({"device": "cuda:99"}, "no such device"),
    ({"dtype": "bf16"}, "'bf16' is none of float32, bfloat16"),
    ({"dtype": torch.int8}, "none of float32"), ({"attention": "flash"}, "'flash' is none of sdpa"),
    ({"dtype": "float64", "attention": "eager"}, "for --dtype float64 take --attention sdpa"),
    ({"attention": "flash_attention_2", "device": "cpu"}, "flash_attention_2 "
     "(needs a CUDA GPU and the package flash_attn|computes in bfloat16)")])
def test_a_wrong_name_is_one_line_before_anything_is_read(bad, message):
    """They ended in tracebacks of torch and transformers, some after the download."""
    with pytest.raises(ValueError, match=message) as error:
        checks.check_placement(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given, expected", [
    ({"device": "cpu"}, ("cpu", torch.float32)), ({"device": "meta"}, ("meta", torch.bfloat16)),
    ({"device": "cpu", "dtype": torch.bfloat16}, ("cpu", torch.bfloat16)),
    ({"device": "cuda:1"}, ("cuda:1", torch.bfloat16)), ({}, ("cuda", torch.bfloat16)),
    ({"device": "mps"}, "in float64, which an Apple GPU does not have"),
    ({"device": "mps:0", "dtype": "float32"}, "take --device cpu"),
    ({"device": "cuda:2"}, "finds no such device"),
    ({"attention": "flash_attention_2"}, ("cuda", torch.bfloat16)),
    ({"attention": "flash_attention_2", "dtype": "float32"}, "not in float32"),
    ({"attention": "flash_attention_3"}, "the package flash_attn_interface")])
def test_what_device_and_dtype_mean(monkeypatch, given, expected):
    """On a machine made up for the test: two CUDA GPUs, an Apple GPU, one flash package.

    mps was accepted, though sampling makes float64 tensors, which torch does not have there.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(checks, "find_spec", lambda name: name == "flash_attn" or None)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            checks.check_placement(**given)
    else:
        device, dtype = checks.check_placement(**given)
        assert (str(device), dtype) == expected


def test_quiet_leaves_the_bars_of_downloads():
    from huggingface_hub.utils import are_progress_bars_disabled
    logging = transformers.utils.logging
    try:
        checks.quiet()
        assert not logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    finally:
        logging.enable_progress_bar()


def test_saved_files_can_be_read_by_others(tiny, tmp_path):
    """safetensors gives its files to their owner alone, whatever the umask says."""
    before = os.umask(0o022)
    try:
        cue_recovery.attach(tiny[0])
        checkpoint.save_model(*tiny, tmp_path / "out", notes={"step": 1})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


# ---------------------------------------------------------------------------- video

def film(count, size=(48, 32), **more):
    rng = np.random.default_rng(3)
    frames = [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
              for _ in range(count)]
    return {"id": "film", "images": [], "question": "What happens?", "video": frames, **more}


def test_video_is_a_row_of_stamped_moments(loaded):
    """Two frames a moment, at the mean of their times; an odd last frame is paired with itself."""
    _, processor = loaded
    prompt = processor.prompt(film(5, fps=2.0))
    text = processor.tokenizer.decode(prompt.ids, skip_special_tokens=False)
    pads = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    assert f"user\n<0.2 seconds>{pads}<1.2 seconds>{pads}<2.0 seconds>{pads}What happens?" in text
    assert prompt.video_grids == [(3, 4, 6)] and prompt.video.shape[0] == 3 * 4 * 6
    assert processor.length(film(5, fps=2.0)) == len(prompt.ids)


def test_video_positions_equal_the_class_own(loaded, records):
    model, processor = loaded
    prompts = [processor.prompt(film(4, fps=1.0)), processor.prompt(records[0]),
               processor.prompt(film(3, seconds=[0.0, 1.5, 4.0], images=records[1]["images"]))]
    batch = processor.batch(prompts)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: batch[name] for name in names})
    assert torch.equal(positions, batch["position_ids"])


def test_video_frames_reach_the_logits_in_order(loaded):
    """Reversed frames change the answer's logits; the same frames alone or in a batch do not."""
    model, processor = loaded
    forward, backward = film(4, fps=1.0), film(4, fps=1.0)
    backward["video"] = backward["video"][::-1]
    with torch.no_grad():
        alone, other = (model(**processor.batch([processor.prompt(r)])).logits[0, -1]
                        for r in (forward, backward))
        both = model(**processor.batch([processor.prompt(forward), processor.prompt(
            {**film(1), "video": None})])).logits[0, -1]
    assert (alone - other).abs().max() > 1e-3
    torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-4)


def test_video_pixel_values_put_two_frames_in_a_patch(loaded):
    _, processor = loaded
    record = film(2, fps=1.0)
    prompt, P = processor.prompt(record), processor.patch
    patch = prompt.video[0].view(3, 2, P, P)
    for k in (0, 1):
        want = np.asarray(record["video"][k])[:P, :P].transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(patch[:, k].numpy() - want).max() < 1e-6


def test_video_budget_covers_all_frames_together(loaded):
    _, processor = loaded
    small = qwen.Processor(processor.folder)
    small.video_pixels = 8 * 32 * 32
    many = small.prompt(film(8, size=(96, 96), fps=1.0))
    t, h, w = many.video_grids[0]
    assert t == 4 and h * w * small.patch**2 <= 32 * 32


@pytest.mark.parametrize("more, message", [
    ({}, 'needs "fps"'), ({"seconds": [0.0]}, '4 frames but 1 times'),
    ({"video": "film.mp4", "fps": 1.0}, "list of its frames")])
def test_video_without_times_is_refused(loaded, more, message):
    """Invented times are worse than none: the model reads them as text."""
    with pytest.raises(ValueError, match=f"record film: .*{message}"):
        loaded[1].prompt({**film(4), **more})


def test_a_hinted_prompt_can_take_the_pictures_of_the_plain_one(loaded, records, monkeypatch):
    """The teacher's prompt must be the same with the student's pixels, and decode nothing."""
    _, processor = loaded
    for record in (records[0], film(3, fps=1.0), {"id": "t", "images": [], "question": "Why?"}):
        plain, whole = processor.prompt(record), processor.prompt(record, "look")
        with monkeypatch.context() as patch:
            patch.setattr(qwen.Processor, "_patches", None)
            taken = processor.prompt(record, "look", pictures_from=plain)
        assert (taken.ids, taken.grids, taken.video_grids) == (
            whole.ids, whole.grids, whole.video_grids)
        assert taken.pixels is plain.pixels and taken.video is plain.video


def test_save_keeps_the_pixel_budget_of_the_run(tiny, tmp_path):
    """Trained on small pictures and evaluated on large ones: the flag must not be needed twice."""
    model, processor = tiny
    own = qwen.Processor(processor.folder, min_pixels=2048, max_pixels=8192)
    checkpoint.save_model(model, own, tmp_path / "out")
    again = qwen.Processor(tmp_path / "out")
    assert (again.min_pixels, again.max_pixels) == (2048, 8192)
