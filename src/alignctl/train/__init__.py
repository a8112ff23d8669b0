"""The heavy wing: the only rooms, with `evaluate`, that may import torch, transformers, trl, peft and datasets."""
