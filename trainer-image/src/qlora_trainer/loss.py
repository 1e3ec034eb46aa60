"""Cross-entropy of a large vocabulary without ever holding all logits.

Rules: logits exist for CHUNK tokens at a time; the gradient of the hidden states is computed in the forward pass
(the head is frozen, so that is all there is) and scaled in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 2048  # tokens
IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, float32 (tokens,), 0 where it is IGNORED, and the gradient of the sum by `logits`.

    logits (tokens, vocabulary) of any floating type; `scale` multiplies them, `cap` > 0 caps them by
    cap * tanh(logits / cap) afterwards (Gemma 2).
    """
    values = logits.float() * scale
    if cap:
        tanh = torch.tanh(values / cap)
        values = cap * tanh
    counted = labels != IGNORED
    target = torch.where(counted, labels, 0)
    normalizer = torch.logsumexp(values, -1)
    loss = torch.where(counted, normalizer - values.gather(1, target[:, None]).squeeze(1), 0.0)
    columns = torch.arange(values.shape[1], device=values.device)
    grad = torch.exp(values - normalizer[:, None]) - (columns[None] == target[:, None]).float()
    grad = torch.where(counted[:, None], grad, 0.0) * scale
    if cap:
        grad = grad * (1 - tanh * tanh)
    return loss, grad.to(logits.dtype)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cap: float,
        scale: float,
        inner: Any,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wants_grad else hidden.new_empty(0)
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, min(start + CHUNK, hidden.shape[0]))
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            losses[part], logits_grad = inner(logits, labels[part], cap, scale)
            if wants_grad:
                torch.mm(logits_grad, weight, out=grad[part])
            del logits, logits_grad  # before the next chunk's, not after
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype)[:, None], None, None, None, None, None, None


def chunked_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cap: float = 0.0,
    scale: float = 1.0,
    inner: Any = token_losses,
) -> Tensor:
    """Cross-entropy of each token, float32 (tokens,), 0 where it is IGNORED.

    hidden (tokens, d), weight (vocabulary, d), labels (tokens,), already shifted.
    """
    return _ChunkedLosses.apply(hidden, weight, bias, labels, cap, scale, inner)  # type: ignore[no-any-return]
