"""The saved folder: stock modules only, and a record beside them."""

from slq_embed.saving.config import SLQConfig

__all__ = ["SLQConfig"]
