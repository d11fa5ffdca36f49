"""Tiny random checkpoints in the hub's layout, one file a family, and the reference that judges them."""

from parity.checkpoints import deepseek, gemma3n, gemma4, llama4, phimoe, qwen3, qwen3_next, qwen3_vl

ARCHITECTURES = {
    **deepseek.ARCHITECTURES,
    **gemma3n.ARCHITECTURES,
    **gemma4.ARCHITECTURES,
    **llama4.ARCHITECTURES,
    **phimoe.ARCHITECTURES,
    **qwen3.ARCHITECTURES,
    **qwen3_next.ARCHITECTURES,
    **qwen3_vl.ARCHITECTURES,
}
