"""The model that hooks and serving are measured with: the vision encoder of LLaVA-1.5, a decoder as wide as a 1B Llama.

1.1B parameters together. Weights are random: what is measured does not depend on them.
"""

TOKENS = 576  # an image of 336 x 336 pixels in patches of 14 x 14
PICTURE = {"image_size": 336, "patch_size": 14}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
