"""A small vision-language model, trained here on full sets of visual tokens, and what compression costs it.

`python -m benchmarks.vlm --help` lists the steps; docs/vlm.md has the results.

| file | holds |
|---|---|
| `sources.py` | photographs, words, typefaces and digits of each split |
| `scenes.py` | pictures made of them, each with its description |
| `questions.py` | questions in words, and answers from the description |
| `words.py` | the tokenizer |
| `features.py` | visual tokens of all pictures, computed once |
| `llava.py` | LLaVA of DINOv2-S, a projector and a small Llama; the stored weights |
| `packing.py` | several questions about a picture in one sequence |
| `training.py` | the training loop, its log and its checkpoints |
| `arms.py` | what is compared |
| `evaluation.py` | answers of the model to the test questions, and figures from them |
| `report.py`, `texts.py` | docs/vlm.md: its tables and what follows from them, its sentences |
"""
