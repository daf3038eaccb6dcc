"""The saved folder: stock modules only, and a record beside them; and a folder for vLLM."""

from slq_embed.saving.config import SLQConfig
from slq_embed.saving.export import export_vllm

__all__ = ["SLQConfig", "export_vllm"]
