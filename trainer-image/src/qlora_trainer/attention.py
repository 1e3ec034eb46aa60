"""Attention over packed samples on GPUs: flash attention with sequence boundaries instead of a mask.

Rules: registered with transformers as one more attention function, so that every model that goes through its interface
can use it; without packed samples it is PyTorch's own choice (cuDNN on Hopper). Models that cap scores, or look back
less far than a sequence is long, keep transformers' masks.
"""

from typing import Any

import torch
from torch import Tensor

NAME = "qlora_packed"


def pick_attention(hf_config: Any, max_length: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Name of the attention function for this model and device; None: transformers' default."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    reach = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    short = any(tokens is not None and tokens < max_length for tokens in reach)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    sinks = "gpt_oss" in text.model_type
    no_flash = device.type != "cuda" or dtype == torch.float32
    if no_flash or capped or sinks or short:
        return None
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def sequence_bounds(position_ids: Tensor) -> Tensor:
    """Start of every packed sample in the flattened batch, then the total, int32; position_ids on the CPU.

    Repeats the total up to a power of two plus one: few shapes, so few compilations; empty samples cost nothing.
    """
    starts = torch.nonzero(position_ids.reshape(-1) == 0).view(-1)
    total = position_ids.numel()
    assert starts.numel() > 0 and int(starts[0]) == 0, "positions of a batch begin at 0"
    padded = 1 << (starts.numel() - 1).bit_length()
    return torch.cat([starts, starts.new_full((padded + 1 - starts.numel(),), total)]).to(torch.int32)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention; q, k, v (batch, heads, length, head), the result (batch, length, heads, head)."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    batch, heads, length, size = query.shape
    q, k, v = (t.transpose(1, 2).reshape(batch * length, -1, size) for t in (query, key, value))
    output = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, length, length, dropout, True, False, scale=scaling
    )[0]
    return output.view(batch, length, heads, size), None
