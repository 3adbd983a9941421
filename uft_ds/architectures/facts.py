"""One table of what is known of each model family, by `config.model_type`.

Everything that depends on the architecture asks here: loading, lockstep, the head, the planner and the checks. A new
family is one entry of `FAMILIES` and one line in `tests/models.py`; a family without an entry works as
far as its structure shows where its layers are, and the checks at the start of a run measure the rest. No torch here:
the planner and the checks of a recipe read these facts without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STATE = "its layers carry a state along the row"
POSITIONS = "its learned positions do not restart with each sequence of a row"
MASK = "its attention mask does not read position_ids"


@dataclass(frozen=True)
class Family:
    """What is known of one architecture.

    layer_class: the decoder layer, which ZeRO-3 gathers as a whole.
    layers, norm: the decoder's attributes with the list of layers and with the final norm.
    mlp_projections: gate, up and down, of an expert as well; two where the MLP has no gate.
    leaks: why the sequences of a packed row change each other; empty where the tests show that they do not.
    lockstep: whether the tests hold the lockstep reference against two separate forwards.
    experts: whether the tests hold adapters of the routed experts, trained and merged, against PEFT's.
    name: what messages and documentation call it; given where `lockstep` is.
    """

    layer_class: str
    layers: str = "layers"
    norm: str = "norm"
    mlp_projections: int = 3
    leaks: str = ""
    lockstep: bool = False
    experts: bool = False
    name: str = ""


FAMILIES = {
    "llama": Family("LlamaDecoderLayer", lockstep=True, name="Llama"),
    "mistral": Family("MistralDecoderLayer", lockstep=True, name="Mistral"),
    "qwen2": Family("Qwen2DecoderLayer", lockstep=True, name="Qwen2"),
    "qwen3": Family("Qwen3DecoderLayer", lockstep=True, name="Qwen3"),
    "qwen2_5_vl": Family("Qwen2_5_VLDecoderLayer", lockstep=True, name="Qwen2.5-VL"),
    "qwen2_moe": Family("Qwen2MoeDecoderLayer", lockstep=True, experts=True, name="Qwen2-MoE"),
    "qwen3_moe": Family("Qwen3MoeDecoderLayer", lockstep=True, experts=True, name="Qwen3-MoE"),
    "mixtral": Family("MixtralDecoderLayer", lockstep=True, experts=True, name="Mixtral"),
    "olmoe": Family("OlmoeDecoderLayer", lockstep=True, experts=True, name="OLMoE"),
    "phi": Family("PhiDecoderLayer", norm="final_layernorm", mlp_projections=2),
    "phi3": Family("Phi3DecoderLayer", lockstep=True, name="Phi-3"),
    "gemma": Family("GemmaDecoderLayer"),
    "gemma2": Family("Gemma2DecoderLayer", lockstep=True, name="Gemma 2"),
    "gemma3_text": Family("Gemma3DecoderLayer", lockstep=True, name="Gemma 3"),
    "granite": Family("GraniteDecoderLayer", lockstep=True, name="Granite"),
    "cohere": Family("CohereDecoderLayer"),
    "cohere2": Family("Cohere2DecoderLayer"),
    "olmo2": Family("Olmo2DecoderLayer", lockstep=True, name="OLMo 2"),
    "gpt_neox": Family("GPTNeoXLayer", norm="final_layer_norm", mlp_projections=2, lockstep=True, name="GPT-NeoX"),
    "gptj": Family("GPTJBlock", layers="h", norm="ln_f", mlp_projections=2),
    "codegen": Family("CodeGenBlock", layers="h", norm="ln_f", mlp_projections=2),
    "gpt2": Family("GPT2Block", layers="h", norm="ln_f", mlp_projections=2),
    # The sequences of a packed row change each other in these: measured, see docs/reference.md.
    "bloom": Family("BloomBlock", layers="h", norm="ln_f", mlp_projections=2, leaks=MASK),
    "falcon": Family("FalconDecoderLayer", layers="h", norm="ln_f", mlp_projections=2, leaks=MASK),
    "gpt_oss": Family("GptOssDecoderLayer", leaks=MASK),
    "opt": Family("OPTDecoderLayer", norm="final_layer_norm", mlp_projections=2, leaks=POSITIONS),
    "bamba": Family("BambaDecoderLayer", norm="final_layernorm", leaks=STATE),
    "granitemoehybrid": Family("GraniteMoeHybridDecoderLayer", leaks=STATE),
    "lfm2": Family("Lfm2DecoderLayer", norm="embedding_norm", leaks=STATE),
    "mamba": Family("MambaBlock", norm="norm_f", leaks=STATE),
    "qwen3_next": Family("Qwen3NextDecoderLayer", leaks=STATE),
    "recurrent_gemma": Family("RecurrentGemmaDecoderLayer", norm="final_norm", leaks=STATE),
}
"""Families that tests cover: each by a tiny model that is held against its entry and whose packed rows are measured."""

_ALSO_LEAK = {
    **dict.fromkeys(("afmoe", "mpt", "openai-gpt"), MASK),
    **dict.fromkeys(("bart", "biogpt", "marian", "mbart", "pegasus", "trocr", "xglm"), POSITIONS),
    "deepseek_v4": "its attention compresses blocks of tokens along the row",
}
"""Measured once, with transformers 5.23, and known to leak; other layers with a state are known by their classes."""

_UNKNOWN = Family("")
LAYERS = ("layers", "h", "blocks")
"""Where decoders keep their layers."""
_STATEFUL = re.compile(
    r"mamba|ssm|ssd|shortconv|deltanet|deltaattention|recurrent|rglru|rwkv|lstm|gru|retention|lightning|linearattention",
    re.IGNORECASE,
)
"""In the class name of a layer that carries a state along the row, whatever the family."""

_OF_TEXT = re.compile(r"(^|\.)(language_model|lm_head)\.")
"""In the name of a parameter that text reaches, in a wrapper for images and text."""
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|bo[ai]|eo[ai])_(\w+_)?token_(id|index)")
"""A key of a wrapper's config that names such a token: image_token_id, boi_token_index, vision_start_token_id."""
_ROUTED = re.compile(r"(^|\.)experts\.")
"""In the name of a parameter of a mixture's routed experts; a shared expert is called otherwise."""


def family_of(config: Any) -> Family:
    """The entry of a config's model type, or of its language model's; for an unknown one an entry without facts."""
    kinds = [getattr(config, "model_type", "")]
    if hasattr(config, "get_text_config"):
        kinds.append(config.get_text_config().model_type)
    known = (FAMILIES.get(name) for kind in kinds for name in (kind, kind.removesuffix("_text")))
    return next((family for family in known if family is not None), _UNKNOWN)


def wraps_a_language_model(config: Any) -> bool:
    """Whether a config is of a model of images and text, which holds a language model beside what reads images."""
    return config.get_text_config() is not config


def placeholder_ids(config: Any) -> frozenset[int]:
    """The ids of the tokens in whose places a wrapper reads images, films or sound, and of those around them.

    None for a config of another model.
    """
    if not wraps_a_language_model(config):
        return frozenset()
    found = (value for name, value in vars(config).items() if _PLACEHOLDER.fullmatch(name))
    return frozenset(value for value in found if type(value) is int)


def is_passed_by_text(config: Any, parameter: str) -> bool:
    """Whether text reaches a parameter: not what a wrapper reads images with.

    Args:
        parameter: its name in the whole model.
    """
    return not wraps_a_language_model(config) or _OF_TEXT.search(parameter) is not None


def active_share(config: Any, parameter: str) -> float:
    """The share of a parameter that one token passes: of a mixture's routed experts only some; 1 for any other.

    Args:
        parameter: its name in the model, or in a layer of it.
    """
    if not is_routed(parameter):
        return 1.0
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts, chosen = next((count for count in counts if count), None), getattr(text, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0


def is_routed(parameter: str) -> bool:
    """Whether a parameter is of a mixture's routed experts, by its name in the model or in a layer of it."""
    return _ROUTED.search(parameter) is not None


def adapts_experts(config: Any) -> bool:
    """Whether the routed experts of this model may get adapters."""
    return family_of(config).experts


def names_with_experts() -> tuple[str, ...]:
    """The families whose routed experts may get adapters, by the names that messages use."""
    return tuple(sorted(family.name for family in FAMILIES.values() if family.experts))


def shown_in_lockstep() -> tuple[str, ...]:
    """The decoder layer classes that the tests hold against two separate forwards and Hugging Face's own."""
    return tuple(sorted(family.layer_class for family in FAMILIES.values() if family.lockstep))


def names_in_lockstep() -> tuple[str, ...]:
    """The same families by the names that messages and documentation use."""
    return tuple(sorted((family.name for family in FAMILIES.values() if family.lockstep), key=str.lower))


# ---- where things are


def layers_attribute(decoder: Any) -> str | None:
    """The attribute of a decoder that holds its list of layers; None if there is none."""
    names = (family_of(getattr(decoder, "config", None)).layers, *LAYERS)
    return next((name for name in names if _is_list(getattr(decoder, name, None))), None)


def decoder_layers(decoder: Any) -> Any:
    """The decoder's layers, an `nn.ModuleList`.

    Raises:
        AttributeError: it keeps them elsewhere; `accept.check_base_model` refuses such a model before a launch.
    """
    name = layers_attribute(decoder)
    if name is None:
        raise AttributeError(f"{type(decoder).__name__} keeps no list of layers in {', '.join(LAYERS)}")
    return getattr(decoder, name)


def final_norm(decoder: Any) -> Any:
    """The decoder's final norm, of a family that has an entry."""
    return getattr(decoder, family_of(decoder.config).norm)


def keep_layers(decoder: Any, count: int) -> None:
    """Cut a decoder to its first layers."""
    name = layers_attribute(decoder)
    assert name is not None
    setattr(decoder, name, getattr(decoder, name)[:count])


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "named_parameters") and len(value) > 0


# ---- whether rows may be packed


def reason_of_leak(config: Any, module_classes: Iterable[type]) -> str | None:
    """Why the sequences of a packed row would change each other; None if nothing shows it.

    Args:
        module_classes: of all modules inside the decoder layers, for families without an entry.
    """
    family = family_of(config)
    if family is not _UNKNOWN:
        return family.leaks or None
    if (known := _ALSO_LEAK.get(getattr(config, "model_type", ""))) is not None:
        return known
    stateful = sorted({kind.__name__ for kind in module_classes if _STATEFUL.search(kind.__name__)})
    # A convolution along the row mixes neighbouring tokens, wherever one sequence ends.
    convolutions = sorted({kind.__name__ for kind in module_classes if kind.__name__ == "Conv1d"})
    found = stateful or convolutions
    return f"{STATE} ({', '.join(found)})" if found else None


def is_shown_to_pack(config: Any) -> bool:
    """Whether the tests hold packed rows of this family against rows of one sequence."""
    family = family_of(config)
    return family is not _UNKNOWN and not family.leaks


def declared_positions(config: Any) -> int | None:
    """How many positions a model is made for, or the language model of one of images and text; None: it does not say.

    Some rotary embeddings change the numbers of all positions before it is reached: see `positions_limit`.
    """
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def positions_limit(config: Any) -> tuple[str, int] | None:
    """The kind of rotary embeddings that change all positions with the longest one, and up to where they do not.

    Args:
        config: of a model, or of one of images and text, whose language model has them.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    limit = rope.get("original_max_position_embeddings") or declared_positions(config)
    found = sorted(kinds & {"dynamic", "longrope"})
    return (found[0], int(limit)) if found and limit is not None else None


def most_positions(config: Any) -> int | None:
    """How many tokens a sequence may have before the model's numbers degrade or change; None: any number."""
    changing = positions_limit(config)
    limits = (declared_positions(config), changing and changing[1])
    return min((int(limit) for limit in limits if limit), default=None)


# ---- logits


_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Keys of a factor on the logits: Cohere's, Muse's, Falcon-H1's."""


def logit_scale_and_cap(config: Any) -> tuple[float, float | None]:
    """The factor on the logits and their soft cap, by the keys that configurations use for them.

    Other models do more, or under other keys: the check at the start compares with the model's own logits.
    """
    scale = next((float(found) for name in _MULTIPLIERS if (found := getattr(config, name, None))), 1.0)
    divisor = getattr(config, "logits_scaling", None)  # Granite, MiniCPM3; HyperCLOVA X multiplies by it
    if divisor:
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return scale, getattr(config, "final_logit_softcapping", None) or None  # Gemma 2


# ---- cost


def attention_parity(config: Any) -> float:
    """Tokens at which a sequence's attention takes as many FLOPs as the rest of the model's layers; inf if unknown.

        d hidden size, f width of the MLP, q = query heads x head_dim, k = key-value heads x head_dim
        parameters = 2 d q + 2 d k + 3 d f      query and output, key and value, gate, up and down projections;
                                                2 d f where the MLP has no gate
        the rest, of a token and a layer        2 x parameters
        attention, of T tokens, causal          2 q T     T / 2 keys on average: 2 q for QK^T and 2 q for AV, each
        equal at                                T = parameters / q

    Forward and backward stand in the same proportion. A sliding window is not counted: beyond it, attention is taken
    for more than it is.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    text = config.get_text_config()
    if not all(getattr(text, name, None) for name in names):
        return math.inf
    hidden, mlp, heads = (int(getattr(text, name)) for name in names)
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    mlp_weights = family_of(config).mlp_projections * hidden * mlp
    return float((2 * hidden * query + 2 * hidden * key_value + mlp_weights) / query)
