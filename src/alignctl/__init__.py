"""Align language models on one GPU, from one recipe: SFT, DPO and ORPO."""

__version__ = "0.1.0"
