"""The model families of docs/models.md, small and random: each from its transformers configuration or as a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn
from torch.nn import functional

VOCAB = 96


@dataclass(frozen=True)
class Family:
    """A family: its name in the docs, how to build one, whether it has an encoder; the seed avoids tokens on a par."""

    name: str
    build: Callable[[], nn.Module]
    encoder: bool = False
    seed: int = 0


class NanoGPT(nn.Module):
    """In the style of nanoGPT: fused attention, no biases, tied head, positions by arange."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, context: int = 48) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(_NanoBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.ln_f(x))
        return logits


class _NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        parts = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        out: torch.Tensor = x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x))))
        return out


class MinGPT(nn.Module):
    """In the style of minGPT: attention written out with a mask buffer, separate projections, a GELU of its own."""

    def __init__(self, width: int = 36, heads: int = 3, layers: int = 2, context: int = 48) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, context, width))
        self.blocks = nn.Sequential(*(_MinBlock(width, heads, context) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(ids) + self.pos_emb[:, : ids.size(1), :]
        logits: torch.Tensor = self.head(self.ln_f(self.blocks(x)))
        return logits


class _MinBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.key, self.query, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        n = self.ln1(x)
        k, q, v = (
            f(n).view(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.key, self.query, self.value)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = functional.softmax(att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")), dim=-1)
        x = x + self.proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))
        u = self.up(self.ln2(x))
        gelu = 0.5 * u * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * torch.pow(u, 3.0))))
        out: torch.Tensor = x + self.down(gelu)
        return out


class T5Decoder(nn.Module):
    """A T5 decoder without cross-attention, as ByGPT5 has it: its relative bias, its norms, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        config = tf.T5Config(**_t5(), is_decoder=True, is_encoder_decoder=False, use_cache=False)
        stack = tf.T5ForConditionalGeneration(tf.T5Config(**_t5())).encoder.__class__
        self.shared = nn.Embedding(VOCAB, config.d_model)
        self.decoder = stack(config)
        self.decoder.set_input_embeddings(self.shared)
        for block in self.decoder.block:
            del block.layer[1]  # the cross-attention
            block.is_decoder = False  # so that the block looks for none
        self.lm_head = nn.Linear(config.d_model, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.decoder(input_ids=ids).last_hidden_state)
        return logits


def _t5(**changes: object) -> dict[str, object]:
    """A T5 whose inner size, 3 heads of 8, is not its width."""
    plain = {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, "n_positions": 64,
        "relative_attention_max_distance": 20, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0,
    }  # fmt: skip
    return plain | changes


def _llama(**changes: object) -> dict[str, object]:
    plain = {
        "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return plain | changes


def _opt(**changes: object) -> dict[str, object]:
    plain = {
        "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    }  # fmt: skip
    return plain | changes


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=36, n_head=3, n_layer=2, n_positions=64))


def _bloom(heads: int) -> nn.Module:
    return tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=4 * heads, n_layer=2, n_head=heads, seq_length=64)
    )


def _gpt_neo() -> nn.Module:
    alternating = [[["global", "local"], 2]]
    config = tf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=alternating, window_size=7,
        max_position_embeddings=64,
    )  # fmt: skip
    return tf.GPTNeoForCausalLM(config)


def _gpt_j() -> nn.Module:
    return tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    )


def _gpt_neox() -> nn.Module:
    config = tf.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64,
    )  # fmt: skip
    return tf.GPTNeoXForCausalLM(config)


def _gemma() -> nn.Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**_llama(num_key_value_heads=1, num_attention_heads=4)))


def _t5_model(**changes: object) -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(**_t5(**changes)))


def _fido() -> nn.Module:
    """Five decoder layers as FiDO has them (de Jong et al. 2022, section 3.1): cross-attention in some of them only.

    Two pairs without and with make a loop, and the last layer stands apart.
    """
    model = _t5_model(num_layers=1, num_decoder_layers=5)
    for layer, block in enumerate(model.decoder.block):
        if layer not in (1, 3, 4):
            del block.layer[1]  # the cross-attention
            block.is_decoder = False  # so that the block looks for none
    return model


def _mt5() -> nn.Module:
    return tf.MT5ForConditionalGeneration(tf.MT5Config(**_t5(num_heads=6, num_decoder_layers=1)))


_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}

FAMILIES = [
    Family("GPT-2", _gpt2),
    Family("OPT, 125M form", lambda: tf.OPTForCausalLM(tf.OPTConfig(**_opt()))),
    Family("OPT, 350M form", lambda: tf.OPTForCausalLM(tf.OPTConfig(**_opt(**_POST_NORM)))),
    Family("BLOOM, 8 heads", lambda: _bloom(8)),
    Family("BLOOM, 12 heads", lambda: _bloom(12)),
    Family("GPT-Neo", _gpt_neo),
    Family("GPT-J", _gpt_j),
    Family("GPT-NeoX", _gpt_neox),
    Family("Llama", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_llama()))),
    Family("Qwen2", lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_llama(num_key_value_heads=2)))),
    Family("Mistral", lambda: tf.MistralForCausalLM(tf.MistralConfig(**_llama(sliding_window=9)))),
    Family("Gemma", _gemma),
    Family("nanoGPT-style module", NanoGPT),
    Family("minGPT-style module", MinGPT),
    Family("T5 decoder without cross-attention", T5Decoder, seed=4),
    Family("T5 v1.0", _t5_model, encoder=True),
    Family("T5 v1.1", lambda: _t5_model(**_GATED), encoder=True),
    Family("mT5", _mt5, encoder=True),
    Family("FiDO's form of T5", _fido, encoder=True),
    Family("ByT5's shape", lambda: _t5_model(num_layers=3, num_decoder_layers=1, **_GATED), encoder=True),
]


def random_model(family: Family) -> nn.Module:
    """One with values that fp16 holds exactly, and logits that differ enough to be worth comparing."""
    torch.manual_seed(family.seed)
    model = family.build().eval()
    stored_in_out = isinstance(model, tf.GPT2LMHeadModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.3 * torch.randn_like(parameter)
            if any(word in name for word in ("norm", "ln_", ".ln")):
                values = parameter + values
            elif parameter.ndim == 2:
                rows = any(word in name for word in ("embed", "wte", "wpe", "shared", "tok_emb"))
                fan_in = 1 if rows else parameter.shape[0 if stored_in_out else 1]
                values *= 4 / math.sqrt(fan_in)
            parameter.copy_(values.half().float())
    return model
