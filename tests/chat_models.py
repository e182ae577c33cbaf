"""Tokenizers and chat templates in the manner of several families, small enough to build in a test.

Each differs from the others in what a chat mark is to its tokenizer: a special token, an added one, or plain text.
"""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import EXAONE3_TEMPLATE, EXAONE4_TEMPLATE

LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else "
    "message.role %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"
)

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
#: Words that the tokenizers merge, so that a border put into a text would show in its tokens.
_WORDS = ("user", "system", "assistant", "end", "turn", "the", "im", "start")
_MERGES = list(dict.fromkeys((word[:end], word[end]) for word in _WORDS for end in range(1, len(word))))


def _fast(backend: Tokenizer, template: str, **names: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = template
    return tokenizer  # type: ignore[no-any-return]


def _byte_level(
    special: tuple[str, ...], others: tuple[str, ...], template: str, **names: str
) -> PreTrainedTokenizerFast:
    vocabulary = [*_ALPHABET, *(left + right for left, right in _MERGES)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in others])
    return _fast(backend, template, **names)


def exaone3() -> PreTrainedTokenizerFast:
    """Only the end of a turn is a token; runs of blanks are added tokens that are not special."""
    tokens = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|endofturn|]")
    return _byte_level(tokens, ("  ", "    "), EXAONE3_TEMPLATE, eos_token="[|endofturn|]", bos_token="[BOS]")


def exaone4() -> PreTrainedTokenizerFast:
    """Roles are added tokens too."""
    tokens = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|endofturn|]")
    others = ("[|user|]", "[|assistant|]", "[|system|]", "[|tool|]", "<think>", "</think>")
    return _byte_level(tokens, others, EXAONE4_TEMPLATE, eos_token="[|endofturn|]", bos_token="[BOS]")


def llama3() -> PreTrainedTokenizerFast:
    """Many special tokens, most of them reserved, and one put first by a rule of the tokenizer."""
    named = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokens = (*named, *(f"<|reserved_special_token_{index}|>" for index in range(250)))
    tokenizer = _byte_level(tokens, (), LLAMA3_TEMPLATE, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return tokenizer


def qwen() -> PreTrainedTokenizerFast:
    """ChatML, with tags of content that are added tokens and not special; composed characters (NFC)."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    others = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|fim_pad|>")
    tokenizer = _byte_level(special, others, CHATML_TEMPLATE, eos_token="<|im_end|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """Pieces with a mark for blanks and bytes to fall back on; special tokens lie in the vocabulary."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    characters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(a + b for a, b in _MERGES)]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=_MERGES,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return _fast(backend, GEMMA_TEMPLATE, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Pieces by likelihood, ends of sequence among them, a blank put first, compatibility forms made equal."""
    special = ["<unk>", "<s>", "</s>"]
    characters = [chr(code) for code in range(33, 127)] + ["\u2581"]
    backend = Tokenizer(
        models.Unigram([*((token, 0.0) for token in special), *((char, -5.0) for char in characters)], unk_id=0)
    )
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    # What is looked for behind the normalizer can be made by it.
    backend.add_tokens([AddedToken(token, special=True, normalized=True) for token in special])
    return _fast(backend, LLAMA2_TEMPLATE, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


#: Every family, by name.
FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "exaone3": exaone3,
    "exaone4": exaone4,
    "llama3": llama3,
    "qwen": qwen,
    "gemma": gemma,
    "unigram": unigram,
}
