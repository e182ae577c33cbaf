"""Input rows become prompts: row -> text or chat -> token ids and sampling, or a dead letter.

``columns`` says which columns a job reads and whether their types fit (no tokenizer needed), ``template`` is the
sandboxed Jinja of ``prompt.template``, ``sampling`` the per-row overrides, ``renderer`` joins them.
"""

from batchinfer.prompts.columns import check_schema, required_columns
from batchinfer.prompts.renderer import PromptRenderer

__all__ = ["PromptRenderer", "check_schema", "required_columns"]
