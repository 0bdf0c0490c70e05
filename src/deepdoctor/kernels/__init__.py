"""The operations that cost time or memory: each file holds the maths, a plain PyTorch reference and the public op."""

__all__: list[str] = []
