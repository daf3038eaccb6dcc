"""The two modules of an SLQ model in memory; saved folders hold stock modules only."""

from slq_embed.modules.latent_query_pooling import LatentQueryPooling
from slq_embed.modules.latent_query_transformer import LatentQueryTransformer

__all__ = ["LatentQueryPooling", "LatentQueryTransformer"]
