"""Possible changes of positions and rotary embeddings."""

from __future__ import annotations

from .edits import ALL, Classes, mutation, renamed


@mutation("llava", "qwen2_5_vl", says="no argument known for positions")
def language_model_positions_renamed(c: Classes) -> None:
    c.rename_for_lm("position_ids", "positions")


@mutation("llava", "qwen2_5_vl", both="called with positions of shape")
def layer_positions_renamed(c: Classes) -> None:
    c.rename_for_layers("position_ids", "positions")


@mutation(*ALL, both="layers do not share one rotary embedding")
def layer_rotary_renamed(c: Classes) -> None:
    c.rename_for_layers("position_embeddings", "rotary")


@mutation("llava", "qwen3_vl", both="layers do not share one rotary embedding")
def layer_rotary_split(c: Classes) -> None:
    c.edit(
        c.layer,
        (r"position_embeddings: tuple\[[^\]]*\]( \| None=None)?, ", ""),
        (r"\*\*kwargs: ", "cos=None, sin=None, **kwargs: "),
        ("position_embeddings=position_embeddings", "position_embeddings=(cos, sin)"),
    )
    c.edit(
        c.lm,
        c.layer_call(
            "position_embeddings=position_embeddings", "cos=position_embeddings[0], sin=position_embeddings[1]"
        ),
    )


@mutation("llava", both="layers do not share one rotary embedding")
def layer_makes_its_rotary_embeddings(c: Classes) -> None:
    """A layer computes them from position_ids."""
    made = c.rotary
    c.after_init(c.layer, lambda this: setattr(this, "rotary", made(this.self_attn.config)))
    c.edit(
        c.layer,
        (r" position_embeddings: [^=]*=None,", ""),
        ("position_embeddings=position_embeddings", "position_embeddings=self.rotary(hidden_states, position_ids)"),
    )
    c.edit(
        c.lm, c.layer_call("position_embeddings=position_embeddings, ", ""), (r"\n *position_embeddings = [^\n]*", "")
    )


@mutation("llava")
def layer_makes_its_rotary_embeddings_all_the_same(c: Classes) -> None:
    """A layer computes them from position_ids, but the argument for them still exists."""
    made = c.rotary
    c.after_init(c.layer, lambda this: setattr(this, "rotary", made(this.self_attn.config)))
    c.edit(
        c.layer,
        ("position_embeddings=position_embeddings", "position_embeddings=self.rotary(hidden_states, position_ids)"),
    )


@mutation("llava")
def attention_makes_rotary_embeddings(c: Classes) -> None:
    """The attention computes them from position_ids; layers get both."""
    made = c.rotary
    c.after_init(c.attention, lambda this: setattr(this, "rotary", made(this.config)))
    positions = "kwargs['position_ids']"
    if c.name != "llava":  # the layers also get M-RoPE's positions
        c.edit(
            c.lm, c.layer_call(r"position_ids=\w+", "position_ids=text_position_ids, rotary_position_ids=position_ids")
        )
        positions = "kwargs.pop('rotary_position_ids')"
    c.edit(c.attention, (r"cos, sin = position_embeddings", f"cos, sin = self.rotary(hidden_states, {positions})"))


@mutation("llava", "qwen2_5_vl", both=r"takes \(x, position_ids, length\), expected")
def rotary_called_with_another_argument(c: Classes) -> None:
    c.edit(c.rotary, ("@dynamic_rope_update\n", ""), (r"\(self, x, position_ids\)", "(self, x, position_ids, length)"))
    c.edit(c.lm, (r"(self\.rotary_emb\([^\n]*)\)\n", r"\1, length=1)\n"))


@mutation("llava", "qwen2_5_vl", both=r"takes \(x, positions\), expected")
def rotary_argument_renamed(c: Classes) -> None:
    c.edit(c.rotary, ("@dynamic_rope_update\n", ""), renamed("position_ids", "positions"))
    c.edit(
        c.lm,
        (
            r"self\.rotary_emb\(hidden_states, (position_ids=)?position_ids\)",
            "self.rotary_emb(hidden_states, positions=position_ids)",
        ),
    )


@mutation("llava", "qwen3_vl", both="was called with rotary embeddings")
def rotary_with_an_axis_for_heads(c: Classes) -> None:
    c.edit(
        c.rotary,
        (
            r"return \(cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\)\)",
            "return (cos.to(dtype=x.dtype)[:, None], sin.to(dtype=x.dtype)[:, None])",
        ),
    )
    c.edit(c.attention, (r"cos, sin = position_embeddings", "cos, sin = (t[:, 0] for t in position_embeddings)"))


@mutation("llava", "qwen2_5_vl")
def rotary_in_one_tensor(c: Classes) -> None:
    c.edit(
        c.rotary,
        (r"return \((cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\))\)", r"return torch.cat([\1], dim=-1)"),
    )
    c.edit(c.attention, (r"cos, sin = position_embeddings", "cos, sin = position_embeddings.chunk(2, dim=-1)"))


@mutation("llava", both="was called with rotary embeddings")
def rotary_before_the_sequence(c: Classes) -> None:
    """They have shape [L, B, d], which no shape check notices if there are as many rows as columns."""
    c.edit(
        c.rotary,
        (
            r"return \(cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\)\)",
            "return (cos.to(dtype=x.dtype).transpose(0, 1), sin.to(dtype=x.dtype).transpose(0, 1))",
        ),
    )
    c.edit(
        c.attention, (r"cos, sin = position_embeddings", "cos, sin = (t.transpose(0, 1) for t in position_embeddings)")
    )


@mutation("llava", "qwen3_vl", says="no argument known for positions")
def language_model_counts_its_positions(c: Classes) -> None:
    """The language model gets no positions."""
    if c.name == "llava":
        made = "attention_mask.cumsum(1)[:, -inputs_embeds.shape[1]:] - 1 if attention_mask is not None else None"
        c.edit(c.core, c.lm_call("position_ids=position_ids, ", ""))
        c.edit(
            c.lm,
            (r" position_ids: [^=]*=None,", ""),
            (r"\n    if position_ids is None", rf"\n    position_ids = {made}\g<0>"),
        )
    else:
        c.edit(c.core, c.lm_call("position_ids=position_ids", "places=position_ids"))
        c.edit(
            c.lm,
            (r"position_ids: ", "places: "),
            (r"\n    if position_ids is None", r"\n    position_ids = places\g<0>"),
        )
