"""An engine in this process, requests to it, and a record of the inputs and outputs of its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a test reaches the model
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # a second thread makes tensors this small slower
}
# Prompts have more tokens than a step, so nearly every image is prefilled in several chunks.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "block_size": 32,  # short enough for short prompts to hit the prefix cache
    "max_num_batched_tokens": 96,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "enable_mm_embeds": True,
}
IMAGE = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "internvl_chat": "<image>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "mistral3": "[IMG]",
    "pixtral": "[IMG]",
    "gemma4": "<image_soft_token>",
    "llama4": "<|image|>",
    "minicpmv4_6": "<|image_pad|>",
    **dict.fromkeys(("glm4v", "glm4v_moe"), "<|begin_of_image|><|image|><|end_of_image|>"),
    **dict.fromkeys((name for name in tiny.KINDS if name.startswith("qwen")), tiny.QWEN_IMAGE),
}
VIDEO = {
    "llava_onevision": "<video>",
    "internvl": "<video>",
    "gemma4": "<|video|>",
    "minicpmv4_6": "<|video_pad|>",
    **dict.fromkeys(("glm4v", "glm4v_moe"), "<|begin_of_video|><|video|><|end_of_video|>"),
    **dict.fromkeys((name for name in tiny.KINDS if name.startswith("qwen")), tiny.QWEN_VIDEO),
}
MODELS = tuple(IMAGE)
MROPE = tuple(name for name in MODELS if name.startswith(("glm4v", "qwen")))  # need a budget at their start
# Where hooks of the whole tower are not called: vLLM calls parts of it only, or, of Llama 4's, `forward`.
PART_OF_TOWER = {"gemma4": "encoder", "llama4": "patch_embedding", "minicpmv4_6": "post_layernorm"}
BFLOAT16 = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6")  # vLLM's linear attention for CPUs takes nothing else
# In bfloat16, vLLM's logits of a request alone and in a batch differ by up to two roundings, also without the plugin.
# Two tokens count as equally probable if the logarithms of their probabilities differ by no more than this.
TIES = 0.07


def visual(name: str) -> set[int]:
    """Returns the tokens at the positions of visual rows."""
    if name == "llama4":  # another of its tokens precedes each image
        return {tiny.TILE_TOKEN}
    images = {tiny.IMAGE, tiny.IMAGE_PAD, tiny.CONTEXT, tiny.IMG, tiny.SOFT, tiny.GLM_IMAGE}
    return images | {tiny.VIDEO_PAD, tiny.VIDEO, tiny.GLM_VIDEO}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Returns a smooth picture, in which neighbouring patches resemble each other, as in a photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def video(frames: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns a video in vLLM's form: frames at 2 a second, with the metadata that it needs."""
    pictures = np.stack([np.asarray(picture(height, width, seed + i)) for i in range(frames)])
    known = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
    return pictures, {**known, "video_backend": "opencv", "do_sample_frames": False}


def prompt(
    name: str,
    *images: Image.Image,
    videos: Sequence[Any] = (),
    text: str = "what is it?",
    before: str = "see ",
    first: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Returns a request; kwargs are its `mm_processor_kwargs`. first: videos before images."""
    parts = ["".join(f"{IMAGE[name]} and " for _ in images), "".join(f"{VIDEO[name]} " for _ in videos)]
    shown = before + "".join(parts[::-1] if first else parts)
    data = {"image": list(images)} if images else {}
    if videos:
        data["video"] = list(videos)
    request = {"prompt": shown + text, "multi_modal_data": data}
    return {**request, "mm_processor_kwargs": kwargs} if kwargs else request


@dataclass
class Seen:
    """The inputs and outputs of the parts of a model, call after call."""

    tower: list[Tensor] = field(default_factory=list)  # features of the vision encoder
    projector: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # Rows of each item, from the encoder, before compression; of images and of videos.
    encoded: dict[str, list[Tensor]] = field(default_factory=lambda: {"image": [], "video": []})
    embeds: list[Tensor] = field(default_factory=list)  # rows that reached the language model
    positions: list[Tensor] = field(default_factory=list)
    deepstack: list[Tensor] = field(default_factory=list)  # of each step [levels, N, D]


class Served:
    """An engine, started with or without options of the plugin."""

    alive: ClassVar[list[Any]] = []  # deleting an engine would destroy the process groups of the others

    def __init__(self, name: str, folder: Path, at_start: dict[str, Any] | None = None, **more: Any):
        from vllm import LLM
        from vllm.distributed import parallel_state

        if self.alive and parallel_state._EP is None:  # vLLM makes it only if a process's first model has experts
            parallel_state._EP = parallel_state.init_model_parallel_group([[0]], 0, "gloo", group_name="ep")
        limits = {"image": 4, **({"video": 1} if name in VIDEO else {})}
        self.name = name
        if name in BFLOAT16:
            more = {"dtype": "bfloat16", **more}
        if name == "gemma4":  # its encoder asks for free memory, which torch does not tell of a CPU
            torch.accelerator.get_memory_info = lambda: (2**30, 2**30)
        more = {"trust_remote_code": name == "internvl_chat", **more}
        self.llm = LLM(str(folder), limit_mm_per_prompt=limits, mm_processor_kwargs=at_start, **{**ENGINE, **more})
        self.alive.append(self.llm)
        if name == "llama4":
            # vLLM's linear layers for CPUs reject the patches of a single tile, which are not contiguous.
            linear = self.model.vision_model.patch_embedding.linear
            linear.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))

    @property
    def runner(self) -> Any:
        """Returns vLLM's model runner."""
        return self.llm.llm_engine.model_executor.driver_worker.model_runner

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def forget(self) -> None:
        """Empties the caches of prefixes, of encoded images and of processed images."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache()

    def outputs(self, *requests: dict[str, Any], tokens: int = 8) -> list[Any]:
        """Returns vLLM's outputs for all requests, given at once."""
        from vllm import SamplingParams

        greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2)
        return self.llm.generate(list(requests), greedy, use_tqdm=False)

    def ids(self, *requests: dict[str, Any]) -> list[list[int]]:
        """Returns the generated tokens of every request."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(*requests)]

    def same(self, one: Any, other: Any) -> bool:
        """Returns whether two outputs have the same tokens; in bfloat16, up to a place where either output's token was
        as probable in the other one."""
        one, other = one.outputs[0], other.outputs[0]
        for a, b, of_one, of_other in zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True):
            if a != b:
                tied = all(
                    token in of and max(seen.logprob for seen in of.values()) - of[token].logprob <= TIES
                    for token, of in ((b, of_one), (a, of_other))
                )
                return tied and self.name in BFLOAT16
        return True

    def lengths(self, *requests: dict[str, Any]) -> list[int]:
        """Returns the number of prompt tokens of every request."""
        return [len(output.prompt_token_ids) for output in self.outputs(*requests, tokens=1)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[Seen]:
        """Records inputs and outputs of the parts of the model; several requests are in the order of the batch."""
        seen, model = Seen(), self.model
        names, places = ("visual", "vision_tower", "vision_model", "vpm"), (model, getattr(model, "model", None))
        tower = next(getattr(place, name) for place in places for name in names if hasattr(place, name))
        if part := PART_OF_TOWER.get(self.name):
            tower = getattr(tower, part)

        def reader(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.embeds.append(kwargs["inputs_embeds"].clone())
            seen.positions.append(kwargs["positions"].clone())
            if levels := getattr(model, "deepstack_input_embeds", None):
                seen.deepstack.append(torch.stack([level[: len(kwargs["inputs_embeds"])] for level in levels]))

        def note_tower(_: nn.Module, args: Any, out: Any) -> None:
            out = getattr(out, "last_hidden_state", out)
            seen.tower.append(out.clone() if isinstance(out, Tensor) else torch.cat([x.flatten(0, -2) for x in out]))

        def encode(self: nn.Module, **inputs: Any) -> Any:
            rows = embed(self, **inputs)
            kind = "video" if any("video" in name for name in inputs) else "image"
            seen.encoded[kind].extend(item.clone() for item in rows)
            return rows

        hooks = [
            tower.register_forward_hook(note_tower),
            model.register_forward_pre_hook(reader, with_kwargs=True),
        ]
        if hasattr(model, "multi_modal_projector"):
            note = lambda _, args, out: seen.projector.append((args[0].clone(), out.clone()))  # noqa: E731
            hooks.append(model.multi_modal_projector.register_forward_hook(note))
        bases = [c for c in type(model).__mro__ if c.__module__.startswith("vllm.")]
        theirs = next(c for c in bases if "embed_multimodal" in vars(c))
        embed = theirs.embed_multimodal
        theirs.embed_multimodal = encode
        try:
            yield seen
        finally:
            theirs.embed_multimodal = embed
            for hook in hooks:
                hook.remove()

    def read(self, request: dict[str, Any]) -> tuple[list[int], Seen, Tensor, Tensor]:
        """The prompt's tokens as the language model saw them, what passed, and embeddings [N, D] and positions
        [3 or 1, N] of all its chunks."""
        self.forget()
        with self.watched() as seen:
            (output,) = self.outputs(request, tokens=1)
        n = len(output.prompt_token_ids)
        embeds = torch.cat(seen.embeds)[:n]
        positions = torch.cat([p.reshape(-1, p.shape[-1]) for p in seen.positions], dim=1)[:, :n]
        return output.prompt_token_ids, seen, embeds, positions
