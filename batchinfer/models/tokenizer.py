"""A checkpoint's tokenizer, as its files say, without code of the checkpoint and without a question on the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.errors import ModelError
from batchinfer.models.exaone import EXAONE_MODEL_TYPES
from batchinfer.models.files import check_config_files, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory, padding on the left; its chat template is the checkpoint's, or None.

    EXAONE's ``tokenizer.json`` is used verbatim: transformers 5 would rebuild a tokenizer from vocabulary and
    merges (its files name GPT2Tokenizer) and lose the rule that splits digits. Raises ModelError when files are
    missing or broken, or the tokenizer needs code of the checkpoint.
    """
    check_config_files(directory, needs_tokenizer=True)
    try:
        return _tokenizer(directory, str(read_config(directory)["model_type"]))
    except Exception as error:
        # On files they cannot make sense of, transformers and tokenizers raise anything, down to a bare Exception.
        raise ModelError(
            f"{directory}: the tokenizer cannot be loaded ({_one_line(error)}); copy the tokenizer files again, or "
            "give the job token ids (prompt.token_ids)"
        ) from error


def _tokenizer(directory: Path, family: str) -> "PreTrainedTokenizerBase":
    if family in EXAONE_MODEL_TYPES:
        from transformers import PreTrainedTokenizerFast

        exaone: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True, padding_side="left"
        )
        return exaone
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, padding_side="left"
    )
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
