"""uft_ds: one-stage fine-tuning (UFT, arXiv 2410.21438) on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
