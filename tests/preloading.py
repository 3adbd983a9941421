"""Imported once by the server that commands and ranks are forked from (`forking.py`): what they would import."""

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

FAMILIES = ("gemma2", "gemma3", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
# Not `uft_ds.cli` and `uft_ds.commands`, which read the terminal's width when they are imported; they take 0.1 seconds.
PRELOADED = [
    "pytest",
    "typer",
    "uft_ds.evaluation.generate",
    "uft_ds.export.convert",
    "uft_ds.run.rank",
    "uft_ds.run.start",
    "uft_ds.sweep.run",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every ZeRO optimiser imports it
    # What a run imports on its way: half a CPU second a rank.
    "deepspeed.ops.op_builder.all_ops",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
]

for name in PRELOADED:
    importlib.import_module(name)
# Names of weights of every model that transformers knows: 900 regular expressions, compiled where the first model is
# loaded, and a fifth of what it costs a rank to set up an engine.
get_checkpoint_conversion_mapping("qwen2")
