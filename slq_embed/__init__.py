"""slq-embed: turn a frozen multimodal LLM into a retriever by training a few latent queries."""

from slq_embed.encoder import SLQEncoder
from slq_embed.modules import QueryAdapter
from slq_embed.store import PrefixStore
from slq_embed.toy import pretrained
from slq_embed.training import SymmetricInfoNCELoss
from slq_embed.version import __version__

__all__ = ["PrefixStore", "QueryAdapter", "SLQEncoder", "SymmetricInfoNCELoss", "__version__", "pretrained"]
