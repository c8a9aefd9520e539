"""`apet eval`: a vision-language model with and without compression over images and questions: docs/evaluation.md.

| file | holds |
|---|---|
| `questions.py` | the folder of images and questions, checked |
| `official.py` | the official files of GQA, POPE and TextVQA, turned into such a folder |
| `metrics.py` | what an answer is worth |
| `processes.py` | several processes or machines, and what they agree on |
| `journal.py` | the answers so far, on disk |
| `run.py` | asking every question |
| `summary.py` | the table |
"""
