"""From files to training samples: tokens, patches and positions are those of transformers' processors and models."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.config.run import ComponentConfig, DataConfig, ModelConfig
from loongforge.core.data.contract import SourceRequest
from loongforge.data.conversations import ChatRules
from loongforge.data.shards import write_shards
from loongforge.data.tokenise import TokenizerChoice
from loongforge.data.visual_encode import VisualRules
from loongforge.data.visual_file import write_visual
from loongforge.data.vlm import open_vlm
from loongforge.models.vision.processor import qwen2_5_vl, qwen3_vl
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
SEQ = 2048
LIMITS = {"shortest_edge": 20000, "longest_edge": 60000}
VIDEO_ROUNDING = {"qwen2_5_vl": 0.031, "qwen3_vl": 0.0079}
"""Two levels of 255 and one: transformers resizes videos with torchvision, whose kernel rounds bytes elsewhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two images, a video, and a conversation about them as a row and as a shard."""
    path = tmp_path_factory.mktemp("data")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    Image.fromarray(_picture(203, 311, 0)).save(path / "a.jpg", quality=90)
    Image.fromarray(_picture(150, 90, 1)).save(path / "b.webp")
    with av.open(str(path / "c.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 140, 96, "yuv420p"
        for number in range(21):
            frame = av.VideoFrame.from_ndarray(_picture(96, 140, number / 3), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    messages = [
        {"role": "user", "content": "<image>and <image>?"},
        {"role": "assistant", "content": "naïve 数据"},
        {"role": "user", "content": "And\n<video>"},
        {"role": "assistant", "content": "moves"},
    ]
    row = {"messages": messages, "images": ["a.jpg", "b.webp"], "videos": ["c.mp4"]}
    (path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    media = {name: (path / name).read_bytes() for name in ("a.jpg", "b.webp", "c.mp4")}
    write_shards([("image_0", {"json": json.dumps(row).encode(), **media})], path / "shards")
    return path


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("form", ["rows.jsonl", "shards"])
def test_a_sample_is_what_transformers_makes_of_the_files(name: str, form: str, folder: Path, tmp_path: Path) -> None:
    limits = DataConfig(min_pixels=LIMITS["shortest_edge"], max_pixels=LIMITS["longest_edge"])
    processor = _processor(name).with_limits(limits)
    sample = open_vlm(_request(folder, form, processor, tmp_path))[0]
    inputs = _reference(name, folder)
    tokens = inputs["input_ids"][0].tolist()
    size = len(tokens) - 1
    assert sample["tokens"][:size].tolist() == tokens[:-1]
    assert sample["labels"][:size].tolist() == tokens[1:]
    kinds = inputs["mm_token_type_ids"][0]
    assert sample["visual_positions"].tolist() == torch.nonzero(kinds).flatten().tolist()
    np.testing.assert_array_equal(sample["position_ids"][:, : size + 1], _rope_index(name, inputs))

    images = len(inputs["pixel_values"])
    np.testing.assert_array_equal(sample["pixels"][:images], inputs["pixel_values"].numpy())
    frames = inputs["pixel_values_videos"].numpy()
    assert np.abs(sample["pixels"][images:] - frames).max() <= VIDEO_ROUNDING[name]
    video = inputs["video_grid_thw"][0].tolist()
    steps = [video] if name == "qwen2_5_vl" else [[1, *video[1:]]] * video[0]
    assert sample["grid"].tolist() == [*inputs["image_grid_thw"].tolist(), *steps]


def test_worker_processes_write_the_same(folder: Path, tmp_path: Path) -> None:
    """Rules and processor travel to spawned processes; what they find is written in the order of the rows."""
    lines = (folder / "rows.jsonl").read_text()
    (tmp_path / "many.jsonl").write_text(
        lines.replace('"a.jpg"', f'"{folder}/a.jpg"').replace('"b', f'"{folder}/b') * 3
    )
    rows = (tmp_path / "many.jsonl").read_text().replace('"c.mp4"', f'"{folder}/c.mp4"')
    (tmp_path / "many.jsonl").write_text(rows)
    chat = ChatRules(
        choice=TokenizerChoice(path=str(folder), kind=None, vocab_size=300),
        template_file=None,
        messages_field="messages",
        train_on_prompt=False,
        overlong="error",
        seq_length=SEQ,
    )
    rules = VisualRules(chat=chat, processor=_processor("qwen3_vl"), folder=tmp_path)
    for name, workers in (("alone-0", 0), ("together-0", 2)):
        write_visual([tmp_path / "many.jsonl"], tmp_path / name, rules, workers)
    for file in (tmp_path / "alone-0").glob("*.bin"):
        assert file.read_bytes() == (tmp_path / "together-0" / file.name).read_bytes()
        assert file.stat().st_size


def _picture(height: int, width: int, phase: float) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / (3 + channel) + phase) + np.cos(y / (5 - channel) - 2 * phase) for channel in range(3)]
    return ((np.stack(waves, axis=-1) + 2) * 63.75).astype(np.uint8)


def _processor(name: str) -> Any:
    sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
    encoder: Any = Qwen3VitConfig(**sizes)
    if name == "qwen2_5_vl":
        encoder = Qwen2_5VitConfig(**sizes, full_attention_layers=(0,), tokens_per_second=2)
    sections = SimpleNamespace(position_rank=3)
    foundation = ComponentConfig(family="any", geometry=SimpleNamespace(geometry=lambda: sections))
    model = ModelConfig(foundation=foundation, image_encoder=ComponentConfig(family="any", geometry=encoder))
    return {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}[name](model)


def _request(folder: Path, form: str, processor: Any, cache: Path) -> SourceRequest:
    return SourceRequest(
        paths=(str(folder / form),),
        split=None,
        part="train",
        seq_length=SEQ,
        num_samples=1,
        seed=1,
        shuffle=True,
        packing=False,
        segment_multiple=1,
        vocab_size=300,
        tokenizer_path=str(folder),
        tokenizer_type=None,
        chat_template=None,
        cache=cache,
        text_field="text",
        messages_field="messages",
        train_on_prompt=False,
        overlong="error",
        loss_mask_eod=False,
        is_builder=True,
        barrier=lambda: None,
        visual=processor,
        position_rank=3,
    )


def _reference(name: str, folder: Path) -> Any:
    """What transformers' processor makes of the same files."""
    import transformers as hf
    from transformers.video_utils import load_video

    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|im_end|>")
    if name == "qwen2_5_vl":
        images = hf.Qwen2VLImageProcessorPil(size=LIMITS)
        videos = hf.Qwen2VLVideoProcessor(do_sample_frames=True, fps=2, cap_pixels_per_frame=True)
        whole = hf.Qwen2_5_VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=videos)
    else:
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = hf.Qwen2VLImageProcessorPil(size=LIMITS, patch_size=16, **half)
        clip = {"shortest_edge": 4096, "longest_edge": 25165824}
        videos = hf.Qwen3VLVideoProcessor(size=clip, cap_pixels_per_frame=False)
        whole = hf.Qwen3VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=videos)
    frames, metadata = load_video(str(folder / "c.mp4"), backend="pyav", sample_indices_fn=_every_frame)
    text = f"<|im_start|>user\n{IMAGE}and {IMAGE}?<|im_end|>\n<|im_start|>assistant\nnaïve 数据<|im_end|>\n"
    text += f"<|im_start|>user\nAnd\n{VIDEO}<|im_end|>\n<|im_start|>assistant\nmoves<|im_end|>\n"
    return whole(
        text=[text],
        images=[Image.open(folder / file).convert("RGB") for file in ("a.jpg", "b.webp")],
        videos=[frames],
        video_metadata=[metadata],
        do_sample_frames=True,
        return_tensors="pt",
    )


def _every_frame(metadata: Any, **_: Any) -> np.ndarray:
    return np.arange(metadata.total_num_frames)


def _rope_index(name: str, inputs: Any) -> np.ndarray:
    if name == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel as Model
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel as Model
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = MethodType(Model.get_vision_position_ids, model)
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, _ = Model.get_rope_index(model, **{key: inputs[key] for key in wanted if key in inputs})
    return positions[:, 0].numpy()
