"""Stands for vLLM, from which SGLang 0.5.23 imports one function where there is no GPU. For tests only."""
