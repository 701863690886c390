"""Qwen2: the forward pass, the tokenizer, the chat template, generation."""
