"""What compression costs in accuracy, on real tokens of real pictures: `python -m benchmarks.quality --help`.

scenes: photographs with handwritten digits in them, and questions. features: their tokens. reader: answers questions.
methods: what is compared. intrinsic, task, agreement: the three studies. report: docs/quality.md from their results.
"""
