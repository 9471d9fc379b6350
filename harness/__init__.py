"""harness: fine-tune translation and language models with DeepSpeed, and score them with beam search."""

__version__ = "0.1.0"
