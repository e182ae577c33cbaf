"""An output's completions copied out: as numbered files, as an OpenAI batch's results, as benchmarks' judges read them.

``exporting`` is the way in, ``source`` what is read, ``target`` the directory that is written; ``numbered``,
``openai_batch`` and ``judges`` are the forms.
"""

from batchinfer.export.exporting import FORMATS, ExportResult, Format, export

__all__ = ["FORMATS", "ExportResult", "Format", "export"]
