"""The two modules of an SLQ model in memory. A saved folder holds stock modules only."""

from slq_embed.modules.latent_query_pooling import LatentQueryPooling
from slq_embed.modules.latent_query_transformer import LatentQueryTransformer

__all__ = ["LatentQueryPooling", "LatentQueryTransformer"]
