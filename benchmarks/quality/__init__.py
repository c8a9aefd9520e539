"""The loss of accuracy by compression, on real tokens of real pictures: `python -m benchmarks.quality --help`.

scenes                      photographs with handwritten digits in them, and questions
features                    their tokens
reader                      a network that answers the questions
methods                     the methods that are compared
intrinsic, task, agreement  the three studies
report                      docs/quality.md from their results
"""
