"""`apet eval`: a vision-language model with and without compression over a folder of images and questions of your own
(docs/evaluation.md). Official benchmarks are run by lmms-eval, see `apet.lmms`.

| file | holds |
|---|---|
| `questions.py` | the folder of images and questions, checked |
| `answers.py` | the answers so far, on disk |
| `run.py` | asking every question |
| `summary.py` | the table |
"""
